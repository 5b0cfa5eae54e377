# SPDX-License-Identifier: MIT
"""What fewer experts cost and save on the tiny trained MoE, by each rule of `expert_top_k`, alone and with a bias.

    python -m benchmarks.tiny_moe.expert_counts benchmarks/results/tiny_moe

and, for all ways to divide a sum of experts among the layers, on every second text,

    python -m benchmarks.tiny_moe.expert_counts FOLDER --divisions 12

The first writes counts-12.json, counts-25.json and counts-50.json (share in memory) as `edgemoe price` does.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

from edgemoe import lexi, price
from edgemoe.formats.gguf import read_model
from edgemoe.levers import Lever

_DATA = Path(__file__).parents[2] / "tests" / "data"
_MODEL = _DATA / "tiny_moe.gguf"
RULES = ("3", "2", "1", "lexi:3", "lexi:2.5", "lexi:2", "top-p:0.9", "top-p:0.8", "top-p:0.7", "map")
SHARES = (0.12, 0.25, 0.5)


def levers(share: float) -> list[Lever]:
    """The settings measured with so many of the experts in memory."""
    alone: list[Lever] = [Lever.of(expert_top_k=rule) for rule in RULES]
    if share != 0.25:
        return alone
    biased = [
        Lever.of(reuse_bias=bias, expert_top_k=rule)
        for bias in (0.05, 0.1)
        for rule in ("off", "3", "lexi:3", "top-p:0.9")
    ]
    return [*alone, *biased]


def divisions(n_experts: int, folder: Path) -> list[Lever]:
    """Each way to give the layers so many experts in all, as losses under which no other way loses nothing."""
    losses = lexi.measure(read_model(_MODEL))
    found: list[Lever] = []
    for numbers in itertools.product(*(range(1, len(table) + 1) for table in losses.of_layer.values())):
        if sum(numbers) != n_experts:
            continue
        tables = {
            layer: tuple(float(k != wanted) for k in range(1, len(table) + 1))
            for (layer, table), wanted in zip(losses.of_layer.items(), numbers, strict=True)
        }
        path = folder / f"{'-'.join(map(str, numbers))}.json"
        lexi.save(dataclasses.replace(losses, of_layer=tables), path)
        found.append(Lever.of(expert_top_k=f"lexi:{n_experts / len(numbers)}@{path}"))
    return found


def rounded(value: Any) -> Any:
    """The same with six digits: standard errors are above 1 % of what they belong to."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--divisions", type=int, metavar="SUM", help="only print the price of each division of a sum")
    args = parser.parse_args()
    texts = sorted((_DATA / "tiny_moe").glob("*-?.txt"))
    if args.divisions is not None:
        found = price.price(_MODEL, texts[::2], divisions(args.divisions, args.out), experts=0.5, n_threads=1)
        for row in sorted(found.rows, key=lambda row: row.perplexity):
            change = found.change(row)
            print(
                f"{Path(row.lever.get('expert_top_k') or 'exact').stem:<10}{100 * change.perplexity:>+8.2f}"
                f" +- {100 * (change.perplexity_error or 0.0):.2f} %"
            )
        return
    for share in args.shares:
        found = price.price(_MODEL, texts, levers(share), experts=share, n_threads=1)
        fields = found.to_dict()
        fields["texts"] = [text.name for text in texts]
        path = args.out / f"counts-{round(100 * share)}.json"
        path.write_text(json.dumps(rounded(fields)) + "\n", encoding="utf-8")
        print(path)
        for row in found.rows:
            change, ratio = found.change(row), found.bytes_ratio(row)
            print(
                f"{row.lever.name:<32}"
                f"{100 * change.perplexity:>+8.2f} +- {100 * (change.perplexity_error or 0.0):.2f} %"
                f"{row.kl:>8.4f}{100 * row.agreement:>7.1f}{100 * row.selections_changed:>7.1f}"
                f"{100 * row.gate_mass_moved:>7.1f}{row.bytes_per_token / 1024:>8.1f} KiB{ratio or 0.0:>7.3f}"
                f"{100 * row.hit_rate:>7.1f}{row.tokens_per_s:>8.0f} tok/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
