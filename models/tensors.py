"""Weights as they travel from checkpoint to graph: plain arrays or groupwise-quantized matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BITS = (2, 3, 4, 5, 6, 8)
# What the codes of a table stand for; fp4 is MXFP4's, times 2.
TABLES: Mapping[str, tuple[int, ...]] = {
    "iq4": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    "fp4": (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),
}
_LOOKED_AT = 1 << 20  # numbers that are looked at together
FACTOR_COLUMNS = 256  # columns that share the factor of whole-number scales


@dataclass(frozen=True, eq=False)
class WholeScales:
    """Scales as whole numbers times a factor of each 256 columns, as GGUF's K-quants have them, or
    of a row.

    ``scale = factor * scales``, and where there are minimums ``minimum = -lowest * minimums``.

    factors, lowest: float16 [N, K/256] or [N, 1]. scales: int8 [N, K/group], with minimums uint8.
    minimums: uint8 [N, K/group]. bits: of a whole number where it is stored, 4 or 8.
    """

    factors: Array
    scales: Array
    lowest: Array | None = None
    minimums: Array | None = None
    bits: int = 8

    def _product(self, factors: Array, numbers: Array) -> Array:
        repeat = numbers.shape[1] // factors.shape[1]
        product: Array = np.repeat(factors.astype(np.float32), repeat, axis=1)
        product *= numbers
        return product

    def values(self) -> tuple[Array, Array | None]:
        """Scales and minimums as float32 [N, K/group]; each product is exact."""
        scales = self._product(self.factors, self.scales)
        if self.lowest is None or self.minimums is None:
            return scales, None
        return scales, -self._product(self.lowest, self.minimums)

    @property
    def nbytes(self) -> int:
        factors = sum(part.nbytes for part in (self.factors, self.lowest) if part is not None)
        numbers = sum(part.size for part in (self.scales, self.minimums) if part is not None)
        return factors + numbers * self.bits // 8

    def each(self, change: Callable[[Array], Array]) -> WholeScales:
        return replace(
            self,
            factors=change(self.factors),
            scales=change(self.scales),
            lowest=None if self.lowest is None else change(self.lowest),
            minimums=None if self.minimums is None else change(self.minimums),
        )


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A matrix [N, K] quantized in groups of ``group_size`` along K.

    ``W[n, k] = scales[n, g] * (code[n, k] - zero) + minimums[n, g]`` with ``g = k // group_size``.
    At most one of ``zero_points`` and ``minimums`` is given:

    - neither: symmetric, ``zero = 2**(bits-1)`` (GGUF Q4_0 and Q8_0, symmetric rounding);
    - ``zero_points`` [N, K/group] uint8: asymmetric with an integer zero;
    - ``minimums`` [N, K/group] float: ``zero = 0`` and a float offset (GGUF Q4_1).

    codes: of 4 bits, uint8 [N, K / 2], the low nibble of a byte is the even column; of other widths
    uint8 [N, K].
    scales: float16 or float32 [N, K/group].
    whole: the scales and minimums once more, where they are whole numbers times a factor.
    table: a name of TABLES: codes stand for its values, and zero is 0.
    """

    codes: Array
    scales: Array
    bits: int
    group_size: int
    zero_points: Array | None = None
    minimums: Array | None = None
    whole: WholeScales | None = None
    table: str | None = None

    def __post_init__(self) -> None:
        assert self.bits in BITS
        assert self.codes.dtype == np.uint8
        assert self.zero_points is None or self.minimums is None
        n, k = self.shape
        for part in (self.scales, self.zero_points, self.minimums):
            assert part is None or part.shape == (n, k // self.group_size), part.shape

    @classmethod
    def with_whole_scales(
        cls, codes: Array, bits: int, group_size: int, whole: WholeScales, table: str | None = None
    ) -> QuantTensor:
        scales, minimums = whole.values()
        return cls(codes, scales, bits, group_size, minimums=minimums, whole=whole, table=table)

    @property
    def shape(self) -> tuple[int, int]:
        n, packed = self.codes.shape
        return n, packed * (2 if self.bits == 4 else 1)

    @property
    def nbytes(self) -> int:
        """Bytes that the codes and what scales them take where they are packed."""
        n, k = self.shape
        codes = n * k * self.bits // 8
        if self.whole is not None:
            return codes + self.whole.nbytes
        parts = (self.scales, self.zero_points, self.minimums)
        return codes + sum(part.nbytes for part in parts if part is not None)

    @property
    def scheme(self) -> str:
        """Short name as printed in reports, such as ``int4 g32 min``."""
        kind = "sym" if self.zero_points is None else "zp"
        kind = kind if self.minimums is None else "min"
        name = f"int{self.bits}" if self.table is None else self.table
        whole = "" if self.whole is None else f" s{self.whole.bits}"
        return f"{name} g{self.group_size} {kind}{whole}"

    def unpacked(self) -> Array:
        """The codes as uint8 [N, K], one per byte."""
        if self.bits != 4:
            return self.codes
        out = np.empty(self.shape, np.uint8)
        np.bitwise_and(self.codes, 15, out=out[:, 0::2])
        np.right_shift(self.codes, 4, out=out[:, 1::2])
        return out

    def dequantize(self) -> Array:
        """The matrix as float32 [N, K]."""
        n, k = self.shape
        if self.table is None:
            codes = self.unpacked().astype(np.float32).reshape(n, -1, self.group_size)
        else:
            values = np.array(TABLES[self.table], np.float32)
            codes = values[self.unpacked()].reshape(n, -1, self.group_size)
        if self.minimums is None and self.table is None:
            zero = np.float32(2 ** (self.bits - 1))
            codes -= zero if self.zero_points is None else self.zero_points[:, :, None]
        codes *= self.scales.astype(np.float32)[:, :, None]
        if self.minimums is not None:
            codes += self.minimums.astype(np.float32)[:, :, None]
        return codes.reshape(n, k)

    def rows(self, index: Array | slice) -> QuantTensor:
        """The same matrix with its rows selected or reordered."""
        return self._each(lambda part: part[index])

    def arrays(self) -> list[Array]:
        """All that it holds, each of N rows."""
        found: list[Array] = []

        def keep(part: Array) -> Array:
            found.append(part)
            return part

        self._each(keep)
        return found

    def _each(self, change: Callable[[Array], Array]) -> QuantTensor:
        return replace(
            self,
            codes=change(self.codes),
            scales=change(self.scales),
            zero_points=None if self.zero_points is None else change(self.zero_points),
            minimums=None if self.minimums is None else change(self.minimums),
            whole=None if self.whole is None else self.whole.each(change),
        )

    def widened(self, bits: tuple[int, ...] = (4, 8)) -> QuantTensor:
        """The same values, code for code, in the narrowest of ``bits`` that holds them, with plain
        scales: for those who read no others."""
        values = 8 if self.table is not None else self.bits
        width = min(b for b in bits if b >= values)
        if self.table is None and width == self.bits:
            return replace(self, whole=None)
        codes = self.unpacked()
        if self.table is not None:
            codes = (np.array(TABLES[self.table], np.int16) + 128).astype(np.uint8)[codes]
            return replace(self, codes=codes, bits=width, whole=None, table=None)
        # The middle of the codes stays the middle, which products of small integers are made from.
        shift = 2 ** (width - 1) - 2 ** (self.bits - 1)
        points, lows = self.zero_points, self.minimums
        return replace(
            self,
            codes=pack_codes(codes + np.uint8(shift), width),
            bits=width,
            zero_points=None if points is None else points + np.uint8(shift),
            minimums=None if lows is None else lows - self.scales.astype(np.float32) * shift,
            whole=None,
        )


def pack_codes(codes: Array, bits: int) -> Array:
    """uint8 codes [N, K], one per byte, to the packed form of :class:`QuantTensor`."""
    if bits != 4:
        return codes
    packed: Array = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return packed


Weight = Array | QuantTensor


def floats(weight: Weight) -> Array:
    """The weight as float32."""
    array: Array = weight.dequantize() if isinstance(weight, QuantTensor) else weight
    return array.astype(np.float32, copy=False)


def is_finite(weight: Weight) -> bool:
    """Whether no number of the weight is NaN or infinite; looks at a piece at a time."""
    parts = [weight.scales, weight.minimums] if isinstance(weight, QuantTensor) else [weight]
    for part in parts:
        if part is None:
            continue
        rows = max(1, _LOOKED_AT * len(part) // max(1, part.size))
        if not all(np.isfinite(part[at : at + rows]).all() for at in range(0, len(part), rows)):
            return False
    return True


def stored_bytes(weight: Any) -> int:
    """Bytes that a weight takes: what is not quantized, an array or a tensor, as float32."""
    return weight.nbytes if isinstance(weight, QuantTensor) else 4 * prod(weight.shape)


def concat_rows(parts: Iterable[QuantTensor], rows: int) -> QuantTensor:
    """Stack matrices of one scheme, of ``rows`` in all, along N, exactly; they come one by one."""
    joined, start = None, 0
    for part in parts:
        if joined is None:
            joined = part._each(lambda array: np.empty((rows, *array.shape[1:]), array.dtype))
            arrays = joined.arrays()
        assert (part.scheme, part.scales.dtype) == (joined.scheme, joined.scales.dtype)
        stop = start + part.shape[0]
        for whole, piece in zip(arrays, part.arrays(), strict=True):
            whole[start:stop] = piece
        start = stop
    assert joined is not None
    assert start == rows
    return joined
