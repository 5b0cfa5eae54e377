# SPDX-License-Identifier: MIT
"""Five modules with MoE blocks that are no language models, and how each is exported to quantized ONNX.

Weights are random and shapes small: what is shown is how a block is described, not a trained model. Every file has
`make()`, `inputs(batch)`, `MOE` (the mapping) and `DYNAMIC` (axes of any size).
"""
