"""MiniCPM 1, 2 and 4: Llama's block with factors that follow from a small model's sizes.

They are those of muP (https://arxiv.org/abs/2404.06395): on the embedding, on what each layer adds
by the number of layers, and on the logits by how much wider the model is than the small one.
MiniCPM 5 is a plain Llama.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from pocketslm.models.architectures.base import Architecture, gguf_map
from pocketslm.models.architectures.fields import Fields
from pocketslm.models.architectures.llama import QK
from pocketslm.models.architectures.weights import WeightMap
from pocketslm.models.config import ModelConfig


@dataclass(frozen=True)
class MiniCpm(Architecture):
    tied_by_default: ClassVar[bool] = True
    gguf: WeightMap = field(default=gguf_map(pairs=QK))

    def finish(self, f: Fields, config: ModelConfig) -> ModelConfig:
        f("mup_denominator")  # of a draft model's head
        return replace(
            config,
            embedding_scale=f.number("scale_emb", 1.0),
            residual_scale=f.number("scale_depth", 1.0) / math.sqrt(config.num_hidden_layers),
            logit_scale=f.number("dim_model_base", 1.0) / config.hidden_size,
        )

    def more_fields(self, c: ModelConfig) -> dict[str, Any]:
        return {
            "scale_emb": c.embedding_scale,
            "scale_depth": c.residual_scale * math.sqrt(c.num_hidden_layers),
            "dim_model_base": c.logit_scale * c.hidden_size,
        }

    def gguf_fields(self, f: Fields, tensors: Collection[str]) -> dict[str, Any]:
        data = super().gguf_fields(f, tensors)
        layers, hidden = data["num_hidden_layers"], data["hidden_size"]
        # Files from before these keys are all of MiniCPM 2B, whose factors these are.
        residual = f("residual_scale")
        return data | {
            "scale_emb": f.number("embedding_scale", 12.0),
            "scale_depth": 1.4 if residual is None else residual * math.sqrt(layers),
            "dim_model_base": hidden / f.number("logit_scale", hidden / 256),
        }


ARCHITECTURES = [MiniCpm("minicpm", "MiniCPMForCausalLM", ("minicpm",), ("minicpm",))]
