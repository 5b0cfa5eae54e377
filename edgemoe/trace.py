# SPDX-License-Identifier: MIT
"""Which experts a model chose, token by token and layer by layer, and what it waited for.

A trace is a file in the format of docs/trace-format.md, which the native core writes while a model runs
(`Llama.record_trace`) and `save` writes for a trace that was made otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edgemoe.atomic import replacing
from edgemoe.errors import TraceError

_MAGIC = b"EMTRACE\0"
_VERSION = 2
_VERSIONS = (1, 2)  # 1: without what was foreseen
_START = struct.Struct("<8sI")  # magic, version
_BLOCK = struct.Struct("<4sII")  # tag, bytes that follow, CRC-32 of tag, bytes and what follows
_BLOCK_CHECKED_BYTES = 8
_RECORD = struct.Struct("<IIIHHHHfqd")  # as TraceRecord in kernels/core/trace.h
_DONE = struct.Struct("<Q")
_HAS_WEIGHTS, _HAS_RESIDENT, _HAS_FORESEEN = 1, 2, 4
N_DISTANCES = 2
"""From so many layers ahead experts are foreseen at most."""
_NO_EXPERT = 0xFFFF
_BLOCK_BYTES = 256 << 10
_MAX_EXPERTS = 32767
_MAX_LAYER = 0xFFFF


@dataclasses.dataclass(frozen=True)
class TraceLayer:
    """One layer with routed experts.

    Attributes:
        layer: its number in the model.
        n_experts, n_used: experts in it, and how many a token selects.
        slice_bytes: bytes that reading one expert's projections takes (whole pages), in the order of use (gate, up,
            down; merged: gate_up, down).
    """

    layer: int
    n_experts: int
    n_used: int
    slice_bytes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TracedRun:
    """With what a trace was recorded.

    Attributes:
        slots_bytes: memory for experts when the recording began.
        eviction, prefetch: the options of those names.
        n_readers: reads under way at once, at most.
    """

    slots_bytes: int
    eviction: str
    prefetch: str
    n_readers: int


@dataclasses.dataclass(frozen=True)
class Trace:
    """A recorded or generated run. A batch is what was evaluated together: a prompt's micro-batch, or one token.

    Attributes:
        model: name of the model's file.
        layers: the layers with routed experts, in order; their number is L, the most experts used is K.
        batch_of_token: int32 [n_tokens], ascending from 0; its last value is n_batches - 1.
        experts: int16 [n_tokens, L, K], the selected experts in the router's order; -1 where a layer uses fewer.
        weights: float32 [n_tokens, L, K], their mixing weights; NaN where they are not known.
        begin_us: float64 [n_batches, L], when the layer began, since the start of the trace; NaN in generated traces.
        wait_us: float32 [n_batches, L], for how long the layer waited for storage; NaN likewise.
        read_bytes: int64 [n_batches, L], bytes read from storage while it was in progress, and before it since the
            end of the layer before; -1 likewise.
        resident: bool [n_batches, L, most experts], experts wholly resident when the layer began; None likewise.
        foreseen: int16 [n_batches, L, N_DISTANCES, most foreseen], experts that were foreseen of the layer from one and
            from two layers ahead, the likeliest first; -1 behind them, and first where nobody looked. None: nowhere.
        run: with what it was recorded; None in generated traces, and in those of older versions.
    """

    model: str
    layers: tuple[TraceLayer, ...]
    batch_of_token: npt.NDArray[np.int32]
    experts: npt.NDArray[np.int16]
    weights: npt.NDArray[np.float32]
    begin_us: npt.NDArray[np.float64]
    wait_us: npt.NDArray[np.float32]
    read_bytes: npt.NDArray[np.int64]
    resident: npt.NDArray[np.bool_] | None
    foreseen: npt.NDArray[np.int16] | None = None
    run: TracedRun | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens in the trace."""
        return len(self.batch_of_token)

    @property
    def n_batches(self) -> int:
        """Batches in the trace."""
        return len(self.begin_us)


def header_json(
    model: str, layers: Sequence[TraceLayer], model_bytes: int | None = None, run: TracedRun | None = None
) -> str:
    """The text of a trace file's first block.

    Args:
        model_bytes: size of the model's files, where there are any.
        run: with what the trace is recorded, if it is.
    """
    fields: dict[str, Any] = {"model": model}
    if model_bytes is not None:
        fields["model_bytes"] = model_bytes
    if run is not None:
        fields["run"] = dataclasses.asdict(run)
    fields["layers"] = [dataclasses.asdict(layer) for layer in layers]
    return json.dumps(fields)


def save(trace: Trace, path: str | Path) -> None:
    """Write a trace; the file appears whole or not at all. `load` gives back what was saved.

    Raises:
        TraceError: the file cannot be written, or the trace is none that `load` could give.
    """
    path = Path(path)
    _check(trace)
    try:
        with replacing(path) as file:
            _write(trace, file)
    except OSError as error:
        raise TraceError(
            f"cannot write the trace: {error.strerror or error} ({path}); free space there or name another folder"
        ) from error


def _check(trace: Trace) -> None:
    """Refuse what the format cannot hold."""

    def expect(is_so: bool, found: str) -> None:
        if not is_so:
            raise TraceError(f"cannot write the trace of {trace.model}: {found}")

    n_tokens, n_layers = trace.n_tokens, len(trace.layers)
    n_used = max((layer.n_used for layer in trace.layers), default=0)
    n_experts = max((layer.n_experts for layer in trace.layers), default=0)
    numbers = [layer.layer for layer in trace.layers]
    expect(n_layers > 0, "it has no layers")
    is_in_order = numbers == sorted(set(numbers)) and numbers[0] >= 0 and numbers[-1] <= _MAX_LAYER
    expect(is_in_order, f"its layers are {numbers}, expected some of 0..{_MAX_LAYER} in order")
    expect(n_experts <= _MAX_EXPERTS, f"{n_experts} experts, expected at most {_MAX_EXPERTS}")
    n_batches = trace.n_batches
    steps = np.diff(trace.batch_of_token, prepend=-1, append=n_batches)
    expect(bool(((steps == 0) | (steps == 1)).all()), "its batches do not count up from 0")
    for name, array, shape in (
        ("experts", trace.experts, (n_tokens, n_layers, n_used)),
        ("weights", trace.weights, (n_tokens, n_layers, n_used)),
        ("begin_us", trace.begin_us, (n_batches, n_layers)),
        ("wait_us", trace.wait_us, (n_batches, n_layers)),
        ("read_bytes", trace.read_bytes, (n_batches, n_layers)),
        ("resident", trace.resident, (n_batches, n_layers, n_experts)),
    ):
        if array is not None:
            expect(array.shape == shape, f"{name} is {array.shape}, expected {shape}")
    if trace.foreseen is not None:
        found = trace.foreseen.shape
        expect(
            len(found) == 4 and found[:3] == (n_batches, n_layers, N_DISTANCES) and found[3] <= _MAX_EXPERTS,
            f"foreseen is {found}, expected {(n_batches, n_layers, N_DISTANCES)} and as many experts as were foreseen",
        )
    for i, layer in enumerate(trace.layers):
        chosen = trace.experts[:, i]
        expect(
            not chosen.size or (chosen.min() >= -1 and chosen.max() < layer.n_experts),
            f"layer {layer.layer} chooses expert {chosen.max(initial=-1)} of {layer.n_experts}",
        )
        expect(
            bool((chosen[:, layer.n_used :] == -1).all() and np.isnan(trace.weights[:, i, layer.n_used :]).all()),
            f"layer {layer.layer} chooses more than {layer.n_used} experts",
        )


def _write(trace: Trace, file: BinaryIO) -> None:
    file.write(_START.pack(_MAGIC, _VERSION))
    _write_block(file, b"HEAD", header_json(trace.model, trace.layers, run=trace.run).encode())
    block = bytearray()
    for record in _records(trace):
        if len(block) + len(record) > _BLOCK_BYTES and block:
            _write_block(file, b"RECS", block)
            block.clear()
        block += record
    if block:
        _write_block(file, b"RECS", block)
    _write_block(file, b"DONE", _DONE.pack(trace.n_batches * len(trace.layers)))


def _write_block(file: BinaryIO, tag: bytes, payload: bytes | bytearray) -> None:
    checked = _BLOCK.pack(tag, len(payload), 0)[:_BLOCK_CHECKED_BYTES]
    file.write(_BLOCK.pack(tag, len(payload), zlib.crc32(payload, zlib.crc32(checked))) + payload)


def _records(trace: Trace) -> Iterator[bytes]:
    """The records of a checked trace, batch by batch and layer by layer."""
    starts = np.searchsorted(trace.batch_of_token, np.arange(trace.n_batches + 1))
    ids = np.where(trace.experts < 0, _NO_EXPERT, trace.experts).astype("<u2")
    is_weighed = ~np.isnan(trace.weights)
    for batch in range(trace.n_batches):
        tokens = slice(int(starts[batch]), int(starts[batch + 1]))
        for i, layer in enumerate(trace.layers):
            body = ids[tokens, i, : layer.n_used].tobytes()
            flags = 0
            if trace.resident is not None:
                flags |= _HAS_RESIDENT
                body += np.packbits(trace.resident[batch, i, : layer.n_experts], bitorder="little").tobytes()
            if trace.foreseen is not None and (trace.foreseen[batch, i] >= 0).any():
                flags |= _HAS_FORESEEN
                for row in trace.foreseen[batch, i]:
                    seen = row[row >= 0].astype("<u2")
                    body += struct.pack("<H", len(seen)) + seen.tobytes()
            if is_weighed[tokens, i].any():
                flags |= _HAS_WEIGHTS
                body += trace.weights[tokens, i, : layer.n_used].astype("<f4").tobytes()
            yield (
                _RECORD.pack(
                    _RECORD.size + len(body),
                    batch,
                    tokens.stop - tokens.start,
                    layer.layer,
                    layer.n_used,
                    layer.n_experts,
                    flags,
                    trace.wait_us[batch, i],
                    trace.read_bytes[batch, i],
                    trace.begin_us[batch, i],
                )
                + body
            )


@dataclasses.dataclass(frozen=True)
class _Record:
    """One layer of one batch, as it was read."""

    batch: int
    layer: int
    begin_us: float
    wait_us: float
    read_bytes: int
    ids: npt.NDArray[np.uint16]
    resident: npt.NDArray[np.bool_] | None
    foreseen: tuple[npt.NDArray[np.uint16], ...]
    weights: npt.NDArray[np.float32] | None


class _Reader:
    """The blocks and records of a file that is in memory whole."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path = path
        self._data = data

    def fail(self, found: str, offset: int) -> TraceError:
        return TraceError(f"cannot read the trace: {found} ({self._path}, offset {offset}); record it again")

    def _truncated(self, n_bytes: int, offset: int) -> TraceError:
        return self.fail(f"truncated: {len(self._data)} bytes, expected at least {offset + n_bytes}", offset)

    def blocks(self) -> Iterator[tuple[bytes, int, int]]:
        """(tag, first byte, end) of each block; the first is HEAD, the last DONE."""
        data = self._data
        if data[: len(_MAGIC)] != _MAGIC[: len(data)] or not data:
            raise self.fail(f"no trace: found {data[: len(_MAGIC)]!r}, expected {_MAGIC!r}", 0)
        if len(data) < _START.size:
            raise self._truncated(_START.size, 0)
        version = _START.unpack_from(data)[1]
        if version not in _VERSIONS:
            raise self.fail(f"format version {version}, expected {_VERSIONS[0]} to {_VERSION}", len(_MAGIC))
        offset, tag = _START.size, b""
        while tag != b"DONE":
            if len(data) - offset < _BLOCK.size:
                raise self._truncated(_BLOCK.size, offset)
            tag, n_bytes, crc = _BLOCK.unpack_from(data, offset)
            if tag not in ((b"RECS", b"DONE") if offset > _START.size else (b"HEAD",)):
                raise self.fail(f"corrupt: a block {tag!r}", offset)
            begin = offset + _BLOCK.size
            if len(data) - begin < n_bytes:
                raise self._truncated(n_bytes, begin)
            end = begin + n_bytes
            checked = zlib.crc32(memoryview(data)[begin:end], zlib.crc32(data[offset : offset + _BLOCK_CHECKED_BYTES]))
            if checked != crc:
                raise self.fail(f"corrupt: checksum {checked:08x} of {n_bytes} bytes, expected {crc:08x}", offset)
            yield tag, begin, end
            offset = end
        if offset != len(data):
            raise self.fail(f"corrupt: {len(data) - offset} bytes behind the end", offset)

    def header(self, begin: int, end: int) -> tuple[str, tuple[TraceLayer, ...], TracedRun | None]:
        """The model's name and layers, and with what it was run."""
        try:
            fields = json.loads(self._data[begin:end])
            layers = tuple(
                TraceLayer(
                    layer=int(layer["layer"]),
                    n_experts=int(layer["n_experts"]),
                    n_used=int(layer["n_used"]),
                    slice_bytes=tuple(int(n_bytes) for n_bytes in layer["slice_bytes"]),
                )
                for layer in fields["layers"]
            )
            model = str(fields["model"])
            run = None
            if "run" in fields:
                run = TracedRun(
                    slots_bytes=int(fields["run"]["slots_bytes"]),
                    eviction=str(fields["run"]["eviction"]),
                    prefetch=str(fields["run"]["prefetch"]),
                    n_readers=int(fields["run"]["n_readers"]),
                )
        except (ValueError, KeyError, TypeError) as error:
            raise self.fail(f"corrupt: the header is not what it should be: {error!r}", begin) from error
        numbers = [layer.layer for layer in layers]
        if numbers != sorted(set(numbers)) or any(not 0 < layer.n_experts <= _MAX_EXPERTS for layer in layers):
            raise self.fail(f"corrupt: layers {numbers}, expected some in order, of 1..{_MAX_EXPERTS} experts", begin)
        return model, layers, run

    def records(self, begin: int, end: int, n_experts_of: dict[int, int]) -> Iterator[_Record]:
        """The records of a block."""
        data, offset = self._data, begin
        while offset < end:
            if end - offset < _RECORD.size:
                raise self.fail(f"corrupt: {end - offset} bytes of a record, expected {_RECORD.size}", offset)
            n_bytes, batch, n_tokens, layer, n_used, n_experts, flags, wait_us, read_bytes, begin_us = (
                _RECORD.unpack_from(data, offset)
            )
            n_ids, n_resident_bytes = n_tokens * n_used, -(-n_experts // 8)
            has_weights, has_resident = bool(flags & _HAS_WEIGHTS), bool(flags & _HAS_RESIDENT)
            expected = _RECORD.size + n_ids * (2 + 4 * has_weights) + n_resident_bytes * has_resident
            foreseen: list[npt.NDArray[np.uint16]] = []
            foreseen_at = offset + _RECORD.size + 2 * n_ids + n_resident_bytes * has_resident
            for _ in range(N_DISTANCES if flags & _HAS_FORESEEN else 0):
                n_foreseen = struct.unpack_from("<H", data, foreseen_at)[0] if foreseen_at + 2 <= end else 0
                if foreseen_at + 2 * (1 + n_foreseen) > end:
                    raise self.fail(f"corrupt: {n_foreseen} experts foreseen", foreseen_at)
                foreseen.append(np.frombuffer(data, "<u2", n_foreseen, foreseen_at + 2))
                if (foreseen[-1] >= n_experts).any():
                    raise self.fail(f"corrupt: expert {foreseen[-1].max()} of {n_experts} foreseen", foreseen_at)
                foreseen_at += 2 * (1 + n_foreseen)
                expected += 2 * (1 + n_foreseen)
            if n_bytes != expected or n_bytes > end - offset or n_tokens == 0 or n_experts_of.get(layer) != n_experts:
                raise self.fail(
                    f"corrupt: a record of {n_bytes} bytes, layer {layer} of {n_experts} experts, {n_tokens} tokens",
                    offset,
                )
            at = offset + _RECORD.size
            ids = np.frombuffer(data, "<u2", n_ids, at).reshape(n_tokens, n_used)
            is_known = (ids < n_experts) | (ids == _NO_EXPERT)
            if not is_known.all():
                raise self.fail(f"corrupt: expert {ids[~is_known][0]} of {n_experts}", at)
            at += ids.nbytes
            resident = weights = None
            if has_resident:
                bits = np.frombuffer(data, np.uint8, n_resident_bytes, at)
                resident = np.unpackbits(bits, count=n_experts, bitorder="little").astype(bool)
            if has_weights:
                weights = np.frombuffer(data, "<f4", n_ids, foreseen_at).reshape(n_tokens, n_used)
            yield _Record(batch, layer, begin_us, wait_us, read_bytes, ids, resident, tuple(foreseen), weights)
            offset += n_bytes


def load(path: str | Path) -> Trace:
    """Read a trace.

    A batch whose record of a layer is missing (llama.cpp computes the last layer only for tokens whose logits are
    wanted) has -1, NaN and no resident experts there; one with fewer tokens than the batch holds its last ones.

    Raises:
        TraceError: the file cannot be read, is no trace, truncated, or corrupt; the message names the offset.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TraceError(f"cannot read the trace: {error.strerror or error} ({path}); check the path") from error
    reader = _Reader(path, data)
    records: list[_Record] = []
    model, layers, run = "", tuple[TraceLayer, ...](), None
    for tag, begin, end in reader.blocks():
        if tag == b"HEAD":
            model, layers, run = reader.header(begin, end)
        elif tag == b"RECS":
            records += reader.records(begin, end, {layer.layer: layer.n_experts for layer in layers})
        elif end - begin != _DONE.size or _DONE.unpack_from(data, begin)[0] != len(records):
            raise reader.fail(f"corrupt: {len(records)} records, the end says otherwise", begin)
    return _assemble(model, layers, run, records)


def _assemble(model: str, layers: Sequence[TraceLayer], run: TracedRun | None, records: Sequence[_Record]) -> Trace:
    n_used_of: dict[int, int] = {}
    tokens_of: dict[int, int] = {}
    for record in records:
        n_tokens, n_used = record.ids.shape
        n_used_of[record.layer] = max(n_used, n_used_of.get(record.layer, 0))
        tokens_of[record.batch] = max(n_tokens, tokens_of.get(record.batch, 0))
    # How many experts a token uses can be overridden when a model is loaded: what was seen counts.
    layers = tuple(dataclasses.replace(layer, n_used=n_used_of.get(layer.layer, layer.n_used)) for layer in layers)
    index_of_layer = {layer.layer: i for i, layer in enumerate(layers)}
    batches = sorted(tokens_of)
    index_of_batch = {batch: i for i, batch in enumerate(batches)}
    ends = np.cumsum([tokens_of[batch] for batch in batches], dtype=np.int64)
    n_tokens = int(ends[-1]) if batches else 0
    shape = (len(batches), len(layers))
    n_used = _largest(layer.n_used for layer in layers)
    experts = np.full((n_tokens, len(layers), n_used), -1, np.int16)
    weights = np.full(experts.shape, np.nan, np.float32)
    begin_us = np.full(shape, np.nan)
    wait_us = np.full(shape, np.nan, np.float32)
    read_bytes = np.full(shape, -1, np.int64)
    resident = None
    if any(record.resident is not None for record in records):
        resident = np.zeros((*shape, _largest(layer.n_experts for layer in layers)), np.bool_)
    foreseen = None
    n_foreseen = _largest(len(seen) for record in records for seen in record.foreseen)
    if n_foreseen:
        foreseen = np.full((*shape, N_DISTANCES, n_foreseen), -1, np.int16)
    for record in records:
        b, i = index_of_batch[record.batch], index_of_layer[record.layer]
        end = int(ends[b])
        tokens = slice(end - len(record.ids), end)
        n_used = record.ids.shape[1]
        experts[tokens, i, :n_used] = record.ids.astype(np.int16)  # 0xFFFF becomes -1
        if record.weights is not None:
            weights[tokens, i, :n_used] = record.weights
        begin_us[b, i], wait_us[b, i], read_bytes[b, i] = record.begin_us, record.wait_us, record.read_bytes
        if resident is not None and record.resident is not None:
            resident[b, i, : len(record.resident)] = record.resident
        for distance, seen in enumerate(record.foreseen):
            foreseen[b, i, distance, : len(seen)] = seen  # type: ignore[index]
    batch_of_token = np.repeat(np.arange(len(batches), dtype=np.int32), [tokens_of[batch] for batch in batches])
    return Trace(
        model, layers, batch_of_token, experts, weights, begin_us, wait_us, read_bytes, resident, foreseen, run
    )


def _largest(values: Iterable[int]) -> int:
    return max(values, default=0)
