# SPDX-License-Identifier: MIT
"""Our kernels beside ggml's, and beside what the machine can do: bytes from memory, multiply-adds in registers.

Informational: it needs a quiet machine. Builds `kernels/benchmarks/kernel_benchmark` and runs it format by format.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import session
from benchmarks.cgroup import wait_until_idle
from benchmarks.larger_than_memory import spread

BUILD_DIR = session.REPO_ROOT / "build" / "benchmarks"
FORMATS = ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "Q4_1", "MXFP4", "IQ4_NL", "IQ4_XS", "Q2_K", "Q3_K", "BF16", "F16")
PEAK_FORMATS = ("Q4_K", "Q8_0", "Q4_0", "MXFP4")
PEAK_MIN_TOKENS = 16
PEAK_SHARE = 0.70
BANDWIDTH_SHARE = {1: 0.85}  # by threads; 0.90 for two and more
Record = dict[str, Any]


def build(target: str = "kernel_benchmark", build_dir: Path = BUILD_DIR) -> Path:
    """Compile a native benchmark against the installed llama-cpp-python; returns the program."""
    configure = ["cmake", "-S", str(session.REPO_ROOT / "kernels"), "-B", str(build_dir), "-DEDGEMOE_BENCHMARKS=ON"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
    compile_it = ["cmake", "--build", str(build_dir), "--target", target, "--parallel", "2"]
    for command in (configure, compile_it):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"kernels: cannot build the native benchmark: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return build_dir / "benchmarks" / target


def run(program: Path, *arguments: str) -> Record:
    """Run the native benchmark; its JSON document with how much others disturbed it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    watch, before_s = session.Watch(), used.ru_utime + used.ru_stime
    done = subprocess.run([str(program), *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"kernels: {program.name} {' '.join(arguments)} failed with exit code {done.returncode}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {**json.loads(done.stdout), **watch.shares(used.ru_utime + used.ru_stime - before_s)}


def ratios(readings: Record, name: str, other: str) -> list[float]:
    """One reading divided by another, repetition by repetition."""
    pairs = zip(readings[name], readings[other], strict=True)
    return [a / b for a, b in pairs if a is not None and b]


def best_of_ggml(readings: Record) -> str:
    """The name of ggml's fastest path."""
    return max(
        (name for name in readings if name.startswith("ggml_")), key=lambda name: statistics.median(readings[name])
    )


def summarize(result: Record) -> Record:
    """Medians of one result and of its ratios within repetitions."""
    readings = result["readings"]
    decode = result["kind"] == "decode"
    # One activation row is quantized for all experts of a layer, so for decode there is one figure; for prefill ggml's
    # includes quantizing for every matrix, and so does what we compare with it.
    like_ggml, roof = ("ours", "memory") if decode else ("ours_quantize", "peak")
    best = best_of_ggml(readings)
    found = {name: statistics.median(values) for name, values in readings.items()}
    return {
        **{name: result.get(name) for name in ("kind", "format", "isa", "threads", "n_tokens", "repacked_by")},
        "pack_gb_per_s": result.get("pack_gb_per_s"),
        "median": found,
        "ggml_best": best,
        "roof_share": statistics.median(shares) if (shares := ratios(readings, "ours", roof)) else None,
        "roof_share_spread": spread(ratios(readings, "ours", roof)),
        "ggml_best_roof_share": statistics.median(shares) if (shares := ratios(readings, best, roof)) else None,
        "ratio": statistics.median(ratios(readings, like_ggml, best)),
        "ratio_spread": spread(ratios(readings, like_ggml, best)),
        "disturbed": result["disturbed"],
    }


def find_targets(rows: list[Record]) -> list[Record]:
    """What the issue asks of the kernels, row by row. Only the first (best) instruction set has to reach it."""
    targets = []
    for row in (row for row in rows if row["isa"] == rows[0]["isa"]):
        label = f"{row['format'].upper()} {row['isa']} {row['threads']} threads"
        if row["kind"] == "decode":
            limit = BANDWIDTH_SHARE.get(row["threads"], 0.90)
            targets.append(session.target(f"decode {label} / memory bandwidth", row["roof_share"], limit))
        else:
            label += f" {row['n_tokens']} tokens"
            if row["format"].upper() in PEAK_FORMATS and row["n_tokens"] >= PEAK_MIN_TOKENS:
                targets.append(session.target(f"prefill {label} / integer peak", row["roof_share"], PEAK_SHARE))
        what = f"{row['kind']} {label} / {row['ggml_best']}"
        targets.append(session.target(what, row["ratio"], 1.0))
    return targets


def _cell(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def print_tables(rows: list[Record]) -> None:
    """Decode in GB/s of weights, then prefill in GMAC/s."""
    for kind, roof, unit in (("decode", "memory", "GB/s"), ("prefill", "peak", "GMAC/s")):
        names = {
            "decode": ("ggml_vec_dot", "ggml_mul_mat_id", "ggml_mul_mat_id_repacked"),
            "prefill": ("ggml_mul_mat", "ggml_mul_mat_id", "ggml_mul_mat_repacked", "ggml_mul_mat_id_repacked"),
        }[kind]
        head = f"{kind:8}{'isa':14}{'thr':>4}{'tokens':>7}{roof:>9}{'ours':>9}{f'/{roof}':>20}"
        head += f"{'+quantize' if kind == 'prefill' else 'rows':>10}"
        print(
            f"\n{head}"
            + "".join(f"{name.removeprefix('ggml_'):>20}" for name in names)
            + f"{'ours / best':>20}  {unit}"
        )
        for row in (row for row in rows if row["kind"] == kind):
            median = row["median"]
            line = f"{row['format'].upper():8}{row['isa']:14}{row['threads']:4}{row['n_tokens'] or 1:7}"
            line += f"{median[roof]:9.1f}{median['ours']:9.1f}{row['roof_share_spread']:>20}"
            line += f"{median['ours_quantize' if kind == 'prefill' else 'ours_rows']:10.1f}"
            line += "".join(f"{_cell(median.get(name)):>20}" for name in names)
            print(f"{line}{row['ratio_spread']:>20}{' DISTURBED' * row['disturbed']}")
    packed = [row for row in rows if row["kind"] == "decode" and row["threads"] == rows[0]["threads"]]
    print(
        "\npacking, one core, GB/s: " + ", ".join(f"{r['format'].upper()} {_cell(r['pack_gb_per_s'])}" for r in packed)
    )


def main(arguments: list[str] | None = None) -> int:
    """Build, run, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--isa", default="", help="a name, several with commas, or all; default: the best")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--tokens", nargs="+", type=int, help="1 is decode, more are prefill; default: 1 to 512")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument(
        "--bank-mib", type=int, default=512, help="weights that decode goes through; more than L3 holds"
    )
    parser.add_argument("--idle-wait-s", type=float, default=60.0)
    parser.add_argument("--program", type=Path, help="the native benchmark; default: build it")
    parser.add_argument("--json", type=Path, help="also write the JSON line to this file")
    parser.add_argument("--quick", action="store_true", help="two repetitions of little; not a measurement")
    options = parser.parse_args(arguments)
    program = options.program or build()
    common = ["--threads", ",".join(map(str, options.threads)), "--repetitions", str(options.repetitions)]
    common += ["--bank-mib", str(options.bank_mib), *(["--isa", options.isa] if options.isa else [])]
    common += ["--tokens", ",".join(map(str, options.tokens))] if options.tokens else []
    results: list[Record] = []
    for name in options.formats:
        was_idle = options.quick or wait_until_idle(options.idle_wait_s)
        document = run(program, "--formats", name, *common, *(["--quick"] if options.quick else []))
        disturbed = document["disturbed"] or not was_idle
        shares = {key: document[key] for key in ("steal_share", "other_cpu_share")}
        results += [{**one, **shares, "disturbed": disturbed} for one in document["results"]]
    rows = [summarize(one) for one in results]
    print_tables(rows)
    targets = find_targets(rows)
    print()
    session.print_targets(targets)
    session.finish("kernels", options, targets=targets, results=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
