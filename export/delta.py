"""Delta-CoMe: a fine-tuned model stored as a small difference from the model it was tuned from.

Every matrix's difference is split into singular vectors; the few leading ones are kept in 8 bits,
the next in 3, a long tail in 2, the rest is dropped (https://arxiv.org/abs/2406.08903). Several
fine-tunes of one base then cost a fraction of a model each. On calibration text, GPTQ rounds the
right vectors for the matrix's inputs, then the left ones for what those make of the inputs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pocketslm import schema
from pocketslm.errors import CheckpointError, ExportError, UsageError
from pocketslm.export.quantize import gptq
from pocketslm.export.quantize.calibration import run_layer
from pocketslm.folders import written
from pocketslm.models.checkpoint import (
    EMBEDDING,
    HEAD,
    TOKENIZER_FILES,
    Checkpoint,
    checkpoint_sha256,
    one_line,
)
from pocketslm.models.reference import load_reference, parameter_shapes
from pocketslm.models.sites import LAYERS, Site
from pocketslm.models.tensors import floats
from pocketslm.models.updated import Updated

Array = npt.NDArray[np.float32]
VERSION = "2"
EXACT = 32  # bits: float32
FILE = "file:"  # before the names of the tuned model's tokenizer files that differ from the base's
DAMPING = 0.05  # of the Hessians, as in quantize/gptq.py


@dataclass(frozen=True)
class Band:
    """``rank`` neighbouring singular vectors in ``bits`` bits each number; 32 is float32."""

    rank: int
    bits: int

    def __post_init__(self) -> None:
        if self.rank < 1 or self.bits not in (2, 3, 4, 8, EXACT):
            raise ExportError(f"a band of rank {self.rank} in {self.bits} bits is unknown")


def parse_bands(text: str) -> tuple[Band, ...]:
    """``2x8,32x3,110x2``: ranks by bits; UsageError for anything else."""
    try:
        pairs = [part.split("x") for part in text.split(",")]
        return tuple(Band(int(rank), int(bits)) for rank, bits in pairs)
    except (ValueError, ExportError):
        raise UsageError(
            f"bands {text!r}, expected RANKxBITS such as 2x8,32x3,110x2; bits: 2, 3, 4, 8 or 32"
        ) from None


def paper_bands(width: int) -> tuple[Band, ...]:
    """The paper's: 2 vectors in 8 bits, 32 in 3, 2 bits up to a quarter of the rank."""
    return Band(2, 8), Band(32, 3), Band(max(1, width // 4 - 34), 2)


def make_delta(
    base: Checkpoint,
    tuned: Checkpoint,
    path: Path,
    bands: Sequence[Band] | None = None,
    ids: Tensor | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write ``tuned - base`` to ``path`` (safetensors) and return its bytes.

    ``bands``: by default the paper's. ``ids`` [B, S]: tokens for GPTQ; without them every vector is
    rounded to its nearest codes. Embedding, head and norms are stored where they differ, as they
    are; so are tokenizer files, chat template among them. Raises ExportError where the two have
    different shapes, or the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    if base.config != tuned.config:
        raise ExportError(f"{tuned.path} and {base.path} differ in shape, not in weights alone")
    bands = bands or paper_bands(base.config.hidden_size)
    shapes = parameter_shapes(base.config)
    split = {} if ids is None else _calibrated(base, tuned, ids, bands, progress)
    parts: dict[str, Any] = {}
    for done, name in enumerate(shapes, 1):
        delta = _difference(base, tuned, name)
        if delta.any():
            if delta.ndim == 2 and name not in (EMBEDDING, HEAD):
                mine = split.get(name) or _split(delta, bands)
            else:
                mine = {"whole": delta}
            parts |= {f"{name}.{key}": value for key, value in mine.items()}
        if ids is None:
            progress(done, len(shapes))
    parts |= _files_that_differ(base, tuned)
    identity = {
        "format": "pocketslm-delta",
        "version": VERSION,
        "base": checkpoint_sha256(base),
        "bands": json.dumps([[band.rank, band.bits] for band in bands]),
    }
    identity["sha256"] = _digest(sorted(parts), parts.__getitem__)
    try:
        with written(path) as part:
            save_file(parts, part, metadata=identity)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"cannot write {path}: {one_line(error)}") from None
    return path.stat().st_size


@torch.no_grad()
def _calibrated(
    base: Checkpoint,
    tuned: Checkpoint,
    ids: Tensor,
    bands: Sequence[Band],
    progress: Callable[[int, int], None],
) -> dict[str, dict[str, Any]]:
    """The layers' matrices split for what the already split ones before them make of ``ids``."""
    model = load_reference(tuned, ids.shape[1])
    x = model.embed(ids)
    split: dict[str, dict[str, Any]] = {}
    for index in range(len(model.model.layers)):

        def visit(site: Site, hessian: Tensor, at: str = f"{LAYERS}{index}") -> None:
            for name in (f"{at}.{matrix}.weight" for matrix in site.matrices):
                delta = _difference(base, tuned, name)
                if delta.any():
                    split[name] = _split(delta, bands, hessian)
                    restored = floats(base.weight(name)) + _joined(split[name], bands, delta.shape)
                    model.get_parameter(name).copy_(torch.from_numpy(restored))

        x = run_layer(model, index, x, visit)
        progress(index + 1, len(model.model.layers))
    return split


def _files_that_differ(base: Checkpoint, tuned: Checkpoint) -> dict[str, Any]:
    """The tuned model's tokenizer files as bytes [N]; one that it lacks is empty."""
    ours, theirs = base.tokenizer_files(), tuned.tokenizer_files()
    names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    return {f"{FILE}{name}": np.frombuffer(theirs.get(name, b""), np.uint8) for name in names}


def _difference(base: Checkpoint, tuned: Checkpoint, name: str) -> Array:
    delta: Array = floats(tuned.weight(name)) - floats(base.weight(name))
    if not np.isfinite(delta).all():
        raise CheckpointError(
            f"{name} of {tuned.path} less that of {base.path} has numbers that are NaN or "
            "infinite; one of the two is damaged: fetch it again"
        )
    return delta


def _digest(names: Sequence[str], tensor: Callable[[str], Any]) -> str:
    """SHA-256 of the tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name in names:
        array = tensor(name)
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


class DeltaCheckpoint(Updated):
    """``base`` with the difference of a delta file added: the fine-tuned model again.

    Raises CheckpointError for a file that is damaged, was made from another base, or holds anything
    but what its bands and the base's shapes say.
    """

    def __init__(self, base: Checkpoint, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                facts = file.metadata() or {}
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                found = {
                    name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()
                }
                self._check_facts(facts, path, base)
                self.bands = _read_bands(facts.get("bands", ""))
                weights = {n: part for n, part in found.items() if not n.startswith(FILE)}
                self._parts = _check_parts(weights, parameter_shapes(base.config), self.bands)
                self._files = _read_files(found.keys() - weights.keys(), file.get_tensor)
                if _digest(sorted(found), file.get_tensor) != facts.get("sha256"):
                    raise ValueError("its tensors do not match its SHA-256")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {path}: {one_line(error)}") from None
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {one_line(error)}; make it again") from None
        super().__init__(base, path, path.stem, f"the delta {path.name} was added to {base.name}")

    @staticmethod
    def _check_facts(facts: Mapping[str, str], path: Path, base: Checkpoint) -> None:
        if facts.get("format") != "pocketslm-delta" or facts.get("version") != VERSION:
            raise CheckpointError(f"{path} is not a delta of version {VERSION}; make it again")
        if facts.get("base") != checkpoint_sha256(base):
            raise CheckpointError(f"{path} was made from another base than {base.path}")

    def tokenizer_files(self) -> dict[str, bytes]:
        files = self.base.tokenizer_files() | self._files
        return {name: content for name, content in files.items() if content}

    def update(self, name: str, shape: tuple[int, ...]) -> Any:
        from safetensors import safe_open

        if name not in self._parts:
            return None
        with safe_open(self.file, framework="np") as file:
            parts = {part: file.get_tensor(f"{name}.{part}") for part in self._parts[name]}
        whole = parts.get("whole")
        return _joined(parts, self.bands, shape) if whole is None else whole


Layout = dict[str, tuple[str, tuple[int, ...]]]  # part -> its type in safetensors' words, shape


def _read_files(names: Iterable[str], tensor: Callable[[str], Any]) -> dict[str, bytes]:
    """Tokenizer files by name; ValueError for anything else."""
    files = {}
    for name in names:
        file, content = name.removeprefix(FILE), tensor(name)
        if file not in TOKENIZER_FILES or content.dtype != np.uint8 or content.ndim != 1:
            raise ValueError(f"its tensor {name!r} is no file of a tokenizer")
        files[file] = content.tobytes()
    return files


def _read_bands(text: str) -> list[Band]:
    """The file's bands; ValueError for anything else."""
    data = schema.loads(text)
    if not (isinstance(data, list) and data):
        raise ValueError(f"its bands are {text[:80]!r}, expected pairs of rank and bits")
    bands = []
    for pair in data:
        if not (isinstance(pair, list) and [type(number) for number in pair] == [int, int]):
            raise ValueError(f"its bands are {text[:80]!r}, expected pairs of rank and bits")
        try:
            bands.append(Band(*pair))
        except ExportError as error:
            raise ValueError(str(error)) from None
    return bands


def _check_parts(
    found: Layout, shapes: Mapping[str, tuple[int, ...]], bands: Sequence[Band]
) -> dict[str, list[str]]:
    """The parts of each weight; ValueError for one that is missing, unknown or of another form."""
    parts: dict[str, list[str]] = {}
    owners = {f"{name}.whole": (name, "whole") for name in shapes}
    layouts = {name: _layout(shape, bands) for name, shape in shapes.items() if len(shape) == 2}
    for name, layout in layouts.items():
        owners |= {f"{name}.{part}": (name, part) for part in layout}
    for full in sorted(found):
        if full not in owners:
            raise ValueError(f"its tensor {full!r} belongs to no weight of the base")
        name, part = owners[full]
        expected = ("F32", shapes[name]) if part == "whole" else layouts[name][part]
        if found[full] != expected:
            raise ValueError(f"its tensor {full!r} is {found[full]}, expected {expected}")
        parts.setdefault(name, []).append(part)
    for name, mine in parts.items():
        if mine == ["whole"]:
            continue
        if "whole" in mine:
            raise ValueError(f"{name} is there whole and in bands")
        if missing := sorted(layouts[name].keys() - set(mine)):
            raise ValueError(f"{name} lacks {missing[0]}")
    return parts


def _layout(shape: tuple[int, ...], bands: Sequence[Band]) -> Layout:
    """The parts of a matrix of this shape."""
    layout: Layout = {}
    left = min(shape)
    for index, band in enumerate(bands):
        rank = min(band.rank, left)
        if not rank:
            break
        left -= rank
        for side, width in zip("uv", shape, strict=True):
            if band.bits == EXACT:
                layout[f"{index}.{side}"] = ("F32", (rank, width))
            else:
                layout[f"{index}.{side}"] = ("U8", (rank, -(-width * band.bits // 8)))
                layout[f"{index}.{side}.scales"] = ("F16", (rank,))
    return layout


def _split(delta: Array, bands: Sequence[Band], hessian: Tensor | None = None) -> dict[str, Any]:
    """The bands of a matrix [N, K]: vectors u [rank, N] and v [rank, K], v times singular value.

    ``hessian`` [K, K]: ``X^T X`` of the matrix's inputs, for GPTQ.
    """
    left, singular, right = torch.linalg.svd(torch.from_numpy(delta), full_matrices=False)
    bits = np.concatenate([np.full(band.rank, band.bits) for band in bands])[: len(singular)]
    rank = len(bits)
    u, v = left.T[:rank].numpy(), (singular[:rank, None] * right[:rank]).numpy()
    if hessian is None:
        sides = {"u": _nearest(u, bits), "v": _nearest(v, bits)}
    else:
        rounded = _gptq_right(v, bits, hessian)
        made = torch.from_numpy(rounded.values)
        sides = {"u": _gptq_left(u, bits, made @ hessian @ made.T), "v": rounded}
    parts: dict[str, Any] = {}
    start = 0
    for index, band in enumerate(bands):
        rows = slice(start, start := min(start + band.rank, rank))
        if rows.start == rows.stop:
            break
        for side, vectors in sides.items():
            if band.bits == EXACT:
                parts[f"{index}.{side}"] = np.ascontiguousarray(vectors.values[rows])
                continue
            parts[f"{index}.{side}"] = pack_bits(vectors.codes[rows], band.bits)
            parts[f"{index}.{side}.scales"] = vectors.scales[rows]
    return parts


@dataclass(frozen=True)
class _Vectors:
    """Rounded rows: values and codes [rank, n], an fp16 scale [rank] each; exact rows: values."""

    values: Array
    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float16]


def _nearest(vectors: Array, bits: npt.NDArray[Any]) -> _Vectors:
    """Each row of [rank, n] to its nearest codes of ``bits`` [rank] bits."""
    values, codes = vectors.copy(), np.zeros(vectors.shape, np.int8)
    scales = np.zeros(len(vectors), np.float16)
    for each in set(bits.tolist()) - {EXACT}:
        rows = bits == each
        codes[rows], scales[rows] = round_vectors(vectors[rows], each)
        values[rows] = codes[rows] * scales[rows, None].astype(np.float32)
    return _Vectors(values, codes, scales)


def _gptq_right(vectors: Array, bits: npt.NDArray[Any], hessian: Tensor) -> _Vectors:
    """Right vectors [rank, K], which read the matrix's inputs; scales as :func:`_nearest` has."""
    rounded = _nearest(vectors, bits)
    scales = rounded.scales.astype(np.float32)
    safe = np.where(scales > 0, scales, 1)
    limits = np.where(bits == EXACT, 0, 2.0 ** (bits - 1) - 1)

    def round_column(k: int, column: Array) -> Array:
        rounded.codes[:, k] = np.clip(np.rint(column / safe), -limits, limits)
        values: Array = np.where(bits == EXACT, column, rounded.codes[:, k] * scales)
        return values

    order = hessian.diagonal().argsort(descending=True, stable=True)
    _compensate(vectors.T, hessian, order, round_column, rounded.values.T)
    return rounded


def _gptq_left(vectors: Array, bits: npt.NDArray[Any], hessian: Tensor) -> _Vectors:
    """Left vectors [rank, N], which read what the right ones make: ``hessian`` [rank, rank].

    The leading ones come first; each is rounded as it is when it comes up.
    """
    rounded = _nearest(vectors, bits)

    def round_vector(r: int, vector: Array) -> Array:
        one = _nearest(vector[None], bits[r : r + 1])
        rounded.codes[r], rounded.scales[r] = one.codes[0], one.scales[0]
        values: Array = one.values[0]
        return values

    _compensate(vectors, hessian, torch.arange(len(vectors)), round_vector, rounded.values)
    return rounded


def _compensate(
    columns: Array,
    hessian: Tensor,
    order: Tensor,
    round_column: Callable[[int, Array], Array],
    out: Array,
) -> None:
    """GPTQ's walk over columns [K, N]: what one lost by rounding, later ones make good."""
    factor = gptq.inverse_factor(hessian[order][:, order], DAMPING).numpy()
    left = np.ascontiguousarray(columns[order.numpy()])
    for i, k in enumerate(order.tolist()):
        out[k] = round_column(k, left[i])
        lost = (left[i] - out[k]) / factor[i, i]
        left[i + 1 :] -= factor[i, i + 1 :, None] * lost


def _joined(parts: dict[str, Any], bands: Sequence[Band], shape: tuple[int, ...]) -> Array:
    """The matrix of this shape that :func:`_split` took apart."""
    rows, columns = shape
    total = np.zeros((rows, columns), np.float32)
    for index, band in enumerate(bands):
        if f"{index}.u" not in parts:
            break
        u, v = (
            parts[f"{index}.{side}"]
            if band.bits == EXACT
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
