"""Minitron's width pruning (Muralidharan et al. 2024, https://arxiv.org/abs/2407.14679).

Importance comes from forward passes alone: the activations that a part makes on a text, averaged
over positions, then the L2 norm over the windows. Parts are whole attention groups (a KV head with
its query heads), neurons of the MLP, and channels of the hidden state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pocketslm.errors import ExportError
from pocketslm.export.prune.pruned import Pruned
from pocketslm.models.checkpoint import Checkpoint
from pocketslm.models.config import LayerSize, ModelConfig
from pocketslm.models.sites import LAYERS, Axis, axes, sites
from pocketslm.models.tensors import QuantTensor, Weight, floats

_INNER: tuple[Axis, ...] = ("queries", "neurons")


@dataclass(frozen=True)
class Widths:
    """A number for each part: its importance, or (bool) whether it stays.

    groups: one tensor [KV heads] a layer; neurons: one [intermediate] a layer; channels [hidden].
    """

    groups: list[Tensor]
    neurons: list[Tensor]
    channels: Tensor


@torch.no_grad()
def activation_importance(model: Any, ids: Tensor) -> Widths:
    """Minitron's importances on windows of tokens ``ids`` [B, S]."""
    c = model.config
    groups: list[Tensor] = []
    neurons: list[Tensor] = []
    channels = torch.zeros(c.hidden_size, device=ids.device)

    def over_text(activations: Tensor) -> Tensor:
        return activations.mean(1).square().sum(0).sqrt()  # [B, S, parts] -> [parts]

    def heads(module: Any, inputs: tuple[Tensor]) -> None:
        batch, length, _ = inputs[0].shape
        a = c.attentions[len(groups)]
        per_head = inputs[0].view(batch, length, a.heads, -1).norm(dim=-1)
        groups.append(over_text(per_head).view(a.kv_heads, -1).sum(1))

    def mlp(module: Any, inputs: tuple[Tensor]) -> None:
        neurons.append(over_text(inputs[0].abs()))

    def norm(module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        channels.add_(over_text(output.abs()))

    handles = []
    for layer, described in zip(model.model.layers, c.stored_layers, strict=True):
        for site in sites(described):
            if site.columns in _INNER:
                hook = heads if site.columns == "queries" else mlp
                handles.append(layer.get_submodule(site.name).register_forward_pre_hook(hook))
        for name, module in layer.named_children():
            if name.endswith("norm"):
                handles.append(module.register_forward_hook(norm))
    try:
        model(ids, model.empty_cache(len(ids)), 1)
    finally:
        for handle in handles:
            handle.remove()
    runs = [layer.attention is not None for layer in c.stored_layers]
    by_layer = iter(_over_runs(groups, c.repeats))
    per_layer = [next(by_layer) if has else torch.zeros(0) for has in runs]
    return Widths(per_layer, _over_runs(neurons, c.repeats), channels)


def _over_runs(parts: list[Tensor], repeats: int) -> list[Tensor]:
    """A shared layer's importances of both runs, added."""
    return [torch.stack(parts[i : i + repeats]).sum(0) for i in range(0, len(parts), repeats)]


def magnitude_importance(model: Any) -> Widths:
    """The baseline: L2 norms of a part's weights."""
    c = model.config
    channels = model.model.embed_tokens.weight.square().sum(0)
    found: list[dict[Axis, Tensor]] = []
    for layer, described in zip(model.model.layers, c.stored_layers, strict=True):
        own = {axis: torch.zeros(()) for axis in _INNER}
        for site in sites(described):
            for name in site.matrices:
                squares = layer.get_submodule(name).weight.square()
                for axis, sums in zip(
                    axes(described, name), (squares.sum(1), squares.sum(0)), strict=True
                ):
                    if axis == "channels":
                        channels = channels + sums
                    elif axis in own:  # keys and values are chosen by their queries
                        own[axis] = own[axis] + sums
        found.append(own)
    groups = [
        own["queries"].view(layer.attention.kv_heads, -1).sum(1).sqrt()
        if layer.attention is not None
        else torch.zeros(0)
        for own, layer in zip(found, c.stored_layers, strict=True)
    ]
    return Widths(groups, [own["neurons"].sqrt() for own in found], channels.sqrt())


def random_importance(config: ModelConfig, seed: int) -> Widths:
    """The other baseline."""
    draw = torch.Generator().manual_seed(seed)
    sizes = [layer.size for layer in config.stored_layers]
    return Widths(
        [torch.rand(size.num_key_value_heads, generator=draw) for size in sizes],
        [torch.rand(size.intermediate_size, generator=draw) for size in sizes],
        torch.rand(config.hidden_size, generator=draw),
    )


def keep_top(
    importance: Widths,
    groups: int | None = None,
    neurons: int | None = None,
    channels: int | None = None,
) -> Widths:
    """The most important ``groups`` and ``neurons`` of every layer and ``channels`` of the model.

    None keeps all. Raises ExportError where there are fewer.
    """

    def top(values: Tensor, count: int | None, what: str) -> Tensor:
        if count is None or not len(values):  # a layer without heads has none to choose from
            count = len(values)
            return torch.ones(count, dtype=torch.bool)
        if not 0 < count <= len(values):
            raise ExportError(f"{count} {what} to keep, expected 1 to {len(values)}")
        kept = torch.zeros(len(values), dtype=torch.bool)
        kept[values.cpu().argsort(descending=True, stable=True)[:count]] = True
        return kept

    return Widths(
        [top(values, groups, "KV heads") for values in importance.groups],
        [top(values, neurons, "MLP neurons") for values in importance.neurons],
        top(importance.channels, channels, "hidden channels"),
    )


class Narrowed(Pruned):
    """A checkpoint of the parts that are ``kept`` alone: real smaller matrices.

    A quantized matrix that only loses rows keeps its blocks. One that loses columns is dequantized,
    because its groups no longer line up.
    """

    def __init__(self, whole: Checkpoint, kept: Widths) -> None:
        c, sizes = whole.config, []
        self.kept = kept
        stored = zip(c.stored_layers, kept.groups, kept.neurons, strict=True)
        for layer, groups, neurons in stored:
            kv_heads, heads = int(groups.sum()), 0
            if layer.attention is not None:
                heads = layer.attention.heads // layer.attention.kv_heads * kv_heads
            sizes.append(LayerSize(heads, kv_heads, int(neurons.sum())))
        config = replace(c, hidden_size=int(kept.channels.sum())).with_sizes(sizes)
        super().__init__(whole, config, "heads, neurons or channels were removed")

    def weight(self, name: str) -> Weight:
        weight = self.whole.weight(name)
        rows, columns = self._parts(name)
        if rows is not None:
            index = rows.numpy()
            weight = weight.rows(index) if isinstance(weight, QuantTensor) else weight[index]
        if columns is None or columns.all():
            return weight
        return np.ascontiguousarray(floats(weight)[:, columns.numpy()])

    def _parts(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """Which rows and columns stay; None: all, or there are no columns."""
        channels = self.kept.channels
        if not name.startswith(LAYERS):
            if name.endswith("norm.weight") or name.endswith("norm.bias"):
                return channels, None
            return None, None if name.endswith(".bias") else channels
        index, part = name.removeprefix(LAYERS).split(".", 1)
        part, _, suffix = part.rpartition(".")
        layer = self.whole.config.stored_layers[int(index)]
        kept: dict[Axis, Tensor] = {"channels": channels, "neurons": self.kept.neurons[int(index)]}
        if (a := layer.attention) is not None:
            groups = self.kept.groups[int(index)]
            kept["values"] = groups.repeat_interleave(a.head_dim)
            kept["queries"] = groups.repeat_interleave(a.query_width // a.kv_heads)
        rows, columns = axes(layer, part)
        chosen = None if rows is None else kept[rows]
        return chosen, None if columns is None or suffix == "bias" else kept[columns]
