"""Stored weights in the forms that XNNPACK multiplies with."""

from __future__ import annotations

import numpy as np

from pocketslm.export.lower.executorch.xnnpack import Filter
from pocketslm.models.tensors import Array, QuantTensor, Weight, pack_codes

_GROUPS_OF = 32  # group sizes that XNNPACK's int4 products take are multiples of this
_ZERO = 8  # and the code that means zero
_ROWS = 256  # that are worked on at once
_SMALLEST = np.float32(2.0**-100)  # scales have to be positive and normal


def product_form(weight: Weight) -> tuple[Filter, Array | None]:
    """The filter, and offsets [N, K / group] to be multiplied with sums of the input's groups.

    Int4 keeps its codes. XNNPACK knows positive bfloat16 scales and the zero 8 only: what a
    minimum, another zero point or a negative scale adds to that is one number a group, the offset;
    None where all are 0. What has no such form becomes int8 with one scale a row.
    """
    if not isinstance(weight, QuantTensor):
        return Filter(weight.astype(np.float32)), None
    if weight.bits != 4 or weight.group_size % _GROUPS_OF:
        return row_form(weight), None
    scales = weight.scales.astype(np.float32)
    if weight.minimums is not None:
        offsets = weight.minimums.astype(np.float32) + _ZERO * scales
    elif weight.zero_points is not None:
        offsets = (np.float32(_ZERO) - weight.zero_points) * scales
    else:
        offsets = np.zeros_like(scales)
    codes = weight.codes
    negative, none = scales < 0, np.abs(scales) < _SMALLEST
    if negative.any() or none.any():
        # s * (c - 8) = -s * ((15 - c) - 8) - s
        offsets = offsets - np.where(negative, scales, 0)
        grouped = weight.unpacked().reshape(*scales.shape, weight.group_size)
        grouped = np.where(negative[..., None], 15 - grouped, grouped)
        grouped = np.where(none[..., None], np.uint8(_ZERO), grouped)
        codes = pack_codes(grouped.reshape(weight.shape), 4)
        scales = np.maximum(np.abs(scales), _SMALLEST)
    return Filter(codes, bfloat16(scales), weight.group_size), offsets if offsets.any() else None


def row_form(weight: QuantTensor) -> Filter:
    """The nearest int8 codes with one scale a row."""
    codes = np.empty(weight.shape, np.int8)
    scales = np.empty(len(codes), np.float32)
    for first in range(0, len(codes), _ROWS):  # so few that their floats stay in the CPU's cache
        part = slice(first, first + _ROWS)
        array = weight.rows(part).dequantize()
        scales[part] = np.maximum(np.abs(array).max(1) / np.float32(127), _SMALLEST)
        codes[part] = np.rint(array / scales[part, None])
    return Filter(codes, scales)


def bfloat16(array: Array) -> Array:
    """Rounded to the nearest bfloat16, ties to even; its bits as uint16."""
    bits = array.astype(np.float32).view(np.uint32)
    rounded: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def holds_bfloat16(array: Array) -> bool:
    """Whether rounding to bfloat16 would change nothing."""
    wide = array.astype(np.float32)
    return bool(((bfloat16(wide).astype(np.uint32) << 16).view(np.float32) == wide).all())
