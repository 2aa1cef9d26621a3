"""Matrices in the layout of the native operators, ``runtime/ops/weight_layout.h``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pocketslm.errors import ExportError
from pocketslm.models.tensors import FACTOR_COLUMNS, Array, QuantTensor, Weight, WholeScales
from pocketslm.runtime.ops.ids import KIND

ALIGNMENT = 64
BLOCK_ROWS = 16
GROUP = 32
_PIECE = 1 << 20  # weights that are packed at a time: what a cache holds
# How the names of kinds end whose scales are whole numbers, by the columns of a scale; with one
# factor a row they end in r.
_WHOLE = {32: "k", 16: "k16"}
# Those kinds: whether they have minimums, and the bits of a scale.
WHOLE_KINDS = {
    "q3_k": (True, 8),
    "q4_k": (True, 8),
    "q5_k": (True, 8),
    "q6_k": (True, 8),
    "iq4_k": (False, 8),
    "q3_k16": (False, 8),
    "q6_k16": (False, 8),
    "q2_k16": (True, 4),
    **dict.fromkeys(("q2_r", "q3_r", "q4_r", "q5_r", "q6_r"), (True, 8)),
}

Bytes = npt.NDArray[np.uint8]


def kind_of(weight: Weight, *, head: bool = False) -> str | None:
    """The name of the kind that ``weight`` takes, in an output ``head`` or elsewhere.

    None where the native operators have none. Symmetric 8-bit codes of a head are split, so that
    most of the low nibbles need not be read where only the most probable token is asked for.
    """
    if not isinstance(weight, QuantTensor):
        return "f16" if weight.dtype == np.float16 else "f32"
    columns, group = weight.shape[1], weight.group_size
    name = weight.table or f"q{weight.bits}"
    if weight.whole is not None:
        factors = weight.whole.factors.shape[1]
        fits = {"r": factors == 1, _WHOLE.get(group): columns == factors * FACTOR_COLUMNS}
        for end in (end for end, fit in fits.items() if fit):
            form = weight.minimums is not None, weight.whole.bits
            if WHOLE_KINDS.get(f"{name}_{end}") == form and (group == GROUP or end != "r"):
                return f"{name}_{end}"
    if columns % GROUP or group % GROUP:
        return None
    kind = "sym" if weight.minimums is None else "min"
    kind = "zp" if weight.zero_points is not None else kind
    if head and (weight.bits, kind, weight.table) == (8, "sym", None):
        kind = "apart"
    name = weight.table or f"{name}_{kind}"
    return name if name in KIND else None


def pack_matrix(weight: Weight, *, head: bool = False) -> tuple[int, Iterator[Bytes], bool]:
    """A matrix [N, K] in the packed layout: kind, bytes, and whether scales were rounded.

    The bytes come in pieces, which are made one by one: the packed matrix is never held whole.
    ``head``: as in :func:`kind_of`. Raises ExportError for what no kind holds and, as late as with
    the piece they are in, for numbers that are none.
    """
    k = weight.shape[1]
    name = kind_of(weight, head=head)
    if not isinstance(weight, QuantTensor):
        assert name is not None
        return KIND[name], _float_pieces(weight), False
    if name is None:
        raise ExportError(
            f"the native operators have no kind for {weight.scheme} in rows of {k}; they need "
            f"groups of a multiple of {GROUP} along K"
        )
    lossy = False
    if name not in WHOLE_KINDS:
        scales, lossy = _to_half(weight.scales)
        weight = replace(weight, scales=scales)
        if weight.minimums is not None:
            minimums, rounded = _to_half(weight.minimums)
            weight, lossy = replace(weight, minimums=minimums), lossy | rounded
    return KIND[name], _quantized_pieces(weight, name), lossy


def _slices(weight: Weight) -> Iterator[slice]:
    """Whole blocks of rows, as many as pack fast at a time."""
    n, k = weight.shape
    step = max(1, _PIECE // (k * BLOCK_ROWS)) * BLOCK_ROWS
    return (slice(start, start + step) for start in range(0, n, step))


def _whole_blocks(rows: int) -> int:
    return -(-rows // BLOCK_ROWS) * BLOCK_ROWS


def _float_pieces(weight: Array) -> Iterator[Bytes]:
    for rows in _slices(weight):
        piece = weight[rows]
        if not np.isfinite(piece).all():
            raise ExportError("a matrix holds values that are no numbers")
        dtype = np.float16 if weight.dtype == np.float16 else np.float32
        padded = _pad_rows(piece.astype(dtype, copy=False), _whole_blocks(len(piece)))
        blocks = _by_rows(padded)
        yield np.ascontiguousarray(blocks).view(np.uint8).reshape(-1)


def _quantized_pieces(weight: QuantTensor, name: str) -> Iterator[Bytes]:
    for rows in _slices(weight):
        yield _packed(weight.rows(rows), name)
    if name == "q8_apart":  # the low nibbles of all rows stand behind the rest
        for rows in _slices(weight):
            yield _aligned(_plane(_codes(weight.rows(rows)) & 15, 4)).reshape(-1)


def _packed(weight: QuantTensor, name: str) -> Bytes:
    """Rows of a matrix whose scales are halves or whole, as kind ``name``."""
    n, _ = weight.shape
    rows = _whole_blocks(n)
    codes = _codes(weight)
    planes = _plane(codes >> 4, 4) if name == "q8_apart" else _planes(codes, weight.bits)
    parts = [_aligned(planes)]
    if name in WHOLE_KINDS:
        assert weight.whole is not None
        parts.append(_whole_scales(weight.whole, rows, nibbles=name == "q2_k16"))
    else:
        repeat = max(1, weight.group_size // GROUP)
        for values in (weight.scales, weight.minimums, weight.zero_points):
            if values is not None:
                spread = _pad_rows(np.repeat(values, repeat, axis=1), rows)
                parts.append(_aligned(_by_rows(spread)))
    return np.concatenate(parts, axis=1).reshape(-1)


def _codes(weight: QuantTensor) -> Array:
    """As [blocks, rows, groups, 8 quads, 4]."""
    n, k = weight.shape
    padded = _pad_rows(weight.unpacked(), _whole_blocks(n))
    codes: Array = padded.reshape(-1, BLOCK_ROWS, k // GROUP, 8, 4)
    return codes


def _pad_rows(array: Array, rows: int) -> Array:
    if array.shape[0] == rows:
        return array
    return np.pad(array, [(0, rows - array.shape[0])] + [(0, 0)] * (array.ndim - 1))


def _by_rows(array: Array) -> Array:
    """[rows, entries] as [blocks, entries, rows of a block]."""
    parts: Array = array.reshape(-1, BLOCK_ROWS, array.shape[1]).transpose(0, 2, 1)
    return parts


def _aligned(block_rows: Array) -> Bytes:
    """Blocks as bytes, [blocks, bytes], each padded to whole cache lines."""
    flat = np.ascontiguousarray(block_rows).view(np.uint8).reshape(block_rows.shape[0], -1)
    return np.pad(flat, ((0, 0), (0, -flat.shape[1] % ALIGNMENT)))


def _plane(codes: Array, bits: int) -> Array:
    """Codes [blocks, rows, groups, 8 quads, 4] as lines [blocks, groups, lines, rows, 4]."""
    quads = 8 // bits  # in a byte
    lines = codes.reshape(*codes.shape[:3], -1, quads, 4)
    packed = np.zeros_like(lines[..., 0, :])
    for i in range(quads):
        packed |= lines[..., i, :] << (bits * i)
    plane: Array = packed.transpose(0, 2, 3, 1, 4)
    return plane


def _planes(codes: Array, bits: int) -> Array:
    first = bits if bits == 8 else 4 if bits >= 4 else 2
    if bits == first:
        return _plane(codes, bits)
    rest = _plane(codes >> first, bits - first)
    return np.concatenate([_plane(codes & ((1 << first) - 1), first), rest], axis=2)


def _whole_scales(whole: WholeScales, rows: int, *, nibbles: bool) -> Bytes:
    """Factors, then for each scale its byte and its minimum's, for 256 columns after the other."""
    factors = [part for part in (whole.factors, whole.lowest) if part is not None]
    if not all(np.isfinite(part).all() for part in factors):
        raise ExportError("a quantization scale or minimum is no number; the model is damaged")
    scales = _by_rows(_pad_rows(whole.scales.view(np.uint8), rows))
    if whole.minimums is not None:
        minimums = _by_rows(_pad_rows(whole.minimums, rows))
        scales = scales | minimums << 4 if nibbles else np.stack([scales, minimums], axis=2)
    blocks, supers = len(scales), whole.factors.shape[1]
    halves = np.stack([_by_rows(_pad_rows(part, rows)) for part in factors], axis=2)
    heads = np.ascontiguousarray(halves).view(np.uint8).reshape(blocks, supers, -1)
    return _aligned(np.concatenate([heads, scales.reshape(blocks, supers, -1)], axis=2))


def _to_half(values: Array) -> tuple[Array, bool]:
    """Half precision, and whether anything was lost."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise ExportError("a quantization scale or minimum does not fit in half precision")
    return half, bool((half.astype(np.float32) != values.astype(np.float32)).any())
