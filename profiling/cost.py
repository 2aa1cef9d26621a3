"""The cost of one token: multiply-accumulates, weights read, keys and values kept."""

from __future__ import annotations

from dataclasses import dataclass

from pocketslm.models.config import PREFILL_BATCH, ModelConfig, ShortConv
from pocketslm.models.sites import axes, sites


@dataclass(frozen=True)
class Cost:
    """The cost of a model, from its configuration.

    - ``layer_macs``: multiply-accumulates of one token in the layers, without attention over the
      context.
    - ``head_macs``: multiply-accumulates in the output head, which a prompt runs only for its last
      token.
    - ``embedding_values``: entries of the embedding table.
    - ``tied``: whether the head is that table.
    """

    config: ModelConfig
    layer_macs: int
    head_macs: int
    embedding_values: int
    tied: bool

    @classmethod
    def of(cls, config: ModelConfig) -> Cost:
        macs = 0
        for layer in config.layers:
            a = layer.attention
            sizes = {"channels": config.hidden_size, "neurons": layer.mlp.width}
            if a is not None:
                sizes |= {"queries": a.query_width, "values": a.kv_width}
            for site in sites(layer):
                for name in site.matrices:
                    rows, columns = axes(layer, name)
                    assert rows is not None
                    assert columns is not None
                    macs += sizes[rows] * sizes[columns]
            if isinstance(layer.mixer, ShortConv):
                macs += layer.mixer.taps * config.hidden_size
        table = config.vocab_size * config.hidden_size
        return cls(
            config=config,
            layer_macs=macs,
            head_macs=table if config.head else 0,
            embedding_values=table,
            tied=config.tie_word_embeddings,
        )

    @property
    def read_share(self) -> float:
        """The part of the weights that a token reads: it reads one row of a separate embedding
        table.
        """
        read = self.layer_macs + self.head_macs
        return read / (read if self.tied else read + self.embedding_values)

    def attention_macs(self, position: int) -> int:
        """Attention of one token behind ``position`` others: scores, and the sum of values."""
        seen = position + 1
        return sum(
            2 * a.query_width * (seen if a.window is None else min(seen, a.window))
            for a in self.config.attentions
        )

    def prompt_macs(self, tokens: int) -> int:
        """Multiply-accumulates of a whole prompt on an empty cache."""
        attention = 0
        if not self.config.causal:  # every token sees all of them
            attention = sum(2 * a.query_width * tokens**2 for a in self.config.attentions)
        for a in self.config.attentions if self.config.causal else ():
            full = tokens if a.window is None else min(tokens, a.window)
            seen = full * (full + 1) // 2 + (tokens - full) * full
            attention += 2 * a.query_width * seen
        return self.layer_macs * tokens + attention + self.head_macs

    def token_macs(self, position: int) -> int:
        """Multiply-accumulates of one decoded token."""
        return self.layer_macs + self.head_macs + self.attention_macs(position)

    def kv_bytes(self, tokens: int, bytes_per_value: float) -> int:
        """Bytes of keys and values of so many tokens; each layer keeps those it can still see."""
        return self.config.state_bytes(tokens, bytes_per_value, batch=PREFILL_BATCH)

    def kv_bytes_read(self, position: float, bytes_per_value: float) -> float:
        """Bytes of keys and values that one token behind ``position`` others reads."""
        return sum(
            2 * a.kv_width * (position if a.window is None else min(position, a.window))
            for a in self.config.attentions
        ) * float(bytes_per_value)
