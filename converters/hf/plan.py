# SPDX-License-Identifier: MIT
"""From the names that a checkpoint has to the tensors that a GGUF file will have: renamed, split, stacked, in order.

Nothing is read but headers. The order in the file is what every token needs, then the routed experts, each layer by
layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import gguf

from edgemoe.errors import ConversionError

from .checkpoint import SCALE_SUFFIX, Checkpoint, StoredTensor
from .family import Family, Hparams
from .sources import Piece, Rows

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")
_LAYER = re.compile(r"model\.layers\.(\d+)\..*")
_BLOCK = re.compile(r"blk\.(\d+)\.(.*)")
_RENAME_ALL = ((r"(.*)e_score_correction_bias", r"\1e_score_correction.bias"),)
_SKIP_ALL = (r".*\.rotary_emb\.inv_freq", r".*\.attention\.(masked_)?bias")


def plan_tensors(checkpoint: Checkpoint, family: Family, hparams: Hparams) -> list[Piece]:
    """The tensors of the result, in their order in the file.

    Raises:
        ConversionError: a tensor has no place in the architecture, experts are missing or too many, or shapes differ.
    """
    names = gguf.get_tensor_name_map(family.arch, hparams.n_layers)
    planned: dict[str, Piece] = {}
    experts: dict[str, dict[int, Piece]] = {}
    for tensor in checkpoint.tensors.values():
        for piece in _pieces_of(tensor, family, hparams):
            if match := _EXPERT.fullmatch(piece.name):
                stacked = _gguf_name(f"{match.group(1)}.{match.group(3)}", names, tensor, family)
                experts.setdefault(stacked, {})[int(match.group(2))] = piece
            else:
                name = _gguf_name(piece.name, names, tensor, family)
                if name in planned:
                    raise ConversionError(
                        f"cannot convert {checkpoint.folder}: {tensor.name} and another tensor would both be {name}; "
                        "the checkpoint has a tensor too many"
                    )
                planned[name] = Piece(name, piece.shape, piece.sources)
    for name, parts in experts.items():
        planned[name] = _stack(name, parts, checkpoint, hparams)
    for piece in family.constants(hparams):
        planned[piece.name] = piece
    _check_expert_counts(planned.values(), checkpoint, hparams)
    return sorted(planned.values(), key=_order)


def _pieces_of(tensor: StoredTensor, family: Family, hparams: Hparams) -> list[Piece]:
    if _is_left_out(tensor.name, hparams):
        return []
    name = tensor.name
    for pattern, replacement in (*_RENAME_ALL, *family.rename):
        if match := re.fullmatch(pattern, name):
            name = match.expand(replacement)
    if any(re.fullmatch(pattern, name) for pattern in (*_SKIP_ALL, *family.skip)):
        return []
    for rule in family.rules:
        if match := re.fullmatch(rule.pattern, name):
            return rule.make(tensor, match, hparams)
    return [Piece(name, tensor.shape, (Rows(tensor),))]


def _is_left_out(name: str, hparams: Hparams) -> bool:
    """Whether a tensor is scales of FP8, part of a layer that predicts further tokens, or a second copy of the
    embedding."""
    if name.endswith(SCALE_SUFFIX):
        return True
    if (match := _LAYER.fullmatch(name)) and int(match.group(1)) >= hparams.n_layers:
        return True
    return name == "lm_head.weight" and bool(hparams.get("tie_word_embeddings", "tie_embedding"))


def _gguf_name(name: str, names: gguf.TensorNameMap, tensor: StoredTensor, family: Family) -> str:
    if _BLOCK.fullmatch(name):
        return name
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ConversionError(
            f"cannot convert {tensor.name}: llama.cpp's architecture {gguf.MODEL_ARCH_NAMES[family.arch]} has no place "
            f"for it ({tensor.path}); is it a {family.name} checkpoint, without adapters and other additions?"
        )
    return str(found)


def _stack(name: str, parts: dict[int, Piece], checkpoint: Checkpoint, hparams: Hparams) -> Piece:
    """Experts as one tensor."""
    if sorted(parts) != list(range(hparams.n_experts)):
        missing = sorted(set(range(hparams.n_experts)) - set(parts))
        shown = f"expert {missing[0]} is missing" if missing else f"found expert {max(parts)}"
        raise ConversionError(
            f"cannot convert {checkpoint.folder}: {name} has {len(parts)} experts, expected {hparams.n_experts} "
            f"({hparams.path.name}), {shown}; config.json and weights are of different models, or a shard is damaged"
        )
    shape = parts[0].shape
    if odd := next((expert for expert, piece in parts.items() if piece.shape != shape), None):
        raise ConversionError(
            f"cannot convert {checkpoint.folder}: {name} of expert {odd} has the shape {list(parts[odd].shape)}, that "
            f"of expert 0 is {list(shape)}; download the checkpoint again"
        )
    sources = tuple(source for expert in range(hparams.n_experts) for source in parts[expert].sources)
    return Piece(name, (hparams.n_experts, *shape), sources)


def _check_expert_counts(pieces: Iterable[Piece], checkpoint: Checkpoint, hparams: Hparams) -> None:
    """Experts that are stored together and routers must count as many as config.json says."""
    for piece in pieces:
        is_router = re.fullmatch(r"blk\.\d+\.(ffn_gate_inp\.(weight|bias)|exp_probs_b\.bias)", piece.name)
        is_bank = re.fullmatch(r"blk\.\d+\.ffn_(gate|up|down|gate_up)_exps\.(weight|bias)", piece.name)
        if (is_router or is_bank) and piece.shape[0] != hparams.n_experts:
            raise ConversionError(
                f"cannot convert {checkpoint.folder}: {piece.name} has {piece.shape[0]} experts, expected "
                f"{hparams.n_experts} ({hparams.path.name}); config.json and weights are of different models"
            )


def _order(piece: Piece) -> tuple[int, int, str]:
    match = _BLOCK.fullmatch(piece.name)
    layer = int(match.group(1)) if match else -1
    is_expert = "_exps." in piece.name
    after = piece.name.startswith("output")
    return (2 if is_expert else 1 if after else 0, layer, piece.name)
