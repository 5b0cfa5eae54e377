# SPDX-License-Identifier: MIT
"""`edgemoe plan`: where the bytes of a memory budget go, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemoe.cli.console import find_model, print_json
from edgemoe.cli.onnx_folder import folder_options, is_folder
from edgemoe.cli.options import json_option, load_options, model_argument
from edgemoe.sizes import format_size

if TYPE_CHECKING:
    from edgemoe.types import Plan

    PlanContext = Callable[[int, int | None], Plan]  # of a context in tokens, and a budget instead of the given one

SMALLEST_ADVISED_CTX = 512


@click.command()
@model_argument
@load_options
@json_option
@click.pass_context
def plan(click_ctx: click.Context, model: Path | None, as_json: bool, load: dict[str, Any]) -> None:
    """Show where the memory would go.

    The options are those with which the model will be loaded; --eviction and --warm-start take no memory that counts.

    Exits with 1 if the model does not fit into the budget, and says what would make it fit.
    """
    if model is not None and is_folder(model):
        path, n_ctx, plan_ctx = model.resolve(), *_folder_plans(model, load)
    else:
        path = find_model(model)
        n_ctx, plan_ctx = _gguf_plans(path, load)
    made = plan_ctx(n_ctx, None)
    if as_json:
        print_json(made.to_dict())
    else:
        click.echo(f"{path.name}, context {n_ctx}")
        click.echo(plan_table(made))
        if made.fits:
            click.echo(f"fits: {format_size(made.budget_bytes)} is at or above the floor")
        else:
            click.echo(does_not_fit(made, _fitting_ctx(n_ctx, lambda n: plan_ctx(n, made.budget_bytes).fits)))
    if not made.fits:
        click_ctx.exit(1)


def plan_table(plan: Plan) -> str:
    """A plan as lines of text: the parts and their sum, the limits, the experts."""
    parts = [
        ("dense weights", plan.dense_bytes),
        ("KV cache", plan.kv_bytes),
        ("buffers, process", plan.buffers_bytes),
        *([("draft model", plan.draft_bytes)] if plan.draft_bytes else []),
        ("expert slots", plan.slots_bytes),
        ("slack", plan.slack_bytes),
    ]
    total_bytes = sum(n_bytes for _, n_bytes in parts)
    rows = [*parts, ("total", total_bytes), ("budget", plan.budget_bytes), ("floor", plan.floor_bytes)]
    lines = [f"  {name:<16}{format_size(n_bytes):>10}" for name, n_bytes in rows]
    lines.insert(len(parts), "  " + "-" * 26)
    if plan.n_experts == 0:
        return "\n".join([*lines, "  no routed experts: everything is resident"])
    lines.append(
        f"  of the buffers: prefetch {format_size(plan.prefetch_bytes)}; drafts take up to "
        f"{format_size(plan.draft_buffers_bytes)} of the slots"
    )
    share = min(plan.slots_bytes / plan.expert_bank_bytes, 1.0) if plan.expert_bank_bytes else 1.0
    lines.append(
        f"  experts: {plan.n_experts_used} of {plan.n_experts} in each of {plan.n_moe_layers} layers; "
        f"one token uses {format_size(plan.token_cycle_bytes)} of {format_size(plan.expert_bank_bytes)}, "
        f"the slots hold {share:.0%}"
    )
    return "\n".join(lines)


def does_not_fit(plan: Plan, n_ctx_fitting: int | None) -> str:
    """Why a plan does not fit and what would make it fit."""
    smallest = f"--memory {-(-plan.floor_bytes // 2**20)}MiB"
    ways = smallest if n_ctx_fitting is None else f"{smallest} or --ctx {n_ctx_fitting}"
    return (
        f"does not fit: budget {format_size(plan.budget_bytes)} is below the floor {format_size(plan.floor_bytes)}; "
        f"use {ways}"
    )


def _gguf_plans(path: Path, load: dict[str, Any]) -> tuple[int, PlanContext]:
    from edgemoe import plan as make_plan

    options = {**load, "n_threads_batch": load["n_threads"]}

    def plan_ctx(n_ctx: int, memory: int | None) -> Plan:
        return make_plan(path, **{**options, "n_ctx": n_ctx, "memory": memory or options["memory"]})

    return load["n_ctx"], plan_ctx


def _folder_plans(path: Path, load: dict[str, Any]) -> tuple[int, PlanContext]:
    options = folder_options(load)
    from edgemoe.onnx_folder import plan_folder, read_folder

    def plan_ctx(n_ctx: int, memory: int | None) -> Plan:
        return plan_folder(path, memory or options["memory"], n_ctx, options["prefetch"])

    return read_folder(path).context(options["n_ctx"]), plan_ctx


def _fitting_ctx(n_ctx: int, fits: Callable[[int], bool]) -> int | None:
    """The largest context, among halvings of `n_ctx`, that fits; None if none does."""
    n_ctx //= 2
    while n_ctx >= SMALLEST_ADVISED_CTX:
        if fits(n_ctx):
            return n_ctx
        n_ctx //= 2
    return None
