# SPDX-License-Identifier: MIT
"""Remembered prices: what was written is read and nothing else is believed; and which bias a price allows."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from edgemoe import price_curve, warm
from edgemoe.errors import PriceError
from edgemoe.formats.gguf import GgufModel, read_model
from edgemoe.price_curve import Choice, Curve, Point, pick
from edgemoe.reuse import Settings
from edgemoe.warm import UnusableError
from tests.conftest import ModelWriter

KEY = bytes(range(32))
WANTED = Settings(0.0, "cache-prior", 2)
N_TEXTS = 10


def _curve(costs: dict[float, float], *, share: float = 0.25, n_texts: int = N_TEXTS, **changes: Any) -> Curve:
    """Of strengths and the cross-entropy that each costs; its standard error is 0.001 with 10 texts of one length."""
    exact = tuple(2.0 + 0.1 * i for i in range(n_texts))
    # Of differences +-d about the mean the standard deviation is d sqrt(n / (n - 1)), so the error is d / sqrt(n - 1).
    spread = 0.001 * math.sqrt(max(n_texts - 1, 1))
    points = tuple(
        Point(strength, tuple(e + cost + spread * (-1) ** i for i, e in enumerate(exact)), 500.0)
        for strength, cost in costs.items()
    )
    fields = {"method": "cache-prior", "top_j": 2, "eviction": "auto", "measured_at": "2026-01-31T12:00:00+00:00"}
    return Curve(
        **{**fields, **changes},
        resident_share=share,
        n_tokens=(100,) * n_texts,
        cross_entropies=exact,
        bytes_per_token=1000.0,
        points=points,
    )


CURVE = _curve({0.05: 0.001, 0.1: 0.003, 0.2: 0.012, 0.3: 0.004})


def _pick(*curves: Curve, price: float = 0.01, share: float = 0.25, eviction: str = "auto") -> Choice:
    return pick(curves, WANTED, price, share, eviction, "edgemoe price m.gguf")


# ---------------------------------------------------------------- the file


def test_what_is_packed_is_unpacked() -> None:
    """Guards against a field lost, or digits lost that a bound depends on."""
    curves = [CURVE, _curve({0.1: 1 / 3}, share=0.12345678901234, n_texts=1, method="max-rank", top_j=1)]
    assert price_curve.unpack(price_curve.pack(KEY, curves), KEY) == curves
    assert price_curve.unpack(price_curve.pack(KEY, []), KEY) == []


def test_no_changed_or_missing_byte_is_believed() -> None:
    """Guards against a price read from a corrupt file, anywhere that a byte can be wrong or missing."""
    curves = [_curve({0.1: 0.003}, n_texts=2)]
    data = price_curve.pack(KEY, curves)
    for at in range(len(data)):
        for flip in (0x01, 0x10, 0x80):
            changed = data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
            with contextlib.suppress(UnusableError):
                # White space may be other white space, and a last digit one that is rounded to the same number.
                assert price_curve.unpack(changed, KEY) == curves
    for n_bytes in range(len(data) - 1):
        with pytest.raises(UnusableError):
            price_curve.unpack(data[:n_bytes], KEY)


def _signed(content: Any) -> bytes:
    return json.dumps({**content, "crc32": price_curve._checksum(content)}).encode()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("method",), "best"),
        (("top_j",), 0),
        (("top_j",), 1.5),
        (("resident_share",), 0),
        (("resident_share",), 1.5),
        (("resident_share",), "0.25"),
        (("eviction",), None),
        (("measured_at",), "yesterday"),
        (("measured_at",), 5),
        (("n_tokens",), []),
        (("n_tokens", 0), 0),
        (("n_tokens", 0), True),
        (("cross_entropies", 0), float("nan")),
        (("cross_entropies", 0), float("inf")),
        (("cross_entropies", 0), 10**400),
        (("cross_entropies", 0), -1),
        (("cross_entropies",), [1.0]),
        (("points",), []),
        (("points",), {}),
        (("points", 0), "0.1"),
        (("points", 0, "strength"), 1.5),
        (("points", 0, "strength"), 0.3),  # behind the next one's
        (("points", 0, "cross_entropies"), [1.0]),
        (("points", 0, "bytes_per_token"), -1),
        ((), "curve"),
        ((), None),
    ],
)
def test_no_inconsistent_file_is_believed(path: tuple[str | int, ...], value: object) -> None:
    """Guards against a file whose checksum is right and whose numbers are impossible."""
    content = json.loads(price_curve.pack(KEY, [_curve({0.1: 0.003, 0.2: 0.01}, n_texts=2)]))
    del content["crc32"]
    assert len(price_curve.unpack(_signed(content), KEY)) == 1
    at: Any = content["curves"]
    for name in (0, *path)[:-1]:
        at = at[name]
    at[(0, *path)[-1]] = value
    with pytest.raises(UnusableError, match="one of its curves is wrong"):
        price_curve.unpack(_signed(content), KEY)


def test_what_is_of_another_model_or_version_is_named() -> None:
    """Guards against another model's prices, and against a reason that says nothing."""
    data = price_curve.pack(KEY, [CURVE])
    content = {name: value for name, value in json.loads(data).items() if name != "crc32"}
    with pytest.raises(UnusableError, match="another model"):
        price_curve.unpack(data, KEY[::-1])
    with pytest.raises(UnusableError, match="version 2, expected 1"):
        price_curve.unpack(_signed({**content, "version": 2}), KEY)
    with pytest.raises(UnusableError, match="its checksum is"):
        price_curve.unpack(data.replace(b'"strength": 0.05', b'"strength": 0.04'), KEY)
    for foreign in (b"EDGEWARM\x01", b"[]", b"{}", b"", b"[" * 100_000, _signed({**content, "format": "x"})):
        with pytest.raises(UnusableError, match=r"no JSON|no format"):
            price_curve.unpack(foreign, KEY)
    with pytest.raises(UnusableError, match="one of its curves"):
        price_curve.unpack(_signed({name: value for name, value in content.items() if name != "curves"}), KEY)


@pytest.fixture
def gguf(write_model: ModelWriter) -> GgufModel:
    """A model whose prices can be remembered."""
    return read_model(write_model("olmoe"))


def test_measurements_are_kept_until_they_are_repeated(gguf: GgufModel) -> None:
    """Guards against curves that push each other out, and an old measurement that outlives a new one."""
    assert price_curve.load(gguf) == []
    first, other_share, other_method, other_top_j = (
        CURVE,
        _curve({0.1: 0.003}, share=0.5),
        _curve({0.1: 0.003}, method="max-rank"),
        _curve({0.1: 0.003}, top_j=1),
    )
    assert price_curve.remember(gguf, [first]) == [first]
    price_curve.remember(gguf, [other_share, other_method])
    price_curve.remember(gguf, [other_top_j])
    assert price_curve.load(gguf) == [other_top_j, other_share, other_method, first]
    again = _curve({0.1: 0.004}, share=0.2512, eviction="lru")
    price_curve.remember(gguf, [again])
    assert price_curve.load(gguf) == [again, other_top_j, other_share, other_method]
    path = price_curve.path_of(warm.model_key(gguf))
    assert path.parent == warm.default_dir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    price_curve.remember(gguf, [_curve({0.1: 0.003}, share=i / 100) for i in range(1, 20)])
    assert len(price_curve.load(gguf)) == price_curve.MAX_CURVES


def test_one_text_replaces_no_better_measurement(gguf: GgufModel, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against a quick look that costs the measurement of a night."""
    single = _curve({0.1: 0.003}, n_texts=1)
    price_curve.remember(gguf, [CURVE])
    assert price_curve.remember(gguf, [single]) == []
    assert price_curve.load(gguf) == [CURVE]
    assert "what stays remembered is measured 2026-01-31 on 10 texts" in caplog.text
    elsewhere = dataclasses.replace(single, resident_share=0.5)
    assert price_curve.remember(gguf, [elsewhere]) == [elsewhere]


def test_unusable_files_are_said_and_written_anew(gguf: GgufModel, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against a start that fails, or waits, because of a file that is only a memory."""
    path = price_curve.path_of(warm.model_key(gguf))
    path.parent.mkdir(parents=True)
    path.write_bytes(price_curve.pack(KEY, [CURVE]))
    assert price_curve.load(gguf) == []
    assert "it is of another model" in caplog.text and str(path) in caplog.text
    path.unlink()
    os.mkfifo(path)
    assert price_curve.load(gguf) == []
    assert "no regular file" in caplog.text
    price_curve.remember(gguf, [CURVE])
    assert price_curve.load(gguf) == [CURVE]


# ---------------------------------------------------------------- what may be asked for


@pytest.mark.parametrize(
    ("price", "expected"), [("1%", 0.01), ("0.01", 0.01), (0.01, 0.01), (" 0.5 % ", 0.005), ("2.5%", 0.025)]
)
def test_prices_are_read(price: str | float, expected: float) -> None:
    """Guards against a percent that is taken for a whole."""
    assert price_curve.parse_price(price) == pytest.approx(expected)
    request = price_curve.parse(reuse_price=price)
    assert request.price == pytest.approx(expected)
    assert request == price_curve.parse("auto", reuse_price=price)


def test_auto_is_one_percent() -> None:
    """Guards against a price that nobody asked for, and bits that change where nothing was asked for."""
    assert price_curve.parse("auto").price == 0.01
    assert price_curve.parse() == price_curve.Request(None)
    assert price_curve.parse(0.1, "max-rank", 1) == price_curve.Request(Settings(0.1, "max-rank", 1))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"reuse_price": 0}, "reuse_price is 0: expected more than 0 and less than 100 %"),
        ({"reuse_price": -0.01}, "reuse_price is -0.01"),
        ({"reuse_price": 1}, "reuse_price is 1: .* such as 1% or 0.01"),
        ({"reuse_price": "1"}, "reuse_price is '1'"),
        ({"reuse_price": "100%"}, "reuse_price is '100%'"),
        ({"reuse_price": "cheap"}, "reuse_price is 'cheap'"),
        ({"reuse_price": "%"}, "reuse_price is '%'"),
        ({"reuse_price": math.nan}, "reuse_price is nan"),
        ({"reuse_price": True}, "reuse_price is True"),
        ({"reuse_price": 0.01, "reuse_bias": 0.1}, "reuse_bias 0.1 and reuse_price 0.01 exclude each other"),
        ({"reuse_price": 0.01, "reuse_bias": 0.0}, "exclude each other"),
        ({"reuse_price": 0.01, "reuse_bias": "high"}, "reuse_bias is 'high'"),
        ({"reuse_bias": "auto", "reuse_method": "best"}, "unknown reuse_method 'best'"),
        ({"reuse_bias": "auto", "top_j": 0}, "top_j is 0"),
    ],
)
def test_requests_that_make_no_sense_are_refused(keywords: dict[str, Any], message: str) -> None:
    """Guards against 100 % where 1 % was meant, and a price that is asked for and not kept."""
    with pytest.raises(ValueError, match=message):
        price_curve.parse(**keywords)


# ---------------------------------------------------------------- the choice


def test_the_strongest_bias_that_is_certain_enough_is_chosen() -> None:
    """Guards against means taken for bounds, two-sided for one-sided bounds, and one bias beyond the price."""
    # t with 9 degrees of freedom is 1.833 (0.95): the bound of 0.1 is 0.003 + 0.00183 = 0.00483, 0.484 % of perplexity.
    choice = _pick(CURVE, price=0.005)
    assert choice.settings == Settings(0.1, "cache-prior", 2)
    assert choice.expected == pytest.approx(math.expm1(0.003))
    assert "0.1 (cache-prior, top-j 2) for at most 0.5% of perplexity: +0.30% expected, at most +0.48%" in choice.text
    assert "measured 2026-01-31 on 10 texts with 25% of the experts in memory" in choice.text
    assert choice.stats() == {"reuse_price_target": 0.005, "reuse_price_expected": choice.expected}
    # The mean meets 0.4 %, the bound does not.
    weaker = _pick(CURVE, price=0.004)
    assert weaker.settings is not None and weaker.settings.strength == 0.05
    assert "while 0.1 may cost 0.484%" in weaker.text


def test_no_bias_beyond_one_that_costs_too_much() -> None:
    """Guards against a chance at 0.3 (0.4 %) behind a price at 0.2 (1.2 %) that is too high."""
    assert CURVE.change(CURVE.points[3]).perplexity_bound < 0.01 < CURVE.change(CURVE.points[2]).perplexity_bound  # type: ignore[operator]
    choice = _pick(CURVE, price=0.01)
    assert choice.settings is not None and choice.settings.strength == 0.1
    assert _pick(CURVE, price=0.02).settings == Settings(0.3, "cache-prior", 2)


def test_a_price_that_cannot_be_met_leaves_the_bias_off_and_says_so() -> None:
    """Guards against the weakest bias taken because there is no weaker one."""
    choice = _pick(CURVE, price=0.002)
    assert (choice.settings, choice.expected) == (None, None)
    assert choice.text.startswith("reuse bias auto: off, for none")
    assert "at most 0.2% of perplexity (0.05 may cost 0.284%;" in choice.text
    zero = _pick(_curve({0.0: 0.0, 0.1: 0.05}))
    assert zero.settings is None and "0.1 may cost" in zero.text
    assert "only 0 was" in _pick(_curve({0.0: 0.0})).text


def test_less_memory_than_was_measured_is_refused() -> None:
    """Guards against the price of much memory promised to a run with little, where the same bias costs more."""
    for share in (0.25, 0.2400, 0.5, 1.0):
        assert _pick(CURVE, share=share).settings is not None
    with pytest.raises(
        PriceError, match=r"measurements with 25% .* or more, expected 23\.0% or less, .*; run: edgemoe"
    ):
        _pick(CURVE, share=0.23)
    with pytest.raises(PriceError, match="found no measurement of this model with cache-prior, top-j 2; run: edgemoe"):
        _pick()


def test_the_nearest_share_below_is_taken() -> None:
    """Guards against a curve of more memory, and one of less memory than need be."""
    little = _curve({0.05: 0.001}, share=0.12)
    much = _curve({0.3: 0.0}, share=0.5)
    for share, strength in ((0.12, 0.05), (0.2, 0.05), (0.25, 0.1), (0.45, 0.1), (0.48, 0.3), (0.9, 0.3)):
        choice = _pick(much, little, CURVE, share=share)
        assert choice.settings is not None and choice.settings.strength == strength, share


def test_one_text_has_no_confidence() -> None:
    """Guards against a price promised from a single text."""
    single = _curve({0.1: 0.0}, n_texts=1)
    with pytest.raises(PriceError, match="found a measurement on 1 text, which has no confidence, expected 5"):
        _pick(single)
    choice = _pick(dataclasses.replace(single, resident_share=0.25), _curve({0.05: 0.001}, share=0.12))
    assert choice.settings is not None and choice.settings.strength == 0.05
    # Two texts are very uncertain: t is 6.3.
    assert _pick(_curve({0.1: 0.001}, n_texts=2), price=0.007).settings is None
    assert _pick(_curve({0.1: 0.001}, n_texts=2), price=0.008).settings is not None


def test_another_eviction_is_said() -> None:
    """Guards against a measurement of another cache that looks like this one's."""
    assert "eviction auto (here lru)" in _pick(CURVE, eviction="lru").text
    assert "here" not in _pick(CURVE).text


def test_requests_are_answered_from_the_models_file(gguf: GgufModel, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against curves of other methods or top-J, the default among them, and commands that measure those."""
    bank_bytes = int(price_curve.runtime.slot_sizes(gguf, 0).bank_slot_bytes)
    top_j = price_curve.reuse.default_top_j(gguf.n_experts, gguf.n_experts_used)
    price_curve.remember(
        gguf, [_curve({0.1: 0.001}, top_j=top_j, share=0.3), _curve({0.2: 0.001}, method="max-rank", top_j=1)]
    )
    request = price_curve.parse("auto")
    choice = request.choose(gguf, bank_bytes // 2, "auto")
    assert choice is not None and choice.settings == Settings(0.1, "cache-prior", top_j)
    ranked = price_curve.parse("auto", "max-rank", 1).choose(gguf, bank_bytes // 2, "auto")
    assert ranked is not None and ranked.settings == Settings(0.2, "max-rank", 1)
    assert price_curve.parse(0.1).choose(gguf, bank_bytes // 2, "auto") is None
    assert price_curve.parse().choose(gguf, bank_bytes // 2, "auto") is None
    command = (
        rf"run: edgemoe price {gguf.path} --experts 0\.5 --reuse-method cumulative --top-j 1 --eviction lru --text FILE"
    )
    with pytest.raises(PriceError, match=command):
        price_curve.parse("auto", "cumulative", 1).choose(gguf, bank_bytes // 2, "lru")
    with pytest.raises(PriceError, match=rf"run: edgemoe price {gguf.path} --experts 0\.1251 --text FILE"):
        request.choose(gguf, bank_bytes // 8 + 1, "auto")
    off = request.choose_again(gguf, bank_bytes // 8, "auto")
    assert off is not None and off.settings is None and "off from now on; cannot choose" in off.text
    assert request.choose_again(gguf, bank_bytes // 2, "auto") == choice
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Guards against prices that lie elsewhere than the warm starts, which docs and users know."""
    monkeypatch.delenv("EDGEMOE_WARM_DIR")
    monkeypatch.delenv("EDGEMOE_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert price_curve.path_of(KEY) == tmp_path / "edgemoe" / "warm" / f"{KEY.hex()[:32]}.price"
