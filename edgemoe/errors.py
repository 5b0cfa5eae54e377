# SPDX-License-Identifier: MIT
"""The exceptions a user of edgemoe can meet.

Every message reads `what failed: found, expected (where); what to do`. The command line prints it as
one line; a traceback is shown only with `--debug`.
"""

from __future__ import annotations


class EdgeMoeError(Exception):
    """Base of every error that edgemoe raises on purpose."""


class ModelFormatError(EdgeMoeError):
    """A model file is truncated, inconsistent, or not what its header says."""


class BudgetError(EdgeMoeError):
    """A memory budget cannot be met: it is below the floor, or cannot be parsed."""


class ExpertReadError(EdgeMoeError):
    """Reading an expert from storage failed while a model was running."""


class BackendError(EdgeMoeError):
    """The engine below (llama.cpp) is missing, of another version, or failed."""


class AdapterError(EdgeMoeError):
    """A LoRA adapter cannot be used with a streamed model."""


class ConversionError(EdgeMoeError):
    """A converter cannot read its source or write its result."""


class TraceError(EdgeMoeError):
    """A trace cannot be recorded, written or read."""


class PriceError(EdgeMoeError):
    """A price was asked for that nothing remembered can answer."""
