# SPDX-License-Identifier: MIT
"""What survives a restart: the experts that were hot when a model was closed, and what the tokens were like.

One small file per model keeps up to `MAX_SETS` *hot sets*. Each holds the experts that were resident, hottest first,
and the *signature* of the session that made them hot: how often each expert of each layer was selected (signatures of
one task are nearer to each other than to another's: arXiv 2603.11114). When the model is loaded again, the latest hot
set is read into free slots while storage is idle; when enough tokens of the prompt have been routed, what is left is
read from the set with the nearest signature. Neither evicts anything nor changes a bit of the output.

The file is a hint. What is wrong with it is said once, and then it counts as missing. It holds no text, but a signature
tells what kind of text was read, so only its owner may read it. Its size is 1 byte for each expert of the model and 2
for each hot one, per hot set: with all experts hot, 24 KiB for OLMoE (16 layers of 64 experts) and 144 KiB for
Qwen3-30B-A3B (48 of 128); 72 KiB for that with a quarter of them.

Layout, little-endian: magic, version, key, n_layers, n_experts, n_sets; for each set, the latest first, the number of
its experts, the signature as uint8 [n_layers, n_experts], the experts as layer * n_experts + expert (uint16, or uint32
where that is too small); CRC-32 of all before it.
"""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import logging
import os
import re
import stat
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgemoe import _native
from edgemoe.atomic import remove_stale, replacing
from edgemoe.demo import default_cache_dir

if TYPE_CHECKING:
    from edgemoe.formats.gguf import GgufModel

MAX_SETS = 8
SIGNATURE_TOKENS = 32
"""Tokens without which a signature says too little (arXiv 2603.11114 uses a prompt and 32 tokens)."""

# The demo model, 12 texts of 30 to 80 tokens, three each of code, prose, arithmetic and German, with 64 generated after
# each: signatures of one kind are 0.81 to 0.99 similar, of two kinds -0.66 to 0.85 (code and arithmetic), on average
# -0.15. A prompt's nearest other session is of its kind for 10 of the 12; for the other two another is by 0.06 nearer.
_SAME_TASK = 0.8
_MARGIN = 0.1
_MAGIC = b"EDGEWARM"
_VERSION = 1
_HEADER = struct.Struct("<8sI32sHHH")
_COUNT = struct.Struct("<I")
# Eight sets of a model of 2^18 experts, ten times the largest there is (Kimi K2: 61 layers of 384).
_MAX_FILE_BYTES = 1 << 24
_KEY_SAMPLE_BYTES = 4096
_ROUTER = re.compile(r"blk\.\d+\.ffn_gate_inp\.weight")
_STALE_AFTER_S = 3600.0
_log = logging.getLogger("edgemoe")

Counts = npt.NDArray[np.uint64]
"""[n_layers, n_experts]: how many tokens selected each expert."""


class UnusableError(Exception):
    """A file that remembers something about a model cannot be used; the message says why."""


@dataclasses.dataclass(frozen=True, eq=False)
class HotSet:
    """What a session left behind.

    Attributes:
        signature: uint8 [n_layers, n_experts], selections of each expert; 255 is the layer's most selected.
        experts: uint32 [n], layer * n_experts + expert of the hot ones, the hottest first.
    """

    signature: npt.NDArray[np.uint8]
    experts: npt.NDArray[np.uint32]


def default_dir() -> Path:
    """Where the files are: `$EDGEMOE_WARM_DIR`, else `warm` in the user's cache folder (see `edgemoe.demo`)."""
    if own := os.environ.get("EDGEMOE_WARM_DIR"):
        return Path(own).expanduser()
    return default_cache_dir() / "warm"


def model_key(model: GgufModel) -> bytes:
    """32 bytes that tell a model from all others, wherever it lies.

    A hash of every file's size, of its bytes before the first tensor, which are the metadata with vocabulary and
    template and all tensors' names, shapes and types, and of the beginning of every router. Routers are what
    the statistics depend on: two fine-tunes of one model can have equal headers, but not equal routers. Reading all
    weights would take longer than the warm start saves; the time of the last change would tie the file to one copy.
    Another model that still has the same key costs useless reads, and no wrong results.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for file_idx, path in enumerate(model.files):
        tensors = sorted((t for t in model.tensors if t.file_idx == file_idx), key=lambda t: t.offset)
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            file_bytes = file.seek(0, os.SEEK_END)
            header_bytes = tensors[0].offset if tensors else file_bytes
            digest.update(struct.pack("<QQ", file_bytes, header_bytes))
            digest.update(os.pread(file.fileno(), header_bytes, 0))
            for t in tensors:
                if _ROUTER.fullmatch(t.name):
                    digest.update(os.pread(file.fileno(), min(t.n_bytes, _KEY_SAMPLE_BYTES), t.offset))
    return digest.digest()


def signature(counts: Counts) -> npt.NDArray[np.uint8]:
    """How often each expert was selected, in 255ths of its layer's most selected one."""
    most = np.maximum(counts.max(axis=1, keepdims=True), 1)
    scaled: npt.NDArray[np.uint8] = np.rint(255.0 * counts / most).astype(np.uint8)
    return scaled


def similarity(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> float:
    """The cosine of two signatures, from -1 to 1, each layer scaled to a sum of 1 and freed of its mean.

    With the mean, which all signatures share, any two would be near.
    """
    directions = []
    for x in (a, b):
        shares = x / np.maximum(x.sum(axis=1, keepdims=True, dtype=np.float64), 1.0)
        directions.append((shares - shares.mean(axis=1, keepdims=True)).ravel())
    lengths = float(np.linalg.norm(directions[0]) * np.linalg.norm(directions[1]))
    return float(directions[0] @ directions[1]) / lengths if lengths > 0.0 else 0.0


def merge(hot: HotSet, stored: Sequence[HotSet]) -> list[HotSet]:
    """The hot sets to keep, the latest first: `hot` in place of the nearest stored one if that is the same task's."""
    kept = list(stored)
    nearness = [similarity(hot.signature, s.signature) for s in kept]
    if nearness and max(nearness) > _SAME_TASK:
        del kept[nearness.index(max(nearness))]
    return [hot, *kept][:MAX_SETS]


def _expert_type(shape: tuple[int, int]) -> np.dtype[np.unsignedinteger]:
    return np.dtype("<u2" if shape[0] * shape[1] <= 1 << 16 else "<u4")


def pack(key: bytes, shape: tuple[int, int], sets: Sequence[HotSet]) -> bytes:
    """The content of a file. `shape`: layers with experts, and the most experts of a layer."""
    parts = [_HEADER.pack(_MAGIC, _VERSION, key, *shape, len(sets))]
    for s in sets:
        parts += [_COUNT.pack(len(s.experts)), s.signature.tobytes(), s.experts.astype(_expert_type(shape)).tobytes()]
    content = b"".join(parts)
    return content + _COUNT.pack(zlib.crc32(content))


def unpack(data: bytes, key: bytes, shape: tuple[int, int]) -> list[HotSet]:
    """The hot sets in a file's content.

    Raises:
        UnusableError: it is corrupt, of another version, or of another model.
    """
    if len(data) < _HEADER.size + _COUNT.size:
        raise UnusableError(f"it has {len(data)} bytes, expected at least {_HEADER.size + _COUNT.size}")
    magic, version, found_key, n_layers, n_experts, n_sets = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise UnusableError(f"it begins with {magic!r}, expected {_MAGIC!r}")
    if version != _VERSION:
        raise UnusableError(f"it has version {version}, expected {_VERSION}")
    content, crc = data[: -_COUNT.size], _COUNT.unpack(data[-_COUNT.size :])[0]
    if zlib.crc32(content) != crc:
        raise UnusableError(f"its checksum is {zlib.crc32(content):08x}, expected {crc:08x}")
    if found_key != key or (n_layers, n_experts) != shape:
        raise UnusableError("it is of another model")
    sets, at, expert_type = [], _HEADER.size, _expert_type(shape)
    n_signature = n_layers * n_experts
    try:
        for _ in range(n_sets):
            (n_hot,) = _COUNT.unpack_from(content, at)
            at += _COUNT.size
            of_set = np.frombuffer(content, np.uint8, n_signature, at).reshape(shape)
            at += n_signature
            experts = np.frombuffer(content, expert_type, n_hot, at).astype(np.uint32)
            at += n_hot * expert_type.itemsize
            if n_hot and experts.max() >= n_signature:
                raise UnusableError(f"it names expert {experts.max()}, expected less than {n_signature}")
            sets.append(HotSet(of_set, experts))
    except (struct.error, ValueError) as error:
        raise UnusableError(f"it ends inside of hot set {len(sets)}") from error
    if at != len(content):
        raise UnusableError(f"it has {len(content) - at} bytes behind its last hot set")
    return sets


def read_content(path: Path) -> bytes | None:
    """The content of a small file; None where there is none.

    Raises:
        UnusableError: there is one, and it cannot be read, or is no regular file, or not small.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe must not wait for somebody to write to it
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise UnusableError("it is no regular file")
            with open(fd, "rb", closefd=False) as file:
                data = file.read(_MAX_FILE_BYTES + 1)
        finally:
            os.close(fd)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnusableError(f"it cannot be read: {error.strerror or error}") from error
    if len(data) > _MAX_FILE_BYTES:
        raise UnusableError(f"it has more than {_MAX_FILE_BYTES} bytes")
    return data


def read_file(path: Path, key: bytes, shape: tuple[int, int]) -> list[HotSet]:
    """The hot sets in a file, none where there is no file.

    Raises:
        UnusableError: there is one, and it cannot be read or used.
    """
    data = read_content(path)
    return [] if data is None else unpack(data, key, shape)


def write_file(path: Path, content: bytes) -> None:
    """Put a complete file in place; of several processes that do so at once, the last one's stays.

    Raises:
        OSError: it cannot be written; what was there is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path.parent, ".*.partial", _STALE_AFTER_S)
    with replacing(path, 0o600) as file:
        file.write(content)


@dataclasses.dataclass(frozen=True)
class Bank:
    """The experts of a model, as its runtime numbers them.

    Attributes:
        path: the model's file, for messages.
        tensors: (layer, number of experts) of each expert tensor, in the order in which the runtime was given them.
        n_experts_used: the most that a token selects in a layer.
        key: what tells the model from all others, 32 bytes; may raise OSError.
    """

    path: Path
    tensors: tuple[tuple[int, int], ...]
    n_experts_used: int
    key: Callable[[], bytes]

    @classmethod
    def of_gguf(cls, model: GgufModel) -> Bank:
        """That of a GGUF model; its tensors are in the order of `runtime.extents`."""
        tensors = tuple((t.layer, t.shape[2]) for t in model.expert_tensors)
        return cls(model.path, tensors, model.n_experts_used, lambda: model_key(model))


class WarmStart:
    """Reads what was hot ahead when a model is loaded, and remembers what is hot when it is closed.

    Nothing that goes wrong here is more than a warning. Not thread-safe: called by the thread that evaluates.
    """

    def __init__(self, bank: Bank, runtime: _native.Runtime) -> None:
        self._bank = bank
        self._runtime = runtime
        self._path: Path | None = None  # where to save; None: nowhere
        self._key = b""
        self._sets: list[HotSet] = []
        self._n_tokens = 0
        self._is_matched = False
        self._is_saved = False
        layers = sorted({layer for layer, _ in bank.tensors})
        self._shape = (len(layers), max(n_experts for _, n_experts in bank.tensors))
        self._expert_of_slice = np.concatenate(
            [layers.index(layer) * self._shape[1] + np.arange(n_experts) for layer, n_experts in bank.tensors]
        )
        order = np.argsort(self._expert_of_slice, kind="stable")
        n_slices = np.bincount(self._expert_of_slice, minlength=self._shape[0] * self._shape[1])
        self._slices_of_expert = np.split(order, np.cumsum(n_slices)[:-1])

    def begin(self) -> None:
        """Find what an earlier run left, and start to read its latest hot set."""
        # A model that nobody closes is freed when the interpreter can no longer open files.
        atexit.register(self.save)
        try:
            self._key = self._bank.key()
            self._path = default_dir() / f"{self._key.hex()[:32]}.warm"
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
            _log.warning("cannot start warm: no place for a file about %s: %s", self._bank.path, error)
            return
        try:
            self._sets = read_file(self._path, self._key, self._shape)
        except UnusableError as why:
            _log.warning("cannot start warm: %s (%s); closing the model writes it anew", why, self._path)
        if self._sets:
            self._preload(self._sets[0])

    def on_tokens(self, n_tokens: int) -> None:
        """Note that tokens were evaluated; once they are enough, go on with the hot set that is nearest to them."""
        if self._is_matched:
            return
        self._n_tokens += n_tokens
        if len(self._sets) < 2:
            self._is_matched = True
        elif self._n_tokens >= SIGNATURE_TOKENS:
            self._is_matched = True
            now = signature(self._counts())
            nearness = [similarity(now, s.signature) for s in self._sets]
            nearest = nearness.index(max(nearness))
            if nearness[nearest] > nearness[0] + _MARGIN:
                self._preload(self._sets[nearest])

    def save(self) -> None:
        """Add what is hot now to the file, once, unless the session was too short to tell. Never raises."""
        atexit.unregister(self.save)
        if self._is_saved:
            return
        self._is_saved = True
        try:
            counts = self._counts()
            n_tokens = counts.sum(axis=1).max() / max(1, self._bank.n_experts_used)
            if self._path is None or n_tokens < SIGNATURE_TOKENS:
                return
            try:
                stored = read_file(self._path, self._key, self._shape)  # again: another process may have added to it
            except UnusableError:
                stored = []  # said when the model was loaded
            sets = merge(HotSet(signature(counts), self._hot_experts()), stored)
            write_file(self._path, pack(self._key, self._shape, sets))
        except Exception as error:  # whatever it is, the model has to be closed
            _log.warning("cannot save what the next start would warm up: %s (%s)", error, self._path)

    def _preload(self, hot: HotSet) -> None:
        slices = [s for e in hot.experts.tolist() for s in self._slices_of_expert[e].tolist()]
        _native.preload(self._runtime, slices)

    def _hot_experts(self) -> npt.NDArray[np.uint32]:
        experts = self._expert_of_slice[np.array(self._runtime.hot_slices(), dtype=np.int64)]
        _, first = np.unique(experts, return_index=True)
        return experts[np.sort(first)].astype(np.uint32)

    def _counts(self) -> Counts:
        n_uses = self._runtime.slice_uses()[: len(self._expert_of_slice)]  # low-bit copies come behind
        counts = np.zeros(self._shape[0] * self._shape[1], np.uint64)
        # A layer's tensors are used alike; the greatest, as a tensor that llama.cpp reads by itself is not counted.
        np.maximum.at(counts, self._expert_of_slice, np.array(n_uses, np.uint64))
        return counts.reshape(self._shape)
