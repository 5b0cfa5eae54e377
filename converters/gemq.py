# SPDX-License-Identifier: MIT
"""GEMQ: what an error in a projection's output costs, measured on a calibration text.

GEMQ (arXiv 2605.23078) scores a quantized part by the sum over tokens of g^2 * (Y - Y')^2: the change of its output,
each component weighed with the squared gradient g of the loss. Both factors are measured here without a backward pass,
which llama.cpp does not have for these models, and are taken as independent:

- *The change of the output* of a projection W with input x is (W - W') x. Its expected square is, with the diagonal of
  E[x x^T] that an importance matrix holds for each expert, the squared error of the weights times the importance of
  their columns. Experts count by how many tokens chose them.
- *The squared gradient* of a layer's projection is the response of the model to noise: independent Gaussian noise of
  variance v is added to every component of the projection's output, and the divergence KL(p || p') of the next
  token's distribution p' from the undisturbed p is measured. For small v it is v times half the trace of the Fisher
  information at that place, which is what the mean of g^2 is.

    cost(tensor, type) = KL / v * expected square of (W - W') x, per token
"""

from __future__ import annotations

import ctypes
import dataclasses
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp._ggml import libggml

from edgemoe.errors import ConversionError

from . import evaluate

Floats = npt.NDArray[np.float32]

NOISE = 0.1
"""Standard deviation of the noise, of the output's root mean square: about that of the error of 4 bits a weight."""

CHUNK_TOKENS = 128
"""Tokens of a context. Its logits are held twice."""

_NODE_OF = {"gate": "ffn_moe_gate", "up": "ffn_moe_up", "down": "ffn_moe_down", "gate_up": "ffn_moe_gate_up"}
_TENSOR = re.compile(r"blk\.(\d+)\.ffn_(gate_up|gate|up|down)_exps\.weight")

_tensor_set = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)(
    ("ggml_backend_tensor_set", libggml)
)


@dataclasses.dataclass
class _Disturbance:
    """The node whose output gets noise, and what came of it."""

    node: bytes
    seed: int
    variance: float = 0.0
    n_outputs: int = 0


def sensitivities(
    model: Path,
    tensor_names: Sequence[str],
    text: str,
    *,
    max_tokens: int,
    progress: Callable[[str, int, int], None],
) -> dict[str, float]:
    """By tensor: KL divergence a token, in nats, for each unit of variance in the outputs of its projection.

    The model runs once over the text for each tensor, and once undisturbed.

    Args:
        model: the GGUF file that will be quantized.
        tensor_names: stacks of experts, such as `blk.3.ffn_up_exps.weight`.
        text: `max_tokens` of it are used, in chunks of 128 from an empty context.
        max_tokens: upper bound.
        progress: called with the stage `disturb`, runs done and in total.

    Raises:
        ConversionError: llama.cpp cannot run the model, its graph has no such projection, or the text is too short.
    """
    nodes = {name: _node_of(model, name) for name in tensor_names}
    current: _Disturbance | None = None
    failure: list[BaseException] = []

    def on_tensor(tensor: int, ask: bool, _user_data: int | None) -> bool:
        if current is None or evaluate.tensor_name(tensor) != current.node:
            return not ask
        if not ask:
            try:
                _disturb(tensor, current)
            except BaseException as error:  # one that leaves a callback would only be printed
                failure.append(error)
                return False
        return True

    divergence = dict.fromkeys(tensor_names, 0.0)
    variance = dict.fromkeys(tensor_names, 0.0)
    with evaluate.llama_context(model, on_tensor, CHUNK_TOKENS) as (llama, context):
        vocab = llama_cpp.llama_model_get_vocab(llama)
        n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
        chunks = [tokens for tokens, _ in evaluate.chunks_of_tokens(llama, text, CHUNK_TOKENS, max_tokens)]
        if not chunks:
            raise ConversionError("cannot measure sensitivities: the calibration text has no tokens; use a longer one")
        n_runs = len(chunks) * len(nodes)
        for index, tokens in enumerate(chunks):
            evaluate.decode(model, context, tokens)
            calm = _log_probabilities(context, len(tokens), n_vocab)
            for order, (name, node) in enumerate(nodes.items()):
                current = _Disturbance(node, zlib.crc32(f"{index} {name}".encode()))
                try:
                    evaluate.decode(model, context, tokens)
                except ConversionError:
                    if failure:
                        raise failure[0] from None
                    raise
                if not current.n_outputs:
                    raise ConversionError(
                        f"cannot measure the sensitivity of {name}: llama.cpp's graph of {model} has no node "
                        f"{node.decode()}; use the allocation that needs no text (alphaq)"
                    )
                variance[name] += current.variance / len(chunks)
                disturbed = _log_probabilities(context, len(tokens), n_vocab)
                divergence[name] += _mean_divergence(calm, disturbed) / len(chunks)
                current = None
                progress("disturb", index * len(nodes) + order + 1, n_runs)
    return {name: max(divergence[name], 0.0) / variance[name] if variance[name] > 0 else 0.0 for name in tensor_names}


def _node_of(model: Path, tensor_name: str) -> bytes:
    """llama.cpp's name of the product with that tensor."""
    match = _TENSOR.fullmatch(tensor_name)
    if match is None:
        raise ConversionError(
            f"cannot measure the sensitivity of {tensor_name} of {model}: expected blk.N.ffn_gate_exps.weight, "
            "ffn_up_exps, ffn_down_exps or ffn_gate_up_exps; use the allocation that needs no text (alphaq)"
        )
    return f"{_NODE_OF[match.group(2)]}-{match.group(1)}".encode()


def _disturb(tensor: int, disturbance: _Disturbance) -> None:
    """Add noise to all components of a tensor of floats."""
    n_bytes = int(evaluate.tensor_n_bytes(tensor))
    values = np.empty(n_bytes // 4, np.float32)
    evaluate.tensor_get(tensor, values.ctypes.data, 0, n_bytes)
    rms = float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
    noise = np.random.default_rng(disturbance.seed).standard_normal(len(values), np.float32)
    values += noise * np.float32(NOISE * rms)
    _tensor_set(tensor, values.ctypes.data, 0, n_bytes)
    disturbance.variance = (NOISE * rms) ** 2
    disturbance.n_outputs = len(values)


def _log_probabilities(context: llama_cpp.llama_context_p, n_tokens: int, n_vocab: int) -> Floats:
    """Logarithms of the next token's probabilities float32 (n_tokens, n_vocab)."""
    logits: Floats = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(n_tokens, n_vocab)).copy()
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return logits


def _mean_divergence(calm: Floats, disturbed: Floats) -> float:
    """Mean over tokens of KL(calm || disturbed), in nats."""
    return float(np.einsum("tv,tv->t", np.exp(calm), calm - disturbed, dtype=np.float64).mean())
