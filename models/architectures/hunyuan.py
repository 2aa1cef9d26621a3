"""Hunyuan dense: Llama's block with Q and K normalized after their rotation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from pocketslm.models.architectures.base import (
    ATTENTION,
    BUFFERS,
    MLP,
    NORMS,
    TOP,
    Architecture,
    named,
)
from pocketslm.models.architectures.fields import Fields
from pocketslm.models.architectures.weights import WeightMap
from pocketslm.models.config import Attention


@dataclass(frozen=True)
class Hunyuan(Architecture):
    default_eps: ClassVar[float] = 1e-5

    def hf_attention(self, f: Fields) -> Attention:
        normed = f.flag("use_qk_norm", True)
        f("attention_head_dim")  # the same as head_dim
        attention = super().hf_attention(f)
        return replace(attention, qk_norm="head" if normed else None, norm_after_rope=normed)


ARCHITECTURES = [
    Hunyuan(
        "hunyuan_v1_dense",
        "HunYuanDenseV1ForCausalLM",
        ("hunyuan_v1_dense",),
        ("hunyuan-dense",),
        hf=WeightMap(
            TOP,
            "model.layers.{}.",
            named(*NORMS, *ATTENTION, *MLP)
            | {
                "self_attn.q_norm": "self_attn.query_layernorm",
                "self_attn.k_norm": "self_attn.key_layernorm",
            },
            ignored=BUFFERS,
        ),
    )
]
