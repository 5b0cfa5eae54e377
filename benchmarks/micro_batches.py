# SPDX-License-Identifier: MIT
"""What a larger micro-batch gains a long prompt, and costs everything after it, within one budget.

A prompt is computed in micro-batches of `n_ubatch` tokens, and each reads nearly all experts that are not resident. A
larger one reads them less often, but llama.cpp's compute buffers grow with it and take slots. Informational: it
measures time, and needs a quiet machine. Each size is a fresh process with the same budget and text; sizes take turns
in an order drawn by `--seed`. `--mib-per-s` slows the disk, as in `benchmarks.replay_accuracy`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import larger_than_memory, session, synthetic
from benchmarks.replay_accuracy import limited_reads

MIB = 1 << 20
Record = dict[str, Any]


def run_child() -> None:
    """Load, touch the memory with a short prompt, read the long one, decode; a task on stdin, one JSON line."""
    task: Record = json.load(sys.stdin)
    import edgemoe
    from edgemoe.errors import BudgetError

    options = {"n_ctx": task["n_ctx"], "n_threads": task["threads"], "flash_attn": task["flash_attn"]}
    options |= dict.fromkeys(("n_batch", "n_ubatch"), task["n_ubatch"])
    try:
        llm = edgemoe.Llama(task["model"], memory=task["memory"], warm_start=False, **options)
    except BudgetError as error:
        print(json.dumps({"refused": str(error)}))
        return
    import llama_cpp
    import numpy as np

    llm.eval(task["prompt"][:256])
    llm.reset()
    llm.reset_stats()
    begin_s = time.perf_counter()
    llm.eval(task["prompt"])
    record: Record = {"ttft_s": time.perf_counter() - begin_s, "slots_bytes": llm.plan.slots_bytes}
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),))
    record["logits_sha256"] = hashlib.sha256(logits.tobytes()).hexdigest()[:16]
    stats = llm.stats()
    record |= {"prompt_read_bytes": stats.expert_bytes_read, "prompt_stall_s": stats.stall_s}
    llm.reset_stats()
    begin_s = time.perf_counter()
    for token in task["decode"]:
        llm.eval([token])
    record["decode_tok_per_s"] = len(task["decode"]) / (time.perf_counter() - begin_s)
    record["decode_hit_rate"] = llm.stats().expert_hit_rate
    print(json.dumps(record))


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.micro_batches", description=__doc__)
    parser.add_argument("--model", type=Path, help="GGUF file; default: the synthetic OLMoE")
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 1024, 2048], help="tokens of a micro-batch")
    parser.add_argument("--fraction", type=float, default=0.25, help="share of expert bytes, with the first size")
    parser.add_argument("--routing", choices=("local", "uniform"), default="local")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--decode-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--flash-attn", action="store_true")
    parser.add_argument("--mib-per-s", type=float, help="limit of reads (root, cgroup v1); default: none")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "edgemoe-bench")
    parser.add_argument("--json", type=Path, help="also write the JSON line to this file")
    return parser.parse_args(arguments)


def print_table(records: Sequence[Record], sizes: Sequence[int]) -> None:
    """Medians [smallest-largest], and ratios to the first size within pairs."""
    columns = (
        *(("slots MiB", "slots_bytes", 1 / MIB, 0), ("TTFT s", "ttft_s", 1.0, 2)),
        *(("prompt's MiB", "prompt_read_bytes", 1 / MIB, 0), ("stall s", "prompt_stall_s", 1.0, 2)),
        *(("tok/s after", "decode_tok_per_s", 1.0, 2), ("hit %", "decode_hit_rate", 100.0, 1)),
    )
    titles = ("micro-batch", *(title for title, *_ in columns), "TTFT ratio", "tok/s ratio", "logits")
    print(f"| {' | '.join(titles)} |\n" + "|---" * len(titles) + "|")
    first = {one["pair"]: one for one in records if one["n_ubatch"] == sizes[0] and "refused" not in one}
    for size in sizes:
        mine = [one for one in records if one["n_ubatch"] == size and "refused" not in one]
        if not mine:
            print(f"| {size} | refused: the budget is below the floor |")
            continue
        cells = [larger_than_memory.spread((one[key] for one in mine), scale, n) for _, key, scale, n in columns]
        both = [(one, first[one["pair"]]) for one in mine if one["pair"] in first]
        for key in ("ttft_s", "decode_tok_per_s"):
            cells.append(larger_than_memory.spread(one[key] / other[key] for one, other in both))
        equal = all(one["logits_sha256"] == other["logits_sha256"] for one, other in both)
        print(f"| {size} | " + " | ".join([*cells, "equal" if equal else "differ"]) + " |")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 done, 2 it cannot run here."""
    options = parse_options(arguments)
    model = options.model = session.find_model(options).resolve()
    sizes = larger_than_memory.measure_sizes(model)
    n_ctx = -(-(options.prompt_tokens + options.decode_tokens) // 256) * 256
    # The limit is of a plan for micro-batches of 512 without flash attention: other sizes get the same bytes.
    memory = larger_than_memory.plan_limit_bytes(model, n_ctx, int(options.fraction * sizes.expert_bank_bytes))
    make_tokens = synthetic.ROUTINGS[options.routing]
    task = {"model": str(model), "memory": memory, "n_ctx": n_ctx, "threads": options.threads}
    records: list[Record] = []
    try:
        with limited_reads(model, options.mib_per_s):
            for pair in range(options.pairs):
                tokens = make_tokens(options.prompt_tokens + options.decode_tokens, sizes.n_vocab, options.seed + pair)
                text = {"prompt": tokens[: options.prompt_tokens], "decode": tokens[options.prompt_tokens :]}
                order = list(options.sizes)
                random.Random(f"{options.seed}/{pair}").shuffle(order)
                for size in order:
                    result = subprocess.run(
                        [sys.executable, "-m", "benchmarks.micro_batches", "--child"],
                        input=json.dumps(task | text | {"n_ubatch": size, "flash_attn": options.flash_attn}),
                        stdout=subprocess.PIPE,
                        text=True,
                        check=True,
                    )
                    found = json.loads(result.stdout.splitlines()[-1])
                    records.append({"pair": pair, "n_ubatch": size, "order": order, **found})
    except OSError as error:
        print(f"micro_batches cannot limit reads here: {error}", file=sys.stderr)
        return 2
    print_table(records, options.sizes)
    session.finish("micro_batches", options, memory=memory, runs=records)
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        run_child()
    else:
        sys.exit(main())
