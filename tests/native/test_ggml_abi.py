# SPDX-License-Identifier: MIT
"""kernels/plugins/ggml/ggml_abi.h restates structs whose headers ggml does not install: they must be ggml's own.

One probe is compiled twice, against our header and against ggml's own from the llama-cpp-python source distribution,
and prints the size of every struct and the place of every field that our header declares; the two must agree. Field
types are compared as well: a function pointer that takes other arguments is at the right offset and still wrong.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABI_HEADER = ROOT / "kernels" / "plugins" / "ggml" / "ggml_abi.h"
VARIABLE = "EDGEMOE_LLAMA_CPP_SDIST"
CACHE = ROOT / "build" / "llama-cpp-sdist"
GGML_IN_SDIST = Path("vendor") / "llama.cpp" / "ggml"
DOWNLOAD_TIMEOUT_S = 300
# Declared as int by us, because its enumeration is not installed either; the size is compared all the same.
ENUMERATIONS = {"ggml_cgraph::order"}


def constant(name: str) -> str:
    match = re.search(rf'^#define {name} "?([^"\n]+)"?$', ABI_HEADER.read_text(encoding="utf-8"), re.MULTILINE)
    assert match is not None, name
    return match[1]


def declared_fields() -> dict[str, list[str]]:
    """The structs that ggml_abi.h defines, and their fields in order."""
    text = re.sub(r"//[^\n]*", "", ABI_HEADER.read_text(encoding="utf-8"))
    structs = {}
    for match in re.finditer(r"^struct (\w+) \{\n(.*?)^\};", text, re.MULTILINE | re.DOTALL):
        fields = []
        for declaration in filter(None, (d.strip() for d in match[2].split(";"))):
            pointer = re.match(r"[^(]*\(\*(\w+)\)\(", declaration)
            name = pointer[1] if pointer else re.split(r"[\s*]+", declaration)[-1]
            fields.append(name)
        structs[match[1]] = fields
    return structs


def unpack(archive: Path) -> Path:
    """The folder of a source distribution, unpacked beside the cache's other contents."""
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = CACHE / re.sub(r"\.(tar\.gz|zip)$", "", archive.name)
    if not (folder / GGML_IN_SDIST / "src" / "ggml-impl.h").exists():
        # Of the thousands of files only ggml's headers are wanted.
        wanted = re.compile(rf"^[^/]+/{re.escape(GGML_IN_SDIST.as_posix())}/(src|include)/[^/]+\.h$")
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as z:
                z.extractall(CACHE, [n for n in z.namelist() if wanted.match(n)])
        else:
            with tarfile.open(archive) as t:
                for member in t.getmembers():
                    content = t.extractfile(member) if member.isfile() and wanted.match(member.name) else None
                    if content is not None:
                        target = CACHE / member.name
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(content.read())
    return folder


def find_sdist() -> Path:
    """The unpacked sources: from EDGEMOE_LLAMA_CPP_SDIST (folder or archive), the cache, or PyPI."""
    given = os.environ.get(VARIABLE)
    if given:
        path = Path(given)
        assert path.exists(), f"{VARIABLE}={given}: no such file or folder"
        return path if path.is_dir() else unpack(path)
    version = constant("EDGEMOE_LLAMA_CPP_PYTHON_VERSION")
    name = f"llama_cpp_python-{version}"
    if (CACHE / name / GGML_IN_SDIST / "src" / "ggml-impl.h").exists():
        return CACHE / name
    if not (CACHE / f"{name}.tar.gz").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        what = [f"llama-cpp-python=={version}", "--no-deps", "--no-binary", ":all:", "--dest", str(CACHE)]
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", *what]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            pytest.skip(f"pip download took more than {DOWNLOAD_TIMEOUT_S} s; set {VARIABLE}")
        if result.returncode != 0:
            pytest.skip(f"cannot download the sources of llama-cpp-python; set {VARIABLE}: {result.stderr[-300:]}")
    return unpack(CACHE / f"{name}.tar.gz")


def probe(includes: str, folders: list[Path], tmp_path: Path, name: str) -> dict[str, str]:
    """Compile and run a program that prints one line for each struct and field."""
    lines = []
    for struct, fields in declared_fields().items():
        lines.append(f'  std::printf("{struct} %zu bytes, alignment %zu\\n", sizeof({struct}), alignof({struct}));')
        for field in fields:
            place = f"offsetof({struct}, {field}), sizeof({struct}::{field})"
            is_enumeration = f"{struct}::{field}" in ENUMERATIONS
            type_name = '"an enumeration"' if is_enumeration else f"typeid(decltype({struct}::{field})).name()"
            lines.append(f'  std::printf("{struct}::{field} at %zu, %zu bytes, %s\\n", {place}, {type_name});')
    functions = ["ggml_backend_buffer_init", "ggml_graph_view"]
    for function in functions:
        lines.append(f'  std::printf("{function} is %s\\n", typeid(decltype({function})).name());')
    lines.append('  std::printf("api version %d\\n", API_VERSION);')
    source = tmp_path / f"{name}.cc"
    source.write_text(
        f"{includes}\n#include <cstddef>\n#include <cstdio>\n#include <typeinfo>\n"
        "int main() {\n" + "\n".join(lines) + "\n}\n"
    )
    binary = tmp_path / name
    # Optimized, because the static functions of ggml-impl.h would otherwise want to be linked with ggml.
    options = [f"-I{folder}" for folder in folders]
    command = ["c++", "-std=c++17", "-O1", "-w", *options, str(source), "-o", str(binary)]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr[-4000:]
    printed = subprocess.run([str(binary)], capture_output=True, text=True, check=True).stdout
    return dict(line.split(" ", 1) for line in printed.splitlines())


def test_every_struct_and_field_is_found_in_our_header() -> None:
    structs = declared_fields()
    assert len(structs) == len(re.findall(r"^struct \w+ \{", ABI_HEADER.read_text(encoding="utf-8"), re.MULTILINE))
    assert structs["ggml_backend_buffer"] == ["iface", "buft", "context", "size", "usage"]
    assert structs["ggml_hash_set"] == ["size", "used", "keys"]
    assert structs["ggml_backend_i"][0] == "get_name" and structs["ggml_backend_i"][-1] == "graph_optimize"


def test_layouts_are_those_of_ggml(tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("no c++: apt-get install g++")
    sdist = find_sdist()
    headers = sdist / GGML_IN_SDIST
    installed = Path(sysconfig.get_path("platlib")) / "include"
    if not (installed / "ggml.h").exists():
        pytest.skip(f"no ggml headers in {installed}: pip install llama-cpp-python")
    ours = probe(
        '#include "plugins/ggml/ggml_abi.h"\nconstexpr int API_VERSION = EDGEMOE_GGML_BACKEND_API_VERSION;',
        [ROOT / "kernels", installed],
        tmp_path,
        "ours",
    )
    theirs = probe(
        '#include "ggml-backend-impl.h"\n#include "ggml-impl.h"\nconstexpr int API_VERSION = GGML_BACKEND_API_VERSION;',
        [headers / "src", headers / "include"],
        tmp_path,
        "theirs",
    )
    assert ours == theirs
    assert len(ours) == 3 + sum(1 + len(fields) for fields in declared_fields().values())


def test_installed_headers_are_those_of_the_sources() -> None:
    installed = Path(sysconfig.get_path("platlib")) / "include"
    if not (installed / "ggml.h").exists():
        pytest.skip(f"no ggml headers in {installed}: pip install llama-cpp-python")
    headers = find_sdist() / GGML_IN_SDIST / "include"
    for name in ("ggml.h", "ggml-backend.h", "ggml-cpu.h"):
        assert (installed / name).read_bytes() == (headers / name).read_bytes(), name
