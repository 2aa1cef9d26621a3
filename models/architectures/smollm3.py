"""SmolLM3: Llama's block, with no positions in every fourth layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pocketslm.errors import CheckpointError
from pocketslm.models.architectures.base import Architecture, gguf_map
from pocketslm.models.architectures.fields import Fields
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
        window = f("sliding_window") if f.flag("use_sliding_window") else None
        f("layer_types")  # follows from the two above
        free = replace(attention, rotary=None, window=window)
        return [Layer(attention if has else free, mlp) for has in rotated[:count]]

    def more_fields(self, c: ModelConfig) -> dict[str, Any]:
        attentions = c.attentions[:: c.repeats]
        window = next((a.window for a in attentions if a.window is not None), None)
        return {
            "no_rope_layers": [int(a.rotary is not None) for a in attentions],
            "use_sliding_window": window is not None,
            "sliding_window": window,
        }


ARCHITECTURES = [
    SmolLM3("smollm3", "SmolLM3ForCausalLM", ("smollm3",), ("smollm3",), gguf=gguf_map(pairs=QK))
]
