# SPDX-License-Identifier: MIT
"""plugins/onnxruntime/ort_abi.h restates a part of ONNX Runtime's C API: it must be what ONNX Runtime's header says.

One file is compiled against the real header, which Debian packages: it asserts the index and the signature of every
function that we call, and the place of every field of the structs that we fill. The header is looked for where the
environment's EDGEMOE_ORT_INCLUDE says, then in build/, and then downloaded from Debian.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABI_HEADER = ROOT / "kernels" / "plugins" / "onnxruntime" / "ort_abi.h"
VARIABLE = "EDGEMOE_ORT_INCLUDE"
CACHE = ROOT / "build" / "ort-headers"
HEADER = "onnxruntime_c_api.h"
DOWNLOAD_TIMEOUT_S = 120
# Debian's releases in use have older headers, without execution providers; its rolling release has them.
SOURCES = "deb http://deb.debian.org/debian sid main\n"

PRELUDE = """
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include "onnxruntime_c_api.h"
namespace ours {
#include "ort_abi.h"
}
// Enumerations are int32_t to us, tables of functions void.
template <typename T> struct Plain { using type = std::conditional_t<std::is_enum_v<T>, int32_t, T>; };
template <> struct Plain<OrtApi> { using type = void; };
template <> struct Plain<OrtEpApi> { using type = void; };
template <typename T> struct Plain<const T> { using type = const typename Plain<T>::type; };
template <typename T> struct Plain<T*> { using type = typename Plain<T>::type*; };
template <typename R, typename... A> struct Plain<R(A...)> {
  using type = typename Plain<R>::type(typename Plain<A>::type...);
};
template <typename R, typename... A> struct Plain<R(A...) noexcept> : Plain<R(A...)> {};
template <typename T> using PlainT = typename Plain<T>::type;
template <typename F> struct Arity;
template <typename R, typename... A> struct Arity<R (*)(A...)> { static constexpr size_t n = sizeof...(A); };
template <typename R, typename... A> struct Arity<R (*)(A...) noexcept> { static constexpr size_t n = sizeof...(A); };
static_assert(ours::kOrtApiVersion <= ORT_API_VERSION);
static_assert(ours::edgemoe_ort::kOrtFail == ORT_FAIL && ours::edgemoe_ort::kOrtCpu == OrtHardwareDeviceType_CPU);
static_assert(ours::edgemoe_ort::kOrtFloat == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
static_assert(ours::edgemoe_ort::kOrtUint8 == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8);
static_assert(ours::edgemoe_ort::kOrtFloat16 == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
static_assert(ours::edgemoe_ort::kOrtRequired == INPUT_OUTPUT_REQUIRED);
static_assert(ours::edgemoe_ort::kOrtOptional == INPUT_OUTPUT_OPTIONAL);
static_assert(ours::edgemoe_ort::kOrtMemTypeDefault == OrtMemTypeDefault);
static_assert(ours::edgemoe_ort::kOrtAttrInt == ORT_OP_ATTR_INT);
static_assert(ours::edgemoe_ort::kOrtAttrFloat == ORT_OP_ATTR_FLOAT);
static_assert(ours::edgemoe_ort::kOrtAttrString == ORT_OP_ATTR_STRING);
"""


def download() -> Path:
    """The folder of Debian's header, unpacked; nothing is installed."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip(f"no {HEADER}: set {VARIABLE} to its folder")
    for folder in ("lists/partial", "cache/archives/partial"):
        (CACHE / folder).mkdir(parents=True, exist_ok=True)
    (CACHE / "sources.list").write_text(SOURCES, encoding="utf-8")
    options = {
        "Dir::Etc::SourceList": CACHE / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": CACHE / "lists",
        "Dir::Cache": CACHE / "cache",
        "Dir::State::status": "/dev/null",
    }
    apt = ["apt-get", "-qq", *(part for key, value in options.items() for part in ("-o", f"{key}={value}"))]
    for command in ([*apt, "update"], [*apt, "download", "libonnxruntime-dev"]):
        try:
            subprocess.run(command, cwd=CACHE, check=True, capture_output=True, timeout=DOWNLOAD_TIMEOUT_S)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"no {HEADER}, and Debian's cannot be downloaded: {error}; set {VARIABLE} to its folder")
    package = next(CACHE.glob("libonnxruntime-dev*.deb"))
    subprocess.run(["dpkg-deb", "-x", str(package), str(CACHE / "package")], check=True)
    shutil.rmtree(CACHE / "lists")
    return CACHE / "package" / "usr" / "include" / "onnxruntime"


@pytest.fixture(scope="module")
def include_folder() -> Path:
    candidates = [Path(os.environ.get(VARIABLE, "/nonexistent")), CACHE / "package" / "usr" / "include" / "onnxruntime"]
    return next((folder for folder in candidates if (folder / HEADER).exists()), None) or download()


def asserts(text: str) -> list[str]:
    """One assertion for each function and each field that our header declares."""
    text = re.sub(r"//[^\n]*", "", text)
    found = []
    for namespace, table in (("api", "OrtApi"), ("ep_api", "OrtEpApi")):
        body = re.search(rf"namespace {namespace} \{{(.*?)\n\}}", text, re.DOTALL)
        assert body is not None
        for name, idx, function in re.findall(r"using (\w+) = Slot<(\d+),\s*(.*?)>;", body[1], re.DOTALL):
            place = f"offsetof({table}, {name}) == {idx} * sizeof(void*)"
            found.append(f'static_assert({place}, "{name}: index");')
            theirs = f"PlainT<std::remove_pointer_t<decltype({table}::{name})>>"
            found.append(f'static_assert(std::is_same_v<{theirs}, PlainT<{function}>>, "{name}: signature");')
    for struct, body in re.findall(r"^struct (\w+) \{\n(.*?)^\};", text, re.MULTILINE | re.DOTALL):
        for declaration in filter(None, (d.strip() for d in body.split(";"))):
            pointer = re.match(r"[^(]*\(\*(\w+)\)\(", declaration)
            field = pointer[1] if pointer else declaration.split()[-1]
            same_place = f"offsetof(ours::{struct}, {field}) == offsetof({struct}, {field})"
            found.append(f'static_assert({same_place}, "{struct}::{field}: place");')
            if pointer and "()" not in declaration:
                arity = f"Arity<decltype(ours::{struct}::{field})>::n == Arity<decltype({struct}::{field})>::n"
                found.append(f'static_assert({arity}, "{struct}::{field}: arguments");')
    return found


def check(text: str, include_folder: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (folder / "ort_abi.h").write_text(text, encoding="utf-8")
    lines = asserts(text)
    assert len(lines) > 100
    (folder / "probe.cc").write_text(PRELUDE + "\n".join(lines) + "\n", encoding="utf-8")
    command = [compiler, "-std=c++17", "-fsyntax-only", f"-I{folder}", f"-I{include_folder}", str(folder / "probe.cc")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_our_declarations_are_those_of_onnx_runtime(include_folder: Path, tmp_path: Path) -> None:
    """Guards against: a function called by a wrong index or with other arguments, a struct filled at wrong places."""
    result = check(ABI_HEADER.read_text(encoding="utf-8"), include_folder, tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        ("Slot<65, OrtStatus*(const OrtValue*", "Slot<66, OrtStatus*(const OrtValue*", "GetTensorTypeAndShape: index"),
        (
            "OrtStatus*(const OrtOpAttr*, int32_t*)",
            "OrtStatus*(const OrtOpAttr*, int64_t*)",
            "OpAttr_GetType: signature",
        ),
        ("  void (*ReleaseEp)(OrtEpFactory*, OrtEp*);\n", "", "GetVendorId: place"),
    ],
)
def test_a_wrong_declaration_is_found(right: str, wrong: str, named: str, include_folder: Path, tmp_path: Path) -> None:
    """Guards against: a comparison that finds nothing because it compares nothing."""
    text = ABI_HEADER.read_text(encoding="utf-8")
    assert text.count(right) == 1
    result = check(text.replace(right, wrong), include_folder, tmp_path)
    assert result.returncode != 0
    assert named in result.stderr
