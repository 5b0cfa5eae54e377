# SPDX-License-Identifier: MIT
"""Models that several test files share, each written once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from benchmarks import synthetic

# An example that takes long says that the machine is busy.
settings.register_profile("shared machine")
settings.load_profile("shared machine")

ModelWriter = Callable[..., Path]


@pytest.fixture(autouse=True)
def _own_warm_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts cold, and leaves nothing in the user's cache; its subprocesses do likewise."""
    monkeypatch.setenv("EDGEMOE_WARM_DIR", str(tmp_path / "warm-starts"))


@pytest.fixture(scope="session")
def write_model(tmp_path_factory: pytest.TempPathFactory) -> ModelWriter:
    """Writes a tiny model as `synthetic.write_model`; equal arguments give the same file, to be left as it is."""
    folder = tmp_path_factory.mktemp("models")
    written: dict[str, Path] = {}

    def write(arch: str = "olmoe", **options: Any) -> Path:
        key = f"{arch} {sorted(options.items())}"
        if key not in written:
            written[key] = synthetic.write_model(folder / f"{arch}-{len(written)}.gguf", arch, **options)
        return written[key]

    return write
