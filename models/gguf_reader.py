"""GGUF files: a bounded header parser and tensors as they lie in the file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every length is checked against
the file before it is used, so a truncated or hostile file is a CheckpointError and never an
allocation. Block layouts and the dequantization of most blocks come from the ``gguf`` library.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import Q4_K, dequantize

from pocketslm.errors import CheckpointError
from pocketslm.models.tensors import Array, QuantTensor, Weight, WholeScales, pack_codes

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


class Cursor:
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


def mapped(path: Path) -> mmap.mmap:
    """A file's bytes, to be read; CheckpointError where it is empty or cannot be read."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None


class GGUFFile:
    """A memory-mapped GGUF file.

    ``metadata`` maps keys to Python values, ``tensors`` names to :class:`TensorInfo`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.paths = path, [path]
        self._map = mapped(path)
        cursor = Cursor(memoryview(self._map), path)
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
            if key in self.metadata:
                raise CheckpointError(f"{path} has the key {key!r} twice; file corrupt?")
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
        self, cursor: Cursor
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
        count = prod(shape)
        if count == 0:
            raise CheckpointError(f"{self.path}: tensor {name!r} has the shape {shape}")
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
        """A tensor: quantized blocks kept where :class:`QuantTensor` holds them, others rounded to
        8 bits; anything else as float32."""
        info = self.tensors[name]
        raw = np.frombuffer(self._map, np.uint8, info.nbytes, info.offset)
        if (unpack := _BLOCKS.get(info.kind)) is not None and len(info.shape) == 2:
            _, block_bytes = GGML_QUANT_SIZES[info.kind]
            try:
                return unpack(raw.reshape(info.shape[0], -1, block_bytes))
            except ValueError as error:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} of {info.kind.name}: {error}; file corrupt?"
                ) from None
        try:
            values: Array = dequantize(raw, info.kind)
            values = values.astype(np.float32, copy=False).reshape(info.shape)
            blocks = not self.is_kept(name)
            return _rounded(values) if blocks and len(info.shape) == 2 else values
        except NotImplementedError:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is {info.kind.name}, which cannot be read; "
                "re-quantize the file as Q4_0, Q4_1, Q8_0, F16 or a K-quant"
            ) from None

    def is_kept(self, name: str) -> bool:
        """Whether :meth:`read` returns the file's own values (False: blocks that were rounded)."""
        kind = self.tensors[name].kind
        return kind in _BLOCKS or kind.name in ("F32", "F16", "BF16", "F64")


class SplitGGUF:
    """Several files that llama.cpp's gguf-split made of one, read as one."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._where: dict[str, GGUFFile] = {}
        for path in paths:
            part = GGUFFile(path)
            if twice := sorted(part.tensors.keys() & self._where.keys()):
                raise CheckpointError(f"{path}: tensor {twice[0]!r} is in an earlier part too")
            self._where |= dict.fromkeys(part.tensors, part)
        self.metadata = GGUFFile(paths[0]).metadata
        expected = self.metadata.get("split.tensors.count")
        if isinstance(expected, int) and expected != len(self._where):
            raise CheckpointError(
                f"{paths[0]}: {len(self._where)} tensors in {len(paths)} parts, expected {expected}"
            )
        self.tensors = {name: part.tensors[name] for name, part in self._where.items()}

    def read(self, name: str) -> Weight:
        return self._where[name].read(name)

    def is_kept(self, name: str) -> bool:
        return self._where[name].is_kept(name)


def open_gguf(path: Path) -> GGUFFile | SplitGGUF:
    """A GGUF file; of one that was split, the first part stands for all.

    Raises CheckpointError where it is another part than the first, or one is missing.
    """
    match = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None:
        return GGUFFile(path)
    stem, number, count = match[1], int(match[2]), int(match[3])
    parts = [path.with_name(f"{stem}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]
    if number != 1:
        raise CheckpointError(f"{path} is part {number} of {count}; give {parts[0].name}")
    if missing := [part.name for part in parts if not part.exists()]:
        raise CheckpointError(f"{path} is one of {count} parts, but {missing[0]} is not beside it")
    return SplitGGUF(parts)


def _nibbles(packed: Array) -> Array:
    """GGUF's 4-bit blocks [N, G, 16] (first half of a block in the low nibbles) as codes [N, K]."""
    return np.concatenate([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)


def _half(raw: Array) -> Array:
    halves: Array = np.ascontiguousarray(raw).view(np.float16)
    return halves[..., 0]


def _fifth_bits(raw: Array) -> Array:
    """The high bits of 5-bit codes [N, G, 4] as [N, K], each worth 16."""
    words: Array = np.ascontiguousarray(raw).view("<u4")
    bits = (words >> np.arange(32, dtype=np.uint32)) & 1
    return (bits.astype(np.uint8) << 4).reshape(len(raw), -1)


def q4_0(blocks: Array) -> QuantTensor:
    return QuantTensor(pack_codes(_nibbles(blocks[..., 2:]), 4), _half(blocks[..., :2]), 4, 32)


def _q4_1(blocks: Array) -> QuantTensor:
    scales, minimums = _half(blocks[..., :2]), _half(blocks[..., 2:4])
    return QuantTensor(pack_codes(_nibbles(blocks[..., 4:]), 4), scales, 4, 32, minimums=minimums)


def _q5_0(blocks: Array) -> QuantTensor:
    codes = _nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6])
    return QuantTensor(codes, _half(blocks[..., :2]), 5, 32)


def _q5_1(blocks: Array) -> QuantTensor:
    scales, minimums = _half(blocks[..., :2]), _half(blocks[..., 2:4])
    codes = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    return QuantTensor(codes, scales, 5, 32, minimums=minimums)


def _q8_0(blocks: Array) -> QuantTensor:
    # Signed to unsigned: adding 128 modulo 256 flips the top bit.
    codes = (blocks[..., 2:] ^ 0x80).reshape(len(blocks), -1)
    return QuantTensor(codes, _half(blocks[..., :2]), 8, 32)


def _k_scales(blocks: Array) -> WholeScales:
    """Of Q4_K and Q5_K: 6-bit scales and minimums of 32 columns."""
    rows = len(blocks)
    scales, minimums = Q4_K.get_scale_min(blocks[..., 4:16].reshape(-1, 12))
    return WholeScales(
        _half(blocks[..., :2]),
        np.ascontiguousarray(scales.reshape(rows, -1), np.uint8),
        _half(blocks[..., 2:4]),
        np.ascontiguousarray(minimums.reshape(rows, -1), np.uint8),
    )


def _k_nibbles(packed: Array) -> Array:
    """Codes [N, K] of blocks [N, G, 128]: 32 bytes hold 32 low nibbles, then 32 high ones."""
    lines = packed.reshape(len(packed), -1, 1, 32)
    return np.concatenate([lines & 15, lines >> 4], axis=2).reshape(len(packed), -1)


def _k_pairs(packed: Array) -> Array:
    """2-bit codes [N, K] of blocks [N, G, 64]: 32 bytes hold 128, each two bits 32 of them."""
    lines = packed.reshape(len(packed), -1, 1, 32)
    pairs = lines >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    return pairs.reshape(len(packed), -1)


def _k_bits(packed: Array) -> Array:
    """Single bits [N, K] of blocks [N, G, 32]: bit i of the bytes belongs to columns 32 i on."""
    bits = packed[..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return bits.reshape(len(packed), -1)


def _q2_k(blocks: Array) -> QuantTensor:
    rows = len(blocks)
    both = blocks[..., :16].reshape(rows, -1)
    factors, lowest = _half(blocks[..., 80:82]), _half(blocks[..., 82:84])
    whole = WholeScales(factors, both & 15, lowest, both >> 4, bits=4)
    return QuantTensor.with_whole_scales(_k_pairs(blocks[..., 16:80]), 2, 16, whole)


def _q3_k(blocks: Array) -> QuantTensor:
    rows = len(blocks)
    codes = _k_pairs(blocks[..., 32:96]) | _k_bits(blocks[..., :32]) << 2
    low, high = blocks[..., 96:104], blocks[..., 104:108]
    first = np.concatenate([low & 15, low >> 4], axis=2)
    rest = (high[..., None, :] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3) << 4
    scales = (first | rest.reshape(*first.shape)).astype(np.int8) - np.int8(32)
    whole = WholeScales(_half(blocks[..., 108:110]), scales.reshape(rows, -1))
    return QuantTensor.with_whole_scales(codes, 3, 16, whole)


def _q4_k(blocks: Array) -> QuantTensor:
    codes = pack_codes(_k_nibbles(blocks[..., 16:]), 4)
    return QuantTensor.with_whole_scales(codes, 4, 32, _k_scales(blocks))


def _q5_k(blocks: Array) -> QuantTensor:
    codes = _k_nibbles(blocks[..., 48:]) | _k_bits(blocks[..., 16:48]) << 4
    return QuantTensor.with_whole_scales(codes, 5, 32, _k_scales(blocks))


def _q6_k(blocks: Array) -> QuantTensor:
    rows = len(blocks)
    halves = blocks[..., :128].reshape(rows, -1, 1, 64)
    low = np.concatenate([halves & 15, halves >> 4], axis=2).reshape(rows, -1)
    codes = low | _k_pairs(blocks[..., 128:192]) << 4
    scales = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8).reshape(rows, -1)
    whole = WholeScales(_half(blocks[..., 208:210]), scales)
    return QuantTensor.with_whole_scales(codes, 6, 16, whole)


def _iq4_nl(blocks: Array) -> QuantTensor:
    codes = pack_codes(_nibbles(blocks[..., 2:]), 4)
    return QuantTensor(codes, _half(blocks[..., :2]), 4, 32, table="iq4")


def _iq4_xs(blocks: Array) -> QuantTensor:
    rows = len(blocks)
    codes = _nibbles(blocks[..., 8:].reshape(rows, -1, 16))
    low = blocks[..., 4:8, None] >> np.array([0, 4], np.uint8) & 15
    high = np.ascontiguousarray(blocks[..., 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype="<u2")
    scales = low.reshape(rows, -1) | (high & 3).astype(np.uint8).reshape(rows, -1) << 4
    whole = WholeScales(_half(blocks[..., :2]), scales.astype(np.int8) - np.int8(32))
    return QuantTensor.with_whole_scales(pack_codes(codes, 4), 4, 32, whole, "iq4")


def _mxfp4(blocks: Array) -> QuantTensor:
    codes = pack_codes(_nibbles(blocks[..., 1:]), 4)
    scales = np.ldexp(
        np.float32(1), blocks[..., 0].astype(np.int32) - 128
    )  # 127, and values are twice
    return QuantTensor(codes, scales, 4, 32, table="fp4")


def _ternary(kind: GGMLQuantizationType) -> Callable[[Array], QuantTensor]:
    def unpack(blocks: Array) -> QuantTensor:
        values = dequantize(blocks, kind).reshape(len(blocks), -1)
        scales = np.repeat(_half(blocks[..., -2:]), 256 // 32, axis=1)
        if (np.abs(values) > np.repeat(np.abs(scales), 32, axis=1)).any():
            raise ValueError("a code is none of -1, 0 and 1")
        return QuantTensor((np.sign(values) + 2).astype(np.uint8), scales, 2, 32)

    return unpack


# Blocks that are kept as they are, code for code.
_BLOCKS = {
    GGMLQuantizationType.Q4_0: q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q5_0: _q5_0,
    GGMLQuantizationType.Q5_1: _q5_1,
    GGMLQuantizationType.Q8_0: _q8_0,
    GGMLQuantizationType.Q2_K: _q2_k,
    GGMLQuantizationType.Q3_K: _q3_k,
    GGMLQuantizationType.Q4_K: _q4_k,
    GGMLQuantizationType.Q5_K: _q5_k,
    GGMLQuantizationType.Q6_K: _q6_k,
    GGMLQuantizationType.IQ4_NL: _iq4_nl,
    GGMLQuantizationType.IQ4_XS: _iq4_xs,
    GGMLQuantizationType.MXFP4: _mxfp4,
    GGMLQuantizationType.TQ1_0: _ternary(GGMLQuantizationType.TQ1_0),
    GGMLQuantizationType.TQ2_0: _ternary(GGMLQuantizationType.TQ2_0),
}


def _rounded(values: Array) -> QuantTensor:
    """A matrix of other blocks in 8 bits, groups of 32."""
    rows, columns = values.shape
    groups = values.reshape(rows, -1, 32)
    with np.errstate(over="ignore"):
        scales = (np.abs(groups).max(-1) / 127).astype(np.float16)
    divisors = np.where(scales == 0, 1, scales).astype(np.float32)
    codes = np.clip(np.rint(groups / divisors[..., None]), -127, 127) + 128
    return QuantTensor(codes.astype(np.uint8).reshape(rows, columns), scales, 8, 32)
