# SPDX-License-Identifier: MIT
"""A checkpoint's tokenizer as GGUF metadata.

Two kinds exist in the families that are converted: byte-level BPE (`gpt2` in GGUF, from tokenizer.json) and
SentencePiece (`llama`, from tokenizer.model, or from a tokenizer.json that was made of one). GGUF has no place for the
regular expressions that cut a text before BPE; llama.cpp knows them by name, and the name is found as llama.cpp's own
converter finds it: by a hash of the tokens of one text (`pre_tokenizers.py`).

Added tokens are matched in the text before anything else, by transformers and by llama.cpp alike; in llama.cpp those
marked CONTROL only where special tokens are asked for, those marked USER_DEFINED always.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf

from edgemoe.errors import ConversionError

from ..gguf_file import MetadataValue
from .checkpoint import read_json
from .pre_tokenizers import identify
from .sentencepiece import read_pieces

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_WORD_START = "\u2581"
_UNUSED_SCORE = -10000.0
_ADDED_SCORE = -1000.0
_Type = gguf.TokenType


@dataclasses.dataclass
class _Vocabulary:
    """Tokens by id, with what GGUF says of each; ids without a token are UNUSED."""

    tokens: list[str]
    types: list[int]
    scores: list[float]

    @classmethod
    def empty(cls, n_tokens: int) -> _Vocabulary:
        return cls([f"[PAD{i}]" for i in range(n_tokens)], [int(_Type.UNUSED)] * n_tokens, [_UNUSED_SCORE] * n_tokens)

    def set(self, token_id: int, token: str, kind: int, score: float) -> None:
        if not 0 <= token_id < len(self.tokens):
            raise ConversionError(
                f"cannot convert the tokenizer: token {token!r} has the id {token_id}, the model has "
                f"{len(self.tokens)} (vocab_size in config.json); config.json and tokenizer are of different models"
            )
        self.tokens[token_id], self.types[token_id], self.scores[token_id] = token, int(kind), score


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """The files of a tokenizer, read.

    Attributes:
        inputs: the files that its metadata depend on.
        metadata: keys and values of GGUF.
        notes: where llama.cpp reads texts otherwise.
    """

    inputs: tuple[Path, ...]
    metadata: dict[str, MetadataValue]
    notes: tuple[str, ...]


def convert_tokenizer(
    folder: Path, config: dict[str, Any], pre_tokenizer: str | None, special_tokens: dict[str, str]
) -> Tokenizer:
    """Read the tokenizer of a checkpoint.

    Args:
        folder: the checkpoint.
        config: its config.json.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer, instead of the one found by the hash.
        special_tokens: token texts for kinds of special tokens (`eot` and the like) that the family fixes.

    Raises:
        ConversionError: files are missing or contradictory, the tokenizer is of another kind, or its pre-tokenizer is
            not known.
    """
    n_tokens = config.get("vocab_size")
    if not isinstance(n_tokens, int) or n_tokens <= 0:
        raise ConversionError(f"cannot convert the tokenizer: vocab_size is {n_tokens!r} ({folder / 'config.json'})")
    paths = tuple(folder / name for name in _FILES if (folder / name).is_file())
    has_json, has_model = (folder / "tokenizer.json").is_file(), (folder / "tokenizer.model").is_file()
    if not has_json and not has_model:
        raise ConversionError(
            f"cannot convert the tokenizer: found neither tokenizer.json nor tokenizer.model ({folder}); download the "
            "tokenizer's files into the checkpoint"
        )
    fast = read_json(folder / "tokenizer.json") if has_json else {}
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    metadata: dict[str, MetadataValue] = {}
    if has_model and not _is_byte_level(fast):
        vocabulary = _from_sentencepiece(folder, n_tokens)
        _add_tokens(vocabulary, _added_tokens(folder, fast, settings), keep_score=False)
        metadata |= _as_llama(vocabulary, fast, settings)
    elif _is_converted_sentencepiece(fast):
        vocabulary = _from_ranks(fast, n_tokens)
        _add_tokens(vocabulary, _added_tokens(folder, fast, settings), keep_score=False)
        metadata |= _as_llama(vocabulary, fast, settings)
    elif _is_byte_level(fast):
        vocabulary = _from_bpe(fast, n_tokens)
        _add_tokens(vocabulary, _added_tokens(folder, fast, settings), keep_score=True)
        metadata |= {
            gguf.Keys.Tokenizer.MODEL: "gpt2",
            gguf.Keys.Tokenizer.PRE: pre_tokenizer or identify(folder, settings),
            gguf.Keys.Tokenizer.LIST: vocabulary.tokens,
            gguf.Keys.Tokenizer.TOKEN_TYPE: vocabulary.types,
            gguf.Keys.Tokenizer.MERGES: _merges(fast),
        }
    else:
        kind = (fast.get("model") or {}).get("type")
        raise ConversionError(
            f"cannot convert the tokenizer: {folder / 'tokenizer.json'} is of the kind {kind}, expected byte-level BPE "
            "or BPE with byte_fallback; this kind is not supported"
        )
    metadata |= _special_ids(vocabulary, config, settings, fast, special_tokens)
    metadata |= _chat_template(folder, settings)
    forms = {str(part.get("type")) for part in _components(fast.get("normalizer"))} & {"NFC", "NFD", "NFKC", "NFKD"}
    notes = [
        f"transformers brings texts into the form {form} first, llama.cpp does not: texts that are in another form get "
        "other tokens"
        for form in sorted(forms)
    ]
    return Tokenizer(paths, metadata, tuple(notes))


def _is_byte_level(fast: dict[str, Any]) -> bool:
    """Whether tokenizer.json is BPE over the 256 letters that stand for bytes (GPT-2's)."""
    model = fast.get("model") or {}
    return model.get("type") == "BPE" and any(
        part.get("type") == "ByteLevel" for key in ("pre_tokenizer", "decoder") for part in _components(fast.get(key))
    )


def _is_converted_sentencepiece(fast: dict[str, Any]) -> bool:
    model = fast.get("model") or {}
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def _components(node: Any) -> Iterator[dict[str, Any]]:
    """A component of tokenizer.json and all that it is composed of."""
    if isinstance(node, dict):
        yield node
        for key in ("pretokenizers", "normalizers", "decoders", "processors"):
            for part in node.get(key) or []:
                yield from _components(part)


def _from_bpe(fast: dict[str, Any], n_tokens: int) -> _Vocabulary:
    vocabulary = _Vocabulary.empty(n_tokens)
    for token, token_id in fast["model"]["vocab"].items():
        vocabulary.set(token_id, token, _Type.NORMAL, 0.0)
    return vocabulary


def _from_sentencepiece(folder: Path, n_tokens: int) -> _Vocabulary:
    vocabulary = _Vocabulary.empty(n_tokens)
    for token_id, (text, score, kind) in enumerate(read_pieces(folder / "tokenizer.model")):
        vocabulary.set(token_id, text, kind, score)
    return vocabulary


def _from_ranks(fast: dict[str, Any], n_tokens: int) -> _Vocabulary:
    """A SentencePiece vocabulary from the BPE that was made of it.

    llama.cpp joins the neighbours whose union has the highest score, BPE those of the lowest rank: so a token's score
    is minus the rank of the first merge that makes it. Tokens that no merge makes are never joined.
    """
    vocabulary = _Vocabulary.empty(n_tokens)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(_merges(fast)):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    unknown = fast["model"].get("unk_token")
    for token, token_id in fast["model"]["vocab"].items():
        if token == unknown:
            kind = _Type.UNKNOWN
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kind = _Type.BYTE
        else:
            kind = _Type.NORMAL
        vocabulary.set(token_id, token, kind, -float(ranks.get(token, len(ranks))))
    return vocabulary


def _merges(fast: dict[str, Any]) -> list[str]:
    """The merges as GGUF has them, two tokens with a space between; spaces inside of a token as GPT-2's letter."""
    merges = fast["model"].get("merges") or []
    return [
        merge if isinstance(merge, str) else " ".join(part.replace(" ", chr(ord(" ") + 256)) for part in merge)
        for merge in merges
    ]


def _added_tokens(folder: Path, fast: dict[str, Any], settings: dict[str, Any]) -> dict[int, tuple[str, bool]]:
    """Added tokens with whether they are special; where files disagree, the later of these says it."""
    added: dict[int, tuple[str, bool]] = {}
    if (folder / "added_tokens.json").is_file():
        for token, token_id in read_json(folder / "added_tokens.json").items():
            added[int(token_id)] = (token, False)
    for token_id, entry in (settings.get("added_tokens_decoder") or {}).items():
        added[int(token_id)] = (entry["content"], bool(entry.get("special")))
    for entry in fast.get("added_tokens") or []:
        added[int(entry["id"])] = (entry["content"], bool(entry.get("special")))
    return added


def _add_tokens(vocabulary: _Vocabulary, added: dict[int, tuple[str, bool]], *, keep_score: bool) -> None:
    for token_id, (token, is_special) in sorted(added.items()):
        if token_id < len(vocabulary.types) and vocabulary.types[token_id] == _Type.UNKNOWN:
            continue  # llama.cpp finds the unknown token by its type
        if is_special or _looks_special(token):
            kind = _Type.CONTROL
        else:
            kind = _Type.USER_DEFINED
            token = token.replace(_WORD_START, " ")  # it is matched in the text, where spaces are spaces
        vocabulary.set(token_id, token, kind, 0.0 if keep_score else _ADDED_SCORE)


def _looks_special(token: str) -> bool:
    """Tokens that publishers forgot to mark: those that llama.cpp's converter takes for control tokens as well."""
    return token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        token.startswith(left) and token.endswith(right)
        for left, right in (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    )


def _as_llama(vocabulary: _Vocabulary, fast: dict[str, Any], settings: dict[str, Any]) -> dict[str, MetadataValue]:
    metadata: dict[str, MetadataValue] = {
        gguf.Keys.Tokenizer.MODEL: "llama",
        gguf.Keys.Tokenizer.PRE: "default",
        gguf.Keys.Tokenizer.LIST: vocabulary.tokens,
        gguf.Keys.Tokenizer.SCORES: vocabulary.scores,
        gguf.Keys.Tokenizer.TOKEN_TYPE: vocabulary.types,
    }
    if (add_space := _adds_space_prefix(fast, settings)) is not None:
        metadata[gguf.Keys.Tokenizer.ADD_PREFIX] = add_space
    return metadata


def _adds_space_prefix(fast: dict[str, Any], settings: dict[str, Any]) -> bool | None:
    """Whether a text gets a space before it; None where nothing says so (llama.cpp then adds one)."""
    for part in _components(fast.get("pre_tokenizer")):
        if part.get("type") == "Metaspace":
            return part.get("prepend_scheme", "always") != "never" and bool(part.get("add_prefix_space", True))
    if fast.get("normalizer"):
        return any(part.get("type") == "Prepend" for part in _components(fast["normalizer"]))
    add_prefix_space = settings.get("add_prefix_space")
    return add_prefix_space if isinstance(add_prefix_space, bool) else None


def _special_ids(
    vocabulary: _Vocabulary,
    config: dict[str, Any],
    settings: dict[str, Any],
    fast: dict[str, Any],
    fixed: dict[str, str],
) -> dict[str, MetadataValue]:
    """Ids of special tokens, and which of them a text gets before and after it."""
    ids = {token: token_id for token_id, token in reversed(list(enumerate(vocabulary.tokens)))}
    found: dict[str, int] = {}
    for kind, token in fixed.items():
        if token in ids:
            found[kind] = ids[token]
    for kind in _SPECIAL:
        entry = settings.get(f"{kind}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        token_id = config.get(f"{kind}_token_id")
        if isinstance(token_id, list) and token_id:  # the first of several ends of a text
            token_id = token_id[0]
        if isinstance(text, str) and text in ids:
            found.setdefault(kind, ids[text])
        elif isinstance(token_id, int) and 0 <= token_id < len(vocabulary.tokens):
            found.setdefault(kind, token_id)
    metadata: dict[str, MetadataValue] = {_ID_KEYS[kind]: token_id for kind, token_id in found.items()}
    for kind, is_added in _added_around(fast, settings, found, vocabulary).items():
        metadata[_ADD_KEYS[kind]] = is_added
    return metadata


_ID_KEYS = {
    "bos": gguf.Keys.Tokenizer.BOS_ID,
    "eos": gguf.Keys.Tokenizer.EOS_ID,
    "unk": gguf.Keys.Tokenizer.UNK_ID,
    "sep": gguf.Keys.Tokenizer.SEP_ID,
    "pad": gguf.Keys.Tokenizer.PAD_ID,
    "cls": "tokenizer.ggml.cls_token_id",
    "mask": gguf.Keys.Tokenizer.MASK_ID,
    "eot": gguf.Keys.Tokenizer.EOT_ID,
    "eom": gguf.Keys.Tokenizer.EOM_ID,
}
_ADD_KEYS = {"bos": gguf.Keys.Tokenizer.ADD_BOS, "eos": gguf.Keys.Tokenizer.ADD_EOS}


def _added_around(
    fast: dict[str, Any], settings: dict[str, Any], ids: dict[str, int], vocabulary: _Vocabulary
) -> dict[str, bool]:
    """Whether a text gets a BOS before and an EOS after it; without a word on it, llama.cpp's default holds.

    transformers runs the template in tokenizer.json; but its Llama classes write one of their own from the settings.
    """
    is_added = {
        kind: settings[f"add_{kind}_token"] for kind in _ADD_KEYS if isinstance(settings.get(f"add_{kind}_token"), bool)
    }
    is_llama = str(settings.get("tokenizer_class")).startswith("Llama")
    for part in _components(fast.get("post_processor")):
        if part.get("type") == "ByteLevel":
            is_added.setdefault("bos", False)
            is_added.setdefault("eos", False)
        if part.get("type") == "TemplateProcessing" and not (is_llama and is_added):
            single = part.get("single") or []
            ends = {"bos": single[0] if single else {}, "eos": single[-1] if single else {}}
            for kind, end in ends.items():
                special = (end.get("SpecialToken") or {}).get("id")
                token_id = ids.get(kind)
                is_added[kind] = special is not None and token_id is not None and vocabulary.tokens[token_id] == special
    return is_added


def _chat_template(folder: Path, settings: dict[str, Any]) -> dict[str, MetadataValue]:
    """The chat template, and other templates by name."""
    template = settings.get("chat_template")
    jinja, legacy = folder / "chat_template.jinja", folder / "chat_template.json"
    if jinja.is_file():
        template = _read_text(jinja)
    elif template is None and legacy.is_file():
        template = read_json(legacy).get("chat_template")
    named = {entry["name"]: entry["template"] for entry in template} if isinstance(template, list) else {}
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        named[path.stem] = _read_text(path)
    metadata: dict[str, MetadataValue] = {}
    default = named.pop("default", None) if isinstance(template, list) else template
    if isinstance(default, str):
        metadata[gguf.Keys.Tokenizer.CHAT_TEMPLATE] = default
    if named:
        metadata[gguf.Keys.Tokenizer.CHAT_TEMPLATES] = sorted(named)
        for name, text in sorted(named.items()):
            metadata[gguf.Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name)] = text
    return metadata


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"cannot read {path}: {error}; download it again") from error
