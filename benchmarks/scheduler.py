# SPDX-License-Identifier: MIT
"""What the scheduler's choices are worth: a table of method x share of the experts in memory, and its targets.

    sudo python -m benchmarks.scheduler --json results.json      # the table; run it again to go on after a cut
    sudo python -m benchmarks.scheduler --baseline ours --engines ours ours:reuse_bias=0.1      # lossy levers
    python -m benchmarks.scheduler restart MODEL                 # the first tokens after a restart, warm and cold
    python -m benchmarks.scheduler prompts                       # what a prompt costs: its own time, and hits after it
    python -m benchmarks.scheduler batches                       # larger micro-batches: gain of a prompt, loss after it

A run of the table is one of `benchmarks.larger_than_memory`: a fresh process in a memory cgroup. All methods of a pair
run in turn, and the pairs of all cells in turn, so that a table that is cut has all its cells. `--json` is written
after each cell of a pair, and what it holds already is not run again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import signal
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import cgroup, larger_than_memory, loopdev, micro_batches, prompts, session, warm_start
from benchmarks.larger_than_memory import MIB, RESIDENT, Options, Record, Scenario

BASELINE = "ours:eviction=lru,prefetch=off"
METHODS = ("ours", BASELINE, "ours:prefetch=off", "ours:prefetch=1", "ours:prefetch=2")
FRACTIONS = ("0.12", "0.25", "0.5")
PRESETS = ("olmoe", "qwen3moe-30b-slim")
# What issue 4 asks for. Where users live: a quarter to half of the experts in memory, local routing.
ROOFLINE_TARGETS = (("25%", "local", 0.90), ("25%", "uniform", 0.90), ("50%", "local", 0.80))
GAIN_TARGET, GAIN_CELLS = 1.15, (("25%", "local"), ("50%", "local"))
LOSS_TARGET = 0.98


class ResumeError(RuntimeError):
    """A file of results is not of this table."""


def _case(run: Record) -> tuple[str, str, int]:
    return run["scenario"], run["routing"], run["pair"]


@dataclasses.dataclass
class Table:
    """The runs of one model: where they stand, and what was asked for."""

    model: Record  # as `larger_than_memory.describe_model`
    scenarios: list[Scenario]
    runs: list[Record]

    def pending(self) -> list[tuple[int, Scenario]]:
        """Pairs to run: the first pair of every scenario, then the second, and so on."""
        done = {_case(run) for run in self.runs} - {_case(run) for run in self.runs if "error" in run}
        n_pairs = max((scenario.n_pairs for scenario in self.scenarios), default=0)
        return [
            (pair, scenario)
            for pair in range(n_pairs)
            for scenario in self.scenarios
            if pair < scenario.n_pairs and (scenario.name, scenario.routing, pair) not in done
        ]

    def add(self, found: list[Record]) -> None:
        """Take the runs of a pair, in place of what is there of it: a pair that failed is run again."""
        cases = {_case(run) for run in found}
        self.runs = [run for run in self.runs if _case(run) not in cases] + found

    def to_dict(self) -> Record:
        """Ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, stored: Record) -> Table:
        """What `to_dict` gave."""
        return cls(stored["model"], [Scenario(**one) for one in stored["scenarios"]], stored["runs"])


def load(path: Path | None, settings: Record) -> dict[str, Table]:
    """The tables, by the model's name, that an earlier call left in `path`; none without a file.

    Raises:
        ResumeError: they are of other settings, or the file is no table.
    """
    if path is None or not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text())
        found, tables = stored["settings"], [Table.of(one) for one in stored["tables"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ResumeError(f"cannot go on with {path}: {error!r}, expected a table; use another --json") from error
    differing = [name for name in settings if found.get(name) != settings[name]]
    if differing:
        name = differing[0]
        raise ResumeError(
            f"cannot go on with {path}: found {name}={found.get(name)}, expected {settings[name]}; use another --json"
        )
    return {table.model["name"]: table for table in tables}


def summarize(table: Table, baseline: str = BASELINE) -> list[Record]:
    """One line for each cell and method: medians, and the ratios to a baseline within pairs."""
    records = [run for run in table.runs if "error" not in run]
    larger_than_memory.add_roofline(records)
    lines = []
    for scenario in table.scenarios:
        cell = [one for one in records if (one["scenario"], one["routing"]) == (scenario.name, scenario.routing)]
        cell = [one for one in larger_than_memory.clean_pairs(cell) if one["pass"] == "cold"]
        for method in dict.fromkeys(one["engine"] for one in sorted(cell, key=lambda one: str(one["engine"]))):
            if scenario.name == RESIDENT:
                continue  # the ceiling of the roofline
            mine = [one for one in cell if one["engine"] == method]
            lines.append(
                {
                    "model": table.model["name"],
                    "experts": scenario.name,
                    "routing": scenario.routing,
                    "method": method,
                    "n_pairs": len(mine),
                    "tokens_per_s": [one["decode_tok_per_s"] for one in mine],
                    "ttft_s": [one["ttft_s"] for one in mine],
                    "read_bytes_per_token": [one["decode_read_bytes_per_token"] for one in mine],
                    "stall_s_per_token": [one["decode_stall_s"] / one["n_decoded"] for one in mine],
                    "hit_rate": [one["decode_hit_rate"] for one in mine],
                    "roofline_fraction": [one["roofline_fraction"] for one in mine],
                    "ratio": larger_than_memory.ratios(cell, "decode_tok_per_s", method, baseline),
                    "bytes_ratio": larger_than_memory.ratios(cell, "decode_read_bytes_per_token", method, baseline),
                }
            )
    return lines


def print_lines(lines: Sequence[Record], baseline: str = BASELINE) -> None:
    """Markdown: medians [smallest-largest]."""
    columns = (
        ("tok/s", "tokens_per_s", 1.0, 2),
        ("TTFT s", "ttft_s", 1.0, 2),
        ("MiB/token", "read_bytes_per_token", 1 / MIB, 1),
        ("stall ms/token", "stall_s_per_token", 1e3, 1),
        ("hit %", "hit_rate", 100.0, 1),
        ("roofline", "roofline_fraction", 1.0, 2),
        ("/ lru, no prefetch" if baseline == BASELINE else f"/ {baseline}", "ratio", 1.0, 2),
        ("bytes / its", "bytes_ratio", 1.0, 2),
    )
    print("| model | experts | routing | method | n | " + " | ".join(title for title, *_ in columns) + " |")
    print("|" + "---|" * (5 + len(columns)))
    for line in lines:
        cells = [line["model"], line["experts"], line["routing"], line["method"], str(line["n_pairs"])]
        cells += [larger_than_memory.spread(line[key], scale, digits) for _, key, scale, digits in columns]
        print("| " + " | ".join(cells) + " |")


def find_targets(lines: Sequence[Record], default: str = METHODS[0]) -> list[Record]:
    """What issue 4 asks of the default method, beside the medians found."""

    def median(line: Record, key: str) -> float | None:
        return statistics.median(line[key]) if line[key] else None

    ours = [line for line in lines if line["method"] == default]
    targets = []
    for experts, routing, limit in ROOFLINE_TARGETS:
        for line in ours:
            if (line["experts"], line["routing"]) == (experts, routing):
                what = f"roofline, {line['model']}, {experts} {routing}"
                targets.append(session.target(what, median(line, "roofline_fraction"), limit))
    gains = [median(line, "ratio") for line in ours if (line["experts"], line["routing"]) in GAIN_CELLS]
    best = max((gain for gain in gains if gain is not None), default=None)
    targets.append(session.target("best of 25-50 % local / lru without prefetch", best, GAIN_TARGET))
    ratios = [ratio for line in ours if (ratio := median(line, "ratio")) is not None]
    targets.append(session.target("worst cell / lru without prefetch", min(ratios) if ratios else None, LOSS_TARGET))
    return targets


def parse_options(arguments: Sequence[str]) -> Options:
    """Those of `larger_than_memory` with other defaults, and `--presets`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scheduler",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other options are those of benchmarks.larger_than_memory; of its --engines, the first is the "
        "default that the targets are about.",
    )
    parser.add_argument(
        "--baseline", default=BASELINE, help="ratios are to this one of the engines; targets only with the default"
    )
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), help="of benchmarks.synthetic; not with --model")
    own, rest = parser.parse_known_args(arguments)
    options = larger_than_memory.parse_options(["--engines", *METHODS, "--fractions", *FRACTIONS, *rest])
    options.presets, options.baseline = own.presets, own.baseline
    if options.baseline not in (BASELINE, *options.engines):
        parser.error(f"baseline {options.baseline}: expected one of the engines, {', '.join(options.engines)}")
    return options


def run_table(options: Options, model: Path, table: Table, tables: Iterable[Table]) -> None:
    """Run what is pending of one model, and write all tables after each pair of a cell."""
    sizes = larger_than_memory.measure_sizes(model)
    commit = session.describe()["commit"]
    # The default alone says how fast this machine computes: methods do not differ where nothing is read.
    ceiling = copy.copy(options)
    ceiling.engines = options.engines[:1]
    image = loopdev.image_with(model, options.work_dir)
    mount_point = options.work_dir / f"mount-{os.getpid()}"
    with loopdev.LoopMount(image, mount_point, read_ahead_kib=options.read_ahead_kib) as folder:
        for pair, scenario in table.pending():
            of_pair = ceiling if scenario.name == RESIDENT else options
            found = larger_than_memory.run_pair(scenario, pair, folder / model.name, sizes, of_pair)
            table.add([{**one, "commit": commit, "n_decoded": options.decode_tokens} for one in found])
            if options.json is not None:
                session.save("scheduler", options, tables=[one.to_dict() for one in tables])


def main(arguments: list[str]) -> int:
    """Run the benchmark; 0 done, 1 a run failed or methods chose different tokens, 2 it cannot run here."""
    parts = {"restart": warm_start.main, "prompts": prompts.main, "batches": micro_batches.main}
    if arguments and arguments[0] in parts:
        return parts[arguments[0]](arguments[1:])
    options = parse_options(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # unwind, so that mounts go
    try:
        cgroup.MemoryCgroup(f"edgemoe-bench-{os.getpid()}", 64 * MIB).close()  # fail before gigabytes are written
        options.work_dir.mkdir(parents=True, exist_ok=True)
        models = [options.model] if options.model else [session.find_model(options, p) for p in options.presets]
        tables = load(options.json, {name: value for name, value in session.settings(options).items() if name in ASKED})
        for model in models:
            described = larger_than_memory.describe_model(model)
            if model.name not in tables:
                scenarios = larger_than_memory.make_scenarios(model, larger_than_memory.measure_sizes(model), options)
                tables[model.name] = Table(described, scenarios, [])
            elif tables[model.name].model != described:
                raise ResumeError(f"cannot go on with {options.json}: {model} is another file now; use another --json")
            n_pairs = {True: min(options.resident_pairs, options.pairs), False: options.pairs}
            tables[model.name].scenarios = [
                dataclasses.replace(one, n_pairs=n_pairs[one.name == RESIDENT]) for one in tables[model.name].scenarios
            ]
        for model in models:
            run_table(options, model, tables[model.name], tables.values())
    except (cgroup.CgroupError, loopdev.LoopDeviceError, ResumeError) as error:
        print(f"scheduler cannot run here: {error}", file=sys.stderr)
        return 2
    lines = [line for table in tables.values() for line in summarize(table, options.baseline)]
    print_lines(lines, options.baseline)
    targets = find_targets(lines, options.engines[0]) if options.baseline == BASELINE else []
    session.print_targets(targets)
    commits = {run["commit"] for table in tables.values() for run in table.runs}
    if len(commits) > 1:
        print(f"runs of {len(commits)} commits: {', '.join(map(str, sorted(commits, key=str)))}")
    faults = [fault for table in tables.values() for fault in larger_than_memory.find_faults(table.runs)]
    print("".join(f"FAULT {fault}\n" for fault in faults), end="", file=sys.stderr)
    stored = [table.to_dict() for table in tables.values()]
    session.finish("scheduler", options, lines=lines, targets=targets, faults=faults, tables=stored)
    return 1 if faults else 0


# Settings that an earlier table must share: the others do not change what a run does.
ASKED = (
    *("engines", "fractions", "routing", "prompt_tokens", "decode_tokens", "threads", "read_ahead_kib", "base_mib"),
    *("seed", "n_ctx"),
)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
