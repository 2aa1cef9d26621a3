"""What every architecture says of itself, with Llama's answers as the default."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from pocketslm.errors import CheckpointError
from pocketslm.models.architectures import rope
from pocketslm.models.architectures.fields import Fields
from pocketslm.models.architectures.weights import WeightMap
from pocketslm.models.config import (
    MAX_LAYERS,
    Activation,
    Attention,
    Layer,
    LayerSize,
    Mlp,
    ModelConfig,
    Rotary,
)
from pocketslm.models.tensors import Array

TOP = {
    "model.embed_tokens": "model.embed_tokens",
    "model.norm": "model.norm",
    "lm_head": "lm_head",
}
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
FULL, SLIDING = "full_attention", "sliding_attention"  # what layer_types says
BUFFERS = (r"rotary_emb\.inv_freq$",)  # of no use to anybody who can compute them
VISION = (r"^(model\.)?(vision_tower|multi_modal_projector)\.",)

GGUF_TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
GGUF_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "attention_post_norm": "post_attention_norm",
    "mlp_post_norm": "post_ffw_norm",
}
GGUF_BUFFERS = (r"^rope_freqs\.weight$", r"^rope_factors_(long|short)\.weight$")
_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}
_ROTATED = rope.ROTATED
_ACTIVATION_NAMES: Mapping[Activation, str] = {
    "silu": "silu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}


def named(*parts: str) -> dict[str, str]:
    """Parts that have the same name there as here."""
    return {part: part for part in parts}


def gguf_map(**changes: Any) -> WeightMap:
    """llama.cpp's names."""
    fields: dict[str, Any] = {
        "top": GGUF_TOP,
        "layer": "blk.{}.",
        "parts": GGUF_PARTS,
        "ignored": GGUF_BUFFERS,
    }
    return WeightMap(**fields | changes)


def written_windows(c: ModelConfig) -> dict[str, Any]:
    """The fields of layers with a window beside layers that see everything."""
    windows = [layer.attention.window for layer in c.stored_layers if layer.attention is not None]
    return {
        "sliding_window": next((w for w in windows if w is not None), None),
        "layer_types": [FULL if w is None else SLIDING for w in windows],
    }


def written_rotaries(c: ModelConfig) -> dict[str, Any]:
    """``rope_parameters`` of layers that see everything and of those with a window."""
    return {
        kind: (rope.declared(table, c.max_position_embeddings) or {"rope_type": "default"})
        | {"rope_theta": table.theta}
        for kind, table in zip((FULL, SLIDING), c.rotaries, strict=True)
    }


def activation(f: Fields, name: str) -> Activation:
    """One of our activations by Hugging Face's name."""
    if name not in _ACTIVATIONS:
        raise CheckpointError(
            f"{f.where}: activation {name[:40]!r} is not supported, expected one of "
            + ", ".join(_ACTIVATIONS)
        )
    return _ACTIVATIONS[name]


@dataclass(frozen=True)
class Architecture:
    """One family. A subclass overrides what differs from Llama.

    name: our name, that of Hugging Face's ``model_type`` where there is one.
    model_types, gguf_types: the names that it answers to in config.json and in GGUF files.
    hf_class: the transformers class that config.json names.
    hf, gguf: where its files keep the weights.
    pairs_in_gguf: GGUF files keep rows of Q and K as rotary pairs (llama.cpp's NORM kind of RoPE).
    """

    name: str
    hf_class: str
    model_types: tuple[str, ...]
    gguf_types: tuple[str, ...] = ()
    hf: WeightMap = field(
        default=WeightMap(TOP, "model.layers.{}.", named(*NORMS, *ATTENTION, *MLP), ignored=BUFFERS)
    )
    gguf: WeightMap = field(default=gguf_map())

    act_field: ClassVar[str] = "hidden_act"
    # What transformers takes where the config names no activation, no epsilon.
    default_act: ClassVar[str] = "silu"
    default_eps: ClassVar[float] = 1e-6
    eps_field: ClassVar[str] = "rms_norm_eps"  # of the norms, by its name in config.json
    tied_by_default: ClassVar[bool] = False
    # RoPE's base, and the share of a head that it rotates, where the config names none.
    default_theta: ClassVar[float] = 10000.0
    default_share: ClassVar[float] = 1.0
    # Whether transformers' model of the family can rotate a part of a head.
    rotates_part: ClassVar[bool] = False
    causal_in_gguf: ClassVar[bool] = True

    # Reading config.json.

    def read_hf(self, f: Fields) -> ModelConfig:
        """The configuration of a config.json; CheckpointError where it is not supported."""
        count = f.integer("num_hidden_layers")
        if count > MAX_LAYERS:
            raise CheckpointError(f"{f.where}: {count} layers, at most {MAX_LAYERS}")
        config = ModelConfig(
            architecture=self.name,
            vocab_size=f.integer("vocab_size"),
            hidden_size=f.integer("hidden_size"),
            max_position_embeddings=f.integer("max_position_embeddings"),
            stored_layers=tuple(self.hf_layers(f, count)),
            rotaries=self.hf_rotaries(f),
            norm_eps=f.epsilon(self.eps_field, self.default_eps),
            tie_word_embeddings=f.flag("tie_word_embeddings", self.tied_by_default),
            layer_sharing=f.flag("layer_sharing"),
            causal=f.flag("is_causal", True),
        )
        return _with_layer_sizes(self.finish(f, config), f)

    def read_text_of(self, f: Fields, defaults: Mapping[str, Any]) -> ModelConfig:
        """Of a model that also sees, the text alone: its fields lie in ``text_config``.

        defaults: what transformers takes for fields that are not there.
        """
        f("vision_config")
        f.notes.append("the vision tower is left out: the bundle reads and writes text")
        data = dict(defaults) | f.table("text_config")
        if (tied := f("tie_word_embeddings")) is not None:  # the whole model's word counts
            data["tie_word_embeddings"] = tied
        text = Fields(data, f.where)
        config = self.read_hf(text)
        f.notes += text.settle()
        return config

    def hf_layers(self, f: Fields, count: int) -> list[Layer]:
        """Each layer's kind; by default one kind for all."""
        return [Layer(self.hf_attention(f), self.hf_mlp(f))] * count

    def hf_attention(self, f: Fields) -> Attention:
        """The attention of a plain layer."""
        heads, head_dim = f.integer("num_attention_heads"), self.head_dim(f)
        biased, output = self.hf_biases(f)[:2]
        return Attention(
            heads,
            f.integer("num_key_value_heads", heads),
            head_dim,
            scale=head_dim**-0.5,
            bias=biased,
            output_bias=output,
        )

    def head_dim(self, f: Fields) -> int:
        heads, hidden = f.integer("num_attention_heads"), f.integer("hidden_size")
        return f.integer("head_dim", hidden // heads or 1)

    def hf_biases(self, f: Fields) -> tuple[bool, bool, bool]:
        """Biases of Q, K and V; of the attention's output; of the MLP."""
        attention = f.flag("attention_bias")
        # Our own field, where only some of the four have one (a GGUF may).
        output = f.flag("attention_out_bias", attention)
        return attention, output, f.flag("mlp_bias")

    def hf_mlp(self, f: Fields) -> Mlp:
        kind = activation(f, f.text(self.act_field, self.default_act))
        return Mlp(f.integer("intermediate_size"), kind, bias=self.hf_biases(f)[2])

    def hf_rotaries(self, f: Fields) -> tuple[Rotary, ...]:
        return (self.hf_rotary(f),)

    def hf_rotary(self, f: Fields, **options: Any) -> Rotary:
        """One rotary table; ``options`` are those of :func:`rope.from_hf`."""
        head_dim = self.head_dim(f)
        defaults = {"theta": self.default_theta, "share": self.default_share}
        table = rope.from_hf(f, head_dim, **defaults | options)
        if table.dim != head_dim and not self.rotates_part and f(_ROTATED) is None:
            raise CheckpointError(
                f"{f.where}: partial_rotary_factor is {table.dim / head_dim:.3g}, which "
                f"transformers' {self.hf_class} does not read and other programs do; it changes "
                "what the model computes and is not supported"
            )
        return table

    def finish(self, f: Fields, config: ModelConfig) -> ModelConfig:
        """Whatever a family has beside Llama's fields."""
        return config

    # Writing config.json.

    def write_hf(self, c: ModelConfig) -> dict[str, Any]:
        """config.json as transformers reads it, without token ids."""
        first = next(layer for layer in c.stored_layers if layer.attention is not None)
        a = first.attention
        assert a is not None
        sizes = [layer.size for layer in c.stored_layers]
        data: dict[str, Any] = {
            "architectures": [self.hf_class],
            "model_type": self.model_types[0],
            "torch_dtype": "float32",
            "vocab_size": c.vocab_size,
            "hidden_size": c.hidden_size,
            "intermediate_size": c.intermediate_size,
            "num_hidden_layers": c.num_hidden_layers,
            "num_attention_heads": max(size.num_attention_heads for size in sizes),
            "num_key_value_heads": max(size.num_key_value_heads for size in sizes),
            "head_dim": a.head_dim,
            "max_position_embeddings": c.max_position_embeddings,
            self.eps_field: c.norm_eps,
            "tie_word_embeddings": c.tie_word_embeddings,
            "attention_bias": a.bias,
            "mlp_bias": first.mlp.bias,
            self.act_field: _ACTIVATION_NAMES[first.mlp.activation],
        }
        if c.rotaries:
            table = c.rotaries[0]
            data["rope_theta"] = table.theta
            data |= self._written_share(table.dim, a.head_dim)
            if (scaling := rope.declared(table, c.max_position_embeddings)) is not None:
                data["rope_scaling"] = scaling
                original = scaling.get("original_max_position_embeddings")
                if original is not None and scaling.get("rope_type") == "longrope":
                    data["original_max_position_embeddings"] = original
        if a.output_bias != a.bias:
            data["attention_out_bias"] = a.output_bias
        data |= self.more_fields(c)
        if c.rotaries and not c.causal:
            data["is_causal"] = False
        if c.layer_sharing:
            data["layer_sharing"] = True
        if not c.is_uniform:  # no field of transformers' says it; only we read this one
            data["layer_sizes"] = [size._asdict() for size in sizes]
        return data

    def _written_share(self, dim: int, head_dim: int) -> dict[str, Any]:
        if not self.rotates_part:
            return {} if dim == head_dim else {_ROTATED: dim}
        share = dim / head_dim
        return {"partial_rotary_factor": share} if min(share, self.default_share) < 1 else {}

    def more_fields(self, c: ModelConfig) -> dict[str, Any]:
        """What a family writes beside Llama's fields, or in their place."""
        return {}

    # Reading GGUF.

    def read_gguf(
        self, f: Fields, tensors: Collection[str], vector: Callable[[str], Array | None]
    ) -> ModelConfig:
        """The configuration of a GGUF file.

        f: its metadata below the architecture's prefix. tensors: the names of its tensors.
        vector: reads one of its vectors, None where there is none.
        """
        translated = self.gguf_fields(f, tensors)
        if not f.flag("attention.causal", True) and self.causal_in_gguf:
            raise CheckpointError(
                f"{f.where}: attention.causal is false, so every token sees those after it; BERT "
                "alone is supported so"
            )
        freqs = vector("rope_freqs.weight")
        short, long = (vector(f"rope_factors_{kind}.weight") for kind in ("short", "long"))
        if freqs is not None:
            short = long = freqs
        if short is not None and long is not None:
            scaling: dict[str, Any] = {
                "rope_type": "longrope",
                "short_factor": [float(v) for v in short],
                "long_factor": [float(v) for v in long],
            }
            original = f("rope.scaling.original_context_length")
            if freqs is not None or original is None:
                scaling |= {"factor": 1.0, "attention_factor": 1.0}
            else:
                scaling["original_max_position_embeddings"] = original
            if (factor := f("rope.scaling.attn_factor")) is not None:
                scaling["attention_factor"] = factor
            translated["rope_scaling"] = scaling
            _same_size(f, translated[_ROTATED], short, long)
        elif f.number("rope.scaling.attn_factor", 1.0) != 1:
            raise CheckpointError(
                f"{f.where}: rope.scaling.attn_factor is {f('rope.scaling.attn_factor')!r} without "
                "factors of LongRoPE, which is not supported"
            )
        config = self.read_hf(Fields(translated, f.where))
        return self.finish_gguf(f, config, tensors)

    def gguf_fields(self, f: Fields, tensors: Collection[str]) -> dict[str, Any]:
        """The file's metadata as the fields of a config.json."""
        layers = f.integer("block_count")
        if layers > MAX_LAYERS:
            raise CheckpointError(f"{f.where}: {layers} layers, at most {MAX_LAYERS}")
        heads = f.per_layer("attention.head_count", layers)
        kv_heads = f.per_layer("attention.head_count_kv", layers, heads[0])
        widths = f.per_layer("feed_forward_length", layers)
        hidden = f.integer("embedding_length")
        head = f.whole(heads[0], "attention.head_count")
        head_dim = f.integer("attention.key_length", hidden // head or 1)
        tokens = f.data.get("tokenizer.ggml.tokens")
        vocab = f("vocab_size") or (len(tokens) if isinstance(tokens, list) else None)
        data: dict[str, Any] = {
            "model_type": self.model_types[0],
            "vocab_size": vocab,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": head,
            "num_key_value_heads": kv_heads[0],
            "intermediate_size": widths[0],
            "head_dim": head_dim,
            "max_position_embeddings": f.integer("context_length"),
            self.eps_field: f(
                "attention.layer_norm_rms_epsilon", f("attention.layer_norm_epsilon", 1e-5)
            ),
            "rope_theta": f.number("rope.freq_base", 10000.0),
            "tie_word_embeddings": "output.weight" not in tensors,
            "attention_bias": "blk.0.attn_q.bias" in tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        }
        if len({*zip(heads, kv_heads, widths, strict=True)}) > 1:
            data["layer_sizes"] = [
                LayerSize(*size)._asdict() for size in zip(heads, kv_heads, widths, strict=True)
            ]
            data |= {
                "num_attention_heads": max(heads),
                "num_key_value_heads": max(kv_heads),
                "intermediate_size": max(widths),
            }
        data[_ROTATED] = f.integer("rope.dimension_count", head_dim)
        data |= _gguf_scaling(f)
        return data

    def finish_gguf(self, f: Fields, config: ModelConfig, tensors: Collection[str]) -> ModelConfig:
        """Corrections that only a GGUF file needs; by default biases as its tensors say."""

        def biased(index: int, part: str) -> bool:
            return self.gguf.stored(f"model.layers.{index}.{part}.bias") in tensors

        layers = []
        for index, layer in enumerate(config.stored_layers):
            a = layer.attention
            if a is not None:
                qkv, output = (biased(index, f"self_attn.{p}_proj") for p in ("q", "o"))
                layer = replace(layer, mixer=replace(a, bias=qkv, output_bias=output))
            mlp = replace(layer.mlp, bias=biased(index, "mlp.up_proj"))
            layers.append(replace(layer, mlp=mlp))
        return replace(config, stored_layers=tuple(layers))


def _same_size(f: Fields, rotated: int, *factors: Array) -> None:
    """Refuse factors of RoPE that are not one for each pair of dimensions."""
    for each in factors:
        if len(each) * 2 != rotated:
            raise CheckpointError(
                f"{f.where}: {len(each)} factors of RoPE in its tensors, expected "
                f"{rotated // 2}, one for two of {rotated} dimensions"
            )


def _gguf_scaling(f: Fields) -> dict[str, Any]:
    """GGUF's keys of RoPE scaling in Hugging Face's form; a factor without a type is linear."""
    kind = f("rope.scaling.type")
    factor = f("rope.scaling.factor") or f("rope.scale_linear")
    if kind in (None, "none") and (kind == "none" or factor in (None, 0, 1)):
        return {}
    scaling: dict[str, Any] = {"rope_type": kind or "linear", "factor": factor}
    if kind == "longrope":  # its tables are tensors, which take this one's place
        return {"rope_scaling": {"rope_type": kind}}
    original = f("rope.scaling.original_context_length")
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    if kind == "yarn":
        for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if (value := f(f"rope.scaling.{theirs}")) is not None:
                scaling[ours] = value
        if over := f("rope.scaling.yarn_log_multiplier"):
            scaling |= {"mscale": 1.0, "mscale_all_dim": over}
    return {"rope_scaling": scaling}


def _with_layer_sizes(config: ModelConfig, f: Fields) -> ModelConfig:
    """Our own field of config.json: a list of objects of LayerSize's fields."""
    data = f("layer_sizes")
    if data is None:
        return config
    try:
        sizes = [LayerSize(**size) for size in data]
    except TypeError:
        sizes = []
    if not sizes or any(not isinstance(part, int) for size in sizes for part in size):
        raise CheckpointError(
            f"{f.where}: layer_sizes is not a list of objects with the integers "
            + ", ".join(LayerSize._fields)
        )
    if len(sizes) != config.num_hidden_layers:
        raise CheckpointError(
            f"{f.where}: {len(sizes)} layer sizes, expected one for each of "
            f"{config.num_hidden_layers} layers"
        )
    largest = LayerSize(*map(max, *(layer.size for layer in config.stored_layers)))
    if any(part > most for size in sizes for part, most in zip(size, largest, strict=True)):
        raise CheckpointError(f"{f.where}: a layer size is larger than {tuple(largest)}")
    return config.with_sizes(sizes)
