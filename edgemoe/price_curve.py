# SPDX-License-Identifier: MIT
"""What `edgemoe price` has measured of a reuse bias, remembered for each model, and the bias that a price allows.

A *curve* is what each strength of one method costs at one share of experts in memory, text by text. One small file per
model keeps up to `MAX_CURVES` of them, beside the file of its warm start (see `edgemoe.warm`), which tells models
apart. The file is JSON: an object with `format`, `version`, `model_key`, `curves` (the latest first) and `crc32`, that
of all else as JSON with sorted keys and without spaces. It holds losses, and neither texts nor their names. What is
wrong with it is said, and then it counts as missing.

`reuse_bias="auto"` takes the strongest bias that was measured and that costs no more than `reuse_price`, with 95 %
confidence. Nothing is interpolated.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import math
import shlex
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgemoe import reuse, runtime, warm
from edgemoe.errors import PriceError
from edgemoe.formats.gguf import GgufModel
from edgemoe.price_change import ADVISED_TEXTS, Change, paired
from edgemoe.warm import UnusableError

DEFAULT_PRICE = 0.01
MAX_CURVES = 16
SHARE_TOLERANCE = 0.05
"""By this part of it a run's share may be below a curve's. With less in memory the same bias costs more, about as the
logarithm of the share: on the tiny trained model (docs/routing.md) 0.3 costs 0.19 % of perplexity more with 12 % than
with 25 %, so 0.013 % more with 5 % less memory."""

_FORMAT = "edgemoe price curves"
_VERSION = 1  # another one, too, when a bias of the same strength comes to mean something else
_MAX_TEXTS = 1 << 16
_log = logging.getLogger("edgemoe")


@dataclasses.dataclass(frozen=True)
class Point:
    """One strength: cross-entropy of each text, nats per token, and bytes of experts read per decoded token."""

    strength: float
    cross_entropies: tuple[float, ...]
    bytes_per_token: float


@dataclasses.dataclass(frozen=True)
class Curve:
    """What the strengths of one method cost.

    Attributes:
        method, top_j: of the bias; `top_j` is never None here.
        resident_share: how many of the experts were in memory, above 0 and up to 1.
        eviction: as for `Llama`.
        measured_at: when, in ISO 8601.
        n_tokens: predicted in each text.
        cross_entropies, bytes_per_token: of the exact model, as in `Point`.
        points: by strength, the weakest first.
    """

    method: str
    top_j: int
    resident_share: float
    eviction: str
    measured_at: str
    n_tokens: tuple[int, ...]
    cross_entropies: tuple[float, ...]
    bytes_per_token: float
    points: tuple[Point, ...]

    def change(self, point: Point) -> Change:
        """What a point costs against the exact model."""
        return paired(self.n_tokens, self.cross_entropies, point.cross_entropies)

    def replaces(self, other: Curve) -> bool:
        """Whether this is a newer measurement of the same: method, top-J and, to a whole percent, the share."""
        return (self.method, self.top_j, round(100 * self.resident_share)) == (
            other.method,
            other.top_j,
            round(100 * other.resident_share),
        )

    def source(self, eviction: str) -> str:
        """The measurement in words, for a run with that `eviction`."""
        n_texts = len(self.n_tokens)
        same = "" if eviction == self.eviction else f" (here {eviction})"
        return (
            f"measured {self.measured_at[:10]} on {n_texts} text{'s' if n_texts > 1 else ''} with "
            f"{self.resident_share:.0%} of the experts in memory, eviction {self.eviction}{same}"
        )


# ---------------------------------------------------------------- the file


def pack(key: bytes, curves: Sequence[Curve]) -> bytes:
    """The content of a file."""
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "model_key": key.hex(),
        "curves": [dataclasses.asdict(c) for c in curves],
    }
    return json.dumps({**content, "crc32": _checksum(content)}, indent=1).encode() + b"\n"


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def unpack(data: bytes, key: bytes) -> list[Curve]:
    """The curves in a file's content.

    Raises:
        UnusableError: it is corrupt, of another version, or of another model.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UnusableError("it is no JSON") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise UnusableError(f"it has no format {_FORMAT!r}")
    if content.get("version") != _VERSION:
        raise UnusableError(f"it has version {content.get('version')!r}, expected {_VERSION}")
    crc = content.pop("crc32", None)
    if crc != _checksum(content):
        raise UnusableError(f"its checksum is {_checksum(content)}, expected {crc!r}")
    if content.get("model_key") != key.hex():
        raise UnusableError("it is of another model")
    try:
        return [_curve(fields) for fields in content["curves"]]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UnusableError(f"one of its curves is wrong: {error}") from error


def _curve(fields: dict[str, Any]) -> Curve:
    points = tuple(
        Point(_number(p["strength"], 0, 1), _numbers(p["cross_entropies"]), _number(p["bytes_per_token"]))
        for p in fields["points"]
    )
    curve = Curve(
        method=_text(fields["method"]),
        top_j=_count(fields["top_j"]),
        resident_share=_number(fields["resident_share"], 0, 1),
        eviction=_text(fields["eviction"]),
        measured_at=datetime.datetime.fromisoformat(fields["measured_at"]).isoformat(),
        n_tokens=tuple(_count(n) for n in fields["n_tokens"]),
        cross_entropies=_numbers(fields["cross_entropies"]),
        bytes_per_token=_number(fields["bytes_per_token"]),
        points=points,
    )
    strengths = [p.strength for p in points]
    if not strengths or strengths != sorted(set(strengths)):
        raise ValueError(f"its strengths are {strengths}, expected some, in order")
    n_texts = len(curve.n_tokens)
    counts = {len(curve.cross_entropies), *(len(p.cross_entropies) for p in points)}
    if not 0 < n_texts <= _MAX_TEXTS or counts != {n_texts}:
        raise ValueError(f"it has {n_texts} texts, expected as many for each point, and at least one")
    if curve.method not in reuse.METHODS or curve.resident_share == 0:
        raise ValueError(f"its method is {curve.method!r} and its share {curve.resident_share}")
    return curve


def _number(value: object, low: float = 0, high: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or value == math.inf:
        raise ValueError(f"it has {value!r}, expected a number from {low} to {high}")
    return float(value)


def _numbers(values: Sequence[object]) -> tuple[float, ...]:
    return tuple(_number(v) for v in values)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"it has {value!r}, expected a text")
    return value


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"it has {value!r}, expected a whole number of at least 1")
    return value


def path_of(key: bytes) -> Path:
    """Where the curves of a model are."""
    return warm.default_dir() / f"{key.hex()[:32]}.price"


def load(model: GgufModel) -> list[Curve]:
    """The curves of a model, the latest first; none where there is no file that can be used, and why not is logged."""
    try:
        key = warm.model_key(model)
        path = path_of(key)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        _log.warning("cannot look for a remembered price of %s: %s", model.path, error)
        return []
    try:
        data = warm.read_content(path)
        return [] if data is None else unpack(data, key)
    except UnusableError as why:
        _log.warning("cannot use the remembered prices of %s: %s (%s); measure them again", model.path, why, path)
        return []


def remember(model: GgufModel, curves: Sequence[Curve]) -> list[Curve]:
    """Add curves to a model's file; each takes the place of an older one of the same share, method and top-J.

    One of a single text, which has no confidence, does not take the place of one of several. The result is what
    was added.

    Raises:
        OSError: the file cannot be written.
        RuntimeError: there is no home directory.
    """
    stored = load(model)
    added = []
    for curve in curves:
        better = [s for s in stored if curve.replaces(s) and len(s.n_tokens) > 1 == len(curve.n_tokens)]
        if better:
            _log.warning("one text has no confidence: what stays remembered is %s", better[0].source(curve.eviction))
        else:
            added.append(curve)
    kept = [s for s in stored if not any(c.replaces(s) for c in added)]
    if added:
        key = warm.model_key(model)
        warm.write_file(path_of(key), pack(key, [*added, *kept][:MAX_CURVES]))
    return added


# ---------------------------------------------------------------- the choice


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `reuse_bias="auto"` came to.

    Attributes:
        target: the price that was asked for: a relative change of perplexity.
        settings: the bias; None where it stays off.
        expected: the change of perplexity that was measured with it; None where it stays off.
        text: all of it in a sentence, with the measurement.
    """

    target: float
    settings: reuse.Settings | None
    expected: float | None
    text: str

    def stats(self) -> dict[str, float | None]:
        """The fields of `Stats`."""
        return {"reuse_price_target": self.target, "reuse_price_expected": self.expected}


@dataclasses.dataclass(frozen=True)
class Request:
    """What `Llama` was asked for; with a `price` it is `auto`, and the strength in `settings` means nothing."""

    settings: reuse.Settings | None
    price: float | None = None

    def choose(self, model: GgufModel, slots_bytes: int, eviction: str) -> Choice | None:
        """Choose by what is remembered of this model; None unless this is `auto`.

        Raises:
            PriceError: nothing remembered says what a bias costs with so much memory for experts.
        """
        if self.price is None or self.settings is None:
            return None
        wanted = self.settings
        top_j = wanted.top_j or reuse.default_top_j(model.n_experts, model.n_experts_used)
        share = resident_share(model, slots_bytes)
        curves = [c for c in load(model) if (c.method, c.top_j) == (wanted.method, top_j)]
        command = _command(model, wanted, share, eviction)
        return pick(curves, dataclasses.replace(wanted, top_j=top_j), self.price, share, eviction, command)

    def choose_again(self, model: GgufModel, slots_bytes: int, eviction: str) -> Choice | None:
        """The same for a model in use whose memory has changed: what cannot be answered leaves the bias off."""
        try:
            return self.choose(model, slots_bytes, eviction)
        except PriceError as error:
            assert self.price is not None
            return Choice(self.price, None, None, f"reuse bias auto: off from now on; {error}")


def parse(
    reuse_bias: str | float = "off",
    reuse_method: str = "cache-prior",
    top_j: int | None = None,
    reuse_price: str | float | None = None,
) -> Request:
    """Check the keywords of `Llama` by themselves.

    Raises:
        ValueError: one of them makes no sense, or a number was given for the bias and a price as well.
    """
    price = None if reuse_price is None else parse_price(reuse_price)
    if reuse_bias != "auto" and (price is None or reuse_bias != "off"):
        settings = reuse.parse(reuse_bias, reuse_method, top_j)
        if price is not None:
            raise ValueError(
                f"reuse_bias {reuse_bias!r} and reuse_price {reuse_price!r} exclude each other: expected a strength, "
                "or a price for which auto finds one"
            )
        return Request(settings)
    return Request(reuse.parse(0.0, reuse_method, top_j), DEFAULT_PRICE if price is None else price)


def parse_price(price: str | float) -> float:
    """A price as people write it: `1%`, or 0.01, is 1 % of perplexity.

    Raises:
        ValueError: it is no number, or not above 0 and below 100 %.
    """
    try:
        number = str(price).strip()
        value = float(number[:-1]) / 100 if number.endswith("%") else float(number)
    except ValueError:
        value = math.nan
    if isinstance(price, bool) or not 0 < value < 1:
        raise ValueError(f"reuse_price is {price!r}: expected more than 0 and less than 100 %, such as 1% or 0.01")
    return value


def resident_share(model: GgufModel, slots_bytes: int) -> float:
    """How many of the experts that much memory holds, 0 to 1."""
    return min(1.0, slots_bytes / int(runtime.slot_sizes(model, 0).bank_slot_bytes))


def pick(
    curves: Sequence[Curve], wanted: reuse.Settings, price: float, share: float, eviction: str, command: str
) -> Choice:
    """The strongest bias, of the curves of one method and top-J, that costs at most `price` with 95 % confidence.

    It is the last before the first that may cost more: bounds that are tested in an order fixed beforehand, up to the
    first that fails, are as certain together as one alone. It comes from the curve with the greatest share that is not
    above the run's `share` by more than `SHARE_TOLERANCE` of it: with more memory the same bias costs less, not more.

    Raises:
        PriceError: there is no curve, none of so small a share, or only one of a single text; `command` measures one.
    """
    what = f"{wanted.method}, top-j {wanted.top_j}"
    failed = "cannot choose a reuse bias by its price"
    if not curves:
        raise PriceError(f"{failed}: found no measurement of this model with {what}; run: {command}")
    fitting = [c for c in curves if c.resident_share <= share * (1 + SHARE_TOLERANCE)]
    if not fitting:
        least = min(c.resident_share for c in curves)
        raise PriceError(
            f"{failed}: found measurements with {least:.0%} of the experts in memory or more, expected {share:.1%} or "
            f"less, as here, for a bias costs more with less memory ({what}); run: {command}"
        )
    curve = max((c for c in fitting if len(c.n_tokens) > 1), key=lambda c: c.resident_share, default=None)
    if curve is None:
        raise PriceError(
            f"{failed}: found a measurement on 1 text, which has no confidence, expected {ADVISED_TEXTS} texts or more "
            f"({what}); run: {command}"
        )
    chosen: tuple[Point, Change] | None = None
    refused = ""
    for point in curve.points:
        change = curve.change(point)
        bound = change.perplexity_bound
        assert bound is not None  # there are several texts
        if bound > price:
            refused = f"{point.strength:.3g} may cost {_percent(bound)}"
            break
        chosen = (point, change)
    source = curve.source(eviction)
    if chosen is None or chosen[0].strength == 0:
        text = (
            f"reuse bias auto: off, for none that was measured is certain enough to cost at most {_percent(price)} of "
            f"perplexity ({refused or 'only 0 was'}; {what}); {source}"
        )
        return Choice(price, None, None, text)
    point, change = chosen
    assert change.perplexity_bound is not None
    text = (
        f"reuse bias auto: {point.strength:.3g} ({what}) for at most {_percent(price)} of perplexity: "
        f"{change.perplexity:+.2%} expected, at most {change.perplexity_bound:+.2%} with 95% confidence"
        f"{', while ' + refused if refused else ''}; {source}"
    )
    return Choice(price, dataclasses.replace(wanted, strength=point.strength), change.perplexity, text)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _command(model: GgufModel, wanted: reuse.Settings, share: float, eviction: str) -> str:
    """The measurement that would answer, ready for a shell."""
    words = ["edgemoe", "price", str(model.path), "--experts", f"{math.ceil(1e4 * share) / 1e4:g}"]
    if wanted.method != "cache-prior":
        words += ["--reuse-method", wanted.method]
    if wanted.top_j is not None:
        words += ["--top-j", str(wanted.top_j)]
    if eviction != "auto":
        words += ["--eviction", eviction]
    return shlex.join(words) + f" --text FILE... ({ADVISED_TEXTS} texts or more, of the kind that it is for)"
