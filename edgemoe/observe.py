# SPDX-License-Identifier: MIT
"""A context of llama.cpp that shows each product it computes, while its experts stream within a memory budget."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp as llama

from edgemoe import _native, host
from edgemoe.errors import BudgetError, ConversionError
from edgemoe.llama import Llama
from edgemoe.sizes import format_size

OnTensor = Callable[[int, bool, int | None], bool]
"""`ggml_backend_sched_eval_callback`: a tensor's address, whether it is yet to be computed, user data."""


class _ObservedLlama(Llama):
    """A `Llama` whose context calls back for each node of a graph."""

    def __init__(self, path: Path, on_tensor: OnTensor, **options: Any) -> None:
        self._on_tensor = llama.ggml_backend_sched_eval_callback(on_tensor)  # has to live as long as the context
        super().__init__(path, **options)

    # llama_cpp.Llama fills in `self.context_params` and hands it to llama.cpp.
    @property
    def context_params(self) -> Any:
        """llama.cpp's context parameters."""
        return self._context_params

    @context_params.setter
    def context_params(self, params: Any) -> None:
        params.cb_eval = self._on_tensor
        self._context_params = params


@contextlib.contextmanager
def observed_context(
    path: Path, on_tensor: OnTensor, n_ctx: int, *, memory_bytes: int | None, reserved_bytes: int
) -> Iterator[tuple[Any, Any]]:
    """A model and a context that stream their experts and show their tensors to `on_tensor`; freed at the end.

    Products with experts have the bits of llama.cpp: they are ggml's, and asked for one at a time.

    Args:
        path: a GGUF file, the first of a split one.
        on_tensor: called by llama.cpp; what it raises is lost.
        n_ctx: tokens of the context and of a batch; all of them may be outputs.
        memory_bytes: what this process may hold; None for what the machine has.
        reserved_bytes: of that, what the caller will take.

    Raises:
        BudgetError: the model does not run in so little; nothing is loaded then.
        ExpertReadError: experts could not be read while the context was used.
        ModelFormatError, BackendError: see `Llama`.
    """
    budget_bytes = host.default_budget_bytes() if memory_bytes is None else memory_bytes
    try:
        llm = _ObservedLlama(
            path,
            on_tensor,
            memory=max(budget_bytes - reserved_bytes, 1),
            n_ctx=n_ctx,
            n_batch=n_ctx,
            n_ubatch=n_ctx,
            logits_all=True,
            kernels="ggml",
            warm_start=False,
            offload_kqv=False,
            op_offload=False,
        )
    except BudgetError as error:
        raise BudgetError(
            f"{error}, and {-(-reserved_bytes >> 20)} MiB more for what is collected (of {format_size(budget_bytes)})"
        ) from error
    with llm:
        try:
            yield llm._model.model, llm._ctx.ctx
        except ConversionError:
            if llm._runtime is not None:
                _native.raise_error(llm._runtime)
            raise
