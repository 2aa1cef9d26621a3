"""The dimensions of a decoder-only model, read from Hugging Face JSON or GGUF metadata."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from pocketslm.errors import CheckpointError


class LayerSize(NamedTuple):
    """The widths in which a pruned layer may differ from its neighbours."""

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shape and arithmetic of a checkpoint; names as Hugging Face's.

    ``layer_sizes``: one entry a layer where layers differ (see :meth:`with_layer_sizes`), else
    None; ``num_attention_heads``, ``num_key_value_heads`` and ``intermediate_size`` are then the
    largest of any layer.
    ``layer_sharing``: each of the ``num_hidden_layers`` stored layers runs twice in succession,
    with a cache for each time (MobileLLM-LS, https://arxiv.org/abs/2402.14905).
    ``rope_divisors`` [head_dim / 2] divide the rotary frequencies (one form for every way of
    stretching a context: linear, Llama 3's bands, a GGUF's ``rope_freqs.weight``).
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_divisors: tuple[float, ...] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # of Q, K and V
    output_bias: bool = False  # of the attention output
    mlp_bias: bool = False
    hidden_act: str = "silu"
    layer_sizes: tuple[LayerSize, ...] | None = None
    layer_sharing: bool = False

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise CheckpointError(f"config: {name} is {value!r}, expected a positive integer")
        if self.layer_sizes is not None and len(self.layer_sizes) != self.num_hidden_layers:
            raise CheckpointError(
                f"config: {len(self.layer_sizes)} layer sizes, expected one for each of "
                f"{self.num_hidden_layers} layers"
            )
        largest = LayerSize(
            self.num_attention_heads, self.num_key_value_heads, self.intermediate_size
        )
        for size in self.layer_sizes or (largest,):
            if any(not 0 < part <= most for part, most in zip(size, largest, strict=True)):
                raise CheckpointError(f"config: layer size {tuple(size)}, at most {tuple(largest)}")
            if size.num_attention_heads % size.num_key_value_heads:
                raise CheckpointError(
                    f"config: {size.num_attention_heads} attention heads cannot be shared by "
                    f"{size.num_key_value_heads} key-value heads, expected a multiple"
                )
        if self.head_dim % 2:
            raise CheckpointError(f"config: head_dim {self.head_dim} is odd, RoPE needs pairs")
        if self.hidden_act != "silu":
            raise CheckpointError(
                f"config: hidden_act {self.hidden_act!r} is not supported, expected 'silu'"
            )

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token in an fp32 KV cache."""
        return sum(2 * size.num_key_value_heads * self.head_dim * 4 for size in self.layers)

    @property
    def repeats(self) -> int:
        """How often in succession a stored layer runs."""
        return 2 if self.layer_sharing else 1

    @property
    def layers(self) -> tuple[LayerSize, ...]:
        """The widths of each layer that runs, and so has a cache: a shared one counts twice."""
        return tuple(size for size in self.stored_layers for _ in range(self.repeats))

    @property
    def stored_layers(self) -> tuple[LayerSize, ...]:
        """The widths of each layer that has weights."""
        if self.layer_sizes is not None:
            return self.layer_sizes
        size = LayerSize(self.num_attention_heads, self.num_key_value_heads, self.intermediate_size)
        return (size,) * self.num_hidden_layers

    def with_layer_sizes(self, sizes: Sequence[LayerSize]) -> ModelConfig:
        """The same model with other stored layers; their number and largest widths follow."""
        heads, kv_heads, intermediate = (max(widths) for widths in zip(*sizes, strict=True))
        return replace(
            self,
            num_hidden_layers=len(sizes),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            intermediate_size=intermediate,
            layer_sizes=tuple(sizes) if len(set(sizes)) > 1 else None,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """The inverse of :meth:`to_dict`, strict: our own files have no unknown fields."""
        fields = dict(data)
        if fields.get("rope_divisors") is not None:
            fields["rope_divisors"] = tuple(fields["rope_divisors"])
        if fields.get("layer_sizes") is not None:
            fields["layer_sizes"] = tuple(LayerSize(*size) for size in fields["layer_sizes"])
        return cls(**fields)


def config_from_hf(data: Mapping[str, Any], architecture: str) -> ModelConfig:
    """Read a Hugging Face ``config.json``; fields that do not concern us are ignored.

    Raises CheckpointError where a needed field is missing or names something unsupported.
    """

    def need(name: str) -> Any:
        if data.get(name) is None:
            raise CheckpointError(f"config.json has no {name!r}; is this a decoder-only model?")
        return data[name]

    heads = need("num_attention_heads")
    # transformers 5 writes one `rope_parameters` object, 4 wrote `rope_theta` and `rope_scaling`.
    rope = dict(data.get("rope_scaling") or {}) | dict(data.get("rope_parameters") or {})
    hidden = need("hidden_size")
    head_dim = data.get("head_dim") or hidden // heads
    theta = float(rope.get("rope_theta") or data.get("rope_theta") or 10000.0)
    return ModelConfig(
        architecture=architecture,
        vocab_size=need("vocab_size"),
        hidden_size=hidden,
        intermediate_size=need("intermediate_size"),
        num_hidden_layers=need("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=data.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        max_position_embeddings=need("max_position_embeddings"),
        rms_norm_eps=data.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_divisors=_rope_divisors(rope, rope_frequencies(theta, head_dim)),
        # MobileLLM has a name of its own for a tied head.
        tie_word_embeddings=bool(data.get("tie_word_embeddings") or data.get("share_embedding")),
        # Qwen2 has biases on Q, K and V alone, and no field that says so.
        attention_bias=architecture == "qwen2" or bool(data.get("attention_bias", False)),
        output_bias=architecture != "qwen2" and bool(data.get("attention_bias", False)),
        mlp_bias=bool(data.get("mlp_bias", False)),
        hidden_act=data.get("hidden_act", "silu"),
        layer_sizes=_layer_sizes(data.get("layer_sizes")),
        layer_sharing=bool(data.get("layer_sharing")),
    )


def _layer_sizes(data: Any) -> tuple[LayerSize, ...] | None:
    """Our own field of config.json: a list of objects of LayerSize's fields."""
    if data is None:
        return None
    try:
        sizes = tuple(LayerSize(**size) for size in data)
    except TypeError:
        sizes = ()
    if not sizes or any(not isinstance(part, int) for size in sizes for part in size):
        raise CheckpointError(
            "config.json: layer_sizes is not a list of objects with the integers "
            + ", ".join(LayerSize._fields)
        )
    return sizes


def rope_frequencies(theta: float, head_dim: int) -> list[float]:
    """The unscaled rotary frequencies [head_dim / 2], in radians a position."""
    return [theta ** (-2.0 * i / head_dim) for i in range(head_dim // 2)]


def _rope_divisors(rope: Mapping[str, Any], frequencies: list[float]) -> tuple[float, ...] | None:
    """Hugging Face's RoPE scaling parameters as divisors of the frequencies."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise CheckpointError(f"RoPE scaling {kind!r} is not supported, expected linear or llama3")
    try:
        factor = float(rope["factor"])
        if kind == "linear":
            return (factor,) * len(frequencies)
        # Llama 3.1: wavelengths longer than the original context are stretched by `factor`,
        # short ones kept, those between blended (https://arxiv.org/abs/2407.21783).
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        original = float(rope["original_max_position_embeddings"])
    except KeyError as error:
        raise CheckpointError(f"config.json: RoPE scaling {kind!r} has no {error}") from None
    divisors = []
    for frequency in frequencies:
        turns = original * frequency / (2 * math.pi)
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        divisors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return tuple(divisors)


def config_from_gguf(
    meta: Mapping[str, Any],
    architecture: str,
    names: Collection[str],
    rope_divisors: tuple[float, ...] | None = None,
) -> ModelConfig:
    """Read the ``<arch>.*`` keys of GGUF metadata.

    ``names``: the file's tensor names; ``rope_divisors``: its ``rope_freqs.weight``, if any.
    """
    arch = meta["general.architecture"]

    def need(key: str) -> Any:
        try:
            return meta[f"{arch}.{key}"]
        except KeyError:
            raise CheckpointError(f"GGUF metadata has no {arch}.{key}") from None

    heads = need("attention.head_count")
    hidden = need("embedding_length")
    head_dim = meta.get(f"{arch}.attention.key_length", hidden // heads)
    if rope_divisors is None and (kind := meta.get(f"{arch}.rope.scaling.type", "none")) != "none":
        if kind != "linear":
            raise CheckpointError(f"GGUF RoPE scaling {kind!r} is not supported, expected linear")
        rope_divisors = (float(need("rope.scaling.factor")),) * (head_dim // 2)
    return ModelConfig(
        architecture=architecture,
        vocab_size=meta.get(f"{arch}.vocab_size") or len(meta.get("tokenizer.ggml.tokens", ())),
        hidden_size=hidden,
        intermediate_size=need("feed_forward_length"),
        num_hidden_layers=need("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=meta.get(f"{arch}.attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=need("context_length"),
        rms_norm_eps=float(need("attention.layer_norm_rms_epsilon")),
        rope_theta=float(meta.get(f"{arch}.rope.freq_base", 10000.0)),
        rope_divisors=rope_divisors,
        tie_word_embeddings="output.weight" not in names,
        attention_bias="blk.0.attn_q.bias" in names,
        output_bias="blk.0.attn_output.bias" in names,
        mlp_bias="blk.0.ffn_gate.bias" in names,
    )
