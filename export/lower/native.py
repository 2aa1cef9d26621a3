"""Lower weights to ``model.slm``, the file of the native operators.

The layout is described in ``runtime/ops/weight_layout.h`` (matrices) and
``runtime/ops/model_file.h`` (header and sections). Quantized blocks are carried code for code; the
report says where a scale had to be rounded to half precision.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketslm.errors import ExportError
from pocketslm.models.config import ModelConfig, rope_frequencies
from pocketslm.models.tensors import Array, QuantTensor, Weight

MAGIC = b"PSLMODEL"
VERSION, VERSION_LAYER_SIZES = 1, 2  # the second where layers differ in width
HEADER_BYTES = 128
ALIGNMENT = 64
BLOCK_ROWS = 16
GROUP = 32

KIND = {
    ("float32", None): 0,
    ("float16", None): 1,
    (4, "sym"): 2,
    (4, "min"): 3,
    (4, "zp"): 4,
    (8, "sym"): 5,
    (8, "min"): 6,
    (8, "zp"): 7,
    (8, "split"): 8,
}
VECTOR, BLOB = 16, 17

ROLE = {
    "embedding": 0,
    "final_norm": 1,
    "head": 2,
    "rope_frequencies": 3,
    "attention_norm": 4,
    "query": 5,
    "key": 6,
    "value": 7,
    "output": 8,
    "mlp_norm": 9,
    "gate": 10,
    "up": 11,
    "down": 12,
    "query_bias": 13,
    "key_bias": 14,
    "value_bias": 15,
    "tokenizer": 16,
    "chat": 17,
}
MATRICES = {
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "output": "self_attn.o_proj.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
VECTORS = {
    "attention_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
}
BIASES = {
    "query_bias": "self_attn.q_proj.bias",
    "key_bias": "self_attn.k_proj.bias",
    "value_bias": "self_attn.v_proj.bias",
}


@dataclass
class NativeReport:
    """What went into the file, and what it lost on the way."""

    bytes: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    rounded_scales: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    role: int
    kind: int
    layers: Sequence[int]  # that use it: the runs of a shared layer; (0,) outside the layers
    rows: int
    cols: int
    data: npt.NDArray[np.uint8]


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
        padded = _pad_rows(weight.astype(dtype), rows).reshape(blocks, BLOCK_ROWS, k)
        data = np.ascontiguousarray(padded.transpose(0, 2, 1)).view(np.uint8).reshape(-1)
        return KIND[np.dtype(dtype).name, None], data, False
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
    return KIND[weight.bits, scheme], np.concatenate(parts, axis=1).reshape(-1), lossy


def uncovered(config: ModelConfig) -> str | None:
    """Why the native operators cannot run a model of these dimensions; None if they can."""
    if config.output_bias or config.mlp_bias:
        return "biases of the attention output or the MLP are not supported natively"
    widths = [("hidden_size", config.hidden_size, GROUP), ("head_dim", config.head_dim, 16)]
    for size in set(config.layers):
        widths.append(("intermediate_size", size.intermediate_size, GROUP))
        widths.append(("attention width", size.num_attention_heads * config.head_dim, GROUP))
    for name, value, multiple in widths:
        if value % multiple:
            return f"{name} {value} is not a multiple of {multiple}"
    return None


def _sections(
    config: ModelConfig,
    weights: Callable[[str, tuple[int, ...]], Weight],
    blobs: Mapping[str, bytes],
    report: NativeReport,
) -> Iterator[Section]:
    hidden = config.hidden_size
    shapes = {
        "embedding": (config.vocab_size, hidden),
        "head": (config.vocab_size, hidden),
    }

    def matrix(role: str, layers: Sequence[int], name: str) -> Section:
        weight = weights(name, shapes[role])
        assert weight.shape == shapes[role], (name, weight.shape)
        is_head = role == "head" or (role == "embedding" and config.tie_word_embeddings)
        kind, data, lossy = pack_matrix(weight, head=is_head)
        scheme = weight.scheme if isinstance(weight, QuantTensor) else str(weight.dtype)
        report.kinds[scheme] = report.kinds.get(scheme, 0) + 1
        if lossy:
            report.rounded_scales.append(name)
        return Section(ROLE[role], kind, layers, *shapes[role], data)

    def vector(role: str, layers: Sequence[int], values: Array) -> Section:
        flat = np.ascontiguousarray(values, dtype="<f4").reshape(-1)
        return Section(ROLE[role], VECTOR, layers, 1, flat.size, flat.view(np.uint8))

    def named_vector(role: str, layers: Sequence[int], name: str, size: int) -> Section:
        values = weights(name, (size,))
        assert not isinstance(values, QuantTensor), name
        return vector(role, layers, values)

    frequencies = np.array(rope_frequencies(config.rope_theta, config.head_dim))
    if config.rope_divisors is not None:
        frequencies /= config.rope_divisors
    once = (0,)
    yield vector("rope_frequencies", once, frequencies)
    for stored, size in enumerate(config.stored_layers):
        layers = range(stored * config.repeats, (stored + 1) * config.repeats)
        q_width = size.num_attention_heads * config.head_dim
        kv_width = size.num_key_value_heads * config.head_dim
        mlp = size.intermediate_size
        shapes |= {
            "query": (q_width, hidden),
            "key": (kv_width, hidden),
            "value": (kv_width, hidden),
            "output": (hidden, q_width),
            "gate": (mlp, hidden),
            "up": (mlp, hidden),
            "down": (hidden, mlp),
        }
        prefix = f"model.layers.{stored}."
        for role, name in VECTORS.items():
            yield named_vector(role, layers, prefix + name, hidden)
        if config.attention_bias:
            for role, name in BIASES.items():
                width = q_width if role == "query_bias" else kv_width
                yield named_vector(role, layers, prefix + name, width)
        for role, name in MATRICES.items():
            yield matrix(role, layers, prefix + name)
    yield named_vector("final_norm", once, "model.norm.weight", hidden)
    yield matrix("embedding", once, "model.embed_tokens.weight")
    if not config.tie_word_embeddings:
        yield matrix("head", once, "lm_head.weight")
    for role, content in blobs.items():
        data = np.frombuffer(content, np.uint8)
        yield Section(ROLE[role], BLOB, once, 1, data.size, data)


def lower(
    config: ModelConfig,
    weights: Callable[[str, tuple[int, ...]], Weight],
    path: str | os.PathLike[str],
    *,
    tokenizer: bytes | None = None,
    chat: Mapping[str, Any] | None = None,
) -> NativeReport:
    """Write ``path``; ``weights(name, shape)`` gives the tensor of a Hugging Face name.

    ``tokenizer`` and ``chat`` are what :mod:`pocketslm.export.lower.native_tokenizer` makes; with
    both, ``pocketslm-run`` needs no other file.
    """
    if reason := uncovered(config):
        raise ExportError(f"no native graph: {reason}; use --target onnx")
    path = Path(path)
    blobs = {}
    if tokenizer is not None:
        blobs["tokenizer"] = tokenizer
    if chat is not None:
        blobs["chat"] = json.dumps(chat, ensure_ascii=False).encode()
    report = NativeReport()
    # The data goes to the file as it is packed: no more than one matrix is held in memory.
    per_layer = len(MATRICES) + len(VECTORS) + len(BIASES)
    most = 4 + len(blobs) + len(config.layers) * per_layer
    offset = -(-(HEADER_BYTES + 32 * most) // ALIGNMENT) * ALIGNMENT
    table = bytearray()
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
        try:
            for s in _sections(config, weights, blobs, report):
                file.seek(offset)
                file.write(s.data.tobytes())
                for layer in s.layers:
                    table += struct.pack(
                        "<HHIIIQQ", s.role, s.kind, layer, s.rows, s.cols, offset, s.data.size
                    )
                offset += -(-s.data.size // ALIGNMENT) * ALIGNMENT
            file.truncate(offset)
            file.seek(0)
            file.write(_header(config, len(table) // 32, offset) + table)
            file.flush()
            Path(file.name).chmod(0o644)  # a temporary file is its owner's alone
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    report.bytes = offset
    return report


def _header(config: ModelConfig, sections: int, file_bytes: int) -> bytes:
    header = struct.pack(
        "<8sIIQ9I2f60x",
        MAGIC,
        VERSION if config.layer_sizes is None else VERSION_LAYER_SIZES,
        sections,
        file_bytes,
        config.hidden_size,
        len(config.layers),
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.intermediate_size,
        config.vocab_size,
        config.max_position_embeddings,
        config.head_dim,
        config.rms_norm_eps,
        1.0,
    )
    assert len(header) == HEADER_BYTES
    return header
