# SPDX-License-Identifier: MIT
"""Reads the pieces of a SentencePiece model: the one message of tokenizer.model that matters here.

The file is a protobuf `ModelProto` (sentencepiece's src/sentencepiece_model.proto): field 1, repeated, is a piece of
text (1), a score (2, float) and a type (3), whose numbers are GGUF's own. Reading it takes a page of code, so the
sentencepiece library is not needed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import gguf

from edgemoe.errors import ConversionError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_pieces(path: Path) -> list[tuple[str, float, int]]:
    """Text, score and type of each piece, in the order of their ids.

    Raises:
        ConversionError: the file is not a SentencePiece model, or cannot be read.
    """
    try:
        data = path.read_bytes()
        pieces = [_piece(bytes(value)) for field, value in _fields(data) if field == 1 and isinstance(value, bytes)]
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, IndexError, struct.error) as error:
        raise ConversionError(
            f"cannot read {path}: it is no SentencePiece model ({error}); download it again"
        ) from error
    if not pieces:
        raise ConversionError(f"cannot read {path}: it has no pieces; download it again")
    return pieces


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, int(gguf.TokenType.NORMAL)
    for field, value in _fields(data):
        if field == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif field == 2 and isinstance(value, bytes):
            score = struct.unpack("<f", value)[0]
        elif field == 3 and isinstance(value, int):
            kind = value
    return text, score, kind


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Number and value of each field of a message."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        value: bytes | int
        if kind == _VARINT:
            value, at = _varint(data, at)
        else:
            if kind == _BYTES:
                length, at = _varint(data, at)
            elif kind in (_FIXED64, _FIXED32):
                length = 8 if kind == _FIXED64 else 4
            else:
                raise ValueError(f"wire type {kind} at byte {at}")
            if at + length > len(data):
                raise ValueError(f"a field ends behind the end, at byte {at + length}")
            value = data[at : at + length]
            at += length
        yield tag >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
    raise ValueError(f"a number longer than 64 bits at byte {at}")
