"""The traced graph as an ExecuTorch program: XNNPACK segments, llama's cache and attention.

ExecuTorch's own export reaches such a program through torch.export, source transformations,
decompositions and a partitioner that runs the graph again for each of their passes; minutes of
that go into finding the very patterns that are known here from the start. So the program is
written down directly: what lies between two attentions is one XNNPACK graph, embedding, cache and
attention are kernels that every LLM build of ExecuTorch has.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as xnn

from pocketslm.export.lower.executorch.filters import holds_bfloat16, product_form, row_form
from pocketslm.export.lower.executorch.program import ProgramBuilder, llm_metadata
from pocketslm.export.lower.executorch.xnnpack import ANY, BACKEND, Filter, Segment
from pocketslm.export.lower.trace import Traced
from pocketslm.models import ops
from pocketslm.models.config import ModelConfig
from pocketslm.models.tensors import Array, QuantTensor, Weight

GRAPH_FILE = "model.pte"
_INT64_MAX = 2**63 - 1
_INT8, _FLOAT = 1, 6  # torch's numbers for int8 and float32
# torch.fx.Node; its arguments are typed so widely that each use would need a cast.
Node = Any
WeightReader = Callable[[str, tuple[int, ...]], Weight]


def lower(
    traced: Traced,
    config: ModelConfig,
    weights: WeightReader,
    path: Path,
    *,
    context: int,
    bos: int,
    eos: list[int],
    int8_cache: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Write the ``.pte``: forward(tokens [1, n], start [1]) -> logits [1, 1, V] of the last token.

    The methods beside it tell ExecuTorch's LLM runner what it asks for. The KV cache is fp32, or
    int8 with a scale for each head and position. ``progress`` is called with nodes done and in
    total. Returns notes on what XNNPACK cannot hold as it was.
    """
    lowering = _Lowering(traced, config, weights, context, int8_cache)
    lowering.run(path, bos, eos, progress)
    return [
        f"executorch: {count} matrices: {what}" for what, count in lowering.changes.items() if count
    ]


class _Lowering:
    """One walk over the traced graph.

    Of a node's value, ``inside`` knows the index in the open segment, ``outside`` that in the
    program.
    """

    def __init__(
        self,
        traced: Traced,
        config: ModelConfig,
        weights: WeightReader,
        context: int,
        int8_cache: bool,
    ) -> None:
        self.traced, self.config, self.weights, self.context = traced, config, weights, context
        self.int8_cache = int8_cache
        self.program = ProgramBuilder()
        self.segment = Segment(self.program.named)
        self.inside: dict[Node, int] = {}
        self.outside: dict[Node, int] = {}
        self.done: set[Node] = set()
        self.forms: dict[str, tuple[Filter, Array | None]] = {}
        self.sums: dict[tuple[Node, int], int] = {}
        self.changes: Counter[str] = Counter()

    def run(
        self, path: Path, bos: int, eos: list[int], progress: Callable[[int, int], None]
    ) -> None:
        emitters: dict[Any, Callable[[Node], None]] = {
            ops.embedding: self._embedding,
            ops.linear: self._linear,
            ops.rms_norm: self._rms_norm,
            ops.swiglu: self._swiglu,
            ops.attention: self._attention,
            ops.last_tokens: self._last_tokens,
            torch.ops.aten.add.Tensor: self._add,
            operator.getitem: self._getitem,
        }
        inputs = self._inputs()
        nodes = list(self.traced.graph.nodes)
        for done, node in enumerate(nodes, 1):
            if node.op == "call_function":
                if node.target not in emitters:
                    raise AssertionError(f"no ExecuTorch lowering for {node.target}")
                emitters[node.target](node)
                self.done.add(node)
            progress(done, len(nodes))
        logits = nodes[-1].args[0][0]
        self._close()
        metadata = llm_metadata(self.config, self.context, bos, eos)
        self.program.write(path, inputs, [self.outside[logits]], metadata)

    def _inputs(self) -> list[int]:
        """Tokens and start; where the sequence stands, and the rotary tables from there."""
        p = self.program
        tokens = p.tensor([1, self.context], "int64")
        start = p.tensor([1], "int64", dynamic=False)
        placeholders = {n.name: n for n in self.traced.graph.nodes if n.op == "placeholder"}
        self.outside[placeholders[self.traced.input_ids]] = tokens
        self.start, length, end = p.number(), p.number(), p.number()
        p.call("aten::_local_scalar_dense.", start, self.start)
        p.call("aten::sym_size.int", tokens, p.literal(1), length)
        p.call("executorch_prim::add.Scalar", self.start, length, end)
        cos, sin = (table for _, table in sorted(self.traced.buffers.items()))
        # Both halves of a head at once: x * [cos, cos] + (x with its halves swapped) * [-sin, sin]
        both = {
            "cos": np.concatenate([cos, cos], 1)[:, None],
            "sin": np.concatenate([-sin, sin], 1)[:, None],
        }
        self.rope = []
        for name, table in both.items():
            rows = p.tensor([self.context, 1, table.shape[2]])
            source = p.constant(name, table.astype(np.float32))
            first, step = p.literal(0), p.literal(1)
            p.call("aten::slice_copy.Tensor_out", source, first, self.start, end, step, rows, rows)
            self.rope.append(rows)
        return [tokens, start]

    # One method per operator of pocketslm.models.ops.

    def _embedding(self, node: Node) -> None:
        ids, weight_node = node.args
        name, weight = self._parameter(weight_node)
        p = self.program
        out = p.tensor([1, self.context, self.config.hidden_size])
        tokens = self.outside[ids]
        none = p.literal(None)
        if not isinstance(weight, QuantTensor):
            table = p.constant(name, weight.astype(np.float32))
            no = p.literal(False)
            p.call("aten::embedding.out", table, tokens, p.literal(-1), no, no, out, out)
        else:
            bits, codes, scales = self._table(name, weight)
            low, high = p.literal(-(2 ** (bits - 1))), p.literal(2 ** (bits - 1) - 1)
            kind = "byte" if bits == 8 else "4bit"
            operator_ = f"quantized_decomposed::embedding_{kind}.dtype_out"
            arguments = [codes, scales, none, low, high, tokens, p.literal(_FLOAT), out, out]
            p.call(operator_, *arguments)
        self.outside[node] = out

    def _linear(self, node: Node) -> None:
        x, weight_node, bias_node = node.args
        name, weight = self._parameter(weight_node)
        bias = None if bias_node is None else self._vector(bias_node)[1]
        filter_, offsets = self._product_form(name, weight)
        out = self.segment.linear(self._in(x), name, filter_, bias)
        if offsets is not None:
            sums = self._group_sums(x, filter_.group_size)
            out = self.segment.add(
                out, self.segment.linear(sums, f"{name}.offsets", Filter(offsets))
            )
        self.inside[node] = out

    def _group_sums(self, x: Node, group: int) -> int:
        """Sums over groups of x [1, n, K]: [1, n, K / group], as a product with ones."""
        if (x, group) not in self.sums:
            size = self.segment.shape(self._in(x))[-1]
            ones = np.repeat(np.eye(size // group, dtype=np.float32), group, axis=1)
            name = f"ones.{size}.{group}"
            self.sums[x, group] = self.segment.linear(self._in(x), name, Filter(ones))
        return self.sums[x, group]

    def _rms_norm(self, node: Node) -> None:
        x, weight_node, eps = node.args
        s, value = self.segment, self._in(x)
        size = s.shape(value)[-1]
        # XNNPACK has no mean over the last axis that goes with a dynamic one: a product is one.
        mean = Filter(np.full((1, size), 1 / size, np.float32))
        variance = s.linear(
            s.unary(xnn.XNNSquare, value), "mean", mean, np.array([eps], np.float32)
        )
        normalized = s.multiply(value, s.unary(xnn.XNNReciprocalSquareRoot, variance))
        # As an input: XNNPACK's cache of packed weights lets go of constants that are not packed.
        factor = s.input(self.program.constant(*self._vector(weight_node)), [size])
        self.inside[node] = s.multiply(normalized, factor)

    def _add(self, node: Node) -> None:
        a, b = node.args
        self.inside[node] = self.segment.add(self._in(a), self._in(b))

    def _swiglu(self, node: Node) -> None:
        s = self.segment
        gate, up = (self._in(arg) for arg in node.args)
        silu = s.multiply(gate, s.unary(xnn.XNNSigmoid, gate))
        self.inside[node] = s.multiply(silu, up)

    def _attention(self, node: Node) -> None:
        q, k, v, _, _, _, _, heads, kv_heads, scale = node.args
        p, size = self.program, self.config.head_dim
        query, key = self._rotate(self._in(q), heads), self._rotate(self._in(k), kv_heads)
        value = self.segment.reshape(self._in(v), [1, 0, kv_heads, size])
        shape = [1, self.context, heads, size]
        cached = [1, self.context, kv_heads, size]
        made = {query: p.tensor(shape), key: p.tensor(cached), value: p.tensor(cached)}
        self._close(made)
        q = [part for part, _, _ in self._held(made[query], shape)]
        k, v = ([self._append(*part) for part in self._held(made[x], cached)] for x in (key, value))
        options = [p.literal(None), p.literal(0.0), p.literal(True), p.literal(float(scale))]
        kind, grids = "custom_sdpa", []
        if self.int8_cache:
            kind, grids = "custom_quantized_sdpa", [*q[1:], *k[1:], *v[1:], p.literal(False)]
        out = p.tensor(shape)
        p.call(f"llama::{kind}.out", q[0], k[0], v[0], self.start, *options, *grids, out, out)
        self.outside[node] = out

    def _append(self, new: int, shape: list[int], dtype: str) -> int:
        """The cache whose next positions ``new`` becomes."""
        p = self.program
        cache, unused = p.state(shape, dtype), p.tensor([1], dynamic=False)
        p.call("llama::update_cache.out", new, cache, self.start, unused, unused)
        return cache

    def _held(self, value: int, shape: list[int]) -> list[tuple[int, list[int], str]]:
        """What attention reads of a value, with shape and type: itself, or int8 codes with a zero
        point and a scale for each head and position."""
        if not self.int8_cache:
            return [(value, shape, "float32")]
        p, grid = self.program, [*shape[:-1], 1]
        codes, zeros, scales = p.tensor(shape, "int8"), p.tensor(grid, "int8"), p.tensor(grid)
        wide_scales, wide_zeros = p.tensor(grid, "float64"), p.tensor(grid, "int64")
        low, high, int8 = p.literal(-128), p.literal(127), p.literal(_INT8)
        of_grid = [wide_scales, wide_zeros]
        p.call(
            "quantized_decomposed::choose_qparams_per_token_asymmetric.out",
            *[value, int8, *of_grid, p.literal(None)],
        )
        p.call(
            "quantized_decomposed::quantize_per_token.out",
            *[value, *of_grid, low, high, int8, codes, codes],
        )
        for wide, narrow in ((wide_zeros, zeros), (wide_scales, scales)):
            p.call("aten::_to_copy.out", wide, p.literal(False), p.literal(None), narrow, narrow)
        return [(codes, shape, "int8"), (zeros, grid, "int8"), (scales, grid, "float32")]

    def _rotate(self, x: int, heads: int) -> int:
        s, size = self.segment, self.config.head_dim
        x = s.reshape(x, [1, 0, heads, size])
        cos, sin = (s.input(table, [ANY, 1, size]) for table in self.rope)
        swapped = s.concatenate_last(
            s.slice_last(x, size // 2, size), s.slice_last(x, 0, size // 2)
        )
        return s.add(s.multiply(x, cos), s.multiply(swapped, sin))

    def _getitem(self, node: Node) -> None:
        source, index = node.args
        if index:  # the longer cache, which stays where it is
            return
        heads, size = source.args[7], self.config.head_dim
        out = self.segment.input(self.outside[source], [1, ANY, heads, size])
        self.inside[node] = self.segment.reshape(out, [1, 0, heads * size])

    def _last_tokens(self, node: Node) -> None:
        """The last one: what the runner reads, whatever count was traced."""
        x = node.args[0]
        self._close()
        p = self.program
        out = p.tensor([1, 1, self.config.hidden_size], dynamic=False)
        start, end = p.literal(-1), p.literal(_INT64_MAX)
        axis = step = p.literal(1)
        p.call("aten::slice_copy.Tensor_out", self.outside[x], axis, start, end, step, out, out)
        self.outside[node] = out

    # Values.

    def _in(self, node: Node) -> int:
        """The value of a node within the open segment."""
        if node not in self.inside:
            shape = (1, ANY, self.config.hidden_size)
            self.inside[node] = self.segment.input(self.outside[node], shape)
        return self.inside[node]

    def _close(self, more: dict[int, int] | None = None) -> None:
        """Hand the open segment to XNNPACK, with what later nodes read as its outputs."""
        outputs = dict(more or {})
        for node, value in self.inside.items():
            if node not in self.outside and any(user not in self.done for user in node.users):
                size = self.segment.shape(value)[-1]
                last = size == self.config.vocab_size
                self.outside[node] = self.program.tensor([1, 1 if last else self.context, size])
                outputs[value] = self.outside[node]
        if outputs:
            self.program.delegate(BACKEND, *self.segment.finish(outputs))
        self.segment = Segment(self.program.named)
        self.inside.clear()
        self.sums.clear()

    # Parameters.

    def _parameter(self, node: Node) -> tuple[str, Weight]:
        name, shape = self.traced.parameters[node.name]
        return name, self.weights(name, shape)

    def _vector(self, node: Node) -> tuple[str, Array]:
        name, weight = self._parameter(node)
        assert not isinstance(weight, QuantTensor)
        return name, weight.astype(np.float32)

    def _product_form(self, name: str, weight: Weight) -> tuple[Filter, Array | None]:
        """Made once for a tied embedding and head; counts what is lost."""
        if name not in self.forms:
            self.forms[name] = product_form(weight)
            filter_ = self.forms[name][0]
            if isinstance(weight, QuantTensor) and not filter_.group_size:
                self.changes[f"{weight.scheme} was rounded to int8 with one scale a row"] += 1
            elif isinstance(weight, QuantTensor) and not holds_bfloat16(weight.scales):
                self.changes["scales were rounded to bfloat16"] += 1
        return self.forms[name]

    def _table(self, name: str, weight: QuantTensor) -> tuple[int, int, int]:
        """Bits, codes and scales for a lookup of rows."""
        p = self.program
        filter_, offsets = self._product_form(name, weight)
        if filter_.group_size and offsets is None:
            # A byte's high nibble is the even column here, the low one in a product.
            swapped = (filter_.codes >> 4) | (filter_.codes << 4)
            return 4, p.constant(name, swapped), p.constant(f"{name}.scales", weight.scales)
        if filter_.group_size:
            filter_ = row_form(weight)
        assert filter_.scales is not None
        return 8, p.constant(name, filter_.codes), p.constant(f"{name}.scales", filter_.scales)
