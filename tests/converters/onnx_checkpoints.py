# SPDX-License-Identifier: MIT
"""Tiny checkpoints whose matrices lie on a grid of int4 or int8 already, so that converting rounds nothing: what
transformers computes with such a checkpoint is what the quantized ONNX has to compute. And a loop that feeds a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.converters import checkpoints
from tests.converters.checkpoints import Checkpoint

Floats = npt.NDArray[np.float32]

CHANGES: dict[str, dict[str, Any]] = {
    "mixtral": {"sliding_window": 24},
    "phimoe": {"router_jitter_noise": 0.3},
    "deepseek-v2-lite": {"num_hidden_layers": 3, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
}
"""Fields that differ from `families`: a window shorter than the test's text, a sparse mixer that mixes in most tokens
and not in few, fewer layers (27 are llama.cpp's business), and groups, which DeepSeek-V2 has and Lite has not."""


def write_checkpoint(folder: Path, name: str, bits: int, **changes: Any) -> Checkpoint:
    """A checkpoint as `checkpoints.write_checkpoint` makes it, with matrices on a grid of blocks of 32 columns."""
    import safetensors.torch

    checkpoint = checkpoints.write_checkpoint(folder, name, **{**CHANGES.get(name, {}), **changes})
    for path in folder.glob("*.safetensors"):
        state = safetensors.torch.load_file(path)
        for key, tensor in state.items():
            if key.endswith("_blocks"):
                state[key] = _mxfp4_on_grid(tensor)
            if tensor.dim() < 2 or not tensor.is_floating_point():
                continue
            is_transposed = name.startswith("gpt-oss") and tensor.dim() == 3
            rows = tensor.transpose(1, 2) if is_transposed else tensor
            rows = on_grid(rows, bits)
            state[key] = (rows.transpose(1, 2) if is_transposed else rows).contiguous()
        safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    return checkpoint


def on_grid(tensor: Any, bits: int) -> Any:
    """Of each 32 columns, the largest element is 2^(bits - 1) steps and the others are less; steps are powers of 2."""
    import torch

    half = 1 << (bits - 1)
    values = tensor.float()
    result = torch.empty_like(values)
    for start in range(0, values.shape[-1], 32):
        block = values[..., start : start + 32]
        largest = block.abs().argmax(-1, keepdim=True)
        step = torch.exp2((block.abs().amax(-1, keepdim=True) / half).log2().ceil())
        steps = (block / step).round().clamp(1 - half, half - 1)
        steps.scatter_(-1, largest, half * block.gather(-1, largest).sign())
        result[..., start : start + 32] = steps * step
    return result.to(tensor.dtype)


def _mxfp4_on_grid(packed: Any) -> Any:
    """MXFP4 blocks [..., 16] of numbers up to 3, but for a first one of 4: multiples of 1/2 with one of 8 halves."""
    nibbles = [(packed & 8) | (packed & 7).clamp(max=5), (packed >> 4 & 8) | (packed >> 4 & 7).clamp(max=5)]
    result = nibbles[0] | nibbles[1] << 4
    result[..., 0] = (result[..., 0] & 0xF0) | 6
    return result


class Runner:
    """Feeds a session's cache outputs back as inputs, as any caller of such a model does."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._names = [output.name for output in session.get_outputs()]
        self._cache: dict[str, Any] = {}
        self._n_past = 0
        for value in session.get_inputs()[2:]:
            sizes = {"batch": 1, "past": 0}
            shape = [sizes.get(n, n) if isinstance(n, str) else n for n in value.shape]
            self._cache[value.name] = np.zeros(shape, np.float32)

    def __call__(self, tokens: Sequence[int]) -> Floats:
        """Logits (tokens, vocabulary) of the next tokens."""
        self._n_past += len(tokens)
        feed = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, self._n_past), np.int64),
            **self._cache,
        }
        outputs = dict(zip(self._names, self._session.run(None, feed), strict=True))
        for name in self._cache:
            present = name.replace("past_key_values", "present").replace("past.", "present.")
            self._cache[name] = outputs[present]
        logits: Floats = outputs["logits"][0]
        return logits


def all_logits(session: Any, tokens: Sequence[int], n_first: int) -> Floats:
    """Logits of each position: the first in two runs, the others one by one."""
    runner = Runner(session)
    cut = n_first * 2 // 3
    prompt = [runner(tokens[:cut]), runner(tokens[cut:n_first])]
    return np.concatenate([*prompt, *(runner([token]) for token in tokens[n_first:])])


def greedy(session: Any, tokens: Sequence[int], n_new: int) -> list[int]:
    """The likeliest tokens after a prompt, one after the other."""
    runner = Runner(session)
    found = [int(runner(tokens)[-1].argmax())]
    while len(found) < n_new:
        found.append(int(runner([found[-1]])[-1].argmax()))
    return found


def relative_error(found: Floats, expected: Floats) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())
