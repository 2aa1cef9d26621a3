"""Every kernel path against the scalar one, and the scalar one against float64."""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from earlier_model_file import split_head
from native_support import FLOATS, PLAIN, SCHEMES, WHOLE, make_weight, packed

from pocketslm.models.tensors import QuantTensor, Weight, pack_codes
from pocketslm.runtime.backends import native_library as native
from pocketslm.runtime.ops import build, built

SEED = 20240607
POISON = np.float32(np.nan)
EPS = float(np.finfo(np.float32).eps)
# Rounding errors of a sum of n terms grow with n times the magnitude of what is summed.
SUM_TOLERANCE = 4 * EPS
# Half a step of an int8 activation, and a little for the rounding of its scale.
ACTIVATION_STEP = 0.5 * 1.001 / 127

ROWS = [1, 15, 16, 17, 40]


def columns(scheme: str) -> list[int]:
    return [256, 768] if scheme in WHOLE and scheme[-1] != "r" else [32, 96, 288]


TOKENS = [1, 2, 3, 7, 16, 21]

SIMD_PATHS = [isa for isa in native.isa_names() if isa != "scalar"]


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(),
    reason="the flags of an x86-64 processor, as Linux names them",
)
def test_paths_are_those_of_the_processors_flags() -> None:
    """As Linux reads them; the program asks the processor itself."""
    flags = set(re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    avx2 = {"avx", "avx2", "fma", "f16c"}
    avx512 = avx2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
    paths = (("avx512_vnni", avx512), ("avx_vnni", avx2 | {"avx_vnni"}), ("avx2", avx2))
    wanted = [name for name, needs in paths if needs <= flags]
    assert [*wanted, "scalar"] == native.isa_names()


def test_avx_vnni_in_another_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few processors with AVX-512 have AVX-VNNI. The path's file compiled for AVX-512 must pass the
    tests of that path, and agree with the others."""
    if "avx512_vnni" not in SIMD_PATHS:
        pytest.skip("runs AVX-VNNI's path in the encoding of AVX-512, which this CPU lacks")
    flags = ("-mavx2", "-mfma", "-mf16c", "-mavx512vl", "-mavx512vnni")
    monkeypatch.setitem(build.KERNELS["x86_64"], "kernels_avx_vnni", flags)
    library = build.build_library(tmp_path)
    environment = os.environ | {"POCKETSLM_LIBRARY": str(library)}
    list_paths = (
        "from pocketslm.runtime.backends.native_library import isa_names; print(isa_names())"
    )
    command = [sys.executable, "-c", list_paths]
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert "'avx_vnni'" in found.stdout
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    # The other paths are those of the library that this process tests.
    only = "(avx_vnni or agree_to_the_bit) and not encoding"
    done = subprocess.run([*command, "-k", only], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def pack(weight: Weight, scheme: str) -> tuple[int, np.ndarray]:
    kind, data = packed(weight, head=scheme in ("q8 split", "q8 apart"))
    return split_head(weight.shape, data) if scheme == "q8 split" else (kind, data)


def make_activations(tokens: int, cols: int, rng: np.random.Generator) -> np.ndarray:
    x = rng.normal(size=(tokens, cols)).astype(np.float32)
    x[0, :32] = 0  # a group without a scale
    x[-1, -1] = 300  # an outlier
    return x


def matmul(isa: str, packed: tuple[int, np.ndarray], rows: int, x: np.ndarray) -> np.ndarray:
    """The path's product, with an output that was poisoned and guarded."""
    kind, data = packed
    library = native.load_library()
    backing = np.empty(data.size + 64, np.uint8)
    start = -backing.ctypes.data % 64
    backing[start : start + data.size] = data
    guard = 16
    out = np.full(x.shape[0] * rows + guard, POISON, np.float32)
    # One float off any alignment: activations may lie anywhere.
    shifted = np.empty(x.size + 1, np.float32)[1:]
    shifted[:] = x.reshape(-1)
    error = native.ErrorText()
    status = library.pslm_matmul(
        isa.encode(),
        kind,
        backing.ctypes.data + start,
        data.size,
        rows,
        x.shape[1],
        shifted.ctypes.data,
        x.shape[0],
        out.ctypes.data,
        error.argument,
    )
    error.check(status)
    assert np.isnan(out[-guard:]).all(), "wrote past the output"
    return out[:-guard].reshape(x.shape[0], rows)


def dense(weight: Weight) -> np.ndarray:
    values = weight.dequantize() if isinstance(weight, QuantTensor) else weight
    return values.astype(np.float64)


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: np.ndarray) -> None:
    error = np.abs(actual.astype(np.float64) - expected)
    worst = np.unravel_index(np.argmax(np.nan_to_num(error - tolerance, nan=np.inf)), error.shape)
    # Written so that a NaN fails.
    assert (error <= tolerance).all(), f"at {worst}: {actual[worst]} against {expected[worst]}"


def magnitude(weight: Weight, x: np.ndarray) -> np.ndarray:
    """What a product's rounding errors scale with: the terms before they cancel."""
    if not isinstance(weight, QuantTensor):
        return np.abs(x).astype(np.float64) @ np.abs(dense(weight)).T
    group, bits = weight.group_size, 7 if weight.table else weight.bits
    top = np.abs(weight.scales.astype(np.float64)).repeat(group, 1) * 2**bits
    if weight.minimums is not None:
        top += np.abs(weight.minimums.astype(np.float64)).repeat(group, 1)
    return np.abs(x).astype(np.float64) @ top.T


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", ROWS)
def test_scalar_path_matches_float64(scheme: str, rows: int) -> None:
    rng = np.random.default_rng(SEED)
    for cols, tokens in itertools.product(columns(scheme), TOKENS):
        weight = make_weight(scheme, rows, cols, rng)
        x = make_activations(tokens, cols, rng)
        w = dense(weight)
        tolerance = SUM_TOLERANCE * cols * magnitude(weight, x)
        if isinstance(weight, QuantTensor):
            peaks = np.abs(x).reshape(tokens, -1, 32).max(2).astype(np.float64)
            tolerance += (peaks * ACTIVATION_STEP).repeat(32, 1) @ np.abs(w).T
        out = matmul("scalar", pack(weight, scheme), rows, x)
        assert_close(out, x.astype(np.float64) @ w.T, tolerance)


@pytest.mark.parametrize("isa", SIMD_PATHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_simd_paths_match_scalar(isa: str, scheme: str) -> None:
    rng = np.random.default_rng(SEED)
    for rows, cols, tokens in itertools.product(ROWS, columns(scheme), TOKENS):
        weight = make_weight(scheme, rows, cols, rng)
        x = make_activations(tokens, cols, rng)
        packed = pack(weight, scheme)
        # The integer sums are the same; only float additions may round differently.
        terms = cols if scheme in FLOATS else cols // 32 * 6
        tolerance = SUM_TOLERANCE * terms * magnitude(weight, x)
        assert_close(matmul(isa, packed, rows, x), matmul("scalar", packed, rows, x), tolerance)


@pytest.mark.skipif(len(SIMD_PATHS) < 2, reason="this CPU has one SIMD path")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_simd_paths_agree_to_the_bit(scheme: str) -> None:
    rng = np.random.default_rng(SEED)
    cols = columns(scheme)[-1]
    weight = make_weight(scheme, 48, cols, rng)
    x = make_activations(7, cols, rng)
    packed = pack(weight, scheme)
    first, *others = (matmul(isa, packed, 48, x) for isa in SIMD_PATHS)
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("isa", native.isa_names())
def test_extreme_codes_do_not_saturate(isa: str) -> None:
    """All codes and activations at their extremes: where 16-bit sums would overflow."""
    for scheme, sign in itertools.product([*PLAIN, *WHOLE], (1, -1)):
        weight = make_weight(scheme, 16, columns(scheme)[-1], np.random.default_rng(SEED))
        assert isinstance(weight, QuantTensor)
        top = 2**weight.bits - 1
        zeros = None if weight.zero_points is None else weight.zero_points * np.uint8(0)
        codes = pack_codes(np.full(weight.shape, top, np.uint8), weight.bits)
        weight = replace(weight, codes=codes, zero_points=zeros)
        x = np.full((5, weight.shape[1]), sign * 127.0, np.float32)
        expected = x.astype(np.float64) @ dense(weight).T
        out = matmul(isa, pack(weight, scheme), 16, x)
        assert_close(out, expected, 1e-5 * 127 * np.abs(dense(weight)).sum(1))


@pytest.mark.parametrize("isa", native.isa_names())
@pytest.mark.parametrize(
    "scheme", ["q4 sym", "q4 min", "q8 zp", "q8 apart", "q5 sym", "iq4", "f32"]
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_reaches_every_product(
    value: float, scheme: str, isa: str
) -> None:
    rng = np.random.default_rng(2)
    weight = make_weight(scheme, 48, 96, rng)
    for at in (0, 15, 16, 31, 40, 95):  # in each half of a vector, and in the last group
        x = rng.normal(size=(TOKENS[-1], 96)).astype(np.float32)
        x[3, at] = value
        out = matmul(isa, pack(weight, scheme), 48, x)
        assert not np.isfinite(out[3]).any()
        assert np.isfinite(np.delete(out, 3, 0)).all()


@pytest.mark.parametrize("isa", native.isa_names())
def test_the_smallest_numbers_are_as_good_as_zero(isa: str) -> None:
    """127 divided by them is infinite, and was a code once."""
    weight = make_weight("q8 sym", 32, 64, np.random.default_rng(3))
    for peak in (1e-45, 1e-40, 3e-37, 5e-37, 1e-36):
        x = np.zeros((1, 64), np.float32)
        x[0, ::3] = peak
        out = matmul(isa, pack(weight, "q8 sym"), 32, x)
        assert np.abs(out).max() <= 64 * 128 * 0.1 * peak


def test_comparator_catches_a_wrong_code_and_a_nan() -> None:
    rng = np.random.default_rng(SEED)
    weight = make_weight("q4 min", 16, 96, rng)
    x = make_activations(3, 96, rng)
    kind, data = packed(weight)
    good = matmul("scalar", (kind, data), 16, x)
    tolerance = SUM_TOLERANCE * 9 * magnitude(weight, x)
    wrong = data.copy()
    wrong[5] ^= 0x10  # one nibble, by one
    with pytest.raises(AssertionError):
        assert_close(matmul("scalar", (kind, wrong), 16, x), good, tolerance)
    with_nan = good.copy()
    with_nan[1, 1] = np.nan
    with pytest.raises(AssertionError):
        assert_close(with_nan, good, tolerance)


def test_broken_kernel_is_caught(tmp_path: Path) -> None:
    """A kernel that forgets the high nibbles' shift must fail the comparison above."""
    if "avx2" not in SIMD_PATHS:
        pytest.skip("breaks the AVX2 path, which this CPU lacks")
    source = (built.SOURCES / "kernels_ymm.inl").read_text()
    broken = source.replace("moved<-first * i>", "moved<0>")
    assert broken != source
    (tmp_path / "kernels_ymm.inl").write_text(broken)  # found before the whole one
    file = tmp_path / "kernels_avx2.cpp"
    file.write_text(
        (built.SOURCES / file.name).read_text()
        + """
extern "C" void broken_matmul(const uint8_t* blocks, size_t cols, const int8_t* codes,
                              const float* scales, const float* sums, float* out) {
  const pocketslm::ActivationTile tile{1,    nullptr, 0,       codes,  scales,
                                       sums, nullptr, nullptr, nullptr};
  const pocketslm::Matrix w =
      pocketslm::matrix_at(blocks, pocketslm::WeightKind::q4_min, 16, cols);
  pocketslm::kAvx2Kernels.matmul[3](w.first, 1, cols, tile, out, 16);
}
"""
    )
    toolchain = build.find_toolchain()
    library = tmp_path / "broken.so"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", *toolchain.kernel_flags("kernels_avx2")]
    command = [*toolchain.command, *flags, "-I", str(built.SOURCES), str(file), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True)
    rng = np.random.default_rng(SEED)
    weight = make_weight("q4 min", 16, 32, rng)
    data = packed(weight)[1]
    codes = rng.integers(-127, 128, 32, dtype=np.int8)
    backing = np.empty(data.size + 64, np.uint8)
    start = -backing.ctypes.data % 64
    backing[start : start + data.size] = data
    scale, total = np.ones(1, np.float32), np.array([codes.sum()], np.float32)
    out = np.full(16, POISON, np.float32)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (codes, scale, total, out)]
    blocks = ctypes.c_void_p(backing.ctypes.data + start)
    ctypes.CDLL(str(library)).broken_matmul(blocks, ctypes.c_size_t(32), *pointers)
    x = codes[None].astype(np.float32)
    x[0, np.argmax(np.abs(x))] = 127  # so that the scale is 1
    expected = x.astype(np.float64) @ dense(weight).T
    with pytest.raises(AssertionError):
        assert_close(out[None], expected, SUM_TOLERANCE * 9 * magnitude(weight, x))


def test_bad_arguments_are_errors() -> None:
    rng = np.random.default_rng(SEED)
    weight = make_weight("q4 sym", 16, 64, rng)
    kind, data = packed(weight)
    x = make_activations(1, 64, rng)
    with pytest.raises(native.UsageError, match="wrong kind"):
        matmul("scalar", (kind, data[:-64]), 16, x)
    with pytest.raises(native.BackendError, match="kernel path"):
        matmul("mmx", (kind, data), 16, x)
    library = native.load_library()
    assert library.pslm_packed_bytes(2, 16, 33) == 0
    assert library.pslm_packed_bytes(99, 16, 32) == 0
