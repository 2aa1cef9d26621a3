"""Which layers a model can do without.

- SLEB (Song et al. 2024, https://arxiv.org/abs/2402.09025): one layer after the other goes, each
  time the one whose absence costs the already pruned model the least loss on a text;
- block influence (ShortGPT, Men et al. 2024, https://arxiv.org/abs/2403.03853): those go at once
  that turn their input the least, ``1 - cos(input, output)``;
- the last ones, as the baseline.

Or every second layer gives way to the one before it, which runs twice (MobileLLM-LS, Liu et al.
2024, https://arxiv.org/abs/2402.14905): half of the weights, all of the computation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketslm.errors import ExportError
from pocketslm.export.prune.pruned import Pruned
from pocketslm.models.checkpoint import Checkpoint
from pocketslm.models.tensors import Weight

_LAYERS = "model.layers."


def last(count: int, remove: int) -> list[int]:
    """The last ``remove`` of ``count`` layers."""
    return list(range(count - remove, count))


def least_influence(influence: Sequence[float], remove: int) -> list[int]:
    """The layers of least block influence; ties go to the earlier one."""
    ranked = sorted(range(len(influence)), key=lambda layer: (influence[layer], layer))
    return sorted(ranked[:remove])


@torch.no_grad()
def block_influence(model: Any, ids: Tensor) -> list[float]:
    """``1 - E cos(x_in, x_out)`` of each layer over windows of tokens ``ids`` [B, S]."""
    x = model.embed(ids)
    found = []
    for index in range(len(model.model.layers)):
        out = model.run_layer(index, x)
        found.append(float(1 - F.cosine_similarity(x, out, dim=-1).mean()))
        x = out
    return found


@torch.no_grad()
def sleb(
    model: Any, ids: Tensor, remove: int, progress: Callable[[float], None] = lambda fraction: None
) -> list[int]:
    """The layers to remove, first to go first, by the loss on windows of tokens ``ids`` [B, S].

    The first and the last layer stay. Of n alive layers n - 2 are tried each time, from the stored
    input of the layer that is left out. Raises ExportError where more are to go.
    """
    alive = list(range(len(model.model.layers)))
    if remove > len(alive) - 2:
        raise ExportError(f"{remove} layers to remove, at most {len(alive) - 2} of {len(alive)}")
    removed: list[int] = []
    for _ in range(remove):
        inputs = [model.embed(ids)]
        for layer in alive[:-1]:
            inputs.append(model.run_layer(layer, inputs[-1]))
        losses = {}
        for position in range(1, len(alive) - 1):
            x = inputs[position]
            for layer in alive[position + 1 :]:
                x = model.run_layer(layer, x)
            losses[alive[position]] = loss(model, x, ids)
            progress((len(removed) + position / (len(alive) - 2)) / remove)
        removed.append(min(losses, key=lambda layer: (losses[layer], layer)))
        alive.remove(removed[-1])
    return removed


def loss(model: Any, x: Tensor, ids: Tensor) -> float:
    """Mean negative log-likelihood of ``ids`` [B, S] from the last layer's output x [B, S, H]."""
    total = 0.0
    for hidden, window in zip(x, ids, strict=True):  # logits of one window at a time
        logits = model.finish(hidden[None, :-1])[0]
        total += float(F.cross_entropy(logits.float(), window[1:], reduction="sum"))
    return total / (ids.shape[0] * (ids.shape[1] - 1))


class WithoutLayers(Pruned):
    """A checkpoint without the layers ``removed``, those left numbered anew; blocks stay blocks."""

    def __init__(self, whole: Checkpoint, removed: Sequence[int]) -> None:
        count = whole.config.num_hidden_layers
        if not set(removed) < set(range(count)):
            raise ExportError(
                f"layers {sorted(removed)} to remove, expected some of 0..{count - 1}"
            )
        left = [layer for i, layer in enumerate(whole.config.stored_layers) if i not in removed]
        if not any(layer.attention for layer in left):
            raise ExportError(f"layers {sorted(removed)} to remove are all that have attention")
        self.kept = [layer for layer in range(count) if layer not in set(removed)]
        layers = whole.config.stored_layers
        config = replace(whole.config, stored_layers=tuple(layers[i] for i in self.kept))
        super().__init__(whole, config, f"layers {sorted(removed)} of {count} were removed")

    def weight(self, name: str) -> Weight:
        if name.startswith(_LAYERS):
            index, rest = name.removeprefix(_LAYERS).split(".", 1)
            name = f"{_LAYERS}{self.kept[int(index)]}.{rest}"
        return self.whole.weight(name)


class Shared(WithoutLayers):
    """A checkpoint's layers 0, 2, 4, ..., each run twice."""

    def __init__(self, whole: Checkpoint) -> None:
        if whole.config.layer_sharing:
            raise ExportError(f"{whole.path} shares its layers already")
        super().__init__(whole, range(1, whole.config.num_hidden_layers, 2))
        self.config = replace(self.config, layer_sharing=True)
        self.notes = [*whole.notes, f"{len(self.kept)} layers run twice each"]
