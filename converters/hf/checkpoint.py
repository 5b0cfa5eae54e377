# SPDX-License-Identifier: MIT
"""A checkpoint as Hugging Face publishes it: a folder with config.json and safetensors files.

Only headers are read when it is opened; tensors are read by ranges of rows, never mapped and never whole, so memory
is what the caller asks for. Everything that can be wrong with the files is found before the first tensor is read,
except the numbers themselves: `read_rows` refuses those that are not finite.

The safetensors format: 8 bytes of header length, a JSON header, the tensors' bytes
(https://github.com/huggingface/safetensors, "Format"). One thread may open it; any number may read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemoe.errors import ConversionError

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

INDEX_NAME = "model.safetensors.index.json"
SCALE_SUFFIX = "_scale_inv"
"""What DeepSeek's FP8 checkpoints append to a weight's name for the scales of its blocks."""

_MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors library itself
_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "U8": 1, "I64": 8, "I32": 4, "BOOL": 1}
_FLOAT_DTYPES = ("F32", "F16", "BF16", "F8_E4M3")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint: `shape` as PyTorch has it (rows last but one, columns last), and where it lies."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    n_bytes: int

    @property
    def n_columns(self) -> int:
        """Elements of a row: the last dimension."""
        return self.shape[-1] if self.shape else 1

    @property
    def n_rows(self) -> int:
        """Rows, if all dimensions but the last are seen as one."""
        return int(np.prod(self.shape[:-1], dtype=np.int64)) if len(self.shape) > 1 else 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        folder: where it lies.
        config: config.json; what a `text_config` in it says stands at the top level too.
        tensors: all tensors, by name.
        inputs: the files that a conversion depends on.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    inputs: tuple[Path, ...]

    def read_raw(self, tensor: StoredTensor, start: int, stop: int) -> Bytes:
        """Rows `start` to `stop` of a tensor as they are stored: uint8 (rows, bytes of a row).

        Raises:
            ConversionError: the file cannot be read, or has become shorter.
        """
        row_bytes = tensor.n_columns * _ITEM_BYTES[tensor.dtype]
        data = np.empty((stop - start, row_bytes), np.uint8)
        view = data.reshape(-1).data
        offset = tensor.offset + start * row_bytes
        try:
            file = os.open(tensor.path, os.O_RDONLY)
            try:
                while view:
                    n_read = os.preadv(file, [view], offset)
                    if n_read == 0:
                        raise ConversionError(
                            f"cannot read {tensor.name}: the file ends at byte {offset}, {len(view)} bytes early "
                            f"({tensor.path}); it changed while it was read: download it again"
                        )
                    view = view[n_read:]
                    offset += n_read
            finally:
                os.close(file)
        except OSError as error:
            raise ConversionError(f"cannot read {tensor.name}: {error.strerror or error} ({tensor.path})") from error
        return data

    def read_rows(self, tensor: StoredTensor, start: int, stop: int) -> Floats:
        """Rows `start` to `stop` of a tensor as float32 (rows, columns); FP8 is multiplied with its blocks' scales.

        Raises:
            ConversionError: the tensor is not of numbers, a number is not finite, or reading fails.
        """
        raw = self.read_raw(tensor, start, stop)
        if tensor.dtype == "F32":
            values = raw.view(np.float32)
        elif tensor.dtype == "F16":
            values = raw.view(np.float16).astype(np.float32)
        elif tensor.dtype == "BF16":
            bits = raw.view(np.uint16).astype(np.uint32)
            bits <<= 16
            values = bits.view(np.float32)
        elif tensor.dtype == "F8_E4M3":
            values = _E4M3[raw]
            self._scale_blocks(tensor, values, start)
        else:
            raise ConversionError(
                f"cannot convert {tensor.name}: its type is {tensor.dtype}, expected one of "
                f"{', '.join(_FLOAT_DTYPES)} ({tensor.path}); use a checkpoint in BF16 or FP8"
            )
        if not np.isfinite(values.max()) or not np.isfinite(values.min()):  # a NaN makes both of them NaN
            row, column = (int(i[0]) for i in np.nonzero(~np.isfinite(values)))
            raise ConversionError(
                f"cannot convert {tensor.name}: {values[row, column]} at row {start + row}, column {column} "
                f"({tensor.path}); the weights are damaged: download them again"
            )
        return values

    def _scale_blocks(self, tensor: StoredTensor, values: Floats, start: int) -> None:
        """Multiply FP8 rows with the scale of their block, in place; without scales they stand as they are."""
        scales = self.tensors.get(tensor.name + SCALE_SUFFIX)
        if scales is None:
            return
        quantization = self.config.get("quantization_config") or {}
        block_rows, block_columns = quantization.get("weight_block_size") or (128, 128)
        expected = (-(-tensor.n_rows // block_rows), -(-tensor.n_columns // block_columns))
        if scales.dtype != "F32" or scales.shape != expected:
            raise ConversionError(
                f"cannot convert {tensor.name}: its scales are {scales.dtype} {list(scales.shape)}, expected F32 "
                f"{list(expected)} ({scales.name} in {scales.path}); download the checkpoint again"
            )
        first = start // block_rows
        last = (start + len(values) - 1) // block_rows
        table = self.read_rows(scales, first, last + 1)
        rows = (start + np.arange(len(values))) // block_rows - first
        for block in range(expected[1]):
            columns = slice(block * block_columns, (block + 1) * block_columns)
            values[:, columns] *= table[rows, block][:, None]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read config.json and the headers of all safetensors files, and check that they agree.

    Raises:
        ConversionError: something is missing, damaged, contradictory or of a kind that is not converted.
    """
    if not folder.is_dir():
        raise ConversionError(f"cannot read {folder}: no such folder; name the folder with config.json in it")
    config = read_json(folder / "config.json")
    if isinstance(config.get("text_config"), dict):
        config = {**config, **config["text_config"]}
    index_path = folder / INDEX_NAME
    if index_path.is_file():
        shards = _indexed_shards(index_path)
    else:
        shards = dict.fromkeys(sorted(folder.glob("*.safetensors")))
        if not shards:
            raise ConversionError(_no_weights(folder))
        if len(shards) > 1 and (folder / "model.safetensors").is_file():
            shards = {folder / "model.safetensors": None}
    tensors: dict[str, StoredTensor] = {}
    for path, expected in shards.items():
        found = _read_header(path)
        if expected is not None:
            _compare_with_index(path, set(found), expected)
        if twice := next((name for name in found if name in tensors), None):
            raise ConversionError(
                f"cannot read {folder}: {twice} is in {tensors[twice].path.name} and in {path.name}, expected once; "
                "remove the file that does not belong to the checkpoint"
            )
        tensors.update(found)
    inputs = [folder / "config.json", *([index_path] if index_path.is_file() else []), *shards]
    return Checkpoint(folder, config, tensors, tuple(inputs))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file.

    Raises:
        ConversionError: the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ConversionError(
            f"cannot read {path}: {error.strerror or error}; is {path.parent} a complete checkpoint?"
        ) from error
    except ValueError as error:
        raise ConversionError(f"cannot read {path}: it is not JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ConversionError(
            f"cannot read {path}: found a {type(value).__name__}, expected an object; download it again"
        )
    return value


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in _PICKLE_PATTERNS for path in folder.glob(pattern))
    if pickles:
        return (
            f"cannot convert {folder}: its weights are pickles ({pickles[0]}), which can run any code when they are "
            "read, expected safetensors; download the safetensors of the model, or save it with "
            "transformers' save_pretrained"
        )
    return f"cannot convert {folder}: found no *.safetensors; name the folder of a complete checkpoint"


def _indexed_shards(index_path: Path) -> dict[Path, set[str] | None]:
    """The shards that an index names, each with the tensors it must have."""
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"cannot read {index_path}: it has no weight_map; download it again")
    shards: dict[Path, set[str] | None] = {}
    for name, file_name in sorted(weight_map.items(), key=lambda item: str(item[1])):
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise ConversionError(f"cannot read {index_path}: {name} lies in {file_name!r}, expected a file name")
        names = shards.setdefault(index_path.parent / file_name, set())
        assert names is not None  # only unindexed shards have none
        names.add(name)
    if missing := [path.name for path in shards if not path.is_file()]:
        raise ConversionError(
            f"cannot convert {index_path.parent}: {len(missing)} of {len(shards)} shards are missing, the first is "
            f"{missing[0]} ({index_path.name}); download it"
        )
    return shards


def _compare_with_index(path: Path, found: set[str], expected: set[str]) -> None:
    if absent := sorted(expected - found):
        raise ConversionError(
            f"cannot convert {path.parent}: the index places {absent[0]} in {path.name}, which does not have it "
            f"({len(absent)} such tensors); index and files are of different checkpoints: download both again"
        )
    if extra := sorted(found - expected):
        raise ConversionError(
            f"cannot convert {path.parent}: {path.name} has {extra[0]}, which the index does not place there "
            f"({len(extra)} such tensors); index and files are of different checkpoints: download both again"
        )


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, each checked to lie inside of it and to be as long as its shape says."""
    try:
        with path.open("rb") as file:
            file_bytes = file.seek(0, 2)
            file.seek(0)
            length_bytes = file.read(8)
            if len(length_bytes) < 8:
                raise ConversionError(f"cannot read {path}: it has {file_bytes} bytes; download it again")
            n_header = struct.unpack("<Q", length_bytes)[0]
            if n_header > min(_MAX_HEADER_BYTES, file_bytes - 8):
                raise ConversionError(
                    f"cannot read {path}: its header would be {n_header} bytes long, the file has {file_bytes}; it is "
                    "truncated or no safetensors file: download it again"
                )
            header = json.loads(file.read(n_header))
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConversionError(f"cannot read {path}: its header is not JSON ({error}); download it again") from error
    if not isinstance(header, dict):
        raise ConversionError(f"cannot read {path}: its header is not a JSON object; download it again")
    header.pop("__metadata__", None)
    return {name: _stored_tensor(path, name, entry, 8 + n_header, file_bytes) for name, entry in header.items()}


def _stored_tensor(path: Path, name: str, entry: Any, data_offset: int, file_bytes: int) -> StoredTensor:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        sizes = [*shape, begin, end]
    except (KeyError, TypeError, ValueError) as error:
        raise ConversionError(f"cannot read {path}: the entry of {name} is damaged; download it again") from error
    if dtype not in _ITEM_BYTES:
        raise ConversionError(
            f"cannot read {path}: {name} has the type {dtype}, expected one of {', '.join(_ITEM_BYTES)}; use a "
            "checkpoint in BF16, F16, F32 or FP8"
        )
    if not all(isinstance(size, int) and size >= 0 for size in sizes) or 0 in shape:
        raise ConversionError(f"cannot read {path}: the shape of {name} is {list(shape)}; download it again")
    expected = int(np.prod(shape, dtype=np.int64)) * _ITEM_BYTES[dtype]
    if end - begin != expected or data_offset + end > file_bytes:
        raise ConversionError(
            f"cannot read {path}: {name} ends at byte {data_offset + end} and has {end - begin} bytes, expected "
            f"{expected} inside of {file_bytes}; the file is truncated: download it again"
        )
    return StoredTensor(name, dtype, shape, path, data_offset + begin, expected)


def _e4m3_table() -> Floats:
    """The 256 numbers of FP8 E4M3 (OCP 8-bit Floating Point Specification 1.0): bias 7, no infinities, one NaN."""
    codes = np.arange(256)
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent = (codes >> 3) & 0xF
    mantissa = codes & 0x7
    normal = (1 + mantissa / 8) * np.exp2(exponent - 7.0)
    values = sign * np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    values[(codes & 0x7F) == 0x7F] = np.nan
    return values.astype(np.float32)


_E4M3 = _e4m3_table()
