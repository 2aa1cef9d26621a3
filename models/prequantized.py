"""Folders of Hugging Face whose matrices were rounded by GPTQ or AWQ: their blocks, code for code.

A matrix ``X.weight`` [N, K] lies as ``X.qweight``, ``X.qzeros``, ``X.scales`` and, of GPTQ,
``X.g_idx``. Layouts: AutoGPTQ's and AutoAWQ's "gemm", as transformers documents them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pocketslm.errors import CheckpointError
from pocketslm.models.tensors import Array, QuantTensor, Weight, pack_codes

_PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")
# AWQ puts column i of eight at this place of a word.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_GPTQ_BITS, _AWQ_BITS = (2, 4, 8), (4,)
_GROUP = 32  # groups that every target takes are multiples of it


@dataclass(frozen=True)
class Packing:
    """How a folder's matrices lie.

    bits, group_size: of codes; group_size None: a whole row. method: ``gptq`` or ``awq``.
    zero_shift: what a stored zero point lacks.
    """

    method: str
    bits: int
    group_size: int | None
    zero_shift: int = 0

    def names(self, stored: Iterable[str]) -> dict[str, str]:
        """``X.weight`` for each part of a matrix, and other names for themselves."""
        found = set(stored)
        whole = {}
        for name in found:
            stem, dot, end = name.rpartition(".")
            packed = dot + end in _PARTS and f"{stem}.qweight" in found
            whole[name] = f"{stem}.weight" if packed else name
        return whole

    def read(self, name: str, tensor: Callable[[str], Array | None]) -> Weight:
        """The matrix ``name``; ``tensor`` gives a stored one by name, None where there is none.

        Where GPTQ grouped columns in another order than they lie in (``desc_act``), the matrix is
        given as floats. Raises CheckpointError where shapes do not belong together.
        """
        stem = name.removesuffix(".weight")
        words, zeros, scales, order = (tensor(stem + part) for part in _PARTS)
        if words is None or zeros is None or scales is None:
            raise CheckpointError(f"{stem} has no {', '.join(_PARTS[:3])}; the file is incomplete")
        for part in (words, zeros, scales):
            if part.ndim != 2 or (part is not scales and part.dtype != np.int32):
                raise CheckpointError(
                    f"{stem} has a part of {part.dtype} {part.shape}, expected matrices, codes and "
                    "zero points as int32"
                )
        if self.method == "awq":
            codes, points = _awq(words).T, _awq(zeros).T
        else:
            codes, points = _unpacked(words.T, self.bits), _unpacked(zeros, self.bits).T
        points, scales = points + np.uint8(self.zero_shift), np.ascontiguousarray(scales.T)
        rows, columns = codes.shape
        group = self.group_size or columns
        whole = (rows, columns // group)
        if columns % group or columns % _GROUP or not points.shape == scales.shape == whole:
            raise CheckpointError(
                f"{stem}: codes {codes.shape}, scales {scales.shape} and zero points "
                f"{points.shape} do not belong together in groups of {group}"
            )
        if order is not None and not np.array_equal(order, np.arange(columns) // group):
            if order.shape != (columns,) or order.min() < 0 or order.max() >= columns // group:
                raise CheckpointError(f"{stem}.g_idx names groups that are not there")
            values = codes.astype(np.float32) - points[:, order]
            values *= scales.astype(np.float32)[:, order]
            return values
        middle = 2 ** (self.bits - 1)
        made = QuantTensor(
            pack_codes(np.ascontiguousarray(codes), self.bits), scales, self.bits, group
        )
        if (points == middle).all():
            return made
        if self.bits != 2 and points.max() < 2 * middle:
            return replace(made, zero_points=np.ascontiguousarray(points))
        return replace(made, minimums=-scales.astype(np.float32) * points)


def packing(path: Path, data: Mapping[str, Any]) -> Packing | None:
    """How the folder's matrices are packed; None where they are floats.

    ``data``: its config.json. Raises CheckpointError for a method or form that is not read.
    """
    found = data.get("quantization_config") or data.get("compression_config")
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, Mapping) else None
    if method not in ("gptq", "awq"):
        raise CheckpointError(
            f"{path}/config.json: quantization_config names the method "
            f"{str(method or 'unknown')[:40]!r}, which is not supported; use the checkpoint it was "
            "made from, or a GGUF"
        )
    bits = found.get("bits", found.get("w_bit"))
    group = found.get("group_size", found.get("q_group_size"))
    form = found.get("checkpoint_format", found.get("format", method))
    version = str(found.get("version", "gemm")).lower()
    known = bits in (_AWQ_BITS if method == "awq" else _GPTQ_BITS)
    known &= group == -1 or (isinstance(group, int) and group > 0 and group % _GROUP == 0)
    known &= version == "gemm" if method == "awq" else form in ("gptq", "gptq_v2")
    if not known:
        raise CheckpointError(
            f"{path}/config.json: quantization_config has {method} with bits {bits!r}, group_size "
            f"{group!r}, format {form!r}, version {version!r}; expected {_GPTQ_BITS} bits (gptq) "
            f"or {_AWQ_BITS} (awq, gemm) in groups of a multiple of {_GROUP}"
        )
    # GPTQ's first format stores zero points less 1.
    shift = 1 if method == "gptq" and form == "gptq" else 0
    return Packing(method, bits, None if group == -1 else group, shift)


def _unpacked(words: Array, bits: int) -> Array:
    """int32 words [A, B] as uint8 codes [A, 32 / bits * B], the lowest bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts & (2**bits - 1)
    unpacked: Array = codes.astype(np.uint8).reshape(len(words), -1)
    return unpacked


def _awq(words: Array) -> Array:
    codes = _unpacked(words, 4).reshape(len(words), -1, 8)
    columns: Array = codes[..., _AWQ_ORDER].reshape(len(words), -1)
    return columns
