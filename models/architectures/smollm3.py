"""SmolLM3: Llama's block, with no positions in every fourth layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pocketslm.errors import CheckpointError
from pocketslm.models.architectures.base import FULL, SLIDING, Architecture, gguf_map
from pocketslm.models.architectures.fields import Fields, layer_types
from pocketslm.models.architectures.llama import QK
from pocketslm.models.config import Layer, ModelConfig


@dataclass(frozen=True)
class SmolLM3(Architecture):
    tied_by_default: ClassVar[bool] = True
    default_theta: ClassVar[float] = 2e6

    def hf_layers(self, f: Fields, count: int) -> list[Layer]:
        """``no_rope_layers`` has a 1 for each layer with positions, a 0 for each without."""
        every = f.integer("no_rope_layer_interval", 4)
        rotated = f("no_rope_layers")
        if rotated is None:
            rotated = [int((index + 1) % every != 0) for index in range(count)]
        whole = isinstance(rotated, list) and len(rotated) >= count
        if not whole or any(one not in (0, 1) for one in rotated):
            raise CheckpointError(f"{f.where}: no_rope_layers is not a list of {count} of 0 and 1")
        attention, mlp = self.hf_attention(f), self.hf_mlp(f)
        used, window = f.flag("use_sliding_window"), f("sliding_window")
        window = window if used else None
        pattern = [FULL if has or window is None else SLIDING for has in rotated[:count]]
        kinds = layer_types(f, count, pattern, (SLIDING, FULL))
        mixers = [
            replace(
                attention,
                rotary=attention.rotary if has else None,
                window=window if kind == SLIDING else None,
            )
            for has, kind in zip(rotated, kinds, strict=False)
        ]
        return [Layer(mixer, mlp) for mixer in mixers]

    def more_fields(self, c: ModelConfig) -> dict[str, Any]:
        attentions = c.attentions[:: c.repeats]
        window = next((a.window for a in attentions if a.window is not None), None)
        return {
            "no_rope_layers": [int(a.rotary is not None) for a in attentions],
            "layer_types": [FULL if a.window is None else SLIDING for a in attentions],
            "use_sliding_window": window is not None,
            "sliding_window": window,
        }


ARCHITECTURES = [
    SmolLM3("smollm3", "SmolLM3ForCausalLM", ("smollm3",), ("smollm3",), gguf=gguf_map(pairs=QK))
]
