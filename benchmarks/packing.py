# SPDX-License-Identifier: MIT
"""What `edgemoe convert pack` buys: one model as it was and packed, decoded in turn within the same budget.

    python -m benchmarks.packing model.gguf packed.gguf

Experts are read past the page cache, so no cgroup is needed; it wants a quiet machine and disk. The order within a
pair is drawn. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import larger_than_memory, session, synthetic

MIB = 1 << 20
N_CTX = 512
Record = dict[str, Any]


def run_child() -> None:
    """Load, prefill and decode once; read the task from stdin, print one JSON line."""
    task: Record = json.load(sys.stdin)
    import edgemoe  # before llama_cpp: it may set what OpenMP reads once

    llm = edgemoe.Llama(
        task["model"],
        memory=task["limit_bytes"],
        n_ctx=N_CTX,
        n_batch=N_CTX,
        n_threads=task["threads"],
        prefetch=task["prefetch"],
        warm_start=False,
        verbose=False,
    )
    import llama_cpp
    import numpy as np

    def evaluate(tokens: list[int]) -> int:
        llm.eval(tokens)
        return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),)).argmax())

    best_ids = [evaluate(task["prompt"])]
    llm.reset_stats()
    begin_s = time.perf_counter()
    best_ids += [evaluate([token]) for token in task["decode"]]
    decode_s = time.perf_counter() - begin_s
    stats, n_reads = llm.stats(), llm._runtime.stats().reads
    missed = stats.expert_misses + stats.expert_late_hits
    record = {
        "decode_tok_per_s": len(task["decode"]) / decode_s,
        "hit_rate": stats.expert_hit_rate,
        "reads_per_miss": n_reads / missed,
        "mib_per_miss": stats.expert_bytes_read / missed / MIB,
        "mib_per_read": stats.expert_bytes_read / n_reads / MIB,
        "stall_ms_per_miss": 1e3 * stats.stall_s / missed,
        "n_slots": stats.n_slots,
        "best_ids_sha256": hashlib.sha256(repr(best_ids).encode()).hexdigest()[:16],
    }
    print(json.dumps(record))


def main() -> int:
    """Run the pairs; 0, or 1 if the two files gave different tokens."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packing", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--fraction", type=float, default=0.25, help="share of the experts that fit")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--routing", choices=("local", "uniform"), default="local")
    parser.add_argument("--prefetch", default="off", help="off: what is read is what was missed")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--decode-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the JSON line to this file")
    options = parser.parse_args()
    sizes = larger_than_memory.measure_sizes(options.model)
    budget_bytes = int(options.fraction * sizes.expert_bank_bytes)
    limit_bytes = larger_than_memory.plan_limit_bytes(options.model, N_CTX, budget_bytes)
    make_tokens = synthetic.ROUTINGS[options.routing]
    runs: list[Record] = []
    for pair in range(options.pairs):
        files = {"as it was": options.model, "packed": options.packed}
        order = random.Random(pair).sample(sorted(files), len(files))
        tokens = make_tokens(options.prompt_tokens + options.decode_tokens, sizes.n_vocab, pair)
        for name in order:
            task = {"model": str(files[name]), "limit_bytes": limit_bytes, "threads": options.threads}
            task |= {"prompt": tokens[: options.prompt_tokens], "decode": tokens[options.prompt_tokens :]}
            task |= {"prefetch": options.prefetch}
            command = [sys.executable, "-m", "benchmarks.packing", "--child"]
            child = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, check=True)
            runs.append({"pair": pair, "file": name, **json.loads(child.stdout.splitlines()[-1])})
            print(f"pair {pair} {name}: {runs[-1]['decode_tok_per_s']:.2f} tok/s", file=sys.stderr)
    columns = [key for key, found in runs[0].items() if isinstance(found, float)] + ["n_slots"]
    print(f"{'file':12}" + "".join(f"{column:>26}" for column in columns))
    for name in ("as it was", "packed"):
        cells = [larger_than_memory.spread((r[c] for r in runs if r["file"] == name), 1.0, 3) for c in columns]
        print(f"{name:12}" + "".join(f"{cell:>26}" for cell in cells))
    speeds = [[r["decode_tok_per_s"] for r in runs if r["file"] == name] for name in ("as it was", "packed")]
    ratios = [packed / plain for plain, packed in zip(*speeds, strict=True)]
    print(f"packed / as it was, pair by pair: {statistics.median(ratios):.3f} [{min(ratios):.3f}-{max(ratios):.3f}]")
    is_equal = all(len({r["best_ids_sha256"] for r in runs if r["pair"] == pair}) == 1 for pair in range(options.pairs))
    print(f"tokens equal: {is_equal}")
    session.finish("packing", options, limit_bytes=limit_bytes, runs=runs)
    return 0 if is_equal else 1


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        run_child()
    else:
        sys.exit(main())
