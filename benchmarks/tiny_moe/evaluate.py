# SPDX-License-Identifier: MIT
"""Held-out cross-entropy of the tiny model's GGUF file in stock llama.cpp, beside what counting pairs of tokens gives.

    python -m benchmarks.tiny_moe.evaluate tests/data/tiny_moe.gguf --work WORK --curve loss.csv --plot loss.png

Baselines are of the training text: unigrams, and bigrams that fall back to unigrams (interpolated with the weight
that is best for the held-out text, which flatters them).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.tiny_moe.corpus import DOMAINS
from edgemoe.converters.cross_entropy import log_softmax

CONTEXT_TOKENS = 512
N_SEQUENCES = 16  # of each domain, evenly spaced
SAMPLE_TOKENS = 64

Ids = npt.NDArray[np.int64]


def ngram_losses(train: Ids, windows: Ids, n_vocabulary: int) -> tuple[float, float]:
    """Cross-entropy in nats of unigrams and of interpolated bigrams; windows: [window, token]."""
    unigrams = np.bincount(train, minlength=n_vocabulary) + 1.0
    unigrams /= unigrams.sum()
    pairs = np.zeros((n_vocabulary, n_vocabulary), np.float32)
    np.add.at(pairs, (train[:-1], train[1:]), 1)
    totals = pairs.sum(axis=1)
    before, after = windows[:, :-1].ravel(), windows[:, 1:].ravel()
    bigram = np.where(totals[before] > 0, pairs[before, after] / np.maximum(totals[before], 1), 0)
    bigrams = [-np.log(w * bigram + (1 - w) * unigrams[after]).mean() for w in np.linspace(0.05, 0.95, 19)]
    return float(-np.log(unigrams[after]).mean()), float(min(bigrams))


def open_stock(model: Path) -> Any:
    """Stock llama.cpp, without weight repacking, on one thread, keeping the logits of all positions."""
    from edgemoe.converters.unpacked import UnpackedLlama

    return UnpackedLlama(
        str(model), n_ctx=CONTEXT_TOKENS, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False
    )


def losses_of(llm: Any, tokens: Ids) -> npt.NDArray[np.float64]:
    """Cross-entropy in nats of each token but the first, [token]; as many tokens as the context has."""
    llm.reset()
    llm.eval(tokens.tolist())
    return -log_softmax(llm.scores[: len(tokens) - 1])[np.arange(len(tokens) - 1), tokens[1:]]


def continue_text(llm: Any, tokens: Ids) -> str:
    """What the model writes behind these tokens at a temperature of 0.5."""
    llm.reset()
    llm.set_seed(6)
    written = itertools.islice(llm.generate(tokens.tolist(), temp=0.5, top_k=40), SAMPLE_TOKENS)
    text: bytes = llm.detokenize(list(written))
    return text.decode("utf-8", "replace")


def plot(curve: Path, out: Path) -> None:
    """The loss of each domain by step; held-out losses are dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(csv.DictReader(curve.open()))
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for i, domain in enumerate(DOMAINS):
        values = np.array([float(row[domain]) for row in rows])
        width = min(15, len(values))
        smooth = np.convolve(values, np.ones(width) / width, "valid")
        axes.plot(np.arange(len(smooth)) + width // 2, smooth, color=f"C{i}", label=domain)
        held_out = [(int(row["step"]), float(row[f"{domain} held out"])) for row in rows if row[f"{domain} held out"]]
        axes.plot(*zip(*held_out, strict=True), "o", color=f"C{i}", markersize=4)
    axes.set(xlabel="step of 4096 tokens", ylabel="cross-entropy, nats per token", ylim=(0, 6))
    axes.set_title("Lines: training, mean of 15 steps. Dots: held out.", fontsize=9)
    axes.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=90)


def main() -> None:
    """The command at the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="train.py's, for the tokens")
    parser.add_argument("--curve", type=Path, help="train.py's loss.csv")
    parser.add_argument("--plot", type=Path, help="write the curve as an image; needs the extra [plot]")
    arguments = parser.parse_args()
    if arguments.plot and arguments.curve:
        plot(arguments.curve, arguments.plot)
    ids = {key: value.astype(np.int64) for key, value in np.load(arguments.work / "tokens.npz").items()}
    llm = open_stock(arguments.model)
    result: dict[str, Any] = {"benchmark": "tiny_moe.evaluate", "model": arguments.model.name}
    print("domain       unigrams  bigrams   model  nats per token")
    texts = []
    for domain in DOMAINS:
        held_out = ids[f"{domain}/held-out"]
        starts = np.linspace(0, len(held_out) - CONTEXT_TOKENS, N_SEQUENCES).astype(int)
        windows = np.stack([held_out[start : start + CONTEXT_TOKENS] for start in starts])
        unigram, bigram = ngram_losses(ids[domain], windows, llm.n_vocab())
        losses = [losses_of(llm, window) for window in windows]
        model = float(np.mean(losses))
        print(f"{domain:11}  {unigram:8.3f}  {bigram:7.3f}  {model:6.3f}")
        result[domain] = {"unigram": round(unigram, 4), "bigram": round(bigram, 4), "model": round(model, 4)}
        prompt = held_out[:48]
        texts.append(
            f"--- {domain}: {llm.detokenize(prompt.tolist()).decode('utf-8', 'replace')!r} ->"
            f" {continue_text(llm, prompt)!r}"
        )
    print(*texts, sep="\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
