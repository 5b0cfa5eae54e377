# SPDX-License-Identifier: MIT
"""Do experts of a model specialise by domain? The selections that edgemoe traces, and shuffled labels as the control.

    python -m benchmarks.tiny_moe.specialisation tests/data/tiny_moe.gguf --samples tests/data/tiny_moe

Of each layer, the measure is the Jensen-Shannon divergence (Lin, Divergence measures based on the Shannon entropy,
1991) of the domains' distributions of uses over experts: the entropy of their mean less the mean of their entropies, in
bits; 0 if all domains use experts alike, 2 if four domains share no expert. Samples of one domain differ as well, so
the control is the same measure with the domains' labels dealt out anew among the samples.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.tiny_moe.corpus import DOMAINS
from benchmarks.tiny_moe.samples import read_samples

Uses = npt.NDArray[np.float64]

N_SHUFFLES = 1000
CONTEXT_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class Specialisation:
    """Of each layer, in bits.

    Attributes:
        divergence: between the domains.
        shuffled_mean, shuffled_max: mean and largest of those with shuffled labels.
        pairs: [layer, domain, domain], between two domains; at most 1.
    """

    divergence: npt.NDArray[np.float64]
    shuffled_mean: npt.NDArray[np.float64]
    shuffled_max: npt.NDArray[np.float64]
    pairs: npt.NDArray[np.float64]


def count_uses(model: Path, texts: Sequence[str]) -> Uses:
    """How often each sample selects each expert, [sample, layer, expert], as edgemoe's traces have it."""
    import edgemoe
    from edgemoe import trace

    counts = []
    options = {"n_ctx": CONTEXT_TOKENS, "n_threads": 1, "n_threads_batch": 1, "verbose": False, "warm_start": False}
    options["logits_all"] = True  # otherwise llama.cpp's last layer computes the last token of a batch only
    with edgemoe.Llama(model, **options) as llm, tempfile.TemporaryDirectory() as folder:
        for i, text in enumerate(texts):
            tokens = llm.tokenize(text.encode(), add_bos=False)[:CONTEXT_TOKENS]
            path = Path(folder) / f"{i}.trace"
            llm.reset()
            with llm.record_trace(path) as check:
                llm.eval(tokens)
                check()
            recorded = trace.load(path)
            n_experts = max(layer.n_experts for layer in recorded.layers)
            chosen = recorded.experts.transpose(1, 0, 2)
            counts.append([np.bincount(of_layer.ravel(), minlength=n_experts) for of_layer in chosen])
    return np.asarray(counts, np.float64)


def divergence_bits(distributions: Uses) -> npt.NDArray[np.float64]:
    """distributions: [kind, ..., expert], each of sum 1; what is returned has the shape of `...`."""

    def entropy(p: Uses) -> Uses:
        return -(p * np.log2(np.where(p > 0, p, 1.0))).sum(axis=-1)

    return np.asarray(entropy(distributions.mean(axis=0)) - entropy(distributions).mean(axis=0))


def distributions_of(uses: Uses, labels: npt.NDArray[np.int64]) -> Uses:
    """Share of the uses that each expert has, [label, layer, expert]."""
    sums = np.stack([uses[labels == label].sum(axis=0) for label in np.unique(labels)])
    return sums / sums.sum(axis=-1, keepdims=True)


def measure(uses: Uses, labels: npt.NDArray[np.int64], n_shuffles: int = N_SHUFFLES, seed: int = 0) -> Specialisation:
    """uses: [sample, layer, expert]; labels: [sample], the domain of each."""
    rng = np.random.default_rng(seed)
    distributions = distributions_of(uses, labels)
    shuffled = np.stack([divergence_bits(distributions_of(uses, rng.permutation(labels))) for _ in range(n_shuffles)])
    pairs = [[divergence_bits(np.stack([a, b])) for b in distributions] for a in distributions]
    return Specialisation(
        divergence=divergence_bits(distributions),
        shuffled_mean=shuffled.mean(axis=0),
        shuffled_max=shuffled.max(axis=0),
        pairs=np.moveaxis(np.asarray(pairs), 2, 0),
    )


def uses_and_labels(model: Path, samples: Mapping[str, Sequence[str]]) -> tuple[Uses, npt.NDArray[np.int64]]:
    """Of all samples, domain by domain."""
    texts = [text for domain in samples for text in samples[domain]]
    labels = [i for i, domain in enumerate(samples) for _ in samples[domain]]
    return count_uses(model, texts), np.asarray(labels, np.int64)


def main() -> None:
    """The command at the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=Path, required=True, help="the folder of samples.py")
    parser.add_argument("--csv", type=Path, help="write the share of uses: domain, layer, expert, share")
    arguments = parser.parse_args()
    uses, labels = uses_and_labels(arguments.model, read_samples(arguments.samples))
    found = measure(uses, labels)
    shares = distributions_of(uses, labels)
    print("layer  divergence  shuffled mean  shuffled max  experts with half of the uses, by domain")
    for layer in range(len(found.divergence)):
        halves = [int((np.cumsum(np.sort(shares[d, layer])[::-1]) < 0.5).sum()) + 1 for d in range(len(DOMAINS))]
        print(
            f"{layer:5}  {found.divergence[layer]:10.3f}  {found.shuffled_mean[layer]:13.3f}"
            f"  {found.shuffled_max[layer]:12.3f}  {halves}"
        )
    if arguments.csv:
        rows = ["domain,layer,expert,share"]
        for (domain, layer, expert), share in np.ndenumerate(shares):
            rows.append(f"{DOMAINS[domain]},{layer},{expert},{share:.5f}")
        arguments.csv.write_text("\n".join(rows) + "\n")
    fields = {name: np.round(value, 4).tolist() for name, value in dataclasses.asdict(found).items()}
    print(json.dumps({"benchmark": "tiny_moe.specialisation", "model": arguments.model.name, **fields}))


if __name__ == "__main__":
    main()
