# SPDX-License-Identifier: MIT
"""Mixed precision against one width for all experts: how well files of the same bytes predict the held-out samples.

    python -m benchmarks.tiny_moe.mixed SOURCE.gguf --imatrix IMATRIX.gguf --calibration TEXT \\
        --samples tests/data/tiny_moe

SOURCE is the checkpoint in F32, the importance matrix is of the calibration text, which is training text. All files are
quantized with that importance matrix, so that only the types differ. The uniform one is the better of those that the
methods' costs choose. `plain` is the control: the exact allocation for the errors of the weights alone, every
projection as sensitive as the others. Each sample is predicted from an empty context. The standard error is over
samples, paired: of the differences of their means.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.tiny_moe.corpus import DOMAINS
from benchmarks.tiny_moe.samples import read_samples
from edgemoe.converters.cross_entropy import negative_log_likelihoods
from edgemoe.converters.gguf_writer import no_progress
from edgemoe.converters.mixed_precision import Method, Scores, choose, overrides_of, score
from edgemoe.converters.quantize.allocation import Allocation
from edgemoe.converters.quantize.importance import ImportanceMatrix, read_importance
from edgemoe.converters.requantize import Recipe, requantize, tensors_of
from edgemoe.formats.gguf import read_model

Floats = npt.NDArray[np.float64]

METHODS: tuple[Method, ...] = ("alphaq", "gemq")


def sample_losses(model: Path, samples: list[str]) -> Floats:
    """Mean negative log-likelihood of each sample's tokens, in nats."""
    return np.array([negative_log_likelihoods(model, text).mean() for text in samples])


def losses_of(source: Path, allocation: Allocation, importance: ImportanceMatrix, samples: list[str]) -> Floats:
    """`sample_losses` of the source quantized so, everything but experts in Q8_0."""
    columns = importance.for_tensors(tensors_of(read_model(source)))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.gguf"
        requantize(source, out, Recipe("Q8_0", overrides_of(allocation), columns, importance.sha256))
        return sample_losses(out, samples)


def plain(scores: Scores) -> Scores:
    """The same without sensitivities."""
    groups = tuple(
        dataclasses.replace(
            group,
            options=tuple(
                dataclasses.replace(option, cost=option.cost / scores.weight[group.name]) for option in group.options
            ),
        )
        for group in scores.groups
    )
    return Scores(groups, dict.fromkeys(scores.weight, 1.0))


def describe(name: str, allocation: Allocation, losses: Floats, than: Floats) -> dict[str, object]:
    """Print and return how much worse than `than` it predicts."""
    differences = losses - than
    mean, error = float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(len(differences)))
    n_better = int((differences < 0).sum())
    print(
        f"  {name:8} {allocation.bits_per_weight:.3f} bits  {losses.mean():.4f} nats  {mean:+.4f} ± {error:.4f}  "
        f"better on {n_better} of {len(losses)}",
        flush=True,
    )
    types = [option.ggml_type.name for option in allocation.chosen]
    return {
        "bits_per_weight": round(allocation.bits_per_weight, 4),
        "nats": round(float(losses.mean()), 5),
        "difference": round(mean, 5),
        "standard_error": round(error, 5),
        "n_better": n_better,
        "types": {group.name: name for group, name in zip(allocation.groups, types, strict=True)},
    }


def main() -> None:
    """The command at the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--imatrix", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--bpw", type=float, nargs="+", default=[3.5, 3.7084, 4.25, 4.5, 5.5])
    parser.add_argument("--calibration-tokens", type=int, default=512)
    arguments = parser.parse_args()
    by_domain = read_samples(arguments.samples)
    samples = [text for domain in DOMAINS for text in by_domain[domain]]
    importance = read_importance(arguments.imatrix)
    text = arguments.calibration.read_text("utf-8")
    scores: dict[str, Scores] = {
        method: score(
            arguments.source,
            method,
            importance=importance,
            calibration_text=text,
            max_tokens=arguments.calibration_tokens,
            progress=no_progress,
        )
        for method in METHODS
    }
    scores["plain"] = plain(scores["alphaq"])
    of_source = sample_losses(arguments.source, samples)
    print(f"source: {of_source.mean():.4f} nats")
    result: dict[str, object] = {"benchmark": "tiny_moe.mixed", "source_nats": round(float(of_source.mean()), 5)}
    for bits_per_weight in arguments.bpw:
        print(f"{bits_per_weight:g} bits; differences: uniform less source, mixed less uniform")
        chosen = {method: choose(scores[method], bits_per_weight) for method in scores}
        # Methods mostly choose the same one, which is measured once.
        distinct = {tuple(o.ggml_type for o in uniform.chosen): uniform for _, uniform in chosen.values()}
        uniforms = [(losses_of(arguments.source, one, importance, samples), one) for one in distinct.values()]
        of_uniform, uniform = min(uniforms, key=lambda pair: float(pair[0].mean()))
        rows = {"uniform": describe("uniform", uniform, of_uniform, of_source)}
        for method, (mixed, _) in chosen.items():
            losses = losses_of(arguments.source, mixed, importance, samples)
            rows[method] = describe(method, mixed, losses, of_uniform)
        result[f"{bits_per_weight:g}"] = rows
    print(json.dumps(result))


if __name__ == "__main__":
    main()
