# SPDX-License-Identifier: MIT
"""How well replay predicts this machine: measured and predicted tok/s of the same tokens, at several budgets.

Informational: it measures time, and needs a quiet machine. A model is run at each share of its experts and with each
setting of prefetch while a trace is recorded; the trace is then replayed over a disk of the speed just measured, with
the speed of computing found by a run with everything resident. With `--mib-per-s` (root, a cgroup v1 `blkio`
controller) the kernel limits this process's reads, so that the disk is the same all the time and no cache of the host
can help.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import loopdev, session, synthetic
from benchmarks.larger_than_memory import measure_sizes

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


def token_seconds(llm: Any, prompt: list[int], steps: list[int]) -> float:
    """Evaluate a prompt and then `steps` one by one from an empty context; seconds per step."""
    llm.reset()
    llm.eval(prompt)
    llm.reset_stats()
    begin_s = time.perf_counter()
    for token in steps:
        llm.eval([token])
    return (time.perf_counter() - begin_s) / len(steps)


def resident_seconds(options: argparse.Namespace, tokens: list[int]) -> float:
    """Seconds per token with everything resident: the median of three passes, after one that reads."""
    import edgemoe

    with edgemoe.Llama(options.model, n_ctx=1024, n_threads=options.threads, warm_start=False) as llm:
        passes = [token_seconds(llm, tokens[:PROMPT_TOKENS], tokens[PROMPT_TOKENS:]) for _ in range(4)]
        if llm.stats().expert_misses:
            raise SystemExit(f"cannot measure computing: {options.model} does not fit into memory as a whole")
    return statistics.median(passes[1:])


def measure(options: argparse.Namespace, tokens: list[int], resident_s: float) -> list[Record]:
    """Run, record and replay each setting."""
    import edgemoe
    from edgemoe import _native, replay, runtime, trace

    slice_bytes = measure_sizes(options.model).expert_slice_bytes
    records = []
    for prefetch in options.prefetch:
        with edgemoe.Llama(
            options.model, n_ctx=1024, n_threads=options.threads, prefetch=prefetch, warm_start=False
        ) as llm:
            bank_bytes = int(runtime.slot_sizes(llm._gguf, 0).bank_slot_bytes)
            cycle_bytes = int(runtime.slot_sizes(llm._gguf, 0).cycle_slot_bytes)
            for fraction in options.fractions:
                _native.set_slots_bytes(llm._runtime, cycle_bytes)  # nothing of the run before is left
                slots_bytes = max(cycle_bytes, int(fraction * bank_bytes))
                _native.set_slots_bytes(llm._runtime, slots_bytes)
                disk = [loopdev.random_read_bytes_per_s(options.model, slice_bytes, n_threads=n) for n in (1, 4)]
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "trace"
                    with llm.record_trace(path):
                        token_s = token_seconds(llm, tokens[:PROMPT_TOKENS], tokens[PROMPT_TOKENS:])
                    recorded = trace.load(path)
                stats, found = llm.stats(), llm._runtime.prefetch_stats()
                n_layers, expert_us = len(recorded.layers), replay.expert_us(recorded)
                n_experts = sum(layer.n_used for layer in recorded.layers)
                # What one reader waits for beyond its share of the disk's full speed.
                latency_us = max(0.0, slice_bytes * (1 / disk[0] - 1 / disk[1])) * 1e6
                predicted = replay.replay(
                    recorded,
                    slots_bytes=slots_bytes,
                    prefetch=prefetch,
                    recall=found.predicted_right / found.predicted if found.predicted else 0.0,
                    disk=replay.Disk(bytes_per_s=disk[1], latency_us=latency_us),
                    compute=replay.Compute((resident_s * 1e6 - n_experts * expert_us) / n_layers, expert_us),
                )
                n_steps = len(tokens) - PROMPT_TOKENS
                records.append(
                    {
                        "prefetch": prefetch,
                        "fraction": fraction,
                        "disk_bytes_per_s": disk,
                        "tokens_per_s": 1 / token_s,
                        "hit_rate": stats.expert_hit_rate,
                        "read_bytes_per_token": stats.expert_bytes_read / n_steps,
                        "stall_s_per_token": stats.stall_s / n_steps,
                        "replay_tokens_per_s": predicted.decode.tokens_per_s,
                        "replay_hit_rate": predicted.decode.hit_rate,
                        "replay_read_bytes_per_token": predicted.decode.bytes_read / n_steps,
                        "replay_stall_s_per_token": predicted.decode.stall_us / 1e6 / n_steps,
                    }
                )
                print_line(records[-1])
    return records


def print_line(one: Record) -> None:
    """One setting: measured, predicted, and the quotient."""
    print(
        f"{one['fraction']:5.0%}  prefetch {one['prefetch']:5}"
        f"{one['tokens_per_s']:8.2f}{one['replay_tokens_per_s']:8.2f}"
        f"{one['replay_tokens_per_s'] / one['tokens_per_s']:8.2f}"
        f"{100 * one['hit_rate']:9.1f}{100 * one['replay_hit_rate']:7.1f}"
        f"{one['read_bytes_per_token'] / MIB:9.1f}{one['replay_read_bytes_per_token'] / MIB:7.1f}"
        f"{1e3 * one['stall_s_per_token']:9.1f}{1e3 * one['replay_stall_s_per_token']:7.1f}",
        flush=True,
    )


def main() -> int:
    """Run the benchmark; 0 done, 2 it cannot run here."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replay_accuracy", description=__doc__)
    parser.add_argument("--model", type=Path, help="GGUF file; default: the synthetic OLMoE")
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.12, 0.25, 0.5], help="share of expert bytes")
    parser.add_argument("--prefetch", nargs="+", choices=("off", "1", "2", "auto"), default=["off", "2"])
    parser.add_argument("--routing", choices=("local", "uniform"), default="local")
    parser.add_argument("--decode-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mib-per-s", type=float, help="limit of this process's reads; default: none")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "edgemoe-bench")
    parser.add_argument("--json", type=Path, help="also write the JSON line to this file")
    options = parser.parse_args()
    options.model = session.find_model(options).resolve()
    make_tokens = synthetic.local_tokens if options.routing == "local" else synthetic.uniform_tokens
    n_vocab = measure_sizes(options.model).n_vocab
    tokens = make_tokens(PROMPT_TOKENS + options.decode_tokens, n_vocab, options.seed)
    resident_s = resident_seconds(options, tokens)
    print(f"resident: {1 / resident_s:.2f} tok/s")
    print("measured and replayed: tok/s and their quotient, hit %, MiB read and ms of stall per token")
    try:
        with limited_reads(options.model, options.mib_per_s):
            records = measure(options, tokens, resident_s)
    except OSError as error:
        print(f"replay_accuracy cannot limit reads here: {error}", file=sys.stderr)
        return 2
    session.finish("replay_accuracy", options, resident_tokens_per_s=1 / resident_s, runs=records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
