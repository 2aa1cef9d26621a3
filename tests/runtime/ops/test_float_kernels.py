"""Activations, norms and attention of every path against float64, and of SIMD paths to the bit."""

from __future__ import annotations

import ctypes
import itertools
import math
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from program_support import ACTIVATIONS

from pocketslm.runtime.backends.native_library import isa_names
from pocketslm.runtime.ops import build, instructions
from pocketslm.runtime.ops.ids import ACTIVATION

EPS = float(np.finfo(np.float32).eps)
# Of the value, and of the magnitude of what goes in: exp and tanh to a few units in the last place,
# the error function to 1.5e-7.
RELATIVE, ABSOLUTE = 1e-5, 4e-7
ATTENTION_TOLERANCE = 2e-5  # of the largest value: sums of a few hundred products
INT8_ATTENTION_TOLERANCE = 5e-4  # the same with weights of 14 bits
LARGEST_VALUE = 127 * 0.03  # of attention_probe.cpp
SIMD_PATHS = [isa for isa in isa_names() if isa != "scalar"]
BLOCK = 16


class _Job(ctypes.Structure):
    """AttentionJob of kernels.h."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("rows", "head_dim", "first", "begin", "end")),
        *((name, ctypes.c_void_p) for name in ("queries", "limits", "starts", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("key_scales", "value_scales", "next")),
        ("cap", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("out", "maximum", "weight")),
    )


@pytest.fixture(scope="module")
def arm_attention_probe(arm_runner_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program; what it links is compiled already, as a part of the runner."""
    source = str(Path(__file__).with_name("attention_probe"))
    output = tmp_path_factory.mktemp("arm") / "attention_probe"
    toolchain = build.find_toolchain("aarch64-linux")
    return build.build_program(output, toolchain, [source, "cpu"])


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    source = str(Path(__file__).with_name("kernel_probe"))
    output = tmp_path_factory.mktemp("probe") / "probe.so"
    build.compile_and_link(output, build.find_toolchain(), [source, "cpu"], [], ["-shared"])
    return ctypes.CDLL(str(output))


@pytest.mark.parametrize("isa", isa_names())
def test_the_highest_of_blocks(isa: str, probe: ctypes.CDLL) -> None:
    x = np.random.default_rng(3).normal(size=(37, 16)).astype(np.float32)
    x[3] = -(x[3] ** 2) - 1  # all below 0
    for wrong in ((), ((5, 0, np.inf), (8, 15, -np.inf), (9, 7, np.nan), (36, 3, np.nan))):
        for row, column, value in wrong:
            x[row, column] = value
        out = np.zeros(len(x), np.float32)
        probe.probe_highest(isa.encode(), pointer(x), ctypes.c_size_t(len(x)), pointer(out))
        expected = np.where(np.isfinite(x).all(1), x.max(1), np.float32(np.nan))
        np.testing.assert_array_equal(out, expected)


def pointer(array: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: np.ndarray | float) -> None:
    error = np.abs(actual.astype(np.float64) - expected)
    # Written so that a NaN fails.
    assert (error <= tolerance).all(), np.max(np.nan_to_num(error / tolerance, nan=np.inf))


def activate(
    probe: ctypes.CDLL, isa: str, kind: str, x: np.ndarray, up: np.ndarray | None
) -> np.ndarray:
    out = np.full(x.size + 16, np.nan, np.float32)
    probe.probe_activate(
        isa.encode(),
        ACTIVATION[kind],
        pointer(x),
        pointer(up),
        ctypes.c_size_t(x.size),
        pointer(out),
    )
    assert np.isnan(out[x.size :]).all(), "wrote past the output"
    return out[: x.size]


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_activations(kind: str, gated: bool, probe: ctypes.CDLL) -> None:
    rng = np.random.default_rng(1)
    x = np.concatenate(
        [np.linspace(-12, 12, 992), [0, -0.0, 1e-30, -1e-20, 90, -90, 1e4, -1e4] * 4]
    )
    x = x.astype(np.float32)
    up = rng.normal(size=x.size).astype(np.float32) if gated else None
    wide = x.astype(np.float64)
    with np.errstate(over="ignore"):
        expected = ACTIVATIONS[kind](wide) * (1.0 if up is None else up.astype(np.float64))
    scale = np.abs(wide) * (1.0 if up is None else np.abs(up))
    tolerance = RELATIVE * np.abs(expected) + ABSOLUTE * scale + 1e-37
    outputs = {isa: activate(probe, isa, kind, x, up) for isa in isa_names()}
    for out in outputs.values():
        assert_close(out, expected, tolerance)
    for isa in SIMD_PATHS[1:]:
        np.testing.assert_array_equal(outputs[isa], outputs[SIMD_PATHS[0]])
    x[5] = np.nan
    for isa in isa_names():
        assert list(np.flatnonzero(np.isnan(activate(probe, isa, kind, x, up)))) == [5]


@pytest.mark.parametrize("size", [1, 15, 16, 17, 64, 576])
def test_layer_norm(size: int, probe: ctypes.CDLL) -> None:
    rng = np.random.default_rng(size)
    x = (5 + rng.normal(size=size)).astype(np.float32)
    weight, bias = rng.normal(size=(2, size)).astype(np.float32)
    wide = x.astype(np.float64)
    centred = wide - wide.mean()
    expected = centred / np.sqrt((centred**2).mean() + 1e-5) * weight + bias
    for isa, in_place in itertools.product(isa_names(), (False, True)):
        source = x.copy()
        out = source if in_place else np.full(size, np.nan, np.float32)
        parts = [pointer(array) for array in (source, weight, bias)]
        probe.probe_layer_norm(
            isa.encode(), *parts, ctypes.c_size_t(size), ctypes.c_float(1e-5), pointer(out)
        )
        assert_close(out, expected, 2e-6 * (1 + np.abs(wide).max()) * (1 + np.abs(weight)))


def test_soft_cap(probe: ctypes.CDLL) -> None:
    for size, cap in itertools.product((1, 16, 33), (0.5, 30.0)):
        x = np.linspace(-4 * cap, 4 * cap, size).astype(np.float32)
        expected = cap * np.tanh(x.astype(np.float64) / cap)
        for isa in isa_names():
            out = x.copy()
            arguments = ctypes.c_size_t(size), ctypes.c_float(cap)
            probe.probe_soft_cap(isa.encode(), pointer(out), *arguments)
            assert_close(out, expected, 4e-7 * cap)
            out[-1] = np.nan
            probe.probe_soft_cap(isa.encode(), pointer(out), *arguments)
            assert np.isnan(out[-1])


@pytest.mark.parametrize(
    ("rank", "rows", "cols"), [(1, 32, 32), (8, 64, 33), (16, 32, 64), (37, 96, 160)]
)
@pytest.mark.parametrize("rounded", [False, True])
def test_low_rank_updates(
    rank: int, rows: int, cols: int, rounded: bool, probe: ctypes.CDLL
) -> None:
    """y += b^T (a^T x), with a and b in fp16 or int8; ranks that fill no panel are zeros."""
    rng = np.random.default_rng(rank)
    shapes = (cols, rank), (rank, rows)
    a, b = (rng.normal(size=shape).astype(np.float16) for shape in shapes)
    scale = np.ones(rank)  # of b's int8 codes, which add() leaves to what lower() gives
    if rounded:
        scale = 2.0 ** -rng.integers(3, 9, rank)
        a, b = (rng.integers(-127, 128, shape).astype(np.float16) for shape in shapes)
        a[0], b[:, 0] = 127, -127
        a, b = a / 64, b * scale[:, None].astype(np.float16)
    x, before = (rng.normal(size=size).astype(np.float32) for size in (cols, rows))
    low = a.T.astype(np.float64) @ x
    expected = before + low @ b.astype(np.float64)
    found = {}
    for isa in isa_names():
        lowered, out = np.full(-(-rank // 16) * 16, np.nan, np.float32), before.copy()
        factors = a.astype(np.float32), b.astype(np.float32)  # exact in fp16 and int8
        sizes = *map(ctypes.c_size_t, (rank, rows, cols)), ctypes.c_uint32(rounded)
        parts = map(pointer, (x, lowered, out))
        probe.probe_low_rank(isa.encode(), *map(pointer, factors), *sizes, *parts)
        terms = np.abs(a.T.astype(np.float64)) @ np.abs(x)
        assert_close(lowered[:rank], low * scale, EPS * cols * terms * scale)
        assert not lowered[rank:].any()
        assert_close(
            out, expected, EPS * (cols + rank) * (1 + terms @ np.abs(b.astype(np.float64)))
        )
        found[isa] = out
    for isa in SIMD_PATHS:
        np.testing.assert_array_equal(found[isa], found[SIMD_PATHS[0]])


def test_rounded_factors_lose_little(probe: ctypes.CDLL) -> None:
    rng = np.random.default_rng(5)
    rank, rows, cols = 16, 64, 256
    a, b, x = (
        rng.normal(size=shape).astype(np.float32) for shape in ((cols, rank), (rank, rows), cols)
    )
    b *= 10.0 ** rng.uniform(-3, 3, (rank, 1)).astype(np.float32)  # each rank has its own scale
    lowered, out = np.zeros(rank, np.float32), np.zeros(rows, np.float32)
    sizes = *map(ctypes.c_size_t, (rank, rows, cols)), ctypes.c_uint32(1)
    parts = map(pointer, (a, b)), sizes, map(pointer, (x, lowered, out))
    probe.probe_low_rank(isa_names()[0].encode(), *(value for part in parts for value in part))
    exact = (x.astype(np.float64) @ a) @ b
    assert np.linalg.norm(out - exact) < 0.03 * np.linalg.norm(exact)


@dataclass
class Attention:
    """Queries against a cache as it lies in memory; what lies past its end is NaN."""

    rows: int
    dim: int
    end: int
    int8: bool

    def __post_init__(self) -> None:
        rng = np.random.default_rng([self.rows, self.dim, self.end])
        room = -(-self.end // BLOCK) * BLOCK
        self.queries = (rng.normal(size=(self.rows, self.dim)) / math.sqrt(self.dim)).astype("f4")
        self.scales = rng.uniform(0.01, 0.03, (2, room)).astype(np.float32)
        parts = rng.normal(size=(2, room, self.dim)).astype(np.float16)
        if self.int8:
            parts = rng.integers(-127, 128, parts.shape, dtype=np.int8)
            self.scales[:, self.end :] = np.nan
        else:
            parts[:, self.end :] = np.nan
        keys, values = parts
        blocks = keys.reshape(-1, BLOCK, self.dim).transpose(0, 2, 1)
        if self.int8:  # four products are added at once: of four channels, of four positions
            blocks = keys.reshape(-1, BLOCK, self.dim // 4, 4).transpose(0, 2, 1, 3)
            values = values.reshape(-1, 4, self.dim).transpose(0, 2, 1)
        self.keys, self.values = map(np.ascontiguousarray, (blocks, values))
        factors = self.scales if self.int8 else np.ones_like(self.scales)
        self.dense = parts.astype(np.float64) * factors[..., None].astype(np.float64)

    def run(
        self,
        probe: ctypes.CDLL,
        isa: str,
        limits: np.ndarray,
        starts: np.ndarray | None,
        cap: float,
        first: int,
        begin: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Attention in spans counted from `first` on: the result, and the log of its sum."""
        out = np.full((self.rows, self.dim), np.nan, np.float32)
        maximum, weight = np.full((2, self.rows), np.nan, np.float32)
        limits = limits.astype(np.uint32)
        starts = None if starts is None else starts.astype(np.uint32)
        scales = self.scales if self.int8 else [None, None]
        arrays = (self.queries, limits, starts, self.keys, self.values, *scales)
        sizes = (self.rows, self.dim, first, begin, self.end)
        job = _Job(*sizes, *(pointer(array) for array in arrays))
        job.cap = cap
        job.out, job.maximum, job.weight = (pointer(a).value for a in (out, maximum, weight))
        probe.probe_attend(isa.encode(), ctypes.byref(job))
        return out / weight[:, None], maximum + np.log2(weight)

    def expected(
        self, limits: np.ndarray, starts: np.ndarray | None, cap: float
    ) -> tuple[np.ndarray, np.ndarray]:
        keys, values = self.dense[:, : self.end]
        queries = self.queries.astype(np.float64)
        if self.int8:
            unit = np.abs(queries).max(1, keepdims=True) / 127
            queries = np.rint(queries / unit) * unit
        scores = queries @ keys.T
        if cap:
            scores = cap * np.tanh(scores / cap)
        positions = np.arange(self.end)
        seen = positions < limits[:, None]
        if starts is not None:
            seen &= positions >= starts[:, None]
        weights = np.where(seen, np.exp2(scores), 0)
        total = weights.sum(1)
        return weights @ values / total[:, None], np.log2(total)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dim", [16, 48, 128])
def test_attention(int8: bool, dim: int, probe: ctypes.CDLL) -> None:
    """Rows that see from here to there, in spans from here or before, with and without a cap."""
    for rows, end in itertools.product((1, 2, 3, 7, 12), (1, 16, 65, 200, 530)):
        case = Attention(rows, dim, end, int8)
        rng = np.random.default_rng(rows)
        limits = np.sort(rng.integers(1, end + 1, rows))
        limits[-1] = end
        late = np.maximum(0, limits - rng.integers(1, 40, rows))
        for starts, cap in itertools.product((None, late), (0.0, 1.5)):
            begin = 0 if starts is None else int(starts.min()) // BLOCK * BLOCK
            expected, total = case.expected(limits, starts, cap)
            scale = np.abs(case.dense[1, :end]).max()
            for first in {0, begin}:
                results = {
                    isa: case.run(probe, isa, limits, starts, cap, first, begin)
                    for isa in isa_names()
                }
                tolerance = INT8_ATTENTION_TOLERANCE if int8 else ATTENTION_TOLERANCE
                for out, log_total in results.values():
                    assert_close(out, expected, tolerance * scale)
                    assert_close(log_total, total, ATTENTION_TOLERANCE * 10)
                for isa in SIMD_PATHS[1:]:
                    np.testing.assert_array_equal(results[isa][0], results[SIMD_PATHS[0]][0])


def test_attention_on_arm(arm_attention_probe: Path) -> None:
    """Each path against the scalar one, under qemu."""
    command = ["qemu-aarch64-static", "-cpu", "max", str(arm_attention_probe)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    tried = set()
    for line in done.stdout.splitlines():
        isa, kv_type, error = line.split()
        tolerance = ATTENTION_TOLERANCE if kv_type == "fp16" else INT8_ATTENTION_TOLERANCE
        assert float(error) <= tolerance * LARGEST_VALUE, line
        tried.add((isa, kv_type))
    assert tried == set(itertools.product(instructions.PATHS, ("fp16", "int8")))


def test_the_comparison_can_fail(probe: ctypes.CDLL) -> None:
    """A position too many, a cap that is another, a NaN."""
    case = Attention(3, 48, 65, False)
    limits, starts = np.array([30, 40, 65]), np.array([10, 20, 30])
    out, _ = case.run(probe, "scalar", limits, starts, 1.5, 0, 0)
    scale = np.abs(case.dense[1, :65]).max()
    for other in (
        case.expected(limits, starts - 1, 1.5)[0],
        case.expected(limits + np.array([1, 0, 0]), starts, 1.5)[0],
        case.expected(limits, starts, 1.6)[0],
    ):
        with pytest.raises(AssertionError):
            assert_close(out, other, ATTENTION_TOLERANCE * scale)
    with pytest.raises(AssertionError):
        assert_close(np.full(3, np.nan), np.zeros(3), 1.0)
