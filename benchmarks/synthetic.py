# SPDX-License-Identifier: MIT
"""Random but valid Mixture-of-Experts GGUF files that stock llama.cpp loads and runs.

    python -m benchmarks.synthetic olmoe /tmp/olmoe.gguf

Tests use `write_model` (a few MiB in a fraction of a second), benchmarks `write_preset` (the real shapes).

*Routing.* Token embeddings are an AR(1) walk along the vocabulary: the correlation of ids a and b is
`locality ** |a - b|`. The layers add little to the residual stream, so the embedding decides the routing in
every layer, and one file serves both cases: `local_tokens` (consecutive ids share experts) and
`uniform_tokens` (independent ids, the worst case). Feed these ids to `Llama.eval`; greedy *generation* jumps
through the vocabulary like a random map and soon runs in a cycle, so it measures neither case.

*Weights.* Gaussian, quantized by ggml itself (see `synthetic_quant`), of a size at which every block still shows in
the logits. Equal arguments give equal bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GgmlType

from benchmarks.synthetic_quant import RowSource, Tensor, type_of

FIRST_TOKEN = 3  # <unk>, <s> and </s> come before it
_FIRST_WORD = FIRST_TOKEN + 256 + 1  # after the byte tokens and the space
_BRANCH_STD = 0.5  # all attention and expert outputs together; the token embedding has 1
_ACTIVATION_RMS = {"silu": 0.6, "oai": 0.9}  # of act(gate) * up for unit Gaussian gate and up


@dataclasses.dataclass(frozen=True)
class Shape:
    """Everything that a synthetic model is made of, but for the seed and the number of files.

    Attributes:
        arch: llama.cpp's name of the architecture, one of `ARCHITECTURES`.
        quant, dense_quant: types of the expert tensors and of all other matrices (embeddings and output too).
        down_quant: type of down_proj in every second layer (mixed quantization); empty for `quant` everywhere.
        hidden, expert_ff, shared_ff, dense_ff: widths in values; `shared_ff` of all shared experts together,
            `dense_ff` of the first `n_dense_layers` layers, which have no experts.
        n_head_kv, head_dim: 0 for `n_head` and `hidden // n_head`.
        merged_gate_up: one `ffn_gate_up_exps` tensor instead of two (deepseek2 only).
        sigmoid_routing: DeepSeek-V3's router: sigmoid, renormalized, with a correction bias for the selection.
        n_groups, n_groups_used: expert groups (deepseek2 only); 0 for none.
        q_lora_rank, kv_lora_rank, rope_dim, value_dim: multi-head latent attention (deepseek2 only).
        locality: correlation of the embeddings of consecutive token ids, 0 to 1; with 0.88 an LRU cache of a quarter of
            the experts of the OLMoE shape hits 78 % on local tokens and 20 % on uniform ones, of half 87 % and 47 %.
    """

    arch: str = "olmoe"
    quant: str = "Q4_K"
    dense_quant: str = "Q8_0"
    down_quant: str = ""
    n_layers: int = 2
    n_dense_layers: int = 0
    hidden: int = 256
    n_experts: int = 8
    n_experts_used: int = 2
    expert_ff: int = 256
    shared_ff: int = 0
    dense_ff: int = 0
    n_vocab: int = 512
    n_ctx_train: int = 4096
    n_head: int = 4
    n_head_kv: int = 0
    head_dim: int = 0
    merged_gate_up: bool = False
    sigmoid_routing: bool = False
    n_groups: int = 0
    n_groups_used: int = 0
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    rope_dim: int = 0
    value_dim: int = 0
    locality: float = 0.88


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """What one architecture of llama.cpp asks for beyond the common tensors and keys."""

    qk_norm: Literal["", "all heads", "each head"] = ""
    attention_biases: tuple[str, ...] = ()
    ffn_norm: str = "ffn_norm"
    expert_biases: bool = False
    renormalizes: bool = True  # router weights of the selected experts sum to 1
    shared_router: bool = False
    activation: Literal["silu", "oai"] = "silu"
    expert_ff_key: str = "expert_feed_forward_length"
    constants: tuple[tuple[str, int | float | bool], ...] = ()


ARCHITECTURES = {
    "olmoe": _Architecture(qk_norm="all heads", renormalizes=False, expert_ff_key="feed_forward_length"),
    "qwen3moe": _Architecture(qk_norm="each head"),
    "qwen2moe": _Architecture(attention_biases=("q", "k", "v"), renormalizes=False, shared_router=True),
    "gpt-oss": _Architecture(
        attention_biases=("q", "k", "v", "output"),
        ffn_norm="post_attention_norm",
        expert_biases=True,
        activation="oai",
        constants=(("attention.sliding_window", 128),),
    ),
    "deepseek2": _Architecture(renormalizes=False),
    "llama": _Architecture(expert_ff_key="feed_forward_length"),
    "granitemoe": _Architecture(
        expert_ff_key="feed_forward_length",
        constants=(("embedding_scale", 2.0), ("residual_scale", 0.5), ("logit_scale", 4.0), ("attention.scale", 0.1)),
    ),
}

_TINY_DEEPSEEK_V2 = Shape(
    "deepseek2",
    n_layers=3,
    n_dense_layers=1,
    dense_ff=512,
    shared_ff=512,
    head_dim=96,
    kv_lora_rank=64,
    rope_dim=32,
    value_dim=64,
)

TINY = {
    "olmoe": Shape("olmoe"),
    "qwen3moe": Shape("qwen3moe", n_head_kv=2),
    "qwen2moe": Shape("qwen2moe", n_head_kv=2, shared_ff=512),
    "gpt-oss": Shape("gpt-oss", quant="MXFP4", n_head=8, n_head_kv=2, head_dim=64),
    "deepseek2": _TINY_DEEPSEEK_V2,
    "deepseek2-v3": dataclasses.replace(
        _TINY_DEEPSEEK_V2,
        n_experts=16,
        n_experts_used=4,
        sigmoid_routing=True,
        n_groups=4,
        n_groups_used=2,
        q_lora_rank=128,
    ),
    "deepseek2-merged": dataclasses.replace(_TINY_DEEPSEEK_V2, merged_gate_up=True),
    "llama": Shape("llama", n_head_kv=2),
    "granitemoe": Shape("granitemoe", n_head_kv=2),
    "granitemoe-shared": Shape("granitemoe", n_head_kv=2, shared_ff=256),
}
"""A few MiB each, one for every form of architecture; `write_model` starts from these."""

_OLMOE = Shape(
    "olmoe",
    n_layers=16,
    hidden=2048,
    n_experts=64,
    n_experts_used=8,
    expert_ff=1024,
    n_vocab=50304,
    n_head=16,
)

_QWEN3_30B = Shape(
    "qwen3moe",
    n_layers=48,
    hidden=2048,
    n_experts=128,
    n_experts_used=8,
    expert_ff=768,
    n_vocab=151936,
    n_head=32,
    n_head_kv=4,
    head_dim=128,
)

PRESETS = {
    "olmoe": _OLMOE,
    "olmoe-small": dataclasses.replace(_OLMOE, n_layers=4),
    "qwen3moe-30b": _QWEN3_30B,
    # The slim ones keep the shape of a layer; with fewer layers and a smaller vocabulary.
    "qwen3moe-30b-slim": dataclasses.replace(_QWEN3_30B, n_layers=6, n_vocab=32768),
    "gpt-oss-20b-slim": Shape(
        "gpt-oss",
        quant="MXFP4",
        n_layers=4,
        hidden=2880,
        n_experts=32,
        n_experts_used=4,
        expert_ff=2880,
        n_vocab=32768,
        n_head=64,
        n_head_kv=8,
        head_dim=64,
    ),
    **{f"tiny-{name}": shape for name, shape in TINY.items()},
}


def write_model(path: Path | str, arch: str = "olmoe", *, seed: int = 0, n_splits: int = 1, **changes: Any) -> Path:
    """Write a tiny model: the shape `TINY[arch]` with some of its fields changed. See `write_shape`."""
    return write_shape(path, _changed(TINY, "tiny model", arch, changes), seed=seed, n_splits=n_splits)


def write_preset(path: Path | str, preset: str, *, seed: int = 0, n_splits: int = 1, **changes: Any) -> Path:
    """Write the shape `PRESETS[preset]` with some of its fields changed. See `write_shape`."""
    return write_shape(path, _changed(PRESETS, "preset", preset, changes), seed=seed, n_splits=n_splits)


def write_shape(path: Path | str, shape: Shape, *, seed: int = 0, n_splits: int = 1) -> Path:
    """Write one model, under a temporary name first. Memory stays below a few hundred MiB for any size.

    Returns:
        The file to load: `path`, or for `n_splits` > 1 the first of `split_paths(path, n_splits)`. Of these the
        first holds the metadata and the tensors outside of the layers, the others the layers' tensors in order;
        a layer's experts may lie in two files.

    Raises:
        ValueError: llama.cpp could not load such a model.
    """
    _check_shape(shape)
    tensors = list(_tensors(shape))
    _check_rows(tensors)
    files = _files(tensors, n_splits)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".synthetic-", dir=path.parent) as temporary:
        _write_files(Path(temporary) / path.name, shape, seed, files)
        for target in split_paths(path, n_splits):
            os.replace(Path(temporary) / target.name, target)
    return split_paths(path, n_splits)[0]


def split_paths(path: Path | str, n_splits: int) -> list[Path]:
    """The files of a model of that many splits, in order: `NAME-00001-of-00003.gguf` and so on."""
    path = Path(path)
    if n_splits == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i + 1:05d}-of-{n_splits:05d}.gguf") for i in range(n_splits)]


def totals_bytes(shape: Shape) -> tuple[int, int]:
    """Bytes of all expert tensors (with their biases) and of all other tensors."""
    tensors = list(_tensors(shape))
    experts_bytes = sum(t.n_bytes for t in tensors if "_exps." in t.name)
    return experts_bytes, sum(t.n_bytes for t in tensors) - experts_bytes


def local_tokens(n: int, n_vocab: int, seed: int = 0) -> list[int]:
    """`n` consecutive token ids from a random start, turning back at the ends of the vocabulary."""
    span = n_vocab - FIRST_TOKEN
    steps = (np.random.default_rng(seed).integers(span) + np.arange(n)) % (2 * span - 2)
    return [int(i) + FIRST_TOKEN for i in np.where(steps < span, steps, 2 * span - 2 - steps)]


def uniform_tokens(n: int, n_vocab: int, seed: int = 0) -> list[int]:
    """`n` independent token ids, special ones left out."""
    return [int(i) for i in np.random.default_rng(seed).integers(FIRST_TOKEN, n_vocab, n)]


ROUTINGS = {"local": local_tokens, "uniform": uniform_tokens}


def _tensors(shape: Shape) -> Iterator[Tensor]:
    """All tensors of a model in the order of the file."""
    dense = type_of(shape.dense_quant, "dense_quant")
    yield Tensor("token_embd.weight", (shape.n_vocab, shape.hidden), dense, "walk")
    yield _ones("output_norm", shape.hidden)
    yield Tensor("output.weight", (shape.n_vocab, shape.hidden), dense, "fresh", shape.hidden**-0.5)
    for layer in range(shape.n_layers):
        is_dense_layer = layer < shape.n_dense_layers
        parts = [
            _latent_attention(shape) if shape.kv_lora_rank else _attention(shape),
            _dense_feed_forward(shape) if is_dense_layer else _experts(shape, layer),
        ]
        for part in parts:
            for tensor in part:
                yield dataclasses.replace(tensor, name=f"blk.{layer}.{tensor.name}")


def _attention(shape: Shape) -> Iterator[Tensor]:
    arch = ARCHITECTURES[shape.arch]
    head_dim, n_head_kv = _head_dim(shape), _n_head_kv(shape)
    query, key_value = shape.n_head * head_dim, n_head_kv * head_dim
    yield _ones("attn_norm", shape.hidden)
    yield _matrix(shape, "attn_q", query, shape.hidden)
    yield _matrix(shape, "attn_k", key_value, shape.hidden)
    yield _matrix(shape, "attn_v", key_value, shape.hidden)
    yield _matrix(shape, "attn_output", shape.hidden, query, gain=_branch_gain(shape))
    if arch.qk_norm:
        yield _ones("attn_q_norm", query if arch.qk_norm == "all heads" else head_dim)
        yield _ones("attn_k_norm", key_value if arch.qk_norm == "all heads" else head_dim)
    widths = {"q": query, "k": key_value, "v": key_value, "output": shape.hidden}
    for name in arch.attention_biases:
        yield _vector(f"attn_{name}.bias", widths[name], 0.1 * _branch_gain(shape))
    if shape.arch == "gpt-oss":
        yield _vector("attn_sinks.weight", shape.n_head, 1.0)


def _latent_attention(shape: Shape) -> Iterator[Tensor]:
    """DeepSeek's multi-head latent attention in the form that keeps latents in the KV cache."""
    rank, nope_dim = shape.kv_lora_rank, shape.head_dim - shape.rope_dim
    query = shape.n_head * shape.head_dim
    yield _ones("attn_norm", shape.hidden)
    if shape.q_lora_rank:
        yield _matrix(shape, "attn_q_a", shape.q_lora_rank, shape.hidden)
        yield _ones("attn_q_a_norm", shape.q_lora_rank)
        yield _matrix(shape, "attn_q_b", query, shape.q_lora_rank)
    else:
        yield _matrix(shape, "attn_q", query, shape.hidden)
    yield _matrix(shape, "attn_kv_a_mqa", rank + shape.rope_dim, shape.hidden)
    yield _ones("attn_kv_a_norm", rank)
    yield _matrix(shape, "attn_k_b", rank, nope_dim, n=shape.n_head)
    yield _matrix(shape, "attn_v_b", shape.value_dim, rank, n=shape.n_head)
    yield _matrix(shape, "attn_output", shape.hidden, shape.n_head * shape.value_dim, gain=_branch_gain(shape))


def _dense_feed_forward(shape: Shape, suffix: str = "", width: int = 0) -> Iterator[Tensor]:
    """The network of a layer without experts, or (`suffix` "_shexp") the shared experts of another."""
    width = width or shape.dense_ff
    if not suffix:
        yield _ones(ARCHITECTURES[shape.arch].ffn_norm, shape.hidden)
    yield _matrix(shape, f"ffn_gate{suffix}", width, shape.hidden)
    yield _matrix(shape, f"ffn_up{suffix}", width, shape.hidden)
    yield _matrix(shape, f"ffn_down{suffix}", shape.hidden, width, gain=_branch_gain(shape) / _ACTIVATION_RMS["silu"])


def _experts(shape: Shape, layer: int) -> Iterator[Tensor]:
    arch = ARCHITECTURES[shape.arch]
    n, hidden, ff = shape.n_experts, shape.hidden, shape.expert_ff
    branch = _branch_gain(shape)
    yield _ones(arch.ffn_norm, hidden)
    yield Tensor("ffn_gate_inp.weight", (n, hidden), GgmlType.F32, "fresh", hidden**-0.5)
    if shape.sigmoid_routing:
        yield _vector("exp_probs_b.bias", n, 0.02)

    quant = type_of(shape.quant, "quant")
    down_quant = type_of(shape.down_quant, "down_quant") if shape.down_quant and layer % 2 else quant
    down_gain = branch / (_ACTIVATION_RMS[arch.activation] * _router_weights_norm(shape))
    inner = [("gate_up", 2 * ff)] if shape.merged_gate_up else [("gate", ff), ("up", ff)]
    for name, rows in inner:
        yield Tensor(f"ffn_{name}_exps.weight", (n, rows, hidden), quant, "pool", hidden**-0.5)
    yield Tensor("ffn_down_exps.weight", (n, hidden, ff), down_quant, "pool", down_gain * ff**-0.5)
    if arch.expert_biases:
        yield _vector("ffn_gate_inp.bias", n, 0.1)
        for name, rows in inner:
            yield Tensor(f"ffn_{name}_exps.bias", (n, rows), GgmlType.F32, "fresh", 0.1)
        yield Tensor("ffn_down_exps.bias", (n, hidden), GgmlType.F32, "fresh", 0.1 * branch)
    if shape.shared_ff:
        yield from _dense_feed_forward(shape, "_shexp", shape.shared_ff)
        if arch.shared_router:
            yield _vector("ffn_gate_inp_shexp.weight", hidden, hidden**-0.5)


def _ones(name: str, width: int) -> Tensor:
    return Tensor(f"{name}.weight", (width,), GgmlType.F32, "ones")


def _vector(name: str, width: int, std: float) -> Tensor:
    return Tensor(name, (width,), GgmlType.F32, "fresh", std)


def _matrix(shape: Shape, name: str, rows: int, values: int, *, n: int = 0, gain: float = 1.0) -> Tensor:
    """A dense matrix, or `n` of them, which multiplies the size of its (independent) inputs by `gain`."""
    whole = (n, rows, values) if n else (rows, values)
    return Tensor(f"{name}.weight", whole, type_of(shape.dense_quant, "dense_quant"), "pool", gain * values**-0.5)


def _branch_gain(shape: Shape) -> float:
    """Standard deviation of what one attention or feed-forward block adds to the residual stream."""
    return _BRANCH_STD / math.sqrt(2 * shape.n_layers)


def _router_weights_norm(shape: Shape) -> float:
    """Root of the mean sum of squares of one token's router weights, for a Gaussian router."""
    logits = np.random.default_rng(0).standard_normal((1024, shape.n_experts))
    scores = 1 / (1 + np.exp(-logits)) if shape.sigmoid_routing else np.exp(logits)
    if not shape.sigmoid_routing:
        scores /= scores.sum(axis=1, keepdims=True)
    weights = np.sort(scores, axis=1)[:, -shape.n_experts_used :]
    if shape.sigmoid_routing or ARCHITECTURES[shape.arch].renormalizes:
        weights /= weights.sum(axis=1, keepdims=True)
    return float(np.sqrt((weights**2).sum(axis=1).mean()))


def _head_dim(shape: Shape) -> int:
    return shape.head_dim or shape.hidden // shape.n_head


def _n_head_kv(shape: Shape) -> int:
    return shape.n_head_kv or shape.n_head


def _changed(shapes: dict[str, Shape], kind: str, name: str, changes: dict[str, Any]) -> Shape:
    if name not in shapes:
        raise ValueError(f"unknown {kind}: found {name!r}; use one of {', '.join(shapes)}")
    return dataclasses.replace(shapes[name], **changes)


def _check_shape(shape: Shape) -> None:
    """Refuse what llama.cpp would refuse, or abort on, with a message that names the field to change."""
    if shape.arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture: found {shape.arch!r}; use one of {', '.join(ARCHITECTURES)}")
    arch = ARCHITECTURES[shape.arch]
    is_deepseek = shape.arch == "deepseek2"
    needs_shared = is_deepseek or arch.shared_router
    experts_per_group = shape.n_experts // max(shape.n_groups, 1)
    rules: list[tuple[str, bool, str]] = [
        ("n_experts_used", 0 < shape.n_experts_used <= shape.n_experts, "1 to n_experts"),
        ("n_vocab", shape.n_vocab >= _FIRST_WORD, f"{_FIRST_WORD} or more (special tokens and bytes)"),
        ("locality", 0 <= shape.locality <= 1, "0 to 1"),
        (
            "head_dim",
            shape.head_dim > 0 or shape.hidden % shape.n_head == 0,
            "a width, as n_head does not divide hidden",
        ),
        ("n_head_kv", shape.n_head % _n_head_kv(shape) == 0, "a divisor of n_head"),
        ("shared_ff", not needs_shared or shape.shared_ff > 0, "more than 0"),
        ("shared_ff", needs_shared or shape.arch == "granitemoe" or not shape.shared_ff, "0"),
    ]
    if arch.qk_norm == "all heads":
        rules.append(("n_head_kv", _n_head_kv(shape) == shape.n_head, "n_head (no grouped attention)"))
    if is_deepseek:
        rules += [
            ("n_layers", shape.n_layers not in (26, 27), "not 26 or 27, which llama.cpp takes for DeepSeek-V2-Lite"),
            ("n_dense_layers", shape.n_dense_layers < shape.n_layers, "less than n_layers"),
            ("dense_ff", shape.dense_ff > 0 or not shape.n_dense_layers, "more than 0"),
            ("shared_ff", shape.shared_ff % shape.expert_ff == 0, "a multiple of expert_ff"),
            ("kv_lora_rank", shape.kv_lora_rank > 0, "more than 0"),
            ("rope_dim", 0 < shape.rope_dim < shape.head_dim, "1 to head_dim - 1"),
            ("value_dim", shape.value_dim > 0, "more than 0"),
        ]
    else:
        deepseek_only = ("n_dense_layers", "merged_gate_up", "sigmoid_routing", "n_groups", "kv_lora_rank")
        rules += [(field, not getattr(shape, field), "0 or False (deepseek2 only)") for field in deepseek_only]
    if shape.n_groups:
        rules += [
            ("n_groups", shape.n_experts % shape.n_groups == 0 and experts_per_group > 1, "a divisor of n_experts"),
            ("n_groups_used", 0 < shape.n_groups_used < shape.n_groups, "1 to n_groups - 1"),
            (
                "n_experts_used",
                shape.n_experts_used <= shape.n_groups_used * experts_per_group,
                f"{shape.n_groups_used * experts_per_group} or less (experts of n_groups_used groups)",
            ),
        ]
    for field, holds, expected in rules:
        if not holds:
            raise ValueError(
                f"cannot make a {shape.arch} model: found {field}={getattr(shape, field)}, expected {expected}"
            )


def _check_rows(tensors: list[Tensor]) -> None:
    """Refuse rows that are not whole blocks of their type."""
    for tensor in tensors:
        block = gguf.GGML_QUANT_SIZES[tensor.type][0]
        if tensor.shape[-1] % block:
            raise ValueError(
                f"cannot quantize to {tensor.type.name}: found rows of {tensor.shape[-1]} values, expected a multiple "
                f"of {block} ({tensor.name}); choose other widths, or a type with blocks of 32 such as Q8_0 or Q4_0"
            )


def _files(tensors: list[Tensor], n_splits: int) -> list[list[Tensor]]:
    """Which tensors go into which file."""
    if n_splits == 1:
        return [tensors]
    in_layers = [t for t in tensors if t.name.startswith("blk.")]
    if not 1 < n_splits <= 1 + len(in_layers):
        raise ValueError(f"cannot split the model: found n_splits={n_splits}, expected 1 to {1 + len(in_layers)}")
    bounds = [round(i * len(in_layers) / (n_splits - 1)) for i in range(n_splits)]
    return [
        [t for t in tensors if not t.name.startswith("blk.")],
        *(in_layers[begin:end] for begin, end in itertools.pairwise(bounds)),
    ]


def _write_files(path: Path, shape: Shape, seed: int, files: list[list[Tensor]]) -> None:
    """Write headers first and then the tensors' bytes as they are made, so no tensor is held whole."""
    writer = gguf.GGUFWriter(path, shape.arch)
    _add_metadata(writer, shape)
    for i, tensors in enumerate(files):
        if i:
            writer.tensors.append({})  # from here on into the next file
        for t in tensors:
            writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.n_bytes, raw_dtype=t.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    source = RowSource(shape.locality, seed)
    for out, tensors in zip(writer.fout, files, strict=True):
        writer.write_padding(out, out.tell())
        for tensor in tensors:
            for rows in source.of(tensor):
                out.write(rows.data)
            writer.write_padding(out, tensor.n_bytes)
    writer.close()


def _add_metadata(writer: gguf.GGUFWriter, shape: Shape) -> None:
    arch = ARCHITECTURES[shape.arch]
    values: dict[str, int | float | bool] = {
        "context_length": shape.n_ctx_train,
        "embedding_length": shape.hidden,
        "block_count": shape.n_layers,
        "expert_count": shape.n_experts,
        "expert_used_count": shape.n_experts_used,
        arch.expert_ff_key: shape.expert_ff,
        "attention.head_count": shape.n_head,
        "attention.layer_norm_rms_epsilon": 1e-5,
        **dict(arch.constants),
    }
    if shape.kv_lora_rank:
        values |= {
            "attention.head_count_kv": 1,
            "attention.key_length": shape.kv_lora_rank + shape.rope_dim,
            "attention.value_length": shape.kv_lora_rank,
            "attention.key_length_mla": shape.head_dim,
            "attention.value_length_mla": shape.value_dim,
            "attention.kv_lora_rank": shape.kv_lora_rank,
            "attention.q_lora_rank": shape.q_lora_rank,
            "rope.dimension_count": shape.rope_dim,
            "feed_forward_length": shape.dense_ff,
            "leading_dense_block_count": shape.n_dense_layers,
            "expert_shared_count": shape.shared_ff // shape.expert_ff,
            "expert_gating_func": 2 if shape.sigmoid_routing else 1,
            "expert_weights_norm": shape.sigmoid_routing,
        }
    else:
        values |= {
            "attention.head_count_kv": _n_head_kv(shape),
            "attention.key_length": _head_dim(shape),
            "attention.value_length": _head_dim(shape),
            "rope.dimension_count": _head_dim(shape),
        }
        if shape.shared_ff:
            values["expert_shared_feed_forward_length"] = shape.shared_ff
    if shape.n_groups:
        values |= {"expert_group_count": shape.n_groups, "expert_group_used_count": shape.n_groups_used}
    writer.add_name(f"synthetic {shape.arch}")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(f"{shape.arch}.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{shape.arch}.{key}", value)
        else:
            writer.add_float32(f"{shape.arch}.{key}", value)
    _add_vocabulary(writer, shape.n_vocab)


def _add_vocabulary(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    """Three special tokens, all bytes, the space, and words that no merge of shorter tokens reaches."""
    n_words = n_vocab - _FIRST_WORD
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(
        [
            "<unk>",
            "<s>",
            "</s>",
            *(f"<0x{byte:02X}>" for byte in range(256)),
            "▁",
            *(f"▁w{i}" for i in range(_FIRST_WORD, n_vocab)),
        ]
    )
    writer.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256, *[kinds.NORMAL] * (n_words + 1)]
    )
    writer.add_token_scores([0.0] * _FIRST_WORD + [float(-i) for i in range(n_words)])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.synthetic", description="Write a synthetic model.")
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("out", type=Path, help="the GGUF file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--splits", type=int, default=1, help="number of files")
    arguments = parser.parse_args()
    begin = time.monotonic()
    write_preset(arguments.out, arguments.preset, seed=arguments.seed, n_splits=arguments.splits)
    seconds = time.monotonic() - begin
    total_bytes = sum(path.stat().st_size for path in split_paths(arguments.out, arguments.splits))
    total, experts, dense = (f"{n / 2**20:.1f} MiB" for n in (total_bytes, *totals_bytes(PRESETS[arguments.preset])))
    print(f"{arguments.out}: {total} in {seconds:.1f} s; experts {experts}, dense {dense}")


if __name__ == "__main__":
    main()
