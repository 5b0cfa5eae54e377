# SPDX-License-Identifier: MIT
"""A router within a model of transformers: found by its numbers, watched by hooks, and trained.

No names of modules are assumed. The parameter is the one that has the numbers of the GGUF's tensor. What the router
sees is the first argument of the module that owns the parameter; what it chooses is the tensor of whole numbers that
this module, or the one around it, returns, whatever the rule (groups, biases for the choice only). One thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.hooks import RemovableHandle

from edgemoe.errors import ConversionError
from edgemoe.formats.gguf import GgufModel

from . import router_losses
from .router_tensors import RouterTensors, is_rounded, read_floats

_SIGMOID = 2  # llama.cpp's value of `expert_gating_func`


class RouterProbe:
    """A router in the network: what it is trained from, and what the last evaluation showed of it.

    Attributes:
        layer: in the GGUF.
        owner: the module that has the parameters.
        originals: the numbers before training, by the names of the GGUF's tensors.
    """

    def __init__(self, tensors: RouterTensors, owner: Any, parameters: dict[str, torch.Tensor], is_sigmoid: bool):
        self.layer = tensors.layer
        self.owner = owner
        self._by_tensor = parameters
        self.originals = {name: p.detach().clone() for name, p in parameters.items()}
        self._is_sigmoid = is_sigmoid
        self._hidden: torch.Tensor | None = None
        self._chosen: torch.Tensor | None = None

    @property
    def parameters(self) -> list[torch.Tensor]:
        """What is trained."""
        return list(self._by_tensor.values())

    def values(self) -> dict[str, npt.NDArray[np.float32]]:
        """The numbers by the names of the GGUF's tensors."""
        return {name: p.detach().numpy() for name, p in self._by_tensor.items()}

    def exchange(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Put these numbers in, and give those that were there."""
        old = {name: p.data for name, p in self._by_tensor.items()}
        for name, parameter in self._by_tensor.items():
            parameter.data = values[name]
        return old

    def watch(self, network: Any) -> list[RemovableHandle]:
        """Begin to see what the router gets and chooses."""
        name = next(name for name, module in network.named_modules() if module is self.owner)
        around = network.get_submodule(name.rpartition(".")[0])
        return [
            self.owner.register_forward_hook(lambda _module, inputs, output: self._see(True, inputs, output)),
            around.register_forward_hook(lambda _module, inputs, output: self._see(False, inputs, output)),
        ]

    def _see(self, is_owner: bool, inputs: tuple[Any, ...], output: Any) -> None:
        """Note what the router got, and what it or the module around it gave."""
        if is_owner:
            self._hidden = inputs[0].reshape(-1, inputs[0].shape[-1])
            self._chosen = None
        if self._chosen is None and isinstance(output, tuple):
            ids = [o for o in output if isinstance(o, torch.Tensor) and o.dtype in (torch.int64, torch.int32)]
            self._chosen = ids[0].reshape(-1, ids[0].shape[-1]).long() if ids else None

    def chosen(self, n_windows: int) -> torch.Tensor:
        """Experts of the last evaluation, int64 [window, token, k]."""
        if self._hidden is None or self._chosen is None:
            raise ConversionError(
                f"cannot tune the routers: transformers does not show which experts layer {self.layer} chooses "
                f"({type(self.owner).__name__}); this model is not supported"
            )
        return self._chosen.view(n_windows, -1, self._chosen.shape[-1])

    def log_probabilities(self, n_windows: int, *, original: bool = False) -> torch.Tensor:
        """Of the last evaluation's inputs [window, token, expert], by the router as it is or was."""
        assert self._hidden is not None  # `chosen` is asked before
        weights = list((self.originals if original else self._by_tensor).values())
        logits = torch.nn.functional.linear(self._hidden, *weights)
        return router_losses.log_probabilities(logits, is_sigmoid=self._is_sigmoid).view(n_windows, -1, len(weights[0]))


@contextlib.contextmanager
def watched(network: Any, probes: Sequence[RouterProbe]) -> Iterator[None]:
    """Within: what the network evaluates is seen by the probes."""
    with contextlib.ExitStack() as stack:
        for probe in probes:
            for handle in probe.watch(network):
                stack.callback(handle.remove)
        yield


def attach(network: Any, model: GgufModel, tensors: RouterTensors, checkpoint: Path) -> RouterProbe:
    """The parameters of the network that have the numbers of a router; they get exactly those, and need gradients.

    Raises:
        ConversionError: there are none.
    """
    weight = read_floats(model, tensors.weight)
    bias = None if tensors.bias is None else read_floats(model, tensors.bias)
    of_shape = [(name, p) for name, p in network.named_parameters() if tuple(p.shape) == weight.shape]
    for name, parameter in of_shape:
        owner = network.get_submodule(name.rpartition(".")[0])
        if parameter.requires_grad or not is_rounded(weight, tensors.weight, parameter.numpy()):
            continue
        found = {tensors.weight.name: (parameter, weight)}
        own_bias = getattr(owner, "bias", None)
        if bias is not None and tensors.bias is not None:
            if own_bias is None or not is_rounded(bias, tensors.bias, own_bias.numpy()):
                continue
            found[tensors.bias.name] = (own_bias, bias)
        for target, values in found.values():
            target.data = torch.from_numpy(values)
            target.requires_grad_(True)
        is_sigmoid = model.metadata.get(f"{model.architecture}.expert_gating_func") == _SIGMOID
        return RouterProbe(tensors, owner, {name: target for name, (target, _) in found.items()}, is_sigmoid)
    nearest = min((float(np.abs(p.detach().numpy() - weight).max()) for _, p in of_shape), default=None)
    difference = "none has this shape" if nearest is None else f"the nearest is off by {nearest:.3g}"
    raise ConversionError(
        f"cannot tune the routers of {model.path}: {tensors.weight.name} {list(weight.shape)} is no parameter of "
        f"{checkpoint}, expected the same numbers but for rounding ({difference}); name the checkpoint that it was "
        "converted from"
    )
