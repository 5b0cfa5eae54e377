# SPDX-License-Identifier: MIT
"""edgemoe against llama.cpp with everything resident and warm: decode, prefill and peak memory.

Informational, not a gate: it needs a quiet machine. Engines are processes that stay loaded and take turns;
`benchmarks/README.md` says what is fair and why.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import session
from benchmarks.cgroup import wait_until_idle
from benchmarks.larger_than_memory import MIN_CLEAN_PAIRS, measure_sizes, spread
from benchmarks.session import MIB, Record

MODELS = ("olmoe", "qwen3moe-30b-slim", "gpt-oss-20b-slim", "olmoe:Q4_0")
STOCKS = ("stock", "stock-plain")
DECODE_PROMPT = 64
N_BATCH, N_UBATCH = 2048, 512  # llama.cpp's defaults
WARM_UP_TRIES = 6  # of a slim Qwen3, 3 with the same tokens left 57 experts to the first decode
WARM_UP_SEED = 1000  # and more: tokens that are not measured
SETTLE_S = 0.3  # OpenMP's threads of the engine before spin for some milliseconds after their last work
PROCESS_BYTES = 1280 * MIB  # of one engine beside weights: KV cache, buffers, Python
Options = argparse.Namespace


def run_worker() -> None:
    """Load the engine that the first line of stdin names, then answer each further line with one JSON line."""
    task = json.loads(sys.stdin.readline())
    begin_s = time.perf_counter()
    options = {"n_ctx": task["n_ctx"], "n_batch": N_BATCH, "n_ubatch": N_UBATCH}
    options |= dict.fromkeys(("n_threads", "n_threads_batch"), task["threads"])
    llm = session.load_engine(task["engine"], task["model"], **options)
    import llama_cpp
    import numpy as np

    kernels = getattr(llm.stats(), "kernels", None) if hasattr(llm, "stats") else None
    print(json.dumps({"load_s": time.perf_counter() - begin_s, "kernels": kernels}), flush=True)

    def evaluate(tokens: list[int]) -> int:
        llm.eval(tokens)
        logits = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(llm.n_vocab(),)).argmax())

    for line in sys.stdin:
        task = json.loads(line)
        llama_cpp.llama_set_n_threads(llm.ctx, task["threads"], task["threads"])
        misses, cpu_s, result = _misses(llm), time.process_time(), {"best_ids": []}
        for n_tokens in task["prefill"]:
            llm.reset()
            begin_s = time.perf_counter()
            result["best_ids"].append(evaluate(task["tokens"][:n_tokens]))
            result[f"prefill_{n_tokens}_tok_per_s"] = n_tokens / (time.perf_counter() - begin_s)
        if task["decode"]:
            llm.reset()
            evaluate(task["tokens"][:DECODE_PROMPT])
            begin_s = time.perf_counter()
            result["best_ids"] += [evaluate([token]) for token in task["decode"]]
            result["decode_tok_per_s"] = len(task["decode"]) / (time.perf_counter() - begin_s)
        status = Path("/proc/self/status").read_text()
        result["peak_rss_bytes"] = 1024 * int(status.split("VmHWM:")[1].split()[0])
        result |= {"cpu_s": time.process_time() - cpu_s, "expert_misses": _misses(llm) - misses}
        print(json.dumps(result), flush=True)


def _misses(llm: Any) -> int:
    return llm.stats().expert_misses + llm.stats().expert_late_hits if hasattr(llm, "stats") else 0


class Worker:
    """One engine in a process of its own."""

    def __init__(self, engine: str, model: Path, n_ctx: int, n_threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.resident", "--worker"]
        self.engine = engine
        self._process = subprocess.Popen(
            command, cwd=session.REPO_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.load = self.ask({"engine": engine, "model": str(model), "n_ctx": n_ctx, "threads": n_threads})

    def ask(self, task: Record) -> Record:
        """Send one task and wait for its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"engine {self.engine} ended with exit code {self._process.wait()}")
        answer: Record = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def warm_up(worker: Worker, n_vocab: int, n_ctx: int, options: Options) -> None:
    """Run long prompts, each of other tokens, until one finds no expert missing, then a little of everything."""
    from benchmarks import synthetic

    for i in range(WARM_UP_TRIES):
        tokens = synthetic.uniform_tokens(n_ctx, n_vocab, options.seed + WARM_UP_SEED + i)
        task = {"threads": max(options.threads), "prefill": [n_ctx], "decode": tokens[:8], "tokens": tokens}
        if worker.ask(task)["expert_misses"] == 0:
            break


def measure(worker: Worker, n_threads: int, tokens: list[int], decode: list[int], options: Options) -> Record:
    """One run of one engine: all prefills, then the decode."""
    time.sleep(SETTLE_S)
    watch = session.Watch()
    answer = worker.ask({"threads": n_threads, "prefill": options.prefill, "decode": decode, "tokens": tokens})
    best_ids = answer.pop("best_ids")
    return {
        **worker.load,
        **answer,
        **watch.shares(answer["cpu_s"]),
        "best_ids": best_ids,
        "best_ids_sha256": hashlib.sha256(repr(best_ids).encode()).hexdigest()[:16],
    }


def make_model(spec: str, options: Options) -> Path:
    """Write the model of that preset (`preset` or `preset:QUANT`) unless it is there."""
    from benchmarks import synthetic

    preset, _, quant = spec.partition(":")
    changes: dict[str, Any] = {"quant": quant} if quant else {}
    if options.quick:
        changes |= {"n_layers": 1, "n_vocab": 4096}
    name = "-".join([preset, *([quant.lower()] if quant else []), *(["quick"] if options.quick else [])])
    path = Path(options.work_dir) / f"{name}.gguf"
    if not path.exists():
        print(f"writing {path}", file=sys.stderr)
        synthetic.write_preset(path, preset, **changes)
    return path


def fits_at_once(model: Path, experts_bytes: int, engines: list[str]) -> bool:
    """Whether all engines can stay loaded: each has a copy of the experts but stock-plain, which maps the file."""
    n_copies = sum(engine != "stock-plain" for engine in engines)
    needed_bytes = model.stat().st_size + n_copies * experts_bytes + len(engines) * PROCESS_BYTES
    fields = Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()
    return needed_bytes < int(fields[0]) * 1024


def run_model(spec: str, options: Options) -> list[Record]:
    """All pairs of one model: every round runs each engine once at each number of threads, in a drawn order."""
    from benchmarks import synthetic

    model = make_model(spec, options)
    sizes = measure_sizes(model)
    n_ctx = -(-max([*options.prefill, DECODE_PROMPT + options.decode_tokens]) // 256) * 256
    keep = fits_at_once(model, sizes.expert_bank_bytes, options.engines)
    workers: dict[str, Worker] = {}
    records: list[Record] = []

    def start(engine: str) -> Worker:
        worker = Worker(engine, model, n_ctx, max(options.threads))
        warm_up(worker, sizes.n_vocab, n_ctx, options)
        return worker

    try:
        if keep:
            workers = {engine: start(engine) for engine in options.engines}
        for pair in range(options.pairs):
            tokens = synthetic.uniform_tokens(n_ctx + options.decode_tokens, sizes.n_vocab, options.seed + 1 + pair)
            was_idle = options.quick or wait_until_idle(options.idle_wait_s)
            order = random.Random(f"{options.seed}/{spec}/{pair}").sample(options.engines, len(options.engines))
            for engine in order:
                worker = workers[engine] if keep else start(engine)
                for n_threads in options.threads:
                    run = measure(worker, n_threads, tokens[:n_ctx], tokens[n_ctx:], options)
                    run |= {"model": spec, "pair": pair, "engine": engine, "threads": n_threads, "order": order}
                    run["disturbed"] = run["disturbed"] or not was_idle
                    records.append(run)
                    figures = ", ".join(f"{name.split('_tok')[0]} {run[name]:.1f}" for name in run if "tok_per" in name)
                    note = " DISTURBED" * run["disturbed"] + f" {run['expert_misses']} MISSES" * bool(
                        run["expert_misses"]
                    )
                    print(f"{spec} pair {pair} {engine} {n_threads} threads: {figures}{note}", file=sys.stderr)
                if not keep:
                    worker.close()
    finally:
        for worker in workers.values():
            worker.close()
    return records


def clean(records: list[Record]) -> list[Record]:
    """Leave out the pairs that were disturbed when enough are left; the records are those of one comparison."""
    dirty = {one["pair"] for one in records if one["disturbed"]}
    kept = [one for one in records if one["pair"] not in dirty]
    return kept if len({one["pair"] for one in kept}) >= MIN_CLEAN_PAIRS else records


def pair_ratios(records: list[Record], key: str, other: str, ours: str = "ours") -> list[float]:
    """Ours divided by another engine, pair by pair; of the records of one model and number of threads."""
    values = {(one["engine"], one["pair"]): one[key] for one in records}
    pairs = sorted({one["pair"] for one in records})
    return [
        values[ours, pair] / values[other, pair] for pair in pairs if (ours, pair) in values and (other, pair) in values
    ]


def better_stock(records: list[Record], key: str) -> str | None:
    """Which configuration of llama.cpp has the higher median."""
    medians = {
        engine: statistics.median(values)
        for engine in STOCKS
        if (values := [one[key] for one in records if one["engine"] == engine])
    }
    return max(medians, key=lambda engine: medians[engine]) if medians else None


def find_targets(records: list[Record], options: Options) -> list[Record]:
    """What the issue asks for: 2 threads, warm."""
    targets = []
    for spec in options.models:
        rows = clean([one for one in records if one["model"] == spec and one["threads"] == 2])
        is_q4_k = not spec.startswith("gpt-oss") and ":" not in spec

        def add(what: str, key: str, other: str | None, limit: float, spec: str = spec, rows: Any = rows) -> None:
            found = pair_ratios(rows, key, other) if other else []
            at_most = key == "peak_rss_bytes"
            median = statistics.median(found) if found else None
            targets.append(session.target(f"{spec} {what} / {other}", median, limit, at_most=at_most))

        decode = "decode_tok_per_s"
        if is_q4_k:
            add("decode", decode, "stock-plain", 1.25)
            add("decode", decode, better_stock(rows, decode), 1.05)
            if 512 in options.prefill:
                add("prefill(512)", "prefill_512_tok_per_s", better_stock(rows, "prefill_512_tok_per_s"), 1.10)
        else:
            add("decode", decode, better_stock(rows, decode), 1.25)
        add("peak memory", "peak_rss_bytes", "stock", 0.6)
    return targets


def print_table(records: list[Record], options: Options) -> None:
    """Medians [min-max] of each engine, then of the ratios within pairs."""
    columns = [("decode", "decode_tok_per_s")]
    columns += [(f"prefill {n}", f"prefill_{n}_tok_per_s") for n in options.prefill]
    print(f"{'model':20}{'thr':>4} {'engine':14}{'n':>6}" + "".join(f"{name + ' tok/s':>22}" for name, _ in columns))
    for spec in options.models:
        for n_threads in options.threads:
            rows = [one for one in records if (one["model"], one["threads"]) == (spec, n_threads)]
            chosen = clean(rows)
            label = f"{spec:20}{n_threads:4} "
            for engine in options.engines:
                mine = [one for one in chosen if one["engine"] == engine]
                line = f"{label}{engine:14}{f'{len(mine)}/{options.pairs}':>6}"
                line += "".join(f"{spread((one[key] for one in mine), 1, 1):>22}" for _, key in columns)
                peak = spread((one["peak_rss_bytes"] for one in mine), 1 / MIB, 0)
                load = statistics.median(one["load_s"] for one in mine)
                print(f"{line}  peak MiB {peak}  load {load:.1f} s")
            for other in (engine for engine in options.engines if engine != "ours" and "ours" in options.engines):
                line = f"{label}{'ours / ' + other:20}"
                line += "".join(f"{spread(pair_ratios(chosen, key, other)):>22}" for _, key in columns)
                print(f"{line}  peak {spread(pair_ratios(chosen, 'peak_rss_bytes', other))}")
    for spec in options.models:
        kernels = {one["engine"]: one["kernels"] for one in records if one["model"] == spec and one["kernels"]}
        same = [(one["model"], one["pair"], one["best_ids"]) for one in records if one["engine"] == "stock-plain"]
        expected = {(model, pair): ids for model, pair, ids in same}
        found = [
            a == b
            for one in records
            if one["engine"] == "ours" and (spec, one["pair"]) in expected and one["model"] == spec
            for a, b in zip(one["best_ids"], expected[spec, one["pair"]], strict=True)
        ]
        share = f"{statistics.mean(found):.1%}" if found else "-"
        print(f"{spec}: kernels {kernels}; likeliest token the same as llama.cpp's without repacking: {share}")


def parse_options(arguments: list[str] | None) -> Options:
    """Parse the command line; `--quick` overrides the sizes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resident", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="preset, or preset:QUANT of the experts")
    parser.add_argument("--engines", nargs="+", choices=session.ENGINES, default=["ours", *STOCKS])
    parser.add_argument("--threads", nargs="+", type=int, default=[2, 1])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--prefill", nargs="+", type=int, default=[64, 512, 2048], help="lengths in tokens")
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "edgemoe-bench")
    parser.add_argument("--json", type=Path, help="also write the JSON line to this file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--idle-wait-s", type=float, default=60.0)
    parser.add_argument("--quick", action="store_true", help="one layer, 2 pairs, 64 + 8 tokens: a smoke test")
    options = parser.parse_args(arguments)
    if options.quick:
        options.pairs, options.prefill, options.decode_tokens = 2, [DECODE_PROMPT], 8
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = parse_options(arguments)
    options.work_dir.mkdir(parents=True, exist_ok=True)
    records = [record for spec in options.models for record in run_model(spec, options)]
    print_table(records, options)
    targets = find_targets(records, options)
    session.print_targets(targets)
    runs = [{name: value for name, value in one.items() if name != "best_ids"} for one in records]
    session.finish("resident", options, targets=targets, runs=runs)
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        run_worker()
    else:
        sys.exit(main())
