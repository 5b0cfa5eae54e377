# SPDX-License-Identifier: MIT
"""Sparse upcycling: a dense GGUF model becomes a Mixture-of-Experts one that computes the same function.

Every feed-forward block is copied into `n_experts` experts, byte for byte. The router of a layer is made of the
k-means centroids of that layer's feed-forward input on a calibration text, so which experts a token takes depends
on the text. All experts of a layer are equal and the weights of the chosen ones sum to 1, so the output is that of
the dense model up to rounding: the result adds no knowledge. It is there to show and to test expert streaming.

Rounding is not nothing: llama.cpp rounds activations to 8 bits before a quantized matrix, so a difference in the last
bit can flip a step and move logits by a few percent. Greedy text of a quantized model may then part from the dense
model's, as the dense model's own does when only the batch size changes. Between F32 models it stays equal.

Shapes: T calibration tokens, L layers, D hidden size, K experts. Expert e of a layer is the e-th of K equal parts of
`blk.<layer>.ffn_{gate,up,down}_exps.weight`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.resources
import os
import re
import secrets
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
import numpy.typing as npt

from edgemoe.errors import ConversionError
from edgemoe.sizes import format_size

from . import evaluate
from .gguf_writer import no_progress, sha256_of

Progress = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)`: `hash` and `write` in bytes, `calibrate` in tokens, `route` in layers."""

Floats = npt.NDArray[np.float32]

CONVERTER_VERSION = 1
"""Raised whenever the same inputs give another file."""

ALIGNMENT_BYTES = 4096
"""Where tensors start in the file: experts are read in pages of this size, past the page cache."""

MAX_EXPERTS = 256
MIN_TOKENS_PER_EXPERT = 8

_ARCHITECTURE = "llama"
_FFN_PARTS = ("ffn_gate", "ffn_up", "ffn_down")
_CHUNK_TOKENS = 256
_MAX_ACTIVATION_BYTES = 256 << 20
_COPY_BYTES = 16 << 20
_MAX_KMEANS_ROUNDS = 50


@dataclasses.dataclass(frozen=True)
class _Source:
    """A dense GGUF, checked to be one that can be upcycled."""

    path: Path
    reader: gguf.GGUFReader
    tensors: dict[str, gguf.ReaderTensor]
    name: str
    n_layers: int
    hidden_size: int

    def raw_metadata(self, key: str) -> bytes:
        """One key and its value as the bytes that stand in the file."""
        field = self.reader.fields[key]
        n_bytes = sum(int(part.nbytes) for part in field.parts)
        return bytes(self.reader.data[field.offset : field.offset + n_bytes])


@dataclasses.dataclass(frozen=True)
class _OutTensor:
    """A tensor to write: its bytes are those of `data`, `n_copies` times."""

    name: str
    dims: tuple[int, ...]
    ggml_type: int
    data: npt.NDArray[np.uint8]
    n_copies: int

    @property
    def n_bytes(self) -> int:
        return int(self.data.nbytes) * self.n_copies


def default_calibration_text() -> str:
    """The calibration text that comes with edgemoe: about 8 KB of varied prose, code and arithmetic."""
    return importlib.resources.files(__package__).joinpath("calibration.txt").read_text(encoding="utf-8")


def upcycle(
    source: Path,
    out: Path,
    *,
    n_experts: int = 8,
    n_experts_used: int = 2,
    calibration_text: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Write `out`, a Mixture-of-Experts GGUF with the function of the dense GGUF `source`.

    The file appears under its name only when it is complete and on the disk. The same arguments give the same bytes
    on one machine, whatever the number of threads (llama.cpp rounds activations differently on other processors).
    At most 256 MiB of activations are held, besides the source model as llama.cpp maps it.

    Args:
        source: a GGUF of architecture `llama` in one file, without experts.
        out: where to write; replaced if it exists.
        n_experts: experts of each layer, 2 to 256.
        n_experts_used: experts that each token takes, 1 to `n_experts`.
        calibration_text: text whose tokens place the routers; the one that comes with edgemoe if None.
        seed: seed of the k-means.
        progress: called with stage, done and total.

    Raises:
        ConversionError: an argument or the source does not fit, or the result cannot be written.
    """
    report = progress or no_progress
    if not 2 <= n_experts <= MAX_EXPERTS:
        raise ConversionError(f"cannot upcycle into {n_experts} experts: expected 2 to {MAX_EXPERTS} (n_experts)")
    if not 1 <= n_experts_used <= n_experts:
        raise ConversionError(
            f"cannot use {n_experts_used} experts per token: expected 1 to {n_experts} (n_experts_used)"
        )
    if not 0 <= seed < 1 << 32:
        raise ConversionError(f"cannot seed the k-means with {seed}: expected 0 to 2^32 - 1 (seed)")
    if os.path.exists(out) and os.path.exists(source) and os.path.samefile(out, source):
        raise ConversionError(f"cannot upcycle {source} onto itself; write to another file")
    text = default_calibration_text() if calibration_text is None else calibration_text

    dense = _read_source(source)
    routers = np.zeros((dense.n_layers, n_experts, dense.hidden_size), np.float32)
    tensors = _arrange_tensors(dense, routers)
    _check_free_space(out, _padded(int(dense.reader.data_offset)) + sum(_padded(tensor.n_bytes) for tensor in tensors))

    source_sha256 = sha256_of([source], report)
    row_bytes = dense.n_layers * dense.hidden_size * 4
    activations = capture_activations(
        source,
        "ffn_norm",
        text,
        n_layers=dense.n_layers,
        width=dense.hidden_size,
        max_tokens=max(_MAX_ACTIVATION_BYTES // row_bytes, 2 * MIN_TOKENS_PER_EXPERT * n_experts),
        progress=report,
    )
    n_tokens = activations.shape[1]
    if n_tokens < MIN_TOKENS_PER_EXPERT * n_experts:
        raise ConversionError(
            f"cannot place the routers of {n_experts} experts: the calibration text has {n_tokens} usable tokens, "
            f"expected at least {MIN_TOKENS_PER_EXPERT * n_experts}; pass a longer calibration text"
        )
    for layer in range(dense.n_layers):
        rng = np.random.default_rng([seed, layer])
        routers[layer] = fit_router(activations[layer], n_experts, rng)
        report("route", layer + 1, dense.n_layers)
    del activations

    metadata = _metadata(dense, n_experts, n_experts_used, source_sha256, text, seed)
    _write_gguf(out, metadata, tensors, report)


def fit_router(inputs: Floats, n_experts: int, rng: np.random.Generator) -> Floats:
    """Router rows [K, D] from one layer's feed-forward inputs [T, D].

    A router of llama.cpp's `llama` has no bias, so rows can only tell directions apart. The direction that all inputs
    share tells nothing; it is projected out, the rest is clustered by cosine (spherical k-means), and the centroids
    are scaled so that the first expert leads the second by 1.0 in logits on average. The centroids stay orthogonal
    to the shared direction, so the router's ranking of experts is that of the clustering.
    """
    mean = inputs.mean(axis=0, dtype=np.float64)
    shared = (mean / max(float(np.sqrt(np.sum(mean * mean))), 1e-12)).astype(np.float32)
    points = inputs - np.einsum("td,d->t", inputs, shared)[:, None] * shared
    centroids = _spherical_kmeans(_unit_rows(points), n_experts, rng)
    centroids = _unit_rows(centroids - np.einsum("kd,d->k", centroids, shared)[:, None] * shared)
    logits = np.sort(_dot_rows(inputs, centroids), axis=1)
    lead = float(np.mean(logits[:, -1] - logits[:, -2], dtype=np.float64))
    return centroids / np.float32(max(lead, 1e-6))


def _spherical_kmeans(points: Floats, n_clusters: int, rng: np.random.Generator) -> Floats:
    """Unit centroids [K, D] of unit rows [T, D]; seeded as k-means++, free of BLAS so that threads do not matter."""
    centroids = points[[int(rng.random() * len(points))]]
    while len(centroids) < n_clusters:
        distance = np.maximum(1.0 - _dot_rows(points, centroids).max(axis=1).astype(np.float64), 0.0)
        cumulative = np.cumsum(distance)
        pick = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
        centroids = np.concatenate([centroids, points[[min(pick, len(points) - 1)]]])
    previous = np.full(len(points), -1)
    for _ in range(_MAX_KMEANS_ROUNDS):
        similarity = _dot_rows(points, centroids)
        nearest = np.argmax(similarity, axis=1)
        if np.array_equal(nearest, previous):
            break
        previous = nearest
        for cluster in range(n_clusters):
            members = points[nearest == cluster]
            if len(members):
                centroids[cluster] = members.mean(axis=0, dtype=np.float64)
            else:  # an empty cluster restarts at the point that fits worst
                worst = int(np.argmin(similarity.max(axis=1)))
                centroids[cluster] = points[worst]
                similarity[worst] = 1.0
        centroids = _unit_rows(centroids)
    return centroids


def _dot_rows(left: Floats, right: Floats) -> Floats:
    """Dot products [T, K] of rows [T, D] and [K, D]."""
    products: Floats = np.einsum("td,kd->tk", left, right)
    return products


def _unit_rows(rows: Floats) -> Floats:
    """Rows scaled to length 1; rows of zeros stay zero."""
    length = np.sqrt(np.einsum("td,td->t", rows, rows))[:, None]
    scaled: Floats = rows / np.maximum(length, np.float32(1e-12))
    return scaled


def capture_activations(
    model: Path,
    tensor_name: str,
    text: str,
    *,
    n_layers: int,
    width: int,
    max_tokens: int,
    progress: Progress | None = None,
) -> Floats:
    """Run `model` over `text` with llama.cpp and return its tensors `<tensor_name>-<layer>` [L, T, width].

    The text is cut into chunks of 256 tokens, each evaluated from an empty context. The first token of a chunk is
    left out: whatever it is, models treat it alike. Evaluation stops after the tensor of the last layer.

    Args:
        model: a GGUF that llama.cpp can load; it runs on the CPU.
        tensor_name: a tensor of type F32 and shape [width, tokens] in llama.cpp's graph, such as `ffn_norm`.
        text: what to evaluate, at most `max_tokens` tokens of it.
        n_layers, width: the layers of the model, and the floats of the tensor for one token.
        max_tokens: upper bound of T.
        progress: called with stage `calibrate`, tokens done and tokens in total.

    Raises:
        ConversionError: llama.cpp cannot load or run the model.
    """
    report = progress or no_progress
    layer_of = {f"{tensor_name}-{layer}".encode(): layer for layer in range(n_layers)}
    chunk = np.zeros((n_layers, _CHUNK_TOKENS, width), np.float32)
    seen: dict[int, int] = {}

    def on_tensor(tensor: int, ask: bool, _user_data: int | None) -> bool:
        layer = layer_of.get(evaluate.tensor_name(tensor))
        if ask or layer is None:
            return layer is not None
        n_bytes = int(evaluate.tensor_n_bytes(tensor))
        seen[layer] = n_bytes
        if n_bytes <= chunk[layer].nbytes:
            evaluate.tensor_get(tensor, chunk[layer].ctypes.data, 0, n_bytes)
        return layer != n_layers - 1

    with evaluate.llama_context(model, on_tensor, _CHUNK_TOKENS) as (llama, context):
        pieces = evaluate.chunks_of_tokens(llama, text, _CHUNK_TOKENS, max_tokens)
        n_total = sum(n_kept for _, n_kept in pieces)
        rows = np.empty((n_layers, n_total, width), np.float32)
        n_done = 0
        for tokens, n_kept in pieces:
            seen.clear()
            evaluate.decode(model, context, tokens)
            if seen != dict.fromkeys(range(n_layers), len(tokens) * width * 4):
                raise ConversionError(
                    f"cannot observe {tensor_name} of {model}: found {len(seen)} tensors of "
                    f"{sorted(set(seen.values()))} bytes, expected {n_layers} of {len(tokens) * width * 4} "
                    "(llama.cpp's graph); is the file damaged?"
                )
            rows[:, n_done : n_done + n_kept] = chunk[:, len(tokens) - n_kept : len(tokens)]
            n_done += n_kept
            report("calibrate", n_done, n_total)
    return rows


def _read_source(path: Path) -> _Source:
    """Open a GGUF and check that it is a dense model of a supported kind."""
    try:
        reader = gguf.GGUFReader(path)
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise ConversionError(
            f"cannot read {path}: it is not a complete GGUF file ({error}); check its size against where it came from"
        ) from error
    if reader.endianess != gguf.GGUFEndian.LITTLE:
        raise ConversionError(f"cannot upcycle {path}: it is big-endian, expected a little-endian GGUF")
    architecture = _contents(reader, "general.architecture")
    if architecture != _ARCHITECTURE:
        raise ConversionError(
            f"cannot upcycle {path}: found architecture {architecture}, expected {_ARCHITECTURE} "
            "(general.architecture); use a dense model of that architecture"
        )
    if n_experts := _contents(reader, "llama.expert_count"):
        raise ConversionError(
            f"cannot upcycle {path}: it already has {n_experts} experts, expected a dense model (llama.expert_count)"
        )
    if (n_files := _contents(reader, "split.count")) and int(str(n_files)) > 1:
        raise ConversionError(f"cannot upcycle {path}: it is one of {n_files} parts; merge them with llama-gguf-split")
    try:
        n_layers, hidden_size = (
            int(str(_contents(reader, f"llama.{key}"))) for key in ("block_count", "embedding_length")
        )
    except ValueError as error:
        raise ConversionError(
            f"cannot upcycle {path}: llama.block_count or llama.embedding_length is missing or not a number"
        ) from error
    source = _Source(
        path=path,
        reader=reader,
        tensors={tensor.name: tensor for tensor in reader.tensors},
        name=str(_contents(reader, "general.name") or path.stem),
        n_layers=n_layers,
        hidden_size=hidden_size,
    )
    _check_ffn_tensors(source)
    return source


def _check_ffn_tensors(source: _Source) -> None:
    """Refuse models whose feed-forward blocks are more or less than three matrices and a norm."""
    expected = {f"blk.{layer}.{part}.weight" for layer in range(source.n_layers) for part in ("ffn_norm", *_FFN_PARTS)}
    found = {name for name in source.tensors if re.match(r"blk\.\d+\.ffn_", name)}
    if missing := sorted(expected - found):
        raise ConversionError(f"cannot upcycle {source.path}: tensor {missing[0]} is missing; expected a dense model")
    if extra := sorted(found - expected):
        raise ConversionError(
            f"cannot upcycle {source.path}: found tensor {extra[0]}, which has no counterpart in a model with experts; "
            "expected only norm, gate, up and down weights in feed-forward blocks"
        )


def _contents(reader: gguf.GGUFReader, key: str) -> object:
    """The value of a metadata key; None without it."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _arrange_tensors(source: _Source, routers: Floats) -> list[_OutTensor]:
    """The tensors of the result in file order: first what every token needs, then the experts, layer by layer."""
    experts = {f"blk.{layer}.{part}.weight" for layer in range(source.n_layers) for part in _FFN_PARTS}
    n_experts = routers.shape[1]
    tensors = [_out_tensor(tensor, tensor.name, 1) for name, tensor in source.tensors.items() if name not in experts]
    for layer in range(source.n_layers):
        tensors.append(
            _OutTensor(
                name=f"blk.{layer}.ffn_gate_inp.weight",
                dims=(source.hidden_size, n_experts),
                ggml_type=int(gguf.GGMLQuantizationType.F32),
                data=routers[layer].reshape(-1).view(np.uint8),
                n_copies=1,
            )
        )
    for layer in range(source.n_layers):
        for part in _FFN_PARTS:
            tensor = source.tensors[f"blk.{layer}.{part}.weight"]
            tensors.append(_out_tensor(tensor, f"blk.{layer}.{part}_exps.weight", n_experts))
    return tensors


def _out_tensor(tensor: gguf.ReaderTensor, name: str, n_copies: int) -> _OutTensor:
    dims = tuple(int(size) for size in tensor.shape)
    return _OutTensor(
        name=name,
        dims=dims if n_copies == 1 else (*dims, n_copies),
        ggml_type=int(tensor.tensor_type),
        data=tensor.data.reshape(-1).view(np.uint8),
        n_copies=n_copies,
    )


def _metadata(
    source: _Source, n_experts: int, n_experts_used: int, source_sha256: str, text: str, seed: int
) -> list[bytes]:
    """The metadata of the result: the source's own, with what upcycling changes put in place of it."""
    changed: dict[str, int | str] = {
        "general.name": f"{source.name} (upcycled, {n_experts} experts, {n_experts_used} used)",
        "general.description": (
            f"Sparse upcycling of {source.name}: every feed-forward block is copied {n_experts} times. The experts of "
            "a layer are equal copies and add no knowledge; the output is that of the dense model up to rounding. "
            "Made by edgemoe to show and test the streaming of experts."
        ),
        "general.alignment": ALIGNMENT_BYTES,
        "llama.expert_count": n_experts,
        "llama.expert_used_count": n_experts_used,
        "edgemoe.upcycle.version": CONVERTER_VERSION,
        "edgemoe.upcycle.n_experts": n_experts,
        "edgemoe.upcycle.seed": seed,
        "edgemoe.upcycle.source_sha256": source_sha256,
        "edgemoe.upcycle.calibration_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    kept = [key for key in source.reader.fields if not key.startswith("GGUF.") and key not in changed]
    return [source.raw_metadata(key) for key in kept] + [_pack_metadata(key, value) for key, value in changed.items()]


def _pack_metadata(key: str, value: int | str) -> bytes:
    """A metadata entry as GGUF bytes: integers as UINT32, texts as STRING."""
    if isinstance(value, int):
        return _pack_string(key) + struct.pack("<II", gguf.GGUFValueType.UINT32, value)
    return _pack_string(key) + struct.pack("<I", gguf.GGUFValueType.STRING) + _pack_string(value)


def _pack_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _padded(n_bytes: int) -> int:
    """`n_bytes` rounded up to the alignment."""
    return -(-n_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _check_free_space(out: Path, n_bytes: int) -> None:
    """Refuse to start a file that the file system has no room for."""
    try:
        free_bytes = shutil.disk_usage(out.parent).free
    except OSError as error:
        raise ConversionError(
            f"cannot write {out}: {error.strerror} ({out.parent}); name an existing folder that you may write to"
        ) from error
    if free_bytes < n_bytes:
        raise ConversionError(
            f"cannot write {out}: {format_size(free_bytes)} ({free_bytes} bytes) are free in {out.parent}, expected "
            f"{format_size(n_bytes)} ({n_bytes} bytes); free some space or name another folder"
        )


def _write_gguf(out: Path, metadata: list[bytes], tensors: list[_OutTensor], report: Progress) -> None:
    """Write a GGUF version 3, under a temporary name until it is complete and on the disk."""
    header = [struct.pack("<IIQQ", gguf.GGUF_MAGIC, 3, len(tensors), len(metadata)), *metadata]
    offset = 0
    for tensor in tensors:
        header.append(_pack_string(tensor.name) + struct.pack("<I", len(tensor.dims)))
        header.append(struct.pack(f"<{len(tensor.dims)}QIQ", *tensor.dims, tensor.ggml_type, offset))
        offset += _padded(tensor.n_bytes)
    head = np.frombuffer(b"".join(header), np.uint8)
    n_total = _padded(head.nbytes) + offset
    n_done = 0
    partial = out.with_name(f".{out.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as file:
            for data, n_copies in [(head, 1), *((tensor.data, tensor.n_copies) for tensor in tensors)]:
                n_done += _write_padded(file, data, n_copies)
                report("write", n_done, n_total)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, out)
    except OSError as error:
        raise ConversionError(
            f"cannot write {out}: {error.strerror or error} after {n_done} of {n_total} bytes ({partial.parent}); "
            "free some space or name another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # after the rename there is nothing to remove
            partial.unlink()


def _write_padded(file: BinaryIO, data: npt.NDArray[np.uint8], n_copies: int) -> int:
    """Write `data` `n_copies` times and zeros up to the alignment; returns the bytes written."""
    for _ in range(n_copies):
        for start in range(0, data.nbytes, _COPY_BYTES):
            file.write(data[start : start + _COPY_BYTES].data)
    n_bytes = data.nbytes * n_copies
    file.write(bytes(_padded(n_bytes) - n_bytes))
    return _padded(n_bytes)
