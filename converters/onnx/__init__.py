# SPDX-License-Identifier: MIT
"""Quantized ONNX: a dense part in standard operators, experts as QMoE nodes over their own file.

`export` does so for any PyTorch module whose MoE blocks a user describes; `checkpoint` for language models as Hugging
Face publishes them.
"""

from __future__ import annotations

from .module import ExportedModule, export
from .moe_block import MoeBlock

__all__ = ["ExportedModule", "MoeBlock", "export"]
