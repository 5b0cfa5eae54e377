# SPDX-License-Identifier: MIT
"""Quantization: ggml's own quantizers, the choice of a type for each tensor, importance matrices."""
