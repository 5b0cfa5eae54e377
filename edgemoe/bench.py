# SPDX-License-Identifier: MIT
"""A model on this machine: edgemoe beside stock llama.cpp, run by run in processes of their own, and what was found.

Runs alternate in pairs, because machines change from minute to minute; what is compared is compared within pairs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from edgemoe import bench_advice, confine, host, topology
from edgemoe.bench_child import Task
from edgemoe.errors import BackendError
from edgemoe.formats.gguf import GgufModel, read_model
from edgemoe.trace import load

ENGINES = ("edgemoe", "stock")
PROFILED = "edgemoe, profiled"
# A fraction of the memory for everything that is not a mapped weight.
_REPACK_ROOM = 0.9

Record = dict[str, Any]
Report = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Spread:
    """What repeated runs gave."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread | None:
        """None of no values."""
        return Spread(statistics.median(values), min(values), max(values)) if values else None


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What a benchmark found.

    Attributes:
        model: name of the file.
        settings: what was run: sizes, options, threads.
        confinement: what limited the memory of the runs, in words.
        notes: what a reader has to know to judge the figures.
        runs: every run: its engine, pair, and what it measured, or its `error`.
        engines: figure by engine and name: median, lowest and highest of the runs.
        ratios: edgemoe's figure divided by stock's, pair by pair: likewise.
        same_next_token: share of positions at which both would have said the same; None without stock.
        disk_bytes_per_s: random reads as large as one expert's matrix, between the runs.
        profile: of one run more; see `edgemoe.profile.Profile`.
        advice: what would help, the most helpful first.
    """

    model: str
    settings: Record
    confinement: str
    notes: list[str]
    runs: list[Record]
    engines: dict[str, dict[str, Spread]]
    ratios: dict[str, Spread]
    same_next_token: float | None
    disk_bytes_per_s: float
    profile: Record
    advice: list[bench_advice.Advice]

    def to_dict(self) -> Record:
        """Plain values, ready for JSON; without the tokens that were sampled."""
        fields = dataclasses.asdict(self)
        fields["runs"] = [{k: v for k, v in run.items() if k != "sampled"} for run in self.runs]
        return fields


FIGURES = (
    *("decode_tokens_per_s", "prefill_tokens_per_s", "ttft_s", "load_s"),
    *("read_bytes_per_token", "hit_rate", "stall_share", "peak_bytes"),
)
RATIOS = ("decode_tokens_per_s", "prefill_tokens_per_s")


class _Runner:
    """Starts runs, with the same limit for all."""

    def __init__(self, model: GgufModel, memory: int | None, timeout_s: float) -> None:
        self._model = model
        self._timeout_s = timeout_s
        self.limit_bytes: int | None = None
        self.why_not = "no --memory was given: each engine takes what the machine has"
        if memory is None:
            return
        try:
            confine.MemoryCgroup(f"edgemoe-bench-{os.getpid()}", memory).close()
            self.limit_bytes = memory
        except confine.CgroupError as error:
            self.why_not = f"stock llama.cpp is NOT held to the budget, and takes what the machine has ({error})"

    def run(self, task: Task) -> Record:
        """One run; `error` in the record says why there is nothing else."""
        _forget(self._model.files)
        command = [sys.executable, "-m", "edgemoe.bench_child"]
        text = json.dumps(dataclasses.asdict(task))
        if self.limit_bytes is None:
            result = confine.run(command, text, self._timeout_s)
        else:
            with confine.MemoryCgroup(f"edgemoe-bench-{os.getpid()}", self.limit_bytes) as group:
                result = group.run(command, text, self._timeout_s)
        record: Record = {"disturbed": result.disturbed, "wall_s": result.wall_s}
        if result.usage is not None:
            record["peak_bytes"] = result.usage.peak_bytes
        if result.exit_code != 0:
            is_killed = result.timed_out or (result.usage is not None and result.usage.oom_kills > 0)
            return record | {"error": self._reason(result), "crashed": result.exit_code < 0 and not is_killed}
        record |= json.loads(result.stdout.strip().splitlines()[-1])
        record.setdefault("peak_bytes", record["peak_rss_bytes"])
        return record

    def _reason(self, result: confine.RunResult) -> str:
        if result.timed_out:
            return f"not done after {self._timeout_s:.0f} s"
        if result.usage is not None and result.usage.oom_kills:
            return "killed: out of memory within the limit"
        lines = result.stderr_tail.strip().splitlines()
        return f"exit code {result.exit_code}: {lines[-1] if lines else 'no message'}"


def bench(
    model_path: str | Path,
    *,
    memory: int | None = None,
    against: str = "stock",
    pairs: int = 5,
    prompt_tokens: int = 256,
    tokens: int = 64,
    text: str | None = None,
    seed: int = 0,
    timeout_s: float = 1800.0,
    progress: Report | None = None,
    **options: Any,
) -> Benchmark:
    """Compare, profile and advise.

    Args:
        model_path: a GGUF file with routed experts.
        memory: bytes for each run; as root, with a memory cgroup around it, page cache included.
        against: `stock` for llama.cpp as llama_cpp runs it, `none` to measure edgemoe alone.
        pairs: runs of each engine.
        prompt_tokens, tokens: to read at once, and then one by one.
        text: what to read; None for the built-in text. Each pair begins at another place in it.
        seed: of the order within pairs.
        timeout_s: for one run.
        progress: called as (what runs now, runs done, all runs).
        options: keywords of `edgemoe.Llama`.

    Raises:
        ModelFormatError: the file is no GGUF.
        BackendError: the model has no routed experts, or edgemoe itself failed.
        ValueError: a number is below 1, or `against` is unknown.
    """
    if against not in ("stock", "none"):
        raise ValueError(f"unknown against {against!r}: expected stock or none")
    for name, number in (("pairs", pairs), ("prompt_tokens", prompt_tokens - 1), ("tokens", tokens)):
        if number < 1:
            raise ValueError(f"{name} is too small: expected at least {2 if name == 'prompt_tokens' else 1}")
    model = read_model(model_path)
    if not model.expert_tensors:
        raise BackendError(f"cannot benchmark {model.path}: it has no routed experts, and runs as plain llama.cpp")
    report = progress or (lambda _what, _done, _all: None)
    runner = _Runner(model, memory, timeout_s)
    options = {"warm_start": False, "n_ctx": 4096, **options, "memory": memory}
    options["n_ctx"] = max(options["n_ctx"], prompt_tokens + tokens + 8)
    # llama_cpp would take half of the processors for decoding; the same for both is what compares engines.
    options["n_threads"] = options.get("n_threads") or topology.default_threads()
    options["n_threads_batch"] = options.get("n_threads_batch") or options["n_threads"]
    room_bytes = min(memory or sys.maxsize, host.available_memory_bytes())
    model_bytes = sum(path.stat().st_size for path in model.files)
    why_plain = ""
    if model_bytes >= _REPACK_ROOM * room_bytes:
        why_plain = "whose second copy of the weights would not fit into the memory"
    engines = ENGINES if against == "stock" else ENGINES[:1]
    runs: list[Record] = []
    n_runs = pairs * len(engines) + 1
    disk = []

    def start(engine: str, pair: int, trace: str | None = None) -> Record:
        nonlocal why_plain
        report(f"pair {pair + 1} of {pairs}, {engine}" if trace is None else PROFILED, len(runs), n_runs)
        first = pair * (prompt_tokens + tokens)
        task = Task(engine, str(model.path), options, prompt_tokens, tokens, first, text, not why_plain, trace)
        found = runner.run(task)
        if engine == "stock" and not why_plain and found.get("crashed"):
            # llama-cpp-python 0.3.36 does where its products with AMX are used.
            why_plain = f"with which it crashes here ({found['error']})"
            found = runner.run(dataclasses.replace(task, repack=False))
        record = {"engine": engine, "pair": pair, **found}
        if engine == "edgemoe" and "error" in record:
            raise BackendError(f"cannot benchmark {model.path.name}: {record['error']}")
        return record

    slice_bytes = max(t.n_bytes // t.shape[2] for t in model.expert_tensors)
    order = random.Random(seed)
    for pair in range(pairs):
        disk.append(host.disk_bandwidth_bytes_per_s(model.path, slice_bytes, seconds=0.5, seed=pair))
        # A budget that edgemoe refuses is found out before stock has taken its time with it.
        drawn = engines if pair == 0 else order.sample(engines, len(engines))
        runs += [start(engine, pair) for engine in drawn]
    with tempfile.TemporaryDirectory(prefix="edgemoe-bench-") as folder:
        trace_path = Path(folder, "trace")
        profiled = start("edgemoe", 0, str(trace_path))
        trace = load(trace_path)
    bandwidth = statistics.median(disk)
    measured = bench_advice.Measured.of(profiled, trace, model, options, bandwidth)
    now = statistics.median(run["decode_tokens_per_s"] for run in runs if run["engine"] == "edgemoe")
    report("done", n_runs, n_runs)
    return Benchmark(
        model=model.path.name,
        settings={
            "prompt_tokens": prompt_tokens,
            "tokens": tokens,
            "pairs": pairs,
            "memory": memory,
            **{name: value for name, value in options.items() if name != "memory"},
            **{name: profiled[name] for name in ("kernels", "n_threads", "slots_bytes", "expert_bank_bytes")},
        },
        confinement=f"memory cgroup of {memory} bytes" if runner.limit_bytes else "none",
        notes=list(_notes([*runs, profiled], runner, engines, why_plain)),
        runs=[*runs, {**profiled, "engine": PROFILED}],
        engines={engine: _spreads(runs, engine) for engine in engines},
        ratios=_ratios(runs),
        same_next_token=_agreement(runs),
        disk_bytes_per_s=bandwidth,
        profile=measured.profile,
        # One profiled run says which part of the time changes; all runs say how fast it is now.
        advice=[dataclasses.replace(one, tokens_per_s=one.gain * now) for one in bench_advice.advise(measured)],
    )


def _forget(files: Sequence[Path]) -> None:
    """Let the page cache drop a model's files, so that no run finds what the one before has read."""
    for path in files:
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def _notes(runs: Sequence[Record], runner: _Runner, engines: Sequence[str], why_plain: str) -> Iterator[str]:
    if "stock" in engines and runner.limit_bytes is None:
        yield runner.why_not
    if "stock" in engines and why_plain:
        yield f"stock runs without weight repacking, {why_plain}"
    yield from dict.fromkeys(run["reuse_choice"] for run in runs if run.get("reuse_choice"))
    for run in runs:
        if "error" in run:
            yield f"{run['engine']}, pair {run['pair'] + 1}: {run['error']}"
    n_disturbed = sum(run["disturbed"] for run in runs)
    if n_disturbed:
        yield f"{n_disturbed} of {len(runs)} runs were disturbed by other programs: close them and measure again"


def _spreads(runs: Sequence[Record], engine: str) -> dict[str, Spread]:
    mine = [run for run in runs if run["engine"] == engine]
    spreads = {name: Spread.of([run[name] for run in mine if run.get(name) is not None]) for name in FIGURES}
    return {name: spread for name, spread in spreads.items() if spread is not None}


def _pairs(runs: Sequence[Record]) -> Iterator[tuple[Record, Record]]:
    """(edgemoe's run, stock's run) of each pair in which both ended well."""
    stock = {run["pair"]: run for run in runs if run["engine"] == "stock" and "error" not in run}
    for run in runs:
        if run["engine"] == "edgemoe" and run["pair"] in stock:
            yield run, stock[run["pair"]]


def _ratios(runs: Sequence[Record]) -> dict[str, Spread]:
    ratios = {name: Spread.of([ours[name] / other[name] for ours, other in _pairs(runs)]) for name in RATIOS}
    return {name: spread for name, spread in ratios.items() if spread is not None}


def _agreement(runs: Sequence[Record]) -> float | None:
    same = [a == b for ours, other in _pairs(runs) for a, b in zip(ours["sampled"], other["sampled"], strict=True)]
    return sum(same) / len(same) if same else None
