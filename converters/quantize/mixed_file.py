# SPDX-License-Identifier: MIT
"""MIXED.toml: a preset, and the types of tensors that are to have another one.

    base = "Q4_K_M"

    [types]
    '^blk\\.0\\.ffn_down_exps\\.weight$' = "Q6_K"
    'ffn_(gate|up)_exps' = "Q3_K"

The keys are regular expressions that may match anywhere in a tensor's name; the first one in the file that does is
used. What the blocks of a type do not fit gets a fallback, as with presets.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

from gguf import GGMLQuantizationType as GgmlType

from edgemoe.errors import ConversionError

from .blocks import QUANTIZABLE
from .presets import Override, find_preset

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclasses.dataclass(frozen=True)
class MixedTypes:
    """What a file says: the preset, and the types that come before its own."""

    base: str
    overrides: tuple[Override, ...]


def read_mixed(path: Path) -> MixedTypes:
    """Read a MIXED.toml.

    Raises:
        ConversionError: it cannot be read, is no TOML, or has anything else than the two keys, presets and types.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConversionError(f"cannot read {path}: {error}; write TOML with `base` and `[types]`") from error
    if unknown := sorted(content.keys() - {"base", "types"}):
        raise ConversionError(f"cannot use {path}: found the key {unknown[0]!r}, expected `base` and `[types]` only")
    base, types = content.get("base"), content.get("types", {})
    if not isinstance(base, str) or not isinstance(types, dict):
        raise ConversionError(
            f"cannot use {path}: expected the name of a preset (base) and a table of patterns and types ([types])"
        )
    return MixedTypes(find_preset(base), tuple(_override(path, pattern, name) for pattern, name in types.items()))


def format_mixed(base: str, overrides: tuple[Override, ...], comments: tuple[str, ...] = ()) -> str:
    """The content of a MIXED.toml that says so; `comments` become lines at its head."""
    lines = [*(f"# {comment}" for comment in comments), f'base = "{base}"', "", "[types]"]
    for override in overrides:
        key = f"'{override.pattern}'"  # literal: TOML reads no escapes in it
        if "'" in override.pattern or not override.pattern.isprintable():
            raise ConversionError(f"cannot write the pattern {override.pattern!r}: it has quotes or control characters")
        lines.append(f'{key} = "{override.ggml_type.name}"')
    return "\n".join(lines) + "\n"


def override_of(tensor_name: str, ggml_type: GgmlType) -> Override:
    """The type of one tensor and no other."""
    return Override(f"^{re.escape(tensor_name)}$", ggml_type)


def _override(path: Path, pattern: str, name: object) -> Override:
    known = {ggml_type.name: ggml_type for ggml_type in QUANTIZABLE}
    ggml_type = known.get(name.upper()) if isinstance(name, str) else None
    if ggml_type is None:
        raise ConversionError(
            f"cannot use {path}: found the type {name!r} for {pattern!r}, expected one of {', '.join(sorted(known))}"
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConversionError(
            f"cannot use {path}: the pattern {pattern!r} is no regular expression: {error}"
        ) from error
    return Override(pattern, ggml_type)
