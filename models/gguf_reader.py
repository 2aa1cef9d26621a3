"""GGUF files: a bounded header parser and tensors as they lie in the file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every length is checked against
the file before it is used, so a truncated or hostile file is a CheckpointError and never an
allocation. Block layouts and the dequantization of K-quants come from the ``gguf`` library.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from pocketslm.errors import CheckpointError
from pocketslm.models.tensors import Array, QuantTensor, Weight, pack_codes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_SCALARS = {  # GGUF value type -> struct format
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: ``shape`` is row-major (outermost first), offsets are absolute."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    nbytes: int


class _Cursor:
    """Bounds-checked little-endian reads over the mapped file."""

    def __init__(self, data: memoryview, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, size: int) -> memoryview:
        end = self.at + size
        if end > len(self.data):
            raise CheckpointError(
                f"{self.path} is truncated or its header lies: {size} bytes expected at "
                f"{self.at}, the file has {len(self.data)}; download it again"
            )
        piece = self.data[self.at : end]
        self.at = end
        return piece

    def scalar(self, fmt: str) -> Any:
        return struct.unpack("<" + fmt, self.take(struct.calcsize(fmt)))[0]

    def string(self) -> str:
        return bytes(self.take(self.scalar("Q"))).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise CheckpointError(f"{self.path}: unknown GGUF value type {kind}; file corrupt?")
        item, count = self.scalar("I"), self.scalar("Q")
        if item in _SCALARS:
            size = struct.calcsize(_SCALARS[item])
            dtype = np.dtype(_SCALARS[item]).newbyteorder("<")
            # `take` fails on a lying count before anything is allocated.
            return np.frombuffer(self.take(count * size), dtype).tolist()
        if item != _STRING:
            raise CheckpointError(f"{self.path}: GGUF arrays of type {item} are not supported")
        return [self.string() for _ in range(count)]


class GGUFFile:
    """A memory-mapped GGUF file.

    ``metadata`` maps keys to Python values, ``tensors`` names to :class:`TensorInfo`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from None
        cursor = _Cursor(memoryview(self._map), path)
        if len(self._map) < 24 or bytes(cursor.take(4)) != MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
        version = cursor.scalar("I")
        if version not in VERSIONS:
            raise CheckpointError(
                f"{path} is GGUF version {version}, expected one of {VERSIONS}; "
                "big-endian and version 1 files must be converted with llama.cpp's gguf tools"
            )
        tensor_count, kv_count = cursor.scalar("Q"), cursor.scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(kv_count):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.scalar("I"))
        heads = [self._tensor_head(cursor) for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
            raise CheckpointError(f"{path}: alignment {alignment!r}, expected a multiple of 8")
        start = -(-cursor.at // alignment) * alignment
        self.tensors = {head[0]: self._locate(*head, start) for head in heads}
        if len(self.tensors) != tensor_count:
            raise CheckpointError(f"{path} names a tensor twice; file corrupt?")

    def _tensor_head(
        self, cursor: _Cursor
    ) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name, dims = cursor.string(), cursor.scalar("I")
        if not 0 < dims <= _MAX_DIMS:
            raise CheckpointError(f"{self.path}: tensor {name!r} has {dims} dimensions, at most 4")
        shape = tuple(cursor.scalar("Q") for _ in range(dims))[::-1]
        kind, offset = cursor.scalar("I"), cursor.scalar("Q")
        try:
            return name, shape, GGMLQuantizationType(kind), offset
        except ValueError:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has unknown type {kind}; a newer gguf may know it"
            ) from None

    def _locate(
        self, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, offset: int, start: int
    ) -> TensorInfo:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        count = 1
        for dim in shape:
            count *= dim
        if shape[-1] % block:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} rows of {shape[-1]} do not divide into "
                f"{kind.name} blocks of {block}"
            )
        nbytes = count // block * block_bytes
        begin = start + offset
        if begin + nbytes > len(self._map):
            raise CheckpointError(
                f"{self.path} is truncated: tensor {name!r} ends at byte {begin + nbytes}, the "
                f"file has {len(self._map)}; download it again"
            )
        return TensorInfo(shape, kind, begin, nbytes)

    def read(self, name: str) -> Weight:
        """A tensor: quantized blocks kept where :class:`QuantTensor` holds them, else float32."""
        info = self.tensors[name]
        raw = np.frombuffer(self._map, np.uint8, info.nbytes, info.offset)
        if (unpack := _BLOCKS.get(info.kind)) is not None and len(info.shape) == 2:
            _, block_bytes = GGML_QUANT_SIZES[info.kind]
            return unpack(raw.reshape(info.shape[0], -1, block_bytes))
        try:
            values: Array = dequantize(raw, info.kind)
            return values.astype(np.float32, copy=False).reshape(info.shape)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is {info.kind.name}, which cannot be read; "
                "re-quantize the file as Q4_0, Q4_1, Q8_0, F16 or a K-quant"
            ) from None

    def is_kept(self, name: str) -> bool:
        """Whether :meth:`read` returns the file's own values (False: dequantized K-quants)."""
        kind = self.tensors[name].kind
        return kind in _BLOCKS or kind.name in ("F32", "F16", "BF16", "F64")


def _nibbles(packed: Array) -> Array:
    """GGUF's 4-bit blocks [N, G, 16] (first half of a block in the low nibbles) as codes [N, K]."""
    codes = np.concatenate([packed & 15, packed >> 4], axis=2)
    return pack_codes(codes.reshape(len(packed), -1), 4)


def _half(raw: Array) -> Array:
    halves: Array = np.ascontiguousarray(raw).view(np.float16)
    return halves[..., 0]


def _q4_0(blocks: Array) -> QuantTensor:
    return QuantTensor(_nibbles(blocks[..., 2:]), _half(blocks[..., :2]), 4, 32)


def _q4_1(blocks: Array) -> QuantTensor:
    scales, minimums = _half(blocks[..., :2]), _half(blocks[..., 2:4])
    return QuantTensor(_nibbles(blocks[..., 4:]), scales, 4, 32, minimums=minimums)


def _q8_0(blocks: Array) -> QuantTensor:
    # Signed to unsigned: adding 128 modulo 256 flips the top bit.
    codes = (blocks[..., 2:] ^ 0x80).reshape(len(blocks), -1)
    return QuantTensor(codes, _half(blocks[..., :2]), 8, 32)


_BLOCKS = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q8_0: _q8_0,
}
