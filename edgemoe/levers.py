# SPDX-License-Identifier: MIT
"""Levers: sets of lossy options whose price can be measured, and how they are written.

A lever is written as `reuse_bias=0.1,top_j=1`: keywords of `Llama`, with commas between them. `model=PATH` measures
another file of the same model, such as one whose routers were tuned, against the exact row of the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgemoe import expert_count, on_miss, reuse

_OF_MISS = ("on_miss", "on_miss_mass", "on_miss_skip_mass", "lowbit")
LEVER_KEYWORDS = ("reuse_bias", "reuse_method", "top_j", "expert_top_k", *_OF_MISS)
"""The keywords of `Llama` that a lever may set, in the order in which it is written."""


def _strength(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(text)
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _method(text: str) -> str:
    if text not in reuse.METHODS:
        raise ValueError(text)
    return text


def _top_k(text: str) -> str:
    expert_count.parse(text)
    return text


def _on_miss(text: str) -> str:
    if text not in on_miss.ACTIONS:
        raise ValueError(text)
    return text


_CONVERTERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "reuse_bias": (_strength, "a number from 0 to 1"),
    "reuse_method": (_method, f"one of {', '.join(reuse.METHODS)}"),
    "top_j": (_count, "a whole number of at least 1"),
    "expert_top_k": (_top_k, expert_count.FORMS),
    "on_miss": (_on_miss, f"one of {', '.join(on_miss.ACTIONS)}"),
    "on_miss_mass": (_strength, "a number from 0 to 1"),
    "on_miss_skip_mass": (_strength, "a number from 0 to 1"),
    "lowbit": (str, "a file"),
}
"""For each of them what makes its value of a text, or raises ValueError, and what it expects."""
_MODEL = "model"
_OF_REUSE = ("reuse_method", "top_j")


@dataclasses.dataclass(frozen=True)
class Lever:
    """One setting.

    Attributes:
        keywords: names and values of `Llama`'s keywords, in the order of `LEVER_KEYWORDS`.
        model: the file to load instead; None for the model that is measured.
    """

    keywords: tuple[tuple[str, Any], ...] = ()
    model: Path | None = None

    @classmethod
    def of(cls, *, model: str | Path | None = None, **keywords: Any) -> Lever:
        """A lever of these keywords; those that are None are left out.

        Raises:
            ValueError: one is no lever, or none of them changes anything.
        """
        for name in keywords:
            if name not in LEVER_KEYWORDS:
                raise ValueError(f"unknown lever {name!r}: expected {', '.join((*LEVER_KEYWORDS, _MODEL))}")
        given = tuple((name, keywords[name]) for name in LEVER_KEYWORDS if keywords.get(name) is not None)
        names = [name for name, _ in given]
        for name in _OF_REUSE:
            if name in names and "reuse_bias" not in names:
                raise ValueError(f"{name} without reuse_bias changes nothing: expected both")
        for name in _OF_MISS[1:]:
            if name in names and "on_miss" not in names:
                raise ValueError(f"{name} without on_miss changes nothing: expected both")
        if not given and model is None:
            raise ValueError("the lever is empty: expected at least one keyword, such as reuse_bias=0.1")
        return cls(given, None if model is None else Path(model))

    def get(self, name: str) -> Any:
        """The value of a keyword; None where the lever does not set it."""
        return dict(self.keywords).get(name)

    @property
    def name(self) -> str:
        """As it is written, of another model the file's name only; `exact` where nothing is changed."""
        parts = [f"{name}={value}" for name, value in self.keywords]
        parts += [] if self.model is None else [f"{_MODEL}={self.model.name}"]
        return ",".join(parts) or "exact"

    @property
    def family(self) -> str:
        """The name without its numbers: levers of one family are points of one curve."""
        parts = [name if isinstance(value, float) else f"{name}={value}" for name, value in self.keywords]
        return ",".join(parts + ([] if self.model is None else [f"{_MODEL}={self.model.name}"]))

    @property
    def strength(self) -> str:
        """The numbers that `family` leaves out."""
        return ",".join(f"{value:.3g}" for _, value in self.keywords if isinstance(value, float))


EXACT = Lever()


def parse(text: str) -> Lever:
    """Read a lever as it is written.

    Raises:
        ValueError: it is not written as a lever, or names something unknown.
    """
    keywords: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        where = f"cannot read the lever {text!r}"
        if not (equals and name and value):
            raise ValueError(f"{where}: found {part.strip()!r}, expected NAME=VALUE with commas between them")
        if name in keywords:
            raise ValueError(f"{where}: it has {name} twice")
        if name != _MODEL and name not in LEVER_KEYWORDS:
            raise ValueError(f"{where}: unknown name {name!r}, expected {', '.join((*LEVER_KEYWORDS, _MODEL))}")
        convert, expected = _CONVERTERS.get(name, (str, ""))
        try:
            keywords[name] = convert(value)
        except ValueError as error:
            raise ValueError(f"{where}: {name} is {value!r}, expected {expected}") from error
    return Lever.of(**keywords)
