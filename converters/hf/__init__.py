# SPDX-License-Identifier: MIT
"""Hugging Face checkpoints: what is in them, and what it is called in GGUF."""
