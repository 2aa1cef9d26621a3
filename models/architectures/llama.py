"""Llama and what shares its block: SmolLM2, TinyLlama, Llama 2 and 3, MobileLLM, Fox-1, Mistral."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pocketslm.models.architectures.base import Architecture, gguf_map
from pocketslm.models.architectures.fields import Fields
from pocketslm.models.config import Layer, ModelConfig

QK = ("self_attn.q_proj", "self_attn.k_proj")


@dataclass(frozen=True)
class Llama(Architecture):
    def finish(self, f: Fields, config: ModelConfig) -> ModelConfig:
        # MobileLLM has a name of its own for a tied head.
        return replace(
            config, tie_word_embeddings=config.tie_word_embeddings or f.flag("share_embedding")
        )

    def more_fields(self, c: ModelConfig) -> dict[str, Any]:
        if not c.layer_sharing:
            return {}
        # So that transformers does not run half of the model.
        return {"architectures": ["MobileLLMForCausalLM"], "model_type": "mobilellm"}


@dataclass(frozen=True)
class Mistral(Architecture):
    """Llama's block, with a window in each layer where the config names one."""

    def hf_layers(self, f: Fields, count: int) -> list[Layer]:
        window = f("sliding_window")
        attention = replace(self.hf_attention(f), window=window)
        return [Layer(attention, self.hf_mlp(f))] * count

    def more_fields(self, c: ModelConfig) -> dict[str, Any]:
        first = c.stored_layers[0].attention
        return {"sliding_window": None if first is None else first.window}


ARCHITECTURES = [
    Llama(
        "llama",
        "LlamaForCausalLM",
        ("llama", "mobilellm"),
        ("llama",),
        gguf=gguf_map(pairs=QK),
    ),
    Mistral("mistral", "MistralForCausalLM", ("mistral",)),
]
