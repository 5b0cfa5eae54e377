# SPDX-License-Identifier: MIT
"""A folder that exists complete and on the disk, or not at all.

It grows as `.NAME.partial` beside its final place, is forced to the disk and gets its name. What fails leaves nothing;
what is killed leaves the partial folder, which the next conversion to the same name removes. A lock keeps a second
conversion to the same name away. One thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemoe.errors import ConversionError
from edgemoe.sizes import format_size

from .graph import Place

_LOCK = ".lock"


class OutFolder:
    """The folder while it is being written; use as a context, and `commit` at the end.

    Args:
        out: the final name; it must not exist, or `commit` replaces it.
        file_bytes: names and lengths of the files that `write` fills.
        n_bytes: of the whole folder.

    Raises:
        ConversionError: another conversion writes to the same name, or there is no room or permission.
    """

    def __init__(self, out: Path, file_bytes: Mapping[str, int], n_bytes: int) -> None:
        self._out = Path(os.path.abspath(out))
        self.path = self._out.with_name(f".{self._out.name}.partial")
        self._files: dict[str, int] = {}
        with self._writing():
            self.path.mkdir(exist_ok=True)
            self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConversionError(
                    f"cannot write {out}: another conversion is writing it ({self.path}); wait for it, or name another"
                ) from None
        except BaseException:
            os.close(self._lock)
            raise
        try:
            with self._writing():
                _empty(self.path)
                self._check_free_space(n_bytes)
                for name, length in file_bytes.items():
                    self._files[name] = os.open(self.path / name, os.O_RDWR | os.O_CREAT, 0o666)
                    os.truncate(self._files[name], length)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def __enter__(self) -> OutFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        for file in self._files.values():
            os.close(file)
        if isinstance(error, Exception):
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def write(self, place: Place, at: int, data: npt.NDArray[Any]) -> None:
        """Put the array's bytes, in C order, at byte `at` of the place.

        Raises:
            ConversionError: the disk is full or fails.
        """
        view = data.reshape(-1).view(np.uint8).data
        assert at + view.nbytes <= place.n_bytes  # jobs fill what they have described
        offset = place.offset + at
        with self._writing():
            while view:
                n_written = os.pwrite(self._files[place.file], view, offset)
                view = view[n_written:]
                offset += n_written

    def add(self, name: str, data: bytes) -> None:
        """Write a whole file.

        Raises:
            ConversionError: the disk is full or fails.
        """
        with self._writing():
            (self.path / name).write_bytes(data)

    def copy(self, source: Path) -> None:
        """Copy a file into the folder.

        Raises:
            ConversionError: it cannot be read, or the disk is full or fails.
        """
        try:
            data = source.read_bytes()
        except OSError as error:
            raise ConversionError(f"cannot read {source}: {error.strerror or error}") from error
        self.add(source.name, data)

    def commit(self) -> None:
        """Force everything to the disk and give the folder its name; a folder of that name is replaced.

        Raises:
            ConversionError: the disk is full or fails.
        """
        with self._writing():
            (self.path / _LOCK).unlink()
            for path in self.path.iterdir():
                _sync(path)
            _sync(self.path)
            before = self._out.with_name(f".{self._out.name}.before")
            if self._out.exists():
                shutil.rmtree(before, ignore_errors=True)
                self._out.rename(before)
            self.path.rename(self._out)
            _sync(self._out.parent)
            shutil.rmtree(before, ignore_errors=True)

    def _check_free_space(self, n_bytes: int) -> None:
        free = shutil.disk_usage(self.path).free
        if free < n_bytes:
            raise ConversionError(
                f"cannot write {self._out}: it takes {format_size(n_bytes)}, {format_size(free)} are free; make room, "
                "or name another place"
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            todo = (
                "make room, or name another place" if error.errno == errno.ENOSPC else "check the folder and its disk"
            )
            raise ConversionError(f"cannot write {self._out}: {error.strerror or error}; {todo}") from error


def _empty(folder: Path) -> None:
    """Remove what a killed conversion has left, but for the lock."""
    for path in folder.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
