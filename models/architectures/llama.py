"""Llama and what shares its block: SmolLM2, TinyLlama, Llama 2 and 3, MobileLLM, Fox-1, PhoneLM,
Mistral and Ministral."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pocketslm.errors import CheckpointError
from pocketslm.models.architectures.base import (
    ATTENTION,
    BUFFERS,
    MLP,
    NORMS,
    TOP,
    VISION,
    Architecture,
    gguf_map,
    named,
)
from pocketslm.models.architectures.fields import Fields
from pocketslm.models.architectures.weights import WeightMap
from pocketslm.models.config import Attention, Layer, ModelConfig

QK = ("self_attn.q_proj", "self_attn.k_proj")
# What transformers takes for a field of Ministral 3's ``text_config`` that is not there.
_MINISTRAL: dict[str, Any] = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 34,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
}
# The same for the whole of ``rope_parameters``.
_MINISTRAL_ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


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
    """Llama's block, with a window in each layer where the config does not say that it has none."""

    default_window: ClassVar[int | None] = 4096

    def hf_layers(self, f: Fields, count: int) -> list[Layer]:
        window = f.stated("sliding_window", self.default_window)
        attention = replace(self.hf_attention(f), window=window)
        return [Layer(attention, self.hf_mlp(f))] * count

    def more_fields(self, c: ModelConfig) -> dict[str, Any]:
        first = c.stored_layers[0].attention
        return {"sliding_window": None if first is None else first.window}


@dataclass(frozen=True)
class Ministral3(Mistral):
    """Queries grow with their distance from the start, in steps of the original context."""

    default_window: ClassVar[int | None] = None
    default_eps: ClassVar[float] = 1e-5

    def read_hf(self, f: Fields) -> ModelConfig:
        """Of a model that also sees (``mistral3``), the text alone."""
        if f("model_type") != "mistral3":
            bare = f("rope_parameters") is f("rope_scaling") is None
            return super().read_hf(f.but(rope_parameters=_MINISTRAL_ROPE) if bare else f)
        if (kind := f.table("text_config").get("model_type")) != "ministral3":
            raise CheckpointError(
                f"{f.where}: text_config is of model_type {str(kind)[:40]!r}, expected 'ministral3'"
            )
        for name in ("vision_feature_layer", "spatial_merge_size", "multimodal_projector_bias"):
            f(name)  # of what is left out
        return self.read_text_of(f, _MINISTRAL)

    def hf_attention(self, f: Fields) -> Attention:
        rope = f.table("rope_scaling") | f.table("rope_parameters")
        beta = rope.get("llama_4_scaling_beta") or 0.0
        attention = super().hf_attention(f)
        if not beta:
            return attention
        step = f("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
        step = step or f.integer("max_position_embeddings")
        return replace(attention, temperature=beta, temperature_step=step)

    def gguf_fields(self, f: Fields, tensors: Collection[str]) -> dict[str, Any]:
        data = super().gguf_fields(f, tensors) | {"rope_parameters": {}}
        beta = f("attention.temperature_scale")
        if beta and "rope_scaling" in data:
            data["rope_scaling"]["llama_4_scaling_beta"] = beta
        return data


ARCHITECTURES = [
    Llama(
        "llama",
        "LlamaForCausalLM",
        ("llama", "mobilellm"),
        ("llama",),
        gguf=gguf_map(pairs=QK),
    ),
    Llama("phonelm", "PhoneLMForCausalLM", ("phonelm",)),
    Mistral("mistral", "MistralForCausalLM", ("mistral",)),
    Ministral3(
        "ministral3",
        "Ministral3ForCausalLM",
        ("ministral3", "mistral3"),
        ("mistral3",),
        hf=WeightMap(
            TOP,
            "model.layers.{}.",
            named(*NORMS, *ATTENTION, *MLP),
            ignored=BUFFERS + VISION,
        ),
        gguf=gguf_map(pairs=QK),
    ),
]
