# SPDX-License-Identifier: MIT
"""How many of the next layers' experts can be named beforehand, by several rules; in float64, by transformers.

    python -m benchmarks.tiny_moe.foresight CHECKPOINT --samples tests/data/tiny_moe

CHECKPOINT is what `benchmarks.tiny_moe.train save` writes. Of each rule: recall, the share of the chosen experts that
were named, as many as are chosen, over all samples. What needs fitting is fitted to the samples with odd numbers and
judged by the others; `learnt` begins with nothing and learns as it goes, as `kernels/core/corrections.cc` does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

N_TOKENS = 512
RATE, COMMON_SHARE = 0.1, 0.25
Array = npt.NDArray[np.float64]
Text = dict[Any, Array]


class Model:
    """The states of a text, and routers applied to them."""

    def __init__(self, checkpoint: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.layers = list(self.model.model.layers)
        self.n_used = int(self.model.config.num_experts_per_tok)
        self._seen: dict[Any, torch.Tensor] = {}
        for i, layer in enumerate(self.layers):
            layer.post_attention_layernorm.register_forward_hook(self._note(("state", i), is_input=True))
            layer.mlp.register_forward_hook(self._note(("experts", i), is_input=False))

    def _note(self, key: tuple[str, int], *, is_input: bool) -> Any:
        def hook(_module: Any, given: Any, made: Any) -> None:
            value = given[0] if is_input else made[0] if isinstance(made, tuple) else made
            self._seen[key] = value.detach().reshape(-1, value.shape[-1])

        return hook

    def read(self, path: Path) -> Text:
        """States before each router, outputs of each layer's experts, and embeddings."""
        ids = self.tokenizer(path.read_text(), return_tensors="pt").input_ids[:, :N_TOKENS]
        with torch.no_grad():
            self.model(ids)
            self._seen["token"] = self.model.model.embed_tokens(ids)[0]
        return {key: value.numpy().astype(np.float64) for key, value in self._seen.items()} | {"ids": ids[0].numpy()}

    def scores(self, layer: int, state: Array) -> Array:
        """The layer's router on a state, [tokens, experts]."""
        block = self.layers[layer]
        norm = block.post_attention_layernorm.weight.detach().numpy().astype(np.float64)
        weights = block.mlp.gate.weight.detach().numpy().astype(np.float64)
        rms = np.sqrt((state * state).mean(-1, keepdims=True) + self.model.config.rms_norm_eps)
        scores: Array = (state / rms * norm) @ weights.T
        return scores

    def best(self, scores: Array) -> npt.NDArray[np.int64]:
        """The experts that scores choose, [tokens, n_used]."""
        return np.argsort(-scores, axis=-1)[:, : self.n_used]

    def mixture(self, scores: Array) -> Array:
        """Mixing weights, [tokens, experts], 0 for the others."""
        best = self.best(scores)
        exp = np.exp(np.take_along_axis(scores, best, 1))
        weights = np.zeros_like(scores)
        np.put_along_axis(weights, best, exp / exp.sum(-1, keepdims=True), 1)
        return weights


def recall(named: npt.NDArray[np.int64], chosen: npt.NDArray[np.int64]) -> float:
    """The share of the chosen that were named."""
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(named, chosen, strict=True)]))


def learnt(model: Model, texts: list[Text], sources: list[Any], bases: list[Array], layer: int) -> float:
    """Recall of scores that are corrected by what was missed before; sources: rows of each token, [tokens, n]."""
    n_experts = bases[0].shape[1]
    rows: dict[int, Array] = {}
    common = np.zeros(n_experts)
    found = []
    for text, source, base in zip(texts, sources, bases, strict=True):
        chosen = model.best(model.scores(layer, text["state", layer]))
        for i, scores in enumerate(base):
            mine = [rows.setdefault(int(s), np.zeros(n_experts)) for s in source[i]]
            corrected = scores + scores.std() * (sum(mine) / len(mine) + COMMON_SHARE * common)
            named, right = set(np.argsort(-corrected)[: model.n_used]), set(chosen[i])
            found.append(len(named & right) / len(right))
            for expert in named ^ right:
                step = RATE if expert in right else -RATE
                common[expert] += COMMON_SHARE * step
                for row in mine:
                    row[expert] += step / len(mine)
    return float(np.mean(found))


def measure(model: Model, texts: list[Text], layer: int, distance: int) -> dict[str, float]:
    """Recall of each rule for the experts of `layer + distance`, foreseen in `layer`."""
    target = layer + distance
    fitted, judged = texts[::2], texts[1::2]

    def joined(some: list[Text], key: Any) -> Array:
        return np.concatenate([text[key] for text in some])

    state, chosen = (
        joined(judged, ("state", layer)),
        model.best(model.scores(target, joined(judged, ("state", target)))),
    )
    weights = model.mixture(model.scores(layer, joined(fitted, ("state", layer))))
    outputs = joined(fitted, ("experts", layer))
    vectors = np.linalg.solve(weights.T @ weights + 1e-2 * np.eye(weights.shape[1]), weights.T @ outputs)
    mixed = model.mixture(model.scores(layer, state)) @ vectors
    all_scores = [model.scores(layer, text["state", layer]) for text in texts]
    return {
        "the next router": recall(model.best(model.scores(target, state)), chosen),
        "with default vectors": recall(model.best(model.scores(target, state + mixed)), chosen),
        "with the experts' true output": recall(
            model.best(model.scores(target, state + joined(judged, ("experts", layer)))), chosen
        ),
        "the next router, all samples": recall(
            model.best(model.scores(target, joined(texts, ("state", layer)))),
            model.best(model.scores(target, joined(texts, ("state", target)))),
        ),
        "learnt": learnt(
            model,
            texts,
            [model.best(scores) for scores in all_scores],
            [model.scores(target, text["state", layer]) for text in texts],
            target,
        ),
    }


def main() -> None:
    """Print a line for each pair of layers, and the JSON line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiny_moe.foresight", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--samples", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = Model(options.checkpoint)
    texts = [model.read(path) for path in sorted(options.samples.glob("*-?.txt"))]
    # Languages and halves mixed, so that learning as it goes does not see one domain after the other.
    texts = [texts[i] for i in np.random.default_rng(1).permutation(len(texts))]
    lines: list[dict[str, Any]] = []
    for distance in (1, 2):
        for layer in range(len(model.layers) - distance):
            lines.append({"from": layer, "to": layer + distance} | measure(model, texts, layer, distance))
    for layer in (0, 1):
        bases = [model.scores(layer, text["token"]) for text in texts]
        chosen = [model.best(model.scores(layer, text["state", layer])) for text in texts]
        alone = recall(np.concatenate([model.best(base) for base in bases]), np.concatenate(chosen))
        sources = [text["ids"][:, None] for text in texts]
        lines.append(
            {
                "from": "token",
                "to": layer,
                "the next router, all samples": alone,
                "learnt": learnt(model, texts, sources, bases, layer),
            }
        )
    for line in lines:
        print(f"{line['from']} -> {line['to']}: " + ", ".join(f"{k} {v:.3f}" for k, v in list(line.items())[2:]))
    print(json.dumps({"benchmark": "tiny_moe.foresight", "lines": lines}))


if __name__ == "__main__":
    main()
