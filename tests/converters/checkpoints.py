# SPDX-License-Identifier: MIT
"""Tiny checkpoints in the layout that published ones have on disk, and what transformers computes with them.

Weights are random and of a scale at which every part counts: activations near 1, routers whose logits spread by about
2 (so that a rounding error does not change the experts), norms and biases away from 1 and 0. Transformers names the
tensors (`save_pretrained` undoes the fusing of experts that it does in memory); what it does not write as published
is added here: shards with an index, MXFP4 blocks and scales, layers of multi-token prediction, DeepSeek-MoE's names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tests.converters.families import FAMILIES, Family
from tests.converters.vocabularies import write_tokenizer

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]

Logits = npt.NDArray[np.float32]

N_SHARDS = 2


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. `reference` is what transformers loads: the same folder, but for DeepSeek-MoE."""

    family: Family
    path: Path
    reference: Path


def write_checkpoint(folder: Path, name: str, **changes: Any) -> Checkpoint:
    """Write family `name` into the new folder `folder`; `changes` replace fields of its `config.json`.

    The same arguments give the same files. Needs torch, transformers, safetensors, tokenizers and sentencepiece.
    """
    family = FAMILIES[name]
    folder.mkdir(parents=True)
    ids = write_tokenizer(folder, family.tokenizer)
    tokens = {f"{role}_token_id": token_id for role, token_id in ids.items()}
    config = {**family.config, **tokens, **changes}
    reference = {**(family.reference or family.config), **tokens, **changes}
    state = _random_state(reference, zlib.crc32(name.encode()))
    path = folder
    if family.reference is not None:
        path = folder / "reference"
        path.mkdir()
        _write_json(path / "config.json", reference)
        _save(path, state, 1)
        state = {
            _deepseek_moe_name(k): v / 2 if _is_ungated(k) else v for k, v in state.items() if "expert_gate" not in k
        }
    if "quantization_config" in config:
        state = _mxfp4(state, config)
    state |= _extra_layers(state, config)
    _write_json(folder / "config.json", config)
    eos = {"eos_token_id": config["eos_token_id"]} if "eos_token_id" in config else {}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **eos})
    _save(folder, state, N_SHARDS)
    return Checkpoint(family, folder, path)


def reference_logits(
    checkpoint: Checkpoint, sequences: Sequence[Sequence[int]], *, is_as_published: bool = False
) -> Logits:
    """Logits [sequence, position, vocabulary] by transformers on the CPU, in float32; sequences of one length."""
    import torch

    with torch.no_grad():
        model = load(checkpoint, is_as_published=is_as_published)
        result: Logits = model(torch.tensor([list(s) for s in sequences])).logits.float().numpy()
    return result


def load(checkpoint: Checkpoint, *, is_as_published: bool = False) -> Any:
    """The checkpoint as a float32 model of transformers, with attention written out in torch.

    No conversion can be closer to its model than llama.cpp's graph is, and of two families the graph lacks a setting.
    Unless `is_as_published`, transformers' own code computes them with the value that the graph has: gpt-oss with
    `truncate: true` (YaRN mixes frequencies between whole dimensions, `ggml_rope_yarn_corr_dims`), Phi-3.5-MoE with
    `router_jitter_noise: 0` (no other expert is ever near enough to share a weight with).
    """
    import torch
    import transformers

    options: dict[str, Any] = {}
    if "quantization_config" in checkpoint.family.config:
        options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    with _quiet_transformers():
        config = transformers.AutoConfig.from_pretrained(checkpoint.reference, local_files_only=True)
        if config.model_type == "gpt_oss" and not is_as_published:
            config.rope_parameters["truncate"] = True
        if config.model_type == "phimoe" and not is_as_published:
            config.router_jitter_noise = 0.0
        options["config"] = config
        model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint.reference, dtype=torch.float32, attn_implementation="eager", local_files_only=True, **options
        )
    return model.float().eval()


def random_tokens(n_sequences: int, n_tokens: int, seed: int = 0) -> list[list[int]]:
    """Token ids below those that only pad the vocabulary."""
    rng = np.random.default_rng(seed)
    sequences: list[list[int]] = rng.integers(3, 500, (n_sequences, n_tokens)).tolist()
    return sequences


def _random_state(config: dict[str, Any], seed: int) -> State:
    """Random weights in bfloat16 under the names that transformers writes to disk."""
    import safetensors.torch
    import torch
    import transformers

    fields = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    with _quiet_transformers():
        model_config = transformers.AutoConfig.for_model(config["model_type"], **fields)
        model = transformers.AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            if name == "lm_head.weight" and model_config.tie_word_embeddings:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            mean, deviation = _moments(name, tensor.shape, config)
            tensor.copy_(mean + deviation * noise)
    with tempfile.TemporaryDirectory() as scratch, _quiet_transformers():
        model.save_pretrained(scratch)
        state: State = safetensors.torch.load_file(Path(scratch) / "model.safetensors")
    # Published in float32, however the rest is stored.
    return {k: v.float() if k.endswith(("expert_bias", "correction_bias")) else v for k, v in state.items()}


def _moments(name: str, shape: Sequence[int], config: dict[str, Any]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's elements."""
    hidden = config["hidden_size"]
    if name.endswith("expert_gate.weight") and config.get("qkv_bias") is False:
        return 0.0, 0.0  # DeepSeek-MoE as Qwen2-MoE: a gate of exactly 1/2
    if "embed_tokens" in name:
        if "embedding_multiplier" in config:
            return 0.0, 9.0 / config["embedding_multiplier"]
        tied = config.get("tie_word_embeddings") or config.get("tie_embedding")
        return 0.0, hidden**-0.5 if tied or config.get("mup_enabled") else 1.0
    if name.endswith(("expert_bias", "correction_bias")):
        return 0.0, 0.05
    if "sinks" in name:
        return 0.0, 1.0
    if config.get("mup_enabled") and re.search(r"layers.*(post_attention|post_mlp)_layernorm", name):
        return _residual_gain(config), 0.2 * _residual_gain(config)
    if len(shape) == 1 and "norm" in name and name.endswith("weight"):
        return 1.0, 0.2
    if len(shape) == 1 or name.endswith("_bias"):
        return 0.0, 0.2
    if re.search(r"(router|mlp\.gate|feed_forward\.gate|router\.gate)\.weight$", name):
        return 0.0, 2.0 * hidden**-0.5
    fan_in = shape[-2] if config["model_type"] == "gpt_oss" and len(shape) == 3 else shape[-1]
    if re.search(r"o_proj|out_proj|down_proj|\.w2\.|output_linear", name):
        return 0.0, fan_in**-0.5 * _residual_gain(config)
    return 0.0, fan_in**-0.5


def _residual_gain(config: dict[str, Any]) -> float:
    """Scale of what a layer adds to the residual stream: GPT-2's, so that many layers do not drown the first, of the
    size of the embeddings. A router that decides otherwise after a rounding then changes little."""
    if "residual_multiplier" in config:
        return 9.0
    gain = (2 * config["num_hidden_layers"]) ** -0.5 / config.get(
        "routed_scaling_factor", config.get("route_scale", 1.0)
    )
    if config["model_type"] == "gpt_oss":
        gain /= 2  # its experts multiply by `up + 1`
    if config["model_type"] == "phimoe":
        gain /= 2  # the weights of its experts sum to 2
    tied = config.get("tie_word_embeddings") or config.get("tie_embedding")
    return float(gain * (config["hidden_size"] ** -0.5 if tied else 1.0))


def _is_ungated(name: str) -> bool:
    """Whether a matrix of the reference is twice that of DeepSeek-MoE, whose shared experts no gate halves."""
    return "shared_expert.down_proj" in name


def _deepseek_moe_name(name: str) -> str:
    return name.replace(".shared_expert.", ".shared_experts.")


def _mxfp4(state: State, config: dict[str, Any]) -> State:
    """Experts as gpt-oss publishes them: blocks [E, out, in/32, 16] of two 4-bit values, scales [E, out, in/32].

    Random bits instead of rounded weights: every pattern occurs, and nothing has to be rounded here.
    """
    import torch

    generator = torch.Generator().manual_seed(1)
    result = {}
    for name, tensor in state.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            result[name] = tensor
            continue
        n_experts, n_in, n_out = tensor.shape
        blocks = torch.randint(0, 256, (n_experts, n_out, n_in // 32, 16), generator=generator, dtype=torch.uint8)
        # 4-bit floats have a root mean square of 2.7: with 2^-4 to 2^-6 that is near 1/sqrt(64), an eighth for `down`.
        low = 118 if "down_proj" in name else 121
        scales = torch.randint(low, low + 3, (n_experts, n_out, n_in // 32), generator=generator, dtype=torch.uint8)
        result[f"{name}_blocks"] = blocks
        result[f"{name}_scales"] = scales
    return result


def _extra_layers(state: State, config: dict[str, Any]) -> State:
    """Layers of multi-token prediction, which published checkpoints carry and which no logit depends on."""
    import torch

    if not config.get("num_nextn_predict_layers"):
        return {}
    n_layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    last = f"model.layers.{n_layers - 1}."
    copies = {name.removeprefix(last): tensor.flip(0) for name, tensor in state.items() if name.startswith(last)}
    norm, head = torch.ones(hidden, dtype=torch.bfloat16), state["model.embed_tokens.weight"].flip(0)
    projection = torch.eye(hidden, 2 * hidden, dtype=torch.bfloat16)
    if config["model_type"] == "ernie4_5_moe":
        return {
            **{f"model.mtp_block.0.{name}": tensor for name, tensor in copies.items() if "experts." not in name},
            "model.mtp_emb_norm.0.weight": norm,
            "model.mtp_hidden_norm.0.weight": norm.clone(),
            "model.mtp_linear_proj.0.weight": projection,
        }
    extra = f"model.layers.{n_layers}."
    return {
        **{extra + name: tensor for name, tensor in copies.items()},
        extra + "embed_tokens.weight": head,
        extra + "enorm.weight": norm,
        extra + "hnorm.weight": norm.clone(),
        extra + "eh_proj.weight": projection,
        extra + "shared_head.norm.weight": norm.clone(),
        extra + "shared_head.head.weight": head.clone(),
    }


def _save(folder: Path, state: State, n_shards: int) -> None:
    """Tensors in `n_shards` files with an index, or in one without; names sorted as transformers does."""
    import safetensors.torch

    names = sorted(state)
    if n_shards == 1:
        safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i in range(n_shards):
        part = names[len(names) * i // n_shards : len(names) * (i + 1) // n_shards]
        file = f"model-{i + 1:05}-of-{n_shards:05}.safetensors"
        tensors = {name: state[name].contiguous() for name in part}
        safetensors.torch.save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keeps transformers from warning of fields that it does not know and of layers that it leaves out."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
