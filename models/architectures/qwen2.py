"""Qwen2 and Qwen2.5: Llama's block with biases on Q, K and V."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pocketslm.models.architectures.base import FULL, SLIDING, Architecture, written_windows
from pocketslm.models.architectures.fields import Fields, layer_types
from pocketslm.models.config import Layer, ModelConfig


@dataclass(frozen=True)
class Qwen2(Architecture):
    def hf_biases(self, f: Fields) -> tuple[bool, bool, bool]:
        f("attention_bias")  # written by some, read by nobody: the biases are always there
        return True, False, False

    def hf_layers(self, f: Fields, count: int) -> list[Layer]:
        """With ``use_sliding_window``, layers from ``max_window_layers`` on have a window."""
        full, mlp = self.hf_attention(f), self.hf_mlp(f)
        window, first = (
            f.stated("sliding_window", 4096),
            f.integer("max_window_layers", 28, least=0),
        )
        pattern = [SLIDING if index >= first else FULL for index in range(count)]
        kinds = layer_types(f, count, pattern, (SLIDING, FULL))
        if not f.flag("use_sliding_window") or window is None:
            return [Layer(full, mlp)] * count
        mixers = {FULL: full, SLIDING: replace(full, window=window)}
        return [Layer(mixers[kind], mlp) for kind in kinds]

    def more_fields(self, c: ModelConfig) -> dict[str, Any]:
        data = written_windows(c) | {"attention_out_bias": None}
        if data["sliding_window"] is None:
            return data | {"use_sliding_window": False, "layer_types": None}
        return data | {"use_sliding_window": True, "max_window_layers": 0}


ARCHITECTURES = [Qwen2("qwen2", "Qwen2ForCausalLM", ("qwen2",), ("qwen2",))]
