# SPDX-License-Identifier: MIT
"""What onnxruntime-genai reads beside a model: genai_config.json and the tokenizer's files.

Fields are those that its model builder (version 0.18) writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..hf.checkpoint import read_json
from ..hf.family import Hparams
from .decoder import Decoder
from .families import Family

MODEL_NAME = "model.onnx"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)

_DEFAULT_LENGTH = 4096
"""Tokens of a generation, if its caller does not say: the cache of `context_length` could take gigabytes."""


def genai_config(folder: Path, decoder: Decoder, family: Family, hparams: Hparams) -> bytes:
    """The content of genai_config.json for a checkpoint in `folder`."""
    s = decoder.shape
    generation: dict[str, Any] = {}
    if (folder / "generation_config.json").is_file():
        generation = read_json(folder / "generation_config.json")

    def token(role: str) -> Any:
        value = generation.get(f"{role}_token_id")
        return hparams.get(f"{role}_token_id") if value is None else value

    names = {
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    present = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    inner: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL_NAME,
        "head_size": s.head_dim,
        "hidden_size": s.hidden,
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **names},
        "outputs": {"logits": "logits", **present},
        "num_attention_heads": s.n_heads,
        "num_hidden_layers": s.n_layers,
        "num_key_value_heads": s.n_kv_heads,
    }
    if decoder.layer_types is not None:
        inner["inputs"]["past_conv_names"] = "past.%d.conv"
        inner["outputs"]["present_conv_names"] = "present.%d.conv"
        inner["layer_types"] = decoder.layer_types
        inner["conv_cache_size"] = hparams.count("conv_L_cache") - 1
    eos = token("eos")
    first_eos = eos[0] if isinstance(eos, list) and eos else eos
    pad = token("pad")
    model: dict[str, Any] = {
        "bos_token_id": token("bos"),
        "context_length": s.n_positions,
        "decoder": inner,
        "eos_token_id": eos,
        "pad_token_id": first_eos if pad is None else pad,
        "type": family.genai_type,
        "vocab_size": s.n_vocab,
    }
    search = {
        "do_sample": bool(generation.get("do_sample", False)),
        "max_length": min(s.n_positions, _DEFAULT_LENGTH),
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": False,  # it would hold the cache of max_length from the beginning
        "repetition_penalty": 1.0,
        "temperature": float(generation.get("temperature") or 1.0),
        "top_k": int(generation.get("top_k") or 50),
        "top_p": float(generation.get("top_p") or 1.0),
    }
    model = {key: value for key, value in model.items() if value is not None}
    return (json.dumps({"model": model, "search": search}, indent=4) + "\n").encode()
