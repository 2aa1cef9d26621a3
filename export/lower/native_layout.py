"""Matrices in the layout of the native operators, ``runtime/ops/weight_layout.h``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pocketslm.errors import ExportError
from pocketslm.models.tensors import Array, QuantTensor, Weight
from pocketslm.runtime.ops.ids import KIND

ALIGNMENT = 64
BLOCK_ROWS = 16
GROUP = 32


def _pad_rows(array: Array, rows: int) -> Array:
    if array.shape[0] == rows:
        return array
    return np.pad(array, [(0, rows - array.shape[0])] + [(0, 0)] * (array.ndim - 1))


def _aligned(block_rows: Array) -> npt.NDArray[np.uint8]:
    """Blocks as bytes, [blocks, bytes], each padded to whole cache lines."""
    flat = np.ascontiguousarray(block_rows).view(np.uint8).reshape(block_rows.shape[0], -1)
    return np.pad(flat, ((0, 0), (0, -flat.shape[1] % ALIGNMENT)))


def _to_half(values: Array) -> tuple[Array, bool]:
    """Half precision, and whether anything was lost."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise ExportError("a quantization scale or minimum does not fit in half precision")
    return half, bool((half.astype(np.float32) != values.astype(np.float32)).any())


def pack_matrix(weight: Weight, *, head: bool = False) -> tuple[int, npt.NDArray[np.uint8], bool]:
    """A matrix [N, K] in the packed layout: kind, bytes, and whether scales were rounded.

    Symmetric 8-bit codes of an output ``head`` are split, so that most of the low nibbles need not
    be read where the most probable token is all that is asked for.
    """
    n, k = weight.shape
    rows = -(-n // BLOCK_ROWS) * BLOCK_ROWS
    blocks = rows // BLOCK_ROWS
    if not isinstance(weight, QuantTensor):
        dtype = np.float16 if weight.dtype == np.float16 else np.float32
        if not np.isfinite(weight).all():
            raise ExportError("a matrix holds values that are no numbers")
        padded = _pad_rows(weight.astype(dtype), rows).reshape(blocks, BLOCK_ROWS, k)
        data = np.ascontiguousarray(padded.transpose(0, 2, 1)).view(np.uint8).reshape(-1)
        return KIND["f32" if dtype == np.float32 else "f16"], data, False
    if k % GROUP or weight.group_size % GROUP:
        raise ExportError(
            f"the native operators need groups of a multiple of {GROUP} along K; "
            f"got K={k}, group {weight.group_size}"
        )
    groups = k // GROUP
    repeat = weight.group_size // GROUP
    codes = _pad_rows(weight.unpacked(), rows)
    scheme = "min" if weight.minimums is not None else "sym"
    scheme = "zp" if weight.zero_points is not None else scheme
    if head and (weight.bits, scheme) == (8, "sym"):
        scheme = "split"

    def nibbles(values: Array) -> Array:
        # Low nibbles hold the even quads of columns, high nibbles the odd ones.
        quads = values.reshape(blocks, BLOCK_ROWS, groups, 4, 2, 4)
        packed: Array = (quads[..., 0, :] | quads[..., 1, :] << 4).transpose(0, 2, 3, 1, 4)
        return packed

    rest: list[Array] = []
    if scheme == "split":
        codes, rest = nibbles(codes >> 4), [nibbles(codes & 15)]
    elif weight.bits == 4:
        codes = nibbles(codes)
    else:
        codes = codes.reshape(blocks, BLOCK_ROWS, groups, 8, 4).transpose(0, 2, 3, 1, 4)

    def per_group(values: Array) -> npt.NDArray[np.uint8]:
        spread = _pad_rows(np.repeat(values, repeat, axis=1), rows)
        return _aligned(spread.reshape(blocks, BLOCK_ROWS, groups).transpose(0, 2, 1))

    scales, lossy = _to_half(weight.scales)
    parts = [_aligned(codes), per_group(scales), *map(_aligned, rest)]
    if weight.minimums is not None:
        minimums, rounded = _to_half(weight.minimums)
        lossy |= rounded
        parts.append(per_group(minimums))
    elif weight.zero_points is not None:
        parts.append(per_group(weight.zero_points))
    return KIND[f"q{weight.bits}_{scheme}"], np.concatenate(parts, axis=1).reshape(-1), lossy
