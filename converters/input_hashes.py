# SPDX-License-Identifier: MIT
"""The SHA-256 of a conversion's inputs, made while it converts.

A conversion reads tensors in the order of its result, a hash needs files from beginning to end. So a thread of its own
reads them, beside the conversion: on a disk or a page cache that has room for both, the hashes cost no time. Digests
are journalled by the thread that writes the file, as they become known; those of files that have size and time as
before an interruption are not made again.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from edgemoe.errors import ConversionError

from .gguf_file import PartialFile

BUFFER_BYTES = 1 << 20
"""What the thread holds of a file; larger ones are not faster."""

_POLL_S = 0.1


class InputHashes:
    """Hashes files in the background; a context that ends with its thread, however it is left.

    Args:
        inputs: files to hash.
        file: its journal keeps digests; written to by `note` and `wait` only, on the calling thread.

    Raises:
        ConversionError: a file cannot be looked at.
    """

    def __init__(self, inputs: Sequence[Path], file: PartialFile) -> None:
        self._file = file
        self._states = [_state(path) for path in inputs]
        known = {_key(entry): str(entry["sha256"]) for entry in file.recall("input")}
        self._digests = [known.get(_key(state)) for state in self._states]
        self._noted = {i for i, digest in enumerate(self._digests) if digest is not None}
        self._n_done = 0
        self._is_stopped = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(tuple(inputs),), name="edgemoe-hash", daemon=True)

    @property
    def identity(self) -> str:
        """What tells these inputs from others before they are hashed: paths, sizes and times."""
        return repr(self._states)

    def __enter__(self) -> InputHashes:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._is_stopped.set()
        self._thread.join()

    def note(self) -> None:
        """Write to the journal what has become known."""
        for i, digest in enumerate(self._digests):
            if digest is not None and i not in self._noted:
                self._noted.add(i)
                self._file.note("input", {**self._states[i], "sha256": digest})

    def wait(self, report: Callable[[str, int, int], None]) -> list[str]:
        """All digests, in the order of the inputs; `report` gets the stage `hash`, in bytes, if it takes a while.

        Raises:
            ConversionError: a file cannot be read, or has changed.
        """
        n_total = sum(int(state["n_bytes"]) for i, state in enumerate(self._states) if i not in self._noted)
        while self._thread.is_alive():
            self._thread.join(_POLL_S)
            report("hash", min(self._n_done, n_total), n_total)
        if self._error is not None:
            raise self._error
        self.note()
        return [digest for digest in self._digests if digest is not None]

    def _run(self, inputs: Sequence[Path]) -> None:
        try:
            for i, path in enumerate(inputs):
                if self._digests[i] is None:
                    self._digests[i] = self._hash(path, self._states[i])
                if self._is_stopped.is_set():
                    return
        except Exception as error:  # raised by `wait`, on the thread that can tell someone
            self._error = error

    def _hash(self, path: Path, state: dict[str, str | int]) -> str | None:
        digest = hashlib.sha256()
        buffer = bytearray(BUFFER_BYTES)
        view = memoryview(buffer)
        try:
            with path.open("rb", buffering=0) as stream:
                while n_read := stream.readinto(buffer):
                    if self._is_stopped.is_set():
                        return None
                    digest.update(view[:n_read])
                    self._n_done += n_read
        except OSError as error:
            raise ConversionError(f"cannot read {path}: {error.strerror or error}") from error
        if _state(path) != state:
            raise ConversionError(
                f"cannot convert {path}: it changed while it was converted (size or time); start again when it is whole"
            )
        return digest.hexdigest()


def _state(path: Path) -> dict[str, str | int]:
    try:
        found = path.stat()
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {error.strerror or error}") from error
    return {"path": str(path.resolve()), "n_bytes": found.st_size, "mtime_ns": found.st_mtime_ns}


def _key(state: dict[str, str | int]) -> tuple[str | int, ...]:
    return state["path"], state["n_bytes"], state["mtime_ns"]
