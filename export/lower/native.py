"""The traced graph as ``model.slm``, the file of the native operators.

The layout is described in ``runtime/ops/weight_layout.h`` (matrices), ``runtime/ops/model_file.h``
(header and sections) and ``runtime/ops/program.h`` (the program). Quantized blocks are carried code
for code; the report says where a scale had to be rounded to half precision.

An operation of a program does what several operators of the graph do: products wait until their
reader is known, norms and scales until the product is.
"""

from __future__ import annotations

import json
import operator
import os
import struct
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pocketslm.errors import ExportError
from pocketslm.export.lower.native_layout import ALIGNMENT, GROUP, Bytes, pack_matrix
from pocketslm.export.lower.trace import Node, Traced
from pocketslm.export.lower.walk import Progress, Walk, WeightReader, refuse
from pocketslm.models import ops
from pocketslm.models.config import ModelConfig, ShortConv
from pocketslm.models.tensors import Array, QuantTensor
from pocketslm.runtime.ops.ids import (
    ACTIVATION,
    ATTEND,
    BUFFER,
    CODE,
    KIND,
    NONE,
    NORM,
    ROLE,
    STATE,
)

MAGIC, VERSION = b"PSLMODEL", 3
HEADER_BYTES, ENTRY_BYTES = 128, 32
_ROLES = {
    "self_attn.q_proj.weight": "query",
    "self_attn.k_proj.weight": "key",
    "self_attn.v_proj.weight": "value",
    "self_attn.o_proj.weight": "output",
    "mlp.gate_proj.weight": "gate",
    "mlp.up_proj.weight": "up",
    "mlp.down_proj.weight": "down",
}


@dataclass
class NativeReport:
    """What went into the file, and what it lost on the way."""

    bytes: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    rounded_scales: list[str] = field(default_factory=list)


def lower(
    traced: Traced,
    weights: WeightReader,
    path: str | os.PathLike[str],
    *,
    tokenizer: bytes | None = None,
    chat: Mapping[str, Any] | None = None,
    progress: Progress = lambda done, total: None,
) -> NativeReport:
    """Write ``path``; ``weights(name, shape)`` gives each parameter.

    ``tokenizer`` is what :mod:`pocketslm.export.lower.native_tokenizer` makes, ``chat`` what
    :mod:`pocketslm.export.lower.native_chat` does; with both, ``pocketslm-run`` needs nothing else.
    Raises ExportError where the native operators cannot run the model.
    """
    if reason := uncovered(traced.config):
        raise refuse("native", reason)
    path = Path(path)
    blobs = {}
    if tokenizer is not None:
        blobs["tokenizer"] = tokenizer
    if chat is not None:
        blobs["chat"] = json.dumps(chat, ensure_ascii=False).encode()
    # The data goes to the file as it is packed: no more than one matrix is held in memory.
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
        try:
            most = len(traced.parameters) + len(traced.config.rotaries) + 2 + len(blobs)
            sections = _Sections(file, most)  # type: ignore[arg-type]
            lowering = _Lowering(traced, weights, sections)
            lowering.run(progress)
            for role, content in blobs.items():
                sections.blob(role, content)
            sections.finish(_header(traced, sections))
            Path(file.name).chmod(0o644)  # a temporary file is its owner's alone
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    lowering.report.bytes = sections.end
    return lowering.report


def uncovered(config: ModelConfig) -> str | None:
    """Why the native operators cannot run a model of these dimensions; None if they can."""
    widths = [("hidden_size", config.hidden_size, GROUP)]
    for layer in set(config.stored_layers):
        widths.append(("intermediate_size", layer.mlp.width, GROUP))
        if (a := layer.attention) is not None:
            widths.append(("head_dim", a.head_dim, 16))
            widths.append(("attention width", a.query_width, GROUP))
    for name, value, multiple in widths:
        if value % multiple:
            return f"{name} {value} is not a multiple of {multiple}"
    return None


class _Sections:
    """The file's sections: data as it comes, after room for the table of at most ``most``."""

    def __init__(self, file: BinaryIO, most: int) -> None:
        self.file, self.most, self.table = file, most, bytearray()
        self.end = -(-(HEADER_BYTES + ENTRY_BYTES * most) // ALIGNMENT) * ALIGNMENT

    @property
    def count(self) -> int:
        return len(self.table) // ENTRY_BYTES

    def add(
        self, role: str, kind: int, layer: int, rows: int, cols: int, pieces: Iterable[Bytes]
    ) -> int:
        """Write a section; its index in the table."""
        assert self.count < self.most
        self.file.seek(self.end)
        size = sum(self.file.write(piece.data) for piece in pieces)
        self.table += struct.pack("<HHIIIQQ", ROLE[role], kind, layer, rows, cols, self.end, size)
        self.end += -(-size // ALIGNMENT) * ALIGNMENT
        return self.count - 1

    def vector(self, role: str, layer: int, name: str, values: Array) -> int:
        flat = np.ascontiguousarray(values, dtype="<f4").reshape(-1)
        if not np.isfinite(flat).all():
            raise ExportError(f"{name} holds values that are no numbers; the model is damaged")
        return self.add(role, KIND["vector"], layer, 1, flat.size, [flat.view(np.uint8)])

    def blob(self, role: str, content: bytes) -> int:
        data = np.frombuffer(content, np.uint8)
        return self.add(role, KIND["blob"], 0, 1, data.size, [data])

    def finish(self, header: bytes) -> None:
        self.file.truncate(self.end)
        self.file.seek(0)
        self.file.write(header + self.table)
        self.file.flush()


# Values of the graph's nodes while their readers are awaited.


@dataclass(frozen=True)
class _Residual:
    """The residual stream after so many changes."""

    version: int


@dataclass(frozen=True)
class _Norm:
    """A norm's parameters, and what it normalizes."""

    kind: str
    weight: Node | None
    bias: Node | None
    eps: float
    source: Any = None


@dataclass(frozen=True)
class _Buffer:
    """What an operation left in a buffer; ``turn`` tells it from later contents."""

    name: str
    turn: int


@dataclass(frozen=True)
class _Product:
    """``W source + bias``, and what has been done to it since, in the graph's order.

    norm: over a head or over all of it; heads: how many were normalized each for itself.
    """

    source: Any
    weight: Node
    bias: Node | None
    norm: _Norm | None = None
    heads: int = 0
    rotary: Node | None = None
    norm_after_rope: bool = False
    temperature: tuple[float, int] = (0.0, 0)
    scale: float = 1.0
    cap: float = 0.0


@dataclass(frozen=True)
class _Positions:
    table: Node


_PLAIN = _Norm("none", None, None, 0.0)


class _Lowering(Walk):
    target = "native"
    plain = False

    def __init__(self, traced: Traced, weights: WeightReader, sections: _Sections) -> None:
        super().__init__(traced, weights)
        self.sections = sections
        self.report = NativeReport()
        self.values: dict[Node, Any] = {}
        self.records: list[bytes] = []
        self.indices: dict[str, int] = {}
        self.embed: dict[str, Any] | None = None
        self.version = 0
        self.layer = NONE
        self.turns = {"attended": 0, "hidden": 0}
        head = traced.output
        while head.target in (ops.scale, ops.softcap):
            head = head.args[0]
        self.head = traced.parameters[head.args[1]][0] if head.target is ops.linear else None

    def run(self, progress: Progress) -> None:
        self.walk(progress)
        self._head(self.values[self.traced.output])
        self.sections.blob("program", b"".join(self.records))
        self.sections.blob("states", b"".join(self._states()))

    # One method per operator of pocketslm.models.ops.

    def embedding(self, node: Node) -> None:
        self.embed = {"sections": [self._matrix(node.args[1], "embedding"), NONE], "scale": 1.0}
        self.values[node] = _Residual(0)

    def positions(self, node: Node) -> None:
        self.values[node] = _Positions(node.args[2])

    def linear(self, node: Node) -> None:
        x, weight, bias = node.args
        self.values[node] = _Product(self.values[x], weight, bias)

    def rms_norm(self, node: Node) -> None:
        x, weight, eps = node.args
        self._normalize(node, _Norm("rms", weight, None, eps, self.values[x]), self.groups(node))

    def layer_norm(self, node: Node) -> None:
        x, weight, bias, eps = node.args
        self._normalize(node, _Norm("layer", weight, bias, eps, self.values[x]), 1)

    def _normalize(self, node: Node, norm: _Norm, groups: int) -> None:
        value = norm.source
        if isinstance(value, _Product):
            after = value.rotary is not None
            self.values[node] = replace(value, norm=norm, heads=groups, norm_after_rope=after)
        elif any(user.target is operator.add for user in node.users):
            # What is added to later is the normalized stream itself.
            self._check(value)
            sections = [self._vector(norm.weight), self._vector(norm.bias)]
            width = self.config.hidden_size
            sizes = [BUFFER["residual"], width, width]
            self._record("norm", norm.kind, sections, sizes, [norm.eps])
            self.values[node] = self._changed()
        else:
            self.values[node] = norm

    def rotary(self, node: Node) -> None:
        x, cos, *_ = node.args
        self.values[node] = replace(self.values[x], rotary=cos)

    def temperature(self, node: Node) -> None:
        x, _, factor, step = node.args
        self.values[node] = replace(self.values[x], temperature=(factor, step))

    def attention(self, node: Node) -> None:
        q, k, v, past, _, heads, kv_heads, scale, window, cap, causal = node.args
        parts = [self.values[part] for part in (q, k, v)]
        state, _ = self.traced.states[past]
        self._project(parts, state)
        head_dim = self.traced.widths[q] // heads
        norms: list[int] = []
        eps = 0.0
        for part, buffer, count in zip(parts, ("query", "key"), (heads, kv_heads), strict=False):
            if part.norm is None:
                norms.append(NONE)
                continue
            vector, eps = self._vector(part.norm.weight), part.norm.eps
            if part.heads == count:
                norms.append(vector)
                continue
            norms.append(NONE)
            if part.norm_after_rope or part.heads > 1:
                raise refuse(self.target, "a norm over several heads must come before RoPE")
            sizes = [BUFFER[buffer], count * head_dim, count * head_dim // part.heads]
            self._record("norm", part.norm.kind, [vector, NONE], sizes, [eps])
        flags = ATTEND["norm_after_rope"] if parts[0].norm_after_rope else 0
        flags |= 0 if causal else ATTEND["bidirectional"]
        table, dim, factor = self._frequencies(parts[0].rotary)
        self._record(
            "attend",
            "none",
            [table, *norms],
            [state, heads, kv_heads, head_dim, dim, window or 0, parts[0].temperature[1]],
            [scale, cap or 0.0, eps, factor, parts[0].temperature[0]],
            flags,
        )
        self.values[node] = self._filled("attended")

    def short_conv(self, node: Node) -> None:
        b, c, x, taps, bias, past = node.args
        state, _ = self.traced.states[past]
        self._project([self.values[part] for part in (b, c, x)], state)
        width, count = self.traced.parameters[taps][1]
        sizes = [state, width, count]
        self._record("short_conv", "none", [self._vector(taps), self._vector(bias)], sizes, [])
        self.values[node] = self._filled("attended")

    def gated(self, node: Node) -> None:
        gate, up, kind = node.args
        self._gate(node, self.values[gate], self.values[up], kind)

    def activate(self, node: Node) -> None:
        x, kind = node.args
        self._gate(node, None, self.values[x], kind)

    def _gate(self, node: Node, gate: _Product | None, up: _Product, kind: str) -> None:
        norm = self._input([up] if gate is None else [gate, up])
        sections = [
            self._vector(norm.weight),
            self._vector(norm.bias),
            NONE if gate is None else self._matrix(gate.weight),
            self._matrix(up.weight),
            NONE if gate is None else self._vector(gate.bias),
            self._vector(up.bias),
        ]
        self._record("gated", norm.kind, sections, [ACTIVATION[kind]], [norm.eps])
        self.values[node] = self._filled("hidden")

    def scale(self, node: Node) -> None:
        x, factor = node.args
        value = self.values[x]
        if isinstance(value, _Residual) and self.embed is not None:
            self.embed["scale"] *= factor
        elif isinstance(value, _Product):
            value = replace(value, scale=value.scale * factor)
        else:
            raise refuse(self.target, "a factor stands where no operation takes one")
        self.values[node] = value

    def softcap(self, node: Node) -> None:
        x, cap = node.args
        self.values[node] = replace(self.values[x], cap=cap)

    def add(self, node: Node) -> None:
        a, b = (self.values[arg] for arg in node.args)
        if isinstance(b, _Positions) and self.embed is not None:
            self.embed["sections"][1] = self._matrix(b.table, "positions")
            self.values[node] = a
            return
        if isinstance(a, _Product):
            a, b = b, a
        self._check(a)
        if not isinstance(b, _Product) or not isinstance(b.source, _Buffer):
            raise refuse(self.target, "a sum of which one part is not a product")
        if b.source.turn != self.turns[b.source.name]:
            raise refuse(self.target, "a buffer is read after it was filled again")
        norm = b.norm or _PLAIN
        sections = [
            self._matrix(b.weight),
            self._vector(b.bias),
            self._vector(norm.weight),
            self._vector(norm.bias),
        ]
        sizes, numbers = [BUFFER[b.source.name]], [b.scale, norm.eps]
        self._record("project_add", norm.kind, sections, sizes, numbers)
        self.values[node] = self._changed()

    def last_tokens(self, node: Node) -> None:
        self.values[node] = self.values[node.args[0]]

    def getitem(self, node: Node) -> None:
        source, index = node.args
        if index == 0:  # states stay where they are
            self.values[node] = self.values[source]

    # Operations.

    def _head(self, value: Any) -> None:
        product = value if isinstance(value, _Product) else None
        norm = product.source if product is not None else value
        if isinstance(norm, _Residual):
            norm = replace(_PLAIN, source=norm)
        self._check(norm.source)
        self.layer = NONE
        sections = [self._vector(norm.weight), self._vector(norm.bias), NONE, NONE]
        numbers = [norm.eps, 1.0, 0.0]
        if product is not None:
            sections[2:] = [self._matrix(product.weight, "head"), self._vector(product.bias)]
            numbers = [norm.eps, product.scale, product.cap]
        self._record("head", norm.kind, sections, [], numbers)

    def _project(self, parts: Sequence[_Product], layer: int) -> None:
        """Query, key and value of a layer."""
        self.layer = layer
        norm = self._input(parts)
        sections = [
            self._vector(norm.weight),
            self._vector(norm.bias),
            *(self._matrix(part.weight) for part in parts),
            *(self._vector(part.bias) for part in parts),
        ]
        self._record("project", norm.kind, sections, [], [norm.eps])

    def _input(self, parts: Sequence[_Product]) -> _Norm:
        """The norm of the residual stream that products read alike."""
        if any(part.source != parts[0].source for part in parts):
            raise refuse(self.target, "products side by side read different inputs")
        source = parts[0].source
        norm: _Norm = replace(_PLAIN, source=source) if isinstance(source, _Residual) else source
        if not isinstance(norm, _Norm):
            raise refuse(self.target, "a product reads what is no norm of the residual stream")
        self._check(norm.source)
        return norm

    def _check(self, value: Any) -> None:
        if not isinstance(value, _Residual) or value.version != self.version:
            raise refuse(self.target, "the residual stream is read after it was changed")
        if self.embed is not None:
            embed, self.embed = self.embed, None
            self._record("embed", "none", embed["sections"], [], [embed["scale"]])

    def _changed(self) -> _Residual:
        self.version += 1
        return _Residual(self.version)

    def _filled(self, buffer: str) -> _Buffer:
        self.turns[buffer] += 1
        return _Buffer(buffer, self.turns[buffer])

    def _record(
        self,
        code: str,
        norm: str,
        sections: Sequence[int],
        sizes: Sequence[int],
        numbers: Sequence[float],
        flags: int = 0,
    ) -> None:
        def padded(values: Sequence[Any], count: int, rest: Any) -> list[Any]:
            return [*values, *[rest] * (count - len(values))]

        self.records.append(
            struct.pack(
                "<HHII10I8I8f12x",
                CODE[code],
                NORM[norm],
                self.layer,
                flags,
                *padded(sections, 10, NONE),
                *padded(sizes, 8, 0),
                *padded(numbers, 8, 0.0),
            )
        )

    # Sections.

    def _matrix(self, node: Node, role: str | None = None) -> int:
        name, _ = self.traced.parameters[node]
        if name not in self.indices:
            _, weight = self.parameter(node)
            layer, _, part = name.removeprefix("model.layers.").partition(".")
            role = role or _ROLES.get(part, "projection")
            kind, pieces, lossy = pack_matrix(weight, head=name == self.head)
            scheme = weight.scheme if isinstance(weight, QuantTensor) else str(weight.dtype)
            self.report.kinds[scheme] = self.report.kinds.get(scheme, 0) + 1
            if lossy:
                self.report.rounded_scales.append(name)
            number = int(layer) if layer.isdigit() else 0
            rows, cols = weight.shape
            self.indices[name] = self.sections.add(role, kind, number, rows, cols, pieces)
        return self.indices[name]

    def _vector(self, node: Node | None) -> int:
        if node is None:
            return NONE
        name, _ = self.traced.parameters[node]
        if name not in self.indices:
            _, values = self.vector(node)
            layer = name.removeprefix("model.layers.").partition(".")[0]
            number = int(layer) if layer.isdigit() else 0
            self.indices[name] = self.sections.vector("vector", number, name, values)
        return self.indices[name]

    def _frequencies(self, cos: Node | None) -> tuple[int, int, float]:
        """Section, rotated dimensions and factor of a rotary table."""
        if cos is None:
            return NONE, 0, 1.0
        name, _ = self.traced.tables[cos]
        rotary = self.config.rotaries[int(name.removeprefix("cos_"))]
        if name not in self.indices:
            values = np.array(rotary.frequencies(self.traced.context))
            self.indices[name] = self.sections.vector("rope_frequencies", 0, name, values)
        return self.indices[name], rotary.dim, rotary.factor

    def _states(self) -> list[bytes]:
        states = []
        for layer in self.config.layers:
            if (a := layer.attention) is not None:
                sizes = STATE["kv"], a.kv_heads, a.head_dim, a.window or 0
            else:
                assert isinstance(layer.mixer, ShortConv)
                sizes = STATE["conv"], self.config.hidden_size, layer.mixer.taps, 0
            states.append(struct.pack("<4I", *sizes))
        return states


def _header(traced: Traced, sections: _Sections) -> bytes:
    c = traced.config
    attentions = c.attentions
    # A table for short contexts serves no longer ones.
    limits = [r.original for r in c.rotaries if r.long_divisors is not None and r.original]
    short = [limit for limit in limits if traced.context <= limit]
    header = struct.pack(
        "<8sIIQ9I2f60x",
        MAGIC,
        VERSION,
        sections.count,
        sections.end,
        c.hidden_size,
        len(c.layers),
        max((a.heads for a in attentions), default=1),
        max((a.kv_heads for a in attentions), default=1),
        max((a.head_dim for a in attentions), default=16),
        c.intermediate_size,
        c.vocab_size,
        min([c.max_position_embeddings, *short]),
        0,
        0.0,
        1.0,
    )
    assert len(header) == HEADER_BYTES
    return header
