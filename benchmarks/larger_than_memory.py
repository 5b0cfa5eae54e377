# SPDX-License-Identifier: MIT
"""edgemoe against stock llama.cpp on a model larger than its memory: the same cgroup, file, tokens and threads.

Informational, not a gate: it needs root and a quiet machine. `benchmarks/README.md` says what is fair and why.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import cgroup, loopdev, session
from edgemoe.bench_child import stock_without_repacking

MIB = 1 << 20
N_BATCH = 512
RESIDENT = "resident"
ENGINES = ("ours", "ours-ggml", "stock")  # edgemoe with its own kernels, with ggml's; llama.cpp
OPTION_MARK = ":"  # "ours:prefetch=off,eviction=lfu": edgemoe with these keywords
LOSSY = ("reuse_bias", "expert_top_k", "on_miss")  # keywords that change what is generated
RESIDENT_HEADROOM_BYTES = 1024 * MIB
RESIDENT_PAIRS = 3
MIN_CLEAN_PAIRS = 3
DISTURBED_DISK_RATIO = 1.5  # between the readings of one pair
Record = dict[str, Any]
Options = argparse.Namespace


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """What the limits and the tokens are made from."""

    expert_bank_bytes: int
    expert_slice_bytes: int
    n_vocab: int


@dataclasses.dataclass(frozen=True)
class Scenario:
    """One line of the table: a share of the experts in memory, and how consecutive tokens are routed."""

    name: str
    routing: str
    limit_bytes: int
    n_pairs: int
    n_passes: int


def run_child() -> None:
    """Load, prefill and decode once per pass with one engine; read the task from stdin, print one JSON line."""
    task: Record = json.load(sys.stdin)
    options: Record = dict.fromkeys(("n_threads", "n_threads_batch"), task["threads"])
    options |= {"n_ctx": task["n_ctx"], "n_batch": N_BATCH, "n_ubatch": N_BATCH}
    if task["engine"] != "stock":
        import edgemoe  # before llama_cpp: it may set what OpenMP reads once

        make = functools.partial(edgemoe.Llama, memory=task["limit_bytes"], **engine_options(task["engine"]))
    else:
        make = functools.partial(stock_without_repacking(), use_mmap=True)
    import llama_cpp
    import numpy as np

    start_s, start_read = time.perf_counter(), _read_bytes()
    llm = make(task["model"], verbose=False, **options)
    load_s, load_read = time.perf_counter() - start_s, _read_bytes() - start_read

    def evaluate(tokens: list[int]) -> int:
        llm.eval(tokens)
        logits = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(llm.n_vocab(),)).argmax())

    passes: list[Record] = []
    for index in range(task["n_passes"]):
        llm.reset()
        prefill_read, start_s = _read_bytes(), time.perf_counter()
        best_ids = [evaluate(task["prompt"])]
        ttft_s, decode_read, counters = time.perf_counter() - start_s, _read_bytes(), _expert_counters(llm)
        start_s = time.perf_counter()
        best_ids += [evaluate([token]) for token in task["decode"]]
        decode_s, n_decoded = time.perf_counter() - start_s, len(task["decode"])
        record = {
            "pass": "cold" if index == 0 else "warm",
            "ttft_s": ttft_s,
            "prefill_read_bytes": decode_read - prefill_read,
            "decode_tok_per_s": n_decoded / decode_s,
            "decode_read_bytes_per_token": (_read_bytes() - decode_read) / n_decoded,
            "best_ids_sha256": hashlib.sha256(repr(best_ids).encode()).hexdigest()[:16],
        }
        if spent := {name: value - counters[name] for name, value in _expert_counters(llm).items()}:
            asked = spent["expert_hits"] + spent["expert_misses"] + spent["expert_late_hits"]
            record["decode_hit_rate"] = spent["expert_hits"] / asked if asked else 0.0
            record["decode_stall_s"] = spent["stall_s"]
            for name in ("used", "late", "wasted"):
                record[f"decode_prefetch_{name}_bytes_per_token"] = spent[f"prefetch_{name}_bytes"] / n_decoded
            record["decode_expert_bytes_per_token"] = spent["expert_bytes_read"] / n_decoded
        passes.append(record)
    peak_rss_bytes = 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    load = {"load_s": load_s, "load_read_bytes": load_read, "peak_rss_bytes": peak_rss_bytes}
    print(json.dumps({"load": load, "passes": passes}))


def engine_options(engine: str) -> Record:
    """Keywords of `edgemoe.Llama` for an engine that is not stock."""
    name, _, given = engine.partition(OPTION_MARK)
    options: Record = {"kernels": "ggml" if name == "ours-ggml" else "auto", "warm_start": False}
    return options | dict(pair.split("=", 1) for pair in given.split(",") if pair)


def is_lossy(engine: str) -> bool:
    """Whether an engine's options change what is generated."""
    return any(value not in ("off", "wait") for name, value in engine_options(engine).items() if name in LOSSY)


def engine_name(text: str) -> str:
    """One of `ENGINES`, those that are ours perhaps with options; for argparse."""
    name, mark, given = text.partition(OPTION_MARK)
    if name not in ENGINES or (mark and (name == "stock" or not all("=" in pair for pair in given.split(",")))):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected one of {', '.join(ENGINES)}, or ours:KEYWORD=VALUE[,KEYWORD=VALUE...]"
        )
    return text


def _expert_counters(llm: Any) -> dict[str, float]:
    names = (
        *("expert_hits", "expert_misses", "expert_late_hits", "expert_bytes_read", "stall_s"),
        *("prefetch_used_bytes", "prefetch_late_bytes", "prefetch_wasted_bytes"),
    )
    return {name: getattr(llm.stats(), name) for name in names} if hasattr(llm, "stats") else {}


def _read_bytes() -> int:
    """Bytes that this process had read from storage, page faults and read-ahead included."""
    return int(Path("/proc/self/io").read_text().split("\nread_bytes:")[1].split()[0])


def measure_sizes(model: Path) -> ModelSizes:
    """Read the sizes of the experts and of the vocabulary from the file."""
    from gguf import GGUFReader

    tensors = GGUFReader(model).tensors
    experts = [tensor for tensor in tensors if "_exps." in tensor.name]
    bank_bytes = sum(int(tensor.n_bytes) for tensor in experts)
    slice_bytes = max((int(tensor.n_bytes) // int(tensor.shape[-1]) for tensor in experts), default=MIB)
    n_vocab = next(int(tensor.shape[-1]) for tensor in tensors if tensor.name == "token_embd.weight")
    return ModelSizes(bank_bytes, slice_bytes, n_vocab)


def plan_limit_bytes(model: Path, n_ctx: int, experts_bytes: int) -> int:
    """Find the budget that leaves `experts_bytes` beside the fixed parts of edgemoe's plan, or the least it accepts.

    12 % of OLMoE's experts are less than one token uses; the least is with 2 % to spare, as a plan's refusal advises.
    """
    import edgemoe

    limit_bytes = model.stat().st_size
    for _ in range(3):  # slack is a hundredth of the budget, so each round leaves a hundredth of the error
        plan = edgemoe.plan(model, memory=limit_bytes, n_ctx=n_ctx, n_batch=N_BATCH, n_ubatch=N_BATCH)
        limit_bytes = plan.dense_bytes + plan.kv_bytes + plan.buffers_bytes + plan.slack_bytes + experts_bytes
        limit_bytes = max(limit_bytes, plan.floor_bytes * 102 // 100)
    return limit_bytes


def make_scenarios(model: Path, sizes: ModelSizes, options: Options) -> list[Scenario]:
    """First the resident ceiling of each routing, then the limited runs."""
    fractions = [1.0, *options.fractions]
    experts_bytes = [int(fraction * sizes.expert_bank_bytes) for fraction in fractions]
    if options.base_mib is not None:
        limits = [options.base_mib * MIB + n_bytes for n_bytes in experts_bytes]
    else:  # in a process of its own: libraries mapped in this one would not be charged to the cgroups
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            limits = list(pool.map(functools.partial(plan_limit_bytes, model, options.n_ctx), experts_bytes))
    room_bytes, n_resident = limits[0] + RESIDENT_HEADROOM_BYTES, min(options.resident_pairs, options.pairs)
    scenarios = [Scenario(RESIDENT, routing, room_bytes, n_resident, 2) for routing in options.routing]
    for fraction, limit_bytes in zip(fractions[1:], limits[1:], strict=True):
        name, n_passes = f"{fraction:.0%}", 2 if fraction >= 1.0 else 1
        scenarios += [Scenario(name, routing, limit_bytes, options.pairs, n_passes) for routing in options.routing]
    return scenarios


def run_pair(scenario: Scenario, pair: int, model: Path, sizes: ModelSizes, options: Options) -> list[Record]:
    """Run every engine once, in an order drawn for this pair; one record per pass of an engine."""
    from benchmarks import synthetic

    make_tokens = synthetic.ROUTINGS[scenario.routing]
    n_prompt = options.prompt_tokens
    tokens = make_tokens(n_prompt + options.decode_tokens, sizes.n_vocab, options.seed + pair)
    engines = list(options.engines)
    random.Random(f"{options.seed}/{scenario.name}/{scenario.routing}/{pair}").shuffle(engines)
    command = [sys.executable, "-m", "benchmarks.larger_than_memory", "--child"]
    records: list[Record] = []
    for engine in engines:
        task = {"engine": engine, "model": str(model), "n_ctx": options.n_ctx, "threads": options.threads}
        task |= {"limit_bytes": scenario.limit_bytes, "n_passes": scenario.n_passes}
        task |= {"prompt": tokens[:n_prompt], "decode": tokens[n_prompt:]}
        limits = (scenario.limit_bytes, options.run_timeout_s, options.idle_wait_s)
        cgroup.wait_until_idle(options.idle_wait_s)
        disk = [loopdev.random_read_bytes_per_s(model, sizes.expert_slice_bytes)]
        result = cgroup.run_cold(command, json.dumps(task), *limits)
        disk.append(loopdev.random_read_bytes_per_s(model, sizes.expert_slice_bytes))
        run = {"scenario": scenario.name, "routing": scenario.routing, "pair": pair, "engine": engine, "order": engines}
        run |= {**result.to_dict(), "disk_bytes_per_s": disk}
        if result.exit_code == 0:
            child = json.loads(result.stdout.strip().splitlines()[-1])
            records += [{**run, **child["load"], **one_pass} for one_pass in child["passes"]]
        else:
            reason = "timed out" if result.timed_out else f"exit code {result.exit_code}"
            records.append({**run, "pass": "cold", "error": f"{reason}: {result.stderr_tail}"})
        speed = ", ".join(f"{one.get('decode_tok_per_s', math.nan):.2f}" for one in records if one["engine"] == engine)
        note = " DISTURBED" * result.disturbed + " FAILED" * (result.exit_code != 0)
        print(f"{scenario.name} {scenario.routing} pair {pair} {engine}: {speed} tok/s{note}", file=sys.stderr)
    readings = [reading for one in records for reading in one["disk_bytes_per_s"]]
    moved = max(readings) > DISTURBED_DISK_RATIO * min(readings)
    return [{**one, "disk_moved": moved, "disturbed": one["disturbed"] or moved} for one in records]


def add_roofline(records: list[Record]) -> None:
    """Add `roofline_fraction`: decode speed over what the disk measured around it and the fastest engine allow."""
    for record in (one for one in records if "error" not in one):
        same = [one for one in records if one["routing"] == record["routing"] and "error" not in one]
        warm = clean_pairs([one for one in same if (one["scenario"], one["pass"]) == (RESIDENT, "warm")])
        names = {one["engine"] for one in warm}
        speeds = [[one["decode_tok_per_s"] for one in warm if one["engine"] == name] for name in names]
        roofs = [max((statistics.median(speed) for speed in speeds if speed), default=math.inf)]
        if record["decode_read_bytes_per_token"] > 0:
            roofs.append(max(record["disk_bytes_per_s"]) / record["decode_read_bytes_per_token"])
        record["roofline_fraction"] = record["decode_tok_per_s"] / min(roofs)


def clean_pairs(records: list[Record]) -> list[Record]:
    """Keep the undisturbed pairs when at least `MIN_CLEAN_PAIRS` of them are left, otherwise all pairs."""
    dirty = {record["pair"] for record in records if record["disturbed"]}
    clean = [record for record in records if record["pair"] not in dirty]
    return clean if len({record["pair"] for record in clean}) >= MIN_CLEAN_PAIRS else records


def spread(values: Iterable[float | None], scale: float = 1.0, digits: int = 2) -> str:
    """`median [min-max]`, or `-` without values."""
    found = [value * scale for value in values if value is not None]
    if not found:
        return "-"
    return f"{statistics.median(found):.{digits}f} [{min(found):.{digits}f}-{max(found):.{digits}f}]"


def ratios(records: list[Record], key: str, ours: str, other: str) -> list[float]:
    """One engine divided by another, pair by pair; not where the other has 0."""
    speeds: dict[str, dict[int, float]] = {ours: {}, other: {}}
    for one in records:
        if key in one and one["engine"] in speeds:
            speeds[one["engine"]][one["pair"]] = one[key]
    pairs = speeds[ours].keys() & speeds[other].keys()
    return [speeds[ours][pair] / speeds[other][pair] for pair in pairs if speeds[other][pair] != 0]


def print_table(records: list[Record], scenarios: list[Scenario]) -> None:
    """Medians [min-max] of every engine, then the medians of the ratios within pairs."""
    columns = (
        ("decode tok/s", 20, "decode_tok_per_s", 1.0, 2),
        ("TTFT s", 18, "ttft_s", 1.0, 2),
        ("load s", 18, "load_s", 1.0, 2),
        ("MiB read/token", 18, "decode_read_bytes_per_token", 1 / MIB, 0),
        ("hit %", 18, "decode_hit_rate", 100.0, 1),
        ("wasted MiB/token", 18, "decode_prefetch_wasted_bytes_per_token", 1 / MIB, 1),
        ("stall s", 18, "decode_stall_s", 1.0, 2),
        ("cgroup peak MiB", 18, "cgroup_peak_bytes", 1 / MIB, 0),
        ("roofline", 16, "roofline_fraction", 1.0, 2),
    )
    head = f"{'experts':9}{'routing':8}{'pass':5}{'engine':24}{'n':>5}{'limit MiB':>10}{'OOM':>4}  "
    print(head + "".join(f"{title:{width}}" for title, width, *_ in columns))
    for scenario in scenarios:
        of_scenario = [one for one in records if (one["scenario"], one["routing"]) == (scenario.name, scenario.routing)]
        chosen = clean_pairs(of_scenario)
        for name in ("cold", "warm")[: scenario.n_passes]:
            rows = [one for one in chosen if one["pass"] == name]
            label = f"{scenario.name:9}{scenario.routing:8}{name:5}"
            for engine in sorted({one["engine"] for one in rows}):
                mine = [one for one in rows if one["engine"] == engine]
                line = f"{label}{engine:24}{f'{len(mine)}/{scenario.n_pairs}':>5}{scenario.limit_bytes / MIB:10.0f}"
                line += f"{sum(one['cgroup_oom_kills'] for one in mine):4}  "
                for _, width, key, scale, digits in columns:
                    line += f"{spread((one.get(key) for one in mine), scale, digits):{width - 1}} "
                print(line.rstrip())
            others = sorted({one["engine"] for one in rows} - {"ours", "stock"})
            for ours, other in (("ours", "stock"), ("ours-ggml", "stock"), *(("ours", name) for name in others)):
                decode, ttft = (ratios(rows, key, ours, other) for key in ("decode_tok_per_s", "ttft_s"))
                if decode:
                    prefill = spread(1 / ratio for ratio in ttft)  # the prompt is the same, so speeds divide like this
                    print(f"{label}{ours} / {other}: decode {spread(decode)}, prefill {prefill}")
    n_disturbed = len({(one["scenario"], one["routing"], one["pair"]) for one in records if one["disturbed"]})
    print(
        f"pairs disturbed by others or by the disk: {n_disturbed}; left out where {MIN_CLEAN_PAIRS} clean ones remain"
    )


def find_faults(records: list[Record]) -> list[str]:
    """List the runs that failed, and the pairs in which lossless engines of the same arithmetic chose other tokens."""
    faults = []
    chosen: dict[tuple[str, int, bool], set[str]] = {}
    for one in records:
        if "error" in one:
            faults.append(f"{one['scenario']} {one['routing']} pair {one['pair']} {one['engine']}: {one['error']}")
        elif not is_lossy(one["engine"]):
            case = (one["routing"], one["pair"], one["engine"].partition(OPTION_MARK)[0] == "ours")
            chosen.setdefault(case, set()).add(one["best_ids_sha256"])
    for (routing, pair, is_ours), digests in chosen.items():
        if len(digests) > 1:
            faults.append(
                f"tokens of {routing} pair {pair} differ: found {len(digests)} sequences, expected 1 for all "
                f"{'budgets' if is_ours else 'engines, budgets'} and passes; compare the logits"
            )
    return faults


def describe_model(model: Path) -> Record:
    """Which file it was."""
    with model.open("rb") as file:
        head_sha256 = hashlib.sha256(file.read(MIB)).hexdigest()
    return {"name": model.name, "size_bytes": model.stat().st_size, "first_mib_sha256": head_sha256}


def parse_options(arguments: list[str] | None) -> Options:
    """Parse the command line; `--quick` overrides the sizes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.larger_than_memory", description=__doc__)
    parser.add_argument("--model", type=Path, help="GGUF file; default: the synthetic OLMoE")
    parser.add_argument(
        "--engines",
        nargs="+",
        type=engine_name,
        default=["ours", "stock"],
        help=f"of {', '.join(ENGINES)}; ours:KEYWORD=VALUE,... for edgemoe with other options",
    )
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.25, 0.5, 1.0], help="share of expert bytes")
    parser.add_argument("--routing", nargs="+", choices=("local", "uniform"), default=["local", "uniform"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--resident-pairs", type=int, default=RESIDENT_PAIRS, help="0: no ceiling for the roofline")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--read-ahead-kib", type=int, default=128)
    parser.add_argument("--base-mib", type=int, help="the limit at 0 %% of the experts; default: edgemoe's plan")
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "edgemoe-bench")
    parser.add_argument("--json", type=Path, help="also write the JSON line to this file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--idle-wait-s", type=float, default=60.0)
    parser.add_argument("--run-timeout-s", type=float, default=900.0)
    parser.add_argument("--quick", action="store_true", help="one pair, 25 %% local, 32 + 8 tokens: a smoke test")
    options = parser.parse_args(arguments)
    if options.quick:
        options.fractions, options.routing, options.pairs = [0.25], ["local"], 1
        options.prompt_tokens, options.decode_tokens, options.idle_wait_s = 32, 8, 5.0
    options.n_ctx = max(N_BATCH, math.ceil((options.prompt_tokens + options.decode_tokens) / 256) * 256)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 done, 1 a run failed or the engines disagree, 2 it cannot run here."""
    options = parse_options(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # unwind, so that mounts go
    records: list[Record] = []
    try:
        cgroup.MemoryCgroup(f"edgemoe-bench-{os.getpid()}", 64 * MIB).close()  # fail before gigabytes are written
        options.work_dir.mkdir(parents=True, exist_ok=True)
        model = session.find_model(options)
        sizes = measure_sizes(model)
        scenarios = make_scenarios(model, sizes, options)
        image = loopdev.image_with(model, options.work_dir)
        mount = loopdev.LoopMount(
            image, options.work_dir / f"mount-{os.getpid()}", read_ahead_kib=options.read_ahead_kib
        )
        with mount as folder:
            for scenario in scenarios:
                for pair in range(scenario.n_pairs):
                    records += run_pair(scenario, pair, folder / model.name, sizes, options)
    except (cgroup.CgroupError, loopdev.LoopDeviceError) as error:
        print(f"larger_than_memory cannot run here: {error}", file=sys.stderr)
        return 2
    add_roofline(records)
    print_table(records, scenarios)
    faults = find_faults(records)
    print("".join(f"FAULT {fault}\n" for fault in faults), end="", file=sys.stderr)
    described = {"model": describe_model(model), "sizes": dataclasses.asdict(sizes)}
    session.finish("larger_than_memory", options, **described, faults=faults, runs=records)
    return 1 if faults else 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        run_child()
    else:
        sys.exit(main())
