# SPDX-License-Identifier: MIT
"""llama.cpp without weight repacking: no second copy of weights, and products in the formats of the file.

On processors with AMX repacked products crash in llama.cpp (llama-cpp-python 0.3.36: a general protection fault in
`ggml_backend_amx_mul_mat` with SmolLM2-135M in Q4_1, virtual machine, Intel Xeon with amx_tile and amx_int8).
"""

from __future__ import annotations

from typing import Any

import llama_cpp


class UnpackedLlama(llama_cpp.Llama):  # type: ignore[misc]  # llama_cpp has no strict types
    """`llama_cpp.Llama` with `use_extra_bufts` off, which it has no keyword for."""

    # llama_cpp.Llama fills in `self.model_params` and hands it to llama.cpp.
    @property
    def model_params(self) -> Any:
        """llama.cpp's model parameters."""
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        params.use_extra_bufts = False
        self._model_params = params
