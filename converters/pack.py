# SPDX-License-Identifier: MIT
"""Lays a Mixture-of-Experts GGUF out for streaming: the same weights, in an order that storage likes.

What is done, and no more can be, as llama.cpp's reader wants each tensor right behind the one before it:

- Tensors begin at pages of 4096 bytes. An expert's slice of a tensor then begins at a page and ends at one, if its
  bytes are a multiple of 4096; else it cannot be aligned, as GGUF knows no padding between the experts of a tensor.
- What every token needs comes first, in one range; then the experts, layer by layer.
- gate_proj and up_proj of an expert become one slice (`ffn_gate_up_exps`, rows of gate first) where llama.cpp loads
  that: two reads for an expert instead of three. One is impossible, as down_proj has rows of another length.

No weight changes: llama.cpp computes each row as before, and the tokens are the same.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from edgemoe.errors import ConversionError
from edgemoe.formats.gguf import GgufModel, GgufTensor, read_model, read_raw_metadata

from .gguf_file import MetadataValue
from .gguf_writer import PAGE_BYTES, OutTensor, Progress, copy_of, padded, read_range, sha256_of, write_gguf
from .rehearsal import check_loads

PACK_VERSION = 1
"""Raised whenever the same inputs give another file."""

MERGED_GATE_UP = frozenset(
    {
        "cohere2moe",
        "deepseek2",
        "deepseek2-ocr",
        "gemma4",
        "granite_swa",
        "hy_v3",
        "mistral4",
        "qwen35moe",
        "qwen3next",
        "qwen4exp",
    }
)
"""Architectures whose loader takes `ffn_gate_up_exps` and whose graph multiplies by it: the callers of
`create_tensor_gate_up_exps` in llama.cpp's src/models (and gemma4.cpp) as shipped with llama-cpp-python 0.3.36."""

_PROJECTION = re.compile(r"blk\.(\d+)\.ffn_(gate|up|gate_up|down)_exps\.weight")
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


@dataclasses.dataclass(frozen=True)
class Reads:
    """What one expert costs to read, on average over all experts, with reads of whole pages."""

    n_reads: float
    n_bytes: float


@dataclasses.dataclass(frozen=True)
class PackReport:
    """What packing did.

    Attributes:
        before, after: an expert's reads in the source and in the result.
        n_merged_layers: layers whose gate and up became one tensor.
        unmerged_because: why others did not; empty if all did.
        unaligned: expert tensors whose slices cannot all begin at pages, with the bytes of a slice.
    """

    before: Reads
    after: Reads
    n_expert_tensors: int
    n_merged_layers: int
    unmerged_because: str
    unaligned: dict[str, int]


def pack(source: Path, out: Path, *, merge: bool = True, progress: Progress | None = None) -> PackReport:
    """Write `out`, the model `source` (one file, or the first of a split one) laid out for streaming, in one file.

    At most 16 MiB of weights are held at a time. The same arguments give the same bytes.

    Args:
        merge: join gate and up where llama.cpp can use them so. LoRA adapters and importance matrices made for the
            source name the tensors it had.
        progress: called with stage (`hash`, `write`), bytes done and in total.

    Raises:
        ModelFormatError: the source is not a complete GGUF.
        ConversionError: it has no routed experts, or the result cannot be written.
    """
    model = read_model(source)
    if not model.expert_tensors:
        raise ConversionError(
            f"cannot pack {source}: it has no routed experts (architecture {model.architecture}); a dense model needs "
            "no packing"
        )
    reason = "" if merge else "not asked for"
    if merge and model.architecture not in MERGED_GATE_UP:
        reason = f"llama.cpp has no merged tensor for {model.architecture}"
    tensors, n_merged, skipped = _arrange(model, is_merging=not reason)

    metadata: dict[str, MetadataValue | bytes] = {
        key: data for key, data in read_raw_metadata(source).items() if key not in _SPLIT_KEYS
    }
    metadata["edgemoe.pack.version"] = PACK_VERSION
    metadata["edgemoe.pack.merged_layers"] = n_merged
    metadata["edgemoe.pack.source_sha256"] = sha256_of(model.files, progress)
    write_gguf(
        out,
        metadata,
        tensors,
        alignment_bytes=PAGE_BYTES,
        check=check_loads if n_merged else None,
        progress=progress,
    )
    packed = read_model(out)
    return PackReport(
        before=reads_of(model),
        after=reads_of(packed),
        n_expert_tensors=len(packed.expert_tensors),
        n_merged_layers=n_merged,
        unmerged_because=reason or skipped,
        unaligned={t.name: _slice_bytes(t) for t in packed.expert_tensors if _slice_bytes(t) % PAGE_BYTES},
    )


def reads_of(model: GgufModel) -> Reads:
    """What an expert of `model` costs to read: one read for each slice, of all the pages it touches."""
    n_reads = n_bytes = n_experts = 0
    layers: dict[int, int] = {}
    for tensor in model.expert_tensors:
        slice_bytes = _slice_bytes(tensor)
        layers[tensor.layer] = max(layers.get(tensor.layer, 0), tensor.shape[2])
        n_reads += tensor.shape[2]
        for begin in range(tensor.offset, tensor.offset + tensor.n_bytes, slice_bytes):
            n_bytes += padded(begin + slice_bytes, PAGE_BYTES) - begin // PAGE_BYTES * PAGE_BYTES
    n_experts = sum(layers.values())
    return Reads(n_reads / n_experts, n_bytes / n_experts)


def _slice_bytes(tensor: GgufTensor) -> int:
    return tensor.n_bytes // tensor.shape[2]


def streaming_place(name: str) -> tuple[int, int]:
    """Where a tensor belongs in a packed file: what every token needs first, then the experts layer by layer as
    they are needed, gate and up before down."""
    match = _PROJECTION.fullmatch(name)
    order = ("gate_up", "gate", "up", "down")
    if match is not None:
        return int(match.group(1)), order.index(match.group(2))
    layer = re.match(r"blk\.(\d+)\..*exps\.weight$", name)
    return (int(layer.group(1)), len(order)) if layer is not None else (-1, 0)


def in_streaming_order(model: GgufModel) -> list[GgufTensor]:
    """The expert tensors in the order of a packed file."""
    return sorted(model.expert_tensors, key=lambda tensor: streaming_place(tensor.name))


def _arrange(model: GgufModel, *, is_merging: bool) -> tuple[list[OutTensor], int, str]:
    """The tensors of the result in file order, the layers that were merged, and why others were not."""
    experts = {t.name: t for t in in_streaming_order(model)}
    out = [copy_of(model, t) for t in model.tensors if t.name not in experts]
    n_merged, skipped, done = 0, "", set[str]()
    for tensor in experts.values():
        gate, up = (experts.get(f"blk.{tensor.layer}.ffn_{part}_exps.weight") for part in ("gate", "up"))
        if is_merging and tensor is gate and up is not None:
            if reason := _unmergeable(model, gate, up):
                skipped = reason
            else:
                out.append(_merged(model, gate, up))
                n_merged += 1
                done |= {gate.name, up.name}
        if tensor.name not in done:
            out.append(copy_of(model, tensor))
    return out, n_merged, skipped


def _unmergeable(model: GgufModel, gate: GgufTensor, up: GgufTensor) -> str:
    """Why gate and up of a layer cannot become one tensor; empty if they can."""
    if gate.type_name != up.type_name:
        return f"layer {gate.layer} has gate in {gate.type_name} and up in {up.type_name}"
    if gate.shape != up.shape:
        return f"layer {gate.layer} has gate of {list(gate.shape)} and up of {list(up.shape)}"
    stems = tuple(t.name.removesuffix("weight") for t in (gate, up))
    beside = [t.name for t in model.tensors if t.name.startswith(stems) and t not in (gate, up)]
    if beside:  # llama.cpp has names for merged ones in few architectures
        return f"layer {gate.layer} has {beside[0]}"
    return ""


def _merged(model: GgufModel, gate: GgufTensor, up: GgufTensor) -> OutTensor:
    """`ffn_gate_up_exps`: for each expert the rows of gate, then those of up (llama-graph.cpp, build_moe_ffn)."""
    columns, rows, n_experts = gate.shape
    slice_bytes = _slice_bytes(gate)

    def pieces() -> Iterator[bytes]:
        for expert in range(n_experts):
            for t in (gate, up):
                yield from read_range(model.files[t.file_idx], t.offset + expert * slice_bytes, slice_bytes)

    name = f"blk.{gate.layer}.ffn_gate_up_exps.weight"
    return OutTensor(name, (columns, 2 * rows, n_experts), gate.type_name, pieces)
