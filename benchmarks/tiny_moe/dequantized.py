# SPDX-License-Identifier: MIT
"""The tiny model's GGUF as a checkpoint again, in float32, for what needs transformers: its training state is not kept.

    python -m benchmarks.tiny_moe.dequantized tests/data/tiny_moe.gguf CHECKPOINT

Routers and norms are those of training, bit for bit; other weights have been through Q8_0. There is no tokenizer.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import quants

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
}
"""GGUF's names of `qwen3moe`, and those of `Qwen3MoeForCausalLM`; experts are stacked here and single there."""

_EXPERTS = re.compile(r"ffn_(gate|up|down)_exps")


def write_checkpoint(model: Path, folder: Path) -> None:
    """Write config.json and model.safetensors of the GGUF `model` of the architecture qwen3moe into `folder`."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3MoeConfig

    from benchmarks.tiny_moe.train import CONFIG

    state: dict[str, Any] = {}
    for tensor in gguf.GGUFReader(model).tensors:
        values = torch.from_numpy(np.array(quants.dequantize(tensor.data, tensor.tensor_type), np.float32))
        parts = tensor.name.removesuffix(".weight").split(".")
        head = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
        if match := _EXPERTS.fullmatch(parts[-1]):
            for i, expert in enumerate(values):
                state[f"{head}mlp.experts.{i}.{match[1]}_proj.weight"] = expert.contiguous()
        else:
            state[f"{head}{_NAMES[parts[-1]]}.weight"] = values
    folder.mkdir(parents=True, exist_ok=True)
    Qwen3MoeConfig(architectures=["Qwen3MoeForCausalLM"], **CONFIG).save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """The command at the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("checkpoint", type=Path)
    arguments = parser.parse_args()
    write_checkpoint(arguments.model, arguments.checkpoint)


if __name__ == "__main__":
    main()
