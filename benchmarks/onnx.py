# SPDX-License-Identifier: MIT
"""edgemoe's execution provider against stock ONNX Runtime on an OLMoE-shaped model larger than its memory.

    sudo python -m benchmarks.onnx --json results.json      # about 12 minutes on 2 quiet cores
    sudo python -m benchmarks.onnx --quick                  # a smoke test, two minutes; not a measurement

Informational, not a gate: it needs root and a quiet machine. The weights are random (`benchmarks.onnx_shape`); what is
fair, and what each column means, is in `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import cgroup, loopdev, session
from benchmarks.larger_than_memory import ratios, spread
from benchmarks.onnx_shape import ACCURACY_LEVELS, MoeShape, model_name, write_model

MIB = 1 << 20
KINDS = {
    "ours": "edgemoe, memory= the limit of the cgroup, warm_start=False",
    "stock": "stock as it comes: experts repacked into memory",
    "plain": "stock with session.disable_prepacking=1: experts mapped, evictable, slow kernels",
    "saved": "stock on a file that it saved with its repacked experts: mapped, evictable, fast kernels, twice the disk",
}
RESIDENT = "resident"
CONFINED_ENGINES = ("ours:4", "plain:4", "saved:4", "stock:4")
RESIDENT_ENGINES = ("ours:4", "stock:4", "saved:4", "ours:0", "stock:0")  # plain is 10 times slower
FIRST_PROMPT, LAST_PROMPT = 64, 512
SAVE = {"session.save_external_prepacked_constant_initializers": "1"}
# Of the outputs' largest element. Two experts' scores may be within 1e-2 of each other, and 8 bits choose the other.
TOLERANCES = {0: 1e-3, 4: 0.3}
Record = dict[str, Any]
Options = argparse.Namespace


@dataclasses.dataclass(frozen=True)
class Scenario:
    """One block of the table: how much memory there is, and who runs in it."""

    name: str
    routing: str
    limit_bytes: int
    engines: tuple[str, ...]


def _session_options(n_threads: int, entries: dict[str, str]) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.log_severity_level = 3
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return options


def prepacked_name(level: int) -> str:
    """The .onnx file that stock ONNX Runtime saved with repacked experts."""
    return f"prepacked-{model_name(level)}"


def run_save(folder: Path, level: int, n_threads: int) -> None:
    """Load a model in stock ONNX Runtime and have it saved with its repacked experts."""
    import onnxruntime

    name = prepacked_name(level)
    external = {
        "session.optimized_model_external_initializers_file_name": f"{name}.data",
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    }
    options = _session_options(n_threads, SAVE | external)
    options.optimized_model_filepath = str(folder / name)
    onnxruntime.InferenceSession(str(folder / model_name(level)), options)


def _open(engine: str, folder: Path, n_threads: int, limit_bytes: int) -> Any:
    kind, level = engine.split(":")
    if kind == "ours":
        from edgemoe.onnx import InferenceSession

        options = _session_options(n_threads, {})
        path = folder / model_name(int(level))
        return InferenceSession(path, memory=limit_bytes, sess_options=options, warm_start=False)
    import onnxruntime

    entries = {"session.disable_prepacking": "1"} if kind == "plain" else {}
    name = prepacked_name(int(level)) if kind == "saved" else model_name(int(level))
    return onnxruntime.InferenceSession(str(folder / name), _session_options(n_threads, entries))


def _memory_bytes(key: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


def _read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split("\nread_bytes:")[1].split()[0])


def run_child() -> None:
    """One engine: load, the short prompt, the long one, single tokens; task on stdin, one JSON line on stdout."""
    task: Record = json.load(sys.stdin)
    import numpy as np

    if task["engine"].startswith("ours"):
        import edgemoe.onnx  # noqa: F401  # neither engine's imports are part of its loading
    import onnxruntime  # noqa: F401

    import_rss_bytes = _memory_bytes("VmRSS")
    start_s = time.perf_counter()
    model = _open(task["engine"], Path(task["folder"]), task["threads"], task["limit_bytes"])
    record: Record = {"load_s": time.perf_counter() - start_s, "import_rss_bytes": import_rss_bytes}
    record |= {"load_rss_bytes": _memory_bytes("VmRSS"), "load_anon_bytes": _memory_bytes("RssAnon")}

    def run(tokens: list[int]) -> tuple[float, Any]:
        begin_s = time.perf_counter()
        out = model.run(None, {"ids": np.array(tokens, np.int64)})[0]
        return time.perf_counter() - begin_s, out[-1]

    outputs = []
    seconds, out = run(task["first_prompt"])
    outputs.append(out)
    record["ttft_first_s"] = record["load_s"] + seconds
    seconds, out = run(task["last_prompt"])
    outputs.append(out)
    record["ttft_last_s"] = record["load_s"] + seconds
    for token in task["warm_up"]:
        run([token])
    before, read = _stats(model), _read_bytes()
    runs = [run([token]) for token in task["decode"]]
    outputs += [out for _, out in runs]
    record["ms_per_run"] = 1e3 * sum(seconds for seconds, _ in runs) / len(runs)
    record["best_ms_per_run"] = 1e3 * min(seconds for seconds, _ in runs)
    record["read_bytes_per_run"] = (_read_bytes() - read) / len(runs)
    if before:
        spent = {name: value - before[name] for name, value in _stats(model).items()}
        record["hit_rate"] = spent["expert_hits"] / max(1, sum(spent[name] for name in _ASKED))
        record["stall_ms_per_run"] = 1e3 * spent["stall_s"] / len(runs)
    record |= {"peak_rss_bytes": _memory_bytes("VmHWM"), "anon_bytes": _memory_bytes("RssAnon")}
    record["outputs"] = [[float(f"{v:.7g}") for v in out] for out in outputs]
    print(json.dumps(record))


_ASKED = ("expert_hits", "expert_misses", "expert_late_hits")


def _stats(model: Any) -> dict[str, float]:
    if not hasattr(model, "stats"):
        return {}
    stats = model.stats()
    return {name: getattr(stats, name) for name in (*_ASKED, "stall_s")}


def find_image(shape: MoeShape, options: Options) -> Path:
    """The image with the model and its repacked copies, made where it is missing.

    Repacked experts are in a layout of this CPU and this ONNX Runtime, so the name says both.
    """
    import onnxruntime

    cpu = session.describe()["machine"]["cpu"].get("model name", "")
    made_for = repr((shape, onnxruntime.__version__, cpu))
    image = Path(options.work_dir) / f"onnx-{hashlib.sha256(made_for.encode()).hexdigest()[:12]}.ext4"
    if image.exists():
        return image

    def fill(folder: Path) -> None:
        print(f"writing the model, {shape.expert_bank_bytes / MIB:.0f} MiB of experts", file=sys.stderr)
        write_model(folder, shape)
        for level in ACCURACY_LEVELS:  # 1.8 and 2.2 times the model on x86-64
            print(f"stock ONNX Runtime saves its repacked copy, accuracy_level {level}", file=sys.stderr)
            command = [sys.executable, "-m", "benchmarks.onnx", "--save", str(folder), str(level), str(options.threads)]
            subprocess.run(command, cwd=session.REPO_ROOT, check=True)

    n_bytes = round(5.5 * shape.expert_bank_bytes) + shape.n_vocab * shape.hidden * 12
    free_bytes = shutil.disk_usage(options.work_dir).free
    if free_bytes < 1.1 * n_bytes:
        raise loopdev.LoopDeviceError(
            f"no room for the model: {free_bytes / MIB:.0f} MiB free, expected {1.1 * n_bytes / MIB:.0f} "
            f"({options.work_dir}); give another --work-dir"
        )
    loopdev.make_image(image, n_bytes, fill)
    return image


def make_scenarios(shape: MoeShape, options: Options) -> list[Scenario]:
    """The confined ones, and one in which every engine has room for two copies of everything."""
    base_bytes = options.base_mib * MIB
    found = []
    for routing in options.routing:
        for fraction in options.fractions:
            limit_bytes = base_bytes + round(fraction * shape.expert_bank_bytes)
            found.append(Scenario(f"{fraction:.0%}", routing, limit_bytes, tuple(options.engines)))
        if options.resident_engines:
            room_bytes = base_bytes + 1024 * MIB + 4 * shape.expert_bank_bytes
            found.append(Scenario(RESIDENT, routing, room_bytes, tuple(options.resident_engines)))
    return found


def run_pair(scenario: Scenario, pair: int, engines: list[str], folder: Path, options: Options) -> list[Record]:
    """Run every engine once, in an order drawn for this pair."""
    from benchmarks import synthetic

    make_tokens = synthetic.ROUTINGS[scenario.routing]
    task: Record = {"threads": options.threads, "limit_bytes": scenario.limit_bytes, "folder": str(folder)}
    parts = {"first_prompt": FIRST_PROMPT, "last_prompt": LAST_PROMPT}
    parts |= {"warm_up": options.warm_up_tokens, "decode": options.decode_tokens}
    tokens = make_tokens(sum(parts.values()), options.shape.n_vocab, options.seed + pair)
    for name, n_tokens in parts.items():
        task[name], tokens = tokens[:n_tokens], tokens[n_tokens:]
    order = list(engines)
    random.Random(f"{options.seed}/{scenario.name}/{scenario.routing}/{pair}").shuffle(order)
    records = []
    for engine in order:
        cgroup.drop_caches()
        was_idle = cgroup.wait_until_idle(options.idle_wait_s, window_s=0.5)
        with cgroup.MemoryCgroup(f"edgemoe-bench-{os.getpid()}", scenario.limit_bytes) as group:
            command = [sys.executable, "-m", "benchmarks.onnx", "--child"]
            result = group.run(command, json.dumps({**task, "engine": engine}), options.run_timeout_s)
        result = dataclasses.replace(result, was_idle_before=was_idle)
        record: Record = {"scenario": scenario.name, "routing": scenario.routing, "pair": pair, "engine": engine}
        record |= result.to_dict()
        if result.exit_code == 0:
            record |= json.loads(result.stdout.strip().splitlines()[-1])
        else:
            record["killed"] = record["cgroup_oom_kills"] > 0
            reason = "timed out" if result.timed_out else f"exit code {result.exit_code}"
            record["error"] = "killed for memory" if record["killed"] else f"{reason}: {result.stderr_tail}"
        records.append(record)
        took = record.get("error") or f"load {record['load_s']:.2f} s, {record['ms_per_run']:.1f} ms/run"
        note = " DISTURBED" * result.disturbed
        print(f"{scenario.name} {scenario.routing} pair {pair} {engine}: {took}{note}", file=sys.stderr)
    return compared(records)


def compared(records: list[Record]) -> list[Record]:
    """Replace the outputs of one pair by their largest relative difference from another engine's at that level.

    The reference is stock, then plain, then saved; without one of them there is no difference.
    """
    outputs = {one["engine"]: one.pop("outputs") for one in records if "outputs" in one}
    for one in records:
        level = one["engine"].split(":")[1]
        others = [f"{kind}:{level}" for kind in ("stock", "saved", "plain")]
        reference = next((outputs[name] for name in others if name in outputs), None)
        if reference is None or one["engine"] not in outputs:
            continue
        differences = [
            max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) / max(map(abs, theirs))
            for mine, theirs in zip(outputs[one["engine"]], reference, strict=True)
        ]
        one["difference"] = max(differences)
    return records


def run_all(scenarios: Iterable[Scenario], folder: Path, options: Options) -> list[Record]:
    """All pairs of all scenarios. An engine that was killed for memory once is not tried again in that scenario."""
    records: list[Record] = []
    for scenario in scenarios:
        engines = list(scenario.engines)
        for pair in range(options.pairs):
            found = run_pair(scenario, pair, engines, folder, options)
            killed = {one["engine"] for one in found if one.get("killed")}
            engines = [name for name in engines if name not in killed]
            records += found
    return records


def of(records: list[Record], scenario: str, routing: str) -> list[Record]:
    """The records of one scenario; those of disturbed pairs left out where three others remain."""
    from benchmarks.larger_than_memory import clean_pairs

    return clean_pairs([one for one in records if (one["scenario"], one["routing"]) == (scenario, routing)])


COLUMNS = (
    ("ms/run", 24, "ms_per_run", 1.0, 1),
    ("load s", 18, "load_s", 1.0, 2),
    (f"TTFT {FIRST_PROMPT} s", 18, "ttft_first_s", 1.0, 2),
    (f"TTFT {LAST_PROMPT} s", 18, "ttft_last_s", 1.0, 2),
    ("MiB read/run", 18, "read_bytes_per_run", 1 / MIB, 1),
    ("hit %", 18, "hit_rate", 100.0, 1),
    ("stall ms/run", 18, "stall_ms_per_run", 1.0, 1),
    ("peak RSS MiB", 18, "peak_rss_bytes", 1 / MIB, 0),
    ("anon MiB", 18, "anon_bytes", 1 / MIB, 0),
    ("cgroup peak MiB", 18, "cgroup_peak_bytes", 1 / MIB, 0),
    ("difference x 1e6", 18, "difference", 1e6, 1),
)


def print_table(records: list[Record], scenarios: list[Scenario]) -> None:
    """Medians [min-max] of each engine, then ratios within pairs."""
    head = f"{'memory':9}{'routing':8}{'engine':9}{'n':>3}{'limit MiB':>10}{'killed':>7}  "
    print(head + "".join(f"{title:{width}}" for title, width, *_ in COLUMNS))
    for scenario in scenarios:
        rows = of(records, scenario.name, scenario.routing)
        label = f"{scenario.name:9}{scenario.routing:8}"
        for engine in scenario.engines:
            mine = [one for one in rows if one["engine"] == engine]
            n_killed = sum(one.get("killed", False) for one in records if _is(one, scenario, engine))
            line = f"{label}{engine:9}{len(mine):3}{scenario.limit_bytes / MIB:10.0f}{n_killed:7}  "
            for _, width, key, scale, digits in COLUMNS:
                line += f"{spread((one.get(key) for one in mine), scale, digits):{width - 1}} "
            print(line.rstrip())
        for ours in (name for name in scenario.engines if name.startswith("ours")):
            for other in (name for name in scenario.engines if not name.startswith("ours")):
                if speeds := [1 / ratio for ratio in ratios(rows, "ms_per_run", ours, other)]:
                    print(f"{label}speed of {ours} / {other}: {spread(speeds)}")


def _is(record: Record, scenario: Scenario, engine: str) -> bool:
    found = (record["scenario"], record["routing"], record["engine"])
    return found == (scenario.name, scenario.routing, engine)


def make_targets(records: list[Record], scenarios: list[Scenario]) -> list[Record]:
    """What issue 7 asks for, beside what was found."""
    targets = []
    for scenario in scenarios:
        rows = of(records, scenario.name, scenario.routing)
        label = f"{scenario.name} {scenario.routing}"
        mine = [one for one in rows if one["engine"].startswith("ours")]
        shares = [one.get("peak_rss_bytes", math.inf) / scenario.limit_bytes for one in mine]
        targets.append(
            session.target(f"{label}: peak RSS of ours / budget", max(shares, default=None), 1.0, at_most=True)
        )
        if scenario.name == RESIDENT:
            load = _median(1 / ratio for ratio in ratios(rows, "load_s", "ours:4", "stock:4"))
            targets.append(session.target(f"{label}: loading speed of ours:4 / stock:4", load, 5.0))
            fastest = [_median(_speeds(rows, other)) for other in ("stock:4", "saved:4")]
            found = min((one for one in fastest if one is not None), default=None)
            targets.append(session.target(f"{label}: speed of ours:4 / the faster of stock:4, saved:4", found, 1.0))
        elif scenario.name == "25%":
            targets.append(
                session.target(f"{label}: speed of ours:4 / plain:4", _median(_speeds(rows, "plain:4")), 3.0)
            )
    return targets


def _speeds(rows: list[Record], other: str) -> list[float]:
    return [1 / ratio for ratio in ratios(rows, "ms_per_run", "ours:4", other)]


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


def find_faults(records: list[Record]) -> list[str]:
    """Runs of ours that failed, runs of stock that failed for another reason than memory, and outputs that differ."""
    faults = []
    for one in records:
        where = f"{one['scenario']} {one['routing']} pair {one['pair']} {one['engine']}"
        if "error" in one and (one["engine"].startswith("ours") or not one.get("killed")):
            faults.append(f"{where}: {one['error']}")
        limit = TOLERANCES[int(one["engine"].split(":")[1])]
        if one.get("difference", 0.0) > limit:
            faults.append(f"{where}: outputs differ from stock's by {one['difference']:.2g}, expected at most {limit}")
    return faults


def engine_name(text: str) -> str:
    """`KIND:LEVEL`; for argparse."""
    kind, _, level = text.partition(":")
    if kind not in KINDS or level not in map(str, ACCURACY_LEVELS):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected one of {', '.join(KINDS)}, a colon, and the accuracy level 0 or 4"
        )
    return text


def parse_options(arguments: list[str] | None) -> Options:
    """Parse the command line; `--quick` overrides the sizes."""
    engines = "; ".join(f"{kind}: {text}" for kind, text in KINDS.items()).replace("%", "%%")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.onnx", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", type=engine_name, default=list(CONFINED_ENGINES), help=engines)
    parser.add_argument("--resident-engines", nargs="*", type=engine_name, default=list(RESIDENT_ENGINES))
    parser.add_argument("--fractions", nargs="*", type=float, default=[0.25, 0.5], help="share of expert bytes")
    parser.add_argument("--routing", nargs="+", choices=("local", "uniform"), default=["local"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--decode-tokens", type=int, default=24)
    parser.add_argument("--warm-up-tokens", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--read-ahead-kib", type=int, default=128)
    parser.add_argument("--base-mib", type=int, default=320, help="the limit at 0 %% of the experts")
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "edgemoe-bench")
    parser.add_argument("--json", type=Path, help="also write the JSON line to this file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--idle-wait-s", type=float, default=10.0)
    parser.add_argument("--run-timeout-s", type=float, default=300.0)
    parser.add_argument("--quick", action="store_true", help="one pair, 25 %% and resident, 8 tokens: a smoke test")
    options = parser.parse_args(arguments)
    if options.quick:
        options.pairs, options.fractions, options.decode_tokens, options.idle_wait_s = 1, [0.25], 8, 1.0
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 done, 1 a run failed or outputs differ, 2 it cannot run here."""
    options = parse_options(arguments)
    options.shape = MoeShape()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # unwind, so that mounts go
    scenarios = make_scenarios(options.shape, options)
    try:
        cgroup.MemoryCgroup(f"edgemoe-bench-{os.getpid()}", 64 * MIB).close()  # fail before gigabytes are written
        options.work_dir.mkdir(parents=True, exist_ok=True)
        image = find_image(options.shape, options)
        mount = loopdev.LoopMount(
            image, options.work_dir / f"mount-{os.getpid()}", read_ahead_kib=options.read_ahead_kib
        )
        with mount as folder:
            records = run_all(scenarios, folder, options)
    except (cgroup.CgroupError, loopdev.LoopDeviceError) as error:
        print(f"onnx cannot run here: {error}", file=sys.stderr)
        return 2
    print_table(records, scenarios)
    targets, faults = make_targets(records, scenarios), find_faults(records)
    session.print_targets(targets)
    print("".join(f"FAULT {fault}\n" for fault in faults), end="", file=sys.stderr)
    shape = dataclasses.asdict(options.shape) | {"expert_bank_bytes": options.shape.expert_bank_bytes}
    del options.shape
    session.finish("onnx", options, model=shape, targets=targets, faults=faults, runs=records)
    return 1 if faults else 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        run_child()
    elif sys.argv[1:2] == ["--save"]:
        run_save(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        sys.exit(main())
