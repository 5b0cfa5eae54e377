# SPDX-License-Identifier: MIT
"""MoE blocks within a PyTorch module: found, compared with what the user says of them, and traced as one node each.

Needs torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.utils import _pytree as pytree

from edgemoe.errors import ConversionError

from .moe_block import MoeBlock

DOMAIN, OP = "edgemoe.trace", "MoeBlock"
"""The node that stands for a block while a module is traced; its attribute `block` is the place in the list, and
`has_weights` says whether the block's weights are others than the softmax of the k highest scores."""

MAPPING_TOLERANCE = 1e-4
"""Largest difference, relative to the largest element, between a block and what its `MoeBlock` says that it computes:
sums in another order make 1e-6 of it, another activation or another rule for weights more than 1e-3."""

SOFTMAX_TOLERANCE = 1e-6
"""Largest difference of weights that count as the softmax of scores: some roundings of numbers up to 1."""

Key = type[torch.nn.Module] | str | Callable[[str, torch.nn.Module], bool]
Mappings = Mapping[Key, Callable[[Any], MoeBlock]]


@dataclasses.dataclass(frozen=True)
class Found:
    """A block: its place in the module ("" if that is the module itself), what it is called, and what it computes."""

    path: str
    name: str
    module: torch.nn.Module
    signature: inspect.Signature
    moe: MoeBlock

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs of a call, those by name in their positions where that is possible."""
        bound = self.signature.bind(*args, **kwargs)
        return bound.args, bound.kwargs

    def routed(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Tokens [..., H], scores [tokens, E], and weights [tokens, E] if there are any."""
        x = next(iter((*args, *kwargs.values()))) if self.moe.tokens is None else self.moe.tokens(*args, **kwargs)
        routed = self.moe.route(*args, **kwargs)
        scores, weights = routed if isinstance(routed, tuple) else (routed, None)
        _check_routed(self, x, scores, weights)
        n_experts = self.moe.n_experts
        return x, scores.reshape(-1, n_experts), None if weights is None else weights.reshape(-1, n_experts)

    def finished(self, y: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the block returns."""
        return y if self.moe.finish is None else self.moe.finish(y, *args, **kwargs)


def find_blocks(module: torch.nn.Module, mappings: Mappings) -> list[Found]:
    """The blocks that are named, each once; what is inside of a block belongs to it.

    Raises:
        ConversionError: a key names nothing, two name one block, or a `MoeBlock` is not one or contradicts itself.
    """
    if not mappings:
        raise ConversionError("cannot export: moe is empty; say which modules are MoE blocks and what they compute")
    keys_used: set[int] = set()
    found: list[Found] = []
    for name, child in module.named_modules():
        matching = [i for i, key in enumerate(mappings) if _matches(key, name, child)]
        keys_used |= set(matching)
        if any(name.startswith(f"{outer.path}.") or not outer.path for outer in found) or not matching:
            continue
        label = name or type(module).__name__
        if len(matching) > 1:
            raise ConversionError(f"cannot export {label}: {len(matching)} keys of moe name it, expected one")
        with torch.no_grad():
            moe = list(mappings.values())[matching[0]](child)
        if not isinstance(moe, MoeBlock):
            raise ConversionError(f"cannot export {label}: moe maps it to a {type(moe).__name__}, expected a MoeBlock")
        moe.check(label)
        found.append(Found(name, label, child, inspect.signature(child.forward), moe))
    for i, key in enumerate(mappings):
        if i not in keys_used:
            known = sorted({type(child).__name__ for child in module.modules()})
            raise ConversionError(
                f"cannot export {type(module).__name__}: no module matches {_said(key)} of moe; there are "
                f"{', '.join(known[:20])}"
            )
    return found


def check_blocks(
    module: torch.nn.Module, blocks: list[Found], inputs: tuple[Any, ...], *, are_weights_input: bool
) -> float:
    """Run the module, and compare each block's outputs with what its `MoeBlock` says.

    Args:
        module, inputs: what to run.
        blocks: within the module.
        are_weights_input: whether the nodes to come take weights; if not, they have to be the softmax of the scores.

    Returns:
        the largest relative difference.

    Raises:
        ConversionError: a block does something else, is never called, or computes in another type than float32.
    """
    errors = dict.fromkeys(range(len(blocks)), -1.0)

    def watch(i: int) -> Callable[..., None]:
        block = blocks[i]

        def hook(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if torch.compiler.is_compiling():  # torch.cond compiles its branches
                return
            args, kwargs = block.inputs(args, kwargs)
            x, scores, weights = block.routed(args, kwargs)
            if weights is not None and not are_weights_input:
                _check_softmax(block, scores, weights)
            computed = block.finished(mix(block.moe, x, scores, weights), args, kwargs)
            errors[i] = max(errors[i], _difference(block, computed, output))

        return hook

    with torch.no_grad(), contextlib.ExitStack() as stack:
        for i, block in enumerate(blocks):
            stack.callback(block.module.register_forward_hook(watch(i), with_kwargs=True).remove)
        module(*inputs)
    for i, error in errors.items():
        if error < 0:
            raise ConversionError(
                f"cannot export {blocks[i].name}: the module does not call it with these inputs, or inside of "
                "torch.cond, where experts cannot be streamed; name only blocks that take part, give inputs that reach "
                "them, and choose between results with torch.where"
            )
    return max(errors.values())


def mix(moe: MoeBlock, x: torch.Tensor, scores: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """What QMoE computes, with weights that are not quantized.

    Args:
        moe: the experts.
        x: [..., H].
        scores, weights: [tokens, E].

    Returns:
        [..., H].
    """
    # Of equal scores QMoE takes the last, and topk any.
    best, backwards = (part[:, : moe.k] for part in scores.flip(-1).sort(dim=-1, descending=True, stable=True))
    chosen = moe.n_experts - 1 - backwards
    shares = best.softmax(dim=-1) if weights is None else weights.gather(-1, chosen)
    if moe.normalizes and weights is not None:
        shares = shares / shares.sum(dim=-1, keepdim=True)
    tokens = x.reshape(-1, moe.hidden)
    y = torch.zeros_like(tokens)
    for expert in range(moe.n_experts):
        rows, places = (chosen == expert).nonzero(as_tuple=True)
        if len(rows):
            y[rows] += shares[rows, places].unsqueeze(1) * _expert(moe, tokens[rows], expert)
    return y.reshape(x.shape)


@contextlib.contextmanager
def traced_as_nodes(blocks: list[Found], multiple: int, *, are_weights_input: bool) -> Iterator[None]:
    """While this lasts, blocks are traced as nodes of `DOMAIN` with tokens, scores and weights.

    Args:
        blocks: which.
        multiple: the nodes' tokens have zeros behind their elements up to a multiple of this.
        are_weights_input: whether the nodes take weights.
    """
    before = [block.module.__dict__.get("forward") for block in blocks]
    for i, block in enumerate(blocks):
        block.module.__dict__["forward"] = _traced(i, block, multiple, are_weights_input)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.module.__dict__["forward"]
            if forward is not None:
                block.module.__dict__["forward"] = forward


def _traced(i: int, block: Found, multiple: int, are_weights_input: bool) -> Callable[..., Any]:
    hidden = block.moe.hidden
    missing = -hidden % multiple

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = block.inputs(args, kwargs)
        x, scores, weights = block.routed(args, kwargs)
        tokens = x.reshape(-1, hidden)
        if missing:
            tokens = torch.nn.functional.pad(tokens, (0, missing))
        inputs = [tokens, scores] if weights is None or not are_weights_input else [tokens, scores, weights]
        about: dict[str, Any] = {"block": i, "has_weights": int(weights is not None)}
        y = torch.onnx.ops.symbolic(f"{DOMAIN}::{OP}", inputs, about, dtype=tokens.dtype, shape=tokens.shape, version=1)
        if missing:
            y = y[:, :hidden]
        return block.finished(y.reshape(x.shape), args, kwargs)

    # torch.export reads the names of inputs off the module's signature, where the module is the block.
    forward.__signature__ = block.signature  # type: ignore[attr-defined]
    return forward


def _expert(moe: MoeBlock, x: torch.Tensor, expert: int) -> torch.Tensor:
    def linear(rows: torch.Tensor, weights: Any, biases: Any) -> torch.Tensor:
        y: torch.Tensor = rows @ weights[expert].detach().to(rows).T
        return y if biases is None else y + biases[expert].detach().to(rows)

    h = linear(x, moe.w1, moe.b1)
    if moe.is_gated:
        if moe.w3 is not None:
            gate, up = h, linear(x, moe.w3, moe.b3)
        else:
            gate, up = (h[:, 0::2], h[:, 1::2]) if moe.is_interleaved else h.chunk(2, dim=-1)
        if moe.swiglu_limit is not None:
            gate, up = gate.clamp(max=moe.swiglu_limit), up.clamp(-moe.swiglu_limit, moe.swiglu_limit)
        h = gate * torch.sigmoid(moe.swiglu_alpha * gate) * (up + moe.swiglu_beta)
    elif moe.activation == "gelu_tanh":
        h = torch.nn.functional.gelu(h, approximate="tanh")
    elif moe.activation != "identity":
        h = {"relu": torch.relu, "silu": torch.nn.functional.silu}[moe.activation](h)
    return linear(h, moe.w2, moe.b2)


def _check_routed(block: Found, x: Any, scores: Any, weights: Any) -> None:
    n_experts, hidden = block.moe.n_experts, block.moe.hidden
    for what, value, size in (("tokens", x, hidden), ("scores", scores, n_experts), ("weights", weights, n_experts)):
        if value is None and what == "weights":
            continue
        if not isinstance(value, torch.Tensor):
            raise ConversionError(f"cannot export {block.name}: {what} are a {type(value).__name__}, expected a tensor")
        if value.dtype != torch.float32:
            raise ConversionError(
                f"cannot export {block.name}: {what} are {str(value.dtype).removeprefix('torch.')}, expected float32; "
                "call module.float(), and give inputs of that type"
            )
        if value.dim() < 1 or tuple(value.shape[:-1]) != tuple(x.shape[:-1]) or value.shape[-1] != size:
            raise ConversionError(
                f"cannot export {block.name}: {what} have shape {list(value.shape)}, expected "
                f"{[*x.shape[:-1], size]}: a row for each token of {list(x.shape)}; correct tokens or route in moe"
            )


def _check_softmax(block: Found, scores: torch.Tensor, weights: torch.Tensor) -> None:
    error = float((weights - scores.softmax(-1)).abs().max()) if weights.numel() else 0.0
    if not error <= SOFTMAX_TOLERANCE:
        raise ConversionError(
            f"cannot export {block.name}: its weights differ from the softmax of its scores by {error:.2g}, and nodes "
            "of float experts have no input for weights; use int4 or int8"
        )


def _difference(block: Found, computed: Any, output: Any) -> float:
    ours, theirs = pytree.tree_leaves(computed), pytree.tree_leaves(output)
    if [getattr(v, "shape", None) for v in ours] != [getattr(v, "shape", None) for v in theirs]:
        raise ConversionError(
            f"cannot export {block.name}: it returns {_described(output)}, the MoeBlock {_described(computed)}; "
            "say with finish how one becomes the other"
        )
    largest = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, torch.Tensor) and a.numel():
            error = float((a - b).abs().max()) / max(float(b.abs().max()), 1e-30)
            if not error <= MAPPING_TOLERANCE:  # so that nan is an error too
                raise ConversionError(
                    f"cannot export {block.name}: its MoeBlock computes something else, by {error:.2g} of the largest "
                    f"element, expected {MAPPING_TOLERANCE:.0e} at most; check activation, scores and weights, the "
                    "order of rows in w1, and finish"
                )
            largest = max(largest, error)
    return largest


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return str(list(value.shape))
    return f"a {type(value).__name__} of {len(value)}" if isinstance(value, (tuple, list, dict)) else str(type(value))


def _matches(key: Key, name: str, module: torch.nn.Module) -> bool:
    if isinstance(key, str):
        return fnmatchcase(name, key)
    if isinstance(key, type):
        return isinstance(module, key)
    return bool(key(name, module))


def _said(key: Key) -> str:
    return key if isinstance(key, str) else getattr(key, "__name__", repr(key))
