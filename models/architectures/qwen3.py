"""Qwen3 and its embedding models: Llama's block with Q and K normalized a head at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pocketslm.models.architectures.base import (
    ATTENTION,
    BUFFERS,
    MLP,
    NORMS,
    QK_NORMS,
    TOP,
    Architecture,
    named,
)
from pocketslm.models.architectures.fields import Fields
from pocketslm.models.architectures.qwen2 import Qwen2
from pocketslm.models.architectures.weights import WeightMap
from pocketslm.models.config import Attention


@dataclass(frozen=True)
class Qwen3(Qwen2):
    def hf_biases(self, f: Fields) -> tuple[bool, bool, bool]:
        return Architecture.hf_biases(self, f)

    def hf_attention(self, f: Fields) -> Attention:
        return replace(super().hf_attention(f), qk_norm="head")


ARCHITECTURES = [
    Qwen3(
        "qwen3",
        "Qwen3ForCausalLM",
        ("qwen3",),
        ("qwen3",),
        hf=WeightMap(
            TOP, "model.layers.{}.", named(*NORMS, *ATTENTION, *QK_NORMS, *MLP), ignored=BUFFERS
        ),
    )
]
