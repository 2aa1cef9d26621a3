"""The values that a group of weights may take, and weights rounded to them.

Every method ends in one of these grids; methods differ in how they choose it (rtn, search, hqq)
and in which of its values each weight takes (nearest, or gptq).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pocketslm.errors import ExportError
from pocketslm.models.tensors import Array, QuantTensor, WholeScales, concat_rows, pack_codes

Kind = Literal["sym", "zp", "min", "min8"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_MIN_GROUP = 16  # the smallest that onnxruntime's MatMulNBits takes
# Weights that are rounded at a time: what stays in a processor's cache, and what keeps a GPU busy.
_CACHED, PIECE = 1 << 18, 1 << 24


@dataclass(frozen=True)
class Spec:
    """What a matrix is rounded to: ``bits`` a weight, in groups of ``group_size`` along a row.

    ``kind``: ``sym`` has no offset, ``zp`` an integer zero point, ``min`` a float minimum; ``min8``
    has minimums, too, and stores them and the scales as whole numbers of 8 bits times factors of
    the row.
    ``plain_scales``: positive and with the 8 significant bits of bfloat16, as XNNPACK wants them.
    """

    bits: int = 4
    group_size: int = 32
    kind: Kind = "sym"
    plain_scales: bool = False

    @property
    def has_minimums(self) -> bool:
        return self.kind in ("min", "min8")

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    def held(self, scales: Tensor) -> Tensor:
        """Scales as they are stored, still as float32."""
        return half(scales.bfloat16().float() if self.plain_scales else scales)

    def size(self, k: int) -> int:
        """The group for rows of ``k``: ``group_size``, or the largest part of it that divides k.

        Raises ExportError where there is none.
        """
        group = math.gcd(self.group_size, k)
        if group < _MIN_GROUP:
            raise ExportError(
                f"rows of {k} weights do not divide into groups of {self.group_size} or any power "
                f"of two from {_MIN_GROUP}"
            )
        return group

    def nbytes(self, rows: int, columns: int) -> int:
        """What a matrix takes."""
        groups = columns // self.size(columns)
        scales = {"sym": 2 * groups, "zp": 3 * groups, "min": 4 * groups, "min8": 2 * groups + 4}
        return rows * (columns * self.bits // 8 + scales[self.kind])

    def split(self, weight: Tensor) -> Tensor:
        """``weight`` [N, K] as groups [N, K / group, group]; ExportError for NaN or infinity."""
        n, k = weight.shape
        group = self.size(k)
        if not torch.isfinite(weight).all():
            raise ExportError("a weight is NaN or infinite; the checkpoint is damaged")
        return weight.float().reshape(n, k // group, group)


@dataclass(frozen=True, eq=False)
class Grid:
    """``value = scale * (code - zero) + minimum`` for groups [N, G, size].

    scales, zeros, minimums: float32 [N, G, 1]. Scales and minimums hold fp16 values, which every
    target carries, or what :meth:`settled` makes of them; a group of equal weights may have scale
    0. ``zeros`` are whole codes.
    """

    spec: Spec
    scales: Tensor
    zeros: Tensor
    minimums: Tensor

    @cached_property
    def inverse(self) -> Tensor:
        return torch.where(self.scales != 0, 1 / self.scales, 0)

    def codes(self, groups: Tensor) -> Tensor:
        """The nearest code of each weight, as floats."""
        codes = ((groups - self.minimums) * self.inverse).round() + self.zeros
        return codes.clamp(0, self.spec.top)

    def values(self, codes: Tensor) -> Tensor:
        return (codes - self.zeros) * self.scales + self.minimums

    def whole(self) -> WholeScales:
        """Scales and minimums as the nearest whole numbers of 8 bits times factors of the row.

        Minimums above 0, of groups without a negative weight, become 0. Of a settled grid these are
        its own values.
        """
        (factors, scales), (lowest, minimums) = map(_in_bytes, (self.scales, -self.minimums))
        return WholeScales(factors, scales, lowest, minimums)

    def settled(self) -> Grid:
        """The grid that is stored: to be called once all groups of a row have theirs."""
        if self.spec.kind != "min8":
            return self
        parts = (torch.from_numpy(part)[..., None] for part in self.whole().values())
        scales, minimums = (part.to(self.scales.device) for part in parts)
        return Grid(self.spec, scales, self.zeros, minimums)

    def pack(self, codes: Tensor) -> QuantTensor:
        """Codes [N, G, size] of a settled grid as they are stored."""
        n, _, group = codes.shape
        kind = self.spec.kind
        packed = pack_codes(_array(codes.reshape(n, -1), np.uint8), self.spec.bits)
        if kind == "min8":
            return QuantTensor.with_whole_scales(packed, self.spec.bits, group, self.whole())
        return QuantTensor(
            packed,
            _array(self.scales[..., 0], np.float16),
            self.spec.bits,
            group,
            zero_points=_array(self.zeros[..., 0], np.uint8) if kind == "zp" else None,
            minimums=_array(self.minimums[..., 0], np.float16) if kind == "min" else None,
        )


# Chooses a grid for groups [N, G, size]; ``importance`` [G, size] weighs the squared errors.
Fit = Callable[[Tensor, Spec, Tensor | None], Grid]


def symmetric_grid(spec: Spec, scales: Tensor) -> Grid:
    zero = torch.full_like(scales, 2 ** (spec.bits - 1))
    if spec.plain_scales:  # turned round, the far end of the codes is one step nearer
        scales = torch.where(scales < 0, -scales * zero / (zero - 1), scales)
    return Grid(spec, spec.held(scales), zero, torch.zeros_like(scales))


def zero_point_grid(spec: Spec, scales: Tensor, low: Tensor) -> Grid:
    """Code 0 stands near ``low``; the zero is rounded to a whole code for the rounded scale."""
    scales = spec.held(scales)
    zeros = torch.where(scales != 0, -low / scales, 0).round().clamp(0, spec.top)
    return Grid(spec, scales, zeros, torch.zeros_like(scales))


def minimum_grid(spec: Spec, scales: Tensor, low: Tensor) -> Grid:
    return Grid(spec, spec.held(scales), torch.zeros_like(scales), half(low))


def round_to_grid(
    weight: Tensor, spec: Spec, fit: Fit, importance: Tensor | None = None
) -> QuantTensor:
    """``weight`` [N, K] with each value at the nearest point of the grid that ``fit`` chooses.

    ``importance`` [K]. Raises ExportError as :meth:`Spec.split` and :func:`half` do.

    Rows know nothing of each other: some are rounded at a time, so that no matrix takes several
    times its size meanwhile.
    """
    piece = _CACHED if weight.device.type == "cpu" else PIECE
    at_a_time = max(1, piece // weight.shape[1])

    def pieces() -> Iterator[QuantTensor]:
        for start in range(0, len(weight), at_a_time):
            groups = spec.split(weight[start : start + at_a_time])
            weighed = None if importance is None else importance.reshape(groups.shape[1:])
            grid = fit(groups, spec, weighed).settled()
            yield grid.pack(grid.codes(groups))

    return concat_rows(pieces(), len(weight))


def half(values: Tensor) -> Tensor:
    """Rounded to what fp16 holds, still as float32; ExportError beyond its range."""
    rounded = values.half().float()
    if not torch.isfinite(rounded).all():
        raise ExportError("a weight is too large for fp16 scales; the checkpoint is damaged")
    return rounded


def _in_bytes(values: Tensor) -> tuple[Array, Array]:
    """Values [N, G, 1] as factors [N, 1] and whole numbers [N, G] of 8 bits; negative ones as 0."""
    values = values[..., 0].clamp(min=0)
    factors = half(values.amax(1, keepdim=True) / 255)
    numbers = torch.where(factors > 0, values / factors, 0).round().clamp(0, 255)
    return _array(factors, np.float16), _array(numbers, np.uint8)


def _array(values: Tensor, dtype: type) -> Array:
    return values.cpu().numpy().astype(dtype)
