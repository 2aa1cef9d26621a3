"""model.slm as versions 1 and 2 were: Llama's block by roles, without a program.

Files of these versions are read for good; this writer keeps them testable.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from native_support import packed

from pocketslm.export.lower.native_layout import ALIGNMENT, BLOCK_ROWS, Bytes
from pocketslm.models.config import ModelConfig
from pocketslm.models.tensors import Weight
from pocketslm.runtime.ops.ids import KIND, ROLE

_MATRICES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def split_head(shape: tuple[int, int], data: Bytes) -> tuple[int, Bytes]:
    """A head whose low nibbles lie apart as it was: with each block's at its end."""
    blocks, low = -(-shape[0] // BLOCK_ROWS), shape[1] * BLOCK_ROWS // 2
    high, rest = data[: -blocks * low], data[-blocks * low :]
    parts = [high.reshape(blocks, -1), rest.reshape(blocks, -1)]
    return KIND["q8_split"], np.concatenate(parts, axis=1).reshape(-1)


def write(
    path: Path, config: ModelConfig, weights: Callable[[str, tuple[int, ...]], Weight]
) -> None:
    """Write ``config`` with ``weights(name, shape)``: version 2 where layers differ in width."""
    c, sections = config, list[tuple[int, int, int, int, int, bytes]]()
    (rotary,), hidden = c.rotaries, c.hidden_size

    def vector(role: str, layer: int, values: object) -> None:
        flat = np.asarray(values, "<f4").reshape(-1)
        sections.append((ROLE[role], KIND["vector"], layer, 1, flat.size, flat.tobytes()))

    def matrix(role: str, layer: int, name: str, shape: tuple[int, int], head: bool) -> None:
        kind, data = packed(weights(name, shape), head=head)
        if kind == KIND["q8_apart"]:
            kind, data = split_head(shape, data)
        sections.append((ROLE[role], kind, layer, *shape, data.tobytes()))

    vector("rope_frequencies", 0, rotary.frequencies(c.max_position_embeddings))
    for layer, described in enumerate(c.stored_layers):
        a, mlp = described.attention, described.mlp.width
        assert a is not None
        shapes = {
            "query": (a.query_width, hidden),
            "key": (a.kv_width, hidden),
            "value": (a.kv_width, hidden),
            "output": (hidden, a.query_width),
            "gate": (mlp, hidden),
            "up": (mlp, hidden),
            "down": (hidden, mlp),
        }
        prefix = f"model.layers.{layer}."
        for role, name in (
            ("attention_norm", "input_layernorm"),
            ("mlp_norm", "post_attention_layernorm"),
        ):
            vector(role, layer, weights(f"{prefix}{name}.weight", (hidden,)))
        for role in ("query", "key", "value") if a.bias else ():
            name = f"{prefix}{_MATRICES[role]}.bias"
            vector(f"{role}_bias", layer, weights(name, shapes[role][:1]))
        for role, name in _MATRICES.items():
            matrix(role, layer, f"{prefix}{name}.weight", shapes[role], False)
    vector("final_norm", 0, weights("model.norm.weight", (hidden,)))
    table = c.vocab_size, hidden
    matrix("embedding", 0, "model.embed_tokens.weight", table, c.tie_word_embeddings)
    if not c.tie_word_embeddings:
        matrix("head", 0, "lm_head.weight", table, True)

    offset = -(-(128 + 32 * len(sections)) // ALIGNMENT) * ALIGNMENT
    entries, body = b"", b""
    for *fields, data in sections:
        entries += struct.pack("<HHIIIQQ", *fields, offset + len(body), len(data))
        body += data + b"\0" * (-len(data) % ALIGNMENT)
    sizes = [a.size for a in c.stored_layers]
    header = struct.pack(
        "<8sIIQ9I2f60x",
        b"PSLMODEL",
        1 if c.is_uniform else 2,
        len(sections),
        offset + len(body),
        hidden,
        len(sizes),
        max(size.num_attention_heads for size in sizes),
        max(size.num_key_value_heads for size in sizes),
        rotary.dim,
        c.intermediate_size,
        c.vocab_size,
        c.max_position_embeddings,
        rotary.dim,
        c.norm_eps,
        1.0,
    )
    path.write_bytes((header + entries).ljust(offset, b"\0") + body)
