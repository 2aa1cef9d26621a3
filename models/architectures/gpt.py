"""GPT-2, GPT-Neo (TinyStories) and GPT-NeoX (Pythia): LayerNorm, biases, plain MLPs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pocketslm.errors import CheckpointError
from pocketslm.models.architectures.base import (
    GGUF_TOP,
    Architecture,
    activation,
    gguf_map,
)
from pocketslm.models.architectures.fields import Fields
from pocketslm.models.architectures.phi import QKV
from pocketslm.models.architectures.weights import WeightMap
from pocketslm.models.config import Attention, Layer, Mlp, ModelConfig, Rotary

_TOP = {
    "model.embed_tokens": "transformer.wte",
    "model.embed_positions": "transformer.wpe",
    "model.norm": "transformer.ln_f",
    "lm_head": "lm_head",
}
_NORMS = {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2"}
# Masks, and what masked scores become: buffers of old files.
_MASKS: tuple[str, ...] = (
    r"\.attn\.(attention\.)?(bias|masked_bias)$",
    r"\.attention\.(bias|masked_bias)$",
)
_MASKS += (r"rotary_emb\.inv_freq$",)
_LEARNED = GGUF_TOP | {"model.embed_positions": "position_embd"}


@dataclass(frozen=True)
class Gpt2(Architecture):
    tied_by_default: ClassVar[bool] = True
    default_eps: ClassVar[float] = 1e-5
    eps_field: ClassVar[str] = "layer_norm_eps"
    # Our name of a field -> the family's.
    renamed: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "n_inner",
        "layer_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    }

    def read_hf(self, f: Fields) -> ModelConfig:
        data = {ours: f(theirs) for ours, theirs in self.renamed.items()}
        if data["intermediate_size"] is None:
            data["intermediate_size"] = 4 * f.integer(self.renamed["hidden_size"])
        f("n_ctx")
        g = Fields({**f.data, **{k: v for k, v in data.items() if v is not None}}, f.where)
        config = super().read_hf(g)
        f.used |= g.used
        return config

    def hf_layers(self, f: Fields, count: int) -> list[Layer]:
        if not f.flag("scale_attn_weights", True) or f.flag("scale_attn_by_inverse_layer_idx"):
            raise CheckpointError(f"{f.where}: scores are scaled in a way that is not supported")
        attention = replace(self.hf_attention(f), rotary=None)
        return [Layer(attention, self.hf_mlp(f))] * count

    def hf_biases(self, f: Fields) -> tuple[bool, bool, bool]:
        return True, True, True

    def hf_mlp(self, f: Fields) -> Mlp:
        kind = activation(f, f.text("hidden_act", "gelu_new"))
        return Mlp(f.integer("intermediate_size"), kind, gated=False, bias=self.hf_biases(f)[2])

    def hf_rotaries(self, f: Fields) -> tuple[Rotary, ...]:
        return ()

    def finish(self, f: Fields, config: ModelConfig) -> ModelConfig:
        return replace(
            config,
            norm="layer",
            learned_positions=config.max_position_embeddings,
        )

    def more_fields(self, c: ModelConfig) -> dict[str, Any]:
        first = c.stored_layers[0]
        data: dict[str, Any] = {"attention_bias": None, "mlp_bias": None, "layer_norm_eps": None}
        values = {
            "hidden_size": c.hidden_size,
            "num_attention_heads": c.attentions[0].heads,
            "num_hidden_layers": c.num_hidden_layers,
            "max_position_embeddings": c.max_position_embeddings,
            "intermediate_size": c.intermediate_size,
            "layer_norm_eps": c.norm_eps,
            "hidden_act": {"gelu_tanh": "gelu_new"}.get(first.mlp.activation, first.mlp.activation),
        }
        return data | {theirs: values[ours] for ours, theirs in self.renamed.items()}

    def gguf_fields(self, f: Fields, tensors: Any) -> dict[str, Any]:
        data = super().gguf_fields(f, tensors)
        data |= {"hidden_act": "gelu_new"}
        return data | {theirs: data[ours] for ours, theirs in self.renamed.items()}


@dataclass(frozen=True)
class GptNeo(Gpt2):
    """Every second layer has a window; scores are not scaled."""

    renamed: ClassVar[dict[str, str]] = {
        "hidden_size": "hidden_size",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "max_position_embeddings",
        "intermediate_size": "intermediate_size",
        "layer_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    }

    def hf_layers(self, f: Fields, count: int) -> list[Layer]:
        kinds = f("attention_layers")
        if kinds is None:
            kinds = _repeated(f("attention_types", [[["global", "local"], count // 2]]), count)
        known = isinstance(kinds, list) and all(kind in ("global", "local") for kind in kinds)
        if not known or len(kinds) != count:
            raise CheckpointError(f"{f.where}: attention_layers does not say global or local")
        f("attention_types")
        window = f.integer("window_size", 256)
        attention = replace(
            self.hf_attention(f), rotary=None, scale=1.0, bias=False, output_bias=True
        )
        local = replace(attention, window=window)
        mlp = self.hf_mlp(f)
        return [Layer(local if kind == "local" else attention, mlp) for kind in kinds]

    def more_fields(self, c: ModelConfig) -> dict[str, Any]:
        windows = [a.window for a in c.attentions]
        kinds = ["global" if w is None else "local" for w in windows]
        return super().more_fields(c) | {
            "attention_layers": kinds,
            "attention_types": [[[kind], 1] for kind in kinds],
            "window_size": next((w for w in windows if w is not None), 256),
            "attention_out_bias": None,
        }


@dataclass(frozen=True)
class GptNeoX(Architecture):
    default_eps: ClassVar[float] = 1e-5
    eps_field: ClassVar[str] = "layer_norm_eps"
    default_share: ClassVar[float] = 0.25
    rotates_part: ClassVar[bool] = True

    def hf_layers(self, f: Fields, count: int) -> list[Layer]:
        parallel = f.flag("use_parallel_residual", True)
        norms: Any = "parallel2" if parallel else "pre"
        return [Layer(self.hf_attention(f), self.hf_mlp(f), norms)] * count

    def hf_attention(self, f: Fields) -> Attention:
        biased = f.flag("attention_bias", True)
        return replace(super().hf_attention(f), bias=biased, output_bias=biased)

    def hf_biases(self, f: Fields) -> tuple[bool, bool, bool]:
        return True, True, True

    def hf_mlp(self, f: Fields) -> Mlp:
        kind = activation(f, f.text("hidden_act", "gelu"))
        return Mlp(f.integer("intermediate_size"), kind, gated=False, bias=True)

    def hf_rotaries(self, f: Fields) -> tuple[Rotary, ...]:
        base = f.number("rotary_emb_base", self.default_theta)
        share = f.number("rotary_pct", self.default_share)
        return (self.hf_rotary(f, theta=base, share=share),)

    def finish(self, f: Fields, config: ModelConfig) -> ModelConfig:
        return replace(config, norm="layer")

    def more_fields(self, c: ModelConfig) -> dict[str, Any]:
        a = c.attentions[0]
        return {
            "attention_bias": a.bias,
            "rotary_pct": c.rotaries[0].dim / a.head_dim,
            "rotary_emb_base": c.rotaries[0].theta,
            "partial_rotary_factor": None,
            "mlp_bias": None,
            "use_parallel_residual": c.stored_layers[0].norms == "parallel2",
        }

    def gguf_fields(self, f: Fields, tensors: Any) -> dict[str, Any]:
        data = super().gguf_fields(f, tensors)
        parallel = f.flag("use_parallel_residual", True)
        return data | {
            "hidden_act": "gelu",
            "use_parallel_residual": bool(parallel),
        }


ARCHITECTURES = [
    Gpt2(
        "gpt2",
        "GPT2LMHeadModel",
        ("gpt2",),
        ("gpt2",),
        hf=WeightMap(
            _TOP,
            "transformer.h.{}.",
            _NORMS
            | {
                "self_attn.o_proj": "attn.c_proj",
                "mlp.up_proj": "mlp.c_fc",
                "mlp.down_proj": "mlp.c_proj",
            },
            {"attn.c_attn": QKV},
            transposed=True,
            ignored=_MASKS,
        ),
        gguf=gguf_map(top=_LEARNED, fused={"attn_qkv": QKV}),
    ),
    GptNeo(
        "gpt_neo",
        "GPTNeoForCausalLM",
        ("gpt_neo",),
        hf=WeightMap(
            _TOP,
            "transformer.h.{}.",
            _NORMS
            | {
                "self_attn.q_proj": "attn.attention.q_proj",
                "self_attn.k_proj": "attn.attention.k_proj",
                "self_attn.v_proj": "attn.attention.v_proj",
                "self_attn.o_proj": "attn.attention.out_proj",
                "mlp.up_proj": "mlp.c_fc",
                "mlp.down_proj": "mlp.c_proj",
            },
            ignored=_MASKS,
        ),
    ),
    GptNeoX(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        ("gpt_neox",),
        ("gptneox",),
        hf=WeightMap(
            {
                "model.embed_tokens": "gpt_neox.embed_in",
                "model.norm": "gpt_neox.final_layer_norm",
                "lm_head": "embed_out",
            },
            "gpt_neox.layers.{}.",
            {
                "input_layernorm": "input_layernorm",
                "post_attention_layernorm": "post_attention_layernorm",
                "self_attn.o_proj": "attention.dense",
                "mlp.up_proj": "mlp.dense_h_to_4h",
                "mlp.down_proj": "mlp.dense_4h_to_h",
            },
            {"attention.query_key_value": QKV},
            interleaved=True,
            ignored=_MASKS,
        ),
        gguf=gguf_map(fused={"attn_qkv": QKV}),
    ),
]


def _repeated(groups: Any, count: int) -> list[Any]:
    """The kinds of layers that pairs of (kinds, times) stand for; empty where they are no pairs."""
    found: list[Any] = []
    for pair in groups if isinstance(groups, list) else []:
        match pair:
            case [[*kinds], int(times)] if 0 <= times <= count:
                found += kinds * times
            case _:
                return []
    return found
