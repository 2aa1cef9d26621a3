"""Phi 1 to 4: Phi 1 and 2 with attention and MLP side by side, Phi 3 and 4 with fused matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pocketslm.errors import CheckpointError
from pocketslm.models.architectures.base import (
    BUFFERS,
    NORMS,
    TOP,
    Architecture,
    gguf_map,
    named,
)
from pocketslm.models.architectures.fields import Fields
from pocketslm.models.architectures.weights import WeightMap
from pocketslm.models.config import Layer, Mlp, ModelConfig, Rotary

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True)
class Phi3(Architecture):
    """Llama's block with fused matrices, and LongRoPE."""

    default_eps: ClassVar[float] = 1e-5
    rotates_part: ClassVar[bool] = True

    def hf_layers(self, f: Fields, count: int) -> list[Layer]:
        attention = replace(self.hf_attention(f), window=f("sliding_window"))
        return [Layer(attention, self.hf_mlp(f))] * count

    def more_fields(self, c: ModelConfig) -> dict[str, Any]:
        return {"sliding_window": c.attentions[0].window}

    def hf_rotaries(self, f: Fields) -> tuple[Rotary, ...]:
        rope = f.table("rope_scaling") | f.table("rope_parameters")
        said = f("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
        return super().hf_rotaries(f.but(original_max_position_embeddings=said or 4096))

    def gguf_fields(self, f: Fields, tensors: Any) -> dict[str, Any]:
        data = super().gguf_fields(f, tensors)
        # Phi-3-mini's converter writes a window of the whole context.
        window = f("attention.sliding_window")
        if window and window < data["max_position_embeddings"]:
            data["sliding_window"] = window
        return data


@dataclass(frozen=True)
class Phi(Architecture):
    """Phi 1, 1.5 and 2: attention and MLP read one LayerNorm; biases everywhere."""

    default_act: ClassVar[str] = "gelu_new"
    default_eps: ClassVar[float] = 1e-5
    eps_field: ClassVar[str] = "layer_norm_eps"
    default_share: ClassVar[float] = 0.5
    rotates_part: ClassVar[bool] = True

    def hf_layers(self, f: Fields, count: int) -> list[Layer]:
        if f.flag("qk_layernorm"):
            raise CheckpointError(f"{f.where}: qk_layernorm is not supported")
        return [Layer(self.hf_attention(f), self.hf_mlp(f), "parallel")] * count

    def hf_biases(self, f: Fields) -> tuple[bool, bool, bool]:
        return True, True, True

    def hf_mlp(self, f: Fields) -> Mlp:
        return replace(super().hf_mlp(f), gated=False)

    def finish(self, f: Fields, config: ModelConfig) -> ModelConfig:
        return replace(config, norm="layer", head_bias=True)

    def more_fields(self, c: ModelConfig) -> dict[str, Any]:
        return {"attention_bias": None, "mlp_bias": None}

    def gguf_fields(self, f: Fields, tensors: Any) -> dict[str, Any]:
        data = super().gguf_fields(f, tensors)
        return data | {"hidden_act": "gelu_new"}


ARCHITECTURES = [
    Phi3(
        "phi3",
        "Phi3ForCausalLM",
        ("phi3",),
        ("phi3",),
        hf=WeightMap(
            TOP,
            "model.layers.{}.",
            named(*NORMS, "self_attn.o_proj", "mlp.down_proj"),
            {"self_attn.qkv_proj": QKV, "mlp.gate_up_proj": _GATE_UP},
            ignored=BUFFERS,
        ),
        gguf=gguf_map(fused={"attn_qkv": QKV, "ffn_up": _GATE_UP}),
    ),
    Phi(
        "phi",
        "PhiForCausalLM",
        ("phi",),
        ("phi2",),
        hf=WeightMap(
            TOP | {"model.norm": "model.final_layernorm"},
            "model.layers.{}.",
            named("input_layernorm", *QKV)
            | {
                "self_attn.o_proj": "self_attn.dense",
                "mlp.up_proj": "mlp.fc1",
                "mlp.down_proj": "mlp.fc2",
            },
            ignored=BUFFERS,
        ),
    ),
]
