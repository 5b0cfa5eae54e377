# SPDX-License-Identifier: MIT
"""Types for each projection of each layer's experts, so that the experts take so many bits a weight and lose least.

What an error costs comes from `alphaq` (spectra, no text) or `gemq` (a calibration text and an importance matrix), what
types cost from `quantize.distortion`, the choice from `quantize.allocation`, which is exact. GGUF has one type for all
experts of a tensor, so a group is a projection of a layer.

Scores are guesses, so the result is tested: the mixed file and the best one with the same bits for all experts, within
the same bytes, are both written and predict a text that nothing was fitted to. The mixed one is kept only if it
predicts it better; else the uniform one is, and the report says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from gguf import GGMLQuantizationType as GgmlType

from edgemoe.errors import ConversionError
from edgemoe.formats.gguf import GgufModel, GgufTensor, read_model, read_raw_metadata

from . import gemq
from .cross_entropy import Difference, compare, negative_log_likelihoods
from .gguf_file import DEFAULT_ALIGNMENT_BYTES, MetadataValue
from .gguf_writer import copy_of, sha256_of, write_gguf
from .quantize import alphaq
from .quantize.allocation import Allocation, Group, Option, allocate
from .quantize.blocks import block_values, row_bytes
from .quantize.distortion import Floats, Sample, distortions, spread
from .quantize.importance import ImportanceMatrix
from .quantize.mixed_file import override_of
from .quantize.presets import Override
from .requantize import Recipe, n_matrices_of, read_rows, requantize, tensors_of

Method = Literal["alphaq", "gemq"]
Progress = Callable[[str, int, int], None]

CANDIDATES = (
    *(GgmlType.Q2_K, GgmlType.Q3_K, GgmlType.IQ4_XS, GgmlType.MXFP4, GgmlType.Q4_K, GgmlType.IQ4_NL, GgmlType.Q5_K),
    *(GgmlType.Q5_0, GgmlType.Q6_K, GgmlType.Q8_0),
)
"""What experts may have: types that edgemoe's own kernels multiply."""

CALIBRATION_TOKENS = 512
"""Tokens for `gemq`: the model runs over them once for each projection of each layer."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a method found.

    Attributes:
        groups: projections with their types' costs.
        weight: by tensor, what its error is multiplied with.
    """

    groups: tuple[Group, ...]
    weight: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One of the two files that were compared.

    Attributes:
        name: `mixed` or `uniform`.
        allocation: the experts' types.
        nats: mean negative log-likelihood of a token of the held-out text.
    """

    name: str
    allocation: Allocation
    nats: float


@dataclasses.dataclass(frozen=True)
class MixedReport:
    """What was compared and which file was written.

    Attributes:
        mixed, uniform: the two.
        difference: of mixed less uniform, in nats a token.
        n_tokens: of the held-out text that were predicted.
        written: the one that was kept.
    """

    mixed: Trial
    uniform: Trial
    difference: Difference
    n_tokens: int
    written: Trial

    def overrides(self) -> tuple[Override, ...]:
        """The written types, as a MIXED.toml has them."""
        return overrides_of(self.written.allocation)


def score(
    source: Path,
    method: Method,
    *,
    importance: ImportanceMatrix | None = None,
    calibration_text: str = "",
    max_tokens: int = CALIBRATION_TOKENS,
    progress: Progress,
) -> Scores:
    """What each type would cost in each projection of the experts.

    Args:
        source: the model as a GGUF file, best in F16, BF16 or F32.
        method: see the module.
        importance: needed by `gemq`; `alphaq` only gives it to the quantizers.
        calibration_text, max_tokens: needed by `gemq`.
        progress: called with the stages `measure` (tensors) and `disturb` (runs).

    Raises:
        ConversionError: the model has no experts, or what the method needs is missing or does not fit.
    """
    model = read_model(source)
    tensors = model.expert_tensors
    if not tensors:
        raise ConversionError(
            f"cannot allocate types to the experts of {source}: it has none, expected ffn_*_exps.weight; "
            "use a preset without --bpw"
        )
    names = [tensor.name for tensor in tensors]
    columns = {} if importance is None else importance.for_tensors(tensors_of(model))
    if method == "gemq" and (importance is None or (missing := [name for name in names if name not in columns])):
        which = "found none" if importance is None else f"found none for {missing[0]}"
        raise ConversionError(
            f"cannot allocate types with gemq: it needs an importance matrix of all experts, {which}; "
            "collect one with `edgemoe calibrate`, or use alphaq"
        )
    exponents: dict[str, float] = {}
    errors: dict[str, dict[GgmlType, float]] = {}
    for index, tensor in enumerate(tensors):
        samples = list(_samples(model, tensor))
        types = _smaller_types(tensor)
        if method == "alphaq":
            exponents[tensor.name] = alphaq.tail_exponent(
                [read_rows(model, tensor, *band) for band in alphaq.bands(n_matrices_of(tensor), *tensor.shape[1::-1])]
            )
            # Its cost is that of the plain error; the quantizer minimizes another one if it is given an importance.
            errors[tensor.name] = distortions(samples, types, None)
        else:
            assert importance is not None  # asked for above
            errors[tensor.name] = distortions(samples, types, columns[tensor.name], weights=_shares(importance, tensor))
        errors[tensor.name][GgmlType[tensor.type_name]] = 0.0  # to stay as it is
        progress("measure", index + 1, len(tensors))
    if method == "alphaq":
        weight = alphaq.weigh(exponents)
    else:
        weight = gemq.sensitivities(source, names, calibration_text, max_tokens=max_tokens, progress=progress)
    return Scores(tuple(_group(tensor, errors[tensor.name], weight[tensor.name]) for tensor in tensors), weight)


def choose(scores: Scores, bits_per_weight: float) -> tuple[Allocation, Allocation]:
    """The mixed allocation, and the uniform one of least cost, that fit into `bits_per_weight` of the experts.

    Uniform is the same number of bits for all: of each projection's types with so many or less, the best. A projection
    that has none, because its rows are too short for the blocks of such types, gets its smallest, as in llama.cpp's
    presets.

    Raises:
        ConversionError: nothing fits.
    """
    groups = scores.groups
    budget_bytes = int(bits_per_weight * sum(group.n_weights for group in groups) / 8)
    mixed = allocate(groups, budget_bytes)
    widths = {_bits(group, option) for group in groups for option in group.options}
    uniforms = [_uniform(groups, width_bits) for width_bits in sorted(widths)]
    # One fits if `mixed` does: with the smallest width, all groups have their smallest types.
    fitting = [allocation for allocation in uniforms if allocation.n_bytes <= budget_bytes]
    return mixed, min(fitting, key=lambda allocation: (allocation.cost, allocation.n_bytes))


def quantize_to_bits(
    source: Path,
    out: Path,
    *,
    base: str,
    bits_per_weight: float,
    method: Method,
    holdout_text: str,
    importance: ImportanceMatrix | None = None,
    calibration_text: str = "",
    max_holdout_tokens: int | None = None,
    progress: Progress,
) -> MixedReport:
    """Write `out` with experts of `bits_per_weight`, mixed or uniform, whichever predicts the held-out text better.

    Room is needed for both files. The table of types and the comparison go into the metadata.

    Args:
        source: the model as a GGUF file, best in F16, BF16 or F32.
        out: replaced if it exists.
        base: the preset of all tensors that are not routed experts.
        bits_per_weight: of the routed experts, on average, at most.
        method: see the module.
        holdout_text: a text that neither importance nor calibration saw.
        importance: see `score`; the quantizers get it for all tensors.
        calibration_text: see `score`.
        max_holdout_tokens: of the held-out text, at most.
        progress: called with stage, done and total.

    Raises:
        ConversionError: see `score`, `choose`, `requantize` and `negative_log_likelihoods`.
    """
    scores = score(source, method, importance=importance, calibration_text=calibration_text, progress=progress)
    allocations = dict(zip(("mixed", "uniform"), choose(scores, bits_per_weight), strict=True))
    model = read_model(source)
    columns = {} if importance is None else importance.for_tensors(tensors_of(model))
    source_sha256 = sha256_of(model.files, progress)
    paths = {name: out.with_name(f".{out.name}.{name}.trial") for name in allocations}
    try:
        losses = {}
        for name, allocation in allocations.items():
            recipe = Recipe(
                base,
                overrides_of(allocation),
                columns,
                "" if importance is None else importance.sha256,
                {"edgemoe.quantize.allocation": allocation.table()},
            )
            requantize(source, paths[name], recipe, source_sha256=source_sha256, progress=progress)
            losses[name] = negative_log_likelihoods(
                paths[name], holdout_text, max_tokens=max_holdout_tokens, progress=progress
            )
        trials = {name: Trial(name, allocations[name], float(losses[name].mean())) for name in allocations}
        difference = compare(losses["mixed"], losses["uniform"])
        written = trials["mixed" if difference.mean < 0 else "uniform"]
        report = MixedReport(trials["mixed"], trials["uniform"], difference, len(losses["mixed"]), written)
        comparison = {
            **describe(report),
            "method": method,
            "target_bits_per_weight": bits_per_weight,
            "holdout_sha256": hashlib.sha256(holdout_text.encode()).hexdigest(),
        }
        for name, path in paths.items():
            if name != written.name:
                path.unlink()
        _copy_with(paths[written.name], out, {"edgemoe.quantize.comparison": json.dumps(comparison)}, progress)
    finally:
        for path in paths.values():
            with contextlib.suppress(OSError):
                path.unlink()
    return report


def describe(report: MixedReport) -> dict[str, object]:
    """The comparison in numbers, as JSON takes them."""

    def trial(found: Trial) -> dict[str, object]:
        return {
            "bytes": found.allocation.n_bytes,
            "bits_per_weight": round(found.allocation.bits_per_weight, 4),
            "types": sorted({option.ggml_type.name for option in found.allocation.chosen}),
            "nats_per_token": found.nats,
        }

    return {
        "written": report.written.name,
        "mixed": trial(report.mixed),
        "uniform": trial(report.uniform),
        "mixed_less_uniform_nats": report.difference.mean,
        "standard_error_nats": report.difference.standard_error,
        "n_tokens": report.n_tokens,
    }


def overrides_of(allocation: Allocation) -> tuple[Override, ...]:
    """The allocation as types by patterns that match one tensor each."""
    return tuple(
        override_of(group.name, option.ggml_type)
        for group, option in zip(allocation.groups, allocation.chosen, strict=True)
    )


def _smaller_types(tensor: GgufTensor) -> list[GgmlType]:
    """Candidates whose blocks divide the rows and that are smaller than what the tensor has."""
    n_columns = tensor.shape[0]
    source_bytes = row_bytes(n_columns, GgmlType[tensor.type_name])
    return [
        ggml_type
        for ggml_type in CANDIDATES
        if n_columns % block_values(ggml_type) == 0 and row_bytes(n_columns, ggml_type) < source_bytes
    ]


def _group(tensor: GgufTensor, errors: dict[GgmlType, float], weight: float) -> Group:
    n_weights = int(np.prod(tensor.shape, dtype=np.int64))
    n_rows = n_weights // tensor.shape[0]
    return Group(
        tensor.name,
        n_weights,
        tuple(
            Option(ggml_type, n_rows * row_bytes(tensor.shape[0], ggml_type), weight * error)
            for ggml_type, error in errors.items()
        ),
    )


def _uniform(groups: tuple[Group, ...], width_bits: float) -> Allocation:
    """For each group the best of `width_bits` per weight or less, or of its smallest types if all have more."""
    chosen = []
    for group in groups:
        most_bits = max(width_bits, min(_bits(group, option) for option in group.options))
        within = [option for option in group.options if _bits(group, option) <= most_bits]
        chosen.append(min(within, key=lambda option: (option.cost, option.n_bytes)))
    return Allocation(groups, tuple(chosen))


def _bits(group: Group, option: Option) -> float:
    return option.n_bytes * 8 / group.n_weights


def _samples(model: GgufModel, tensor: GgufTensor) -> Iterator[Sample]:
    n_columns, n_rows = tensor.shape[0], tensor.shape[1]
    n_matrices = n_matrices_of(tensor)
    pieces = list(spread(n_matrices, n_rows, n_columns))
    for matrix, first_row, n_taken in pieces:
        rows = read_rows(model, tensor, matrix, first_row, n_taken, 1)
        yield Sample(rows, matrix, n_matrices * n_rows / len(pieces))


def _shares(importance: ImportanceMatrix, tensor: GgufTensor) -> Floats | None:
    """How much each expert is used, on average 1."""
    counts = importance.counts[tensor.name]
    if len(counts) != n_matrices_of(tensor) or not counts.any():
        return None
    shares: Floats = (counts / counts.mean()).astype(np.float32)
    return shares


def _copy_with(source: Path, out: Path, metadata: dict[str, MetadataValue], progress: Progress) -> None:
    """Copy a GGUF file with more metadata."""
    model = read_model(source)
    alignment = int(model.metadata.get("general.alignment", DEFAULT_ALIGNMENT_BYTES))
    tensors = [copy_of(model, tensor) for tensor in model.tensors]
    write_gguf(out, {**read_raw_metadata(source), **metadata}, tensors, alignment_bytes=alignment, progress=progress)
