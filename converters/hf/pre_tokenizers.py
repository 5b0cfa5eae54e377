# SPDX-License-Identifier: MIT
"""What llama.cpp calls the pre-tokenizer of a BPE tokenizer.

llama.cpp has the regular expressions of pre-tokenizers in its code, under names. Its converter finds the name by a
hash: a text with all that pre-tokenizers treat differently is tokenized, and the SHA-256 of the list of ids, printed
as Python prints it, is looked up. Ids are the vocabulary's own, so the hash knows vocabularies, not only rules: a new
vocabulary with old rules is unknown, and its owner has to name them.
"""

from __future__ import annotations

import hashlib
import importlib.resources
from pathlib import Path
from typing import Any

from edgemoe.errors import ConversionError

CHECK_TEXT = (  # llama.cpp's, in conversion/base.py: the hashes are of this text's tokens
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫\ufe0f (multiple emoji"
    "s concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេ"
    "សអាច😁 ?我想在apple工作1314151天\uff5e ------======= нещо на Български ''''''```````\"\"\"\"....."
    ".!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you l"
    "ike some tea? We'Ve a'lL"
)

KNOWN_NAMES = frozenset(  # what llama-vocab.cpp of llama.cpp (as vendored by llama-cpp-python 0.3.36) compares with
    (
        "a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe command-r dbrx "
        "deepseek-coder deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone exaone-moe exaone4 f2llmv2 falcon "
        "falcon-h1 falcon3 gemma4 gigachat glm4 glm5 gpt-2 gpt-4o gpt3-finnish granite-docling "
        "granite-embed-multi-311m granite-embed-multi-97m grok-2 hunyuan hunyuan-dense hy_v4 jais jais-2 jina-de "
        "jina-es jina-v1-en jina-v2-code jina-v2-de jina-v2-es jina-v5-nano joyai-llm kanana2 kimi-k2 kormo laguna "
        "lfm2 llada-moe llama-bpe llama-v3 llama3 llama4 megrez mellum mellum2 midm-2.0 minerva-7b minicpm5 "
        "minimax-m2 modern-bert mpt olmo phi-2 pixtral poro-chat qwen2 qwen35 refact roberta-bpe sarvam-moe "
        "seed-coder smaug-bpe smollm solar-open spark2_5 stablelm2 starcoder superbpe talkie tekken tiny_aya "
        "trillion ufakzeka viking whitespace youtu "
    ).split()
)


def check_name(name: str) -> str:
    """`name`, if llama.cpp knows a pre-tokenizer of that name.

    Raises:
        ConversionError: it knows none.
    """
    if name not in KNOWN_NAMES:
        raise ConversionError(
            f"cannot use the pre-tokenizer {name!r}: llama.cpp knows {', '.join(sorted(KNOWN_NAMES))}; name "
            "one of these"
        )
    return name


def identify(folder: Path, settings: dict[str, Any]) -> str:
    """The name of the pre-tokenizer of `folder`'s tokenizer.json.

    transformers puts a BOS before the text for some tokenizers whose tokenizer.json does not; llama.cpp's hashes are of
    what transformers gives. So the ids are tried as they are, without special tokens, and with the BOS before them.

    Args:
        folder: the checkpoint.
        settings: its tokenizer_config.json.

    Raises:
        ConversionError: the tokenizers package is missing, it cannot read the file, or the hash is unknown.
    """
    try:
        import tokenizers
    except ImportError:
        raise ConversionError(
            "cannot identify the pre-tokenizer: it needs tokenizers; pip install 'edgemoe[convert]', or name "
            "the pre-tokenizer with --pre-tokenizer"
        ) from None
    path = folder / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing more special
        raise ConversionError(f"cannot read {path}: {error}; download it again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = tokenizer.encode(CHECK_TEXT).ids
    bare = tokenizer.encode(CHECK_TEXT, add_special_tokens=False).ids
    bos = settings.get("bos_token")
    bos_id = tokenizer.token_to_id(bos.get("content", "") if isinstance(bos, dict) else str(bos))
    candidates = [ids, bare, *([[bos_id, *bare]] if bos_id is not None else [])]
    names = _names_by_hash()
    for candidate in candidates:
        if name := names.get(_hash(candidate)):
            return name
    raise ConversionError(
        f"cannot identify the pre-tokenizer: llama.cpp knows none with the hash {_hash(ids)} ({path}); find out from "
        "the model's publisher which pre-tokenizer its vocabulary was made with and name it with --pre-tokenizer "
        "(such as qwen2, llama-bpe, gpt-2, deepseek-llm), then compare with `edgemoe convert verify`"
    )


def _hash(ids: list[int]) -> str:
    return hashlib.sha256(str(ids).encode()).hexdigest()


def _names_by_hash() -> dict[str, str]:
    assert __package__ is not None  # this module is always imported as part of one
    text = importlib.resources.files(__package__).joinpath("pre_tokenizers.txt").read_text(encoding="utf-8")
    return dict(line.split() for line in text.splitlines() if not line.startswith("#"))
