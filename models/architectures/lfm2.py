"""LFM2 and LFM2.5: short gated convolutions, with attention in some layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pocketslm.errors import CheckpointError
from pocketslm.models.architectures.base import (
    BUFFERS,
    GGUF_PARTS,
    TOP,
    Architecture,
    gguf_map,
    named,
)
from pocketslm.models.architectures.fields import Fields, layer_types
from pocketslm.models.architectures.phi import QKV
from pocketslm.models.architectures.weights import WeightMap
from pocketslm.models.config import Layer, Mlp, ModelConfig, ShortConv

# Read by nobody, transformers included: what was trained with, or what another field says.
_UNREAD = (
    *("block_norm_eps", "block_dim", "block_use_swiglu", "block_use_xavier_init"),
    *("block_mlp_init_scale", "block_out_init_scale", "conv_dim", "conv_dim_out"),
    *("conv_use_xavier_init", "use_pos_enc", "num_heads"),
)
_BCX = ("conv.b_proj", "conv.c_proj", "conv.x_proj")


@dataclass(frozen=True)
class Lfm2(Architecture):
    tied_by_default: ClassVar[bool] = True
    default_theta: ClassVar[float] = 1e6
    default_eps: ClassVar[float] = 1e-5
    eps_field: ClassVar[str] = "norm_eps"

    def hf_layers(self, f: Fields, count: int) -> list[Layer]:
        attending = f("full_attn_idxs", list(range(count)))
        if not isinstance(attending, list):
            raise CheckpointError(f"{f.where}: full_attn_idxs is not a list of layers")
        default = ["full_attention" if i in attending else "conv" for i in range(count)]
        kinds = layer_types(f, count, default, ("full_attention", "conv"))
        conv = ShortConv(f.integer("conv_L_cache", 3), f.flag("conv_bias"))
        attention, mlp = replace(self.hf_attention(f), qk_norm="head"), self.hf_mlp(f)
        return [Layer(conv if kind == "conv" else attention, mlp) for kind in kinds]

    def hf_mlp(self, f: Fields) -> Mlp:
        """The width is adjusted to two thirds, and up to a multiple, where the config says so."""
        width = f("block_ff_dim")
        width = f.integer("intermediate_size") if width is None else f.integer("block_ff_dim")
        f("intermediate_size")
        factor = f.number("block_ffn_dim_multiplier", 1.0)
        multiple = f.integer("block_multiple_of", 256)
        if f.flag("block_auto_adjust_ff_dim", True):
            width = int(factor * int(2 * width / 3))
            width = -(-width // multiple) * multiple
        return Mlp(width)

    def finish(self, f: Fields, config: ModelConfig) -> ModelConfig:
        tied = f("tie_embedding")
        f.used.update(_UNREAD)
        return replace(
            config,
            tie_word_embeddings=config.tie_word_embeddings if tied is None else bool(tied),
        )

    def more_fields(self, c: ModelConfig) -> dict[str, Any]:
        layers = c.stored_layers
        conv = next((x.mixer for x in layers if isinstance(x.mixer, ShortConv)), ShortConv(3))
        return {
            "layer_types": ["conv" if x.attention is None else "full_attention" for x in layers],
            "conv_L_cache": conv.taps,
            "conv_bias": conv.bias,
            "block_auto_adjust_ff_dim": False,
        }

    def gguf_fields(self, f: Fields, tensors: Any) -> dict[str, Any]:
        layers = f.integer("block_count")
        kv_heads = f.per_layer("attention.head_count_kv", layers)
        heads = max((h for h in kv_heads if isinstance(h, int)), default=1)
        data = dict(f.data)
        data[f.prefix + "attention.head_count_kv"] = [h or heads for h in kv_heads]
        g = Fields(data, f.where, f.prefix)
        fields = super().gguf_fields(g, tensors)
        f.used |= g.used
        return fields | {
            "layer_types": ["full_attention" if h else "conv" for h in kv_heads],
            "conv_L_cache": f("shortconv.l_cache"),
            "block_auto_adjust_ff_dim": False,
        }


ARCHITECTURES = [
    Lfm2(
        "lfm2",
        "Lfm2ForCausalLM",
        ("lfm2",),
        ("lfm2",),
        hf=WeightMap(
            TOP | {"model.norm": "model.embedding_norm"},
            "model.layers.{}.",
            named(*QKV)
            | {
                "input_layernorm": "operator_norm",
                "post_attention_layernorm": "ffn_norm",
                "self_attn.o_proj": "self_attn.out_proj",
                "self_attn.q_norm": "self_attn.q_layernorm",
                "self_attn.k_norm": "self_attn.k_layernorm",
                "conv.taps": "conv.conv",
                "conv.out_proj": "conv.out_proj",
                "mlp.gate_proj": "feed_forward.w1",
                "mlp.up_proj": "feed_forward.w3",
                "mlp.down_proj": "feed_forward.w2",
            },
            {"conv.in_proj": _BCX},
            ignored=BUFFERS,
        ),
        gguf=gguf_map(
            top={
                "model.embed_tokens": "token_embd",
                "model.norm": "token_embd_norm",
                "lm_head": "output",
            },
            parts=GGUF_PARTS
            | {"conv.taps": "shortconv.conv", "conv.out_proj": "shortconv.out_proj"},
            fused={"shortconv.in_proj": _BCX},
            flat_taps=True,
        ),
    )
]
