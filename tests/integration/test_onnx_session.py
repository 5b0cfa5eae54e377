# SPDX-License-Identifier: MIT
"""`edgemoe.onnx.InferenceSession`: onnxruntime's interface, a budget that holds, and errors that say what is wrong."""

from __future__ import annotations

import concurrent.futures
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from edgemoe.errors import BackendError, BudgetError, ExpertReadError, ModelFormatError
from edgemoe.onnx import InferenceSession
from tests.integration.onnx_models import Shape, relative_error, write_model
from tests.integration.support import said

MIB = 1 << 20


def test_it_is_a_session_of_onnxruntime(tmp_path: Path) -> None:
    """Guards against: code written for onnxruntime that does not take our session."""
    model = write_model(tmp_path / "model.onnx", Shape())
    session = InferenceSession(model.path, memory="4GiB")
    assert isinstance(session, onnxruntime.InferenceSession)
    assert [i.name for i in session.get_inputs()] == ["x", "router0"]
    assert "EdgeMoEExecutionProvider" in session.get_providers()
    feed = model.feed(3)
    binding = session.io_binding()
    for name, value in feed.items():
        binding.bind_cpu_input(name, value)
    binding.bind_output("y0")
    session.run_with_iobinding(binding)
    np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[0], session.run(["y0"], feed)[0])
    with pytest.raises(ValueError, match="router0"):
        session.run(None, {"x": feed["x"]})


def test_the_budget_changes_while_the_session_lives(tmp_path: Path) -> None:
    """Guards against: a budget that only counts at the beginning, or a refused one that is half applied."""
    model = write_model(tmp_path / "model.onnx", Shape(n_layers=2, n_experts=32, hidden=512, inter=512))
    session = InferenceSession(model.path, memory="4GiB")
    feed = model.feed(40)
    expected = session.run(None, feed)[0]
    largest = session.stats()
    assert largest.slots_bytes >= session.plan.expert_bank_bytes
    with pytest.raises(BudgetError, match=r"below the floor of .* give at least [0-9]+ bytes") as refused:
        session.set_memory("40MiB")
    floor = int(str(refused.value).split()[-2])
    assert session.stats().slots_bytes == largest.slots_bytes
    assert session.stats().budget_bytes == 4 << 30
    session.set_memory(floor + 2 * MIB)
    assert session.stats().slots_bytes < largest.slots_bytes
    np.testing.assert_array_equal(session.run(None, feed)[0], expected)


def test_a_budget_below_the_floor_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    """Guards against: a budget that cannot be met found out after gigabytes were read, or without a number."""
    model = write_model(tmp_path / "model.onnx", Shape())
    with pytest.raises(BudgetError, match=r"below the floor of .* give at least [0-9]+ bytes") as refused:
        InferenceSession(model.path, memory=64 * MIB)
    floor = int(str(refused.value).split()[-2])
    InferenceSession(model.path, memory=floor + 2 * MIB).run(None, model.feed(2))


CHILD = """
import json, sys
import numpy as np
from edgemoe import host
from edgemoe.onnx import InferenceSession
path, extra = sys.argv[1], int(sys.argv[2])
before = host.process_rss_bytes()
budget = before + extra
session = InferenceSession(path, memory=budget)
rng = np.random.default_rng(0)
for n_tokens in [1] * 24 + [48] * 2:
    feed = {"x": rng.standard_normal((n_tokens, 1024), dtype=np.float32)}
    for layer in range(2):
        feed[f"router{layer}"] = rng.standard_normal((n_tokens, 32), dtype=np.float32)
    session.run(None, feed)
print(json.dumps({"before": before, "budget": budget, **session.stats().to_dict()}))
"""


def test_the_process_stays_within_the_budget(tmp_path: Path) -> None:
    """Guards against: ONNX Runtime touching the experts itself, slots beyond the budget, a workspace nobody counted."""
    shape = Shape(n_layers=2, n_experts=32, hidden=1024, inter=1024, block=64)
    model = write_model(tmp_path / "model.onnx", shape)
    bank_bytes = (tmp_path / "model.onnx.data").stat().st_size
    extra = 96 * MIB
    assert bank_bytes > 100 * MIB
    stats = said(CHILD, model.path, extra)
    assert stats["peak_rss_bytes"] <= stats["budget"]
    assert stats["slots_bytes"] < bank_bytes // 2
    # Streamed, and more than once, or there was nothing to hold.
    assert stats["expert_bytes_read"] > bank_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps is Linux's")
def test_onnx_runtime_never_has_the_experts(tmp_path: Path) -> None:
    """Guards against: constants that ONNX Runtime keeps although the node is ours. Mapped and never touched they cost
    no memory, so that no budget shows it; but where it cannot map a file, or converts constants, it reads them all."""
    model = write_model(tmp_path / "model.onnx", Shape(n_layers=2))
    session = InferenceSession(model.path, memory="4GiB")
    session.run(None, model.feed(3))
    data = str(tmp_path / "model.onnx.data")
    assert data not in Path("/proc/self/maps").read_text()
    stock = onnxruntime.InferenceSession(model.path)
    assert data in Path("/proc/self/maps").read_text()
    del stock


def test_missing_and_short_external_data_is_named(tmp_path: Path) -> None:
    """Guards against: a crash, or zeros, where the file of the experts is not all there."""
    model = write_model(tmp_path / "model.onnx", Shape())
    data = tmp_path / "model.onnx.data"
    with data.open("r+b") as file:
        file.truncate(data.stat().st_size - 100)
    with pytest.raises(ModelFormatError, match=r"ends at byte \d+: its file has \d+ .*truncated"):
        InferenceSession(model.path)
    data.unlink()
    with pytest.raises(ModelFormatError, match="cannot find the external data of tensor"):
        InferenceSession(model.path)


def test_places_past_the_end_and_wrong_lengths_are_named(tmp_path: Path) -> None:
    """Guards against: offsets of a corrupt model used as they are."""
    model = write_model(tmp_path / "model.onnx", Shape())
    proto = onnx.load(model.path, load_external_data=False)
    for key, value, named in (
        ("offset", "1000000000", "truncated"),
        ("offset", "x", "not a number"),
        ("length", "7", "7 bytes"),
    ):
        changed = onnx.ModelProto()
        changed.CopyFrom(proto)
        next(e for e in changed.graph.initializer[0].external_data if e.key == key).value = value
        (tmp_path / "changed.onnx").write_bytes(changed.SerializeToString())
        with pytest.raises(ModelFormatError, match=named):
            InferenceSession(tmp_path / "changed.onnx")


def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    """Guards against: a crash or a hang of our own reader on a damaged header."""
    with pytest.raises(ModelFormatError, match="cannot open the model"):
        InferenceSession(tmp_path / "absent.onnx")
    model = write_model(tmp_path / "model.onnx", Shape())
    whole = model.path.read_bytes()
    for n_bytes in (0, 1, 7, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.onnx").write_bytes(whole[:n_bytes])
        with pytest.raises((ModelFormatError, BackendError)):
            InferenceSession(tmp_path / "cut.onnx")
    with pytest.raises(ModelFormatError, match="given as"):
        InferenceSession(whole)  # type: ignore[arg-type]


def test_experts_inside_of_the_model_are_refused_with_a_budget_and_run_without(tmp_path: Path) -> None:
    """Guards against: a budget that holds in name only, and a model of old that no longer runs."""
    model = write_model(tmp_path / "model.onnx", Shape(), size_threshold=1 << 30)
    with pytest.raises(BackendError, match=r"lies inside the \.onnx file; save the model with external data"):
        InferenceSession(model.path, memory="4GiB")
    with pytest.warns(UserWarning, match="1 MoE nodes are not streamed"):
        session = InferenceSession(model.path)
    assert session.stats().n_streamed_nodes == 0
    feed = model.feed(4)
    assert relative_error(session.run(None, feed)[0], model.reference(feed)) < 1e-5


def _save(graph: onnx.GraphProto, path: Path) -> Path:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save_model(proto, path, save_as_external_data=True, location=path.name + ".data", size_threshold=0)
    return path


def test_experts_inside_of_a_branch_are_refused_with_a_budget(tmp_path: Path) -> None:
    """Guards against: a node of a subgraph left to stock kernels in silence."""
    model = write_model(tmp_path / "model.onnx", Shape())
    proto = onnx.load(model.path)
    moe, add = proto.graph.node
    then = helper.make_graph([moe], "then", [], [helper.make_tensor_value_info("q0", TensorProto.FLOAT, None)])
    same = helper.make_node("Identity", ["x"], ["z"])
    other = helper.make_graph([same], "else", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)])
    branch = helper.make_node("If", ["c"], ["q0"], "branch", then_branch=then, else_branch=other)
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    graph = helper.make_graph(
        [branch, add], "g", [*proto.graph.input, condition], proto.graph.output, proto.graph.initializer
    )
    path = _save(graph, tmp_path / "branch.onnx")
    with pytest.raises(BackendError, match=r"node moe0 .* inside of a Loop, If or Scan"):
        InferenceSession(path, memory="4GiB")


def test_two_threads_run_one_session(tmp_path: Path) -> None:
    """Guards against: runs that write to each other's workspace."""
    model = write_model(tmp_path / "model.onnx", Shape(n_layers=2, hidden=128, inter=256))
    session = InferenceSession(model.path)
    feeds = [model.feed(n, seed=n) for n in (1, 2, 7, 30)]
    expected = [session.run(None, feed)[0] for feed in feeds]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda i: session.run(None, feeds[i % 4])[0], range(64))
        for found, bits in zip(results, expected * 16, strict=True):
            np.testing.assert_array_equal(found, bits)


def test_providers_are_named(tmp_path: Path) -> None:
    """Guards against: a provider that is not there left out in silence."""
    model = write_model(tmp_path / "model.onnx", Shape())
    session = InferenceSession(model.path, providers=["CPUExecutionProvider"])
    assert session.get_providers() == ["EdgeMoEExecutionProvider", "CPUExecutionProvider"]
    with pytest.raises(BackendError, match="no device for the execution provider QNNExecutionProvider"):
        InferenceSession(model.path, providers=["QNNExecutionProvider"])


def test_inputs_of_wrong_shape_are_errors(tmp_path: Path) -> None:
    """Guards against: reading past the end of an input with fewer columns or rows than the model has."""
    model = write_model(tmp_path / "model.onnx", Shape())
    session = InferenceSession(model.path)
    feed = model.feed(4)
    with pytest.raises(BackendError, match="columns, expected"):
        session.run(None, {**feed, "x": feed["x"][:, :32]})
    with pytest.raises(BackendError, match=r"expected \[4, 8\]"):
        session.run(None, {**feed, "router0": feed["router0"][:2]})
    assert relative_error(session.run(None, feed)[0], model.reference(feed)) < 1e-5


def test_a_file_that_shrinks_is_an_error_and_the_session_goes_on(tmp_path: Path) -> None:
    """Guards against: experts of zeros, a fallback to stock kernels, or a session that never recovers."""
    model = write_model(tmp_path / "model.onnx", Shape(k=8))
    data = tmp_path / "model.onnx.data"
    whole = data.read_bytes()
    session = InferenceSession(model.path)
    with data.open("r+b") as file:
        file.truncate(8192)
    feed = model.feed(2)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in feed.items()}
    with pytest.raises(ExpertReadError, match="expert"):
        session.run(None, feed)
    with pytest.raises(ExpertReadError, match="expert"):
        session.run_with_ort_values(None, values)
    with data.open("r+b") as file:
        file.write(whole)
    np.testing.assert_array_equal(session.run_with_ort_values(None, values)[0].numpy(), session.run(None, feed)[0])
    assert relative_error(session.run(None, feed)[0], model.reference(feed)) < 1e-5
