# SPDX-License-Identifier: MIT
"""`edgemoe doctor`: what this machine has, and what would make a model slow on it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from edgemoe.cli.console import find_model, print_json
from edgemoe.cli.options import json_option, model_argument
from edgemoe.cli.plan import does_not_fit
from edgemoe.sizes import format_size

T = TypeVar("T")

SLOW_DISK_BYTES_PER_S = 500e6
BLOCK_BYTES_WITHOUT_EXPERTS = 1 << 20
CPU_TOPOLOGY = Path("/sys/devices/system/cpu")
CGROUP_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


@click.command()
@model_argument
@json_option
@click.pass_context
def doctor(click_ctx: click.Context, model: Path | None, as_json: bool) -> None:
    """Check this machine for what would slow MODEL down.

    Exits with 1 if something would keep MODEL from running.
    """
    examination = Examination()
    examination.examine_host()
    path = find_model(model) if model is not None else examination.probe("the demo model", lambda: find_model(None))
    if path is not None:
        examination.examine_model(path)
    if as_json:
        print_json({**examination.facts, "findings": examination.findings})
    else:
        for name, value in examination.facts.items():
            click.echo(f"{name:<28}{_shown(name, value)}")
        for finding in examination.findings:
            click.echo(f"{finding['severity']}: {finding['text']}")
        if not examination.findings:
            click.echo("nothing found that would slow a model down")
    if any(finding["severity"] == "error" for finding in examination.findings):
        click_ctx.exit(1)


class Examination:
    """Facts about the machine and a model, and findings drawn from them.

    Attributes:
        facts: name to value; sizes are bytes.
        findings: each a `severity` (error: will not run; warning: slow; note) and a `text` with the reason.
    """

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.findings: list[dict[str, str]] = []

    def find(self, severity: str, text: str) -> None:
        """Add a finding."""
        self.findings.append({"severity": severity, "text": text})

    def probe(self, what: str, measure: Callable[[], T]) -> T | None:
        """What `measure` returns; its failure becomes a finding, so that one broken part does not hide the rest."""
        try:
            return measure()
        except Exception as error:
            self.find("error", f"cannot examine {what}: {type(error).__name__}: {' '.join(str(error).split())}")
            return None

    def examine_host(self) -> None:
        """Versions, processor and memory."""
        self.probe("the native core", self._examine_native)
        self.probe("the processor", self._examine_processor)
        self.probe("the memory", self._examine_memory)

    def examine_model(self, path: Path) -> None:
        """A model's shape against this machine's memory and its disk."""
        self.facts["model"] = str(path)
        self.probe("the memory budget", lambda: self._examine_budget(path))
        self.probe("the disk", lambda: self._examine_disk(path))

    def _examine_native(self) -> None:
        from edgemoe import _native

        versions = _native.versions()
        self.facts["versions"] = versions
        self.facts["isa"] = _native.isa()
        built, loaded = versions.get("ggml_built_against"), versions.get("ggml_loaded")
        if built != loaded:
            self.find(
                "warning", f"edgemoe was built against ggml {built} but ggml {loaded} is loaded; reinstall edgemoe"
            )

    def _examine_processor(self) -> None:
        from edgemoe import host

        n_logical = os.cpu_count() or 1
        self.facts["cores_physical"] = _physical_cores(n_logical)
        self.facts["cores_logical"] = n_logical
        self.facts["cores_usable"] = _usable_cpus(n_logical)
        self.facts["threads_default"] = host.default_threads()

    def _examine_memory(self) -> None:
        from edgemoe import host

        total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limit_bytes = host.cgroup_memory_limit_bytes()
        self.facts["memory_bytes"] = total_bytes
        self.facts["memory_available_bytes"] = host.available_memory_bytes()
        self.facts["cgroup_limit_bytes"] = limit_bytes
        self.facts["default_budget_bytes"] = host.default_budget_bytes()
        if limit_bytes is not None and limit_bytes < total_bytes:
            self.find("note", f"a cgroup limits memory to {format_size(limit_bytes)} of {format_size(total_bytes)}")

    def _examine_budget(self, path: Path) -> None:
        from edgemoe import plan as make_plan

        plan = make_plan(path)
        if not plan.fits:
            self.find("error", does_not_fit(plan, None))
        elif plan.slots_bytes < plan.expert_bank_bytes:
            self.find(
                "note",
                f"experts will be streamed: the default budget {format_size(plan.budget_bytes)} has slots for "
                f"{plan.slots_bytes / plan.expert_bank_bytes:.0%} of {format_size(plan.expert_bank_bytes)}; "
                "a larger --memory reads less",
            )

    def _examine_disk(self, path: Path) -> None:
        from edgemoe import host
        from edgemoe.formats.gguf import read_model

        model = read_model(path)
        block_bytes = max(
            (tensor.n_bytes // model.n_experts for tensor in model.expert_tensors), default=BLOCK_BYTES_WITHOUT_EXPERTS
        )
        has_direct_io = host.direct_io_supported(path)
        speed = host.disk_bandwidth_bytes_per_s(path, block_bytes)
        self.facts["expert_block_bytes"] = block_bytes
        self.facts["token_cycle_bytes"] = model.token_cycle_bytes
        self.facts["direct_io"] = has_direct_io
        self.facts["disk_bytes_per_s"] = round(speed)
        if not has_direct_io:
            self.find(
                "warning",
                f"the file system of {path.parent} has no O_DIRECT: reads pass through the page cache, which costs "
                "time and memory outside the budget; move the model to a local ext4 or xfs",
            )
        if speed < SLOW_DISK_BYTES_PER_S and model.n_experts:
            self.find(
                "warning",
                f"the disk reads {format_size(round(speed))}/s in blocks of {format_size(block_bytes)}: a token "
                f"none of whose experts is resident waits {model.token_cycle_bytes / max(speed, 1.0):.2f} s for "
                f"{format_size(model.token_cycle_bytes)}; use a faster disk or a larger --memory",
            )


def _physical_cores(n_logical: int) -> int:
    """Cores without hyper-threads; all logical ones where the system does not tell."""
    siblings = {file.read_text() for file in CPU_TOPOLOGY.glob("cpu[0-9]*/topology/thread_siblings_list")}
    return len(siblings) or n_logical


def _usable_cpus(n_logical: int) -> int:
    """Processors that this process may use, by its affinity and the quota of its cgroup."""
    n_usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else n_logical
    if CGROUP_CPU_MAX.is_file():
        quota, period = CGROUP_CPU_MAX.read_text().split()
        if quota != "max":
            n_usable = min(n_usable, math.ceil(int(quota) / int(period)))
    return max(n_usable, 1)


def _shown(name: str, value: Any) -> str:
    """A fact as a person reads it."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if name.endswith("bytes_per_s"):
        return f"{format_size(value)}/s"
    return format_size(value) if name.endswith("_bytes") else str(value)
