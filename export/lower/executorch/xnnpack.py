"""A graph for ExecuTorch's XNNPACK delegate, node by node.

The classes are those of its backends/xnnpack/serialization/schema.fbs. Positions in the sequence
are the second axis of every activation; their number is only known when the graph runs.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as xnn
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import (
    serialize_xnnpack_binary,
)

from pocketslm.models.tensors import Array

BACKEND = "XnnpackBackend"
ANY = 1  # positions, where a shape must say a number; the first run replaces it
_NONE = 2**32 - 1  # no value, not external
_NAMED = 2**64 - 1  # an offset that means: look the key up
_INPUT, _OUTPUT = 1, 2

# Puts named data into the file and returns its key.
Store = Callable[[str, Array], str]


@dataclass(frozen=True)
class Filter:
    """Rows [N, K] of a product, as XNNPACK holds them.

    codes: int8 [N, K] (one scale a row [N]), packed int4 [N, K / 2] whose zero is 8 (one scale for
    each group of ``group_size`` columns, bfloat16 as uint16 [N, K / group]), or float32 [N, K].
    """

    codes: Array
    scales: Array | None = None
    group_size: int = 0

    @functools.cached_property
    def digest(self) -> str:
        """Tells filters apart by what they hold."""
        return _digest(self.codes) + ("" if self.scales is None else _digest(self.scales))

    @property
    def shape(self) -> tuple[int, int]:
        rows, stored = self.codes.shape
        return rows, stored * 2 if self.group_size else stored


class Segment:
    """The operators between two that XNNPACK does not have. Values are known by index."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._graph = xnn.XNNGraph("0", [], [], 0, [], [], [xnn.ConstantDataOffset(0, 0)])
        self._shapes: list[tuple[int, ...]] = []
        self._quantized: dict[int, int] = {}
        self._inputs: dict[int, int] = {}  # program value -> value here

    # Borders.

    def input(self, value: int, shape: Sequence[int]) -> int:
        """What enters from the program."""
        if value not in self._inputs:
            tensor = self._tensor(shape, external=len(self._inputs), flags=_INPUT)
            self._graph.input_ids.append(tensor)
            self._inputs[value] = tensor
        return self._inputs[value]

    def shape(self, value: int) -> tuple[int, ...]:
        return self._shapes[value]

    def finish(self, outputs: dict[int, int]) -> tuple[bytes, list[int]]:
        """The compiled graph and its arguments; ``outputs``: value here -> program value."""
        for position, value in enumerate(outputs):
            tensor = self._graph.xvalues[value].xvalue_union
            tensor.external_id, tensor.flags = len(self._inputs) + position, _OUTPUT
            self._graph.output_ids.append(value)
        self._graph.num_externs = len(self._inputs) + len(outputs)
        graph = serialize_xnnpack_binary(self._graph, bytearray())
        return graph, [*self._inputs, *outputs.values()]

    # Operators.

    def unary(self, kind: Any, x: int) -> int:
        out = self._tensor(self._shapes[x])
        return self._node(kind(x, out, 0), out)

    def binary(self, kind: Any, a: int, b: int) -> int:
        out = self._tensor(np.broadcast_shapes(self._shapes[a], self._shapes[b]))
        return self._node(kind(a, b, out, 0), out)

    def add(self, a: int, b: int) -> int:
        return self.binary(xnn.XNNAdd, a, b)

    def multiply(self, a: int, b: int) -> int:
        return self.binary(xnn.XNNMultiply, a, b)

    def reshape(self, x: int, shape: Sequence[int]) -> int:
        """``shape`` has a 0 where the number of positions goes."""
        out = self._tensor([size or ANY for size in shape])
        return self._node(xnn.XNNStaticReshape(len(shape), list(shape), x, out, 0), out)

    def transpose(self, x: int, order: Sequence[int]) -> int:
        out = self._tensor([self._shapes[x][axis] for axis in order])
        return self._node(xnn.XNNStaticTranspose(len(order), list(order), x, out, 0), out)

    def matrix_product(self, a: int, b: int) -> int:
        """``a @ b`` of [batch, n, k] and [batch, k, m]."""
        out = self._tensor([*self._shapes[a][:-1], self._shapes[b][-1]])
        return self._node(xnn.XNNBatchMatrixMultiply(a, b, out, 0), out)

    def slice_last(self, x: int, start: int, stop: int) -> int:
        """Columns of the last axis."""
        shape = self._shapes[x]
        rank = len(shape)
        out = self._tensor([*shape[:-1], stop - start])
        offsets, sizes = [0] * (rank - 1) + [start], [0] * (rank - 1) + [stop - start]
        return self._node(xnn.XNNStaticSlice(rank, offsets, sizes, x, out, 0), out)

    def concatenate_last(self, a: int, b: int) -> int:
        shape = self._shapes[a]
        out = self._tensor([*shape[:-1], shape[-1] + self._shapes[b][-1]])
        axis = len(shape) - 1
        return self._node(xnn.XNNConcatenate2(axis, a, b, _NONE, _NONE, out, 0, _NONE), out)

    def linear(self, x: int, name: str, weight: Filter, bias: Array | None = None) -> int:
        """``x @ weight.T + bias``; activations become int8, one scale a position, for codes."""
        if weight.scales is not None:
            x = self._dynamic(x)
        filter_ = self._filter(name, weight)
        added = _NONE if bias is None else self._bias(f"{name}.bias", bias)
        out = self._tensor([*self._shapes[x][:-1], weight.shape[0]])
        return self._node(xnn.XNNFullyConnected(x, filter_, added, out, 0), out)

    # Values.

    def _bias(self, name: str, array: Array) -> int:
        array = array.astype(np.float32)
        return self._tensor(array.shape, data=self._data(f"{name}.{_digest(array)}", array))

    def _dynamic(self, x: int) -> int:
        """x in int8, quantized as it comes; once, however many products read it."""
        if x not in self._quantized:
            out = self._tensor(
                self._shapes[x],
                xnn.XNNDatatype.xnn_datatype_qdint8,
                quantization=xnn.PerTokenDynamicQuant(num_nonbatch_dims=1),
            )
            self._quantized[x] = self._node(xnn.XNNConvert(x, out, 0), out)
        return self._quantized[x]

    def _filter(self, name: str, weight: Filter) -> int:
        # XNNPACK may keep packed weights by their names, those of all programs in a process.
        name = f"{name}.{weight.digest}"
        data = self._data(name, weight.codes)
        if weight.scales is None:
            return self._tensor(weight.shape, data=data)
        count, scales = weight.scales.size, self._data(f"{name}.scales", weight.scales)
        if weight.group_size:
            datatype = xnn.XNNDatatype.xnn_datatype_qbint4
            quantization: Any = xnn.PerChannelGroupQuant(
                [], 0, weight.group_size, scale_buffer_idx=scales, num_scales=count
            )
        else:
            datatype = xnn.XNNDatatype.xnn_datatype_qcint8
            quantization = xnn.PerChannelQuant([], 0, scales, count)
        return self._tensor(weight.shape, datatype, data=data, quantization=quantization)

    def _data(self, key: str, array: Array) -> int:
        named = self._store(key, array)
        self._graph.constant_data.append(xnn.ConstantDataOffset(_NAMED, array.nbytes, named))
        return len(self._graph.constant_data) - 1

    def _tensor(
        self,
        shape: Sequence[int],
        datatype: Any = xnn.XNNDatatype.xnn_datatype_fp32,
        *,
        data: int = 0,
        external: int = _NONE,
        flags: int = 0,
        quantization: Any = None,
    ) -> int:
        index = len(self._graph.xvalues)
        dims = [int(size) for size in shape]
        value: Any = xnn.XNNTensorValue(datatype, len(dims), dims, data, external, flags, index)
        if quantization is not None:
            value = xnn.XNNQuantizedTensorValue(value, quantization)
        self._graph.xvalues.append(xnn.XValue(value))
        self._shapes.append(tuple(dims))
        return index

    def _node(self, node: Any, out: int) -> int:
        self._graph.xnodes.append(xnn.XNode(node, len(self._graph.xnodes)))
        return out


def _digest(array: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()[:16]
