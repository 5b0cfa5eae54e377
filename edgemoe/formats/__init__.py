# SPDX-License-Identifier: MIT
"""Model file formats, read without loading a model."""
