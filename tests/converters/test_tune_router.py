# SPDX-License-Identifier: MIT
"""`edgemoe tune-router`: that routers change as asked, nothing else does, and what must not be tuned is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from edgemoe.converters.gguf_writer import OutTensor, copy_of, write_gguf
from edgemoe.converters.quantize.blocks import quantize
from edgemoe.errors import ConversionError
from edgemoe.formats.gguf import GgufTensor, read_model, read_raw_metadata
from tests.converters.conftest import Workshop
from tests.unit.fakes import error_lines, run

torch = pytest.importorskip("torch", reason="torch is not installed (the extra edgemoe[train])")
pytest.importorskip("transformers", reason="transformers is not installed (the extra edgemoe[train])")

from edgemoe.converters import tune_router as tuning  # noqa: E402
from edgemoe.converters.tuning_settings import METHODS, Method, Settings  # noqa: E402
from edgemoe.converters.upcycle import default_calibration_text  # noqa: E402

# What transformers and torch warn of is for them to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

FAMILIES = ("mixtral", "qwen2moe", "olmoe", "deepseek-v3", "gpt-oss", "granitemoe", "lfm2moe", "afmoe")
FAMILIES += ("ernie4_5-moe", "glm4moe")

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def text() -> str:
    return default_calibration_text()


def settings(method: Method = "remoe", **changes: Any) -> Settings:
    """Few steps that change much."""
    fields: dict[str, Any] = {"n_steps": 3, "rate": 0.02, "n_windows": 2, "window_tokens": 48, **changes}
    return Settings(method, **fields)


def is_router(tensor: GgufTensor) -> bool:
    return ".ffn_gate_inp." in tensor.name


def routers_of(path: Path) -> dict[str, Floats]:
    """The routers of a file in which they are F32, by name."""
    data = path.read_bytes()
    return {
        t.name: np.frombuffer(data, np.float32, t.n_bytes // 4, t.offset).reshape(t.shape[::-1])
        for t in read_model(path).tensors
        if is_router(t)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_are_found_and_nothing_else_changes(workshop: Workshop, family: str, text: str, tmp_path: Path) -> None:
    """Guards against a family whose routers are not recognized or not trained, and against a byte that changes outside
    of them: metadata, layout, experts, the biases of a correction."""
    source, out = workshop.gguf(family, "Q8_0"), tmp_path / "out.gguf"
    report = tuning.tune(workshop.checkpoint(family).path, source, out, [text], settings(n_steps=2, window_tokens=24))
    before, after = (np.frombuffer(path.read_bytes(), np.uint8) for path in (source, out))
    assert before.size == after.size
    changed = before != after
    tensors = [t for t in read_model(source).tensors if is_router(t)]
    assert report.n_routers == sum(t.name.endswith("weight") for t in tensors) > 0
    for tensor in tensors:
        extent = slice(tensor.offset, tensor.offset + tensor.n_bytes)
        assert changed[extent].mean() > 0.2, tensor.name
        changed[extent] = False
    assert not changed.any()


@pytest.mark.parametrize("method", METHODS)
def test_no_steps_give_the_same_bytes(workshop: Workshop, method: Method, text: str, tmp_path: Path) -> None:
    """Guards against a copy that is not one, and against quality that changes without training."""
    source, out = workshop.gguf("qwen3moe", "Q8_0"), tmp_path / "out.gguf"
    report = tuning.tune(workshop.checkpoint("qwen3moe").path, source, out, [text], settings(method, n_steps=0))
    assert out.read_bytes() == source.read_bytes()
    assert report.before == report.after


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_routers_only(
    workshop: Workshop, method: Method, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a parameter that is trained with the routers and not written, so that OUT is not what was
    measured, and against the teacher's numbers left in the network."""
    networks = []
    load = tuning.load_model
    monkeypatch.setattr(tuning, "load_model", lambda *args: networks.append(load(*args)) or networks[-1])
    folder, out = workshop.checkpoint("qwen3moe").path, tmp_path / "out.gguf"
    tuning.tune(folder, workshop.gguf("qwen3moe", "F32"), out, [text], settings(method))
    written = routers_of(out)
    originals = load(folder, "test").state_dict()
    n_routers = 0
    for name, values in networks[0].state_dict().items():
        if name.endswith(".mlp.gate.weight"):
            n_routers += 1
            assert not torch.equal(values, originals[name])
            assert np.array_equal(values.numpy(), written[f"blk.{name.split('.')[2]}.ffn_gate_inp.weight"])
        else:
            assert torch.equal(values, originals[name]), name
    assert n_routers == len(written)


@pytest.mark.parametrize("family", ["qwen3moe", "mixtral", "deepseek-v3"])
def test_llama_cpp_computes_what_was_trained(workshop: Workshop, family: str, text: str, tmp_path: Path) -> None:
    """Guards against routers written to another layer's place, transposed or in another type: stock llama.cpp's logits
    are those of transformers with the tuned routers."""
    from edgemoe.converters.verify import MAX_F32_RELATIVE_ERROR, _llama_cpp_logits

    folder, source, out = workshop.checkpoint(family).path, workshop.gguf(family, "F32"), tmp_path / "out.gguf"
    tuning.tune(folder, source, out, [text], settings())
    network = tuning.load_model(folder, "test")
    sequences, found = _llama_cpp_logits(out)
    with torch.no_grad():
        original = network(torch.tensor(sequences)).logits.numpy()
        for name, values in routers_of(out).items():
            network.get_parameter(f"model.layers.{name.split('.')[1]}.mlp.gate.weight").copy_(torch.tensor(values))
        expected = network(torch.tensor(sequences)).logits.numpy()
    largest = np.abs(expected).max()
    assert np.abs(found - expected).max() <= MAX_F32_RELATIVE_ERROR * largest
    assert np.abs(original - expected).max() > 20 * MAX_F32_RELATIVE_ERROR * largest


def test_the_seed_decides(workshop: Workshop, text: str, tmp_path: Path) -> None:
    """Guards against chance outside of the seed, and a seed that does nothing."""
    folder, source = workshop.checkpoint("qwen3moe").path, workshop.gguf("qwen3moe", "Q8_0")
    found = []
    for i, seed in enumerate((1, 1, 2)):
        out = tmp_path / f"{i}.gguf"
        tuning.tune(folder, source, out, [text], settings(seed=seed))
        found.append(out.read_bytes())
    assert found[0] == found[1] != found[2]


def test_the_original_is_its_own_teacher(workshop: Workshop, text: str, tmp_path: Path) -> None:
    """Guards against a teacher that learns with the student, or is not the model in IN."""
    losses: list[float] = []
    tuning.tune(
        workshop.checkpoint("qwen3moe").path,
        workshop.gguf("qwen3moe", "Q8_0"),
        tmp_path / "out.gguf",
        [text],
        settings("kd", n_steps=9, reuse_weight=1.0, rate=0.05, n_windows=1),
        on_quality=lambda _step, loss, _quality: losses.append(loss) if loss is not None else None,
    )
    without: list[float] = []
    tuning.tune(
        workshop.checkpoint("qwen3moe").path,
        workshop.gguf("qwen3moe", "Q8_0"),
        tmp_path / "out.gguf",
        [text],
        settings("kd", n_steps=1, reuse_weight=0.0),
        on_quality=lambda _step, loss, _quality: without.append(loss) if loss is not None else None,
    )
    assert abs(without[0]) < 1e-6  # before the first step they are the same
    assert len(losses) == 9 and losses[-1] < losses[0]


def test_an_f16_router_keeps_its_type_and_rounding_is_no_other_model(
    workshop: Workshop, text: str, tmp_path: Path
) -> None:
    """Guards against files of other converters, whose routers are rounded, being refused or written as F32."""
    folder = workshop.checkpoint("qwen3moe").path
    plain = workshop.gguf("qwen3moe", "F32")
    for type_name in ("F16", "BF16"):
        source, out = tmp_path / f"{type_name}.gguf", tmp_path / "out.gguf"
        _with_routers_in(plain, source, gguf.GGMLQuantizationType[type_name])
        tuning.tune(folder, source, out, [text], settings(n_steps=0))
        assert out.read_bytes() == source.read_bytes()
        tuning.tune(folder, source, out, [text], settings(n_steps=1))
        assert {t.type_name for t in read_model(out).tensors if is_router(t)} == {type_name}
        assert out.read_bytes() != source.read_bytes()
        assert out.stat().st_size == source.stat().st_size


def _with_routers_in(source: Path, out: Path, ggml_type: gguf.GGMLQuantizationType) -> None:
    """A copy of a file with routers of another type."""
    model = read_model(source)
    routers = routers_of(source)

    def tensor(found: GgufTensor) -> OutTensor:
        if not found.name.endswith("ffn_gate_inp.weight"):
            return copy_of(model, found)
        data = quantize(np.ascontiguousarray(routers[found.name]), ggml_type)
        return OutTensor(found.name, found.shape, ggml_type.name, lambda: [data])

    write_gguf(out, read_raw_metadata(source), [tensor(t) for t in model.tensors])


def test_another_model_is_refused(workshop: Workshop, text: str, tmp_path: Path) -> None:
    """Guards against routers of one model trained in another one's network."""
    out = tmp_path / "out.gguf"
    source = tmp_path / "other.gguf"
    shutil.copy(workshop.gguf("qwen3moe", "Q8_0"), source)
    tensor = next(t for t in read_model(source).tensors if t.name == "blk.1.ffn_gate_inp.weight")
    with source.open("r+b") as file:
        file.seek(tensor.offset + 40)
        file.write(np.float32(0.125).tobytes())
    with pytest.raises(ConversionError, match=r"blk\.1\.ffn_gate_inp\.weight .* is no parameter of .*nearest is off"):
        tuning.tune(workshop.checkpoint("qwen3moe").path, source, out, [text], settings())
    with pytest.raises(ConversionError, match=r"is no parameter of .*name the checkpoint that it was converted from"):
        tuning.tune(workshop.checkpoint("olmoe").path, workshop.gguf("mixtral", "Q8_0"), out, [text], settings())
    assert not out.exists()


def test_what_cannot_be_tuned_is_refused(workshop: Workshop, text: str, tmp_path: Path) -> None:
    """Guards against a router in blocks, a model without one, and texts or memory that do not suffice."""
    folder, source, out = workshop.checkpoint("qwen3moe").path, workshop.gguf("qwen3moe", "Q8_0"), tmp_path / "out.gguf"
    with pytest.raises(ConversionError, match="windows of 48 tokens, expected one to train on"):
        tuning.tune(folder, source, out, ["a b c"], settings())
    blocks = tmp_path / "blocks.gguf"
    _with_routers_in(workshop.gguf("qwen3moe", "F32"), blocks, gguf.GGMLQuantizationType.Q8_0)
    with pytest.raises(ConversionError, match=r"is Q8_0, expected F32, F16 or BF16"):
        tuning.tune(folder, blocks, out, [text], settings())
    with pytest.raises(ConversionError, match=r"about .* GiB .* are free; use a larger machine, or a smaller --batch"):
        tuning.tune(folder, source, out, [text * 40], settings(n_windows=1 << 20))
    with pytest.raises(ConversionError, match=r"llama\.cpp weights the experts of phimoe otherwise than transformers"):
        tuning.tune(workshop.checkpoint("phimoe").path, workshop.gguf("phimoe", "Q8_0"), out, [text], settings())
    with pytest.raises(ConversionError, match=r"cannot tune routers: transformers refuses .*deepseek-moe"):
        unknown = workshop.checkpoint("deepseek-moe").path
        tuning.tune(unknown, workshop.gguf("deepseek-moe", "Q8_0"), out, [text], settings())
    for changes in ({"rate": float("nan")}, {"reuse_weight": -1.0}, {"n_windows": 0}, {"rate": 2.0}, {"method": "sft"}):
        with pytest.raises(ValueError, match="expected"):
            tuning.tune(folder, source, out, [text], settings(**changes))
    with pytest.raises(ConversionError, match=r"the loss is inf at step 1, expected a number; use a smaller --rate"):
        tuning.tune(folder, source, out, [text], settings(reuse_weight=1e39))
    assert list(tmp_path.iterdir()) == [blocks]


def test_an_interruption_leaves_nothing(workshop: Workshop, text: str, tmp_path: Path) -> None:
    """Guards against half a file, under its name or another, after Ctrl-C or on a full disk."""
    folder, source, out = workshop.checkpoint("qwen3moe").path, workshop.gguf("qwen3moe", "Q8_0"), tmp_path / "out.gguf"

    def interrupt_in(stage: str) -> Any:
        def report(now: str, _done: int, _total: int) -> None:
            if now == stage:
                raise KeyboardInterrupt

        return report

    for stage in ("train", "write"):
        with pytest.raises(KeyboardInterrupt):
            tuning.tune(folder, source, out, [text], settings(n_steps=1), progress=interrupt_in(stage))
        assert not list(tmp_path.iterdir())
    usage = shutil.disk_usage(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=source.stat().st_size - 1))
        with pytest.raises(ConversionError, match=r"cannot write .*free some space"):
            tuning.tune(folder, source, out, [text], settings(n_steps=0))
    assert not list(tmp_path.iterdir())


def test_the_command(workshop: Workshop, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against options that do not arrive, defaults that are not those of Python, and a missing extra that ends
    in a traceback."""
    source, out, file = workshop.gguf("qwen3moe", "Q8_0"), tmp_path / "out.gguf", tmp_path / "text.txt"
    file.write_text(text, "utf-8")
    words = ["tune-router", str(source), str(out), "--checkpoint", str(workshop.checkpoint("qwen3moe").path)]
    words += ["--json", "--text", str(file)]
    result = run(*words, str(file), "--steps", "2", "--batch", "1", "--context", "32", "--method", "kd")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    expected = {"method": "kd", "n_steps": 2, "n_windows": 1, "window_tokens": 32}
    defaults = Settings()
    expected |= {name: getattr(defaults, name) for name in ("reuse_weight", "anchor_weight", "rate", "seed")}
    assert {name: found[name] for name in expected} == expected
    assert found["cached_experts"] == defaults.cached_experts and found["n_routers"] > 0
    assert "edgemoe: step 2 of 2, loss " in result.stderr and "held out: cross-entropy" in result.stderr
    assert run(*words).exit_code == 1  # OUT exists
    out.unlink()
    file.write_bytes(b"caf\xe9")
    assert "is not UTF-8" in error_lines(run(*words))[0]
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    assert error_lines(run(*words)) == [
        "edgemoe: error: cannot tune routers: torch cannot be imported, expected the packages of the extra [train]; "
        "pip install 'edgemoe[train]'"
    ]
