# SPDX-License-Identifier: MIT
"""Every rule of eviction on every family of generated traces at several budgets, beside what no rule can beat.

A gate's kind of benchmark: counted and computed, not timed, so it runs anywhere. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from benchmarks.traces import FAMILIES, Family, generate
from edgemoe import replay as replays
from edgemoe._native import PREFETCH_DEPTHS

SHARES = (0.12, 0.25, 0.5)
BYTES_PER_PARAM = 4.5 / 8  # of the dense part, as models.csv gives the experts'


def compute_of(family: Family) -> replays.Compute:
    """Dense weights computed at the speed of expert weights."""
    dense_us = family.dense_params * BYTES_PER_PARAM / replays.WEIGHT_BYTES_PER_S * 1e6
    return replays.Compute(dense_us=dense_us / family.n_layers)


def main() -> None:
    """Replay and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=256, help="tokens decoded")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--prefetch", choices=list(PREFETCH_DEPTHS), default="off")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    names = replays.POLICIES
    print("| family | budget | bound hit % | " + " | ".join(f"{p} hit %, tok/s" for p in names) + " |")
    print("|---|---|---|" + "---|" * len(names))
    for name in args.families:
        family = FAMILIES[name]
        generated = [generate(family, args.prompt, args.decode, seed) for seed in range(args.seeds)]
        for share in SHARES:
            cells, bounds = [], []
            for policy in names:
                runs = [
                    replays.replay(
                        trace,
                        slots_bytes=int(share * replays.bank_bytes(trace)),
                        eviction=policy,
                        prefetch=args.prefetch,
                        compute=compute_of(family),
                    )
                    for trace in generated
                ]
                hit_rate = statistics.fmean(r.decode.hit_rate for r in runs)
                rate = statistics.fmean(r.decode.tokens_per_s for r in runs)
                bounds = [r.bound_hit_rate for r in runs]
                cells.append(f"{100 * hit_rate:.1f}, {rate:.2f}")
                results.append(
                    {
                        "family": name,
                        "share": share,
                        "policy": policy,
                        "decode_hit_rate": hit_rate,
                        "decode_tokens_per_s": rate,
                        "bound_hit_rate": statistics.fmean(bounds),
                    }
                )
            print(f"| {name} | {share:.0%} | {100 * statistics.fmean(bounds):.1f} | " + " | ".join(cells) + " |")
    settings = {"prompt": args.prompt, "decode": args.decode, "seeds": args.seeds, "prefetch": args.prefetch}
    print(json.dumps({"benchmark": "policies", "settings": settings, "results": results}))


if __name__ == "__main__":
    main()
