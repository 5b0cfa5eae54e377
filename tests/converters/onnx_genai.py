# SPDX-License-Identifier: MIT
"""Generation with onnxruntime-genai, with its own kernels or with our provider in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def genai_model(genai: Any, folder: Path, provider: str | None) -> Any:
    """The model of a folder; MoE nodes that `provider` does not claim are an error."""
    config = genai.Config(str(folder))
    if provider is not None:
        config.clear_providers()
        config.append_provider(provider)
        config.set_provider_option(provider, "strict", "1")
    return genai.Model(config)


def generate(genai: Any, model: Any, prompt: Sequence[int], n_new: int) -> list[int]:
    """The likeliest tokens after a prompt, as many as `n_new` unless the text ends before."""
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=len(prompt) + n_new, do_sample=False)
    generator = genai.Generator(model, options)
    generator.append_tokens([list(prompt)])
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]
