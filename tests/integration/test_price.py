# SPDX-License-Identifier: MIT
"""The price of levers on the tiny trained model: exact rows are llama.cpp's, biased ones read less and cost."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import synthetic
from edgemoe import price as prices
from edgemoe import price_curve, warm
from edgemoe.errors import BackendError, BudgetError, EdgeMoeError, ModelFormatError
from edgemoe.formats.gguf import read_model
from edgemoe.levers import Lever
from edgemoe.price_change import Change
from tests.conftest import ModelWriter
from tests.integration.support import stock
from tests.unit.fakes import error_lines, run

DATA = Path(__file__).parents[1] / "data"
MODEL = DATA / "tiny_moe.gguf"
TEXTS = [DATA / "tiny_moe" / f"{domain}-1.txt" for domain in ("english", "python")]
SHORT = {"n_prompt_tokens": 16, "n_tokens": 80, "n_threads": 1, "n_threads_batch": 1}


def _stock_losses(path: Path, n_prompt_tokens: int, n_tokens: int) -> list[float]:
    """Nats of each token behind a decoded one, from stock llama.cpp's logits."""
    losses = []
    with contextlib.closing(stock(MODEL, n_threads=1, n_threads_batch=1)) as llm:
        tokens = llm.tokenize(path.read_bytes(), add_bos=True, special=False)[:n_tokens]
        llm.eval(tokens[:n_prompt_tokens])
        for i in range(n_prompt_tokens, n_tokens - 1):
            llm.eval([tokens[i]])
            row = llm.scores[i].astype(np.longdouble)
            losses.append(float(np.log(np.exp(row - row.max()).sum()) + row.max() - row[tokens[i + 1]]))
    return losses


def test_without_bias_the_price_is_nothing_and_perplexity_is_stock_llama_cpps() -> None:
    """Guards against a perplexity of other positions, texts that see each other, and a price where nothing changes."""
    found = prices.price(MODEL, TEXTS, [Lever.of(reuse_bias=0.0)], experts=0.25, kernels="ggml", **SHORT)
    off, zero = found.rows
    assert (off.lever.get("reuse_bias"), zero.lever.get("reuse_bias")) == (None, 0.0)
    for i, path in enumerate(TEXTS):
        expected = _stock_losses(path, SHORT["n_prompt_tokens"], SHORT["n_tokens"])
        for row in (off, zero):
            assert row.texts[i].n_tokens == len(expected) == 63
            # The logits are equal bit for bit; only numpy's sums differ.
            assert row.texts[i].cross_entropy == pytest.approx(np.mean(expected), rel=1e-12)
    assert (zero.kl, zero.agreement, zero.selections_changed, zero.gate_mass_moved) == (0.0, 1.0, 0.0, 0.0)
    assert found.change(zero) == Change(0.0, 0.0, 2)
    assert zero.bytes_per_token == pytest.approx(off.bytes_per_token, rel=0.02)
    assert 0 < off.hit_rate < 1
    assert 0.2 < found.resident_share <= 0.25


@pytest.mark.parametrize("method", ["cache-prior", "max-rank", "cumulative"])
def test_a_bias_changes_choices_saves_bytes_and_has_a_price(method: str) -> None:
    """Guards against a lever that the rows do not turn, and exact logits that are read at other positions."""
    strength = 0.3 if method != "cumulative" else 0.95
    found = prices.price(MODEL, TEXTS, [Lever.of(reuse_bias=strength, reuse_method=method)], experts=0.25, **SHORT)
    off, biased = found.rows
    assert off.selections_changed == off.gate_mass_moved == off.kl == 0
    assert biased.selections_changed > 0.02
    assert 0 < biased.gate_mass_moved <= 0.2
    assert biased.bytes_per_token < off.bytes_per_token
    assert biased.hit_rate > off.hit_rate
    # Logits of other positions would differ by nats, and agree by chance only.
    assert 0 < biased.kl < 0.5
    assert 0.5 < biased.agreement < 1
    fields = json.loads(json.dumps(found.to_dict()))["rows"][1]
    assert fields["reuse_method"] == method
    assert fields["bytes_per_token_ratio"] == pytest.approx(biased.bytes_per_token / off.bytes_per_token)


COMMAND = ["price", str(MODEL), "--tokens", "40", "--threads", "1", "--experts", "0.5"]


def test_the_command_prints_a_table_and_takes_many_texts() -> None:
    """Guards against texts behind --text that are dropped, rows without their lever, and a budget that is ignored."""
    result = run(*COMMAND, "--reuse-bias", "0.1,0.3", "--text", *map(str, TEXTS))
    assert result.exit_code == 0, result.stderr
    head, columns, *rows = result.stdout.splitlines()
    assert "14 tokens of 2 texts" in head and "50% of them" in head
    assert [row.split()[0] for row in rows] == ["exact", "reuse_bias=0.1", "reuse_bias=0.3"]
    for words in (" %", " s.e.", " nats", "95 "):
        columns = columns.replace(words, "")
    n_columns = len(columns.replace("of exact", "of").split())
    assert {len(row.split()) for row in rows} == {n_columns}


def test_the_command_draws(tmp_path: Path) -> None:
    """Guards against an image that is empty or lies elsewhere."""
    pytest.importorskip("matplotlib", reason="drawing needs the extra [plot]")
    plot = tmp_path / "price.png"
    result = run(*COMMAND, "--reuse-bias", "0.1,0.3", "--plot", str(plot), "--text", str(TEXTS[0]))
    assert result.exit_code == 0, result.stderr
    assert plot.stat().st_size > 1000


def test_a_budget_gives_all_rows_the_same_slots() -> None:
    """Guards against a budget that is not heeded, and rows whose loads found more memory than others."""
    found = prices.price(MODEL, TEXTS[:1], [Lever.of(reuse_bias=0.3)], memory="4GiB", **SHORT)
    assert found.resident_share == 1.0
    off, biased = found.rows
    assert biased.selections_changed < 0.5
    assert found.change(biased).standard_error is None
    assert off.bytes_per_token > 0  # from an empty cache
    with pytest.raises(BudgetError, match="below the floor"):
        prices.price(MODEL, TEXTS[:1], [Lever.of(reuse_bias=0.3)], memory="1MiB", **SHORT)


def test_what_cannot_be_measured_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against prices of nothing, of half a text, or of a model that has no experts."""
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(EdgeMoeError, match="found no text, expected at least one"):
        prices.price(MODEL, [], [Lever.of(reuse_bias=0.1)])
    for path in (short, empty):
        with pytest.raises(
            EdgeMoeError, match=rf"the text is too short: found \d+ tokens, expected at least 18 \({path}"
        ):
            prices.price(MODEL, [path], [Lever.of(reuse_bias=0.1)], experts=0.25, **SHORT)
    with pytest.raises(EdgeMoeError, match=r"cannot read the text .*missing\.txt"):
        prices.price(MODEL, [tmp_path / "missing.txt"], [Lever.of(reuse_bias=0.1)])
    with pytest.raises(BudgetError, match=r"cannot keep 0\.05 of the experts: .* use --experts 0\.12"):
        prices.price(MODEL, TEXTS, [Lever.of(reuse_bias=0.1)], experts=0.05)
    monkeypatch.setattr(synthetic, "_check_shape", lambda shape: None)  # it wants a layer with experts
    dense = synthetic.write_model(tmp_path / "dense.gguf", "deepseek2", n_dense_layers=3)
    with pytest.raises(ModelFormatError, match="has no routed experts"):
        prices.price(dense, TEXTS, [Lever.of(reuse_bias=0.1)])
    with pytest.raises(BackendError, match="cannot keep the best 9 experts"):
        prices.price(MODEL, TEXTS, [Lever.of(reuse_bias=0.1, top_j=9)])
    for lever in (Lever.of(reuse_bias=-0.1), Lever.of(reuse_bias=math.nan), Lever.of(reuse_bias=1.5)):
        with pytest.raises(ValueError, match="reuse_bias is"):
            prices.price(MODEL, TEXTS, [lever])
    with pytest.raises(ValueError, match="unknown reuse_method 'best'"):
        prices.price(MODEL, TEXTS, [Lever.of(reuse_bias=0.1, reuse_method="best")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reuse-bias", "-0.1"], "-0.1 is not from 0 (exact) to 1"),
        (["--reuse-bias", "0.1,nan"], "nan is not from 0"),
        (["--reuse-bias", "0.1,"], "'' is not a number"),
        (["--reuse-method", "best"], "'best' is not one of"),
        (["--experts", "0"], "0"),
        (["--experts", "0.5", "--memory", "1GiB"], "at most one of --experts and --memory"),
        (["--levers", "reuse=0.1"], "unknown name 'reuse'"),
        (["--levers", "reuse_bias=0.1,top_j=none"], "top_j is 'none'"),
        (["--tokens", "20"], "leaves nothing to decode behind --prompt-tokens 32"),
    ],
)
def test_bad_options_are_refused(options: list[str], message: str) -> None:
    """Guards against settings that would fail after a long pass, or be measured as something else."""
    result = run("price", str(MODEL), "--text", str(TEXTS[0]), *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_missing_text_is_an_error() -> None:
    """Guards against a traceback, and a command that measures some other text."""
    assert run("price", str(MODEL)).exit_code == 2
    result = run("price", str(MODEL), "--text", "/nowhere.txt")
    assert result.exit_code == 1
    assert "cannot read the text /nowhere.txt" in error_lines(result)[0]


def test_full_disks_are_noticed_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against hours of an exact pass whose logits then do not fit."""
    usage = prices.shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(prices.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(EdgeMoeError, match=r"cannot keep the exact logits: 0\.977 KiB are free, expected 0\.984 MiB"):
        prices.price(MODEL, TEXTS, [Lever.of(reuse_bias=0.1)], experts=0.25, **SHORT)


def test_the_command_takes_levers() -> None:
    """Guards against rows that are not asked for, measured twice, or measured without all their keywords."""
    given = ["--levers", "reuse_bias=0.3,top_j=1", "--levers", "reuse_bias=0.30,top_j=1", "--no-remember"]
    result = run(*COMMAND, *given, "--json", "--text", *map(str, TEXTS))
    assert result.exit_code == 0, result.stderr
    assert "2 texts give a wide confidence interval: use 5 or more" in result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert [row["lever"] for row in rows] == ["exact", "reuse_bias=0.3,top_j=1"]
    assert [(row["reuse_bias"], row["top_j"]) for row in rows] == [(None, None), (0.3, 1)]
    both = run(
        *COMMAND, "--reuse-bias", "0.1", "--reuse-method", "max-rank", "--top-j", "1", *given, "--text", str(TEXTS[0])
    )
    assert both.exit_code == 0, both.stderr
    names = [line.split()[0] for line in both.stdout.splitlines()[2:]]
    assert names == ["exact", "reuse_bias=0.1,reuse_method=max-rank,top_j=1", "reuse_bias=0.3,top_j=1"]
    assert "one text gives no confidence interval" in both.stderr
    assert not list(warm.default_dir().glob("*.price"))


def _retuned(path: Path) -> Path:
    """A copy of the model with other routers: sharper ones."""
    content = bytearray(MODEL.read_bytes())
    for t in read_model(MODEL).tensors:
        if t.name.endswith("ffn_gate_inp.weight"):
            assert t.type_name == "F32"
            weights = np.frombuffer(content, np.single, t.n_bytes // 4, t.offset).copy()
            content[t.offset : t.offset + t.n_bytes] = (1.1 * weights).astype(np.single).tobytes()
    path.write_bytes(content)
    return path


def test_a_copy_with_other_routers_is_measured_against_the_model(tmp_path: Path) -> None:
    """Guards against a tuned copy whose price is that of the model itself, or is remembered as the model's."""
    tuned = _retuned(tmp_path / "tuned.gguf")
    levers = [Lever.of(model=tuned), Lever.of(model=tuned, reuse_bias=0.3), Lever.of(model=MODEL)]
    found = prices.price(MODEL, TEXTS, levers, experts=0.25, **SHORT)
    exact, alone, biased, same = found.rows
    assert (alone.selections_changed, same.kl, same.agreement) == (0.0, 0.0, 1.0)
    assert alone.kl > 1e-4
    assert biased.selections_changed > 0.02
    assert biased.bytes_per_token < min(exact.bytes_per_token, alone.bytes_per_token)
    direct = prices.price(tuned, TEXTS, [], experts=0.25, **SHORT).exact
    assert [t.cross_entropy for t in direct.texts] == [t.cross_entropy for t in alone.texts]
    assert prices.remember(found, MODEL) == []


def test_what_is_no_copy_is_refused(write_model: ModelWriter) -> None:
    """Guards against distributions over two vocabularies that are compared, and bytes of two kinds of experts."""
    model = write_model("olmoe")
    with pytest.raises(ModelFormatError, match=r"against .*tiny_moe\.gguf: its vocabulary is another one; name a copy"):
        prices.price(MODEL, TEXTS, [Lever.of(model=model)], experts=0.25, **SHORT)
    wider = write_model("olmoe", n_experts=16)
    with pytest.raises(
        ModelFormatError, match=r"tensors of experts have other shapes .* found \(\(.*16\), .* expected"
    ):
        prices.price(model, TEXTS, [Lever.of(model=wider)], **SHORT)
    with pytest.raises(ModelFormatError, match=r"nowhere\.gguf"):
        prices.price(MODEL, TEXTS, [Lever.of(model="/nowhere.gguf")], **SHORT)


def test_reuse_biases_are_remembered(tmp_path: Path) -> None:
    """Guards against curves without a point, of another share, or with a default top-J that has no number."""
    levers = [
        Lever.of(reuse_bias=0.3),
        Lever.of(reuse_bias=0.1),
        Lever.of(reuse_bias=0.1, reuse_method="max-rank", top_j=1),
    ]
    found = prices.price(MODEL, TEXTS, levers, experts=0.25, eviction="lru", **SHORT)
    kept = prices.remember(found, MODEL)
    assert price_curve.load(read_model(MODEL)) == kept
    prior, ranked = kept
    assert [(c.method, c.top_j, c.eviction, c.resident_share) for c in kept] == [
        ("cache-prior", 2, "lru", found.resident_share),
        ("max-rank", 1, "lru", found.resident_share),
    ]
    assert [p.strength for p in prior.points] == [0.1, 0.3]
    for curve, point, row in ((prior, 1, 1), (prior, 0, 2), (ranked, 0, 3)):
        assert curve.change(curve.points[point]) == found.change(found.rows[row])
        assert curve.points[point].bytes_per_token == found.rows[row].bytes_per_token
