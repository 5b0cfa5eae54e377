# SPDX-License-Identifier: MIT
"""What is planned for a folder that `convert onnx` wrote is what ONNX Runtime takes: not less, and not much more."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for package in ("torch", "transformers", "safetensors.torch", "tokenizers", "onnx", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed (the extras edgemoe[verify,onnx])")

import onnx

from benchmarks.cgroup import CgroupError, MemoryCgroup
from edgemoe.converters.onnx.checkpoint import Recipe, export_checkpoint, plan_export
from edgemoe.formats.onnx_model import read_model
from edgemoe.onnx_plan import kv_bytes
from edgemoe.onnx_plan import plan as plan_onnx
from tests.converters import checkpoints
from tests.integration.support import said

MIB = 1 << 20
N_VOCAB, HIDDEN = 32768, 512

# argv: model, budget (0: the floor). Prints the plan, and what the process has really taken beside slots.
CHILD = """
import dataclasses, json, sys
import numpy as np
from edgemoe import host
from edgemoe.formats.onnx_model import read_model
from edgemoe.onnx import InferenceSession
from edgemoe.onnx_plan import plan
from tests.converters.onnx_checkpoints import Runner
from pathlib import Path
path, memory = sys.argv[1], int(sys.argv[2])
memory = memory or plan(read_model(Path(path))).floor_bytes + (1 << 20)
session = InferenceSession(path, memory=memory)
loaded = host.process_rss_bytes()
run = Runner(session)
rng = np.random.default_rng(0)
run(rng.integers(0, 32768, 16))
sums = []
for _ in range(10):
    sums.append(float(np.abs(run(rng.integers(0, 32768, 1))).sum()))
print(json.dumps({**dataclasses.asdict(session.plan), "memory": memory, "loaded": loaded, "sums": sums,
                  "own": session.plan.own_bytes, "now": host.process_rss_bytes(), "peak": host.peak_rss_bytes(),
                  "slots": session.stats().slots_bytes}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model with a large vocabulary, by how its dense part is stored; `int4 a4` asks for less accuracy."""
    root = tmp_path_factory.mktemp("plan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        changes = {"vocab_size": N_VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 1}
        checkpoint = checkpoints.write_checkpoint(root / "checkpoint", "olmoe", **changes)
    found = {}
    for dense in ("int4", "int8", "fp32"):
        found[dense] = root / dense
        export_checkpoint(plan_export(checkpoint.path, Recipe(dense=dense)), found[dense])
    for bits in ("int4", "int8"):
        model = onnx.load(found[bits] / "model.onnx", load_external_data=False)
        for node in model.graph.node:
            if node.op_type == "MatMulNBits":
                node.attribute.append(onnx.helper.make_attribute("accuracy_level", 4))
        found[f"{bits} a4"] = found[bits]
        (found[bits] / "a4.onnx").write_bytes(model.SerializeToString())
    return {name: path / ("a4.onnx" if name.endswith("a4") else "model.onnx") for name, path in found.items()}


def _run(path: Path, memory: int, group: MemoryCgroup | None = None) -> Any:
    return said(CHILD, path, memory, group=group)


@pytest.mark.parametrize("dense", ["int4", "int4 a4", "int8", "int8 a4", "fp32"])
def test_the_plan_is_what_onnx_runtime_takes(dense: str, folders: dict[str, Path]) -> None:
    """Guards against: an embedding counted whole of which a run reads some rows, which refuses a budget that is
    enough; and copies that ONNX Runtime repacks, or decodes in each run, counted too small, which breaks one."""
    found = _run(folders[dense], 4 << 30)
    taken = found["peak"] - found["process_bytes"]
    planned = found["own"] + max(found["expert_bank_bytes"], found["repack_bytes"])
    # Beside it, this process has the logits; and one run may touch more rows than are left to it afterwards.
    assert taken <= planned + 8 * MIB
    # Short runs use little of the workspace and few rows, and not each session takes all that one may.
    assert taken >= planned - found["workspace_bytes"] - found["rows_bytes"] - 16 * MIB
    embedding = N_VOCAB * HIDDEN * 9 // 8
    assert found["mapped_bytes"] == pytest.approx(embedding, abs=MIB)


@pytest.mark.parametrize("dense", ["int4 a4", "int8"])
def test_the_floor_of_the_plan_runs_in_a_cgroup_of_its_size(dense: str, folders: dict[str, Path]) -> None:
    """Guards against: a plan below what the kernel charges, which ends the process."""
    here = _run(folders[dense], 0)
    try:
        group = MemoryCgroup(f"edgemoe-test-{os.getpid()}", here["memory"])
    except CgroupError as error:
        pytest.skip(str(error))
    with group:
        found = _run(folders[dense], here["memory"], group)
    assert found["sums"] == here["sums"]
    assert max(here["peak"], found["peak"]) <= here["memory"]


ROWS = """
import json, re, sys
import numpy as np
from edgemoe.onnx import InferenceSession
from tests.converters.onnx_checkpoints import Runner
path, memory = sys.argv[1], int(sys.argv[2])
session = InferenceSession(path, memory=memory)

def mapped():
    text = open("/proc/self/smaps").read()
    data = re.findall(r"model\\.onnx\\.data\\nSize: +(\\d+) kB.*?\\nRss: +(\\d+) kB", text, re.DOTALL)
    return [sum(int(size) for size, _ in data) << 10, sum(int(rss) for _, rss in data) << 10]

found, sums = [], []
tokens = np.random.default_rng(0).permutation(32768)
for i in (*range(8), 0):
    sums.append(float(np.abs(Runner(session)(tokens[i * 512 : (i + 1) * 512])).sum()))
    found.append(mapped())
print(json.dumps([session.plan.rows_bytes, session.plan.mapped_bytes, found, sums]))
"""


def test_rows_of_an_embedding_are_given_back(folders: dict[str, Path]) -> None:
    """Guards against: an embedding that is planned as a few rows and is in memory as a whole after some texts."""
    rows_bytes, mapped_bytes, found, sums = said(ROWS, folders["int4"], 8 << 30)
    assert mapped_bytes > rows_bytes
    for size_bytes, resident_bytes in found:
        others_bytes = size_bytes - mapped_bytes  # scales of other matrices
        assert others_bytes >= 0 and resident_bytes <= others_bytes + rows_bytes, found
    assert sums[-1] == sums[0] and len(set(sums)) == 8


def test_cache_of_a_context(folders: dict[str, Path]) -> None:
    """Guards against: a cache that is not part of the plan, or of another size than what a run is given."""
    model = read_model(folders["int4"])
    config = json.loads((folders["int4"].parent / "genai_config.json").read_text())["model"]["decoder"]
    per_token = 2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_size"]
    assert kv_bytes(model, 1000) == 1000 * per_token
    assert plan_onnx(model, cache_bytes=12345).kv_bytes == 12345
