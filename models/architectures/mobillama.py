"""MobiLlama: Llama's block, with one MLP that all layers share (https://arxiv.org/abs/2402.16840)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pocketslm.models.architectures.base import Architecture
from pocketslm.models.architectures.fields import Fields
from pocketslm.models.config import Attention, ModelConfig


@dataclass(frozen=True)
class MobiLlama(Architecture):
    def hf_attention(self, f: Fields) -> Attention:
        a = super().hf_attention(f)
        # Its published code reads no num_key_value_heads: each head has keys of its own.
        return replace(a, kv_heads=a.heads)

    def finish(self, f: Fields, config: ModelConfig) -> ModelConfig:
        return replace(config, mlp_sharing=True)

    def more_fields(self, c: ModelConfig) -> dict[str, Any]:
        return {"num_key_value_heads": c.attentions[0].heads}


ARCHITECTURES = [MobiLlama("mobillama", "MobiLlamaForCausalLM", ("mobillama",))]
