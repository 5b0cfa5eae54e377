# SPDX-License-Identifier: MIT
"""Where the bytes of a memory budget go, decided before anything is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

from edgemoe import _native, choosers, engine, host, runtime, topology
from edgemoe import on_miss as misses
from edgemoe.budget import MemoryBudget, Share
from edgemoe.demo import demo_model
from edgemoe.draft import DraftMemory
from edgemoe.draft_length import MAX_DRAFT_TOKENS
from edgemoe.draft_model import DraftFootprint, rehearsed
from edgemoe.errors import BudgetError
from edgemoe.formats.gguf import GgufModel, GgufTensor, read_model
from edgemoe.sizes import format_size, parse_size
from edgemoe.types import Plan

# llama.cpp rounds a context up to a multiple of this, and llama_cpp sizes its arrays by what was asked for.
_CONTEXT_MULTIPLE = 256
# Beside the elements of an activation row: alignment to a cache line, and pointers to the row.
_ROW_EXTRA_BYTES = 64
# The most rows that our kernels interleave into one group, over all instruction sets (AVX-512: one in each lane).
_GROUP_ROWS = 16
# What a thread interleaves at a time of rows that lie as in the file; kernels/core/arithmetic.cc, kInterleavedBytes.
_INTERLEAVED_BYTES = 288 << 10
DEFAULT_PREFETCH = "auto"
DRAFTS = ("off", "ngram")
"""The ways to draft tokens that have a name; the other one is the path of a draft model."""

_HUGE_PAGE_BYTES = 2 << 20  # what a thread gathers and interleaves lies in such pages


def context_size(n_ctx: int, model: GgufModel) -> int:
    """The context that llama.cpp really makes: 0 means the model's own, others are rounded up."""
    if n_ctx == 0:
        n_ctx = int(model.metadata.get(f"{model.architecture}.context_length", 4096))
    return -(-n_ctx // _CONTEXT_MULTIPLE) * _CONTEXT_MULTIPLE


def _panel_bytes(t: GgufTensor) -> int:
    """At most one activation row as our kernels multiply `t` with it; kernels/simd/kernel_table.h, PanelBytes."""
    n_cols = t.shape[0]
    if t.type_name in ("F32", "F16", "BF16"):
        return 4 * n_cols + _ROW_EXTRA_BYTES
    return n_cols + -(-n_cols // 32) * 4 + -(-n_cols // 16) * 4 + _ROW_EXTRA_BYTES


def _own_bytes(model: GgufModel, n_ubatch: int, n_threads: int, companion: GgufModel | None = None) -> int:
    """Buffers of our kernels: activation rows of a layer, what each thread gathers of them, and where rows are packed.

    Gate and up take one row a token, down takes one for each expert that a token uses.
    """
    if not model.expert_tensors:
        return 0
    shared = used = n_ff = packing = 0
    has_format = set()
    tensors = [*model.expert_tensors, *(companion.expert_tensors if companion is not None else ())]
    for t in tensors:
        if "_down_" in t.name:
            used, n_ff = max(used, _panel_bytes(t)), max(n_ff, t.shape[0])
        else:
            shared = max(shared, _panel_bytes(t))
        packing = max(packing, _GROUP_ROWS * (t.n_bytes // (t.shape[1] * t.shape[2])))
        has_format.add(_native.find_format(t.type_name) != 0)
    used *= model.n_experts_used
    # A block that is not ours as a whole keeps down's rows where others keep gate's; theirs have a place of their own.
    rows = n_ubatch * (shared + used * len(has_format))
    if companion is not None:
        # The same row once more in the format of the copies, while decoding.
        rows += min(n_ubatch, 1 + MAX_DRAFT_TOKENS) * shared
    widest = max(_panel_bytes(t) for t in tensors)
    scratch = n_ubatch * widest + max(packing, _INTERLEAVED_BYTES)
    scratch = -(-scratch // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    return rows + n_threads * (scratch + 4 * n_ff) + host.N_IO_THREADS * packing


def _batch_bytes(model: GgufModel, llama_kwargs: dict[str, Any], companion: GgufModel | None = None) -> int:
    """Buffers of our own and of llama_cpp's that grow with the batch; enough for our kernels and for ggml's."""
    n_ctx = int(llama_kwargs["n_ctx"])
    n_batch = min(n_ctx, int(llama_kwargs.get("n_batch", 512)))
    n_ubatch = min(n_batch, int(llama_kwargs.get("n_ubatch", 512)))
    n_bytes = 0
    for t in model.expert_tensors:
        # Activation rows are at most as wide as f32, and 9/8 bytes an element beside quantized weights.
        element_bytes = {"F32": 4.0, "F16": 2.0, "BF16": 2.0}.get(t.type_name, 1.125)
        rows = n_ubatch * (1 + model.n_experts_used)
        n_bytes = max(n_bytes, int(rows * (t.shape[0] * element_bytes + _ROW_EXTRA_BYTES)))
    asked = [int(llama_kwargs.get(key) or 0) for key in ("n_threads", "n_threads_batch")]
    n_threads = max(asked) or topology.default_threads()
    n_bytes = max(n_bytes, _own_bytes(model, n_ubatch, n_threads, companion))
    if llama_kwargs.get("logits_all"):
        tokens = model.metadata.get("tokenizer.ggml.tokens", [])
        n_bytes += 4 * len(tokens) * (n_ctx + n_batch)
    return n_bytes


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What a model needs beside its expert slots, and what its slots can take."""

    model: GgufModel
    kv_bytes: int
    buffers_bytes: int
    batch_bytes: int
    draft: DraftFootprint | None = None
    prefetch_bytes: int = 0  # a part of buffers_bytes
    draft_buffers_bytes: int = 0  # what drafts may yet take: slots have it until then
    companion: GgufModel | None = None  # low-bit copies, which share the slots

    @property
    def draft_bytes(self) -> int:
        """What a draft model takes: weights, cache, compute buffers."""
        return self.draft.total_bytes if self.draft is not None else 0

    @property
    def least_slots_bytes(self) -> int:
        """The fewest slots: a token's experts, and what drafts have not taken yet."""
        return int(self.slot_sizes(0).cycle_slot_bytes) + self.draft_buffers_bytes

    def after_draft_growth(self, n_bytes: int) -> Footprint:
        """The footprint when drafts have taken so much: buffers now, and no longer slots."""
        return dataclasses.replace(
            self,
            buffers_bytes=self.buffers_bytes + n_bytes,
            draft_buffers_bytes=self.draft_buffers_bytes - n_bytes,
        )

    def slot_sizes(self, slots_bytes: int) -> _native.Sizes:
        """What slots take if there are `slots_bytes` for them."""
        return runtime.slot_sizes(self.model, slots_bytes, self.companion)

    def slots_bytes(self, budget_bytes: int, fixed_bytes: int) -> int | None:
        """Memory for expert slots beside `fixed_bytes` and the slack; None when it is less than the fewest."""
        slots, least = budget_bytes - fixed_bytes - host.slack_bytes(budget_bytes), self.least_slots_bytes
        return max(slots, least) if slots + host.TOLERANCE_BYTES >= least else None

    def plan(self, budget_bytes: int | None) -> Plan:
        """Divide a budget; None: what this machine has, and no more than the model can use."""
        model = self.model
        fixed = model.dense_bytes + self.kv_bytes + self.buffers_bytes + self.draft_bytes + host.SLACK_BYTES
        floor = int((fixed + self.least_slots_bytes) / (1 - host.SLACK_SHARE))
        if budget_bytes is None:
            most = fixed + self.slot_sizes(0).bank_slot_bytes + self.draft_buffers_bytes
            everything = int(most / (1 - host.SLACK_SHARE)) + host.SLACK_BYTES
            budget_bytes = min(everything, host.default_budget_bytes())
        slack = host.slack_bytes(budget_bytes)
        slots = self.slots_bytes(budget_bytes, fixed - host.SLACK_BYTES)
        sizes = self.slot_sizes(slots if slots is not None else 0)
        return Plan(
            fits=slots is not None,
            budget_bytes=budget_bytes,
            floor_bytes=floor,
            dense_bytes=model.dense_bytes,
            kv_bytes=self.kv_bytes,
            buffers_bytes=self.buffers_bytes,
            slots_bytes=int(sizes.slots_bytes),
            slack_bytes=slack,
            token_cycle_bytes=model.token_cycle_bytes,
            expert_bank_bytes=model.expert_bank_bytes,
            n_experts=model.n_experts if model.expert_tensors else 0,
            n_experts_used=model.n_experts_used if model.expert_tensors else 0,
            n_moe_layers=model.n_moe_layers,
            prefetch_bytes=self.prefetch_bytes,
            draft_buffers_bytes=self.draft_buffers_bytes,
            draft_bytes=self.draft_bytes,
        )

    def join(self, budget: MemoryBudget, process_bytes: int) -> Share:
        """Make room in a budget that several models share, in a process that held `process_bytes` before `measure`.

        Raises:
            BudgetError: the model does not fit beside the others.
        """
        parts = {
            "dense weights": self.model.dense_bytes,
            "KV cache": self.kv_bytes,
            "buffers": max(0, self.buffers_bytes - process_bytes),
            "draft model": self.draft_bytes,
        }
        return budget.join(
            self.model.path.name,
            {name: n_bytes for name, n_bytes in parts.items() if n_bytes},
            self.least_slots_bytes,
            int(self.slot_sizes(0).bank_slot_bytes),
        )

    def shared_plan(self, share: Share) -> Plan:
        """The plan with the slots that a shared budget leaves; the floor is that of all its models."""
        sizes = self.slot_sizes(share.slots_bytes)
        return dataclasses.replace(
            self.plan(share.budget.budget_bytes),
            fits=True,
            floor_bytes=share.budget.floor_bytes,
            slots_bytes=int(sizes.slots_bytes),
        )


def draft_path(draft: str | Path) -> Path | None:
    """The draft model that the option `draft` names; None for the ways without one.

    Raises:
        ValueError: it is no way to draft, and nothing like the path of a file either.
    """
    if draft in DRAFTS:
        return None
    path = Path(draft)
    if isinstance(draft, str) and path.suffix != ".gguf" and os.sep not in draft and not path.exists():
        raise ValueError(f"unknown draft {draft!r}: expected {', '.join(DRAFTS)}, or the path of a small GGUF model")
    return path


def measure(
    model: GgufModel,
    llama_kwargs: dict[str, Any],
    kernels: str = "auto",
    prefetch: str = DEFAULT_PREFETCH,
    draft: str | Path = "off",
    companion: GgufModel | None = None,
) -> Footprint:
    """Rehearse the load; for errors see `engine.rehearsal`, `runtime.open_runtime`, `draft_path` and `rehearsed`."""
    path = draft_path(draft)
    expert_runtime = None
    if model.expert_tensors:
        bank_bytes = int(runtime.slot_sizes(model, 0, companion).bank_slot_bytes)
        expert_runtime = runtime.open_runtime(model, bank_bytes, kernels=kernels, companion=companion)
    with contextlib.ExitStack() as stack:
        if expert_runtime is not None:
            stack.callback(expert_runtime.close)
        # Held while the model itself is rehearsed: its vocabulary and graph are part of what the process takes.
        drafts = None if path is None else stack.enter_context(rehearsed(read_model(path), model, llama_kwargs))
        sizes = stack.enter_context(engine.rehearsal(model, expert_runtime, llama_kwargs))
    batch_bytes = _batch_bytes(model, llama_kwargs, companion)
    draft_buffers_bytes = 0
    if draft != "off":
        n_vocab = len(model.metadata.get("tokenizer.ggml.tokens", []))
        draft_buffers_bytes = DraftMemory(n_vocab, int(llama_kwargs["n_ctx"])).most_bytes
    prefetch_bytes = runtime.prefetch_bytes(model, prefetch)
    buffers = sizes.compute_bytes + sizes.output_bytes + sizes.process_bytes + batch_bytes + prefetch_bytes
    return Footprint(
        model, sizes.kv_bytes, buffers, batch_bytes, drafts, prefetch_bytes, draft_buffers_bytes, companion
    )


def refusal(plan: Plan, model: GgufModel, n_ctx: int) -> BudgetError:
    """Why a budget is too small, with the numbers and a way out."""

    def gib(n_bytes: int) -> str:
        return f"{n_bytes / (1 << 30):.2f}"

    enough = -(-plan.floor_bytes * 102 // 100 // (1 << 20))
    drafts = f"draft model {gib(plan.draft_bytes)}, " if plan.draft_bytes else ""
    shorter = f"a shorter context (now {n_ctx}) or " if plan.kv_bytes > plan.floor_bytes // 20 else ""
    without = "no draft model or " if plan.draft_bytes else ""
    return BudgetError(
        f"budget {format_size(plan.budget_bytes)} is below the floor {format_size(plan.floor_bytes)} for "
        f"{model.path.name} (GiB: dense {gib(plan.dense_bytes)}, KV {gib(plan.kv_bytes)}, buffers "
        f"{gib(plan.buffers_bytes)}, {drafts}one token's experts {gib(plan.token_cycle_bytes)}, slack "
        f"{gib(plan.slack_bytes)}); use {shorter}{without}--memory {enough}MiB"
    )


def plan(
    model_path: str | Path | None = None,
    *,
    memory: int | str | None = None,
    n_ctx: int = 4096,
    kernels: str = "auto",
    prefetch: str = DEFAULT_PREFETCH,
    draft: str | Path = "off",
    eviction: str = "auto",
    warm_start: bool = True,
    reuse_bias: str | float = "off",
    reuse_method: str = "cache-prior",
    top_j: int | None = None,
    reuse_price: str | float | None = None,
    expert_top_k: str | int = "off",
    on_miss: str = "wait",
    on_miss_mass: float = misses.DEFAULT_MASS,
    on_miss_skip_mass: float | None = None,
    lowbit: str | Path | None = None,
    **llama_kwargs: Any,
) -> Plan:
    """Plan a memory budget for a model without loading it.

    Args:
        model_path: a GGUF file; None for the demo model.
        memory: bytes, or a size such as "1.5GiB"; None for what this machine has.
        n_ctx: context length in tokens; 0 for the model's own.
        kernels: who will multiply by experts, as for `Llama`.
        prefetch: how far ahead experts will be predicted, as for `Llama`.
        draft: how tokens will be drafted, as for `Llama`.
        eviction, warm_start, reuse_bias, reuse_method, top_j, reuse_price, expert_top_k: as for `Llama`; none takes
            memory that counts. What `auto` would choose is not looked up.
        on_miss, on_miss_mass, on_miss_skip_mass, lowbit: as for `Llama`; low-bit copies take slots.
        llama_kwargs: what `Llama` will be given; those that change its memory count.

    Raises:
        ModelFormatError, BudgetError, BackendError: the file, the size or the model cannot be used. A budget that
        is too small is not an error: `Plan.fits` says so.
        `reuse_price`, `expert_top_k`, `on_miss` or what belongs to it makes no sense.
    """
    _native.check_kernels(kernels)
    _native.check_eviction(eviction)
    _native.check_prefetch(prefetch)
    draft_path(draft)
    lossy = choosers.Keywords(
        reuse_bias, reuse_method, top_j, reuse_price, expert_top_k, on_miss, on_miss_mass, on_miss_skip_mass, lowbit
    )
    request = choosers.parse(lossy)
    model = read_model(model_path if model_path is not None else demo_model())
    companion = request.check(model)
    kwargs = dict(llama_kwargs, n_ctx=context_size(n_ctx, model))
    footprint = measure(model, kwargs, kernels, prefetch, draft, companion)
    return footprint.plan(None if memory is None else parse_size(memory))
