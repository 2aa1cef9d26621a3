"""The traced graph as ONNX over onnxruntime's contrib operators.

Names of inputs and outputs are those of onnxruntime-genai, which runs the result unchanged. The
operators are documented in onnxruntime's docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from pocketslm.export.lower.onnx_graph import (
    DATA_FILE,
    DataFile,
    DType,
    GraphBuilder,
    describe,
    new_value,
)
from pocketslm.export.lower.trace import Node, Traced
from pocketslm.export.lower.walk import Progress, Walk, WeightReader, is_op, refuse
from pocketslm.models import ops
from pocketslm.models.config import Layer, ModelConfig, ShortConv
from pocketslm.models.tensors import Array, QuantTensor, Weight, concat_rows, floats

GRAPH_FILE = "model.onnx"
OPSET, IR_VERSION = 21, 10
CONTRIB = "com.microsoft"
# MatMulNBits: 4 = activations are quantized to int8, block by block, inside the operator.
ACCURACY_LEVEL = 4
_INT64_MAX = np.iinfo(np.int64).max


def lower(
    traced: Traced,
    weights: WeightReader,
    folder: Path,
    *,
    dtype: DType = "fp32",
    progress: Progress = lambda done, total: None,
) -> list[str]:
    """Write ``model.onnx`` and ``model.onnx.data`` into ``folder``; what took another form.

    ``weights(name, shape)`` returns each parameter; quantized ones stay quantized. ``dtype`` is
    that of activations, scales and KV cache. ``progress`` is called with nodes done and in total.
    """
    with (folder / DATA_FILE).open("wb") as data:
        lowering = _Lowering(traced, weights, dtype, DataFile(data))
        model = lowering.run(progress)
    ir.save(model, folder / GRAPH_FILE)
    return lowering.notes()


@dataclass
class _Linear:
    """Parameters of a product ``x @ weight.T + bias``, perhaps stacked from several."""

    name: str
    weight: Weight
    bias: Array | None


class _Lowering(GraphBuilder, Walk):
    """One walk over the traced graph; ``values`` maps its nodes to ONNX values.

    A value of None is a linear that waits for its user, which may stack it with its siblings.
    """

    target = "ONNX"

    def __init__(self, traced: Traced, weights: WeightReader, dtype: DType, data: DataFile) -> None:
        Walk.__init__(self, traced, weights)
        GraphBuilder.__init__(self, dtype, data)
        self.values: dict[Node, Any] = {}
        self.group_sums: dict[tuple[ir.Value, int], ir.Value] = {}
        self.cached_positions: ir.Value | None = None

    def run(self, progress: Progress) -> ir.Model:
        inputs = self._inputs()
        self.walk(progress)
        graph = ir.Graph(
            inputs,
            self._outputs(),
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": OPSET, CONTRIB: 1},
            name=self.config.architecture,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="pocketslm")

    # Inputs and outputs, named as onnxruntime-genai names them.

    def _inputs(self) -> list[ir.Value]:
        c = self.config
        ids = new_value("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
        self.mask = new_value(
            "attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"]
        )
        # An input with a default: onnxruntime-genai need not know it, evaluation overrides it.
        self.keep = self._constant("logits_to_keep", np.array([1], np.int64))
        self.ids = self.values[self.traced.input_ids] = ids
        states, by_slot = [], {}
        for index, layer in enumerate(c.layers if c.causal else ()):  # an encoder keeps nothing
            for slot, (kind, shape) in enumerate(_states(layer, c, "past_sequence_length")):
                state = new_value(f"past_key_values.{index}.{kind}", self.float_type, shape)
                by_slot[index, slot] = state
                states.append(state)
        for node, slot_ in self.traced.states.items():
            self.values[node] = by_slot.get(slot_)
        # GroupQueryAttention wants the index of the last token and the length with it.
        total = self._op(
            "ReduceSum", [self.mask, self._constant("mask_axes", np.array([1], np.int64))]
        )
        last = self._op("Sub", [total, self._constant("one", np.array([1], np.int64))])
        self.last_index = self._op("Cast", [last], to=ir.DataType.INT32)
        size = self._op("Shape", [self.mask], start=1, end=2)
        self.total = self._op("Squeeze", [size])
        self.total_length = self._op("Cast", [self.total], to=ir.DataType.INT32)
        return [ids, self.mask, *states, self.keep]

    def _outputs(self) -> list[ir.Value]:
        c = self.config
        logits = self.values[self.traced.output]
        if self.float is not np.float32:
            logits = self._op("Cast", [logits], to=ir.DataType.FLOAT)
        # The literal 1 tells onnxruntime-genai that prefill returns the last position only.
        width = c.vocab_size if c.head else c.hidden_size
        describe(logits, "logits", ir.DataType.FLOAT, ["batch_size", 1, width])
        outputs = [logits]
        if not c.causal:
            return outputs
        for index, (layer, present) in enumerate(zip(c.layers, self.traced.present, strict=True)):
            kinds = _states(layer, c, "total_sequence_length")
            for (kind, shape), node in zip(kinds, present, strict=True):
                value = self.values[node]
                describe(value, f"present.{index}.{kind}", self.float_type, shape)
                outputs.append(value)
        return outputs

    # One method per operator of pocketslm.models.ops.

    def embedding(self, node: Node) -> None:
        ids, weight_node = node.args
        name, weight = self.parameter(weight_node)
        ids = self.values[ids]
        if not isinstance(weight, QuantTensor):
            table = self._constant(name, weight.astype(self.float, copy=False))
            self.values[node] = self._op("Gather", [table, ids])
            return
        rows = self._op(
            "GatherBlockQuantized",
            [self._codes(name, weight, flat=True), ids, *self._scales(name, weight)],
            domain=CONTRIB,
            bits=weight.bits,
            block_size=weight.group_size,
            quantize_axis=1,
        )
        if weight.minimums is not None:
            offsets = self._op("Gather", [self._offsets(name, weight), ids])
            grouped = self._reshape(rows, [0, 0, -1, weight.group_size])
            axes = self._constant("last_axis", np.array([-1], np.int64))
            shifted = self._op("Add", [grouped, self._op("Unsqueeze", [offsets, axes])])
            rows = self._reshape(shifted, [0, 0, weight.shape[1]])
        self.values[node] = rows

    def positions(self, node: Node) -> None:
        name, table = self.parameter(node.args[2])
        rows = self._op(
            "Gather", [self._constant(name, floats(table).astype(self.float)), self._positions()]
        )
        axes = self._constant("first_axis", np.array([0], np.int64))
        self.values[node] = self._op("Unsqueeze", [rows, axes])

    def linear(self, node: Node) -> None:
        if node in self.values:
            return  # emitted with a sibling
        readers = [_through(user, ops.rotary) for user in node.users]
        if len(readers) == 1 and self._stacks(readers[0]):
            self.values[node] = None
            return
        siblings = [user for user in node.args[0].users if is_op(user, ops.linear)]
        stacked = self._project(siblings) if len(siblings) > 1 else None
        if stacked is None:
            self.values[node] = self._project([node])
            return
        sizes = np.array([self.traced.widths[sibling] for sibling in siblings], np.int64)
        parts = self._ops(
            "Split",
            [stacked, self._constant("split_" + "_".join(map(str, sizes)), sizes)],
            outputs=tuple(range(len(siblings))),
            axis=-1,
        )
        self.values |= dict(zip(siblings, parts, strict=True))

    def _by_attention(self, node: Node) -> bool:
        """Whether attention does a rotation: if it reads it, and takes tables of this width."""
        if not is_op(node, ops.rotary) or not all(is_op(u, ops.attention) for u in node.users):
            return False
        pairs: int = self.traced.tables[node.args[1]][1].shape[1]
        return pairs % 8 == 0

    def _stacks(self, reader: Node) -> bool:
        """Whether an operator takes all products that it reads as one."""
        if is_op(reader, ops.attention):
            if not self.config.causal:
                return False
            parts = [n.args[0] if self._by_attention(n) else n for n in reader.args[:3]]
            return all(is_op(part, ops.linear) for part in parts)
        return is_op(reader, ops.gated)

    def rms_norm(self, node: Node) -> None:
        if node in self.values:  # the residual sum before it has emitted both
            return
        x, weight, eps = node.args
        value, heads = self.values[x], self.groups(node) > 1
        if heads:
            value = self._reshape(value, [0, 0, -1, self.traced.parameters[weight][1][0]])
        value = self._op(
            "SimplifiedLayerNormalization",
            [value, self._norm_weight(weight)],
            epsilon=eps,
            axis=-1,
            stash_type=1,
        )
        if heads:
            value = self._reshape(value, [0, 0, self.traced.widths[node]])
        self.values[node] = value

    def layer_norm(self, node: Node) -> None:
        x, weight, bias, eps = node.args
        inputs = [self.values[x], self._norm_weight(weight), self._norm_weight(bias)]
        self.values[node] = self._op("LayerNormalization", inputs, epsilon=eps, axis=-1)

    def add(self, node: Node) -> None:
        a, b = (self.values[arg] for arg in node.args)
        norms = [user for user in node.users if is_op(user, ops.rms_norm)]
        if len(norms) != 1:
            self.values[node] = self._op("Add", [a, b])
            return
        _, weight, eps = norms[0].args
        self.values[norms[0]], self.values[node] = self._ops(
            "SkipSimplifiedLayerNormalization",
            [a, b, self._norm_weight(weight)],
            outputs=(0, 3),
            domain=CONTRIB,
            epsilon=eps,
        )

    def scale(self, node: Node) -> None:
        x, factor = node.args
        self.values[node] = self._op("Mul", [self.values[x], self._number(factor)])

    def softcap(self, node: Node) -> None:
        x, cap = node.args
        inner = self._op("Tanh", [self._op("Div", [self.values[x], self._number(cap)])])
        self.values[node] = self._op("Mul", [inner, self._number(cap)])

    def activate(self, node: Node) -> None:
        x, kind = node.args
        self.values[node] = self._activated(self.values[x], kind)

    def gated(self, node: Node) -> None:
        *parts, kind = node.args
        gate_up = self._stacked(parts)
        gate: ir.Value | None
        up: ir.Value | None
        if gate_up is not None:
            gate, up = self._ops("Split", [gate_up], outputs=(0, 1), axis=-1, num_outputs=2)
        else:
            gate, up = (self._late(arg) for arg in parts)
        assert gate is not None
        self.values[node] = self._op("Mul", [self._activated(gate, kind), up])

    def _activated(self, x: ir.Value, kind: str) -> ir.Value:
        if kind == "silu":
            return self._op("QuickGelu", [x], domain=CONTRIB, alpha=1.0)
        if kind.startswith("gelu"):
            return self._op("Gelu", [x], approximate="tanh" if kind == "gelu_tanh" else "none")
        x = self._op("Relu", [x])
        return self._op("Mul", [x, x]) if kind == "relu2" else x

    def rotary(self, node: Node) -> None:
        """Rotated by the attention itself where nothing stands between."""
        if self._by_attention(node):
            return
        x, cos, sin, _, heads = node.args
        tables = [self._table(cos), self._table(sin)]
        dim = self.traced.tables[cos][1].shape[1] * 2
        batched = self._op(
            "Unsqueeze", [self._positions(), self._constant("first_axis", np.array([0], np.int64))]
        )
        shape = self._op("Shape", [self.ids])
        batched = self._op("Expand", [batched, shape])
        partial = {} if dim * heads == self.traced.widths[node] else {"rotary_embedding_dim": dim}
        self.values[node] = self._op(
            "RotaryEmbedding",
            [self._late(x), batched, *tables],
            domain=CONTRIB,
            num_heads=heads,
            **partial,
        )

    def temperature(self, node: Node) -> None:
        x, _, factor, step = node.args
        steps = self._constant(f"step_{step}", np.array([step], np.int64))
        one, axes = self._number(1.0), self._constant("last_axis", np.array([-1], np.int64))
        passed = self._op("Div", [self._positions(), steps])
        passed = self._op("Cast", [passed], to=self.float_type)
        grown = self._op(
            "Mul", [self._op("Log", [self._op("Add", [passed, one])]), self._number(factor)]
        )
        factors = self._op("Unsqueeze", [self._op("Add", [grown, one]), axes])
        self.values[node] = self._op("Mul", [self._late(x), factors])

    def attention(self, node: Node) -> None:
        q, k, v, past_k, past_v, heads, kv_heads, scale, window, softcap, causal = node.args
        if not causal:
            self._encode(node)
            return
        tables: list[ir.Value | None] = [None, None]
        if self._by_attention(q) and self._by_attention(k):
            tables = [self._table(q.args[1]), self._table(q.args[2])]
            q, k = q.args[0], k.args[0]
        packed = self._stacked((q, k, v))
        qkv = [packed, None, None] if packed is not None else [self._late(n) for n in (q, k, v)]
        options: dict[str, Any] = {"do_rotary": int(tables[0] is not None)}
        options |= {} if window is None else {"local_window_size": window}
        options |= {} if softcap is None else {"softcap": softcap}
        self.values[node] = self._ops(
            "GroupQueryAttention",
            [
                *qkv,
                self.values[past_k],
                self.values[past_v],
                self.last_index,
                self.total_length,
                *tables,
            ],
            outputs=(0, 1, 2),
            domain=CONTRIB,
            num_heads=heads,
            kv_num_heads=kv_heads,
            scale=scale,
            **options,
        )

    def _encode(self, node: Node) -> None:
        """Attention of every token to all of its text, which is there at once."""
        q, k, v, _, _, heads, kv_heads, scale, window, softcap, _ = node.args
        if heads != kv_heads or window is not None or softcap is not None:
            raise refuse(self.target, "an encoder with shared heads, a window or capped scores")
        if self.float is not np.float32:
            raise refuse(self.target, "an encoder's attention computes in fp32, choose that dtype")
        out = self._op(
            "MultiHeadAttention",
            [self._late(part) for part in (q, k, v)],
            domain=CONTRIB,
            num_heads=heads,
            scale=scale,
        )
        self.values[node] = [out, None, None]

    def short_conv(self, node: Node) -> None:
        b, c, x, taps, bias, past = node.args
        name, weight = self.parameter(taps)
        weight = floats(weight)
        columns = self._op("Mul", [self.values[b], self.values[x]])
        columns = self._op("Transpose", [columns], perm=[0, 2, 1])
        columns = self._op("Concat", [self.values[past], columns], axis=2)
        inputs = [columns, self._constant(name, weight[:, None].astype(self.float))]
        if bias is not None:
            bias_name, array = self.vector(bias)
            inputs.append(self._constant(bias_name, array.astype(self.float)))
        out = self._op("Conv", inputs, group=len(weight), kernel_shape=[weight.shape[1]])
        out = self._op("Mul", [self.values[c], self._op("Transpose", [out], perm=[0, 2, 1])])
        starts = self._constant(
            f"back_{weight.shape[1]}", np.array([1 - weight.shape[1]], np.int64)
        )
        ends = self._constant("to_the_end", np.array([_INT64_MAX], np.int64))
        axes = self._constant("columns_axis", np.array([2], np.int64))
        self.values[node] = [out, self._op("Slice", [columns, starts, ends, axes])]

    def last_tokens(self, node: Node) -> None:
        ends = self._constant("to_the_end", np.array([_INT64_MAX], np.int64))
        axes = self._constant("mask_axes", np.array([1], np.int64))
        starts = self._op("Neg", [self.keep])
        self.values[node] = self._op("Slice", [self.values[node.args[0]], starts, ends, axes])

    def getitem(self, node: Node) -> None:
        source, index = node.args
        self.values[node] = self.values[source][index]

    def _positions(self) -> ir.Value:
        """Positions of the new tokens [S] as int64."""
        if self.cached_positions is None:
            length = self._op("Squeeze", [self._op("Shape", [self.ids], start=1, end=2)])
            start = self._op("Sub", [self.total, length])
            step = self._constant("step", np.array(1, np.int64))
            self.cached_positions = self._op("Range", [start, self.total, step])
        return self.cached_positions

    # Products.

    def _stacked(self, nodes: Sequence[Any]) -> ir.Value | None:
        """One product for waiting linear nodes of the same input, if their schemes agree."""
        if any(not is_op(n, ops.linear) or self.values[n] is not None for n in nodes):
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
        name, weight = self.parameter(weight_node)
        bias = None if bias_node is None else self.vector(bias_node)[1]
        return _Linear(name, weight, None if bias is None else bias.astype(self.float))

    def _product(self, x: ir.Value, linear: _Linear) -> ir.Value:
        name, weight = linear.name, linear.weight
        if not isinstance(weight, QuantTensor):
            return self._matmul_t(x, self._constant(name, weight.astype(self.float, copy=False)))
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

    def _norm_weight(self, node: Node) -> ir.Value:
        name, weight = self.vector(node)
        return self._constant(name, weight.astype(self.float))

    def _table(self, node: Node) -> ir.Value:
        name, array = self.traced.tables[node]
        return self._constant(f"{name}_cache", array, self.float)

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
    rows = sum(weight.shape[0] for weight in weights)
    weight: Weight = concat_rows(quantized, rows) if quantized else np.concatenate(arrays)
    given = [bias for bias in biases if bias is not None]
    bias = np.concatenate(given) if given else None
    return _Linear("+".join(part.name for part in parts), weight, bias)


def _through(node: Node, operator_: Any) -> Node:
    """The one reader of a node of this kind, else the node."""
    return next(iter(node.users)) if is_op(node, operator_) and len(node.users) == 1 else node


def _states(layer: Layer, c: ModelConfig, positions: str) -> list[tuple[str, list[Any]]]:
    """Name and shape of each state of a layer."""
    if (a := layer.attention) is not None:
        shape = ["batch_size", a.kv_heads, positions, a.head_dim]
        return [("key", shape), ("value", list(shape))]
    assert isinstance(layer.mixer, ShortConv)
    return [("conv", ["batch_size", c.hidden_size, layer.mixer.taps - 1])]
