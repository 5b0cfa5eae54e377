# SPDX-License-Identifier: MIT
"""What `edgemoe tune-router` does to the tiny model: misses and bytes of a lossless cache, and cross-entropy.

    python -m benchmarks.tiny_moe.dequantized tests/data/tiny_moe.gguf CHECKPOINT
    python -m benchmarks.tiny_moe.tuned texts --sources SOURCES --work WORK --out TEXTS
    edgemoe tune-router tests/data/tiny_moe.gguf remoe.gguf --checkpoint CHECKPOINT --method remoe --text TEXTS/*.txt
    python -m benchmarks.tiny_moe.tuned measure tests/data/tiny_moe.gguf remoe=remoe.gguf --samples tests/data/tiny_moe

`texts` writes as many tokens of each domain's training documents, in shuffled order; held-out documents, of which the
samples are the beginnings, are not among them. SOURCES and WORK are `train.py`'s.

`measure` evaluates each sample behind an exact prompt of 32, token by token on one thread, with an empty cache in the
beginning, no prefetch and no lossy lever, as `edgemoe price` does. Cross-entropy does not depend on the cache. Its
change is paired text by text; the standard error is over texts. Misses are of experts, over all layers.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from benchmarks.tiny_moe.corpus import DOMAINS, Document, read_corpus
from edgemoe.formats.gguf import read_model
from edgemoe.price import Price, Row, price

DOMAIN_TOKENS = 500_000
"""Of each domain, of 1.3 million at least."""

SHARES = (0.12, 0.25, 0.5)
EVICTIONS = ("lru", "auto")
_SEED = 6


def choose_texts(documents: list[Document], tokenizer: Path) -> dict[str, str]:
    """Whole training documents of each domain, in shuffled order, until they have DOMAIN_TOKENS."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer))
    texts = {}
    for domain in DOMAINS:
        of_domain = [document for document in documents if document.domain == domain and not document.is_held_out]
        random.Random(_SEED).shuffle(of_domain)
        parts: list[str] = []
        n_tokens = 0
        for document in of_domain:
            if n_tokens >= DOMAIN_TOKENS:
                break
            parts.append(document.text)
            n_tokens += len(encoder.encode(document.text).ids)
        texts[domain] = "\n".join(parts)
    return texts


def measure(model: Path, samples: list[Path], share: float, eviction: str) -> Price:
    """The exact row alone, of `share` of the experts in memory."""
    return price(model, samples, [], experts=share, eviction=eviction, prefetch="off", n_threads=1, n_threads_batch=1)


def describe(model: Path, row: Row) -> dict[str, Any]:
    """Plain values of a row."""
    header = read_model(model)
    n_asked = header.n_moe_layers * header.n_experts_used
    return {
        "misses_per_token": n_asked * (1 - row.hit_rate),
        "bytes_per_token": row.bytes_per_token,
        "cross_entropy": row.cross_entropy,
        "texts": [round(text.cross_entropy, 6) for text in row.texts],
    }


def change(of: list[float], original: list[float]) -> tuple[float, float]:
    """Mean difference over texts, and its standard error."""
    differences = [a - b for a, b in zip(of, original, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    return mean, (sum((d - mean) ** 2 for d in differences) / (n - 1) / n) ** 0.5


def run(
    original: Path, tuned: dict[str, Path], samples: list[Path], share: float, eviction: str
) -> list[dict[str, Any]]:
    """Measure all files at one share of experts in memory, print a table, and return everything."""
    rows: list[dict[str, Any]] = []
    for name, path in {"original": original, **tuned}.items():
        row = describe(path, measure(path, samples, share, eviction).exact)
        first = rows[0] if rows else row
        nats, error = change(row["texts"], first["texts"])
        rows.append(
            {
                "experts": share,
                "eviction": eviction,
                "model": name,
                **row,
                "change_nats": nats,
                "change_nats_error": error,
                "misses_ratio": row["misses_per_token"] / first["misses_per_token"],
                "bytes_ratio": row["bytes_per_token"] / first["bytes_per_token"],
            }
        )
        relative = 100 / first["cross_entropy"]
        print(
            f"{share:9.0%}  {eviction:8}  {name:9}{row['misses_per_token']:7.3f} ({rows[-1]['misses_ratio']:.3f})  "
            f"{row['bytes_per_token'] / 1024:7.1f} ({rows[-1]['bytes_ratio']:.3f})  {row['cross_entropy']:8.4f}  "
            f"{nats * relative:+.2f} +- {error * relative:.2f}",
            flush=True,
        )
    return rows


def main() -> None:
    """The commands at the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    texts = commands.add_parser("texts")
    texts.add_argument("--sources", type=Path, required=True, help="the folder with corpus.py's sources")
    texts.add_argument("--work", type=Path, required=True, help="train.py's, for the tokenizer")
    texts.add_argument("--out", type=Path, required=True)
    measured = commands.add_parser("measure")
    measured.add_argument("original", type=Path)
    measured.add_argument("tuned", nargs="+", metavar="NAME=FILE")
    measured.add_argument("--samples", type=Path, required=True)
    measured.add_argument("--experts", type=float, nargs="+", default=SHARES, help="shares of experts in memory")
    measured.add_argument("--eviction", nargs="+", default=EVICTIONS)
    measured.add_argument("--json", type=Path, help="add everything to this file, also by text")
    arguments = parser.parse_args()
    if arguments.command == "texts":
        arguments.out.mkdir(parents=True, exist_ok=True)
        for domain, text in choose_texts(read_corpus(arguments.sources), arguments.work / "tokenizer.json").items():
            (arguments.out / f"{domain}.txt").write_text(text, "utf-8")
        return
    tuned = {name: Path(path) for name, _, path in (item.partition("=") for item in arguments.tuned)}
    samples = [path for domain in DOMAINS for path in sorted(arguments.samples.glob(f"{domain}-*.txt"))]
    result: dict[str, Any] = {"benchmark": "tiny_moe.tuned", "samples": [path.name for path in samples], "rows": []}
    if arguments.json and arguments.json.exists():
        result["rows"] = json.loads(arguments.json.read_text())["rows"]
    print("in memory  eviction  model      misses/token      KiB/token       CE, nats  change of CE, % +- s.e.")
    for share in arguments.experts:
        for eviction in arguments.eviction:
            result["rows"] += run(arguments.original, tuned, samples, share, eviction)
            if arguments.json:
                arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
