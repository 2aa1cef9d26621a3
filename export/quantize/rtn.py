"""Round-to-nearest groupwise quantization: the baseline that needs no data."""

from __future__ import annotations

import math

import numpy as np

from pocketslm.errors import ExportError
from pocketslm.models.tensors import Array, QuantTensor, pack_codes

_MIN_GROUP = 16  # the smallest that onnxruntime's MatMulNBits takes


def quantize(weight: Array, bits: int, group_size: int, symmetric: bool = True) -> QuantTensor:
    """Quantize float weight [N, K] in groups along K, each value to its nearest code.

    Symmetric 4-bit is llama.cpp's Q4_0: the value of largest magnitude becomes code 0, so that
    all 16 codes are used. Symmetric 8-bit scales by the largest magnitude over 127. Asymmetric
    codes span [min, max] widened to hold 0. Where ``group_size`` does not divide K the largest
    group that does is taken. Scales are fp16, which every target holds, and codes are chosen for
    the rounded scale; a group of zeros gets scale 0. Raises ExportError for NaN, infinity, weights
    beyond fp16's reach or a K that no group divides.
    """
    n, k = weight.shape
    group = math.gcd(group_size, k)
    if group < _MIN_GROUP:
        raise ExportError(
            f"rows of {k} weights do not divide into groups of {group_size} or any power of two "
            f"from {_MIN_GROUP}"
        )
    if not np.isfinite(weight).all():
        raise ExportError("a weight is NaN or infinite; the checkpoint is damaged")
    groups = weight.astype(np.float32).reshape(n, k // group, group)
    top = 2**bits - 1
    zero_points = None
    if symmetric:
        zero = np.float32(2 ** (bits - 1))
        if bits == 4:
            extreme = np.abs(groups).argmax(2, keepdims=True)
            scales = np.take_along_axis(groups, extreme, 2) / -zero
        else:
            scales = np.abs(groups).max(2, keepdims=True) / (zero - 1)
    else:
        low = np.minimum(groups.min(2, keepdims=True), 0)
        scales = _half((np.maximum(groups.max(2, keepdims=True), 0) - low) / top)
        zero = np.rint(np.divide(-low, scales, out=np.zeros_like(low), where=scales != 0))
        zero = np.clip(zero, 0, top)
        zero_points = zero[..., 0].astype(np.uint8)
    scales = _half(scales)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = np.clip(np.rint(groups * inverse) + zero, 0, top).astype(np.uint8)
    packed = pack_codes(codes.reshape(n, k), bits)
    return QuantTensor(packed, scales[..., 0].astype(np.float16), bits, group, zero_points)


def _half(scales: Array) -> Array:
    """Rounded to what fp16 holds, still as float32."""
    with np.errstate(over="ignore"):
        rounded = scales.astype(np.float16).astype(np.float32)
    if not np.isfinite(rounded).all():
        raise ExportError("a weight is too large for fp16 scales; the checkpoint is damaged")
    return rounded
