# SPDX-License-Identifier: MIT
"""Quantized ONNX of a checkpoint: a dense part in standard operators, experts as QMoE nodes over their own file."""
