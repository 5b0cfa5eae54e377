# SPDX-License-Identifier: MIT
"""What a kernel executes: instructions, multiplications and loads, per weight for one token and per multiply-add for 8.

Counts, not times: they depend on the compiler, not on the machine's mood. A process of
`kernels/benchmarks/kernel_instructions` runs one product of 64 rows x 2048 columns under PTRACE_SINGLESTEP, and
`objdump` says what the instructions are: that works for every instruction set the CPU has, where performance counters
are hidden (virtual machines) and valgrind knows no AVX-512. `--callgrind` counts with valgrind instead, as a check and
for `scalar`, which single steps would take minutes for.

The bounds are those of AMD Zen 5, measured with loops of one instruction (docs/experiments.md): in a cycle two
multiplications (vpdpbusd, vpmaddubsw, vpmaddwd, vpmulld, vmulps, FMA, ..), four vector operations of any kind, two
vector loads, eight instructions.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import kernels, session

ISAS = ("avx512_vnni", "avx_vnni", "avx2")
TOKENS = (1, 8)
MULTIPLICATION = re.compile(r"v(pdp|pmadd|pmul|mulp|fmadd|fnmadd|fmsub)")
MOVE = re.compile(r"v(movdq|movap|movup|broadcast|pbroadcast|lddqu)")
# Multiply-adds per cycle of the instruction that the peak is measured with, as kernels/benchmarks/machine.cc has it.
PEAK_MACS = {"avx512_vnni": 128, "avx_vnni": 64, "avx2": 64}
FLOAT_PEAK_MACS = {"avx512_vnni": 32, "avx_vnni": 16, "avx2": 16}
PER_CYCLE = {"multiplications": 2, "vector_operations": 4, "vector_loads": 2, "instructions": 8}
Record = dict[str, Any]


def classify(instruction: str) -> set[str]:
    """Which of the counted kinds an instruction in objdump's Intel syntax is of, `stack` for spilled vectors included.

    A load that is an operand of an operation counts as both. Moves between registers cost a slot of the front end only.
    """
    words = instruction.removeprefix("{vex} ").split(None, 1)
    name, operands = words[0], words[1] if len(words) > 1 else ""
    kinds = {"instructions"}
    if name.startswith("prefetch"):
        return kinds | {"prefetches"}
    if not name.startswith("v") or name == "vzeroupper":
        return kinds
    destination, _, sources = operands.partition(",")
    is_store = "[" in destination
    if "[" in sources:
        kinds.add("vector_loads")
    if is_store:
        kinds.add("vector_stores")
    if "[rsp" in operands or "[rbp" in operands:
        kinds.add("stack")
    # A broadcast from memory is a load and nothing else; one from a register is an operation.
    is_move = MOVE.match(name) is not None and ("broadcast" not in name or "[" in sources)
    if not is_move:
        kinds.add("vector_operations")
    if MULTIPLICATION.match(name):
        kinds.add("multiplications")
    return kinds


def disassemble(program: Path) -> dict[int, str]:
    """The instructions of the kernels in `program`, by address."""
    command = ["objdump", "-d", "--no-show-raw-insn", "-M", "intel", str(program)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[int, str] = {}
    is_kernel = False
    for line in listing.splitlines():
        if line.endswith(">:"):
            is_kernel = "edgemoe4simd" in line
        elif is_kernel and (match := re.match(r"\s+([0-9a-f]+):\s+(\S.*)", line)):
            found[int(match[1], 16)] = match[2]
    return found


def count(traced: Record, code: dict[int, str]) -> Record:
    """How many instructions of each kind ran in the kernels, from the addresses of `traced`."""
    totals: Record = {}
    for address, times in traced["counts"].items():
        instruction = code.get(int(address, 16))
        for kind in classify(instruction) if instruction else ():
            totals[kind] = totals.get(kind, 0) + times
    return totals


def bounds(totals: Record, macs: int, is_float: bool, isa: str) -> dict[str, float]:
    """The share of the peak that each of the machine's limits leaves, were it the only one."""
    cycles_at_peak = macs / (FLOAT_PEAK_MACS if is_float else PEAK_MACS)[isa]
    return {kind: cycles_at_peak * rate / totals[kind] for kind, rate in PER_CYCLE.items() if totals.get(kind)}


def trace(program: Path, name: str, isa: str, n_tokens: int, code: dict[int, str]) -> Record:
    """Counts of one kernel by single steps, with its bounds."""
    command = [str(program), name, isa, str(n_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"instructions: {' '.join(command)} failed: {done.stderr.strip()}")
    traced = json.loads(done.stdout)
    totals = count(traced, code)
    macs = traced["n_rows"] * traced["n_cols"] * n_tokens
    is_float = name.upper() in ("F16", "BF16")
    limits = bounds(totals, macs, is_float, isa)
    return {"format": name, "isa": isa, "n_tokens": n_tokens, "macs": macs, "counts": totals, "bounds": limits}


def callgrind(program: Path, name: str, isa: str, n_tokens: int) -> Record:
    """Instructions of one kernel as valgrind counts them. It runs AVX2 and what is older."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind.out"
        command = ["valgrind", "--tool=callgrind", "--toggle-collect=edgemoe::simd::MultiplyPanels*"]
        command += [f"--callgrind-out-file={out}", str(program), name, isa, str(n_tokens), "--untraced"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"instructions: {' '.join(command)} failed: {done.stderr.strip()[-500:]}")
        total = re.search(r"^(?:totals|summary): (\d+)", out.read_text(), re.MULTILINE)
    shape = json.loads(done.stdout)
    macs = shape["n_rows"] * shape["n_cols"] * n_tokens
    instructions = int(total[1]) if total else 0
    return {
        "format": name,
        "isa": isa,
        "n_tokens": n_tokens,
        "macs": macs,
        "counts": {"instructions": instructions},
        "bounds": {},
    }


def print_table(rows: list[Record]) -> None:
    """Per 64 multiply-adds (a 512-bit dot product's worth), then which limit allows how much of the peak."""
    kinds = ("instructions", "multiplications", "vector_operations", "vector_loads", "stack", "prefetches")
    print(f"{'isa':12}{'format':8}{'tokens':>7}{'/weight':>9}   per 64 multiply-adds: " + ", ".join(kinds))
    for row in rows:
        counts, per = row["counts"], row["macs"] / 64
        line = f"{row['isa']:12}{row['format'].upper():8}{row['n_tokens']:7}"
        line += f"{counts['instructions'] * row['n_tokens'] / row['macs']:9.3f}  "
        line += f"{counts['instructions'] / per:8.2f}"
        if row["bounds"]:  # valgrind counts nothing else
            line += "".join(f"{counts.get(kind, 0) / per:8.2f}" for kind in kinds[1:])
        lowest = min(row["bounds"].items(), key=lambda item: item[1], default=None)
        print(line + (f"   at most {lowest[1]:.2f} of the peak ({lowest[0].replace('_', ' ')})" if lowest else ""))


def main(arguments: list[str] | None = None) -> int:
    """Build, trace, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__.partition("\n")[0])
    parser.add_argument("--formats", nargs="+", default=list(kernels.FORMATS))
    parser.add_argument("--isa", nargs="+", default=list(ISAS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--callgrind", action="store_true", help="count with valgrind; avx2 and scalar only")
    parser.add_argument("--json", type=Path, help="also write the JSON line to this file")
    options = parser.parse_args(arguments)
    for tool in ("objdump", *(["valgrind"] if options.callgrind else [])):
        if shutil.which(tool) is None:
            sys.exit(f"instructions: {tool} is not installed")
    program = kernels.build("kernel_instructions")
    code = disassemble(program)
    cases = [(name, isa, n) for isa in options.isa for name in options.formats for n in options.tokens]
    if options.callgrind:
        rows = [callgrind(program, *case) for case in cases]
    else:
        rows = [trace(program, *case, code) for case in cases]
    print_table(rows)
    session.finish("instructions", options, results=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
