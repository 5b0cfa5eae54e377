# SPDX-License-Identifier: MIT
"""`edgemoe.converters.onnx.export`: forms of blocks, and what is refused."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for package in ("torch", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed (the extra edgemoe[modules])")
    import torch
    from torch import nn

from edgemoe.converters.onnx import ExportedModule, MoeBlock, export
from edgemoe.errors import ConversionError
from edgemoe.formats.onnx_model import read_model
from edgemoe.onnx import InferenceSession
from tests.converters.onnx_checkpoints import on_grid, relative_error

ROOT = Path(__file__).parents[2]
HIDDEN, INTER, N_EXPERTS, N_USED = 32, 64, 4, 2
TOLERANCE = 1e-5

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's exporter warns of its own dependencies


class Block(nn.Module):
    """Experts with a gate, computed densely; `form` says where rows of gate and of up are."""

    def __init__(
        self,
        form: str = "concatenated",
        hidden: int = HIDDEN,
        inter: int = INTER,
        bits: int = 4,
        has_biases: bool = True,
        limits: tuple[float, float, float | None] = (1.0, 0.0, None),
    ) -> None:
        super().__init__()
        self.form, self.hidden, self.inter, self.limits = form, hidden, inter, limits
        shapes = {"gate": (inter, hidden), "up": (inter, hidden), "down": (hidden, inter)}
        for name, (n_rows, n_columns) in shapes.items():
            weights = on_grid(torch.randn(N_EXPERTS, n_rows, n_columns) * n_columns**-0.5, bits)
            self.register_parameter(name, nn.Parameter(weights))
            self.register_buffer(f"{name}_bias", torch.randn(N_EXPERTS, n_rows) * float(has_biases))
        self.router = nn.Linear(hidden, N_EXPERTS)
        self.is_normalized = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        alpha, beta, limit = self.limits
        logits = self.router(x)
        best, chosen = logits.topk(N_USED)
        shares = best.softmax(-1) if self.is_normalized else logits.softmax(-1).gather(-1, chosen)
        weights = torch.zeros_like(logits).scatter(-1, chosen, shares)
        gate = torch.einsum("...h,eih->...ei", x, self.gate) + self.gate_bias
        up = torch.einsum("...h,eih->...ei", x, self.up) + self.up_bias
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        h = gate * torch.sigmoid(alpha * gate) * (up + beta)
        y = torch.einsum("...ei,ehi->...eh", h, self.down) + self.down_bias
        return (weights.unsqueeze(-1) * y).sum(-2)

    def describe(self) -> MoeBlock:
        alpha, beta, limit = self.limits
        common: dict[str, Any] = {"w2": self.down, "b2": self.down_bias, "k": N_USED, "route": self.router}
        common |= {"activation": "swiglu", "swiglu_alpha": alpha, "swiglu_beta": beta, "swiglu_limit": limit}
        if self.form == "separate":
            return MoeBlock(w1=self.gate, w3=self.up, b1=self.gate_bias, b3=self.up_bias, **common)
        if self.form == "interleaved":
            w1 = torch.stack([self.gate, self.up], dim=2).flatten(1, 2)
            b1 = torch.stack([self.gate_bias, self.up_bias], dim=2).flatten(1, 2)
            return MoeBlock(w1=w1, b1=b1, is_interleaved=True, **common)
        w1, b1 = torch.cat([self.gate, self.up], dim=1), torch.cat([self.gate_bias, self.up_bias], dim=1)
        return MoeBlock(w1=w1, b1=b1, **common)


class Around(nn.Module):
    """A block between two matrices."""

    def __init__(self, block: Block, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.first = nn.Linear(8, hidden)
        self.block = block
        self.last = nn.Linear(hidden, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.block(self.first(x)))


class Gradual(nn.Module):
    """One block, as a module and under two names, three times."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.a = block
        self.b = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(x=x + self.a(x + self.a(x)))


MOE: dict[Any, Any] = {Block: Block.describe}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _example(*shape: int) -> tuple[torch.Tensor, ...]:
    return (torch.randn(*(shape or (2, 5, 8))),)


def _options() -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return options


def _errors(done: ExportedModule, module: nn.Module, x: torch.Tensor) -> tuple[float, float]:
    """Of stock ONNX Runtime and of edgemoe, relative to torch."""
    with torch.no_grad():
        expected = module(x).numpy()
    ours = InferenceSession(done.path, memory="16GiB", sess_options=_options())
    assert ours.stats().n_other_moe_nodes == 0
    stock = onnxruntime.InferenceSession(done.path, _options())
    stock_error, our_error = (relative_error(s.run(None, {"x": x.numpy()})[0], expected) for s in (stock, ours))
    return stock_error, our_error


@pytest.mark.parametrize("form", ["concatenated", "interleaved", "separate"])
def test_rows_of_gate_and_up_may_lie_anyhow(tmp_path: Path, form: str) -> None:
    """Guards against: gate and up exchanged or their biases, and alpha, beta or limit that do not arrive."""
    module = Around(Block(form, limits=(1.7, 1.0, 0.6))).eval()
    done = export(module, _example(), tmp_path / "out", moe=MOE)
    assert done.mapping_error < 1e-5
    assert max(_errors(done, module, torch.randn(3, 5, 8))) <= TOLERANCE


def test_widths_that_are_no_multiple_of_a_block_are_filled_up(tmp_path: Path) -> None:
    """Guards against: zeros that change the result, or that are left in the output."""
    module = Around(Block("separate", hidden=40, inter=72), 40).eval()
    for weights in (module.block.gate, module.block.up, module.block.down):
        steps = torch.randint(-7, 8, weights.shape).float()
        steps[..., ::32] = -8  # on the grid with blocks of any size
        weights.data = steps / 64
    for block, filled in ((32, (64, 96)), (64, (64, 128))):
        done = export(module, _example(), tmp_path / str(block), moe=MOE, block=block)
        model = read_model(done.path)
        assert model.tensors[model.moe_nodes[0].inputs[2]].shape == (N_EXPERTS, 2 * filled[1], filled[0] // 2)
        assert max(_errors(done, module, torch.randn(4, 5, 8))) <= TOLERANCE


def test_int8_computes_what_torch_does(tmp_path: Path) -> None:
    """Guards against: 8-bit experts packed wrongly. Stock quantizes activations of such (docs/onnx.md)."""
    module = Around(Block(bits=8)).eval()
    done = export(module, _example(), tmp_path / "out", moe=MOE, quant="int8")
    assert _errors(done, module, torch.randn(3, 5, 8))[1] <= TOLERANCE


@pytest.mark.parametrize("has_weights", [False, True])
def test_experts_may_stay_in_floats(tmp_path: Path, has_weights: bool) -> None:
    """Guards against: float experts that are rounded or filled up, and the softmax of all scores taken for that of the
    chosen ones."""
    block = Block(hidden=40, inter=72, limits=(1.7, 1.0, 0.6))
    for weights in (block.gate, block.up, block.down):
        weights.data = torch.randn_like(weights) / 8
    block.is_normalized = not has_weights
    module = Around(block, 40).eval()

    def describe(block: Block) -> MoeBlock:
        if not has_weights:
            return block.describe()
        return dataclasses.replace(block.describe(), route=lambda x: (block.router(x), block.router(x).softmax(-1)))

    done = export(module, _example(), tmp_path / "out", moe={Block: describe}, quant="fp32")
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        expected = module(x).numpy()
    found = onnxruntime.InferenceSession(done.path, _options()).run(None, {"x": x.numpy()})[0]
    assert relative_error(found, expected) <= TOLERANCE
    streamed = InferenceSession(done.path, memory="16GiB")
    assert relative_error(streamed.run(None, {"x": x.numpy()})[0], expected) <= TOLERANCE
    assert [node.op_type for node in read_model(done.path).moe_nodes] == ["MoE"]
    assert done.expert_bytes >= N_EXPERTS * 3 * 40 * 72 * 4


def test_float_experts_with_other_weights_are_refused(tmp_path: Path) -> None:
    """Guards against: weights that a MoE node has no input for and that are silently others."""

    def describe(block: Block) -> MoeBlock:
        def route(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            scores = block.router(x)
            return scores, scores.softmax(-1) * 0.999

        return dataclasses.replace(block.describe(), route=route, normalizes=True)

    with pytest.raises(ConversionError, match=r"weights differ from the softmax of its scores.*use int4 or int8"):
        export(Around(Block()).eval(), _example(), tmp_path / "out", moe={Block: describe}, quant="fp32")
    assert not list(tmp_path.iterdir())


def test_a_block_that_is_called_again_has_its_experts_once(tmp_path: Path) -> None:
    """Guards against: experts written once for every call, or under every name, or a call by keyword that is lost."""
    module = Gradual(Block()).eval()
    done = export(module, _example(2, 5, HIDDEN), tmp_path / "out", moe={"a": Block.describe})
    model = read_model(done.path)
    assert done.n_blocks == 1
    assert len(model.moe_nodes) == 3 and len({node.name for node in model.moe_nodes}) == 3
    assert len({node.inputs[2] for node in model.moe_nodes}) == 1
    assert max(_errors(done, module, torch.randn(3, 5, HIDDEN))) <= TOLERANCE


def test_the_module_may_be_a_block_and_is_left_as_it_was(tmp_path: Path) -> None:
    """Guards against: a module that computes zeros after its export, or after one that failed."""
    module = Block().eval()
    x = torch.randn(3, HIDDEN)
    before = module(x)
    done = export(module, _example(2, HIDDEN), tmp_path / "out", moe=MOE)
    assert max(_errors(done, module, x)) <= TOLERANCE
    with pytest.raises(ConversionError, match="inferred a static shape of 32"):
        export(module, _example(2, HIDDEN), tmp_path / "b", moe=MOE, dynamic={"x": {1: "hidden"}})
    assert torch.equal(module(x), before) and "forward" not in vars(module)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_predicates_and_lists_of_weights(tmp_path: Path) -> None:
    """Guards against: a mapping by a function that is not asked, and experts that have to be stacked first."""
    module = Around(Block("separate")).eval()

    def describe(block: Block) -> MoeBlock:
        moe = block.describe()
        parts = {name: list(getattr(moe, name)) for name in ("w1", "w2", "w3", "b1", "b2", "b3")}
        return dataclasses.replace(moe, **parts)

    done = export(module, _example(), tmp_path / "out", moe={lambda name, child: name == "block": describe})
    assert max(_errors(done, module, torch.randn(3, 5, 8))) <= TOLERANCE


def test_bytes_depend_on_the_module_alone(tmp_path: Path) -> None:
    """Guards against: names, times or addresses in the file, so that two exports cannot be compared."""
    module = Around(Block()).eval()
    for name in ("a", "b"):
        export(module, _example(), tmp_path / name, moe=MOE)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def _replaced(**changes: Any) -> Callable[[Block], MoeBlock]:
    return lambda block: dataclasses.replace(
        block.describe(), **{k: v(block) if callable(v) and k != "finish" else v for k, v in changes.items()}
    )


WRONG: dict[str, tuple[dict[Any, Any], str]] = {
    "nothing": ({}, "moe is empty"),
    "no such class": ({nn.Conv2d: Block.describe}, r"no module matches Conv2d of moe; there are Around, Block, Linear"),
    "no such name": ({"blocks.*": Block.describe}, r"no module matches blocks\.\*"),
    "two keys": ({Block: Block.describe, "block": Block.describe}, "block: 2 keys of moe name it"),
    "not a MoeBlock": ({Block: lambda block: block.down}, "block: moe maps it to a Parameter, expected a MoeBlock"),
    "gelu by erf": ({Block: _replaced(activation="gelu")}, r"gelu \(by erf\) is not QMoE's"),
    "activation": (
        {Block: _replaced(activation="mish")},
        "activation mish is not known, expected one of relu, gelu_tanh",
    ),
    "k": ({Block: _replaced(k=5)}, "k is 5, expected 1 to 4 experts"),
    "transposed": (
        {Block: _replaced(w2=lambda b: b.down.transpose(1, 2))},
        r"w1 has 4 experts of shape \[128, 32\], expected 4 of \[64, 32\]",
    ),
    "fewer experts": (
        {Block: _replaced(w2=lambda b: b.down[:3])},
        r"w2 has 3 experts of shape \[32, 64\], expected 4",
    ),
    "two axes": ({Block: _replaced(w1=lambda b: b.gate[0])}, r"w1 has 64 experts of shape \[32\], expected one matrix"),
    "not finite": (
        {Block: _replaced(b2=lambda b: b.down_bias.index_fill(0, torch.tensor(3), torch.inf))},
        "b2 of expert 3 has a number that is not finite",
    ),
    "w3 twice": ({Block: _replaced(w3=lambda b: b.up, is_interleaved=True)}, "interleaved in w1, and there is w3"),
    "w3 without gate": ({Block: _replaced(w3=lambda b: b.up, activation="silu")}, "w3, b3 and is_interleaved are of"),
    "scores": (
        {Block: lambda b: dataclasses.replace(b.describe(), route=lambda x: b.router(x).topk(2).values)},
        r"scores have shape \[2, 5, 2\], expected \[2, 5, 4\]",
    ),
    "scores' type": (
        {Block: lambda b: dataclasses.replace(b.describe(), route=lambda x: b.router(x).double())},
        "scores are float64, expected float32",
    ),
    "tokens": (
        {Block: lambda b: dataclasses.replace(b.describe(), tokens=lambda x: x[..., :-1])},
        r"tokens have shape \[2, 5, 31\], expected \[2, 5, 32\]",
    ),
    "weights": (
        {Block: lambda b: dataclasses.replace(b.describe(), route=lambda x: (b.router(x), b.router(x).softmax(-1)))},
        "block: its MoeBlock computes something else, by .* of the largest element",
    ),
    "order of rows": ({Block: _replaced(is_interleaved=True)}, "its MoeBlock computes something else"),
    "finish": (
        {Block: lambda b: dataclasses.replace(b.describe(), finish=lambda y, x: (y, x))},
        r"it returns \[2, 5, 32\], the MoeBlock a tuple of 2; say with finish",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_descriptions_that_are_wrong_are_refused(tmp_path: Path, case: str) -> None:
    """Guards against: a file that computes something else than the module, or a traceback from inside of torch."""
    moe, named = WRONG[case]
    with pytest.raises(ConversionError, match=named):
        export(Around(Block()).eval(), _example(), tmp_path / "out", moe=moe)
    assert not list(tmp_path.iterdir())


class Branching(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.sum() > -1e9 else x


class Conditional(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > -1e9, lambda y: self.block(y), lambda y: y * 2, (self.first(x),))


class Unreached(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


class Anything(Around):
    def forward(self, *x: torch.Tensor) -> torch.Tensor:
        return super().forward(*x)


@pytest.mark.parametrize(
    "make, options, named",
    [
        (lambda: Around(Block()), {}, r"training mode.*call module\.eval\(\)"),
        (lambda: Around(Block()).double().eval(), {"inputs": (torch.randn(2, 5, 8).double(),)}, "tokens are float64"),
        (lambda: Branching(Block()).eval(), {}, r"(?s)refuses it: .*data-dependent.*torch\.where or a mask"),
        (lambda: Conditional(Block()).eval(), {}, r"or inside of torch\.cond, where experts cannot"),
        (lambda: Unreached(Block()).eval(), {}, "block: the module does not call it with these inputs"),
        (lambda: Anything(Block()).eval(), {}, "forward names 0 inputs"),
        (lambda: Block, {}, r"cannot export a type: expected a torch\.nn\.Module"),
        (lambda: Around(Block()).eval(), {"inputs": torch.randn(2, 8)}, "inputs have to be a sequence of tensors"),
        (lambda: Around(Block()).eval(), {"inputs": (2,)}, "inputs have to be a sequence of tensors"),
        (lambda: Around(Block()).eval(), {"inputs": _example(1, 5, 8)}, r"axis 0 of x \(batch\) is dynamic and has 1"),
        (lambda: Around(Block()).eval(), {"dynamic": {"y": {0: "batch"}}}, "dynamic names y, expected inputs: x"),
        (lambda: Around(Block()).eval(), {"dynamic": {"x": {3: "batch"}}}, "x has 3 axes, dynamic names axis 3"),
        (lambda: Around(Block()).eval(), {"dynamic": {"x": {2: "columns"}}}, "(?s)refuses it: .*make dynamic only"),
        (lambda: Around(Block()).eval(), {"quant": "int3"}, "quant int3: expected one of int4, int8, fp32"),
        (lambda: Around(Block()).eval(), {"block": 48}, "block 48: expected one of 32, 64, 128"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    tmp_path: Path, make: Callable[[], Any], options: dict[str, Any], named: str
) -> None:
    """Guards against: an axis that silently has the example's size, a file in another type or with noise in it, and
    errors of torch without what to do."""
    arguments = {"inputs": _example(), "moe": MOE, **options}
    with pytest.raises(ConversionError, match=named):
        export(make(), arguments.pop("inputs"), tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept_or_replaced_whole(tmp_path: Path) -> None:
    """Guards against: a model overwritten unasked, a file replaced by a folder, old files left in a new folder."""
    module, out = Around(Block()).eval(), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ConversionError, match=r"out exists; name another folder, or give force=True"):
        export(module, _example(), out, moe=MOE)
    with pytest.raises(ConversionError, match=r"mine\.txt exists; name another folder"):
        export(module, _example(), out / "mine.txt", moe=MOE, force=True)
    assert (out / "mine.txt").read_text() == "mine"
    done = export(module, _example(), out, moe=MOE, force=True)
    files = {path.name: path.stat().st_size for path in out.iterdir()}
    assert set(files) == {"model.onnx", "experts.bin", "model.onnx.data"}
    assert (done.expert_bytes, done.dense_bytes) == (files["experts.bin"], files["model.onnx.data"])
    assert list(tmp_path.iterdir()) == [out]


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)


def test_torch_is_imported_when_a_module_is_exported_and_not_before() -> None:
    """Guards against: seconds of imports, or torch as a dependency, where only checkpoints are converted."""
    code = "import sys, edgemoe.converters.onnx; assert not {'torch', 'onnxscript', 'onnx_ir'} & set(sys.modules)"
    done = _run(code)
    assert done.returncode == 0, done.stderr


def test_without_onnxscript_the_error_says_what_to_install(tmp_path: Path) -> None:
    """Guards against: a traceback of torch where the extra is not installed."""
    code = (
        "import sys; sys.modules['onnxscript'] = None\n"
        "from edgemoe.converters.onnx import export\n"
        f"try: export(None, (), {os.fspath(tmp_path / 'out')!r}, moe={{}})\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = _run(code)
    assert done.stdout.startswith("ConversionError") and "pip install 'edgemoe[modules]'" in done.stdout, done.stderr


def test_the_documented_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against: a snippet in docs/onnx.md that does not run as it stands."""
    text = (ROOT / "docs" / "onnx.md").read_text()
    section = text[text.index("## PyTorch modules") :]
    snippet = re.search(r"```python\n(.*?)```", section, re.S)
    assert snippet is not None
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {}
    exec(compile(snippet.group(1), "docs/onnx.md", "exec"), values)
    assert values["y"].shape == (3, 16, 64)
    assert np.isfinite(values["y"]).all()
    assert values["session"].stats().n_streamed_nodes == 1
