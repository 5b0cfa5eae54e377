# SPDX-License-Identifier: MIT
"""Converters: programs that write model files for edgemoe."""
