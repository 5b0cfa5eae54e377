# SPDX-License-Identifier: MIT
"""Low-bit companions: the experts of a model once more, in fewer bits, in a GGUF file of their own.

A companion is read where waiting for the exact expert does not pay. It has the expert tensors of its source, with the
same names and shapes, and the hyper-parameters, but no other weights and no vocabulary: a valid GGUF file, and no model
that anything loads by itself. `edgemoe.companion.source_key` ties it to the experts it was made from, wherever they lie
in a file and whatever is done to the rest of the model.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from edgemoe.errors import ModelFormatError
from edgemoe.formats.gguf import GgufModel, read_model

COMPANION_TYPE = "expert-companion"
"""Value of `general.type`; a model has none, or `model`."""

SOURCE_KEY = "edgemoe.companion.source_key"
SOURCE_NAME = "edgemoe.companion.source_name"

_SAMPLE_BYTES = 4096


def expert_bank_key(model: GgufModel) -> str:
    """What tells a model's routed experts from all others: 64 hexadecimal digits.

    A hash of the names, shapes and types of all expert tensors, and of 4 KiB at the beginning, in the middle and at
    the end of each. Not of where they lie: a copy that is packed or split differently has the same key, as has one with
    other routers. Two fine-tunes that differ in experts have different ones, unless they agree in every sample.

    Raises:
        ModelFormatError: a file cannot be read.
    """
    digest = hashlib.sha256()
    descriptors: list[int] = []
    try:
        for path in model.files:
            descriptors.append(os.open(path, os.O_RDONLY))
            os.posix_fadvise(descriptors[-1], 0, 0, os.POSIX_FADV_RANDOM)
        for t in sorted(model.expert_tensors, key=lambda t: t.name):
            digest.update(f"{t.name} {t.shape} {t.type_name}\n".encode())
            n_sample = min(_SAMPLE_BYTES, t.n_bytes)
            for begin in (0, (t.n_bytes - n_sample) // 2, t.n_bytes - n_sample):
                digest.update(os.pread(descriptors[t.file_idx], n_sample, t.offset + begin))
    except OSError as error:
        raise ModelFormatError(f"cannot read {model.path}: {error.strerror or error}; check its files") from error
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return digest.hexdigest()


def open_companion(path: str | Path, source: GgufModel) -> GgufModel:
    """Read the header of the companion at `path` and check that it is that of `source`.

    The result's `expert_tensors` have the names and shapes of the source's, in any order, and types of their own.

    Raises:
        ModelFormatError: the file is no complete GGUF, no companion, or the companion of other experts.
    """
    companion = read_model(path)
    name = companion.metadata.get(SOURCE_NAME, "unknown")
    if companion.metadata.get("general.type") != COMPANION_TYPE or SOURCE_KEY not in companion.metadata:
        raise ModelFormatError(
            f"cannot use {path} as a low-bit companion: found general.type "
            f"{companion.metadata.get('general.type', 'model')!r:.40}, expected {COMPANION_TYPE!r}; make one with "
            "`edgemoe convert lowbit`"
        )
    expected = {t.name: t.shape for t in source.expert_tensors}
    found = {t.name: t.shape for t in companion.expert_tensors}
    if found != expected:
        differing = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))[0]
        raise ModelFormatError(
            f"cannot use {path} as a low-bit companion of {source.path}: it was made from {name!r:.80}, which has "
            f"other experts ({differing}: found {list(found.get(differing, ()))}, expected "
            f"{list(expected.get(differing, ()))}); make one from this model with `edgemoe convert lowbit`"
        )
    if companion.metadata[SOURCE_KEY] != (key := expert_bank_key(source)):
        raise ModelFormatError(
            f"cannot use {path} as a low-bit companion of {source.path}: it was made from {name!r:.80}, whose experts "
            f"have the same shapes and other weights (key {companion.metadata[SOURCE_KEY]!s:.8}, expected {key:.8}); "
            "make one from this model with `edgemoe convert lowbit`"
        )
    return companion
