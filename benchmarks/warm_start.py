# SPDX-License-Identifier: MIT
"""What a warm start saves: stall, misses and speed of the first tokens after a restart, warm against cold.

Informational: it measures time, and needs a quiet machine. A first process evaluates tokens and leaves a hot set; then
pairs of fresh processes go on, one with it and one without, in an order drawn by `--seed`. Experts are read with
O_DIRECT, so that the page cache does not warm the cold ones. No root needed: `--fraction` is met by the plan, not by a
cgroup.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import session, synthetic
from benchmarks.larger_than_memory import N_BATCH, measure_sizes, plan_limit_bytes

STALL_TARGET = 2.0  # issue 4
LEAST_STALL_S = 1e-3  # a ratio to less says nothing
Record = dict[str, Any]


def run_child() -> None:
    """Load, wait as for a user who types, evaluate tokens one by one; read the task from stdin, print one JSON line."""
    task: Record = json.load(sys.stdin)
    import edgemoe

    options = {
        "n_threads": task["threads"],
        "n_threads_batch": task["threads"],
        "n_batch": N_BATCH,
        "n_ubatch": N_BATCH,
    }
    with edgemoe.Llama(
        task["model"], memory=task["memory"], n_ctx=task["n_ctx"], warm_start=task["warm_start"], **options
    ) as llm:
        time.sleep(task["idle_s"])
        llm.reset_stats()
        begin_s = time.perf_counter()
        for token in task["tokens"]:
            llm.eval([token])
        elapsed_s, stats = time.perf_counter() - begin_s, llm.stats()
    record = {"tokens_per_s": len(task["tokens"]) / elapsed_s, "stall_s": stats.stall_s, "load_s": stats.load_s}
    record |= {"misses": stats.expert_misses, "late_hits": stats.expert_late_hits, "hit_rate": stats.expert_hit_rate}
    print(json.dumps(record))


def run(task: Record, folder: str) -> Record:
    """One fresh process whose hot sets are in `folder`."""
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.warm_start", "--child"],
        input=json.dumps(task),
        env={**os.environ, "EDGEMOE_WARM_DIR": folder},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    record: Record = json.loads(result.stdout.splitlines()[-1])
    return record


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.warm_start", description=__doc__)
    parser.add_argument("model", type=Path, help="a GGUF file, such as benchmarks.synthetic writes")
    parser.add_argument("--fraction", type=float, default=0.25, help="experts in memory")
    parser.add_argument("--routing", choices=["local", "uniform"], default="local")
    parser.add_argument("--learn-tokens", type=int, default=256, help="tokens of the first process")
    parser.add_argument("--tokens", type=int, default=16, help="tokens after the restart")
    parser.add_argument("--idle-s", type=float, default=2.0, help="seconds from load to the first token")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table and one JSON line."""
    options = parse_options(arguments)
    sizes = measure_sizes(options.model)
    make_tokens = synthetic.ROUTINGS[options.routing]
    memory = plan_limit_bytes(options.model, options.n_ctx, int(options.fraction * sizes.expert_bank_bytes))
    task = {"model": str(options.model), "memory": memory, "n_ctx": options.n_ctx, "threads": options.threads}
    records: list[Record] = []
    for pair in range(options.pairs):
        tokens = make_tokens(options.learn_tokens + options.tokens, sizes.n_vocab, options.seed + pair)
        with tempfile.TemporaryDirectory() as folder:
            learn = task | {"tokens": tokens[: options.learn_tokens], "idle_s": 0.0, "warm_start": True}
            run(learn, folder)
            starts = ["cold", "warm"]
            random.Random(f"{options.seed}/{pair}").shuffle(starts)
            for start in starts:
                first = {"tokens": tokens[options.learn_tokens :], "idle_s": options.idle_s}
                record = run(task | first | {"warm_start": start == "warm"}, folder)
                records.append({"pair": pair, "start": start, "order": starts, **record})
    print("| start | stall s | misses | late hits | tok/s | load s |\n|---|---|---|---|---|---|")
    medians = {}
    for start in ("cold", "warm"):
        of_start = [r for r in records if r["start"] == start]
        names = ("stall_s", "misses", "late_hits", "tokens_per_s", "load_s")
        medians[start] = {name: statistics.median(r[name] for r in of_start) for name in names}
        print(f"| {start} | " + " | ".join(f"{medians[start][name]:.3g}" for name in names) + " |")
    stalls = {(r["pair"], r["start"]): max(r["stall_s"], LEAST_STALL_S) for r in records}
    ratios = [stalls[pair, "cold"] / stalls[pair, "warm"] for pair in range(options.pairs)]
    what = f"stall of the first {options.tokens} tokens, cold / warm"
    targets = [session.target(what, statistics.median(ratios), STALL_TARGET)]
    session.print_targets(targets)
    parts = {"memory": memory, "records": records, "medians": medians, "stall_ratios": ratios, "targets": targets}
    session.finish("warm_start", options, **parts)
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        run_child()
    else:
        sys.exit(main())
