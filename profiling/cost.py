"""What one token costs a model: multiply-accumulates, weights read, keys and values kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cost:
    """Of a decoder with gated MLPs, from its dimensions.

    heads, kv_heads: of all layers together; layer_macs: multiply-accumulates of one token in the
    layers, attention over the context apart; head_macs: in the output head, which a prompt runs
    for its last token only; embedding_values: entries of the embedding table; tied: whether the
    head is that table.
    """

    heads: int
    kv_heads: int
    head_dim: int
    layer_macs: int
    head_macs: int
    embedding_values: int
    tied: bool

    @classmethod
    def of(cls, dimensions: Mapping[str, Any]) -> Cost:
        """Of a manifest's ``architecture`` or a catalog entry's ``dimensions``."""
        d = dimensions
        if "hidden_size" in d:
            hidden, vocab, tied = d["hidden_size"], d["vocab_size"], d["tie_word_embeddings"]
            size = d["num_attention_heads"], d["num_key_value_heads"], d["intermediate_size"]
            layers = d.get("layer_sizes") or [size] * d["num_hidden_layers"]
            layers = layers * (2 if d.get("layer_sharing") else 1)
        else:
            hidden, vocab, tied = d["hidden"], d["vocab"], d["tied"]
            layers = [(d["heads"], d["kv_heads"], d["ffn"])] * d["layers"]
        heads, kv_heads, ffn = (sum(widths) for widths in zip(*layers, strict=True))
        head_dim = d["head_dim"]
        return cls(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            layer_macs=hidden * (head_dim * 2 * (heads + kv_heads) + 3 * ffn),
            head_macs=vocab * hidden,
            embedding_values=vocab * hidden,
            tied=bool(tied),
        )

    @property
    def read_share(self) -> float:
        """The part of the weights that a token reads: an embedding table of its own is a row."""
        read = self.layer_macs + self.head_macs
        return read / (read if self.tied else read + self.embedding_values)

    def attention_macs(self, position: int) -> int:
        """Of one token with ``position`` tokens before it: scores, and the sum of values."""
        return 2 * self.heads * self.head_dim * (position + 1)

    def prompt_macs(self, tokens: int) -> int:
        """Of a whole prompt on an empty cache, its attention being causal."""
        attention = self.heads * self.head_dim * tokens * (tokens + 1)
        return self.layer_macs * tokens + attention + self.head_macs

    def token_macs(self, position: int) -> int:
        """Of one decoded token."""
        return self.layer_macs + self.head_macs + self.attention_macs(position)

    def kv_bytes(self, tokens: int, bytes_per_value: float) -> int:
        """Keys and values of that many tokens: 2 x KV heads of all layers x head size x tokens."""
        return round(2 * self.kv_heads * self.head_dim * tokens * bytes_per_value)
