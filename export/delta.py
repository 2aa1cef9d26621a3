"""Delta-CoMe: a fine-tuned model stored as a small difference from the model it was tuned from.

Every matrix's difference is split into singular vectors; the few leading ones are kept in 8 bits,
the next in 3, a long tail in 2, the rest is dropped (https://arxiv.org/abs/2406.08903). Several
fine-tunes of one base then cost a fraction of a model each. Vectors are rounded to their nearest
code (the paper adjusts them by GPTQ on calibration text).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pocketslm.errors import CheckpointError, ExportError
from pocketslm.models.checkpoint import EMBEDDING, HEAD, Checkpoint, checkpoint_sha256
from pocketslm.models.reference import parameter_shapes
from pocketslm.models.tensors import QuantTensor, Weight

Array = npt.NDArray[np.float32]
VERSION = "1"


@dataclass(frozen=True)
class Band:
    """``rank`` neighbouring singular vectors in ``bits`` bits each number; 32 is float32."""

    rank: int
    bits: int

    def __post_init__(self) -> None:
        if self.rank < 1 or self.bits not in (2, 3, 4, 8, 32):
            raise ExportError(f"a band of rank {self.rank} in {self.bits} bits is unknown")


# The paper's choice; its matrices are 4096 wide, so its tail is shortened to what a matrix has.
PAPER = (Band(2, 8), Band(32, 3), Band(1000, 2))


def make_delta(
    base: Checkpoint,
    tuned: Checkpoint,
    path: Path,
    bands: Sequence[Band] = PAPER,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write ``tuned - base`` to ``path`` (safetensors) and return its bytes.

    Embedding, head and vectors are stored where they differ, the embedding's rows as they are.
    Raises ExportError where the two have different shapes.
    """
    from safetensors.numpy import save_file

    if base.config != tuned.config:
        raise ExportError(f"{tuned.path} and {base.path} differ in shape, not in weights alone")
    shapes = parameter_shapes(base.config)
    parts: dict[str, Any] = {}
    for done, name in enumerate(shapes, 1):
        delta = _floats(tuned.weight(name)) - _floats(base.weight(name))
        if delta.any():
            if delta.ndim == 2 and name not in (EMBEDDING, HEAD):
                parts |= {f"{name}.{key}": value for key, value in _split(delta, bands).items()}
            else:
                parts[f"{name}.whole"] = delta
        progress(done, len(shapes))
    identity = {
        "format": "pocketslm-delta",
        "version": VERSION,
        "base": checkpoint_sha256(base),
        "bands": json.dumps([[band.rank, band.bits] for band in bands]),
    }
    aside = path.with_name(f".{path.name}.part")
    save_file(parts, aside, metadata=identity)
    aside.replace(path)
    return path.stat().st_size


class DeltaCheckpoint:
    """``base`` with the difference of a delta file added: the fine-tuned model again."""

    def __init__(self, base: Checkpoint, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                facts, names = file.metadata() or {}, set(file.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from None
        if facts.get("format") != "pocketslm-delta" or facts.get("version") != VERSION:
            raise CheckpointError(f"{path} is not a delta of version {VERSION}")
        if facts.get("base") != checkpoint_sha256(base):
            raise CheckpointError(f"{path} was made from another base than {base.path}")
        self.bands = [Band(rank, bits) for rank, bits in json.loads(facts["bands"])]
        self.base, self.delta, self._names = base, path, names
        self.path, self.format, self.name = path, base.format, path.stem
        self.licence, self.config, self.made_from = base.licence, base.config, base.made_from
        self.notes = [*base.notes, f"the delta {path.name} was added to {base.name}"]

    def files(self) -> list[Path]:
        return [*self.base.files(), self.delta]

    def stored_bytes(self) -> dict[str, int]:
        return self.base.stored_bytes() | {"delta": self.delta.stat().st_size}

    def tokenizer_files(self) -> dict[str, bytes]:
        return self.base.tokenizer_files()

    def weight(self, name: str) -> Weight:
        from safetensors import safe_open

        if name == HEAD and self.config.tie_word_embeddings:
            name = EMBEDDING
        weight = self.base.weight(name)
        mine = [part for part in self._names if part.startswith(f"{name}.")]
        if not mine:
            return weight
        with safe_open(self.delta, framework="np") as file:
            parts = {part.removeprefix(f"{name}."): file.get_tensor(part) for part in mine}
        delta = parts["whole"] if "whole" in parts else _joined(parts, self.bands)
        if delta.shape != tuple(weight.shape):
            raise CheckpointError(f"{self.delta}: {name} has shape {delta.shape}")
        total: Array = _floats(weight) + delta
        return total


def _split(delta: Array, bands: Sequence[Band]) -> dict[str, Any]:
    """The bands of a matrix [N, K]: vectors u [rank, N] and v [rank, K], v times singular value."""
    u, s, vt = torch.linalg.svd(torch.from_numpy(delta), full_matrices=False)
    left, right = u.T.numpy(), (s[:, None] * vt).numpy()
    parts: dict[str, Any] = {}
    start = 0
    for index, band in enumerate(bands):
        stop = min(start + band.rank, len(left))
        if start == stop:
            break
        for side, vectors in (("u", left[start:stop]), ("v", right[start:stop])):
            if band.bits == 32:
                parts[f"{index}.{side}"] = np.ascontiguousarray(vectors)
                continue
            codes, scales = round_vectors(vectors, band.bits)
            parts[f"{index}.{side}"] = pack_bits(codes, band.bits)
            parts[f"{index}.{side}.scales"] = scales
        start = stop
    parts["shape"] = np.array(delta.shape, np.int64)
    return parts


def _joined(parts: dict[str, Any], bands: Sequence[Band]) -> Array:
    rows, columns = (int(size) for size in parts["shape"])
    total = np.zeros((rows, columns), np.float32)
    for index, band in enumerate(bands):
        if f"{index}.u" not in parts:
            break
        u, v = (
            parts[f"{index}.{side}"]
            if band.bits == 32
            else unpack_bits(parts[f"{index}.{side}"], band.bits, width)
            * parts[f"{index}.{side}.scales"].astype(np.float32)[:, None]
            for side, width in (("u", rows), ("v", columns))
        )
        total += u.T @ v
    return total


def round_vectors(vectors: Array, bits: int) -> tuple[npt.NDArray[np.int8], Any]:
    """Symmetric codes [rank, N] and an fp16 scale [rank] each, of least squared error.

    The scale is searched between a third of the largest number and all of it: two bits hold a
    bell-shaped vector far better when its tails are clipped.
    """
    limit = 2 ** (bits - 1) - 1
    largest = np.abs(vectors).max(1)
    best = np.full(len(vectors), np.inf)
    scales = np.zeros(len(vectors), np.float16)
    codes = np.zeros(vectors.shape, np.int8)
    for share in np.linspace(0.33, 1.0, 24):
        scale = (largest * share / limit).astype(np.float16)
        safe = np.where(scale > 0, scale, np.float16(1)).astype(np.float32)[:, None]
        rounded = np.clip(np.rint(vectors / safe), -limit, limit)
        error = np.square(rounded * scale.astype(np.float32)[:, None] - vectors).sum(1)
        better = error < best
        best = np.where(better, error, best)
        scales[better], codes[better] = scale[better], rounded[better].astype(np.int8)
    return codes, scales


def pack_bits(codes: npt.NDArray[np.int8], bits: int) -> npt.NDArray[np.uint8]:
    """Signed codes [rank, N] as a stream of ``bits``-bit numbers a row, zero-padded to bytes."""
    offset = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    stream = np.unpackbits(offset[:, :, None], axis=2, count=bits, bitorder="little")
    return np.packbits(stream.reshape(len(codes), -1), axis=1, bitorder="little")


def unpack_bits(packed: npt.NDArray[np.uint8], bits: int, width: int) -> Array:
    """The inverse of :func:`pack_bits` for rows of ``width`` codes, as float32."""
    stream = np.unpackbits(packed, axis=1, count=width * bits, bitorder="little")
    numbers = np.packbits(stream.reshape(len(packed), width, bits), axis=2, bitorder="little")
    return numbers[:, :, 0].astype(np.float32) - np.float32(2 ** (bits - 1))


def _floats(weight: Weight) -> Array:
    array: Array = weight.dequantize() if isinstance(weight, QuantTensor) else weight
    return array.astype(np.float32, copy=False)
