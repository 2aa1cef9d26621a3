"""Small random programs of model.slm: a writer of version 3, and an interpreter in float64 numpy.

The interpreter follows the comments of ``runtime/ops/program.h`` and is independent of the engine.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from native_support import packed

from pocketslm.models.tensors import QuantTensor, Weight
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

SEED = 11
HIDDEN, VOCABULARY, CONTEXT = 64, 100, 640
EPS = 1e-5
TABLE_ROOM = 128 + 32 * 200

Scheme = Callable[[np.ndarray], Weight]


@dataclass
class Operation:
    code: str
    norm: str
    layer: int
    flags: int
    sections: list[str | None]
    sizes: list[int]
    numbers: list[float]

    def section(self, index: int) -> str | None:
        return self.sections[index] if index < len(self.sections) else None


@dataclass
class Program:
    """Tensors by name, and operations that name them; methods append operations."""

    layers: int = 2
    scheme: Scheme = lambda values: values
    tensors: dict[str, Weight] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)
    states: list[tuple[int, int, int, int]] = field(default_factory=list)
    layer: int = NONE
    context: int = CONTEXT

    # Tensors.

    def matrix(self, rows: int, cols: int, spread: float | None = None) -> str:
        name = f"matrix {len(self.tensors)}"
        rng = np.random.default_rng([SEED, len(self.tensors)])
        spread = 1.2 / math.sqrt(cols) if spread is None else spread
        self.tensors[name] = self.scheme(rng.normal(0, spread, (rows, cols)).astype(np.float32))
        return name

    def vector(self, size: int, centre: float = 1.0, width: float = 0.5) -> str:
        name = f"vector {len(self.tensors)}"
        rng = np.random.default_rng([SEED, len(self.tensors)])
        values = rng.uniform(centre - width, centre + width, size)
        self.tensors[name] = values.astype(np.float32)
        return name

    def rotary(self, dim: int, theta: float = 1000.0) -> str:
        name = f"rotary {dim} {theta}"
        self.tensors[name] = (theta ** (-np.arange(0, dim, 2) / dim)).astype(np.float32)
        return name

    def norm(self, kind: str, size: int = HIDDEN, *, plain: bool = False) -> list[str | None]:
        """The weight and bias of a norm; ``plain`` leaves them out."""
        if kind == "none" or plain:
            return [None, None]
        return [self.vector(size), self.vector(size, 0.0) if kind == "layer" else None]

    # Operations.

    def add(
        self,
        code: str,
        sections: Sequence[str | None],
        sizes: Sequence[int] = (),
        numbers: Sequence[float] = (),
        *,
        norm: str = "none",
        flags: int = 0,
    ) -> None:
        self.operations.append(
            Operation(code, norm, self.layer, flags, list(sections), list(sizes), list(numbers))
        )

    def embed(self, scale: float = 1.0, *, positions: bool = False) -> Program:
        table = self.matrix(self.context, HIDDEN, 0.5) if positions else None
        self.add("embed", [self.matrix(VOCABULARY, HIDDEN, 1.0), table], [], [scale])
        return self

    def normalize(
        self, buffer: str, width: int, group: int, kind: str, *, plain: bool = False
    ) -> None:
        weights = self.norm(kind, group, plain=plain)
        self.add("norm", weights, [BUFFER[buffer], width, group], [EPS], norm=kind)

    def attention(
        self,
        heads: int = 4,
        kv_heads: int = 2,
        dim: int = 16,
        *,
        norm: str = "rms",
        rope: int | None = None,
        theta: float = 1000.0,
        factor: float = 1.0,
        window: int = 0,
        head_norms: bool = False,
        flags: int = 0,
        cap: float = 0.0,
        bias: bool = False,
        temperature: tuple[float, int] = (0.0, 0),
        shared: int | None = None,
        scale: float | None = None,
        wide_norms: bool = False,
        value_norm: bool = False,
        output: bool = True,
        inner_norm: bool = False,
        after: str = "none",
        residual: float = 1.0,
    ) -> None:
        """``shared``: the state that keys and values are read from; ``after``: the norm of what is
        added; ``wide_norms``: of all of query and key; ``output``: with the product after it."""
        rope = dim if rope is None else rope
        widths = [heads * dim] if shared is not None else [heads * dim, *[kv_heads * dim] * 2]
        matrices: list[str | None] = [self.matrix(width, HIDDEN) for width in widths]
        biases = [self.vector(width, 0.0) if bias else None for width in widths]
        blanks = [None] * (3 - len(widths))
        sections = [*self.norm(norm), *matrices, *blanks, *biases, *blanks]
        self.add("project", sections, [], [EPS], norm=norm)
        if wide_norms:
            self.normalize("query", heads * dim, heads * dim, "rms")
            self.normalize("key", kv_heads * dim, kv_heads * dim, "rms")
        if value_norm:
            self.normalize("value", kv_heads * dim, dim, "rms", plain=True)
        state = len(self.states) if shared is None else shared
        if shared is None:
            self.states.append((STATE["kv"], kv_heads, dim, window))
        else:
            flags |= ATTEND["reads_only"]
        query_norm = self.vector(dim) if head_norms else None
        key_norm = self.vector(dim) if head_norms and shared is None else None
        self.add(
            "attend",
            [self.rotary(rope, theta) if rope else None, query_norm, key_norm],
            [state, heads, kv_heads, dim, rope, window, temperature[1]],
            [scale or 1 / math.sqrt(dim), cap, EPS, factor if rope else 0.0, temperature[0]],
            flags=flags,
        )
        if inner_norm:
            self.normalize("attended", heads * dim, heads * dim, "rms")
        if output:
            self.product("attended", heads * dim, bias=bias, after=after, residual=residual)

    def product(
        self,
        buffer: str,
        width: int,
        *,
        bias: bool = False,
        after: str = "none",
        residual: float = 1.0,
    ) -> None:
        sections = [
            self.matrix(HIDDEN, width),
            self.vector(HIDDEN, 0.0) if bias else None,
            *self.norm(after),
        ]
        self.add("project_add", sections, [BUFFER[buffer]], [residual, EPS], norm=after)

    def mlp(
        self,
        width: int = 96,
        *,
        norm: str = "rms",
        activation: str = "silu",
        gate: bool = True,
        bias: bool = False,
        output: bool = True,
        inner_norm: bool = False,
        after: str = "none",
        residual: float = 1.0,
    ) -> None:
        sections = [
            *self.norm(norm),
            self.matrix(width, HIDDEN) if gate else None,
            self.matrix(width, HIDDEN),
            self.vector(width, 0.0) if gate and bias else None,
            self.vector(width, 0.0) if bias else None,
        ]
        self.add("gated", sections, [ACTIVATION[activation]], [EPS], norm=norm)
        if inner_norm:
            self.normalize("hidden", width, width, "rms")
        if output:
            self.product("hidden", width, bias=bias, after=after, residual=residual)

    def convolution(self, taps: int = 3, *, bias: bool = False) -> None:
        matrices = [self.matrix(HIDDEN, HIDDEN) for _ in range(3)]
        self.add("project", [*self.norm("rms"), *matrices], [], [EPS], norm="rms")
        sections = [
            self.vector(HIDDEN * taps, 0.0, 1.0),
            self.vector(HIDDEN, 0.0) if bias else None,
        ]
        self.add("short_conv", sections, [len(self.states), HIDDEN, taps])
        self.states.append((STATE["conv"], HIDDEN, taps, 0))
        self.product("attended", HIDDEN)

    def head(
        self,
        *,
        norm: str = "rms",
        matrix: bool = True,
        tied: bool = False,
        bias: bool = False,
        factor: float = 1.0,
        cap: float = 0.0,
    ) -> Program:
        self.layer = NONE
        name = self.operations[0].sections[0] if tied else None
        if matrix and not tied:
            name = self.matrix(VOCABULARY, HIDDEN)
        sections = [*self.norm(norm), name, self.vector(VOCABULARY, 0.0) if bias else None]
        self.add("head", sections, [], [EPS, factor, cap], norm=norm)
        return self

    # The file.

    def write(self, path: Path) -> Path:
        path.write_bytes(self.content())
        return path

    def content(self) -> bytes:
        """The file in version 3."""
        names = list(self.tensors)
        file = _File()
        for name in names:
            file.tensor("projection" if "matrix" in name else "vector", 0, self.tensors[name])

        def padded(values: list, count: int, rest: float) -> list:
            return values + [rest] * (count - len(values))

        program = b"".join(
            struct.pack(
                "<HHII10I8I8f12x",
                CODE[op.code],
                NORM[op.norm],
                op.layer,
                op.flags,
                *padded([NONE if s is None else names.index(s) for s in op.sections], 10, NONE),
                *padded(op.sizes, 8, 0),
                *padded(op.numbers, 8, 0.0),
            )
            for op in self.operations
        )
        file.blob("program", program)
        file.blob("states", b"".join(struct.pack("<4I", *state) for state in self.states))
        return file.content(
            3, HIDDEN, self.layers, 0, 0, 0, 0, VOCABULARY, self.context, 0, 0.0, 0.0
        )

    # The interpreter.

    def values(self, name: str | None) -> np.ndarray | None:
        if name is None:
            return None
        tensor = self.tensors[name]
        dense = tensor.dequantize() if isinstance(tensor, QuantTensor) else tensor
        return dense.astype(np.float64)

    def run(self, tokens: np.ndarray) -> np.ndarray:
        """The head's output for all of the tokens, [n, width]."""
        buffers: dict[str, np.ndarray] = {}
        kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for op in self.operations:
            result = getattr(self, f"_{op.code}")(op, tokens, buffers, kept)
        return result

    def _normed(self, op: Operation, x: np.ndarray, first: int, eps: float) -> np.ndarray:
        if op.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        if op.norm != "none":
            x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
        for index, combine in ((first, np.multiply), (first + 1, np.add)):
            if (part := self.values(op.section(index))) is not None:
                x = combine(x, part)
        return x

    def _linear(self, x: np.ndarray, matrix: str | None, bias: str | None) -> np.ndarray:
        y = x @ self.values(matrix).T
        return y if bias is None else y + self.values(bias)

    def _embed(self, op: Operation, tokens: np.ndarray, buffers: dict, kept: dict) -> None:
        x = op.numbers[0] * self.values(op.section(0))[tokens]
        if (positions := self.values(op.section(1))) is not None:
            x = x + positions[: len(tokens)]
        buffers["residual"] = x

    def _norm(self, op: Operation, tokens: np.ndarray, buffers: dict, kept: dict) -> None:
        name = next(name for name, number in BUFFER.items() if number == op.sizes[0])
        x = buffers[name].reshape(len(tokens), -1, op.sizes[2])
        buffers[name] = self._normed(op, x, 0, op.numbers[0]).reshape(len(tokens), -1)

    def _project(self, op: Operation, tokens: np.ndarray, buffers: dict, kept: dict) -> None:
        x = self._normed(op, buffers["residual"], 0, op.numbers[0])
        for index, name in enumerate(("query", "key", "value")):
            if op.section(2 + index) is not None:
                buffers[name] = self._linear(x, op.section(2 + index), op.section(5 + index))

    def _attend(self, op: Operation, tokens: np.ndarray, buffers: dict, kept: dict) -> None:
        state, heads, kv_heads, dim, rope, window, step = op.sizes
        scale, cap, eps, factor, temperature = op.numbers
        n = len(tokens)
        positions = np.arange(n)

        def prepared(x: np.ndarray, norm: str | None) -> np.ndarray:
            weight = self.values(norm)

            def normed(x: np.ndarray) -> np.ndarray:
                return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight

            late = op.flags & ATTEND["norm_after_rope"]
            if weight is not None and not late:
                x = normed(x)
            if rope:
                angles = positions[:, None, None] * self.values(op.section(0))
                cosine, sine = factor * np.cos(angles), factor * np.sin(angles)
                a, b, rest = np.split(x, [rope // 2, rope], -1)
                x = np.concatenate([a * cosine - b * sine, b * cosine + a * sine, rest], -1)
            return normed(x) if weight is not None and late else x

        query = prepared(buffers["query"].reshape(n, heads, dim), op.section(1))
        if step:
            query = query * (1 + temperature * np.log(1 + positions // step))[:, None, None]
        if not op.flags & ATTEND["reads_only"]:
            key = prepared(buffers["key"].reshape(n, kv_heads, dim), op.section(2))
            kept[state] = key, buffers["value"].reshape(n, kv_heads, dim)
        key, value = (part.repeat(heads // kv_heads, 1) for part in kept[state])
        scores = np.einsum("thd,shd->hts", query, key) * scale
        if cap:
            scores = cap * np.tanh(scores / cap)
        distance = positions[:, None] - positions
        seen = np.ones((n, n), bool) if op.flags & ATTEND["bidirectional"] else distance >= 0
        if window:
            seen &= np.abs(distance) < window
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        buffers["attended"] = np.einsum("hts,shd->thd", weights, value).reshape(n, -1)

    def _project_add(self, op: Operation, tokens: np.ndarray, buffers: dict, kept: dict) -> None:
        name = "attended" if op.sizes[0] == BUFFER["attended"] else "hidden"
        y = self._linear(buffers[name], op.section(0), op.section(1))
        y = self._normed(op, y, 2, op.numbers[1])
        buffers["residual"] = buffers["residual"] + op.numbers[0] * y

    def _gated(self, op: Operation, tokens: np.ndarray, buffers: dict, kept: dict) -> None:
        x = self._normed(op, buffers["residual"], 0, op.numbers[0])
        up = self._linear(x, op.section(3), op.section(5))
        gate = up if op.section(2) is None else self._linear(x, op.section(2), op.section(4))
        kind = next(name for name, number in ACTIVATION.items() if number == op.sizes[0])
        y = ACTIVATIONS[kind](gate)
        buffers["hidden"] = y if op.section(2) is None else y * up

    def _short_conv(self, op: Operation, tokens: np.ndarray, buffers: dict, kept: dict) -> None:
        _, width, taps = op.sizes
        products = buffers["query"] * buffers["value"]
        padded = np.concatenate([np.zeros((taps - 1, width)), products])
        weights = self.values(op.section(0)).reshape(width, taps)
        y = sum(padded[k : k + len(tokens)] * weights[:, k] for k in range(taps))
        if op.section(1) is not None:
            y = y + self.values(op.section(1))
        buffers["attended"] = buffers["key"] * y

    def _head(self, op: Operation, tokens: np.ndarray, buffers: dict, kept: dict) -> np.ndarray:
        eps, factor, cap = op.numbers
        y = self._normed(op, buffers["residual"], 0, eps)
        if op.section(2) is not None:
            y = factor * self._linear(y, op.section(2), op.section(3))
        return cap * np.tanh(y / cap) if cap else y


class _File:
    """Sections behind room for their table."""

    def __init__(self) -> None:
        self.body, self.table = bytearray(), bytearray()

    def section(self, role: str, kind: int, layer: int, shape: Sequence[int], data: bytes) -> None:
        self.body.extend(b"\0" * (-len(self.body) % 64))
        place = TABLE_ROOM + len(self.body)
        self.table.extend(
            struct.pack("<HHIIIQQ", ROLE[role], kind, layer, *shape, place, len(data))
        )
        self.body.extend(data)

    def blob(self, role: str, data: bytes) -> None:
        self.section(role, KIND["blob"], 0, (1, len(data)), data)

    def tensor(self, role: str, layer: int, tensor: Weight) -> None:
        if not isinstance(tensor, QuantTensor) and tensor.ndim == 1:
            data = tensor.astype("<f4").tobytes()
            self.section(role, KIND["vector"], layer, (1, tensor.size), data)
            return
        kind, data = packed(tensor)
        self.section(role, kind, layer, tensor.shape, data.tobytes())

    def content(self, version: int, *numbers: float) -> bytes:
        self.body.extend(b"\0" * (-len(self.body) % 64))
        size = TABLE_ROOM + len(self.body)
        header = struct.pack(
            "<8sIIQ9I2f60x", b"PSLMODEL", version, len(self.table) // 32, size, *numbers
        )
        assert len(header) + len(self.table) <= TABLE_ROOM
        return (header + self.table).ljust(TABLE_ROOM, b"\0") + bytes(self.body)


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / np.sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}
assert ACTIVATIONS.keys() == ACTIVATION.keys()


def records(content: bytes, role: str) -> tuple[int, int]:
    """Where the blob of a role lies, and its bytes."""
    for at in range(128, TABLE_ROOM, 32):
        found, _, _, _, _, offset, size = struct.unpack_from("<HHIIIQQ", content, at)
        if found == ROLE[role]:
            return offset, size
    raise AssertionError(role)


def mutations(content: bytes, count: int) -> Iterator[bytes]:
    """The file with up to three changes of header, table, program and states."""
    rng = np.random.default_rng(SEED)
    sections = struct.unpack_from("<I", content, 12)[0]
    spans = [(8, 128 + 32 * sections), *(records(content, role) for role in ("program", "states"))]
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            # Most of them where most depends on them.
            start, size = spans[rng.choice(3, p=[0.2, 0.6, 0.2])]
            place = start + int(rng.integers(0, size // 4)) * 4
            word = rng.choice([0, 1, 2, 3, 7, 16, 31, 32, 64, 65, 2**20, NONE, 0x7FC00000])
            width = int(rng.choice([1, 2, 4]))
            changed[place : place + width] = int(word).to_bytes(4, "little")[:width]
        yield bytes(changed)
