# SPDX-License-Identifier: MIT
"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the context ends, complete and on storage; of several processes
    that do so at once, the last one's stays. `mode` is as for `os.open`: the umask takes from it.

    Raises:
        OSError: it cannot be written. After this or another exception what was there is untouched.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):  # after the rename there is nothing to remove
            partial.unlink()


def remove_stale(folder: Path, pattern: str, after_s: float) -> None:
    """Remove what processes that were killed have left: files by a pattern of `glob`, of more than that age.

    Raises:
        OSError: one cannot be removed.
    """
    for partial in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # another process may be cleaning too
            if time.time() - partial.stat().st_mtime > after_s:
                partial.unlink()
