"""What decides the shape and the arithmetic of a model: a configuration with layers in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, get_args

from pocketslm.errors import CheckpointError, UsageError

Activation = Literal["silu", "gelu_tanh", "gelu", "relu", "relu2"]
NormKind = Literal["rms", "layer"]
# Where a layer's norms stand. pre: before attention and before the MLP. post: after each. both:
# before and after each. parallel: attention and MLP read the layer's input at once, through one
# norm; parallel2: through a norm each. last: after each residual sum (BERT).
Placement = Literal["pre", "post", "both", "parallel", "parallel2", "last"]
PoolingKind = Literal["mean", "cls", "last"]
MAX_LAYERS = 1024
_MAX_SIZE = 1 << 24  # of any width, far above every model that this project serves
_MAX_POSITIONS = 1 << 24
PREFILL_BATCH = 256  # tokens that the native engine takes at a time, beside a window


class LayerSize(NamedTuple):
    """The widths in which a pruned layer may differ from its neighbours."""

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int


@dataclass(frozen=True)
class Rotary:
    """One table of rotary position embeddings; the first ``dim`` of a head are rotated.

    theta: the base of the frequencies ``theta ** (-2i / dim)``.
    divisors: [dim / 2], divide the frequencies (any way of stretching a context); None: ones.
    long_divisors: [dim / 2], take their place where the context is longer than ``original``
    (LongRoPE).
    factor: multiplies cosines and sines.
    declared: Hugging Face's rope parameters, as JSON, so that they can be written back.
    """

    dim: int
    theta: float = 10000.0
    divisors: tuple[float, ...] | None = None
    long_divisors: tuple[float, ...] | None = None
    original: int | None = None
    factor: float = 1.0
    declared: str | None = None

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise CheckpointError(f"config: {self.dim} rotated dimensions, RoPE needs pairs")
        _positive("rope_theta", self.theta)
        _positive("the factor of rotary tables", self.factor)
        for divisors in (self.divisors, self.long_divisors):
            if divisors is not None and len(divisors) != self.dim // 2:
                raise CheckpointError(
                    f"config: {len(divisors)} rotary divisors, expected {self.dim // 2}"
                )
            for value in divisors or ():
                _positive("a rotary divisor", value)

    def frequencies(self, context: int) -> list[float]:
        """Radians a position [dim / 2], for sequences of up to ``context`` tokens."""
        plain = [self.theta ** (-2.0 * i / self.dim) for i in range(self.dim // 2)]
        divisors = self.divisors
        if self.long_divisors is not None and context > (self.original or 0):
            divisors = self.long_divisors
        if divisors is None:
            return plain
        return [f / d for f, d in zip(plain, divisors, strict=True)]


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention of one layer.

    scale: multiplies the scores. rotary: which of the model's rotary tables; None: no positions.
    window: how many positions a token sees, its own among them; None: all before it.
    softcap: scores become ``cap * tanh(score / cap)``. bias: of Q, K and V.
    qk_norm: RMSNorm of Q and K: of each head, or of all heads together (``full``).
    norm_after_rope: Q and K are normalized after their rotation, not before.
    temperature: far queries are made larger: times ``1 + temperature * log(1 + position // step)``,
    with ``temperature_step`` as the step (Ministral 3); 0: they are not.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rotary: int | None = 0
    window: int | None = None
    softcap: float | None = None
    bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["head", "full"] | None = None
    norm_after_rope: bool = False
    temperature: float = 0.0
    temperature_step: int = 0

    def __post_init__(self) -> None:
        _size("num_attention_heads", self.heads)
        _size("num_key_value_heads", self.kv_heads)
        _size("head_dim", self.head_dim)
        if self.heads % self.kv_heads:
            raise CheckpointError(
                f"config: {self.heads} attention heads cannot be shared by {self.kv_heads} "
                "key-value heads, expected a multiple"
            )
        if self.window is not None:
            _size("sliding_window", self.window)
        if self.temperature:
            _positive("the temperature of queries", self.temperature)
            _size("the step of the queries' temperature", self.temperature_step)

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class ShortConv:
    """A gated causal convolution over the last ``taps`` tokens, channel by channel (LFM2)."""

    taps: int
    bias: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.taps, int) or not 2 <= self.taps <= 16:
            raise CheckpointError(f"config: a convolution over {self.taps!r} tokens, at most 16")


@dataclass(frozen=True)
class Mlp:
    """width: of the inside. gated: ``act(gate(x)) * up(x)``, else ``act(up(x))``."""

    width: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        _size("intermediate_size", self.width)
        if self.activation not in get_args(Activation):
            raise CheckpointError(
                f"config: hidden_act {self.activation!r} is not supported, expected one of "
                + ", ".join(get_args(Activation))
            )


@dataclass(frozen=True)
class Layer:
    mixer: Attention | ShortConv
    mlp: Mlp
    norms: Placement = "pre"

    @property
    def attention(self) -> Attention | None:
        return self.mixer if isinstance(self.mixer, Attention) else None

    @property
    def size(self) -> LayerSize:
        """The widths that pruning changes; a layer without attention has no heads."""
        a = self.attention
        return LayerSize(a.heads if a else 0, a.kv_heads if a else 0, self.mlp.width)

    def resized(self, size: LayerSize) -> Layer:
        """The same layer with other widths."""
        mixer = self.mixer
        if isinstance(mixer, Attention):
            mixer = replace(
                mixer, heads=size.num_attention_heads, kv_heads=size.num_key_value_heads
            )
        return replace(self, mixer=mixer, mlp=replace(self.mlp, width=size.intermediate_size))


@dataclass(frozen=True)
class Pooling:
    """How the hidden states of a text's tokens become its embedding.

    kind: their mean, or the state of the first (``cls``) or of the last token.
    normalize: the embedding is divided by its length. lowercase: the text is made lower case first.
    max_tokens: of a text, with the tokens that the tokenizer adds; None: the context.
    prompts: what is put before texts, by what they are, such as ``query`` and ``passage``.
    """

    kind: PoolingKind
    normalize: bool = False
    lowercase: bool = False
    max_tokens: int | None = None
    prompts: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.kind not in get_args(PoolingKind):
            raise CheckpointError(
                f"config: pooling {self.kind!r} is not supported, expected one of "
                + ", ".join(get_args(PoolingKind))
            )
        if self.max_tokens is not None:
            _size("the most tokens of a text", self.max_tokens)
        if not isinstance(self.prompts, Mapping) or not all(
            isinstance(part, str) for pair in self.prompts.items() for part in pair
        ):
            raise CheckpointError("config: prompts of a pooling are not texts by name")

    def prompt(self, kind: str) -> str:
        """What is put before a text of some kind; UsageError, with the kinds, for another one."""
        if kind not in self.prompts:
            known = ", ".join(self.prompts) or "none"
            raise UsageError(f"the model has no prompt {kind[:40]!r}, expected one of: {known}")
        return self.prompts[kind]


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shape and arithmetic of a checkpoint.

    stored_layers: each layer that has weights.
    layer_sharing: each of them runs twice in succession, with a cache for each time
    (MobileLLM-LS, https://arxiv.org/abs/2402.14905).
    mlp_sharing: all layers have one MLP, stored once (MobiLlama, https://arxiv.org/abs/2402.16840).
    rotaries: the rotary tables that layers refer to.
    embedding_scale, residual_scale, logit_scale: multiply the embedding, what a layer adds to the
    residual stream, and the logits. logit_softcap: logits become ``cap * tanh(logit / cap)``.
    learned_positions: rows of a table that is added to the embedding; 0: there is none.
    embedding_norm: the embedding is normalized. final_norm: the last layer's output is.
    head: whether there is an output head; a model without one gives its hidden states.
    causal: a token sees those before it alone.
    pooling: how the hidden states of a model without a head become embeddings, where that is known.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    stored_layers: tuple[Layer, ...]
    rotaries: tuple[Rotary, ...] = ()
    norm: NormKind = "rms"
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    head_bias: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    learned_positions: int = 0
    embedding_norm: bool = False
    final_norm: bool = True
    head: bool = True
    causal: bool = True
    layer_sharing: bool = False
    mlp_sharing: bool = False
    pooling: Pooling | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size"):
            _size(name, getattr(self, name))
        positions = self.max_position_embeddings
        if not _is_int(positions) or not 0 < positions <= _MAX_POSITIONS:
            raise CheckpointError(
                f"config: max_position_embeddings is {positions!r}, expected 1 to {_MAX_POSITIONS}"
            )
        if not 0 < len(self.stored_layers) <= MAX_LAYERS:
            raise CheckpointError(
                f"config: {len(self.stored_layers)} layers, expected 1 to {MAX_LAYERS}"
            )
        if not isinstance(self.norm_eps, int | float) or not 0 <= self.norm_eps < 1:
            raise CheckpointError(f"config: the norms' epsilon is {self.norm_eps!r}, expected < 1")
        for name in ("embedding_scale", "residual_scale", "logit_scale"):
            _positive(name, getattr(self, name))
        if self.mlp_sharing and len({layer.mlp for layer in self.stored_layers}) > 1:
            raise CheckpointError("config: one MLP for all layers has one width")
        if not self.causal and any(a.window is not None for a in self.attentions):
            raise CheckpointError("config: windows need tokens that see those before them alone")
        if self.head and self.pooling is not None:
            raise CheckpointError("config: a model with an output head has no pooling")
        for layer in self.stored_layers:
            a = layer.attention
            if a is None or a.rotary is None:
                continue
            if not 0 <= a.rotary < len(self.rotaries):
                raise CheckpointError(f"config: a layer reads rotary table {a.rotary}")
            if self.rotaries[a.rotary].dim > a.head_dim:
                raise CheckpointError(
                    f"config: {self.rotaries[a.rotary].dim} dimensions of a head of {a.head_dim} "
                    "are rotated"
                )

    def need_head(self, what: str) -> None:
        """UsageError where ``what`` needs a model that generates text and this one does not."""
        if not self.head:
            raise UsageError(
                f"{what} needs a model that generates text, this one gives embeddings; "
                "see `pocketslm embed`"
            )

    def need_own_layers(self, what: str) -> None:
        """UsageError where ``what`` changes layers one by one and these share an MLP."""
        if self.mlp_sharing:
            raise UsageError(
                f"{what} changes one layer after the other, and this model's layers share one MLP; "
                "methods without a calibration text (rtn, search, hqq) round it once"
            )

    @property
    def repeats(self) -> int:
        """How often in succession a stored layer runs."""
        return 2 if self.layer_sharing else 1

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Each layer that runs, and so has a state of its own: a shared one counts twice."""
        return tuple(layer for layer in self.stored_layers for _ in range(self.repeats))

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """The attention of each layer that runs and has one."""
        return tuple(layer.attention for layer in self.layers if layer.attention is not None)

    @property
    def forgets(self) -> bool:
        """Whether a layer keeps less than every token: a window, a convolution."""
        return any(layer.attention is None or layer.attention.window for layer in self.layers)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.stored_layers)

    @property
    def intermediate_size(self) -> int:
        """The widest MLP."""
        return max(layer.mlp.width for layer in self.stored_layers)

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have the same widths."""
        return len({layer.size for layer in self.stored_layers}) == 1

    def with_sizes(self, sizes: Sequence[LayerSize]) -> ModelConfig:
        """The same layers with other widths, one entry a stored layer."""
        pairs = zip(self.stored_layers, sizes, strict=True)
        return replace(self, stored_layers=tuple(layer.resized(size) for layer, size in pairs))

    def state_bytes(
        self, tokens: int, bytes_per_value: float, *, scale_bytes: float = 0, batch: int = 0
    ) -> int:
        """Bytes of the states of a session that holds ``tokens`` tokens.

        bytes_per_value: 4 for fp32, 2 for fp16, 1 for int8. scale_bytes: beside each key and value
        of a head. batch: tokens that a windowed layer takes beside its window; 0: windows are not
        used, each layer keeps all tokens.
        """
        total = 0.0
        for layer in self.layers:
            if (a := layer.attention) is None:
                assert isinstance(layer.mixer, ShortConv)
                total += (layer.mixer.taps - 1) * self.hidden_size * 4
                continue
            kept = tokens
            if batch and a.window is not None:
                kept = min(tokens, -(-(a.window + batch) // 64) * 64)
            total += 2 * kept * (a.kv_width * bytes_per_value + a.kv_heads * scale_bytes)
        return round(total)

    def to_dict(self) -> dict[str, Any]:
        """As JSON; what has its default value is left out."""
        data = _without_defaults(self)
        data["stored_layers"] = [
            {
                ("attention" if layer.attention else "short_conv"): _without_defaults(layer.mixer),
                "mlp": _without_defaults(layer.mlp),
            }
            | ({} if layer.norms == "pre" else {"norms": layer.norms})
            for layer in self.stored_layers
        ]
        data["rotaries"] = [_without_defaults(rotary) for rotary in self.rotaries]
        if self.pooling is not None:
            data["pooling"] = _without_defaults(self.pooling)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """The inverse of :meth:`to_dict`; also reads the flat form of earlier bundles.

        Raises CheckpointError where it is neither.
        """
        try:
            if "stored_layers" not in data:
                return uniform(**data)
            values = dict(data)
            values["stored_layers"] = tuple(_layer(part) for part in data["stored_layers"])
            values["rotaries"] = tuple(_rotary(part) for part in data.get("rotaries", ()))
            if "pooling" in data:
                values["pooling"] = Pooling(**data["pooling"])
            return cls(**values)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"not an architecture's description: {' '.join(str(error).split())}"
            ) from None


def uniform(
    *,
    architecture: str,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    max_position_embeddings: int,
    rms_norm_eps: float = 1e-5,
    rope_theta: float = 10000.0,
    rope_divisors: Sequence[float] | None = None,
    tie_word_embeddings: bool = False,
    attention_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    hidden_act: Activation = "silu",
    layer_sizes: Sequence[Sequence[int]] | None = None,
    layer_sharing: bool = False,
) -> ModelConfig:
    """A model of Llama's block, from the fields that Hugging Face's LlamaConfig has.

    attention_bias: of Q, K and V; output_bias: of the attention's output. layer_sizes: the widths
    of each layer, where they differ.
    """
    count = _count(num_hidden_layers)
    layer = Layer(
        Attention(
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            scale=_size("head_dim", head_dim) ** -0.5,
            bias=attention_bias,
            output_bias=output_bias,
        ),
        Mlp(intermediate_size, hidden_act, bias=mlp_bias),
    )
    divisors = None if rope_divisors is None else tuple(rope_divisors)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        max_position_embeddings=max_position_embeddings,
        stored_layers=(layer,) * count,
        rotaries=(Rotary(head_dim, rope_theta, divisors),),
        norm_eps=rms_norm_eps,
        tie_word_embeddings=tie_word_embeddings,
        layer_sharing=layer_sharing,
    )
    if layer_sizes is None:
        return config
    return config.with_sizes([LayerSize(*size) for size in layer_sizes])


def _count(layers: Any) -> int:
    """A number of layers, checked before anything of that many is made."""
    if not _is_int(layers) or not 0 < layers <= MAX_LAYERS:
        raise CheckpointError(
            f"config: num_hidden_layers is {layers!r}, expected 1 to {MAX_LAYERS}"
        )
    return int(layers)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _size(name: str, value: Any) -> int:
    if not _is_int(value) or not 0 < value <= _MAX_SIZE:
        raise CheckpointError(f"config: {name} is {value!r}, expected an integer, 1 to {_MAX_SIZE}")
    return int(value)


def _positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise CheckpointError(f"config: {name} is {value!r}, expected a positive number")


def _without_defaults(value: Any) -> dict[str, Any]:
    kept = {}
    for entry in fields(value):
        part = getattr(value, entry.name)
        none = entry.default if entry.default_factory is MISSING else entry.default_factory()
        if part != none:
            kept[entry.name] = part
    return kept


def _layer(data: Mapping[str, Any]) -> Layer:
    mixer: Attention | ShortConv
    mixer = (
        Attention(**data["attention"]) if "attention" in data else ShortConv(**data["short_conv"])
    )
    return Layer(mixer, Mlp(**data["mlp"]), data.get("norms", "pre"))


def _rotary(data: Mapping[str, Any]) -> Rotary:
    values = dict(data)
    for name in ("divisors", "long_divisors"):
        if values.get(name) is not None:
            values[name] = tuple(values[name])
    return Rotary(**values)
