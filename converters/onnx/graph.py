# SPDX-License-Identifier: MIT
"""An ONNX graph under construction: nodes, small constants inside of the file, and places of large ones in files
beside it.

A large tensor is only described here. A `Job` says how its bytes come to be once the files are written, so a graph is
complete, and its size known, before the first weight is read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgemoe.errors import ConversionError

try:
    from onnx import TensorProto, helper, numpy_helper
except ImportError as error:
    raise ConversionError(f"cannot import onnx: {error}; pip install 'edgemoe[convert]'") from error

ALIGNMENT_BYTES = 4096
"""Where tensors in files of their own begin: pages, as direct reads and mappings want them."""

OPSET, MICROSOFT_OPSET, IR_VERSION = 21, 1, 10
MICROSOFT = "com.microsoft"
DENSE, EXPERTS = "model.onnx.data", "experts.bin"
FLOAT, FLOAT16, BFLOAT16 = int(TensorProto.FLOAT), int(TensorProto.FLOAT16), int(TensorProto.BFLOAT16)
UINT8, INT32, INT64 = int(TensorProto.UINT8), int(TensorProto.INT32), int(TensorProto.INT64)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor lies."""

    file: str
    offset: int
    n_bytes: int


class Writer(Protocol):
    """What a job writes to."""

    def write(self, place: Place, at: int, data: npt.NDArray[Any]) -> None:
        """Put the array's bytes, in C order, at byte `at` of the place."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Fills some tensors of `n_bytes` together."""

    n_bytes: int
    run: Callable[[Writer], None]


class Graph:
    """See the module. Values are named by strings, as in ONNX."""

    def __init__(self) -> None:
        self.scope = "model"
        self.jobs: list[Job] = []
        self.file_bytes: dict[str, int] = {}
        self._nodes: list[Any] = []
        self._initializers: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._n_named: dict[str, int] = {}
        self._stored: set[str] = set()

    def input(self, name: str, data_type: int, shape: Sequence[int | str]) -> str:
        """An input of the model; axes of a name may have any size."""
        self._inputs.append(helper.make_tensor_value_info(name, data_type, list(shape)))
        return name

    def output(self, name: str, data_type: int, shape: Sequence[int | str]) -> None:
        """Make a value an output of the model."""
        self._outputs.append(helper.make_tensor_value_info(name, data_type, list(shape)))

    def nodes(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: int | Sequence[str] = 1,
        *,
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Add a node.

        Args:
            op_type, domain, attributes: as ONNX has them.
            inputs: values; "" leaves one out.
            outputs: how many, or their names.

        Returns:
            the names of the outputs.
        """
        name = self._unique(f"{self.scope}.{op_type}")
        names = [f"{name}:{i}" for i in range(outputs)] if isinstance(outputs, int) else list(outputs)
        self._nodes.append(helper.make_node(op_type, list(inputs), names, name, domain=domain, **attributes))
        return names

    def node(self, op_type: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output, and return its name."""
        return self.nodes(op_type, inputs, domain=domain, **attributes)[0]

    def constant(self, values: npt.ArrayLike, dtype: npt.DTypeLike = np.float32) -> str:
        """A small constant inside of the file; equal ones are the same."""
        array = np.ascontiguousarray(np.asarray(values, dtype))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = name = f"constant.{len(self._constants)}"
            self._initializers.append(numpy_helper.from_array(array, name))
        return self._constants[key]

    def reshape(self, value: str, *shape: int) -> str:
        """With another shape: 0 keeps an axis, -1 is what remains."""
        return self.node("Reshape", value, self.constant(shape, np.int64))

    def stored(self, name: str, data_type: int, shape: Sequence[int], file: str = DENSE) -> Place:
        """Describe a tensor in a file of its own; a job has to fill it."""
        assert name not in self._stored  # a matrix may be an embedding and the output's, under names of their own
        self._stored.add(name)
        offset = -(-self.file_bytes.get(file, 0) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        place = Place(file, offset, math.prod(shape) * _item_bytes(data_type))
        self.file_bytes[file] = offset + place.n_bytes
        tensor = TensorProto(name=name, data_type=data_type, dims=list(shape), data_location=TensorProto.EXTERNAL)
        for key, value in (("location", file), ("offset", offset), ("length", place.n_bytes)):
            tensor.external_data.add(key=key, value=str(value))
        self._initializers.append(tensor)
        return place

    @property
    def initializers(self) -> tuple[Any, ...]:
        """All constants, as `TensorProto`: small ones with their values, others with their places."""
        return tuple(self._initializers)

    def serialize(self) -> bytes:
        """The .onnx file."""
        graph = helper.make_graph(self._nodes, "decoder", self._inputs, self._outputs, self._initializers)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, MICROSOFT_OPSET)]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgemoe", producer_version=""
        )
        data: bytes = model.SerializeToString(deterministic=True)
        return data

    def _unique(self, name: str) -> str:
        n_same = self._n_named.get(name, 0)
        self._n_named[name] = n_same + 1
        return f"{name}.{n_same}" if n_same else name


def _item_bytes(data_type: int) -> int:
    return int(helper.tensor_dtype_to_np_dtype(data_type).itemsize)
