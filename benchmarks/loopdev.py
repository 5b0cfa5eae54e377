# SPDX-License-Identifier: MIT
"""The storage under a benchmarked model: a read-only loop device with direct I/O and an ordinary read-ahead.

llama.cpp needs a regular file (a block device says its size is 0), so the model lies in an ext4 image. Direct I/O
keeps the image itself out of the page cache; otherwise a "cold" file would be served from memory.
"""

from __future__ import annotations

import atexit
import mmap
import os
import random
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

DIRECT_IO_ALIGNMENT_BYTES = 4096
SECTOR_BYTES = 512


class LoopDeviceError(RuntimeError):
    """A loop device or its mount cannot be made here, or is not what was asked for."""


class LoopMount:
    """An ext4 image attached with direct I/O and mounted; as a context manager it gives the mounted folder.

    `close()` unmounts and detaches, also at exit of the interpreter. The image stays.
    """

    def __init__(self, image: Path, mount_point: Path, *, read_ahead_kib: int = 128, read_only: bool = True) -> None:
        """Attach and mount.

        Raises:
            LoopDeviceError: not root, no loop device, or a file system without direct I/O under the image.
        """
        if os.geteuid() != 0:
            raise LoopDeviceError(f"cannot mount: found user id {os.geteuid()}, expected 0; run as root")
        self._mount_point = mount_point
        self._device: Path | None = None
        self._mounted = False
        atexit.register(self.close)
        access = ["-r"] if read_only else []
        try:
            found = _run(["losetup", *access, "--direct-io=on", "--find", "--show", str(image)])
            self._device = Path(found.strip())
            direct_io = Path(f"/sys/block/{self._device.name}/loop/dio").read_text().strip()
            if direct_io != "1":
                raise LoopDeviceError(
                    f"no direct I/O on the loop device: found dio={direct_io}, expected 1 ({image}); "
                    "put it on a file system that knows O_DIRECT, such as ext4 or xfs"
                )
            _run(["blockdev", "--setra", str(read_ahead_kib * 1024 // SECTOR_BYTES), str(self._device)])
            mount_point.mkdir(parents=True, exist_ok=True)
            options = "ro" if read_only else "rw"
            _run(["mount", "-t", "ext4", "-o", options, str(self._device), str(mount_point)])
            self._mounted = True
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Path:
        return self._mount_point

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmount and detach. May be called twice."""
        atexit.unregister(self.close)
        if self._mounted:
            self._mounted = False
            _run(["umount", str(self._mount_point)])
            self._mount_point.rmdir()
        if self._device is not None:
            device, self._device = self._device, None
            _run(["losetup", "--detach", str(device)])


def image_with(model: Path, work_dir: Path) -> Path:
    """Give the ext4 image in `work_dir` that holds `model`.

    It is made on first use and found again by the size and change time of the model; images of older states go.
    """
    status = model.stat()
    image = work_dir / f"{model.stem}-{status.st_size}-{status.st_mtime_ns}.ext4"
    if image.exists():
        return image
    work_dir.mkdir(parents=True, exist_ok=True)
    for old in work_dir.iterdir():
        if re.fullmatch(re.escape(model.stem) + r"-\d+-\d+\.ext4", old.name):
            old.unlink()
    make_image(image, status.st_size, lambda folder: shutil.copyfile(model, folder / model.name))
    return image


def make_image(image: Path, n_bytes: int, fill: Callable[[Path], object]) -> None:
    """Make an ext4 image with room for files of `n_bytes`, which `fill` writes into the folder that it is given."""
    part = image.with_suffix(f".{os.getpid()}.part")
    try:
        with part.open("wb") as file:  # allocated in one go, so that the disk sees a mostly contiguous file
            os.posix_fallocate(file.fileno(), 0, n_bytes + n_bytes // 64 + (64 << 20))
        options = "lazy_itable_init=0,nodiscard"
        _run(["mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", "-T", "largefile4", "-E", options, str(part)])
        with LoopMount(part, image.parent / f"fill-{os.getpid()}", read_only=False) as folder:
            fill(folder)
        part.rename(image)
    finally:
        part.unlink(missing_ok=True)


def random_read_bytes_per_s(path: Path, read_bytes: int, *, n_threads: int = 4, seconds: float = 2.0) -> float:
    """Bytes per second of random O_DIRECT reads of `read_bytes` each, by `n_threads` at a time."""
    n_bytes = -(-read_bytes // DIRECT_IO_ALIGNMENT_BYTES) * DIRECT_IO_ALIGNMENT_BYTES
    n_offsets = (path.stat().st_size - n_bytes) // DIRECT_IO_ALIGNMENT_BYTES
    if n_offsets < 1:
        raise LoopDeviceError(f"cannot measure the disk: found {path.stat().st_size} bytes, expected more ({path})")
    done_bytes = [0] * n_threads
    start_s = time.monotonic()

    def read(lane: int) -> None:
        rng = random.Random(lane)
        with mmap.mmap(-1, n_bytes) as buffer:  # page-aligned, as O_DIRECT wants it
            while time.monotonic() < start_s + seconds:
                offset = rng.randrange(n_offsets) * DIRECT_IO_ALIGNMENT_BYTES
                done_bytes[lane] += os.preadv(descriptor, [buffer], offset)

    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        lanes = [threading.Thread(target=read, args=(lane,)) for lane in range(n_threads)]
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()
        return sum(done_bytes) / (time.monotonic() - start_s)
    finally:
        os.close(descriptor)


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        detail = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error.strerror
        raise LoopDeviceError(
            f"`{' '.join(command)}` failed: {detail}; run as root with util-linux and e2fsprogs installed"
        ) from error
