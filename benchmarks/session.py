# SPDX-License-Identifier: MIT
"""What the benchmarks of a resident model share: the machine they ran on, who disturbed them, the engines compared."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.cgroup import DISTURBED_OTHER_CPU_SHARE, DISTURBED_STEAL_SHARE, CpuTicks
from edgemoe.bench_child import stock_without_repacking

MIB = 1 << 20
REPO_ROOT = Path(__file__).resolve().parent.parent
ENGINES = {
    "ours": "edgemoe, kernels=auto",
    "ours-ggml": "edgemoe, kernels=ggml",
    "stock": "llama.cpp as it comes: weights repacked",
    "stock-plain": "llama.cpp without repacking",
}
Record = dict[str, Any]


class Watch:
    """Measures how much of the machine others took while something ran."""

    def __init__(self) -> None:
        self._begin = CpuTicks.now()

    def shares(self, own_cpu_s: float) -> Record:
        """`steal_share`, `other_cpu_share` and `disturbed` since the start, given our own CPU time."""
        spent = CpuTicks.now().minus(self._begin)
        busy = spent.total - spent.idle - spent.steal
        others = max(0.0, (busy - own_cpu_s * os.sysconf("SC_CLK_TCK")) / spent.total)
        steal = spent.steal / spent.total
        disturbed = steal > DISTURBED_STEAL_SHARE or others > DISTURBED_OTHER_CPU_SHARE
        return {"steal_share": steal, "other_cpu_share": others, "disturbed": disturbed}


def find_model(options: argparse.Namespace, preset: str = "olmoe") -> Path:
    """`options.model`, or where that is None the file of a preset in `options.work_dir`, written if it is not there."""
    if options.model is not None:
        return Path(options.model)
    from benchmarks import synthetic

    options.work_dir.mkdir(parents=True, exist_ok=True)
    path = Path(options.work_dir) / f"{preset}.gguf"
    if not path.exists():
        synthetic.write_preset(path, preset)
    return path


def describe() -> Record:
    """Machine, commit, versions and the environment that changes timings."""
    cpu_lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in cpu_lines if ":" in line}
    cpu = {
        name: fields[name] for name in ("model name", "cpu family", "model", "stepping", "cache size") if name in fields
    }
    memory_kib = Path("/proc/meminfo").read_text().split()[1]
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        cwd=REPO_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    names = ("edgemoe", "llama_cpp_python", "numpy", "gguf", "onnxruntime")
    versions = {one.name: one.version for one in importlib.metadata.distributions() if one.name in names}
    return {
        "machine": {
            "cpu": cpu,
            "flags": fields.get("flags", fields.get("Features", "")),
            "n_cpus": os.cpu_count(),
            "memory_bytes": int(memory_kib) * 1024,
        },
        "commit": git.stdout.strip() if git.returncode == 0 else None,
        "versions": {**versions, "python": platform.python_version(), "kernel": platform.release()},
        "environment": {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "EDGEMOE_ISA")},
    }


def settings(options: argparse.Namespace) -> Record:
    """The options as JSON has them; of a path its name, as where things lie is nobody else's."""
    return {name: value.name if isinstance(value, Path) else value for name, value in vars(options).items()}


def save(benchmark: str, options: argparse.Namespace, **parts: Any) -> str:
    """The benchmark's JSON line; it replaces `options.json`, if that is set, as a whole or not at all."""
    line = json.dumps({"benchmark": benchmark, **describe(), "settings": settings(options), **parts})
    if options.json is not None:
        partial = options.json.with_name(f".{options.json.name}.partial")
        with partial.open("w") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(options.json)
    return line


def finish(benchmark: str, options: argparse.Namespace, **parts: Any) -> None:
    """Print the benchmark's JSON line, its last, and write it to `options.json` if that is set."""
    print(save(benchmark, options, **parts))


def load_engine(engine: str, model: Path | str, **options: Any) -> Any:
    """Load a model with one of `ENGINES`, with memory for all of it. One engine per process: OpenMP is set up once."""
    if engine.startswith("ours"):
        import edgemoe  # before llama_cpp: it may set what OpenMP reads once

        memory = Path(model).stat().st_size + 2048 * MIB
        kernels = "ggml" if engine == "ours-ggml" else "auto"
        return edgemoe.Llama(str(model), memory=memory, kernels=kernels, warm_start=False, verbose=False, **options)
    if engine == "stock-plain":
        return stock_without_repacking()(str(model), verbose=False, **options)
    import llama_cpp

    return llama_cpp.Llama(str(model), verbose=False, **options)


def print_targets(targets: Iterable[Record]) -> None:
    """Print what the issue asks for beside what was found; see `target`."""
    for one in targets:
        found = "not measured" if one["found"] is None else f"{one['found']:.3f}"
        print(
            f"{'MET   ' if one['met'] else 'MISSED'} {one['what']}: found {found}, target {one['sign']} {one['limit']}"
        )


def target(what: str, found: float | None, limit: float, *, at_most: bool = False) -> Record:
    """Compare one number with its target; met when it is at least (`at_most`: at most) `limit`."""
    met = found is not None and (found <= limit if at_most else found >= limit)
    return {"what": what, "found": found, "limit": limit, "sign": "<=" if at_most else ">=", "met": met}
