# SPDX-License-Identifier: MIT
"""How well replay predicts this machine: measured and predicted tok/s of the same tokens, at several budgets.

Informational: it measures time, and needs a quiet machine. In each series, a model is run at each share of its experts
and with each setting of prefetch, freshly loaded each time, while a trace is recorded. Each trace then calibrates a
replay that predicts the other runs of its series, never its own. With `--mib-per-s` (root, a cgroup v1 `blkio`
controller) the kernel limits this process's reads, so that the disk is the same all the time and no cache of the host
can help.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import session, synthetic
from benchmarks.larger_than_memory import measure_sizes
from edgemoe.replay import token_us
from edgemoe.replay_calibration import Calibration
from edgemoe.trace import Trace

MIB = 1 << 20
BLKIO = Path("/sys/fs/cgroup/blkio")
PROMPT_TOKENS = 64
Record = dict[str, Any]


@contextlib.contextmanager
def limited_reads(path: Path, mib_per_s: float | None) -> Iterator[None]:
    """Within: this process reads from the device of `path` at no more than that rate; None: as fast as it goes.

    Raises:
        OSError: not root, or no `blkio` controller.
    """
    if mib_per_s is None:
        yield
        return
    device, group = path.stat().st_dev, BLKIO / f"edgemoe-bench-{os.getpid()}"
    group.mkdir()
    try:
        limit = f"{os.major(device)}:{os.minor(device)} {int(mib_per_s * MIB)}"
        (group / "blkio.throttle.read_bps_device").write_text(limit)
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (BLKIO / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def token_seconds(
    llm: Any, prompt: Sequence[int], steps: Sequence[int], within: contextlib.AbstractContextManager[Any] | None = None
) -> float:
    """Evaluate a prompt and then, within that context, `steps` one by one from an empty one; seconds per step."""
    llm.reset()
    llm.eval(prompt)
    llm.reset_stats()
    with within or contextlib.nullcontext():
        begin_s = time.perf_counter()
        for token in steps:
            llm.eval([token])
        return (time.perf_counter() - begin_s) / len(steps)


@dataclasses.dataclass(frozen=True)
class Run:
    """A setting, what was measured with it, and the trace of it."""

    prefetch: str
    fraction: float
    slots_bytes: int
    measured: Record
    recorded: Trace

    @property
    def name(self) -> str:
        """As it is printed."""
        return f"{self.fraction:.0%} {self.prefetch}"


def run_once(options: argparse.Namespace, tokens: list[int], prefetch: str, fraction: float) -> Run:
    """Load the model, so that nothing of the run before is left, evaluate the tokens, and record."""
    import edgemoe
    from edgemoe import _native, runtime, trace

    n_steps = len(tokens) - PROMPT_TOKENS
    with (
        edgemoe.Llama(options.model, n_ctx=1024, n_threads=options.threads, prefetch=prefetch, warm_start=False) as llm,
        tempfile.TemporaryDirectory() as folder,
    ):
        sizes = runtime.slot_sizes(llm._gguf, 0)
        slots_bytes = max(int(sizes.cycle_slot_bytes), int(fraction * int(sizes.bank_slot_bytes)))
        _native.set_slots_bytes(llm._runtime, slots_bytes)
        path = Path(folder) / "trace"
        with llm.record_trace(path):
            token_s = token_seconds(llm, tokens[:PROMPT_TOKENS], tokens[PROMPT_TOKENS:])
        stats = llm.stats()
        measured = {
            "tokens_per_s": 1 / token_s,
            "hit_rate": stats.expert_hit_rate,
            "read_bytes_per_token": stats.expert_bytes_read / n_steps,
            "stall_s_per_token": stats.stall_s / n_steps,
        }
        return Run(prefetch, fraction, slots_bytes, measured, trace.load(path))


def predict(source: Run, calibration: Calibration, target: Run) -> Record:
    """What the one run's trace says about the other's setting."""
    from edgemoe import replay

    decode = replay.replay(
        source.recorded,
        slots_bytes=target.slots_bytes,
        prefetch=target.prefetch,
        disk=calibration.disk,
        compute=calibration.compute,
    ).decode
    n_steps = decode.n_tokens
    return {
        "source": source.name,
        "target": target.name,
        "tokens_per_s": decode.tokens_per_s,
        "quotient": decode.tokens_per_s / target.measured["tokens_per_s"],
        "hit_rate": decode.hit_rate,
        "read_bytes_per_token": decode.bytes_read / n_steps,
        "stall_s_per_token": decode.stall_us / 1e6 / n_steps,
    }


def judge(runs: list[Run]) -> Record:
    """Each run predicted by the others."""
    from edgemoe.errors import TraceError
    from edgemoe.replay_calibration import calibrate

    series: Record = {"runs": [], "predictions": []}
    for source in runs:
        one: Record = {"name": source.name, "slots_bytes": source.slots_bytes, **source.measured}
        series["runs"].append(one)
        try:
            calibration = calibrate(source.recorded)
        except TraceError as error:
            print(f"{source.name}: {error}", file=sys.stderr)
            continue
        one["calibration"] = calibration.to_dict()
        compute, disk = calibration.compute, calibration.disk
        print(
            f"{source.name:10} {one['tokens_per_s']:6.2f} tok/s {100 * one['hit_rate']:5.1f} % "
            f"{one['read_bytes_per_token'] / MIB:6.1f} MiB {1e3 * one['stall_s_per_token']:5.1f} ms stall   disk "
            f"{disk.bytes_per_s / 1e9:.2f} GB/s, computing {token_us(source.recorded, compute) / 1e3:.1f} ms"
            f" + {compute.hold_up_us_per_mib / 1e3:.3f} ms/MiB",
            flush=True,
        )
        series["predictions"] += [predict(source, calibration, target) for target in runs if target is not source]
    return series


def print_quotients(series: list[Record]) -> None:
    """Rows: what was predicted; columns: by which trace. Medians over the series, and of each row the spread of all."""
    quotients: dict[tuple[str, str], list[float]] = {}
    for one in (p for s in series for p in s["predictions"]):
        quotients.setdefault((one["target"], one["source"]), []).append(one["quotient"])
    names = [run["name"] for run in series[0]["runs"]]
    print(f"\npredicted / measured tok/s, medians of {len(series)} series")
    print(f"{'':10}" + "".join(f"{name:>10}" for name in names) + "    all: median [quarter-three quarters] least most")
    for target in names:
        row = [quotients.get((target, source), []) for source in names]
        every = sorted(q for cell in row for q in cell)
        if not every:
            continue
        quarters = statistics.quantiles(every, n=4, method="inclusive") if len(every) > 1 else every * 3
        cells = "".join(f"{statistics.median(cell):10.2f}" if cell else f"{'':10}" for cell in row)
        print(
            f"{target:10}{cells}    {quarters[1]:.2f} [{quarters[0]:.2f}-{quarters[2]:.2f}] "
            f"{every[0]:.2f} {every[-1]:.2f}"
        )


def main() -> int:
    """Run the benchmark; 0 done, 2 it cannot run here."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replay_accuracy", description=__doc__)
    parser.add_argument("--model", type=Path, help="GGUF file; default: the synthetic OLMoE")
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.12, 0.25, 0.5], help="share of expert bytes")
    parser.add_argument("--prefetch", nargs="+", choices=("off", "1", "2", "auto"), default=["off", "2", "auto"])
    parser.add_argument("--routing", choices=("local", "uniform"), default="local")
    parser.add_argument("--decode-tokens", type=int, default=96)
    parser.add_argument("--series", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mib-per-s", type=float, help="limit of this process's reads; default: none")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "edgemoe-bench")
    parser.add_argument("--json", type=Path, help="also write the JSON line to this file")
    options = parser.parse_args()
    options.model = session.find_model(options).resolve()
    make_tokens = synthetic.ROUTINGS[options.routing]
    n_vocab = measure_sizes(options.model).n_vocab
    tokens = make_tokens(PROMPT_TOKENS + options.decode_tokens, n_vocab, options.seed)
    try:
        with limited_reads(options.model, options.mib_per_s):
            series = [
                judge([run_once(options, tokens, p, f) for f in options.fractions for p in options.prefetch])
                for _ in range(options.series)
            ]
    except OSError as error:
        print(f"replay_accuracy cannot limit reads here: {error}", file=sys.stderr)
        return 2
    print_quotients(series)
    session.finish("replay_accuracy", options, series=series)
    return 0


if __name__ == "__main__":
    sys.exit(main())
