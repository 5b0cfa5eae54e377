# SPDX-License-Identifier: MIT
"""GGUF files made of others, read back by the `gguf` package."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from edgemoe.converters.gguf_writer import OutTensor, write_gguf
from edgemoe.errors import ConversionError
from edgemoe.formats.gguf import read_model, read_raw_metadata

WEIGHTS = np.arange(6 * 32, dtype=np.float32).reshape(6, 32)
RAGGED = np.arange(5, dtype=np.float32)
METADATA = {
    "general.architecture": "llama",
    "a.count": 7,
    "a.flag": True,
    "a.share": 0.25,
    "a.words": ["é", "", "b"],
    "a.numbers": [-1, 2],
}


def tensors() -> list[OutTensor]:
    return [
        OutTensor("ragged", (5,), "F32", lambda: [RAGGED]),
        OutTensor("weights", (32, 6), "F32", lambda: [WEIGHTS[:2], WEIGHTS[2:].tobytes()]),
    ]


@pytest.mark.parametrize("alignment_bytes", [32, 4096])
def test_gguf_reads_what_was_written(tmp_path: Path, alignment_bytes: int) -> None:
    """Guards against: a header, a value or an offset that other readers understand differently."""
    out = tmp_path / "out.gguf"
    write_gguf(out, METADATA, tensors(), alignment_bytes=alignment_bytes)
    reader = gguf.GGUFReader(out)
    found = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert found.pop("general.alignment", 32) == alignment_bytes
    assert found == {
        "general.architecture": "llama",
        "a.count": 7,
        "a.flag": True,
        "a.share": 0.25,
        "a.words": ["é", "", "b"],
        "a.numbers": [-1, 2],
    }
    assert [t.name for t in reader.tensors] == ["ragged", "weights"]
    np.testing.assert_array_equal(reader.tensors[0].data, RAGGED)
    np.testing.assert_array_equal(reader.tensors[1].data, WEIGHTS)
    assert all(t.data_offset % alignment_bytes == 0 for t in reader.tensors)
    assert sorted(os.listdir(tmp_path)) == ["out.gguf"]


def test_metadata_is_kept_byte_for_byte(tmp_path: Path) -> None:
    """Guards against: a value that changes its type or its length on the way from one file to another."""
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    words = [f"w{i}" for i in range(5000)]  # longer than what the reader keeps
    write_gguf(first, METADATA | {"tokens": words}, tensors(), alignment_bytes=4096)
    write_gguf(second, read_raw_metadata(first), tensors(), alignment_bytes=4096)
    assert first.read_bytes() == second.read_bytes()
    write_gguf(second, read_raw_metadata(first), tensors())
    assert "general.alignment" not in read_model(second).metadata


@pytest.mark.parametrize("n_pieces", [0, 2])
def test_data_of_another_size_are_refused(tmp_path: Path, n_pieces: int) -> None:
    """Guards against: a file whose tensors are shifted, as one of them had too few or too many bytes."""
    wrong = OutTensor("wrong", (5,), "F32", lambda: [RAGGED] * n_pieces)
    with pytest.raises(ValueError, match=f"tensor wrong: {20 * n_pieces} bytes of data, expected 20"):
        write_gguf(tmp_path / "out.gguf", {}, [wrong])
    assert os.listdir(tmp_path) == []


def test_an_older_file_stays_when_writing_fails(tmp_path: Path) -> None:
    """Guards against: a failed run that destroys what was there, or leaves half a file."""
    out = tmp_path / "out.gguf"
    out.write_bytes(b"older")

    def pieces() -> Iterator[bytes]:
        yield bytes(10)
        raise ConversionError("the source is gone")

    with pytest.raises(ConversionError, match="the source is gone"):
        write_gguf(out, {}, [OutTensor("t", (5,), "F32", pieces)])
    assert out.read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["out.gguf"]


def test_a_killed_run_leaves_nothing_behind_the_next(tmp_path: Path) -> None:
    """Guards against: temporary files that pile up, and a result that depends on what a killed run left."""
    script = """
        import os, signal, sys
        from pathlib import Path
        from edgemoe.converters.gguf_writer import OutTensor, write_gguf

        def pieces():
            yield bytes(range(200)) * 5000
            os.kill(os.getpid(), signal.SIGKILL)

        write_gguf(Path(sys.argv[1]), {}, [OutTensor("t", (1 << 20,), "F32", pieces)])
    """
    out = tmp_path / "out.gguf"
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script), out], timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == [".out.gguf.partial"]
    write_gguf(out, METADATA, tensors())
    assert os.listdir(tmp_path) == ["out.gguf"]
    write_gguf(tmp_path / "fresh.gguf", METADATA, tensors())
    assert out.read_bytes() == (tmp_path / "fresh.gguf").read_bytes()


def test_a_killed_run_is_taken_up_where_it_stopped(tmp_path: Path) -> None:
    """Guards against: hours of quantizing done twice, and bytes that differ from those of a run in one go."""
    script = """
        import os, signal, sys
        from pathlib import Path
        from edgemoe.converters.gguf_writer import OutTensor, write_gguf

        def killed():
            yield bytes(8)
            os.kill(os.getpid(), signal.SIGKILL)

        pieces = {"a": lambda: [bytes(range(20))], "b": killed, "c": lambda: [bytes(20)]}
        write_gguf(Path(sys.argv[1]), {}, [OutTensor(n, (5,), "F32", p) for n, p in pieces.items()])
    """
    out, asked = tmp_path / "out.gguf", list[str]()
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(script), out], timeout=300).returncode < 0

    def tensor(name: str, data: bytes) -> OutTensor:
        return OutTensor(name, (5,), "F32", lambda: (asked.append(name), [data])[1])

    names = [tensor("a", bytes(range(20))), tensor("b", bytes(range(20, 40))), tensor("c", bytes(20))]
    write_gguf(out, {}, names)
    assert asked == ["b", "c"]
    write_gguf(tmp_path / "fresh.gguf", {}, names)
    assert out.read_bytes() == (tmp_path / "fresh.gguf").read_bytes()


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    """Guards against: two runs that write into one temporary file and give it a name half done."""
    out = tmp_path / "out.gguf"

    def pieces() -> Iterator[npt.NDArray[np.float32]]:
        with pytest.raises(ConversionError, match="another process is writing it"):
            write_gguf(out, {}, tensors())
        yield RAGGED

    write_gguf(out, {}, [OutTensor("t", (5,), "F32", pieces)])
    assert len(gguf.GGUFReader(out).tensors) == 1


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    """Guards against: a crash or a truncated file where the disk has less room than it said, as with a quota."""
    script = """
        import resource, signal, sys
        from pathlib import Path
        from edgemoe.converters.gguf_writer import OutTensor, write_gguf
        from edgemoe.errors import ConversionError

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            write_gguf(Path(sys.argv[1]), {}, [OutTensor("t", (1 << 20,), "F32", lambda: [bytes(1 << 22)])])
        except ConversionError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), tmp_path / "out.gguf"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "out.gguf: File too large" in told.stdout, told
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "said"),
    [("missing/out.gguf", "No such file or directory .*; name an existing folder"), ("", "it is a directory")],
)
def test_a_place_that_cannot_be_written(tmp_path: Path, name: str, said: str) -> None:
    """Guards against: a traceback, or hours of work, before a wrong name is told."""
    with pytest.raises(ConversionError, match=said):
        write_gguf(tmp_path / name, {}, tensors())


def test_no_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    """Guards against: hours of writing before the disk is full."""
    terabytes = OutTensor("t", (1 << 41,), "F32", lambda: pytest.fail("data were asked for"))
    with pytest.raises(ConversionError, match=r"are free in .*, expected .* GiB"):
        write_gguf(tmp_path / "out.gguf", {}, [terabytes])
    assert os.listdir(tmp_path) == []
