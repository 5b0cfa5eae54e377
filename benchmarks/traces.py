# SPDX-License-Identifier: MIT
"""Traces like those of real models that cannot be had here: a small random process fitted to published locality.

The score of expert e in layer l at token t is the sum of four Gaussian parts, whose variances add up to 1: what the
model always likes (popularity), what drifts over tens of tokens (topic), what drifts over a few (phrase), and what is
new with each token. A token selects the K highest. Layers are independent, so nothing here says how well one layer
foretells the next. `python -m benchmarks.traces` prints each published figure beside the process's own.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from edgemoe.trace import Trace, TraceLayer

PAGE_BYTES = 4096
WARM_TOKENS = 32  # not counted: published hit rates are of long runs
Ids = npt.NDArray[np.int16]  # [n_tokens, n_layers, K]
Scores = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Process:
    """What is fitted: shares of variance (the rest is new with each token), and tokens in which drifts decay by e."""

    popularity: float
    topic: float
    phrase: float
    topic_tokens: float
    phrase_tokens: float


@dataclasses.dataclass(frozen=True)
class Target:
    """A published figure: a metric of `METRICS`, its argument, its value and where it is from.

    Figures that contradict the others of their model are shown, but not fitted.
    """

    metric: str
    argument: int
    value: float
    source: str
    is_fitted: bool = True


@dataclasses.dataclass(frozen=True)
class Family:
    """A model's shape (shared/reference models.csv: configs of the models), what is known of its routing, and the fit.

    Attributes:
        n_experts_fitted: experts of the model that the figures were measured on, if that is a sibling.
        expert_mib: bytes of one expert, 3 projections, at 4.5 bits (gpt-oss: MXFP4).
        dense_params: parameters that each token uses outside of the routed experts.
    """

    name: str
    n_layers: int
    n_experts: int
    n_used: int
    expert_mib: float
    dense_params: float
    targets: tuple[Target, ...]
    process: Process
    n_experts_fitted: int = 0


IMP = "kekzl/imp PR#1359"
IMP_LRU = "kekzl/imp PR#1374"
BMOE = "BigMoeOnEdge route-trace findings"
SRP = "arXiv 2505.16056"

FAMILIES = {
    f.name: f
    for f in (
        Family(
            "Qwen3-30B-A3B", 48, 128, 8, 2.53, 1.49e9,
            (
                Target("reuse", 1, 0.43, f"between {IMP} (0.45) and {BMOE} (0.38, 0.43)"),
                Target("reuse", 8, 0.267, BMOE),
                Target("within", 8, 0.80, IMP),
                Target("static", 0, 0.376, BMOE),
                Target("distinct", 128, 64, BMOE),
                Target("lru", 8, 0.366, IMP_LRU),
                Target("lru", 24, 0.741, IMP_LRU),
                Target("lru", 49, 0.894, IMP_LRU),
                Target("lru", 81, 0.962, IMP_LRU),
                Target("srp", 16, 0.541, SRP),
            ),
            Process(0.4605, 0.1039, 0.1906, 182.4211, 3.3745),
        ),
        Family(
            "OLMoE-1B-7B", 16, 64, 8, 3.38, 0.475e9,
            (Target("srp", 16, 0.509, SRP), Target("lru", 32, 0.624, "colibri PR#362, without its prefetcher", False)),
            Process(0.2784, 0.0947, 0.3590, 99.8414, 2.3596),
        ),
        Family(
            "DeepSeek-V2-Lite", 26, 64, 6, 4.64, 1.05e9,
            (Target("reuse", 1, 0.273, "arXiv 2605.27081 (EOR)"), Target("srp", 16, 0.379, SRP)),
            Process(0.1184, 0.0786, 0.6070, 62.6529, 1.1281),
        ),
        Family(
            "gpt-oss-20b", 24, 32, 4, 12.61, 1.21e9,
            (
                Target("reuse", 1, 0.179, "gpt-oss-120b (128 experts), " + BMOE),
                Target("static", 0, 0.267, "gpt-oss-120b (128 experts), " + BMOE),
            ),
            Process(0.3538, 0.0654, 0.1597, 304.6086, 1.0144),
            n_experts_fitted=128,
        ),
        Family(
            "Qwen3.5-35B-A3B", 40, 256, 8, 1.69, 1.99e9,
            (
                Target("reuse", 1, 0.35, "Qwen3.6-35B-A3B, BigMoeOnEdge PR#101"),
                Target("lru", 29, 0.488, "Qwen3.6-35B-A3B at 2000 MiB of 17 GiB, BigMoeOnEdge docs"),
                Target("lru", 44, 0.63, "Qwen3.6-35B-A3B at 3000 MiB of 17 GiB (0.609-0.65), BigMoeOnEdge docs"),
                Target("distinct", 270, 128, "Qwen3.6-35B-A3B, BigMoeOnEdge 2026-09-29 findings"),
            ),
            Process(0.4654, 0.0045, 0.4330, 45.1955, 1.1397),
        ),
    )
}  # fmt: skip


def select(
    process: Process, n_layers: int, n_experts: int, n_used: int, n_tokens: int, seed: int
) -> tuple[Ids, Scores]:
    """Selected experts, best first, and their scores as float32: both [n_tokens, n_layers, n_used]."""
    rng = np.random.default_rng(seed)

    def draw() -> npt.NDArray[np.float32]:
        return rng.standard_normal((n_layers, n_experts), np.float32)

    new = max(0.0, 1.0 - process.popularity - process.topic - process.phrase)
    popular, topic, phrase = math.sqrt(process.popularity) * draw(), draw(), draw()
    keep_topic, keep_phrase = math.exp(-1 / process.topic_tokens), math.exp(-1 / process.phrase_tokens)
    experts = np.empty((n_tokens, n_layers, n_used), np.int16)
    scores = np.empty((n_tokens, n_layers, n_used), np.float32)
    for t in range(n_tokens):
        topic = keep_topic * topic + math.sqrt(1 - keep_topic**2) * draw()
        phrase = keep_phrase * phrase + math.sqrt(1 - keep_phrase**2) * draw()
        score = popular + math.sqrt(process.topic) * topic + math.sqrt(process.phrase) * phrase
        score += math.sqrt(new) * draw()
        best = np.argsort(-score, axis=1)[:, :n_used]
        experts[t] = best
        scores[t] = np.take_along_axis(score, best, axis=1)
    return experts, scores


def generate(family: Family, n_prompt: int, n_decode: int, seed: int = 0, n_ubatch: int = 512) -> Trace:
    """A trace of a prompt, in micro-batches, and a decode. The same arguments give the same trace."""
    n_tokens = n_prompt + n_decode
    experts, scores = select(family.process, family.n_layers, family.n_experts, family.n_used, n_tokens, seed)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    batch = [t // n_ubatch for t in range(n_prompt)]
    first = batch[-1] + 1 if batch else 0
    batch += range(first, first + n_decode)
    slice_bytes = -(-int(family.expert_mib * (1 << 20)) // 3 // PAGE_BYTES) * PAGE_BYTES
    shape = (batch[-1] + 1, family.n_layers)
    return Trace(
        model=f"{family.name} (generated, seed {seed})",
        layers=tuple(
            TraceLayer(i, family.n_experts, family.n_used, (slice_bytes,) * 3) for i in range(family.n_layers)
        ),
        batch_of_token=np.array(batch, np.int32),
        experts=experts,
        weights=weights / weights.sum(axis=2, keepdims=True),
        begin_us=np.full(shape, np.nan, np.float64),
        wait_us=np.full(shape, np.nan, np.float32),
        read_bytes=np.full(shape, -1, np.int64),
        resident=None,
    )


def reuse(experts: Ids, lag: int) -> float:
    """Share of selections that the token `lag` before made too."""
    same = experts[lag:, :, :, None] == experts[:-lag, :, None, :]
    return float(same.any(axis=3)[WARM_TOKENS:].mean())


def within(experts: Ids, n_tokens: int) -> float:
    """Share of selections that one of the last `n_tokens` tokens made too."""
    found = np.zeros(experts[n_tokens:].shape, bool)
    for lag in range(1, n_tokens + 1):
        before = experts[n_tokens - lag : len(experts) - lag]
        found |= (experts[n_tokens:, :, :, None] == before[:, :, None, :]).any(axis=3)
    return float(found[WARM_TOKENS:].mean())


def _counts(experts: Ids) -> npt.NDArray[np.int64]:
    """Uses per layer and expert: [n_layers, most experts]."""
    n_experts = int(experts.max()) + 1
    return np.stack([np.bincount(experts[:, i].ravel(), minlength=n_experts) for i in range(experts.shape[1])])


def static(experts: Ids, _argument: int) -> float:
    """Share of selections that the K most used experts of each layer cover."""
    counts = np.sort(_counts(experts), axis=1)
    return float(counts[:, -experts.shape[2] :].sum() / counts.sum())


def distinct(experts: Ids, n_tokens: int) -> float:
    """Experts used per layer in `n_tokens` tokens."""
    windows = [experts[i : i + n_tokens] for i in range(0, len(experts) - n_tokens + 1, n_tokens)]
    return float(np.mean([(_counts(w) > 0).sum() / w.shape[1] for w in windows]))


def lru(experts: Ids, n_slots: int) -> float:
    """Hit rate of a least-recently-used cache of `n_slots` experts in each layer, hits first."""
    last = np.full((experts.shape[1], int(experts.max()) + 1), -1)
    hits = []
    for t, chosen in enumerate(experts.astype(np.int64)):
        used = np.take_along_axis(last, chosen, axis=1)
        newer = (last[:, None, :] > used[:, :, None]).sum(axis=2)
        hits.append((used >= 0) & (newer < n_slots))
        np.put_along_axis(last, chosen, t, axis=1)
    return float(np.mean(hits[WARM_TOKENS:]))


def srp(experts: Ids, n_tokens: int) -> float:
    """Best F1 score of one set of experts for all tokens of a segment: our reading of 2505.16056's SRP."""
    best = []
    for i in range(0, len(experts) - n_tokens + 1, n_tokens):
        counts = np.sort(_counts(experts[i : i + n_tokens]), axis=1)[:, ::-1]
        sizes = np.arange(1, counts.shape[1] + 1)
        best.append((2 * counts.cumsum(axis=1) / (n_tokens * (experts.shape[2] + sizes))).max(axis=1))
    return float(np.mean(best))


METRICS: dict[str, Callable[[Ids, int], float]] = {
    "reuse": reuse,
    "within": within,
    "static": static,
    "distinct": distinct,
    "lru": lru,
    "srp": srp,
}


def measure(family: Family, process: Process, n_layers: int = 12, n_tokens: int = 560, seed: int = 2) -> list[float]:
    """The process's own values of the family's targets."""
    n_experts = family.n_experts_fitted or family.n_experts
    experts, _ = select(process, n_layers, n_experts, family.n_used, n_tokens, seed)
    return [METRICS[t.metric](experts, t.argument) for t in family.targets]


def loss(family: Family, values: Sequence[float]) -> float:
    """Sum of squared relative errors."""
    return sum((v / t.value - 1.0) ** 2 for v, t in zip(values, family.targets, strict=True) if t.is_fitted)


def fit(family: Family, n_steps: int = 200, seed: int = 0) -> Process:
    """Random search around the best process so far, in ever smaller steps; deterministic.

    Where the figures leave a choice, it stays near the process of the model of which most is known. Fitted to 8 layers
    of one seed; the errors that are shown are of 12 layers of another.
    """
    rng = np.random.default_rng(seed)
    usual = np.log(np.array([0.45, 0.10, 0.22, 0.23])) - math.log(0.23)
    start = np.append(usual[:3], [math.log(100.0), math.log(3.0)])

    def process(x: npt.NDArray[np.float64]) -> Process:
        shares = np.exp(np.append(x[:3], 0.0))
        shares /= shares.sum()
        tokens = np.exp(np.clip(x[3:], [math.log(12), 0.0], [math.log(1000), math.log(10)]))
        return Process(*(round(float(v), 4) for v in (*shares[:3], *tokens)))

    def cost(x: npt.NDArray[np.float64]) -> float:
        found = loss(family, measure(family, process(x), n_layers=8, n_tokens=560, seed=1))
        return found + 0.0005 * float(((x - start) ** 2).sum())

    best, least = start, cost(start)
    for step in range(n_steps):
        x = best + rng.standard_normal(5) * 0.7 * 0.985**step
        found = cost(x)
        if found < least:
            best, least = x, found
    return process(best)


def main() -> None:
    """Print what was published beside what the process does; with --fit, find it anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fit", action="store_true", help="search the parameters anew and print them: a minute each")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    args = parser.parse_args()
    for name in args.families:
        family = FAMILIES[name]
        process = fit(family) if args.fit else family.process
        print(f"{name}: {process}")
        for target, value in zip(family.targets, measure(family, process), strict=True):
            argument = f"({target.argument})" if target.argument else ""
            print(
                f"  {target.metric + argument:<14}{target.value:>8.3f} published {value:>8.3f} here "
                f"{100 * (value / target.value - 1):>+7.1f} %   {target.source}"
            )


if __name__ == "__main__":
    main()
