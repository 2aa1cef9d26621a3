"""Gemma 2 and 3: norms before and after each block, windows, scaled embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from pocketslm.errors import CheckpointError
from pocketslm.models.architectures import rope
from pocketslm.models.architectures.base import (
    ATTENTION,
    BUFFERS,
    FULL,
    GGUF_PARTS,
    MLP,
    QK_NORMS,
    SLIDING,
    TOP,
    VISION,
    Architecture,
    activation,
    gguf_map,
    named,
    written_rotaries,
    written_windows,
)
from pocketslm.models.architectures.fields import Fields, layer_types, need_pattern
from pocketslm.models.architectures.weights import WeightMap
from pocketslm.models.config import Attention, Layer, Mlp, ModelConfig, Rotary

_NORMS = {
    "input_layernorm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


# What transformers takes for a field of ``text_config`` that is not there.
_OF_TEXT: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "query_pre_attn_scalar": 256,
}


def _map(*parts: str, ignored: tuple[str, ...] = ()) -> WeightMap:
    return WeightMap(
        TOP,
        "model.layers.{}.",
        _NORMS | named(*ATTENTION, *MLP, *parts),
        norm_offset=1.0,
        ignored=BUFFERS + ignored,
    )


@dataclass(frozen=True)
class Gemma2(Architecture):
    """Every second layer has a window; scores and logits are capped."""

    hf: WeightMap = field(default=_map())
    # llama.cpp's converter adds the 1 to norm weights.
    gguf: WeightMap = field(default=gguf_map(parts=GGUF_PARTS))
    act_field: ClassVar[str] = "hidden_activation"
    tied_by_default: ClassVar[bool] = True
    pattern: ClassVar[int] = 2  # every so many layers one sees everything
    reads_pattern: ClassVar[bool] = False
    # Of scores and of logits, where the config names none; so in llama.cpp.
    default_caps: ClassVar[tuple[float | None, float | None]] = (50.0, 30.0)

    def hf_layers(self, f: Fields, count: int) -> list[Layer]:
        window = f.integer("sliding_window", 4096)
        every = f.integer("_sliding_window_pattern", self.pattern, least=0) or self.pattern
        every = f.integer("sliding_window_pattern", every, least=0) or every
        if not self.reads_pattern:
            need_pattern(f, every, self.pattern)
        default = [FULL if (i + 1) % every == 0 else SLIDING for i in range(count)]
        kinds = layer_types(f, count, default, (SLIDING, FULL))
        full = self.hf_attention(f)
        mixers = {FULL: full, SLIDING: self.sliding(full, window)}
        mlp = self.hf_mlp(f)
        return [Layer(mixers[kind], mlp, "both") for kind in kinds]

    def sliding(self, full: Attention, window: int) -> Attention:
        return replace(full, window=window)

    def hf_mlp(self, f: Fields) -> Mlp:
        f("hidden_act")  # an earlier name, which transformers does not read either
        kind = activation(f, f.text("hidden_activation", "gelu_pytorch_tanh"))
        return Mlp(f.integer("intermediate_size"), kind)

    def hf_attention(self, f: Fields) -> Attention:
        scale = f.number("query_pre_attn_scalar", 256.0) ** -0.5
        cap = f.stated("attn_logit_softcapping", self.default_caps[0])
        return replace(super().hf_attention(f), scale=scale, softcap=cap)

    def finish(self, f: Fields, config: ModelConfig) -> ModelConfig:
        # transformers rounds the factor to the embedding's type; bfloat16 is what Gemma is in.
        cap = f.stated("final_logit_softcapping", self.default_caps[1])
        # Our own field: a model that lost channels keeps the factor that it had.
        scale = f.number("embedding_multiplier", math.sqrt(config.hidden_size))
        return replace(config, embedding_scale=scale, logit_softcap=cap)

    def more_fields(self, c: ModelConfig) -> dict[str, Any]:
        first, written = c.attentions[0], written_windows(c)
        return written | {
            "hidden_act": None,
            "query_pre_attn_scalar": round(first.scale**-2),
            "attn_logit_softcapping": first.softcap,
            "final_logit_softcapping": c.logit_softcap,
            "embedding_multiplier": (
                None if c.embedding_scale == math.sqrt(c.hidden_size) else c.embedding_scale
            ),
            "sliding_window": written["sliding_window"] or 4096,
        }

    def gguf_fields(self, f: Fields, tensors: Any) -> dict[str, Any]:
        data = super().gguf_fields(f, tensors)
        data["hidden_activation"] = "gelu_pytorch_tanh"
        data["sliding_window"] = f("attention.sliding_window")
        data["query_pre_attn_scalar"] = self.gguf_scalar(f, data)
        data["attn_logit_softcapping"] = f("attn_logit_softcapping", self.default_caps[0])
        data["final_logit_softcapping"] = f("final_logit_softcapping", self.default_caps[1])
        return data

    def gguf_scalar(self, f: Fields, data: dict[str, Any]) -> float:
        """Of Gemma 2 and 3 the 27B models alone divide scores by another size than a head's."""
        if data["num_hidden_layers"] in (46, 62):
            return float(data["hidden_size"] / data["num_attention_heads"])
        return float(data["head_dim"])


@dataclass(frozen=True)
class Gemma3(Gemma2):
    """Q and K are normalized; windowed layers have rotary tables of their own."""

    hf: WeightMap = field(default=_map(*QK_NORMS, ignored=VISION))
    pattern: ClassVar[int] = 6
    reads_pattern: ClassVar[bool] = True
    default_theta: ClassVar[float] = 1e6
    default_caps: ClassVar[tuple[float | None, float | None]] = (None, None)

    def read_hf(self, f: Fields) -> ModelConfig:
        """Of a model that also sees (``gemma3``), the text alone."""
        if f("model_type") != "gemma3":
            return super().read_hf(f)
        return self.read_text_of(f, _OF_TEXT)

    def hf_attention(self, f: Fields) -> Attention:
        return replace(super().hf_attention(f), qk_norm="head")

    def sliding(self, full: Attention, window: int) -> Attention:
        return replace(full, window=window, rotary=1)

    def hf_rotaries(self, f: Fields) -> tuple[Rotary, ...]:
        f("rope_theta")  # stands beside rope_parameters for readers that know one base alone
        local, given = f.number("rope_local_base_freq", 1e4), f.table("rope_parameters")
        if given and not rope.is_nested(given):
            raise CheckpointError(
                f"{f.where}: rope_parameters has no entry for each of {FULL} and {SLIDING}, which "
                "this family has; transformers would ignore it"
            )
        return self.hf_rotary(f), self.hf_rotary(rope.of_kind(f, SLIDING), theta=local)

    def more_fields(self, c: ModelConfig) -> dict[str, Any]:
        return super().more_fields(c) | {
            "rope_local_base_freq": c.rotaries[1].theta,
            "rope_parameters": written_rotaries(c),
        }

    def gguf_fields(self, f: Fields, tensors: Any) -> dict[str, Any]:
        data = super().gguf_fields(f, tensors)
        data["rope_local_base_freq"] = f("rope.freq_base_swa")
        return data


ARCHITECTURES = [
    Gemma2("gemma2", "Gemma2ForCausalLM", ("gemma2",), ("gemma2",)),
    Gemma3("gemma3_text", "Gemma3ForCausalLM", ("gemma3_text", "gemma3"), ("gemma3",)),
]
