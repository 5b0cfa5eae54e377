# SPDX-License-Identifier: MIT
"""From a Hugging Face checkpoint to a GGUF file that stock llama.cpp and edgemoe load.

What is decided comes first, from headers alone: family, metadata, tokenizer, tensors, their types, every offset. Then
blocks of rows go through memory one after the other: read, checked, encoded, written. Memory is a few blocks,
whatever the size of the model; the smallest block is one row, or one expert's matrix where it has to be transposed.

The bytes depend on the checkpoint and the recipe, and on nothing else: not on memory, threads or interruptions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
import psutil

from edgemoe.errors import ConversionError
from edgemoe.sizes import format_size

from .gguf_file import DEFAULT_ALIGNMENT_BYTES, Layout, MetadataValue, PartialFile, TensorInfo, lay_out
from .hf.checkpoint import Bytes, Checkpoint, Floats, open_checkpoint
from .hf.families import find_family
from .hf.family import Family, Hparams
from .hf.plan import plan_tensors
from .hf.pre_tokenizers import check_name
from .hf.sources import Mxfp4Rows, Piece, Source
from .hf.tokenizer import convert_tokenizer
from .quantize.blocks import quantize

GgmlType = gguf.GGMLQuantizationType
Progress = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)`: `hash`, `check` (after an interruption) and `convert`, all in bytes."""

CONVERTER_VERSION = 1
"""Raised whenever the same inputs give another file."""

BUFFER_BYTES = 256 << 20
"""What blocks may take if no limit is given. Blocks beyond some 16 MiB are not faster."""

BYTES_PER_ELEMENT = 14
"""Of a block in memory: as stored (4 at most), as float32 (4), a reordered copy (4) and encoded (about 2)."""

_MAX_BLOCK_ELEMENTS = 16 << 20
_HASH_BYTES = 16 << 20
_PLACEHOLDER = "0" * 64
_ALWAYS_F32 = (  # llama.cpp multiplies, adds or convolves these with float32 only, or they are routers
    "_norm.weight",
    ".bias",
    "ffn_gate_inp.weight",
    "ffn_gate_inp_shexp.weight",
    "shortconv.conv.weight",
    "attn_sinks.weight",
)
