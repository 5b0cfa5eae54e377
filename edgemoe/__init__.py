# SPDX-License-Identifier: MIT
"""edgemoe: Mixture-of-Experts models that are bigger than memory, on unmodified llama.cpp.

`Llama` is `llama_cpp.Llama` with a memory budget; `plan` says beforehand where the bytes go.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgemoe.budget import MemoryBudget as MemoryBudget
    from edgemoe.demo import demo_model as demo_model
    from edgemoe.llama import Llama as Llama
    from edgemoe.planner import plan as plan

from edgemoe.errors import EdgeMoeError as EdgeMoeError
from edgemoe.types import ExpertKey as ExpertKey
from edgemoe.types import Plan as Plan
from edgemoe.types import Stats as Stats

__version__ = "0.1.0"

# Imported on first use: llama_cpp alone takes most of a second.
_LAZY = {
    "MemoryBudget": "edgemoe.budget",
    "Llama": "edgemoe.llama",
    "plan": "edgemoe.planner",
    "demo_model": "edgemoe.demo",
}


if not TYPE_CHECKING:  # a checker would take every name, even a mistyped one, for an attribute

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module 'edgemoe' has no attribute {name!r}")
        return getattr(importlib.import_module(_LAZY[name]), name)
