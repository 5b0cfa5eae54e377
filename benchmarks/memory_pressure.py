# SPDX-License-Identifier: MIT
"""What the loop over the slots' size saves when the system takes memory back: pairs of processes, with it and without.

Each process loads within `--memory`, decodes for a while, and then its memory cgroup is lowered to `--limit`, as if a
neighbour had taken the rest: what is above goes to swap. Needs root, a memory cgroup, and swap that is on (a gigabyte
is enough); others' timings suffer meanwhile. A process that the system kills counts as killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import session, synthetic
from edgemoe.confine import MemoryCgroup
from edgemoe.sizes import parse_size

MIB = 1 << 20
N_CTX = 2048
LOAD_S = 60.0
Record = dict[str, Any]


def decode(llm: Any, tokens: Any, seconds: float) -> Record:
    """Decode for so long."""
    n_tokens, begin_s = 0, time.perf_counter()
    n_faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    while time.perf_counter() - begin_s < seconds:
        llm.eval([next(tokens)])
        n_tokens += 1
    elapsed_s = time.perf_counter() - begin_s
    n_faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - n_faults
    slots_mib = llm.stats().slots_bytes / MIB
    return {"tokens_per_s": n_tokens / elapsed_s, "faults_per_token": n_faults / n_tokens, "slots_mib": slots_mib}


def run_child() -> None:
    """One process; read the task from stdin, print one JSON line."""
    task: Record = json.load(sys.stdin)
    import edgemoe

    options = {"n_ctx": N_CTX, "n_threads": task["threads"], "warm_start": False}
    with edgemoe.Llama(task["model"], memory=task["memory"], **options) as llm:
        if not task["loop"]:
            llm._cache_size = None
        make_tokens = synthetic.ROUTINGS[task["routing"]]
        tokens = iter(make_tokens(N_CTX - 1, llm.n_vocab(), task["seed"]))
        before = decode(llm, tokens, task["seconds"] / 4)
        Path(task["limit_path"]).write_text(str(task["limit_bytes"]))
        parts = [decode(llm, tokens, task["seconds"] / 2) for _ in range(2)]
    print(json.dumps({"before": before, "first": parts[0], "second": parts[1]}))


def run(options: argparse.Namespace, seed: int, *, loop: bool) -> Record:
    """One fresh process in a cgroup of its own."""
    limit_bytes = parse_size(options.limit)
    budget_bytes = parse_size(options.memory)
    with MemoryCgroup(f"edgemoe-bench-{os.getpid()}", 2 * budget_bytes, swap_bytes=2 * budget_bytes) as group:
        task = {"model": str(options.model), "memory": options.memory, "threads": options.threads, "loop": loop}
        task |= {"routing": options.routing, "seed": seed, "seconds": options.seconds}
        task |= {"limit_bytes": limit_bytes, "limit_path": str(group.limit_path)}
        command = [sys.executable, "-m", "benchmarks.memory_pressure", "--child"]
        done = group.run(command, json.dumps(task), LOAD_S + 4 * options.seconds)
    record: Record = {"loop": loop, "seed": seed, "killed": bool(done.usage and done.usage.oom_kills), **done.to_dict()}
    if done.exit_code == 0:
        record |= json.loads(done.stdout.splitlines()[-1])
    elif not record["killed"]:
        raise SystemExit(f"the child failed: exit code {done.exit_code}\n{done.stderr_tail}")
    return record


def report(pairs: Sequence[tuple[Record, Record]]) -> None:
    """Print each process, and the median quotient of the pairs that both survived."""
    print(
        "| seed | loop | tok/s before | first half | second | faults a token, second | slots MiB |\n" + "|---" * 7 + "|"
    )
    for one in (one for pair in pairs for one in pair):
        cells = [str(one["seed"]), "on" if one["loop"] else "off"]
        if one["killed"]:
            print("| " + " | ".join([*cells, "killed by the system"]) + " | | | | |")
            continue
        cells += [f"{one[part]['tokens_per_s']:.2f}" for part in ("before", "first", "second")]
        cells += [f"{one['second']['faults_per_token']:.0f}", f"{one['second']['slots_mib']:.0f}"]
        print("| " + " | ".join(cells) + " |")
    alive = [(on, off) for on, off in pairs if not on["killed"] and not off["killed"]]
    ratios = sorted(on["second"]["tokens_per_s"] / off["second"]["tokens_per_s"] for on, off in alive)
    if ratios:
        print(f"on / off, second half: {statistics.median(ratios):.2f} [{ratios[0]:.2f}-{ratios[-1]:.2f}]")


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory_pressure", description=__doc__)
    parser.add_argument("--model", type=Path, help="GGUF file; default: the synthetic OLMoE")
    parser.add_argument("--memory", default="2250MiB", help="budget of the model")
    parser.add_argument("--limit", default="1650MiB", help="what is left of it")
    parser.add_argument("--routing", choices=("local", "uniform"), default="uniform")
    parser.add_argument("--seconds", type=float, default=20.0, help="under pressure")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "edgemoe-bench")
    parser.add_argument("--json", type=Path, help="also write the JSON line to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 done."""
    options = parse_options(arguments)
    if len(Path("/proc/swaps").read_text().splitlines()) < 2:
        raise SystemExit("cannot measure: found no swap (/proc/swaps), expected some; make a swap file and swapon")
    options.model = session.find_model(options).resolve()
    pairs = []
    for seed in range(options.seed, options.seed + options.pairs):
        order = [True, False]
        random.Random(seed).shuffle(order)
        found = {loop: run(options, seed, loop=loop) for loop in order}
        pairs.append((found[True], found[False]))
    report(pairs)
    session.finish("memory_pressure", options, pairs=pairs)
    return 0


if __name__ == "__main__":
    if "--child" in sys.argv:
        run_child()
    else:
        sys.exit(main())
