# SPDX-License-Identifier: MIT
"""Where the bytes of a budget go with an ONNX model, by its file alone; ONNX Runtime is not needed to say so.

What ONNX Runtime 1.32.0 does with a constant in external data was measured on x86-64, for each operator alone: it maps
it; MatMul, Gemm and MatMulNBits then repack theirs into memory of their own and unmap them, one after the other; what
is gathered from stays mapped, and a run touches the rows that it takes.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any

from edgemoe import _native, host, onnx_schedule
from edgemoe.errors import ModelFormatError
from edgemoe.formats.onnx_model import MICROSOFT, OnnxModel, OnnxNode, OnnxTensor, element_bits

# Positions of QMoE's inputs: weights of fc1 and fc2; scales and zero points, streamed where they are blockwise.
_WEIGHTS, _SIDES = (2, 5), (3, 6, 11, 12)
# MoE's weights, and where a quantized node has them.
_FLOAT_WEIGHTS = {2: 2, 4: 5}
# Activations that the plug-in computes at once; kernels/plugins/onnxruntime/qmoe_model.cc, kActivationBytes.
_ACTIVATION_BYTES = 16 << 20
# What a session takes beside its weights: 10 MiB with onnxruntime 1.32.0 on x86-64, for the first one of a process.
SESSION_BYTES = 16 << 20
# Rows of embeddings that may stay in memory: more than that are given back after a run (see `onnx_memory`). A page
# fault maps up to 64 KiB, so these are 256 rows at least.
_ROWS_BYTES = 16 << 20
_UINT8 = 2
_FLOAT16 = 10  # scales become floats as they are copied
# By operator and domain, the inputs of which a run reads some rows.
_GATHERED = {("Gather", ""): (0,), ("GatherBlockQuantized", MICROSOFT): (0, 2, 3)}
_REPACKED = {("MatMul", ""): (1,), ("Gemm", ""): (1,)}


@dataclasses.dataclass(frozen=True)
class OnnxPlan:
    """Where the bytes of a budget go; made before anything is loaded.

    Attributes:
        process_bytes: what this process holds already.
        dense_bytes: what ONNX Runtime keeps of the tensors that are not streamed, and not in `mapped_bytes`; copies
            that it repacks are counted as large as they become.
        mapped_names, mapped_bytes: tensors of which a run reads some rows, mostly embeddings. They are no part of a
            budget but for `rows_bytes`, as they are pages of a file that can be dropped at any time.
        rows_bytes: of those, what may stay in memory.
        kv_bytes, logits_bytes: the cache of a context and logits of a piece of a prompt, where they were asked for.
        scratch_bytes: the most that ONNX Runtime takes for a moment to decode weights that it does not repack.
        repack_bytes: the most that is held twice while loading, before experts are read.
        workspace_bytes: the most that the plug-in takes beside its slots, predictions among it.
        prefetch_bytes: of that, what predictions take.
        token_cycle_bytes: slots for the experts of one token.
        expert_bank_bytes: slots for all experts.
    """

    process_bytes: int
    dense_bytes: int
    mapped_names: tuple[str, ...]
    mapped_bytes: int
    rows_bytes: int
    kv_bytes: int
    logits_bytes: int
    scratch_bytes: int
    repack_bytes: int
    workspace_bytes: int
    prefetch_bytes: int
    token_cycle_bytes: int
    expert_bank_bytes: int

    @property
    def parts(self) -> dict[str, int]:
        """What the model takes beside slots, by what it is; no part is 0."""
        parts = {
            "a session": SESSION_BYTES,
            "dense weights": self.dense_bytes,
            "rows of embeddings": self.rows_bytes,
            "KV cache": self.kv_bytes,
            "logits": self.logits_bytes,
            "decoded weights": self.scratch_bytes,
            "workspace": self.workspace_bytes,
        }
        return {name: n_bytes for name, n_bytes in parts.items() if n_bytes}

    @property
    def own_bytes(self) -> int:
        """What the model takes beside slots."""
        return sum(self.parts.values())

    @property
    def pending_bytes(self) -> int:
        """What it takes only when it runs."""
        return self.rows_bytes + self.kv_bytes + self.logits_bytes + self.scratch_bytes + self.workspace_bytes

    @property
    def least_slots_bytes(self) -> int:
        """What must be free for slots: they are empty while ONNX Runtime repacks weights."""
        return max(self.token_cycle_bytes, self.repack_bytes)

    @property
    def floor_bytes(self) -> int:
        """The smallest budget that runs."""
        return host.with_slack(self.process_bytes + self.own_bytes + self.least_slots_bytes)

    def slots_bytes(self, budget_bytes: int) -> int:
        """Memory for slots within a budget; less than `least_slots_bytes` where it does not fit."""
        slots = budget_bytes - self.process_bytes - self.own_bytes - host.slack_bytes(budget_bytes)
        return min(slots, max(self.expert_bank_bytes, self.least_slots_bytes))

    @property
    def everything_bytes(self) -> int:
        """The smallest budget with all experts in memory."""
        return host.with_slack(self.process_bytes + self.own_bytes + max(self.expert_bank_bytes, self.repack_bytes))


def streamed(model: OnnxModel, node: OnnxNode) -> dict[int, str]:
    """Position (of QMoE) and name of the inputs that the plug-in streams, if it claims the MoE node."""
    found = {}
    if node.op_type == "MoE":
        for position, place in _FLOAT_WEIGHTS.items():
            name = node.inputs[position] if position < len(node.inputs) else ""
            tensor = model.tensors.get(name)
            if tensor is not None and tensor.path is not None and len(tensor.shape) == 3:
                found[place] = name
        return found
    for position in (*_WEIGHTS, *_SIDES):
        name = node.inputs[position] if position < len(node.inputs) else ""
        tensor = model.tensors.get(name)
        if tensor is None or tensor.path is None or len(tensor.shape) != 3:
            continue
        if position in _SIDES:
            weights = model.tensors.get(node.inputs[_WEIGHTS[position in (6, 12)]])
            scales = model.tensors.get(node.inputs[(3, 6)[position in (6, 12)]])
            if weights is None or scales is None or len(scales.shape) != 3 or scales.shape[2] < 2:
                continue  # one scale for a row: too small to be worth reads of its own
        found[position] = name
    return found


def kv_bytes(model: OnnxModel, n_ctx: int, head_size: int | None = None) -> int:
    """The cache that a run is given for a context of `n_ctx` tokens, one sequence: the inputs named past.

    `head_size` is the last dimension where the file only has a name for it.
    """
    n_bytes = 0
    for value in model.inputs:
        if not value.name.startswith("past") or value.name in model.tensors:
            continue
        sizes = [n if isinstance(n, int) else 1 if "batch" in n else n_ctx for n in value.shape]
        if head_size is not None and len(sizes) == 4 and isinstance(value.shape[3], str):
            sizes[3] = head_size
        n_bytes += math.prod(sizes) * element_bits(value.data_type) // 8
    return n_bytes


@dataclasses.dataclass
class _Dense:
    kept_bytes: int = 0
    mapped_names: list[str] = dataclasses.field(default_factory=list)
    scratch_bytes: int = 0
    repack_bytes: int = 0

    def add_repacked(self, tensor: OnnxTensor, copy_bytes: int) -> None:
        self.kept_bytes += copy_bytes
        self.repack_bytes = max(self.repack_bytes, tensor.n_bytes)


def _add_matmul_nbits(dense: _Dense, model: OnnxModel, node: OnnxNode, weights: OnnxTensor) -> None:
    """MatMulNBits: A, B, scales, zero points, group index; K columns, N rows of B."""
    bits, n_columns, n_rows = (node.ints.get(key, 4 if key == "bits" else 0) for key in ("bits", "K", "N"))
    points = model.tensors.get(node.inputs[3]) if len(node.inputs) > 3 else None
    has_groups = len(node.inputs) > 4 and node.inputs[4] != ""
    is_exact = node.ints.get("accuracy_level", 0) != 4
    can_repack = (points is None or points.data_type == _UINT8) and not has_groups
    if not can_repack or bits not in ((4,) if is_exact else (4, 8)):
        # Left as it is, and decoded to float32 as a whole in each run.
        dense.kept_bytes += weights.n_bytes
        dense.scratch_bytes = max(dense.scratch_bytes, 4 * n_columns * n_rows)
        return
    n_blocks = n_rows * -(-n_columns // max(1, node.ints.get("block_size", 32)))
    # For activations of 8 bits: scales, sums of blocks, and room for scales, each float32.
    dense.add_repacked(weights, weights.n_bytes + (0 if is_exact else 3 * 4 * n_blocks))


def _dense(model: OnnxModel, streamed_names: set[str]) -> _Dense:
    uses: dict[str, list[tuple[OnnxNode, int]]] = collections.defaultdict(list)
    for node in model.nodes:
        for position, name in enumerate(node.inputs):
            if name in model.tensors:
                uses[name].append((node, position))
    dense = _Dense()
    for name, tensor in model.tensors.items():
        if name in streamed_names:
            continue
        is_gathered, is_kept = False, not uses[name]
        for node, position in uses[name]:
            kind = (node.op_type, node.domain.removeprefix("ai.onnx"))
            if position in _GATHERED.get(kind, ()):
                is_gathered = True
            elif position in _REPACKED.get(kind, ()) and len(tensor.shape) == 2:
                dense.add_repacked(tensor, tensor.n_bytes)
            elif kind == ("MatMulNBits", MICROSOFT) and position == 1:
                _add_matmul_nbits(dense, model, node, tensor)
            else:
                is_kept = True
        if is_gathered and tensor.path is not None and not is_kept:
            dense.mapped_names.append(name)
        elif is_kept or is_gathered:
            dense.kept_bytes += tensor.n_bytes
    return dense


def plan(model: OnnxModel, cache_bytes: int = 0, logits_bytes: int = 0, prefetch: str = "auto") -> OnnxPlan:
    """Add up what a session takes.

    Args:
        model: what the file says.
        cache_bytes, logits_bytes: what a cache of keys and values, and logits take, if they are to be part of the plan.
        prefetch: how far ahead experts will be predicted, as for `InferenceSession`.

    Raises:
        ModelFormatError: a tensor of experts has none.
    """
    prefetch_bytes = onnx_schedule.prefetch_bytes(model, prefetch)
    streamed_names: set[str] = set()
    extents: list[_native.TensorExtent] = []
    sides = dict.fromkeys(_SIDES, 0)
    activations = 0
    for layer, node in enumerate(model.moe_nodes):
        for position, name in streamed(model, node).items():
            t = model.tensors[name]
            n_experts = t.shape[0]
            if n_experts < 1 or t.n_bytes < 1:
                raise ModelFormatError(f"tensor {name} of node {node.name} has no experts: shape {list(t.shape)}")
            n_used = min(max(1, node.ints.get("k", 1)), n_experts)
            streamed_names.add(name)
            extents.append(
                _native.TensorExtent(
                    f"{layer}.{name}", 0, layer, n_experts, n_used, t.offset, t.n_bytes // n_experts, 0, 0, 0
                )
            )
            if position in _SIDES:
                sides[position] = max(sides[position], t.n_bytes * (2 if t.data_type == _FLOAT16 else 1))
            else:
                activations = _ACTIVATION_BYTES
    sizes: Any = _native.measure(extents, 0) if extents else None
    dense = _dense(model, streamed_names)
    mapped_bytes = sum(model.tensors[name].n_bytes for name in dense.mapped_names)
    return OnnxPlan(
        process_bytes=host.process_rss_bytes(),
        dense_bytes=dense.kept_bytes,
        mapped_names=tuple(dense.mapped_names),
        mapped_bytes=mapped_bytes,
        rows_bytes=min(mapped_bytes, _ROWS_BYTES),
        kv_bytes=cache_bytes,
        logits_bytes=logits_bytes,
        scratch_bytes=dense.scratch_bytes,
        repack_bytes=dense.repack_bytes,
        workspace_bytes=activations + sum(sides.values()) + prefetch_bytes,
        prefetch_bytes=prefetch_bytes,
        token_cycle_bytes=int(sizes.cycle_slot_bytes) if sizes else 0,
        expert_bank_bytes=int(sizes.bank_slot_bytes) if sizes else 0,
    )
