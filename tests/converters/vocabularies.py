# SPDX-License-Identifier: MIT
# ruff: noqa: RUF001 (characters of other scripts are what this file is about)
"""Tokenizers trained on the spot, as the files that published checkpoints carry them in.

A byte-level BPE splits text before it merges, by the regular expressions of its family's published `tokenizer.json`;
its vocabulary is trained here, so llama.cpp's hash (which is of token ids) cannot know it and its name has to be
given. A SentencePiece model is trained with the settings of Llama's (`byte_fallback`, digits split, a space in front).
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
from pathlib import Path
from typing import Any

SAMPLE = """The quick brown fox can't jump over 12345 lazy dogs, they'll say it's DONE.   Three spaces, a\ttab.
Falsches Üben von Xylophonmusik quält jeden größeren Zwerg. Où est l'été ? El niño comió piñas; ¿verdad?
Съешь же ещё этих мягких французских булок. Ο ταχύς σκύλος. השועל המהיר. الثعلب البني السريع
色は匂へど散りぬるを 敏捷的棕色狐狸跳过懒狗。 빠른 갈색 여우 1,000.50원 ១២៣ हिन्दी में लिखा है
🚀🚀 (x) 😶‍🌫️ ✅ ===----=== ''''```` !!! ??? e\u0301 ﬁ ½

def f(n: int) -> int:\r
    return n if n < 2 else f(n - 1) + f(n - 2)  # O(2**n)


class A {\n\tstatic final int[] X = {0x1F, 077, -1e-9};\n}
    \n  \n \n\n\nSELECT * FROM "t" WHERE a <> 'b' AND c >= 3;   """
"""Prose in several scripts, numbers, emoji and code, with the whitespace that tokenizers get wrong."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim"
    " + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-"
    "\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-"
    "\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-"
    "\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-"
    "\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-"
    "\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-"
    "\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-"
    "\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
)
_AFMOE_ASIAN = (
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e00-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A tokenizer to train.

    Byte-level BPE where `splits` is given: regular expressions that isolate what they match, one after the other;
    `gpt2` puts GPT-2's own behind them, `digits` isolates digits. SentencePiece where it is None. `special` become
    control tokens, appended behind the trained ones.
    """

    special: tuple[str, ...]
    bos: str | None
    eos: str
    pad: str | None
    splits: tuple[str, ...] | None = None
    gpt2: bool = False
    digits: bool = False
    add_bos: bool = False
    ignore_merges: bool = False
    normalizer: str | None = None
    template_file: bool = False


RECIPES = {
    "qwen2": Recipe(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        None,
        "<|im_end|>",
        "<|endoftext|>",
        (_QWEN2,),
        normalizer="NFC",
    ),
    "olmo": Recipe(
        ("<|endoftext|>", "<|padding|>"), None, "<|endoftext|>", "<|padding|>", (), gpt2=True, normalizer="NFC"
    ),
    "deepseek-llm": Recipe(
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        _DEEPSEEK_LLM,
        digits=True,
        add_bos=True,
    ),
    "deepseek-v3": Recipe(
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"),
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜▁pad▁｜>",
        (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK_V3),
        add_bos=True,
    ),
    "refact": Recipe(
        ("<|end_of_text|>", "<fim_prefix>"),
        "<|end_of_text|>",
        "<|end_of_text|>",
        "<|end_of_text|>",
        (),
        gpt2=True,
        digits=True,
    ),
    "gpt-4o": Recipe(
        ("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|im_start|>", "<|im_end|>"),
        "<|startoftext|>",
        "<|return|>",
        "<|endoftext|>",
        (_O200K,),
        template_file=True,
    ),
    "afmoe": Recipe(
        ("<|begin_of_text|>", "<|im_start|>", "<|im_end|>", "<|pad|>"),
        "<|begin_of_text|>",
        "<|im_end|>",
        "<|pad|>",
        (r"\d{1,3}(?=(?:\d{3})*\b)", _AFMOE_ASIAN, _DEEPSEEK_V3),
        add_bos=True,
        template_file=True,
    ),
    "lfm2": Recipe(
        ("<|pad|>", "<|startoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|startoftext|>",
        "<|im_end|>",
        "<|pad|>",
        (_LLAMA3,),
        add_bos=True,
        ignore_merges=True,
        template_file=True,
    ),
    "glm4": Recipe(
        ("<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>"),
        None,
        "<|endoftext|>",
        "<|endoftext|>",
        (_LLAMA3,),
        ignore_merges=True,
        template_file=True,
    ),
    "sentencepiece": Recipe((), "<s>", "</s>", None, add_bos=True),
}

N_TRAINED = 600
"""Tokens that are trained; special ones come on top."""


def write_tokenizer(folder: Path, name: str) -> dict[str, int]:
    """Write the tokenizer files of recipe `name` and return the ids of `bos`, `eos` and `pad` where it has them."""
    recipe = RECIPES[name]
    ids = _write_sentencepiece(folder, recipe) if recipe.splits is None else _write_bpe(folder, recipe)
    config: dict[str, Any] = {
        "add_bos_token": recipe.add_bos,
        "add_eos_token": False,
        "bos_token": recipe.bos,
        "clean_up_tokenization_spaces": False,
        "eos_token": recipe.eos,
        "model_max_length": 4096,
        "pad_token": recipe.pad,
        "tokenizer_class": "LlamaTokenizer" if recipe.splits is None else "PreTrainedTokenizerFast",
    }
    if recipe.template_file:
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    else:
        config["chat_template"] = CHAT_TEMPLATE
    if recipe.splits is None:
        config |= {"add_prefix_space": True, "legacy": True, "sp_model_kwargs": {}, "unk_token": "<unk>"}
    config["added_tokens_decoder"] = {
        str(token_id): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token, token_id in ids.items()
    }
    _write_json(folder / "tokenizer_config.json", config)
    named = {"bos": recipe.bos, "eos": recipe.eos, "pad": recipe.pad}
    _write_json(folder / "special_tokens_map.json", {f"{role}_token": token for role, token in named.items() if token})
    return {role: ids[token] for role, token in named.items() if token}


def _corpus() -> list[str]:
    """What tokenizers are trained on: edgemoe's calibration text and the sample."""
    text = importlib.resources.files("converters").joinpath("calibration.txt").read_text(encoding="utf-8")
    return [text, *[SAMPLE] * 4]


def _write_bpe(folder: Path, recipe: Recipe) -> dict[str, int]:
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    assert recipe.splits is not None
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=recipe.ignore_merges))
    if recipe.normalizer == "NFC":
        tokenizer.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in recipe.splits
    ]
    if recipe.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=recipe.gpt2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_TRAINED, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in recipe.special])
    ids = {token: tokenizer.token_to_id(token) for token in recipe.special}
    if recipe.add_bos:
        assert recipe.bos is not None
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{recipe.bos} $A",
                    pair=f"{recipe.bos} $A {recipe.bos} $B:1",
                    special_tokens=[(recipe.bos, ids[recipe.bos])],
                ),
            ]
        )
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return ids


def _write_sentencepiece(folder: Path, recipe: Recipe) -> dict[str, int]:
    import sentencepiece
    import tokenizers
    from tokenizers import decoders, models, normalizers, processors

    model = folder / "tokenizer.model"
    with model.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([line for text in _corpus() for line in text.splitlines() if line]),
            model_writer=file,
            model_type="bpe",
            vocab_size=N_TRAINED,
            byte_fallback=True,
            character_coverage=0.98,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    # The `tokenizer.json` beside it, as published for Mixtral: BPE over characters, unknown ones in bytes.
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    rank = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces[3 + 256 :]
        for cut in range(1, len(piece))
        if piece[:cut] in rank and piece[cut:] in rank
    ]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=rank, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>", *recipe.special)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return {token: tokenizer.token_to_id(token) for token in ("<unk>", "<s>", "</s>", *recipe.special)}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
