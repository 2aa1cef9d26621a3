"""ERNIE 4.5: Llama's block whose Q and K lie as rotary pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pocketslm.models.architectures.base import (
    ATTENTION,
    BUFFERS,
    MLP,
    NORMS,
    TOP,
    Architecture,
    gguf_map,
    named,
)
from pocketslm.models.architectures.fields import Fields
from pocketslm.models.architectures.llama import QK
from pocketslm.models.architectures.weights import WeightMap
from pocketslm.models.config import ModelConfig


@dataclass(frozen=True)
class Ernie(Architecture):
    tied_by_default: ClassVar[bool] = True
    default_theta: ClassVar[float] = 5e5
    default_eps: ClassVar[float] = 1e-5

    def hf_biases(self, f: Fields) -> tuple[bool, bool, bool]:
        return (f.flag("use_bias"),) * 3

    def more_fields(self, c: ModelConfig) -> dict[str, Any]:
        return {"use_bias": c.attentions[0].bias, "attention_bias": None, "mlp_bias": None}


ARCHITECTURES = [
    Ernie(
        "ernie4_5",
        "Ernie4_5ForCausalLM",
        ("ernie4_5",),
        ("ernie4_5",),
        hf=WeightMap(
            TOP, "model.layers.{}.", named(*NORMS, *ATTENTION, *MLP), pairs=QK, ignored=BUFFERS
        ),
        gguf=gguf_map(pairs=QK),
    )
]
