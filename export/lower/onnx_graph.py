"""An ONNX graph as it is written: nodes, constants, and their data in a file beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from pocketslm.models.tensors import Array

DType = Literal["fp32", "fp16"]
DATA_FILE = "model.onnx.data"
_ALIGNMENT = 4096  # of tensors in the data file: one page, so that each maps alone
_EXTERNAL_FROM = 1024  # bytes; smaller tensors stay inside the graph file


class DataFile:
    """The external data: tensors appended at page boundaries, each written once."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def add(self, name: str, array: Array) -> ir.TensorProtocol:
        if array.nbytes < _EXTERNAL_FROM:
            return ir.Tensor(array, name=name)
        self.file.write(b"\0" * (-self.file.tell() % _ALIGNMENT))
        offset = self.file.tell()
        self.file.write(np.ascontiguousarray(array).data)
        return _external(name, array, offset)


def _external(name: str, array: Array, offset: int) -> ir.ExternalTensor:
    """An array whose bytes begin at ``offset`` of the data file."""
    return ir.ExternalTensor(
        DATA_FILE,
        offset,
        array.nbytes,
        ir.DataType.from_numpy(array.dtype),
        shape=ir.Shape(array.shape),
        name=name,
    )


class GraphBuilder:
    """Nodes and constants of an ONNX graph as they come."""

    def __init__(self, dtype: DType, data: DataFile) -> None:
        self.data = data
        self.float = {"fp32": np.float32, "fp16": np.float16}[dtype]
        self.float_type = ir.DataType.from_numpy(np.dtype(self.float))
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.stored: dict[str, ir.TensorProtocol] = {}
        self.names: dict[str, int] = {}

    def _number(self, value: float) -> ir.Value:
        return self._constant(f"number_{value!r}", np.array(value, self.float))

    def _constant(
        self, name: str, array: Array, dtype: Any = None, content: str | None = None
    ) -> ir.Value:
        """An initializer, made once per name; constants of the same ``content`` share bytes."""
        if name in self.initializers:
            return self.initializers[name]
        array = array if dtype is None else array.astype(dtype, copy=False)
        shared = self.stored.get(content) if content is not None else None
        if isinstance(shared, ir.ExternalTensor):
            assert shared.offset is not None
            tensor: ir.TensorProtocol = _external(name, array, shared.offset)
        else:
            tensor = self.data.add(name, array)
            if content is not None:
                self.stored[content] = tensor
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(array.shape),
            const_value=tensor,
        )
        self.initializers[name] = value
        return value

    def _reshape(self, x: ir.Value, shape: list[int]) -> ir.Value:
        name = "shape_" + "_".join(map(str, shape))
        return self._op("Reshape", [x, self._constant(name, np.array(shape, np.int64))])

    def _op(self, kind: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        return self._ops(kind, inputs, outputs=(0,), **attributes)[0]

    def _ops(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        *,
        outputs: tuple[int, ...],
        domain: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        """Append a node; ``outputs`` are the positions that are wanted, others stay unnamed."""
        number = self.names.get(kind, 0)
        self.names[kind] = number + 1
        name = f"{kind}_{number}"
        node = ir.node(
            kind, inputs, attributes, domain=domain, num_outputs=max(outputs) + 1, name=name
        )
        for position, value in enumerate(node.outputs):
            value.name = f"{name}_out{position}" if position in outputs else ""
        self.nodes.append(node)
        return [node.outputs[position] for position in outputs]


def new_value(name: str, dtype: ir.DataType, shape: list[Any]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def describe(value: ir.Value, name: str, dtype: ir.DataType, shape: list[Any]) -> None:
    value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
