# SPDX-License-Identifier: MIT
"""`edgemoe doctor`: what this machine has, and what would make a model slow on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from edgemoe.cli.console import find_model, print_json
from edgemoe.cli.options import json_option, model_argument
from edgemoe.cli.plan import does_not_fit
from edgemoe.errors import EdgeMoeError
from edgemoe.sizes import format_size

T = TypeVar("T")

SLOW_DISK_BYTES_PER_S = 500e6
BLOCK_BYTES_WITHOUT_EXPERTS = 1 << 20
PORTABLE_ISA = "scalar"
"""Our kernels without an instruction set: an oracle for the others, used only if EDGEMOE_ISA says so."""


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
            message = " ".join(str(error).split())
            if not isinstance(error, EdgeMoeError):
                self.find("error", f"cannot examine {what}: {type(error).__name__}: {message}")
            elif not any(message in finding["text"] for finding in self.findings):  # one cause stops several parts
                self.find("error", f"cannot examine {what}: {message}")
            return None

    def examine_host(self) -> None:
        """Versions, processor and memory."""
        self.probe("the native core", self._examine_native)
        self.probe("the kernels", self._examine_kernels)
        self.probe("the processor", self._examine_processor)
        self.probe("the memory", self._examine_memory)

    def examine_model(self, path: Path) -> None:
        """A model's shape against this machine's memory and its disk."""
        self.facts["model"] = str(path)
        self.probe("the kernels for the model", lambda: self._examine_formats(path))
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

    def _examine_kernels(self) -> None:
        from edgemoe import _native

        isas = _native.isas()
        supported = [isa.name for isa in isas if isa.is_supported]
        self.facts["kernels_compiled"] = [isa.name for isa in isas]
        self.facts["kernels_supported"] = supported
        self.facts["EDGEMOE_ISA"] = os.environ.get("EDGEMOE_ISA")
        self.facts["kernels_active"] = None  # until it is known that EDGEMOE_ISA can be had
        active = _native.active_isa()
        is_forced = bool(self.facts["EDGEMOE_ISA"])
        self.facts["kernels_active"] = "ggml" if active == PORTABLE_ISA and not is_forced else active
        if supported and active != supported[0]:
            self.find(
                "warning",
                f"EDGEMOE_ISA={active} keeps edgemoe's kernels from {supported[0]}, which this processor has and which "
                "is faster; unset it",
            )
        elif active == PORTABLE_ISA:
            compiled = ", ".join(name for name in self.facts["kernels_compiled"] if name != PORTABLE_ISA)
            multiplies = "edgemoe's portable code multiplies; unset EDGEMOE_ISA" if is_forced else "ggml multiplies"
            self.find(
                "warning",
                f"this processor has none of the instruction sets that edgemoe's kernels are fast with "
                f"({compiled or 'none compiled'}): {multiplies}",
            )

    def _examine_formats(self, path: Path) -> None:
        from edgemoe import _native, runtime
        from edgemoe.formats.gguf import read_model

        model = read_model(path)
        if not model.expert_tensors:
            return
        paths = runtime.examine_formats(model)
        isa = _native.active_isa() if any(p.n_own for p in paths) else ""
        self.facts["kernels_of_formats"] = {p.type_name: runtime.kernels_used([p], isa) for p in paths}
        for p in paths:
            has_format = _native.find_format(p.type_name) != 0
            if p.n_own == p.n_tensors or (has_format and self.facts.get("kernels_active") == "ggml"):
                continue  # the latter has been said, of all formats
            reason = f"{p.type_name} has no fast path" + (" for rows of this length" if has_format else "")
            self.find("warning", f"{reason}: ggml's dot products multiply {p.n_tensors - p.n_own} expert tensors")

    def _examine_processor(self) -> None:
        from edgemoe import host, topology

        allowed = topology.allowed_cpus()
        n_logical = os.cpu_count() or 1
        self.facts["cores_physical"] = topology.n_physical_cores(set(range(n_logical)))
        self.facts["cores_logical"] = n_logical
        self.facts["cores_usable"] = topology.n_usable_cpus(allowed, host.cgroup_dirs("cpu"))
        self.facts["cores_fast"] = topology.n_physical_cores(topology.fast_cpus(allowed))
        self.facts["threads_default"] = topology.default_threads()

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


def _shown(name: str, value: Any) -> str:
    """A fact as a person reads it."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if value is None:
        return "none"
    if name.endswith("bytes_per_s"):
        return f"{format_size(value)}/s"
    return format_size(value) if name.endswith("_bytes") else str(value)
