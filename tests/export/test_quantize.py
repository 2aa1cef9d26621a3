"""Groupwise quantization against plain definitions and the gguf library."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from pocketslm.errors import ExportError
from pocketslm.export.quantize import rtn
from pocketslm.models.tensors import QuantTensor, concat_rows, pack_codes

RNG = np.random.default_rng(0)
WEIGHT = (RNG.standard_normal((24, 256)) * np.exp(RNG.standard_normal((24, 1)))).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_value_is_within_half_a_step(bits: int, group: int, symmetric: bool) -> None:
    quantized = rtn.quantize(WEIGHT, bits, group, symmetric)
    assert (quantized.bits, quantized.group_size) == (bits, group)
    error = np.abs(quantized.dequantize() - WEIGHT).reshape(24, -1, group)
    step = np.abs(quantized.scales)[..., None]
    # Symmetric 4-bit has no code for the positive extreme: it may be a whole step away. An
    # asymmetric zero is rounded too.
    allowed = step * (1.0 if symmetric and bits == 4 else 0.5 if symmetric else 1.0)
    assert (error <= allowed * (1 + 1e-5)).all()
    assert not (error <= allowed * 0.4).all()  # the bound is not idle


def test_symmetric_int4_is_q4_0() -> None:
    """Scales are llama.cpp's Q4_0; codes are at least as near, being chosen for those scales."""
    kind = gguf.GGMLQuantizationType.Q4_0
    blocks = quantize(WEIGHT, kind)
    ours = rtn.quantize(WEIGHT, 4, 32)
    scales = blocks.reshape(24, -1, 18)[..., :2].copy().view(np.float16)[..., 0]
    np.testing.assert_array_equal(ours.scales, scales)
    error = np.mean((ours.dequantize() - WEIGHT) ** 2)
    assert error <= np.mean((dequantize(blocks, kind) - WEIGHT) ** 2) * (1 + 1e-6)


def test_zero_groups_stay_zero() -> None:
    weight = WEIGHT.copy()
    weight[3, 32:64] = 0
    for symmetric in (True, False):
        for bits in (4, 8):
            out = rtn.quantize(weight, bits, 32, symmetric).dequantize()
            assert np.isfinite(out).all()
            assert (out[3, 32:64] == 0).all()


def test_an_odd_k_takes_the_largest_group_that_divides() -> None:
    assert rtn.quantize(np.ones((2, 576), np.float32), 4, 128).group_size == 64
    with pytest.raises(ExportError, match="rows of 24"):
        rtn.quantize(np.ones((2, 24), np.float32), 4, 32)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damaged_weights_are_refused(bad: float) -> None:
    with pytest.raises(ExportError, match="too large for fp16"):
        rtn.quantize(np.full((1, 32), 1e9, np.float32), 4, 32)
    weight = WEIGHT.copy()
    weight[0, 0] = bad
    with pytest.raises(ExportError, match="NaN or infinite"):
        rtn.quantize(weight, 4, 32)


def test_dequantize_is_the_definition() -> None:
    """The docstring's formula, one value at a time."""
    codes = RNG.integers(0, 16, (3, 64)).astype(np.uint8)
    scales = RNG.standard_normal((3, 2)).astype(np.float32)
    zero_points = RNG.integers(0, 16, (3, 2)).astype(np.uint8)
    minimums = RNG.standard_normal((3, 2)).astype(np.float32)
    packed = pack_codes(codes, 4)
    cases = [({}, 8.0, 0.0), ({"zero_points": zero_points}, None, 0.0)]
    cases.append(({"minimums": minimums}, 0.0, None))
    for extra, zero, offset in cases:
        tensor = QuantTensor(packed, scales, 4, 32, **extra)
        out = tensor.dequantize()
        for n in range(3):
            for k in range(64):
                z = zero_points[n, k // 32] if zero is None else zero
                m = minimums[n, k // 32] if offset is None else offset
                expected = scales[n, k // 32] * (float(codes[n, k]) - float(z)) + m
                assert out[n, k] == pytest.approx(expected, rel=1e-6)


def test_concatenated_rows_are_the_parts() -> None:
    parts = [rtn.quantize(WEIGHT, 4, 32), rtn.quantize(WEIGHT * 3, 4, 32)]
    whole = concat_rows(parts).dequantize()
    np.testing.assert_array_equal(whole, np.concatenate([p.dequantize() for p in parts]))
