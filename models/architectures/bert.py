"""BERT and the encoders of its shape (MiniLM, BGE, RoBERTa): every token sees all, norms after each
sum."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from pocketslm.errors import CheckpointError
from pocketslm.models.architectures.base import GGUF_PARTS, Architecture, activation
from pocketslm.models.architectures.fields import Fields
from pocketslm.models.architectures.weights import Read, WeightMap
from pocketslm.models.config import (
    Attention,
    Layer,
    Mlp,
    ModelConfig,
    Pooling,
    PoolingKind,
    Rotary,
)
from pocketslm.models.tensors import Array, Weight, floats

_POSITIONS = "model.embed_positions.weight"
_PADDING = 1  # RoBERTa's token, whose position is its own
_POOLINGS: Mapping[int, PoolingKind] = {1: "mean", 2: "cls", 3: "last"}


@dataclass(frozen=True)
class BertMap(WeightMap):
    """A text alone is of token type 0; that row, added to every token, lies in the positions.

    types: their name of the table of token types. type_count: its rows.
    first: the row of the first token's position.
    """

    types: str = "bert.embeddings.token_type_embeddings.weight"
    type_count: int = 2
    first: int = 0

    def read(self, name: str, config: ModelConfig, read: Read) -> Weight:
        weight = super().read(name, config, read)
        if name != _POSITIONS:
            return weight
        types = floats(read(self.types))
        if types.ndim != 2 or types.shape[1:] != tuple(weight.shape[1:]):
            raise CheckpointError(
                f"{self.types} has shape {types.shape}, expected rows of {weight.shape[-1]}"
            )
        folded: Array = floats(weight)[self.first :] + types[0]
        return folded

    def write(self, config: ModelConfig, state: Mapping[str, Array]) -> dict[str, Array]:
        written = super().write(config, state) | {
            self.types: np.zeros((self.type_count, config.hidden_size), np.float32)
        }
        positions = self.stored(_POSITIONS)
        written[positions] = np.pad(written[positions], ((self.first, 0), (0, 0)))
        return written


@dataclass(frozen=True)
class Bert(Architecture):
    causal_in_gguf: ClassVar[bool] = False
    default_eps: ClassVar[float] = 1e-12
    eps_field: ClassVar[str] = "layer_norm_eps"

    def hf_layers(self, f: Fields, count: int) -> list[Layer]:
        return [Layer(self.hf_attention(f), self.hf_mlp(f), "last")] * count

    def hf_attention(self, f: Fields) -> Attention:
        attention = replace(super().hf_attention(f), rotary=None)
        if attention.query_width != f.integer("hidden_size") or (
            attention.kv_heads != attention.heads
        ):
            raise CheckpointError(
                f"{f.where}: {attention.heads} heads of {attention.head_dim} (KV: "
                f"{attention.kv_heads}) do not fill the hidden size; BERT's heads do"
            )
        return attention

    def hf_biases(self, f: Fields) -> tuple[bool, bool, bool]:
        super().hf_biases(f)  # written by us, read by nobody: the biases are always there
        return True, True, True

    def hf_mlp(self, f: Fields) -> Mlp:
        kind = activation(f, f.text("hidden_act", "gelu"))
        return Mlp(f.integer("intermediate_size"), kind, gated=False, bias=True)

    def hf_rotaries(self, f: Fields) -> tuple[Rotary, ...]:
        return ()

    def finish(self, f: Fields, config: ModelConfig) -> ModelConfig:
        if (kind := f.text("position_embedding_type", "absolute")) != "absolute":
            raise CheckpointError(
                f"{f.where}: position_embedding_type is {kind[:40]!r}, expected 'absolute'"
            )
        if f.flag("is_decoder"):
            raise CheckpointError(f"{f.where}: is_decoder is true; only encoders are supported")
        f.integer("type_vocab_size", self.names.type_count)
        positions = config.max_position_embeddings - self.names.first
        if positions < 1:
            raise CheckpointError(f"{f.where}: max_position_embeddings leaves no token a position")
        return replace(
            config,
            norm="layer",
            tie_word_embeddings=False,
            max_position_embeddings=positions,
            learned_positions=positions,
            embedding_norm=True,
            final_norm=False,
            head=False,
            causal=False,
        )

    @property
    def names(self) -> BertMap:
        """Where Hugging Face's files keep the weights."""
        assert isinstance(self.hf, BertMap)
        return self.hf

    def more_fields(self, c: ModelConfig) -> dict[str, Any]:
        return {
            "type_vocab_size": self.names.type_count,
            "max_position_embeddings": c.max_position_embeddings + self.names.first,
            "attention_bias": None,
            "mlp_bias": None,
        }

    def gguf_fields(self, f: Fields, tensors: Collection[str]) -> dict[str, Any]:
        data = super().gguf_fields(f, tensors)
        return data | {"hidden_act": "gelu"}

    def finish_gguf(self, f: Fields, config: ModelConfig, tensors: Collection[str]) -> ModelConfig:
        """llama.cpp's files say how texts are pooled; its embeddings have the length 1."""
        kind = f("pooling_type")
        if kind not in _POOLINGS:
            raise CheckpointError(
                f"{f.where}: pooling_type is {kind!r}, expected "
                + ", ".join(f"{number} ({name})" for number, name in _POOLINGS.items())
            )
        config = super().finish_gguf(f, config, tensors)
        return replace(config, pooling=Pooling(_POOLINGS[kind], normalize=True))


@dataclass(frozen=True)
class Roberta(Bert):
    """Its positions begin behind that of the padding."""

    def finish(self, f: Fields, config: ModelConfig) -> ModelConfig:
        if (padding := f("pad_token_id", _PADDING)) != _PADDING:
            raise CheckpointError(
                f"{f.where}: pad_token_id is {str(padding)[:40]}, expected {_PADDING}"
            )
        return super().finish(f, config)

    def more_fields(self, c: ModelConfig) -> dict[str, Any]:
        return super().more_fields(c) | {"pad_token_id": _PADDING}


def _hf(family: str, head: str, type_count: int = 2, first: int = 0) -> BertMap:
    """The names of a family in Hugging Face's files. head: of what training alone needs."""
    return BertMap(
        {
            "model.embed_tokens": f"{family}.embeddings.word_embeddings",
            "model.embed_positions": f"{family}.embeddings.position_embeddings",
            "model.embed_norm": f"{family}.embeddings.LayerNorm",
        },
        f"{family}.encoder.layer.{{}}.",
        {
            "self_attn.q_proj": "attention.self.query",
            "self_attn.k_proj": "attention.self.key",
            "self_attn.v_proj": "attention.self.value",
            "self_attn.o_proj": "attention.output.dense",
            "attention_post_norm": "attention.output.LayerNorm",
            "mlp.up_proj": "intermediate.dense",
            "mlp.down_proj": "output.dense",
            "mlp_post_norm": "output.LayerNorm",
        },
        # Token types are read with the positions; training alone needs the others.
        ignored=(
            r"embeddings\.(token_type_embeddings\.weight|position_ids)$",
            rf"^({family}\.)?pooler\.",
            rf"^{head}\.",
        ),
        types=f"{family}.embeddings.token_type_embeddings.weight",
        type_count=type_count,
        first=first,
    )


ARCHITECTURES = [
    Bert(
        "bert",
        "BertModel",
        ("bert",),
        ("bert",),
        hf=_hf("bert", "cls"),
        gguf=BertMap(
            {
                "model.embed_tokens": "token_embd",
                "model.embed_positions": "position_embd",
                "model.embed_norm": "token_embd_norm",
            },
            "blk.{}.",
            GGUF_PARTS
            | {"attention_post_norm": "attn_output_norm", "mlp_post_norm": "layer_output_norm"},
            ignored=(r"^token_types\.weight$", r"^cls\."),
            types="token_types.weight",
        ),
    ),
    Roberta(
        "roberta",
        "RobertaModel",
        ("roberta", "xlm-roberta"),
        hf=_hf("roberta", "lm_head", type_count=1, first=_PADDING + 1),
    ),
]
