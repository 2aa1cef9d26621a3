"""Weights as they travel from checkpoint to graph: plain arrays or groupwise-quantized matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A matrix [N, K] quantized in groups of ``group_size`` along K.

    ``W[n, k] = scales[n, g] * (code[n, k] - zero) + minimums[n, g]`` with ``g = k // group_size``.
    At most one of ``zero_points`` and ``minimums`` is given:

    - neither: symmetric, ``zero = 2**(bits-1)`` (GGUF Q4_0 and Q8_0, symmetric rounding);
    - ``zero_points`` [N, K/group] uint8: asymmetric with an integer zero;
    - ``minimums`` [N, K/group] float: ``zero = 0`` and a float offset (GGUF Q4_1).

    codes: uint8 [N, K * bits / 8]; of two 4-bit codes in a byte the low nibble is the even column.
    scales: float16 or float32 [N, K/group].
    """

    codes: Array
    scales: Array
    bits: int
    group_size: int
    zero_points: Array | None = None
    minimums: Array | None = None

    def __post_init__(self) -> None:
        assert self.bits in (4, 8)
        assert self.codes.dtype == np.uint8
        assert self.zero_points is None or self.minimums is None
        n, k = self.shape
        for part in (self.scales, self.zero_points, self.minimums):
            assert part is None or part.shape == (n, k // self.group_size), part.shape

    @property
    def shape(self) -> tuple[int, int]:
        n, packed = self.codes.shape
        return n, packed * 8 // self.bits

    @property
    def nbytes(self) -> int:
        parts = (self.codes, self.scales, self.zero_points, self.minimums)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def scheme(self) -> str:
        """Short name as printed in reports, such as ``int4 g32 min``."""
        kind = "sym" if self.zero_points is None else "zp"
        kind = kind if self.minimums is None else "min"
        return f"int{self.bits} g{self.group_size} {kind}"

    def unpacked(self) -> Array:
        """The codes as uint8 [N, K], one per byte."""
        if self.bits == 8:
            return self.codes
        out = np.empty(self.shape, np.uint8)
        np.bitwise_and(self.codes, 15, out=out[:, 0::2])
        np.right_shift(self.codes, 4, out=out[:, 1::2])
        return out

    def dequantize(self) -> Array:
        """The matrix as float32 [N, K]."""
        n, k = self.shape
        codes = self.unpacked().reshape(n, -1, self.group_size).astype(np.float32)
        if self.minimums is None:
            zero = np.float32(2 ** (self.bits - 1))
            codes -= zero if self.zero_points is None else self.zero_points[:, :, None]
        codes *= self.scales.astype(np.float32)[:, :, None]
        if self.minimums is not None:
            codes += self.minimums.astype(np.float32)[:, :, None]
        return codes.reshape(n, k)

    def rows(self, index: Array | slice) -> QuantTensor:
        """The same matrix with its rows selected or reordered."""
        return replace(
            self,
            codes=self.codes[index],
            scales=self.scales[index],
            zero_points=None if self.zero_points is None else self.zero_points[index],
            minimums=None if self.minimums is None else self.minimums[index],
        )


def pack_codes(codes: Array, bits: int) -> Array:
    """uint8 codes [N, K], one per byte, to the packed form of :class:`QuantTensor`."""
    if bits == 8:
        return codes
    packed: Array = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return packed


Weight = Array | QuantTensor


def floats(weight: Weight) -> Array:
    """The weight as float32."""
    array: Array = weight.dequantize() if isinstance(weight, QuantTensor) else weight
    return array.astype(np.float32, copy=False)


def concat_rows(parts: list[QuantTensor]) -> QuantTensor:
    """Stack matrices of one scheme along N, exactly."""
    assert len({(p.scheme, p.scales.dtype) for p in parts}) == 1

    def stack(name: str) -> Any:
        arrays = [getattr(p, name) for p in parts]
        return None if arrays[0] is None else np.concatenate(arrays)

    return replace(
        parts[0],
        codes=stack("codes"),
        scales=stack("scales"),
        zero_points=stack("zero_points"),
        minimums=stack("minimums"),
    )
