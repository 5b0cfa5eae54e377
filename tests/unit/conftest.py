# SPDX-License-Identifier: MIT
"""Fixtures of the command line's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgemoe
from edgemoe.cli import completion
from tests.unit.fakes import END, FakeLlama


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> type[FakeLlama]:
    """Puts the fake in the place of `edgemoe.Llama`; its class keeps the answers and what was asked."""

    class Fresh(FakeLlama):
        pass

    Fresh.answers, Fresh.prompts, Fresh.options = [], [], {}

    monkeypatch.setitem(vars(edgemoe), "Llama", Fresh)
    monkeypatch.setattr(completion, "is_end_of_generation", lambda llm, token: token == END)
    return Fresh


@pytest.fixture
def model(tmp_path: Path) -> str:
    """The path of a file that exists; the fakes do not read it."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return str(path)
