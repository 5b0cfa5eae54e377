# SPDX-License-Identifier: MIT
"""A folder with an ONNX language model, as `edgemoe convert onnx` and onnxruntime-genai's model builder write it: what
it holds, and where the bytes of a budget go when it generates. Neither ONNX Runtime nor genai is needed to say so.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

from edgemoe import _native, host
from edgemoe.errors import BackendError, ModelFormatError
from edgemoe.formats.onnx_model import MICROSOFT, OnnxModel, OnnxNode, read_model
from edgemoe.onnx_plan import OnnxPlan, kv_bytes, plan, streamed
from edgemoe.types import Plan

CONFIG_NAME = "genai_config.json"
DEFAULT_CTX = 4096
# Logits of a piece of a prompt, of all its tokens; the model may compute them twice over.
_LOGITS_BYTES = 32 << 20
_MAX_PIECE_TOKENS = 512
# What onnxruntime-genai 0.18.0 takes once it is imported and has our provider: 21 MiB on x86-64.
_ENGINE_BYTES = 32 << 20
_FLOATS = (1, 10, 11, 16)


@dataclasses.dataclass(frozen=True)
class OnnxFolder:
    """What the folder says.

    Attributes:
        path, model: the folder and its decoder.
        architecture: genai's name of the model's type.
        context_length: the longest context.
        vocab_size: logits of a token.
        head_size: columns of a key; None where genai's configuration does not say.
        shares_cache: whether genai makes the cache of the whole context at once, and keeps it.
    """

    path: Path
    model: OnnxModel
    architecture: str
    context_length: int
    vocab_size: int
    head_size: int | None
    shares_cache: bool

    @property
    def n_piece_tokens(self) -> int:
        """So many tokens of a prompt are evaluated at once."""
        return max(1, min(_MAX_PIECE_TOKENS, _LOGITS_BYTES // (4 * self.vocab_size)))

    def context(self, n_ctx: int | None) -> int:
        """The context in tokens that `n_ctx` asks for.

        Raises:
            BackendError: it is more than the model's.
        """
        if n_ctx is None:
            return min(DEFAULT_CTX, self.context_length)
        if n_ctx > self.context_length:
            raise BackendError(
                f"cannot make a context of {n_ctx} tokens: the model's is at most {self.context_length} ({self.path}); "
                f"use --ctx {self.context_length}"
            )
        return n_ctx


def read_folder(path: Path) -> OnnxFolder:
    """Read genai_config.json and the decoder's header; no tensor is read.

    Raises:
        ModelFormatError: a file is missing or corrupt, or the model is none that answers text with text.
    """
    config_path = path / CONFIG_NAME
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        search, model = config.get("search", {}), config["model"]
        name, kind = model["decoder"]["filename"], str(model["type"])
        context_length, vocab_size = int(model["context_length"]), int(model["vocab_size"])
        head_size = model["decoder"].get("head_size")
        head_size = None if head_size is None else int(head_size)
        shares_cache = bool(search.get("past_present_share_buffer", False))
    except OSError as error:
        raise ModelFormatError(
            f"cannot open the model: {error.strerror} ({config_path}); name a .gguf file, or a folder that "
            "`edgemoe convert onnx` or onnxruntime-genai's model builder wrote"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFormatError(
            f"cannot read the model's configuration: {type(error).__name__} {error} ({config_path}); export it again"
        ) from None
    others = sorted({"encoder", "vision", "speech", "embedding"} & set(model))
    if others:
        raise ModelFormatError(
            f"cannot generate with this model: it has a part {others[0]!r}, expected a decoder alone ({config_path})"
        )
    if vocab_size < 1 or context_length < 1:
        raise ModelFormatError(
            f"cannot read the model's configuration: vocab_size {vocab_size}, context_length "
            f"{context_length}, expected positive numbers ({config_path})"
        )
    decoder = read_model(path / str(name))
    return OnnxFolder(path, decoder, kind, context_length, vocab_size, head_size, shares_cache)


@functools.cache
def genai() -> Any:
    """The package onnxruntime-genai, with our provider registered.

    Raises:
        BackendError: it is not installed, or refuses the plug-in.
    """
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise BackendError(
            f"cannot import onnxruntime_genai: {error}; text from a folder needs the package onnxruntime-genai: pip "
            "install 'edgemoe[genai]'"
        ) from error
    _native.register_ort_plugin(onnxruntime_genai.register_execution_provider_library)
    return onnxruntime_genai


def session_plan(folder: OnnxFolder, n_ctx: int, prefetch: str = "auto") -> OnnxPlan:
    """What a session with a context of `n_ctx` tokens takes in a process that has genai, which is imported for that;
    where it is not installed, what it takes is estimated."""
    try:
        genai()
        engine_bytes = 0
    except BackendError:
        engine_bytes = _ENGINE_BYTES
    # Without a shared cache, a run's result is there while its input still is.
    cache_bytes = kv_bytes(folder.model, n_ctx, folder.head_size) * (1 if folder.shares_cache else 2)
    logits_bytes = 4 * folder.n_piece_tokens * folder.vocab_size
    made = plan(folder.model, cache_bytes=cache_bytes, logits_bytes=logits_bytes, prefetch=prefetch)
    return dataclasses.replace(made, process_bytes=made.process_bytes + engine_bytes)


def budget_plan(folder: OnnxFolder, session: OnnxPlan, budget_bytes: int | None) -> Plan:
    """Divide a budget; None: what this machine has, and no more than the model can use."""
    if budget_bytes is None:
        budget_bytes = min(session.everything_bytes, host.default_budget_bytes())
    slots = session.slots_bytes(budget_bytes)
    fits = slots + host.TOLERANCE_BYTES >= session.least_slots_bytes
    nodes = folder.model.moe_nodes
    return Plan(
        fits=fits,
        budget_bytes=budget_bytes,
        floor_bytes=session.floor_bytes,
        dense_bytes=session.dense_bytes,
        kv_bytes=session.kv_bytes,
        buffers_bytes=session.process_bytes + session.own_bytes - session.dense_bytes - session.kv_bytes,
        slots_bytes=min(session.expert_bank_bytes, max(slots, session.token_cycle_bytes)),
        slack_bytes=host.slack_bytes(budget_bytes),
        token_cycle_bytes=session.token_cycle_bytes,
        expert_bank_bytes=session.expert_bank_bytes,
        n_experts=max((_n_experts(folder.model, node) for node in nodes), default=0),
        n_experts_used=max((node.ints.get("k", 1) for node in nodes), default=0),
        n_moe_layers=len(nodes),
        prefetch_bytes=session.prefetch_bytes,
    )


def plan_folder(path: Path, memory: int | None = None, n_ctx: int | None = None, prefetch: str = "auto") -> Plan:
    """Plan a memory budget for a folder without loading it.

    Args:
        path: the folder.
        memory: bytes; None for what this machine has.
        n_ctx: context in tokens; None for 4096, or the model's if that is less.
        prefetch: how far ahead experts will be predicted.

    Raises:
        ModelFormatError, BackendError: the folder or the context cannot be used. A budget that is too small is not an
            error: `Plan.fits` says so.
    """
    folder = read_folder(path)
    session = session_plan(folder, folder.context(n_ctx), prefetch)
    return budget_plan(folder, session, memory)


def folder_facts(folder: OnnxFolder) -> dict[str, Any]:
    """What a folder holds, as `edgemoe inspect` says it of a GGUF file; sizes are bytes in the files."""
    model = folder.model
    types: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"tensors": 0, "bytes": 0})
    expert_names: set[str] = set()
    n_used_bytes = n_expert_bytes = 0
    for node in model.moe_nodes:
        layer = [model.tensors[name] for name in streamed(model, node).values()]
        n_bytes = sum(t.n_bytes for t in layer)
        expert_names.update(t.name for t in layer)
        n_experts = max(1, _n_experts(model, node))
        n_used_bytes += n_bytes * min(n_experts, node.ints.get("k", 1)) // n_experts
        n_expert_bytes = n_expert_bytes or n_bytes // n_experts
        block = node.ints.get("block_size", 0)
        kind = f"{node.op_type} int{_bits(node)}" + (f" block {block}" if block else "")
        types[kind]["tensors"] += len(layer)
        types[kind]["bytes"] += n_bytes
    n_parameters, n_expert_parameters, n_used_parameters = _n_parameters(model)
    bank_bytes = sum(of_type["bytes"] for of_type in types.values())
    paths = {t.path for t in model.tensors.values() if t.path is not None}
    return {
        "path": str(folder.path),
        "architecture": folder.architecture,
        "name": folder.path.resolve().name,
        "context_length": folder.context_length,
        "n_parameters": n_parameters,
        "n_parameters_used": n_parameters - n_expert_parameters + n_used_parameters,
        "n_experts": max((_n_experts(model, node) for node in model.moe_nodes), default=0),
        "n_experts_used": max((node.ints.get("k", 1) for node in model.moe_nodes), default=0),
        "n_moe_layers": len(model.moe_nodes),
        "expert_bytes": n_expert_bytes,
        "token_cycle_bytes": n_used_bytes,
        "expert_bank_bytes": bank_bytes,
        "dense_bytes": sum(t.n_bytes for name, t in model.tensors.items() if name not in expert_names),
        "expert_types": dict(types),
        "files": [{"path": str(p), "bytes": p.stat().st_size} for p in (model.path, *sorted(paths))],
    }


def _bits(node: OnnxNode) -> int:
    default = 32 if node.op_type == "MoE" else 4
    return node.ints.get("expert_weight_bits", node.ints.get("bits", default))


def _n_experts(model: OnnxModel, node: OnnxNode) -> int:
    weights = model.tensors.get(node.inputs[2]) if len(node.inputs) > 2 else None
    return weights.shape[0] if weights is not None and weights.shape else 0


def _n_parameters(model: OnnxModel) -> tuple[int, int, int]:
    """Weights as the model had them before they were quantized: all, those of experts, and of these those of a token.

    Scales and zero points are none, nor are tables of RoPE.
    """
    counted: dict[str, int] = {}
    n_experts = n_used = 0
    for node in model.nodes:
        kind = (node.op_type, node.domain)
        is_moe = node.domain == MICROSOFT and node.op_type in ("MoE", "QMoE")
        for position, name in enumerate(node.inputs):
            tensor = model.tensors.get(name)
            if tensor is None or name in counted:
                continue
            n = math.prod(tensor.shape) if tensor.data_type in _FLOATS and len(tensor.shape) > 0 else 0
            if node.op_type == "QMoE" and is_moe:
                n = tensor.n_bytes * 8 // max(1, _bits(node)) if position in (2, 5, 8) else 0
            elif kind == ("MatMulNBits", MICROSOFT) and position > 0:
                n = node.ints.get("K", 0) * node.ints.get("N", 0) if position == 1 else 0
            elif kind == ("GatherBlockQuantized", MICROSOFT):
                n = tensor.n_bytes * 8 // max(1, _bits(node)) if position == 0 else 0
            elif kind == ("GroupQueryAttention", MICROSOFT) and position in (7, 8):
                n = 0
            counted[name] = n
            if is_moe and position in (2, 5, 8):
                n_experts += n
                n_used += n * node.ints.get("k", 1) // max(1, tensor.shape[0])
    return sum(counted.values()), n_experts, n_used
