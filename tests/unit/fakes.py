# SPDX-License-Identifier: MIT
"""Stand-ins of the command line's tests: a model, and the command line run in this process.

Each token of the fake model is one byte of text.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from edgemoe.cli.main import cli
from edgemoe.errors import BudgetError, TraceError
from edgemoe.profile import Profile, Split
from edgemoe.types import Plan, Stats

END = 256
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)
STATS = Stats(
    prompt_tokens=7,
    completion_tokens=5,
    prefill_tokens_per_s=90.0,
    decode_tokens_per_s=12.5,
    ttft_s=0.25,
    load_s=1.0,
    load_bytes_read=100,
    expert_hits=30,
    expert_misses=10,
    expert_late_hits=0,
    expert_bytes_read=4096,
    bytes_per_token=256.0,
    prefetch_used_bytes=2048,
    prefetch_late_bytes=1024,
    prefetch_wasted_bytes=512,
    stall_s=0.5,
    n_slots=16,
    slots_bytes=1 << 20,
    peak_rss_bytes=1 << 28,
    budget_bytes=1 << 29,
    kernels="avx512_vnni, ggml for Q5_0",
)
PLAN = Plan(
    fits=True,
    budget_bytes=1 << 30,
    floor_bytes=300 << 20,
    dense_bytes=100 << 20,
    kv_bytes=64 << 20,
    buffers_bytes=32 << 20,
    slots_bytes=200 << 20,
    slack_bytes=16 << 20,
    token_cycle_bytes=88 << 20,
    expert_bank_bytes=400 << 20,
    n_experts=8,
    n_experts_used=2,
    n_moe_layers=30,
)


PROFILE = Profile(
    prefill=Split(7, 0.7, *(0.1,) * 7),
    decode=Split(5, 0.05, 0.001, 0.002, 0.02, 0.015, 0.01, 0.0015, 0.0005),
    hit_rate=0.75,
    bytes_per_token=float(3 << 20),
    expert_overlap=0.4,
    router_entropy_bits=1.5,
    load_imbalance=2.25,
    load_imbalance_max=3.5,
    n_traced_tokens=5,
)


class FakeProfiler:
    """What a profile's context gives."""

    def result(self) -> Profile:
        return PROFILE


class FakeLlama:
    """A model that answers what it is told to, and keeps what it was asked."""

    answers: list[Sequence[int | BaseException]]
    prompts: list[str]
    options: dict[str, Any]
    plan = PLAN
    reuse_choice = None
    trace_fails_at: int | None = None

    def __init__(self, path: Path, **options: Any) -> None:
        type(self).options = options
        options["path"] = str(path)
        self.metadata = {"tokenizer.chat_template": TEMPLATE}
        self.budget_bytes = STATS.budget_bytes
        options["progress"]("loading", 0, 1)

    def __enter__(self) -> FakeLlama:
        return self

    def __exit__(self, *exc_info: object) -> None: ...

    def n_ctx(self) -> int:
        return int(self.options["n_ctx"])

    def token_bos(self) -> int:
        return -1

    token_eos = token_bos

    def tokenize(self, text: bytes, add_bos: bool, special: bool) -> list[int]:
        return list(text)

    def detokenize(self, tokens: list[int]) -> bytes:
        return bytes(tokens)

    def set_seed(self, seed: int) -> None:
        self.options["seed"] = seed

    def generate(self, tokens: list[int], temp: float) -> Iterator[int]:
        self.prompts.append(bytes(tokens).decode())
        self.options["temp"] = temp
        for token in self.answers.pop(0) if self.answers else []:
            if isinstance(token, BaseException):
                raise token
            yield token
        while True:
            yield END

    def stats(self) -> Stats:
        return dataclasses.replace(STATS, budget_bytes=self.budget_bytes)

    def set_memory(self, size: int) -> None:
        if size < PLAN.floor_bytes:
            raise BudgetError("budget 1 MiB is below the floor 300 MiB; use --memory 300MiB")
        self.budget_bytes = size

    @contextlib.contextmanager
    def record_trace(self, path: Path) -> Iterator[Callable[[], None]]:
        n_checks = 0

        def check() -> None:
            nonlocal n_checks
            n_checks += 1
            if n_checks == self.trace_fails_at:
                raise TraceError(f"the disk is full (token {n_checks})")

        yield check
        path.write_text(f"{n_checks} checks")

    @contextlib.contextmanager
    def profile(self) -> Iterator[FakeProfiler]:
        self.prompts.append("profile begins")
        yield FakeProfiler()
        self.prompts.append("profile ends")

    def reset(self) -> None:
        self.prompts.append("reset")


def run(*args: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli, args, input=stdin, prog_name="edgemoe")


def error_lines(result: Result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("edgemoe: error: ")]
