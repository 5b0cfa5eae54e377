# SPDX-License-Identifier: MIT
"""Held-out text samples of each domain, for measurements on the tiny model: one file each.

python -m benchmarks.tiny_moe.samples --sources FOLDER --work WORK --out tests/data/tiny_moe
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.tiny_moe.corpus import DOMAINS, Document, read_corpus

SAMPLES_PER_DOMAIN = 6
MIN_TOKENS = 520
"""A context of 512 tokens with something to predict behind each."""


def choose_samples(documents: Sequence[Document], tokenizer: Path) -> dict[str, list[tuple[Document, str]]]:
    """The beginnings of held-out documents, to the end of the line that has token MIN_TOKENS.

    Documents that are shorter are left out; a document gives one sample.
    """
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer))
    samples: dict[str, list[tuple[Document, str]]] = {domain: [] for domain in DOMAINS}
    for document in documents:
        of_domain = samples[document.domain]
        if not document.is_held_out or len(of_domain) == SAMPLES_PER_DOMAIN:
            continue
        offsets = encoder.encode(document.text).offsets
        if len(offsets) > MIN_TOKENS:
            end = document.text.find("\n", offsets[MIN_TOKENS][0])
            of_domain.append((document, document.text[: end + 1]))
    return samples


def read_samples(folder: Path) -> dict[str, list[str]]:
    """The texts of the files `<domain>-<n>.txt`, in the order of n."""
    return {domain: [path.read_text("utf-8") for path in sorted(folder.glob(f"{domain}-*.txt"))] for domain in DOMAINS}


def main() -> None:
    """The command at the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, required=True, help="the folder with corpus.py's sources")
    parser.add_argument("--work", type=Path, required=True, help="train.py's, for the tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    samples = choose_samples(read_corpus(arguments.sources), arguments.work / "tokenizer.json")
    for domain, of_domain in samples.items():
        for i, (document, text) in enumerate(of_domain, start=1):
            path = arguments.out / f"{domain}-{i}.txt"
            path.write_text(text, "utf-8")
            print(path.name, document.name, len(text), sep="\t")


if __name__ == "__main__":
    main()
