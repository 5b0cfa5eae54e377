# SPDX-License-Identifier: MIT
"""A checkpoint as transformers runs it. Needs the packages torch and transformers, which are optional."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from edgemoe.errors import ConversionError


def load_model(checkpoint: Path, purpose: str) -> Any:
    """The causal language model in the folder `checkpoint`, in float32 on the CPU, with attention written out.

    Nothing is fetched, and no code of the checkpoint is run.

    Args:
        checkpoint: the folder.
        purpose: what an error says cannot be done, such as "compare logits".

    Raises:
        ConversionError: transformers refuses it.
    """
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns of each layer that predicts further tokens, which it skips
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint, local_files_only=True)
        options: dict[str, Any] = {}
        if (getattr(config, "quantization_config", None) or {}).get("quant_method") == "mxfp4":
            options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            **options,
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ConversionError(f"cannot {purpose}: transformers refuses {checkpoint} ({error})") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    return model.float().eval()
