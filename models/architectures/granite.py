"""Granite 3 and the dense Granite 4: Llama's block with factors on embedding, sums and logits."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from pocketslm.errors import CheckpointError
from pocketslm.models.architectures.base import (
    ATTENTION,
    BUFFERS,
    NORMS,
    TOP,
    Architecture,
    gguf_map,
    named,
)
from pocketslm.models.architectures.fields import Fields
from pocketslm.models.architectures.llama import QK
from pocketslm.models.architectures.weights import WeightMap
from pocketslm.models.config import Attention, Layer, Mlp, ModelConfig


@dataclass(frozen=True)
class Granite(Architecture):
    gguf: WeightMap = field(default=gguf_map(pairs=QK))

    def hf_attention(self, f: Fields) -> Attention:
        return replace(super().hf_attention(f), scale=f.number("attention_multiplier", 1.0))

    def finish(self, f: Fields, config: ModelConfig) -> ModelConfig:
        scaling = f.number("logits_scaling", 1.0)
        if not scaling:
            raise CheckpointError(f"{f.where}: logits_scaling is 0, by which logits are divided")
        return replace(
            config,
            embedding_scale=f.number("embedding_multiplier", 1.0),
            residual_scale=f.number("residual_multiplier", 1.0),
            logit_scale=1.0 / scaling,
        )

    def more_fields(self, c: ModelConfig) -> dict[str, Any]:
        return {
            "attention_multiplier": c.attentions[0].scale,
            "embedding_multiplier": c.embedding_scale,
            "residual_multiplier": c.residual_scale,
            "logits_scaling": 1.0 / c.logit_scale,
        }

    def gguf_fields(self, f: Fields, tensors: Collection[str]) -> dict[str, Any]:
        if not f.flag("rope.scaling.finetuned", True):
            raise CheckpointError(
                f"{f.where}: rope.scaling.finetuned is false, by which this family has no "
                "positions; that is not supported"
            )
        return super().gguf_fields(f, tensors) | {
            "attention_multiplier": f("attention.scale"),
            "embedding_multiplier": f("embedding_scale"),
            "residual_multiplier": f("residual_scale"),
            "logits_scaling": f("logit_scale"),
        }


@dataclass(frozen=True)
class GraniteHybrid(Granite):
    """Granite 4 where every layer is attention and no expert is left: a fused gated MLP."""

    def hf_layers(self, f: Fields, count: int) -> list[Layer]:
        kinds = f.per_layer("layer_types", count, "attention")
        kinds += f.per_layer("layers_block_type", count, "attention")
        for name in ("mamba_d_conv", "mamba_d_state"):
            f(name)  # of layers that there are none of
        if any(kind not in ("attention", "full_attention") for kind in kinds) or f(
            "num_local_experts"
        ):
            raise CheckpointError(
                f"{f.where}: layers of Mamba 2 or experts are not supported, expected the dense "
                "Granite 4 (350m, 1b)"
            )
        return super().hf_layers(f, count)

    def hf_attention(self, f: Fields) -> Attention:
        a = super().hf_attention(f)
        return a if f("position_embedding_type") == "rope" else replace(a, rotary=None)

    def hf_mlp(self, f: Fields) -> Mlp:
        f("intermediate_size")  # of the experts
        return replace(super().hf_mlp(f), width=f.integer("shared_intermediate_size"))

    def more_fields(self, c: ModelConfig) -> dict[str, Any]:
        rotated = c.attentions[0].rotary is not None
        return super().more_fields(c) | {
            "shared_intermediate_size": c.intermediate_size,
            "layer_types": ["full_attention"] * c.num_hidden_layers,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "position_embedding_type": "rope" if rotated else "nope",
        }


ARCHITECTURES = [
    Granite("granite", "GraniteForCausalLM", ("granite",), ("granite",)),
    GraniteHybrid(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        ("granitemoehybrid",),
        hf=WeightMap(
            TOP,
            "model.layers.{}.",
            named(*NORMS, *ATTENTION) | {"mlp.down_proj": "shared_mlp.output_linear"},
            {"shared_mlp.input_linear": ("mlp.gate_proj", "mlp.up_proj")},
            ignored=BUFFERS,
        ),
    ),
]
