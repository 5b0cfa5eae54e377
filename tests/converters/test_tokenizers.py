# SPDX-License-Identifier: MIT
"""Converted tokenizers and chat templates against transformers, as llama.cpp reads them back."""

from __future__ import annotations

import unicodedata
import warnings
from typing import Any

import llama_cpp
import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from tests.converters.conftest import Workshop
from tests.converters.families import FAMILIES
from tests.converters.vocabularies import RECIPES, SAMPLE

# What transformers warns of is for it to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

FAMILY_OF = {family.tokenizer: name for name, family in reversed(FAMILIES.items())}
TOKENIZERS = sorted(RECIPES)

TEXTS = {
    "sample": SAMPLE,
    "lines": SAMPLE.replace("\n", "\r\n"),
    "spaces": "  leading,   inner\t\t and trailing   ",
    "one word": "hello",
    "digits": "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 1,234,567.89",
    "not in the vocabulary": "𓀀𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff \x00\x7f\u200b\ufeff",
    "empty": "",
}


class Tokenizers:
    """The tokenizer of a family: transformers' and that of its converted file."""

    def __init__(self, workshop: Workshop, name: str) -> None:
        import transformers

        family = FAMILY_OF[name]
        self.recipe = RECIPES[name]
        self.theirs: Any = transformers.AutoTokenizer.from_pretrained(
            workshop.checkpoint(family).path, local_files_only=True
        )
        self.ours = llama_cpp.Llama(str(workshop.gguf(family, "Q8_0")), vocab_only=True, verbose=False)

    def close(self) -> None:
        self.ours.close()


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizers(request: pytest.FixtureRequest, workshop: Workshop) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair = Tokenizers(workshop, request.param)
    yield pair
    pair.close()


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_text_becomes_the_same_tokens(tokenizers: Tokenizers, text: str) -> None:
    """Guards against a pre-tokenizer that cuts elsewhere, merges in another order, a normalizer or a space in front
    that is lost, and a token too many at the beginning."""
    expected = tokenizers.theirs(text)["input_ids"]
    if tokenizers.recipe.normalizer:  # llama.cpp has no normalizer of BPE: composing characters is left to the caller
        text = unicodedata.normalize(tokenizers.recipe.normalizer, text)
    found = tokenizers.ours.tokenize(text.encode(), add_bos=True, special=False)
    assert found == expected


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_tokens_become_the_text_again(tokenizers: Tokenizers, text: str) -> None:
    """Guards against bytes, spaces or control tokens that are spelled otherwise."""
    # llama-cpp-python drops a space behind BOS, which is right where the tokenizer puts one there: SentencePiece.
    tokens = tokenizers.theirs(text, add_special_tokens=tokenizers.recipe.splits is None)["input_ids"]
    expected = tokenizers.theirs.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    found = tokenizers.ours.detokenize(tokens).decode() if tokens else ""
    assert found == expected
    normalizer = tokenizers.recipe.normalizer
    assert found == (unicodedata.normalize(normalizer, text) if normalizer else text)


def test_special_tokens_are_recognized_in_prompts(tokenizers: Tokenizers) -> None:
    """Guards against control tokens that are converted as ordinary text, or ordinary text that became control."""
    for token in tokenizers.theirs.all_special_tokens:
        text = f"a b{token}c d{token}"
        expected = tokenizers.theirs(text, add_special_tokens=False)["input_ids"]
        assert tokenizers.ours.tokenize(text.encode(), add_bos=False, special=True) == expected
        written = tokenizers.ours.tokenize(text.encode(), add_bos=False, special=False)
        assert tokenizers.theirs.convert_tokens_to_ids(token) not in written


def test_special_ids_are_those_of_the_checkpoint(tokenizers: Tokenizers) -> None:
    """Guards against generation that does not end, or begins with another model's token."""
    assert tokenizers.ours.token_eos() == tokenizers.theirs.eos_token_id
    if tokenizers.theirs.bos_token_id is not None:
        assert tokenizers.ours.token_bos() == tokenizers.theirs.bos_token_id


def test_chats_are_rendered_alike(tokenizers: Tokenizers) -> None:
    """Guards against a template that is lost, cut or of another file, and markers that do not become their tokens."""
    messages = [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "  ¿Qué es «π»?\n"},
        {"role": "assistant", "content": "3.14159"},
        {"role": "user", "content": "def f(x): return x**2"},
    ]
    expected = tokenizers.theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    formatter = Jinja2ChatFormatter(
        template=tokenizers.ours.metadata["tokenizer.chat_template"],
        eos_token=tokenizers.theirs.eos_token,
        bos_token=tokenizers.theirs.bos_token or "",
    )
    found = formatter(messages=messages).prompt
    assert found == expected
    ids = tokenizers.theirs(expected, add_special_tokens=False)["input_ids"]
    assert tokenizers.ours.tokenize(found.encode(), add_bos=False, special=True) == ids
