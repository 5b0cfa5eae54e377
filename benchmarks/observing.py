# SPDX-License-Identifier: MIT
"""What watching costs: tokens decoded with a trace being recorded, with a profile, and with neither.

Informational: it measures time, and needs a quiet machine. One process and one model, resident or with a share of its
experts; windows of tokens in turn, in an order drawn by `--seed` for each round. Every window decodes the same tokens
from the same state, so all windows of a kind of work do the same. Starting and stopping is not part of a window; what
the recorder's thread writes meanwhile is.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import larger_than_memory, session, synthetic
from benchmarks.replay_accuracy import token_seconds

MODES = ("off", "off again", "trace", "profile")
TRACE_TARGET_PERCENT = 1.0  # issue 4
N_CTX = 512
Record = dict[str, Any]


def watched(llm: Any, mode: str, folder: Path) -> contextlib.AbstractContextManager[Any] | None:
    """What a window of that kind runs in."""
    if mode == "trace":
        return llm.record_trace(folder / "trace")  # type: ignore[no-any-return]
    return llm.profile() if mode == "profile" else None


def measure(llm: Any, options: argparse.Namespace, tokens: Sequence[int]) -> list[Record]:
    """One record for each window."""
    prompt, steps = tokens[: options.prompt_tokens], tokens[options.prompt_tokens :]
    found = []
    with tempfile.TemporaryDirectory() as name:
        for _ in range(2):
            token_seconds(llm, prompt, steps)
        for round_number in range(options.rounds):
            order = list(MODES)
            random.Random(f"{options.seed}/{round_number}").shuffle(order)
            for mode in order:
                watch, begin_cpu_s = session.Watch(), time.process_time()
                token_s = token_seconds(llm, prompt, steps, watched(llm, mode, Path(name)))
                others = watch.shares(time.process_time() - begin_cpu_s)
                found.append({"round": round_number, "mode": mode, "token_s": token_s, **others})
    return found


def costs(windows: Sequence[Record], mode: str) -> list[float]:
    """Percent that a token of `mode` takes more than one of `off`, for each round."""
    token_s = {(one["round"], one["mode"]): one["token_s"] for one in windows}
    rounds = sorted({one["round"] for one in windows})
    return [100.0 * (token_s[n, mode] / token_s[n, "off"] - 1.0) for n in rounds]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Between which of the sorted values the median lies, to 95 % or more (binomial: no assumption on the noise).

    Needs 6 values or more.
    """
    ordered, n = sorted(values), len(values)
    rank = 0  # values on either side that may be left out
    while 2 * sum(math.comb(n, i) for i in range(rank + 2)) / 2**n <= 0.05:
        rank += 1
    return ordered[rank], ordered[n - 1 - rank]


def report(windows: Sequence[Record]) -> list[Record]:
    """Print the table; returns the target."""
    print("| | ms/token | % more than off, median | its 95 % interval | lowest, highest |\n" + "|---" * 5 + "|")
    for mode in MODES:
        median_s = statistics.median(one["token_s"] for one in windows if one["mode"] == mode)
        line = f"| {mode} | {1e3 * median_s:.2f} |"
        if mode != "off":
            more = costs(windows, mode)
            low, high = interval(more)
            line += (
                f" {statistics.median(more):+.2f} | {low:+.2f} to {high:+.2f} | {min(more):+.2f}, {max(more):+.2f} |"
            )
        print(line)
    print(f"windows that others disturbed: {sum(one['disturbed'] for one in windows)} of {len(windows)}")
    more_percent = statistics.median(costs(windows, "trace"))
    return [session.target("% that a trace costs", more_percent, TRACE_TARGET_PERCENT, at_most=True)]


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.observing", description=__doc__)
    parser.add_argument("--model", type=Path, help="GGUF file; default: the synthetic OLMoE")
    parser.add_argument("--fraction", type=float, default=1.0, help="share of expert bytes in memory")
    parser.add_argument("--routing", choices=("local", "uniform"), default="local")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--decode-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "edgemoe-bench")
    parser.add_argument("--json", type=Path, help="also write the JSON line to this file")
    options = parser.parse_args(arguments)
    if options.rounds < 6:
        parser.error("--rounds: at least 6, with fewer a median has no interval of 95 %")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 done."""
    options = parse_options(arguments)
    options.model = session.find_model(options).resolve()
    import edgemoe
    from edgemoe import _native, runtime

    n_vocab = larger_than_memory.measure_sizes(options.model).n_vocab
    make_tokens = synthetic.ROUTINGS[options.routing]
    tokens = make_tokens(options.prompt_tokens + options.decode_tokens, n_vocab, options.seed)
    threads = dict.fromkeys(("n_threads", "n_threads_batch"), options.threads)
    with edgemoe.Llama(options.model, n_ctx=N_CTX, prefetch="off", warm_start=False, **threads) as llm:
        bank_bytes = int(runtime.slot_sizes(llm._gguf, 0).bank_slot_bytes)
        _native.set_slots_bytes(llm._runtime, int(options.fraction * bank_bytes))
        windows = measure(llm, options, tokens)
    targets = report(windows)
    session.print_targets(targets)
    session.finish("observing", options, windows=windows, targets=targets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
