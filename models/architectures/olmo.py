"""OLMo 2 and 3, EXAONE 4: norms after each block alone, Q and K normalized."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from pocketslm.models.architectures import rope
from pocketslm.models.architectures.base import (
    ATTENTION,
    BUFFERS,
    FULL,
    MLP,
    QK_NORMS,
    SLIDING,
    TOP,
    Architecture,
    named,
    written_rotaries,
    written_windows,
)
from pocketslm.models.architectures.fields import Fields, layer_types, need_pattern
from pocketslm.models.architectures.weights import WeightMap
from pocketslm.models.config import Attention, Layer, ModelConfig, Rotary


@dataclass(frozen=True)
class Olmo2(Architecture):
    hf: WeightMap = field(
        default=WeightMap(
            TOP,
            "model.layers.{}.",
            {
                "attention_post_norm": "post_attention_layernorm",
                "mlp_post_norm": "post_feedforward_layernorm",
            }
            | named(*ATTENTION, *QK_NORMS, *MLP),
            ignored=BUFFERS,
        )
    )
    qk_norm: ClassVar[Literal["head", "full"]] = "full"
    default_eps: ClassVar[float] = 1e-5

    def hf_layers(self, f: Fields, count: int) -> list[Layer]:
        return [Layer(self.hf_attention(f), self.hf_mlp(f), "post")] * count

    def hf_attention(self, f: Fields) -> Attention:
        return replace(super().hf_attention(f), qk_norm=self.qk_norm)


@dataclass(frozen=True)
class Windowed(Olmo2):
    """Layers with a window beside layers that see everything."""

    reads_pattern: ClassVar[bool] = False

    def hf_layers(self, f: Fields, count: int) -> list[Layer]:
        window, every = f.stated("sliding_window", 4096), f("sliding_window_pattern")
        if isinstance(every, str):
            every = len(every)
        else:  # 0 where there is no window
            every = f.integer("sliding_window_pattern", 4, least=0)
        every = every or 4
        if not self.reads_pattern:
            need_pattern(f, every, 4)
        pattern = [FULL if (i + 1) % every == 0 else SLIDING for i in range(count)]
        pattern = [FULL] * count if window is None else pattern
        kinds = layer_types(f, count, pattern, (SLIDING, FULL))
        full, mlp = self.hf_attention(f), self.hf_mlp(f)
        if window is None:
            kinds = [FULL] * count
        mixers = {FULL: full if window is None else self.beside_windows(full)}
        mixers[SLIDING] = self.sliding(full, window)
        return [Layer(mixers[kind], mlp, "post") for kind in kinds]

    def beside_windows(self, full: Attention) -> Attention:
        return full

    def sliding(self, full: Attention, window: int | None) -> Attention:
        return replace(full, window=window)

    def more_fields(self, c: ModelConfig) -> dict[str, Any]:
        return written_windows(c)


@dataclass(frozen=True)
class Olmo3(Windowed):
    """The rotary table is stretched where a layer sees everything."""

    default_theta: ClassVar[float] = 5e5

    def sliding(self, full: Attention, window: int | None) -> Attention:
        return replace(full, window=window, rotary=1)

    def hf_rotaries(self, f: Fields) -> tuple[Rotary, ...]:
        full = self.hf_rotary(f)
        if not rope.is_nested(f.table("rope_parameters")):
            return full, Rotary(full.dim, full.theta)
        return full, self.hf_rotary(rope.of_kind(f, SLIDING))

    def more_fields(self, c: ModelConfig) -> dict[str, Any]:
        full, local = c.rotaries
        data = super().more_fields(c)
        if local == Rotary(full.dim, full.theta):
            return data
        return data | {"rope_parameters": written_rotaries(c), "rope_scaling": None}


@dataclass(frozen=True)
class Exaone4(Windowed):
    """Beside windows, layers that see everything have no positions."""

    qk_norm: ClassVar[Literal["head", "full"]] = "head"
    reads_pattern: ClassVar[bool] = True

    def beside_windows(self, full: Attention) -> Attention:
        return replace(full, rotary=None)

    def gguf_fields(self, f: Fields, tensors: Collection[str]) -> dict[str, Any]:
        return super().gguf_fields(f, tensors) | {"sliding_window": None}


ARCHITECTURES = [
    Olmo2("olmo2", "Olmo2ForCausalLM", ("olmo2",), ("olmo2",)),
    Olmo3("olmo3", "Olmo3ForCausalLM", ("olmo3",)),
    Exaone4("exaone4", "Exaone4ForCausalLM", ("exaone4",), ("exaone4",)),
]
