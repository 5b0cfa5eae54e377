# SPDX-License-Identifier: MIT
"""How much a layer's output changes with fewer experts, found without data, and the best number for each layer.

LExI (arXiv 2509.02753): for random inputs X, layer l loses D_l(k) = E ||Y_k(X) - Y_K(X)|| when tokens use their k best
experts instead of the K that the model was trained with. The numbers k_l then minimize sum D_l(k_l) for a given sum of
k_l. The paper searches by evolution; as the layers' losses add up, dynamic programming finds the minimum.

*Inputs.* Rows of N(0, I), normalized as the layer does it and scaled by its norm's weights: what experts and router
are given if the residual stream has no direction of its own. Each sample is one row, so the norm is that of a vector,
and the expectation a mean over samples. Shared experts are in both outputs and cancel.

*Memory.* A few MiB of one expert's matrix at a time, and the samples' outputs.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from edgemoe.atomic import replacing
from edgemoe.converters.gguf_writer import read_range
from edgemoe.converters.quantize.blocks import QUANTIZABLE, dequantize
from edgemoe.errors import BackendError, ModelFormatError
from edgemoe.formats.companion import expert_bank_key
from edgemoe.formats.gguf import GgufModel, GgufTensor
from edgemoe.routers import read_tensor

DEFAULT_SAMPLES = 32
_FORMAT = "edgemoe-lexi"
_VERSION = 1
_MAX_FILE_BYTES = 1 << 22  # 61 layers of 384 experts used at once would be 0.5 MiB
_BLOCK_BYTES = 16 << 20  # of a matrix in F32, at a time
_EPSILON = 1e-6
_SMALLEST_SUM = 6.103515625e-5  # llama.cpp divides by no smaller sum of weights (build_moe_ffn)

# llama.cpp's values of `expert_gating_func` (llama-hparams.h).
_SOFTMAX, _SIGMOID, _SOFTMAX_OF_CHOSEN = 1, 2, 3
_NORMS = ("ffn_norm", "post_attention_norm")

Floats = npt.NDArray[np.float32]
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class _Form:
    """What llama.cpp's graph of an architecture fixes (src/models); None: the file's metadata says it."""

    gating: int | None = _SOFTMAX
    gating_default: int = _SIGMOID  # where the metadata may say it and does not
    is_normalized: bool | None = True
    is_oai: bool = False  # SwiGLU clamped as gpt-oss has it


_BY_FILE = _Form(gating=None, is_normalized=None)
_FORMS = {
    "olmoe": _Form(is_normalized=False),
    "qwen2moe": _Form(is_normalized=False),
    "deepseek": _Form(is_normalized=False),
    "qwen3moe": _Form(),
    "llama": _Form(),
    "granitemoe": _Form(),
    "phimoe": _Form(),
    "ernie4_5-moe": _Form(),
    "gpt-oss": _Form(gating=_SOFTMAX_OF_CHOSEN, is_normalized=False, is_oai=True),
    "deepseek2": dataclasses.replace(_BY_FILE, gating_default=_SOFTMAX),
    "glm4moe": _BY_FILE,
    "afmoe": _BY_FILE,
    "lfm2moe": _Form(gating=None),
}


@dataclasses.dataclass(frozen=True)
class Losses:
    """What layers lose with fewer experts.

    Attributes:
        model_key: `companion.expert_bank_key` of the model.
        model_name: for people.
        n_samples, seed: how they were found.
        of_layer: for each layer with experts D(1) to D(K), the last one 0; in units of the layer's output.
    """

    model_key: str
    model_name: str
    n_samples: int
    seed: int
    of_layer: dict[int, tuple[float, ...]]


def check(model: GgufModel) -> None:
    """Refuse models whose experts cannot be computed here.

    Raises:
        BackendError: the architecture, its gating or the format of a tensor is not known.
    """
    why = ""
    form = _FORMS.get(model.architecture)
    formats = {t.type_name for t in model.expert_tensors} - {kind.name for kind in QUANTIZABLE}
    clamp = model.metadata.get(f"{model.architecture}.swiglu_clamp_exp", 0.0)
    if not model.expert_tensors:
        why = "it has no routed experts"
    elif form is None:
        why = f"its architecture {model.architecture} is none of {', '.join(sorted(_FORMS))}"
    elif _gating(model, form) not in (_SOFTMAX, _SIGMOID, _SOFTMAX_OF_CHOSEN):
        why = f"its expert_gating_func is {_gating(model, form)}, expected 1 to 3"
    elif formats:
        why = f"experts of type {sorted(formats)[0]} are not known"
    elif any(t.name.endswith("_exps.scale") for t in model.tensors):
        why = "its experts have scales of their own"
    elif any(clamp) if isinstance(clamp, list) else clamp:
        why = "its activation is clamped (swiglu_clamp_exp)"
    if why:
        raise BackendError(f"cannot find out what fewer experts cost {model.path}: {why}; use a number or top-p:P")


def measure(
    model: GgufModel, *, n_samples: int = DEFAULT_SAMPLES, seed: int = 0, progress: Progress | None = None
) -> Losses:
    """Find D_l(k) for all layers and all k; reads each expert that a sample chooses once.

    Raises:
        BackendError: see `check`.
        ModelFormatError: a tensor is missing or cannot be read.
        ConversionError: an expert cannot be read.
        ValueError: `n_samples` is below 1, or `seed` below 0.
    """
    if n_samples < 1 or seed < 0:
        raise ValueError(f"n_samples is {n_samples} and seed {seed}: expected at least 1 and 0")
    check(model)
    layers = sorted({t.layer for t in model.expert_tensors})
    of_layer = {}
    for i, layer in enumerate(layers):
        if progress is not None:
            progress("measuring layers", i, len(layers))
        of_layer[layer] = _Layer(model, layer).losses(np.random.default_rng([seed, layer]), n_samples)
    name = str(model.metadata.get("general.name", model.path.stem))
    return Losses(expert_bank_key(model), name, n_samples, seed, of_layer)


def solve(losses: Losses, mean: float) -> dict[int, int]:
    """The number of experts of each layer, on average `mean` (rounded to a whole sum), that lose least together.

    Raises:
        ValueError: `mean` is below 1 or above what the layers have.
    """
    tables = list(losses.of_layer.values())
    most = sum(map(len, tables)) / len(tables)
    if not 1.0 <= mean <= most:
        raise ValueError(f"a mean of {mean:g} experts is impossible: expected 1 to {most:g}")
    budget = round(mean * len(tables))
    # best[b]: the least loss of the layers so far with b experts in all; before the first, 0 for none.
    best = np.full(budget + 1, np.inf)
    best[0] = 0.0
    chosen = []
    for table in tables:
        # [k - 1, b]: with k experts in this layer
        totals = np.full((len(table), budget + 1), np.inf)
        for k, loss in enumerate(table[:budget], 1):
            totals[k - 1, k:] = best[: budget + 1 - k] + loss
        chosen.append(totals.argmin(axis=0) + 1)
        best = totals.min(axis=0)
    numbers = []
    for table_chosen in reversed(chosen):
        numbers.append(int(table_chosen[budget]))
        budget -= numbers[-1]
    return dict(zip(losses.of_layer, reversed(numbers), strict=True))


def save(losses: Losses, path: Path) -> None:
    """Write a file that `load` reads; it appears whole or not at all.

    Raises:
        ModelFormatError: it cannot be written.
    """
    fields = {
        "format": _FORMAT,
        "version": _VERSION,
        "model_key": losses.model_key,
        "model_name": losses.model_name,
        "n_samples": losses.n_samples,
        "seed": losses.seed,
        "losses": {str(layer): list(table) for layer, table in losses.of_layer.items()},
    }
    try:
        with replacing(path) as file:
            file.write(json.dumps(fields).encode() + b"\n")
    except OSError as error:
        raise ModelFormatError(
            f"cannot write what fewer experts cost: {error.strerror or error} ({path}); free space or name another file"
        ) from error


def load(path: Path, model: GgufModel) -> Losses:
    """Read the file of `save` and check that it is of this model.

    Raises:
        ModelFormatError: it cannot be read, is no such file, or of another model.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ModelFormatError(f"cannot read {path}: {error.strerror or error}; make it with `edgemoe lexi`") from error
    try:
        losses = _parse(data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelFormatError(
            f"cannot use {path}: it is no file of `edgemoe lexi` ({type(error).__name__}: {error!s:.80}); make it again"
        ) from error
    if losses.model_key != (key := expert_bank_key(model)):
        raise ModelFormatError(
            f"cannot use {path} with {model.path}: it was made from {losses.model_name!r:.80}, which has other experts "
            f"(key {losses.model_key:.8}, expected {key:.8}); make one from this model with `edgemoe lexi`"
        )
    expected = {layer: _n_used(model, layer) for layer in sorted({t.layer for t in model.expert_tensors})}
    if {layer: len(table) for layer, table in losses.of_layer.items()} != expected:
        raise ModelFormatError(
            f"cannot use {path} with {model.path}: it was made with another number of experts used; make it again with "
            "`edgemoe lexi`"
        )
    return losses


def _parse(data: bytes) -> Losses:
    if len(data) > _MAX_FILE_BYTES:
        raise ValueError(f"more than {_MAX_FILE_BYTES} bytes")
    fields: dict[str, Any] = json.loads(data)
    if fields["format"] != _FORMAT or fields["version"] != _VERSION:
        raise ValueError(f"format {fields['format']!r:.20} version {fields['version']!r:.20}")
    of_layer = {int(layer): tuple(float(d) for d in table) for layer, table in fields["losses"].items()}
    for layer, table in of_layer.items():
        if not table or not all(math.isfinite(d) and d >= 0.0 for d in table):
            raise ValueError(f"losses of layer {layer}")
    return Losses(
        str(fields["model_key"]),
        str(fields["model_name"]),
        int(fields["n_samples"]),
        int(fields["seed"]),
        dict(sorted(of_layer.items())),
    )


def _gating(model: GgufModel, form: _Form) -> int:
    if form.gating is not None:
        return form.gating
    return int(model.metadata.get(f"{model.architecture}.expert_gating_func") or form.gating_default)


def _n_used(model: GgufModel, layer: int) -> int:
    return min(model.n_experts_used, max(t.shape[2] for t in model.expert_tensors if t.layer == layer))


class _Layer:
    """One layer's router and experts."""

    def __init__(self, model: GgufModel, layer: int) -> None:
        self._model = model
        self._form = _FORMS[model.architecture]
        self._tensors = {
            t.name.removeprefix(f"blk.{layer}."): t for t in model.tensors if t.name.startswith(f"blk.{layer}.")
        }
        self._n_used = _n_used(model, layer)
        router = self._vector("ffn_gate_inp.weight")
        if router is None:
            raise ModelFormatError(f"cannot find the router of layer {layer} in {model.path}")
        self._router: Floats = router

    def _vector(self, name: str) -> Floats | None:
        tensor = self._tensors.get(name)
        return None if tensor is None else read_tensor(self._model, tensor)

    def losses(self, rng: np.random.Generator, n_samples: int) -> tuple[float, ...]:
        x = self._normed(rng.standard_normal((n_samples, self._router.shape[1])).astype(np.float32))
        chosen, weights = self._route(x)
        outputs = self._outputs(x, chosen)
        # [sample, k - 1, column]: with the k best experts
        partial = np.einsum("skr,src->skc", weights, outputs.astype(np.float64))
        distances = np.linalg.norm(partial - partial[:, -1:], axis=2)
        return tuple(distances.mean(axis=0).tolist())

    def _normed(self, x: Floats) -> Floats:
        name = next((n for n in _NORMS if f"{n}.weight" in self._tensors), "")
        weight = self._vector(f"{name}.weight")
        if weight is None:
            raise ModelFormatError(f"cannot find the norm before the experts of {self._model.path}")
        bias = self._vector(f"{name}.bias")
        if bias is not None:  # then it is a LayerNorm
            x = x - x.mean(axis=1, keepdims=True)
        x = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + _EPSILON)
        scaled = x * weight
        return np.ascontiguousarray(scaled if bias is None else scaled + bias, dtype=np.float32)

    def _route(self, x: Floats) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """The experts chosen [sample, rank], and their mixing weights by the k best only
        [sample, k - 1, rank].

        As llama.cpp's build_moe_ffn.
        """
        logits = x.astype(np.float64) @ self._router.T.astype(np.float64)
        if (bias := self._vector("ffn_gate_inp.bias")) is not None:
            logits = logits + bias
        gating = _gating(self._model, self._form)
        if gating == _SIGMOID:
            masses = 1.0 / (1.0 + np.exp(-logits))
        else:
            masses = np.exp(logits - logits.max(axis=1, keepdims=True))
            masses /= masses.sum(axis=1, keepdims=True)
        correction = self._vector("exp_probs_b.bias")
        scores = masses if correction is None else masses + correction
        chosen = np.argsort(-self._within_groups(scores), axis=1, kind="stable")[:, : self._n_used]
        best = np.take_along_axis(masses, chosen, axis=1)
        weights = best[:, None, :] * np.tri(self._n_used)
        is_normalized = self._form.is_normalized
        if is_normalized is None:
            is_normalized = bool(self._model.metadata.get(f"{self._model.architecture}.expert_weights_norm", False))
        # A softmax over the chosen is that over all, normalized over the chosen.
        if is_normalized or gating == _SOFTMAX_OF_CHOSEN:
            least = 0.0 if gating == _SOFTMAX_OF_CHOSEN else _SMALLEST_SUM
            weights /= np.maximum(weights.sum(axis=2, keepdims=True), least)
        scale = float(self._model.metadata.get(f"{self._model.architecture}.expert_weights_scale") or 1.0)
        return chosen, scale * weights

    def _within_groups(self, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The scores of experts in the best groups, by the sum of a group's two best; the others' minus infinity."""
        n_groups, n_best = (
            int(self._model.metadata.get(f"{self._model.architecture}.expert_group_{key}") or 0)
            for key in ("count", "used_count")
        )
        if n_groups <= 1:
            return scores
        grouped = scores.reshape(len(scores), n_groups, -1)
        ranks = np.argsort(-np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2), axis=1, kind="stable")
        allowed = np.zeros((len(scores), n_groups, 1), bool)
        np.put_along_axis(allowed, ranks[:, :n_best, None], True, axis=1)
        masked: npt.NDArray[np.float64] = np.where(allowed, grouped, -np.inf).reshape(scores.shape)
        return masked

    def _outputs(self, x: Floats, chosen: npt.NDArray[np.int64]) -> Floats:
        """[sample, rank, column]: what each chosen expert makes of its sample."""
        outputs = np.zeros((*chosen.shape, x.shape[1]), np.float32)
        for expert in np.unique(chosen).tolist():
            samples, ranks = np.nonzero(chosen == expert)
            outputs[samples, ranks] = self._expert(expert, x[samples])
        return outputs

    def _expert(self, expert: int, x: Floats) -> Floats:
        if "ffn_gate_up_exps.weight" in self._tensors:
            gate, up = np.split(self._product("ffn_gate_up_exps", expert, x), 2, axis=1)
        elif "ffn_gate_exps.weight" in self._tensors:
            gate, up = self._product("ffn_gate_exps", expert, x), self._product("ffn_up_exps", expert, x)
        else:
            raise ModelFormatError(f"cannot compute experts of {self._model.path}: they have no gate")
        with np.errstate(over="ignore"):  # exp of a large negative gate: the quotient is 0, as it should be
            if self._form.is_oai:  # alpha 1.702, limit 7 (build_moe_ffn)
                gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
                hidden = gate / (1.0 + np.exp(-1.702 * gate)) * (up + 1.0)
            else:
                hidden = gate / (1.0 + np.exp(-gate)) * up
        return self._product("ffn_down_exps", expert, np.ascontiguousarray(hidden, dtype=np.float32))

    def _product(self, name: str, expert: int, x: Floats) -> Floats:
        tensor = self._tensors[f"{name}.weight"]
        columns, n_rows, n_experts = tensor.shape
        row_bytes = tensor.n_bytes // (n_rows * n_experts)
        begin = tensor.offset + expert * n_rows * row_bytes
        y: Floats = np.empty((len(x), n_rows), np.float32)
        step = max(1, _BLOCK_BYTES // (4 * columns))
        for row in range(0, n_rows, step):
            n = min(step, n_rows - row)
            np.matmul(x, self._rows(tensor, begin + row * row_bytes, n, row_bytes).T, out=y[:, row : row + n])
        bias = self._tensors.get(f"{name}.bias")
        if bias is not None:
            np.add(y, read_tensor(self._model, bias)[expert], out=y)
        return y

    def _rows(self, tensor: GgufTensor, offset: int, n_rows: int, row_bytes: int) -> Floats:
        data = b"".join(read_range(self._model.files[tensor.file_idx], offset, n_rows * row_bytes))
        blocks = np.frombuffer(data, np.uint8).reshape(n_rows, row_bytes)
        rows: Floats = dequantize(blocks, GGMLQuantizationType[tensor.type_name], n_columns=tensor.shape[0])
        return rows


def describe(numbers: dict[int, int]) -> str:
    """The numbers of experts as ranges of layers: `0-3: 4, 4: 2`."""
    runs: list[list[int]] = []
    for layer, n in numbers.items():
        if runs and runs[-1][2] == n:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer, n])
    return ", ".join(f"{first}: {n}" if first == last else f"{first}-{last}: {n}" for first, last, n in runs)
