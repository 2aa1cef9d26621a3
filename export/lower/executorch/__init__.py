"""The traced graph as an ExecuTorch program: XNNPACK segments, llama's cache and attention.

ExecuTorch's own export reaches such a program through torch.export, source transformations,
decompositions and a partitioner that runs the graph again for each of their passes; minutes of
that go into finding the very patterns that are known here from the start. So the program is
written down directly: what lies between two attentions is one XNNPACK graph, embedding, cache and
attention are kernels that every LLM build of ExecuTorch has.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as xnn

from pocketslm.export.lower.executorch.filters import holds_bfloat16, product_form, row_form
from pocketslm.export.lower.executorch.program import ProgramBuilder, llm_metadata
from pocketslm.export.lower.executorch.xnnpack import ANY, BACKEND, Filter, Segment
from pocketslm.export.lower.trace import Node, Traced
from pocketslm.export.lower.walk import Progress, Walk, WeightReader, refuse
from pocketslm.models.tensors import Array, QuantTensor, Weight, floats

GRAPH_FILE = "model.pte"
_INT64_MAX = 2**63 - 1
_INT8, _FLOAT = 1, 6  # torch's numbers for int8 and float32


def lower(
    traced: Traced,
    weights: WeightReader,
    path: Path,
    *,
    bos: int,
    eos: list[int],
    int8_cache: bool = False,
    progress: Progress = lambda done, total: None,
) -> list[str]:
    """Write the ``.pte``: forward(tokens [1, n], start [1]) -> logits [1, 1, V] of the last token.

    The methods beside it tell ExecuTorch's LLM runner what it asks for. The KV cache is fp32, or
    int8 with a scale for each head and position. ``progress`` is called with nodes done and in
    total. Returns notes on what XNNPACK cannot hold as it was.
    """
    lowering = _Lowering(traced, weights, int8_cache)
    lowering.run(path, bos, eos, progress)
    return lowering.notes() + [
        f"executorch: {count} matrices: {what}" for what, count in lowering.changes.items() if count
    ]


class _Lowering(Walk):
    """One walk over the traced graph.

    Of a node's value, ``inside`` knows the index in the open segment, ``outside`` that in the
    program.
    """

    target = "ExecuTorch"

    def __init__(self, traced: Traced, weights: WeightReader, int8_cache: bool) -> None:
        super().__init__(traced, weights)
        self.context, self.int8_cache = traced.context, int8_cache
        self.program = ProgramBuilder()
        self.segment = Segment(self.program.named)
        self.inside: dict[Node, int] = {}
        self.outside: dict[Node, int] = {}
        self.done: set[Node] = set()
        self.last: Node | None = None  # from here on, one position alone
        self.forms: dict[str, tuple[Filter, Array | None]] = {}
        self.sums: dict[tuple[Node, int], int] = {}
        self.tables: dict[str, int] = {}
        self.changes: Counter[str] = Counter()
        self.places: dict[tuple[int, int], int] = {}
        if int8_cache and any(a.softcap is not None for a in self.config.attentions):
            raise refuse(self.target, "attention with capped scores reads an fp32 cache")

    def run(self, path: Path, bos: int, eos: list[int], progress: Progress) -> None:
        inputs = self._inputs()

        def step(done: int, total: int) -> None:
            self.done.add(self.traced.nodes[done - 1])
            progress(done, total)

        self.walk(step)
        self._close()
        metadata = llm_metadata(self.config, self.context, bos, eos)
        self.program.write(path, inputs, [self.outside[self.traced.output]], metadata)

    def _inputs(self) -> list[int]:
        """Tokens and start, and where the sequence stands."""
        p = self.program
        tokens = p.tensor([1, self.context], "int64")
        start = p.tensor([1], "int64", dynamic=False)
        self.outside[self.traced.input_ids] = tokens
        self.start, length, self.end = p.number(), p.number(), p.number()
        p.call("aten::_local_scalar_dense.", start, self.start)
        p.call("aten::sym_size.int", tokens, p.literal(1), length)
        p.call("executorch_prim::add.Scalar", self.start, length, self.end)
        return [tokens, start]

    def _rows(self, name: str, table: Array, shape: list[int]) -> int:
        """The rows of a table, made once, that belong to the new positions."""
        if name not in self.tables:
            p = self.program
            rows = p.tensor(shape)
            source = p.constant(name, table.astype(np.float32))
            first, step = p.literal(0), p.literal(1)
            arguments = [source, first, self.start, self.end, step]
            p.call("aten::slice_copy.Tensor_out", *arguments, rows, rows)
            self.tables[name] = rows
        return self.tables[name]

    # One method per operator of pocketslm.models.ops.

    def embedding(self, node: Node) -> None:
        ids, weight_node = node.args
        name, weight = self.parameter(weight_node)
        p = self.program
        out = p.tensor([1, self.context, self.traced.widths[node]])
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

    def linear(self, node: Node) -> None:
        x, weight_node, bias_node = node.args
        name, weight = self.parameter(weight_node)
        bias = None if bias_node is None else self.vector(bias_node)[1]
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

    def rms_norm(self, node: Node) -> None:
        x, weight_node, eps = node.args
        s, value = self.segment, self._in(x)
        groups, width = self.groups(node), self.traced.widths[node]
        size = width // groups
        if groups > 1:
            value = s.reshape(value, [1, 0, groups, size])
        normalized = s.multiply(
            value, s.unary(xnn.XNNReciprocalSquareRoot, self._mean_square(value, eps))
        )
        normalized = s.multiply(normalized, self._constant(weight_node))
        self.inside[node] = s.reshape(normalized, [1, 0, width]) if groups > 1 else normalized

    def layer_norm(self, node: Node) -> None:
        x, weight_node, bias_node, eps = node.args
        s, value = self.segment, self._in(x)
        size = self.traced.widths[node]
        mean = s.linear(value, "mean", Filter(np.full((1, size), 1 / size, np.float32)))
        value = s.binary(xnn.XNNSubtract, value, mean)
        value = s.multiply(
            value, s.unary(xnn.XNNReciprocalSquareRoot, self._mean_square(value, eps))
        )
        value = s.multiply(value, self._constant(weight_node))
        self.inside[node] = s.add(value, self._constant(bias_node))

    def _mean_square(self, value: int, eps: float) -> int:
        # XNNPACK has no mean over the last axis that goes with a dynamic one: a product is one.
        s = self.segment
        size = s.shape(value)[-1]
        mean = Filter(np.full((1, size), 1 / size, np.float32))
        return s.linear(s.unary(xnn.XNNSquare, value), "mean", mean, np.array([eps], np.float32))

    def _constant(self, node: Node) -> int:
        """A vector within the segment.

        It is passed as an input, not as a constant: XNNPACK's cache of packed weights frees
        constants that no operator packs.
        """
        name, array = self.vector(node)
        constant = self.program.constant(name, array.astype(np.float32))
        return self.segment.input(constant, [array.size])

    def _number(self, value: float) -> int:
        constant = self.program.constant(f"number.{value!r}", np.array([value], np.float32))
        return self.segment.input(constant, [1])

    def add(self, node: Node) -> None:
        a, b = node.args
        self.inside[node] = self.segment.add(self._in(a), self._in(b))

    def scale(self, node: Node) -> None:
        x, factor = node.args
        self.inside[node] = self.segment.multiply(self._in(x), self._number(factor))

    def softcap(self, node: Node) -> None:
        x, cap = node.args
        s = self.segment
        inner = s.unary(xnn.XNNTanh, s.multiply(self._in(x), self._number(1 / cap)))
        self.inside[node] = s.multiply(inner, self._number(cap))

    def positions(self, node: Node) -> None:
        name, table = self.parameter(node.args[2])
        width = self.traced.widths[node]
        rows = self._rows(name, floats(table), [self.context, width])
        value = self.segment.input(rows, [ANY, width])
        self.inside[node] = self.segment.reshape(value, [1, 0, width])

    def activate(self, node: Node) -> None:
        x, kind = node.args
        self.inside[node] = self._activated(self._in(x), kind)

    def gated(self, node: Node) -> None:
        gate, up, kind = node.args
        activated = self._activated(self._in(gate), kind)
        self.inside[node] = self.segment.multiply(activated, self._in(up))

    def _activated(self, x: int, kind: str) -> int:
        s = self.segment
        if kind == "silu":
            return s.multiply(x, s.unary(xnn.XNNSigmoid, x))
        if kind == "gelu":
            return s.unary(xnn.XNNGelu, x)
        if kind == "gelu_tanh":  # x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
            cubic = s.multiply(s.unary(xnn.XNNSquare, x), self._number(0.044715))
            inner = s.multiply(s.add(cubic, self._number(1.0)), x)
            turned = s.unary(xnn.XNNTanh, s.multiply(inner, self._number((2 / np.pi) ** 0.5)))
            return s.multiply(s.multiply(x, self._number(0.5)), s.add(turned, self._number(1.0)))
        x = s.binary(xnn.XNNMaximum, x, self._number(0.0))
        return s.unary(xnn.XNNSquare, x) if kind == "relu2" else x

    def attention(self, node: Node) -> None:
        q, k, v, _, _, heads, kv_heads, scale, window, cap, causal = node.args
        if not causal:
            raise refuse(self.target, "attention in both directions is not supported")
        p, size = self.program, self.traced.widths[q] // heads
        query, key, value = (
            self.segment.reshape(self._in(part), [1, 0, count, size])
            for part, count in ((q, heads), (k, kv_heads), (v, kv_heads))
        )
        shape = [1, self.context, heads, size]
        cached = [1, self.context, kv_heads, size]
        made = {query: p.tensor(shape), key: p.tensor(cached), value: p.tensor(cached)}
        self._close(made)
        if cap is not None:
            keys, values = (self._append(made[x], cached, "float32") for x in (key, value))
            mask = self._mask(min(window or self.context, self.context))
            seen = (keys, values, mask)
            self.inside[node] = self._capped(made[query], seen, shape, kv_heads, scale, cap)
            return
        q = [part for part, _, _ in self._held(made[query], shape)]
        k, v = ([self._append(*part) for part in self._held(made[x], cached)] for x in (key, value))
        mask, is_causal = p.literal(None), p.literal(True)
        if window is not None and window < self.context:
            mask, is_causal = self._mask(window), p.literal(False)
        options = [mask, p.literal(0.0), is_causal, p.literal(float(scale))]
        kind, grids = "custom_sdpa", []
        if self.int8_cache:
            kind, grids = "custom_quantized_sdpa", [*q[1:], *k[1:], *v[1:], p.literal(False)]
        out = p.tensor(shape)
        p.call(f"llama::{kind}.out", q[0], k[0], v[0], self.start, *options, *grids, out, out)
        self.outside[node] = out

    def _capped(
        self,
        query: int,
        seen: tuple[int, int, int],
        shape: list[int],
        kv_heads: int,
        scale: float,
        cap: float,
    ) -> int:
        """Attention written out, as no kernel caps its scores: [1, n, heads * size], over all of
        the cache. seen: keys, values, and their mask [n, context]. shape: of the query,
        [1, n, heads, size]."""
        s, context, (heads, size) = self.segment, self.context, shape[2:]
        shared = heads // kv_heads
        q = s.reshape(s.input(query, [1, ANY, heads, size]), [0, kv_heads, shared, size])
        q = s.reshape(s.transpose(q, (1, 0, 2, 3)), [kv_heads, 0, size])
        k, v = (
            s.reshape(s.input(part, [1, context, kv_heads, size]), [context, kv_heads, size])
            for part in seen[:2]
        )
        scores = s.matrix_product(q, s.transpose(k, (1, 2, 0)))
        scores = s.unary(xnn.XNNTanh, s.multiply(scores, self._number(scale / cap)))
        scores = s.reshape(s.multiply(scores, self._number(cap)), [kv_heads, 0, shared, context])
        mask = s.reshape(s.input(seen[2], [ANY, context]), [1, 0, 1, context])
        weights = s.unary(xnn.XNNSoftmax, s.add(scores, mask))
        weights = s.reshape(weights, [kv_heads, 0, context])
        out = s.matrix_product(weights, s.transpose(v, (1, 0, 2)))
        out = s.transpose(s.reshape(out, [kv_heads, 0, shared, size]), (1, 0, 2, 3))
        return s.reshape(out, [1, 0, heads * size])

    def short_conv(self, node: Node) -> None:
        """Sums of shifted columns, all of which are kept: a shorter context needs no other state.

        The cache begins with as many zeros as a token looks back at, written each time: nobody
        promises that it is empty at first.
        """
        b, c, x, taps_node, bias_node, _ = node.args
        name, taps = self.parameter(taps_node)
        taps = floats(taps)
        p, (size, count) = self.program, taps.shape
        columns = self.segment.multiply(self._in(b), self._in(x))
        columns = self.segment.reshape(columns, [1, 0, 1, size])
        new = p.tensor([1, self.context, 1, size])
        self._close({columns: new})
        cache = p.state([1, self.context + count - 1, 1, size], "float32")
        unused = p.tensor([1], dynamic=False)
        zeros = p.constant(
            f"zeros.{count - 1}.{size}", np.zeros((1, count - 1, 1, size), np.float32)
        )
        for value, place in ((zeros, p.literal(0)), (new, self._later(self.start, count - 1))):
            p.call("llama::update_cache.out", value, cache, place, unused, unused)
        s = self.segment
        total: int | None = None
        for tap in range(count):
            rows = p.tensor([1, self.context, 1, size])
            span = (self._later(place, tap) for place in (self.start, self.end))
            arguments = [cache, p.literal(1), *span, p.literal(1)]
            p.call("aten::slice_copy.Tensor_out", *arguments, rows, rows)
            weight = p.constant(f"{name}.{tap}", np.ascontiguousarray(taps[:, tap], np.float32))
            part = s.multiply(s.input(rows, [1, ANY, 1, size]), s.input(weight, [size]))
            total = part if total is None else s.add(total, part)
        assert total is not None
        total = s.reshape(total, [1, 0, size])
        if bias_node is not None:
            total = s.add(total, self._constant(bias_node))
        self.inside[node] = s.multiply(total, self._in(c))

    def _later(self, place: int, positions: int) -> int:
        """A number of the program and so many more."""
        if not positions:
            return place
        if (place, positions) not in self.places:
            self.places[place, positions] = self.program.number()
            arguments = [place, self.program.literal(positions), self.places[place, positions]]
            self.program.call("executorch_prim::add.Scalar", *arguments)
        return self.places[place, positions]

    def _mask(self, window: int) -> int:
        """What the new positions see of the whole cache: 0, or minus infinity."""
        n = self.context
        past = np.arange(n)[:, None] - np.arange(n)
        table = np.where((past >= 0) & (past < window), 0, -np.inf).astype(np.float32)
        return self._rows(f"window.{window}", table, [n, n])

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

    def rotary(self, node: Node) -> None:
        """All of a head at once: x * [cos, cos] + (x with its halves swapped) * [-sin, sin]."""
        x, cos_node, sin_node, _, heads = node.args
        s, width = self.segment, self.traced.widths[node]
        (cos_name, cos), (sin_name, sin) = (self.traced.tables[n] for n in (cos_node, sin_node))
        half, head = cos.shape[1], width // heads
        cos = np.concatenate([cos, cos], 1)[:, None]
        sin = np.concatenate([-sin, sin], 1)[:, None]
        value = s.reshape(self._in(x), [1, 0, heads, head])
        rest = s.slice_last(value, 2 * half, head) if 2 * half < head else None
        if rest is not None:
            value = s.slice_last(value, 0, 2 * half)
        shape = [self.context, 1, 2 * half]
        c, t = (
            s.input(self._rows(name, table, shape), [ANY, 1, 2 * half])
            for name, table in ((cos_name, cos), (sin_name, sin))
        )
        swapped = s.concatenate_last(
            s.slice_last(value, half, 2 * half), s.slice_last(value, 0, half)
        )
        turned = s.add(s.multiply(value, c), s.multiply(swapped, t))
        turned = turned if rest is None else s.concatenate_last(turned, rest)
        self.inside[node] = s.reshape(turned, [1, 0, width])

    def temperature(self, node: Node) -> None:
        x, _, factor, step = node.args
        table = 1 + factor * np.log1p(np.arange(self.context) // step)[:, None]
        rows = self._rows(f"temperature.{factor!r}.{step}", table, [self.context, 1])
        s = self.segment
        grown = s.reshape(s.input(rows, [ANY, 1]), [1, 0, 1])
        self.inside[node] = s.multiply(self._in(x), grown)

    def getitem(self, node: Node) -> None:
        source, index = node.args
        if index:  # the longer cache, which stays where it is
            return
        if source in self.inside:  # what was not left to a kernel
            self.inside[node] = self._in(source)
            return
        heads, width = source.args[5], self.traced.widths[source]
        out = self.segment.input(self.outside[source], [1, ANY, heads, width // heads])
        self.inside[node] = self.segment.reshape(out, [1, 0, width])

    def last_tokens(self, node: Node) -> None:
        """The last one: what the runner reads, whatever count was traced."""
        x = node.args[0]
        self._close()
        p = self.program
        out = p.tensor([1, 1, self.traced.widths[node]], dynamic=False)
        start, end = p.literal(-1), p.literal(_INT64_MAX)
        axis = step = p.literal(1)
        p.call("aten::slice_copy.Tensor_out", self.outside[x], axis, start, end, step, out, out)
        self.outside[node] = out
        self.last = node

    # Values.

    def _in(self, node: Node) -> int:
        """The value of a node within the open segment."""
        if node not in self.inside:
            shape = (1, ANY, self.traced.widths[node])
            self.inside[node] = self.segment.input(self.outside[node], shape)
        return self.inside[node]

    def _close(self, more: dict[int, int] | None = None) -> None:
        """Hand the open segment to XNNPACK, with what later nodes read as its outputs."""
        outputs = dict(more or {})
        for node, value in self.inside.items():
            if node not in self.outside and any(user not in self.done for user in node.users):
                rows = self.context if self.last is None else 1
                self.outside[node] = self.program.tensor([1, rows, self.traced.widths[node]])
                outputs[value] = self.outside[node]
        if outputs:
            self.program.delegate(BACKEND, *self.segment.finish(outputs))
        self.segment = Segment(self.program.named)
        self.inside.clear()
        self.sums.clear()

    # Parameters.

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
