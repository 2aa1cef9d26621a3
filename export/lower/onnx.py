"""The traced graph as ONNX over onnxruntime's contrib operators.

Names of inputs and outputs are those of onnxruntime-genai, which runs the result unchanged. The
operators are documented in onnxruntime's docs/ContribOperators.md.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch

from pocketslm.export.lower.trace import Traced
from pocketslm.models import ops
from pocketslm.models.config import ModelConfig
from pocketslm.models.tensors import Array, QuantTensor, Weight, concat_rows

DType = Literal["fp32", "fp16"]
GRAPH_FILE, DATA_FILE = "model.onnx", "model.onnx.data"
OPSET, IR_VERSION = 21, 10
CONTRIB = "com.microsoft"
# MatMulNBits: 4 = activations are quantized to int8, block by block, inside the operator.
ACCURACY_LEVEL = 4
_ALIGNMENT = 4096  # of tensors in the data file: one page, so that each maps alone
_EXTERNAL_FROM = 1024  # bytes; smaller tensors stay inside the graph file
_INT64_MAX = np.iinfo(np.int64).max

# torch.fx.Node; its arguments are typed so widely that each use would need a cast.
Node = Any
WeightReader = Callable[[str, tuple[int, ...]], Weight]


def lower(
    traced: Traced,
    config: ModelConfig,
    weights: WeightReader,
    folder: Path,
    *,
    dtype: DType = "fp32",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write ``model.onnx`` and ``model.onnx.data`` into ``folder``.

    ``weights(name, shape)`` returns each parameter; quantized ones stay quantized. ``dtype`` is
    that of activations, scales and KV cache. ``progress`` is called with nodes done and in total.
    """
    with (folder / DATA_FILE).open("wb") as data:
        lowering = _Lowering(traced, config, weights, dtype, _DataFile(data))
        model = lowering.run(progress)
    ir.save(model, folder / GRAPH_FILE)


class _DataFile:
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


@dataclass
class _Linear:
    """Parameters of a product ``x @ weight.T + bias``, perhaps stacked from several."""

    name: str
    weight: Weight
    bias: Array | None


class _Lowering:
    """One walk over the traced graph; ``values`` maps its nodes to ONNX values."""

    def __init__(
        self,
        traced: Traced,
        config: ModelConfig,
        weights: WeightReader,
        dtype: DType,
        data: _DataFile,
    ) -> None:
        self.traced, self.config, self.weights, self.data = traced, config, weights, data
        self.float = {"fp32": np.float32, "fp16": np.float16}[dtype]
        self.float_type = ir.DataType.from_numpy(np.dtype(self.float))
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.values: dict[Node, Any] = {}
        self.group_sums: dict[tuple[ir.Value, int], ir.Value] = {}
        self.stored: dict[str, ir.TensorProtocol] = {}
        self.names: dict[str, int] = {}

    def run(self, progress: Callable[[int, int], None]) -> ir.Model:
        inputs = self._inputs()
        emitters: dict[Any, Callable[[Node], Any]] = {
            ops.embedding: self._embedding,
            ops.linear: self._linear,
            ops.rms_norm: self._rms_norm,
            ops.swiglu: self._swiglu,
            ops.attention: self._attention,
            ops.last_tokens: self._last_tokens,
            torch.ops.aten.add.Tensor: self._add,
            operator.getitem: self._getitem,
        }
        nodes = list(self.traced.graph.nodes)
        for done, node in enumerate(nodes, 1):
            if node.op == "call_function":
                if node.target not in emitters:
                    raise AssertionError(f"no ONNX lowering for {node.target}")
                self.values[node] = emitters[node.target](node)
            progress(done, len(nodes))
        graph = ir.Graph(
            inputs,
            self._outputs(nodes[-1]),
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": OPSET, CONTRIB: 1},
            name=self.config.architecture,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="pocketslm")

    # Inputs and outputs, named as onnxruntime-genai names them.

    def _inputs(self) -> list[ir.Value]:
        c = self.config
        ids = _value("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
        mask = _value("attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"])
        # An input with a default: onnxruntime-genai need not know it, evaluation overrides it.
        self.keep = self._constant("logits_to_keep", np.array([1], np.int64))
        placeholders = {n.name: n for n in self.traced.graph.nodes if n.op == "placeholder"}
        self.values[placeholders[self.traced.input_ids]] = ids
        caches = []
        for layer, names in enumerate(self.traced.past):
            heads = c.layers[layer].num_key_value_heads
            shape = ["batch_size", heads, "past_sequence_length", c.head_dim]
            for kind, name in zip(("key", "value"), names, strict=True):
                cache = _value(f"past_key_values.{layer}.{kind}", self.float_type, shape)
                self.values[placeholders[name]] = cache
                caches.append(cache)
        # GroupQueryAttention wants the index of the last token and the length with it.
        total = self._op("ReduceSum", [mask, self._constant("mask_axes", np.array([1], np.int64))])
        last = self._op("Sub", [total, self._constant("one", np.array([1], np.int64))])
        self.last_index = self._op("Cast", [last], to=ir.DataType.INT32)
        size = self._op("Shape", [mask], start=1, end=2)
        scalar = self._op("Squeeze", [size])
        self.total_length = self._op("Cast", [scalar], to=ir.DataType.INT32)
        return [ids, mask, *caches, self.keep]

    def _outputs(self, output: Node) -> list[ir.Value]:
        c = self.config
        logits, *present = (self.values[node] for node in output.args[0])
        if self.float is not np.float32:
            logits = self._op("Cast", [logits], to=ir.DataType.FLOAT)
        # The literal 1 tells onnxruntime-genai that prefill returns the last position only.
        _describe(logits, "logits", ir.DataType.FLOAT, ["batch_size", 1, c.vocab_size])
        for index, value in enumerate(present):
            heads = c.layers[index // 2].num_key_value_heads
            shape = ["batch_size", heads, "total_sequence_length", c.head_dim]
            kind = "key" if index % 2 == 0 else "value"
            _describe(value, f"present.{index // 2}.{kind}", self.float_type, shape)
        return [logits, *present]

    # One method per operator of pocketslm.models.ops.

    def _embedding(self, node: Node) -> ir.Value:
        ids, weight_node = node.args
        name, weight = self._parameter(weight_node)
        ids = self.values[ids]
        if not isinstance(weight, QuantTensor):
            return self._op("Gather", [self._constant(name, weight.astype(self.float)), ids])
        rows = self._op(
            "GatherBlockQuantized",
            [self._codes(name, weight, flat=True), ids, *self._scales(name, weight)],
            domain=CONTRIB,
            bits=weight.bits,
            block_size=weight.group_size,
            quantize_axis=1,
        )
        if weight.minimums is None:
            return rows
        offsets = self._op("Gather", [self._offsets(name, weight), ids])
        grouped = self._reshape(rows, [0, 0, -1, weight.group_size])
        axes = self._constant("last_axis", np.array([-1], np.int64))
        shifted = self._op("Add", [grouped, self._op("Unsqueeze", [offsets, axes])])
        return self._reshape(shifted, [0, 0, weight.shape[1]])

    def _linear(self, node: Node) -> ir.Value | None:
        users = list(node.users)
        if len(users) == 1 and users[0].target in (ops.attention, ops.swiglu):
            return None  # emitted by its user, which may stack it with its siblings
        return self._project([node])

    def _rms_norm(self, node: Node) -> ir.Value:
        x, weight, eps = node.args
        if node in self.values:  # the residual sum before it has emitted both
            value: ir.Value = self.values[node]
            return value
        return self._op(
            "SimplifiedLayerNormalization",
            [self.values[x], self._norm_weight(weight)],
            epsilon=eps,
            axis=-1,
            stash_type=1,
        )

    def _add(self, node: Node) -> ir.Value:
        a, b = (self.values[arg] for arg in node.args)
        norms = [user for user in node.users if user.target is ops.rms_norm]
        if len(norms) != 1:
            return self._op("Add", [a, b])
        _, weight, eps = norms[0].args
        normalized, total = self._ops(
            "SkipSimplifiedLayerNormalization",
            [a, b, self._norm_weight(weight)],
            outputs=(0, 3),
            domain=CONTRIB,
            epsilon=eps,
        )
        self.values[norms[0]] = normalized
        return total

    def _swiglu(self, node: Node) -> ir.Value:
        gate_up = self._stacked(node.args)
        gate: ir.Value | None
        up: ir.Value | None
        if gate_up is not None:
            gate, up = self._ops("Split", [gate_up], outputs=(0, 1), axis=-1, num_outputs=2)
        else:
            gate, up = (self._late(arg) for arg in node.args)
        return self._op("Mul", [self._op("QuickGelu", [gate], domain=CONTRIB, alpha=1.0), up])

    def _attention(self, node: Node) -> list[ir.Value]:
        q, k, v, past_k, past_v, cos, sin, heads, kv_heads, scale = node.args
        packed = self._stacked((q, k, v))
        qkv = [packed, None, None] if packed is not None else [self._late(n) for n in (q, k, v)]
        return self._ops(
            "GroupQueryAttention",
            [
                *qkv,
                self.values[past_k],
                self.values[past_v],
                self.last_index,
                self.total_length,
                self._table(cos),
                self._table(sin),
            ],
            outputs=(0, 1, 2),
            domain=CONTRIB,
            num_heads=heads,
            kv_num_heads=kv_heads,
            scale=scale,
            do_rotary=1,
        )

    def _last_tokens(self, node: Node) -> ir.Value:
        ends = self._constant("to_the_end", np.array([_INT64_MAX], np.int64))
        axes = self._constant("mask_axes", np.array([1], np.int64))
        starts = self._op("Neg", [self.keep])
        return self._op("Slice", [self.values[node.args[0]], starts, ends, axes])

    def _getitem(self, node: Node) -> ir.Value:
        source, index = node.args
        value: ir.Value = self.values[source][index]
        return value

    # Products.

    def _stacked(self, nodes: Sequence[Any]) -> ir.Value | None:
        """One product for linear nodes that read the same input, if their schemes agree."""
        if any(n.target is not ops.linear or len(n.users) != 1 for n in nodes):
            return None
        return self._project(nodes) if len({n.args[0] for n in nodes}) == 1 else None

    def _late(self, node: Node) -> ir.Value | None:
        """The value of a node, emitted now if it is a linear that waited for its user."""
        return self._project([node]) if self.values[node] is None else self.values[node]

    def _project(self, nodes: Sequence[Node]) -> ir.Value | None:
        """``x @ weight.T + bias`` for the stacked parameters; None if they cannot be stacked."""
        linear = _stack([self._linear_parameters(node) for node in nodes])
        if linear is None:
            return None
        x = self.values[nodes[0].args[0]]
        out = self._product(x, linear)
        if linear.bias is not None:
            out = self._op("Add", [out, self._constant(f"{linear.name}.bias", linear.bias)])
        return out

    def _linear_parameters(self, node: Node) -> _Linear:
        _, weight_node, bias_node = node.args
        name, weight = self._parameter(weight_node)
        bias = None if bias_node is None else self._parameter(bias_node)[1]
        assert not isinstance(bias, QuantTensor)
        return _Linear(name, weight, None if bias is None else bias.astype(self.float))

    def _product(self, x: ir.Value, linear: _Linear) -> ir.Value:
        name, weight = linear.name, linear.weight
        if not isinstance(weight, QuantTensor):
            return self._matmul_t(x, self._constant(name, weight.astype(self.float)))
        out = self._op(
            "MatMulNBits",
            [x, self._codes(name, weight, flat=False), *self._scales(name, weight)],
            domain=CONTRIB,
            bits=weight.bits,
            block_size=weight.group_size,
            N=weight.shape[0],
            K=weight.shape[1],
            accuracy_level=ACCURACY_LEVEL,
        )
        if weight.minimums is None:
            return out
        # A float zero point would take MatMulNBits off its fast path. What the integer zero
        # leaves over is one constant a group, so it multiplies the sum of x over that group.
        sums = self._sums(x, weight.group_size)
        return self._op("Add", [out, self._matmul_t(sums, self._offsets(name, weight))])

    def _matmul_t(self, x: ir.Value, weight: ir.Value) -> ir.Value:
        return self._op("FusedMatMul", [x, weight], domain=CONTRIB, transB=1)

    def _sums(self, x: ir.Value, group: int) -> ir.Value:
        """Sums of x [B, S, K] over groups of K: [B, S, K / group], computed once per x."""
        if (x, group) not in self.group_sums:
            grouped = self._reshape(x, [0, 0, -1, group])
            axes = self._constant("last_axis", np.array([-1], np.int64))
            self.group_sums[x, group] = self._op("ReduceSum", [grouped, axes], keepdims=0)
        return self.group_sums[x, group]

    # Constants.

    def _parameter(self, node: Node) -> tuple[str, Weight]:
        name, shape = self.traced.parameters[node.name]
        return name, self.weights(name, shape)

    def _norm_weight(self, node: Node) -> ir.Value:
        name, weight = self._parameter(node)
        assert not isinstance(weight, QuantTensor)
        return self._constant(name, weight.astype(self.float))

    def _table(self, node: Node) -> ir.Value:
        return self._constant(f"{node.name}_cache", self.traced.buffers[node.name], self.float)

    def _codes(self, name: str, weight: QuantTensor, *, flat: bool) -> ir.Value:
        """Codes as [N, groups, bytes] for a product, [N, bytes] for a lookup.

        A tied embedding and head are two constants over the same bytes of the data file.
        """
        n, k = weight.shape
        groups = k // weight.group_size
        shape = (n, weight.codes.shape[1]) if flat else (n, groups, weight.codes.shape[1] // groups)
        suffix = "codes2d" if flat else "codes"
        return self._constant(f"{name}.{suffix}", weight.codes.reshape(shape), content=name)

    def _scales(self, name: str, weight: QuantTensor) -> list[ir.Value]:
        """Scales, and zero points if there are any: the last inputs of both operators."""
        scales = [self._constant(f"{name}.scales", weight.scales, self.float)]
        if weight.zero_points is None:
            return scales
        zeros = weight.zero_points
        if weight.bits == 4:  # packed like the codes, an odd last group padded
            padded = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))
            zeros = padded[:, 0::2] | (padded[:, 1::2] << 4)
        return [*scales, self._constant(f"{name}.zero_points", zeros)]

    def _offsets(self, name: str, weight: QuantTensor) -> ir.Value:
        """What the operators' own zero of 2^(bits-1) leaves of the minimums: [N, groups]."""
        assert weight.minimums is not None
        zero = np.float32(2 ** (weight.bits - 1))
        offsets = weight.minimums.astype(np.float32) + zero * weight.scales.astype(np.float32)
        return self._constant(f"{name}.offsets", offsets, self.float)

    def _constant(
        self, name: str, array: Array, dtype: Any = None, content: str | None = None
    ) -> ir.Value:
        """An initializer, made once per name; constants of the same ``content`` share bytes."""
        if name in self.initializers:
            return self.initializers[name]
        array = array if dtype is None else array.astype(dtype)
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

    # Nodes.

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


def _stack(parts: list[_Linear]) -> _Linear | None:
    """Rows of several products under each other; None where their schemes differ."""
    if len(parts) == 1:
        return parts[0]
    weights = [part.weight for part in parts]
    biases = [part.bias for part in parts]
    if len({bias is None for bias in biases}) != 1:
        return None
    quantized = [weight for weight in weights if isinstance(weight, QuantTensor)]
    if quantized and len(quantized) != len(weights):
        return None
    if len({(weight.scheme, weight.scales.dtype) for weight in quantized}) > 1:
        return None
    arrays = [weight for weight in weights if not isinstance(weight, QuantTensor)]
    weight: Weight = concat_rows(quantized) if quantized else np.concatenate(arrays)
    given = [bias for bias in biases if bias is not None]
    bias = np.concatenate(given) if given else None
    return _Linear("+".join(part.name for part in parts), weight, bias)


def _value(name: str, dtype: ir.DataType, shape: list[Any]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _describe(value: ir.Value, name: str, dtype: ir.DataType, shape: list[Any]) -> None:
    value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
