# SPDX-License-Identifier: MIT
"""What the integration tests share: the reference (stock llama.cpp without repacking) and slots of a given size."""

from __future__ import annotations

import ctypes
import itertools
import json
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from llama_cpp import llama_cpp as low_level

import edgemoe
from edgemoe import _native, runtime
from edgemoe.confine import MemoryCgroup
from edgemoe.converters.evaluate import GgmlTensor
from edgemoe.converters.unpacked import UnpackedLlama
from edgemoe.errors import BudgetError

ROOT = Path(__file__).parents[2]
N_VOCAB = 512
CONTEXT = {"n_ctx": 256, "n_batch": 64, "logits_all": True, "verbose": False}
Logits = npt.NDArray[np.single]


class StockLlama(UnpackedLlama):
    """llama.cpp as it is, without weight repacking: the bits that edgemoe has to give."""


def stock(path: Path, *, cls: type[StockLlama] = StockLlama, **options: Any) -> StockLlama:
    """The reference with a small context; two threads if not told otherwise."""
    return cls(str(path), **{"n_threads": 2, "n_threads_batch": 2, **CONTEXT, **options})


def streamed(path: Path, **options: Any) -> edgemoe.Llama:
    """The same as `stock`, streamed, with ggml's arithmetic; everything resident if not told otherwise."""
    return edgemoe.Llama(path, **{"n_threads": 2, "n_threads_batch": 2, "kernels": "ggml", **CONTEXT, **options})


def logits(llm: llama_cpp.Llama, prompt: list[int], steps: list[int]) -> Logits:
    """Logits of every position: the prompt in batches, then `steps` one by one; from an empty context."""
    llm.reset()
    llm.eval(prompt)
    for token in steps:
        llm.eval([token])
    result: Logits = llm.scores[: llm.n_tokens].copy()
    assert len(result) == len(prompt) + len(steps)
    return result


def sampled(llm: llama_cpp.Llama, prompt: list[int], n: int, seed: int, temperature: float) -> list[int]:
    """`n` generated token ids."""
    llm.reset()
    llm.set_seed(seed)
    return list(itertools.islice(llm.generate(prompt, temp=temperature, top_k=50, top_p=0.98), n))


def set_slots(llm: edgemoe.Llama, slots_bytes: int) -> None:
    """Slots of that many bytes, whatever the budget: tiny models are smaller than a process, a budget cannot say it."""
    _native.set_slots_bytes(llm._runtime, slots_bytes)


def slot_bytes(llm: edgemoe.Llama) -> list[int]:
    """The distinct sizes of the model's slots."""
    extents = runtime.extents(llm._gguf)
    return sorted({_native.measure([t], 0).bank_slot_bytes // t.n_experts for t in extents})


def set_fewest_slots(llm: edgemoe.Llama) -> None:
    """The fewest slots that the core accepts: two of each size, or a little more where sizes share unevenly."""
    sizes = slot_bytes(llm)
    for extra in range(200):
        try:
            set_slots(llm, 2 * sum(sizes) + extra * sizes[0])
            return
        except BudgetError:
            continue
    raise AssertionError(f"no small number of slots is accepted (sizes {sizes})")


def set_residency(llm: edgemoe.Llama, residency: str) -> None:
    """One of `RESIDENCIES`."""
    sizes = runtime.slot_sizes(llm._gguf, 0)
    if residency == "fewest":
        set_fewest_slots(llm)
    else:
        share = {
            "all": sizes.bank_slot_bytes,
            "third": 3 * sizes.bank_slot_bytes // 10,
            "cycle": sizes.cycle_slot_bytes,
        }
        set_slots(llm, max(share[residency], sizes.cycle_slot_bytes))


def await_preloads(model: Any) -> None:
    """Until the warm start of a model or session has read what it means to: with fewer slots it reads less."""
    assert model._runtime is not None
    deadline_s = time.monotonic() + 60
    while model._runtime.preload_stats().n_left:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def await_no_more(held: Callable[[], tuple[int, ...]], before: tuple[int, ...]) -> None:
    """Until no count is above what it was: a thread that has ended and was joined is listed for a moment longer."""
    deadline_s = time.monotonic() + 60
    while any(now > then for now, then in zip(held(), before, strict=True)):
        assert time.monotonic() < deadline_s, (held(), before)
        time.sleep(0.001)


RESIDENCIES = ("all", "third", "cycle", "fewest")


def set_threads(llm: llama_cpp.Llama, n_threads: int) -> None:
    """Threads of a context that exists."""
    llama_cpp.llama_set_n_threads(llm._ctx.ctx, n_threads, n_threads)


def python(script: str, *arguments: object, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, warnings as errors left out; its working directory is the repository's."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def said(script: str, *arguments: object, group: MemoryCgroup | None = None) -> Any:
    """The JSON of the last line that a script prints, in a process of its own and, if given, in a memory cgroup."""
    if group is None:
        done = python(script, *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])
    command = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-c", script, *map(str, arguments)]
    result = group.run(command, "", 120)
    assert result.usage is not None
    assert result.usage.oom_kills == 0 and result.exit_code == 0, (result.exit_code, result.stderr_tail)
    return json.loads(result.stdout.splitlines()[-1])


def watch_nodes(monkeypatch: pytest.MonkeyPatch, pattern: str, look: Callable[[str, GgmlTensor], None]) -> None:
    """Contexts made from now on hand nodes whose names match `pattern` to `look`, right after they were computed."""

    def on_node(address: int, ask: bool, _user_data: Any) -> bool:
        node = ctypes.cast(address, ctypes.POINTER(GgmlTensor)).contents
        name = node.name.decode()
        if re.fullmatch(pattern, name) is None:
            return not ask
        if not ask:
            look(name, node)
        return True

    callback = low_level.ggml_backend_sched_eval_callback(on_node)
    defaults = low_level.llama_context_default_params

    def with_callback() -> Any:
        params = defaults()
        params.cb_eval = callback
        return params

    monkeypatch.setattr(low_level, "llama_context_default_params", with_callback)


def node_values(tensor: GgmlTensor) -> Logits:
    """The values of a contiguous F32 tensor, its columns last."""
    n = int(np.prod(tensor.ne[:]))
    return np.frombuffer(ctypes.string_at(tensor.data, 4 * n), np.single).reshape(tuple(tensor.ne[:])[::-1]).copy()
