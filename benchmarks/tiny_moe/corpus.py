# SPDX-License-Identifier: MIT
"""The text of the tiny model: four domains, split into documents that are trained on and documents that are not.

    apt-get download sword-text-web=426.0-1 sword-text-sparv=2.60-1
    pip download --no-deps networkx==3.6.1

bring the sources (Debian 12, PyPI) into a folder; older versions of Debian's are kept by snapshot.debian.org. Their
SHA-256 are checked, so the text is the same everywhere. Arithmetic is generated.

| domain | text | document | licence |
|---|---|---|---|
| english | World English Bible, of eBible.org | book | public domain |
| spanish | Reina-Valera 1909 | book | public domain |
| python | sources of NetworkX, without docstrings | module | BSD-3-Clause |
| arithmetic | chains of sums, differences and products | chain | generated here, MIT as the project |
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import io
import random
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

DOMAINS = ("english", "spanish", "python", "arithmetic")

SOURCES = {
    "sword-text-web_426.0-1_all.deb": "930b23670b352f0829a306501de4bebb5e654a2df02cde2cbe86b802177868e1",
    "sword-text-sparv_2.60-1_all.deb": "5c87f9b2bc97457e8a872f5bae7ea7ce59cb3de1dcee73e4d4740451863694cf",
    "networkx-3.6.1-py3-none-any.whl": "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762",
}
"""SHA-256 of the files, as Debian's and PyPI's indexes have them."""

HELD_OUT_BOOKS = ("Ruth", "Eccl", "Lam", "Hos", "Jonah", "Gal", "Phil", "Jas")
"""Of both Bibles, so that no translation of a held-out book is seen. None of them repeats another book."""

HELD_OUT_MODULES = 23
"""One module of so many is held out, by its name's SHA-256."""

_N_CHAINS = 3000
_N_HELD_OUT_CHAINS = 40
_STEPS = 60  # of a chain: some 700 tokens
_SEED = 6


class CorpusError(Exception):
    """A source is missing or not the one that is expected."""


@dataclasses.dataclass(frozen=True)
class Document:
    """A text that is trained on as a whole, or not at all."""

    domain: str
    name: str
    text: str
    is_held_out: bool


def read_corpus(sources: Path) -> list[Document]:
    """All documents, domain by domain, in an order that depends on the sources only.

    Args:
        sources: the folder with the files of `SOURCES`.

    Raises:
        CorpusError: a file is missing, or its SHA-256 is not the one expected.
    """
    web, rv, networkx = (_read_source(sources, name) for name in SOURCES)
    documents: list[Document] = []
    for domain, package in (("english", web), ("spanish", rv)):
        for book, text in _books(package):
            documents.append(Document(domain, book, text, book in HELD_OUT_BOOKS))
    for module, text in _modules(networkx):
        digest = int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "little")
        documents.append(Document("python", module, text, digest % HELD_OUT_MODULES == 0))
    for i in range(_N_CHAINS):
        text = _chain(random.Random(f"{_SEED}/{i}"))
        documents.append(Document("arithmetic", f"chain {i}", text, i < _N_HELD_OUT_CHAINS))
    return documents


def _read_source(sources: Path, name: str) -> bytes:
    try:
        data = (sources / name).read_bytes()
    except OSError as error:
        raise CorpusError(f"cannot read a source: {error.strerror} ({sources / name}); see {__name__}") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != SOURCES[name]:
        raise CorpusError(
            f"a source is another one: SHA-256 {digest}, expected {SOURCES[name]} ({sources / name}); "
            "take the version that is named in " + __name__
        )
    return data


def _deb_data(package: bytes) -> tarfile.TarFile:
    """The files of a Debian package: an ar archive (deb(5)) that has them in data.tar.xz."""
    offset = len(b"!<arch>\n")
    while offset < len(package):
        name, n_bytes = package[offset : offset + 16].strip(), int(package[offset + 48 : offset + 58])
        offset += 60
        if name == b"data.tar.xz":
            return tarfile.open(fileobj=io.BytesIO(package[offset : offset + n_bytes]), mode="r:xz")
        offset += n_bytes + n_bytes % 2
    raise CorpusError("a Debian package has no data.tar.xz")


_NOTE = re.compile(r"<(note|title|reference)\b[^>]*>.*?</\1>", re.DOTALL)
_TAG = re.compile(r"<[^>]*>")
_BOOK = re.compile(rb'<div [^>]*osisID="(\w+)"[^>]*type="book"')


def _books(package: bytes) -> Iterator[tuple[str, str]]:
    """(OSIS name, text with a verse per line) of each book of a SWORD module of the kind zText.

    Of each testament there are three files: .bzz has blocks compressed by zlib, .bzs where they lie (offset, bytes,
    bytes uncompressed: uint32), .bzv where verses lie (block uint32, offset uint32, bytes uint16), in order; an entry
    of the verse 0 of a chapter, and each repetition of a verse, are of 0 bytes or have headings only.
    """
    with _deb_data(package) as files:
        members = {Path(member.name).name: member for member in files if member.isfile()}

        def read(name: str) -> bytes:
            file = files.extractfile(members[name])
            assert file is not None
            return file.read()

        for testament in ("ot", "nt"):
            blocks, index, verses = (read(f"{testament}.{kind}") for kind in ("bzz", "bzs", "bzv"))
            places: dict[int, list[tuple[int, int]]] = {}
            for block, offset, n_bytes in struct.iter_unpack("<IIH", verses):
                places.setdefault(block, []).append((offset, n_bytes))
            for block, (offset, n_bytes, _) in enumerate(struct.iter_unpack("<III", index)):
                osis = zlib.decompress(blocks[offset : offset + n_bytes])
                book = _BOOK.search(osis)  # a preface may come before
                if book:
                    verses_of_book = sorted({place for place in places.get(block, []) if place[0] >= book.start()})
                    lines = (_plain(osis[begin : begin + n]) for begin, n in verses_of_book)
                    text = "\n".join(line for line in lines if line)
                    if text:
                        yield book[1].decode(), text + "\n"


def _plain(osis: bytes) -> str:
    text = _TAG.sub("", _NOTE.sub(" ", osis.decode("utf-8")))  # some notes stand between words without a space
    return re.sub(r" ([,.;:!?])", r"\1", " ".join(text.split()))


def _modules(wheel: bytes) -> Iterator[tuple[str, str]]:
    """(name, source) of each module of some length."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as files:
        for name in sorted(files.namelist()):
            if name.endswith(".py"):
                text = _without_docstrings(files.read(name).decode("utf-8").replace("\r\n", "\n"))
                if len(text) > 500:
                    yield name, text


def _without_docstrings(source: str) -> str:
    """The source without the lines of docstrings, which are English."""
    lines: list[str | None] = list(source.split("\n"))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                assert first.end_lineno is not None
                lines[first.lineno - 1 : first.end_lineno] = [None] * (first.end_lineno - first.lineno + 1)
    return re.sub(r"\n{3,}", "\n\n\n", "\n".join(line for line in lines if line is not None)).strip() + "\n"


def _chain(rng: random.Random) -> str:
    """Steps of which each goes on with the result before, so that half of each line follows from what is known."""
    value, lines = rng.randrange(1, 100), []
    for _ in range(_STEPS):
        operators = ["-"] if value > 900 else ["+", "-"] if value > 100 else ["+", "-", "*"]
        operator = rng.choice(operators)
        if operator == "*":
            other = rng.randrange(2, 10)
            result = value * other
        elif operator == "+":
            other = rng.randrange(1, 100)
            result = value + other
        else:
            other = rng.randrange(0, min(value, 999) + 1)
            result = value - other
        lines.append(f"{value} {operator} {other} = {result}")
        value = result
    return "\n".join(lines) + "\n"
