# SPDX-License-Identifier: MIT
"""The tiny model's tokenizer, and its corpus as token ids."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.tiny_moe.corpus import DOMAINS, Document

VOCABULARY = 2048

END_OF_TEXT = "<|endoftext|>"

PRE_TOKENIZER = "qwen2"
"""llama.cpp's name of the rule below, for `edgemoe convert gguf --pre-tokenizer`."""

_QWEN2 = (  # of Qwen2's and Qwen3's published tokenizer.json; each digit is a token
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_SAMPLE_CHARACTERS = 800_000  # of each domain, for merges that suit all of them
_SEED = 6


def train_tokenizer(documents: Sequence[Document], folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`: byte-level BPE, trained on a part of each domain."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(documents), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "add_bos_token": False,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _sample(documents: Sequence[Document]) -> list[str]:
    texts: list[str] = []
    for domain in DOMAINS:
        of_domain = [document.text for document in documents if document.domain == domain and not document.is_held_out]
        random.Random(_SEED).shuffle(of_domain)
        n_characters = 0
        for text in of_domain:
            texts.append(text[: _SAMPLE_CHARACTERS - n_characters])
            n_characters += len(texts[-1])
            if n_characters >= _SAMPLE_CHARACTERS:
                break
    return texts


def encode(documents: Sequence[Document], folder: Path) -> dict[str, npt.NDArray[np.uint16]]:
    """Token ids by domain, for training (`english`) and held out (`english/held-out`).

    Documents follow each other in the order of the corpus, END_OF_TEXT behind each.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids: dict[str, list[int]] = {}
    for document in documents:
        key = document.domain + ("/held-out" if document.is_held_out else "")
        ids.setdefault(key, []).extend([*tokenizer.encode(document.text).ids, end])
    return {key: np.asarray(value, np.uint16) for key, value in ids.items()}
