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
from pocketslm.models.tensors import QuantTensor, Weight, floats


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
        size = c.layers[len(groups)]
        per_head = inputs[0].view(batch, length, size.num_attention_heads, -1).norm(dim=-1)
        groups.append(over_text(per_head).view(size.num_key_value_heads, -1).sum(1))

    def mlp(module: Any, inputs: tuple[Tensor]) -> None:
        neurons.append(over_text(inputs[0].abs()))

    def norm(module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        channels.add_(over_text(output.abs()))

    handles = []
    for layer in model.model.layers:
        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(heads))
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(mlp))
        handles.append(layer.input_layernorm.register_forward_hook(norm))
        handles.append(layer.post_attention_layernorm.register_forward_hook(norm))
    try:
        model(ids, model.empty_cache(len(ids)), 1)
    finally:
        for handle in handles:
            handle.remove()
    return Widths(_over_runs(groups, c.repeats), _over_runs(neurons, c.repeats), channels)


def _over_runs(parts: list[Tensor], repeats: int) -> list[Tensor]:
    """A shared layer's importances of both runs, added."""
    return [torch.stack(parts[i : i + repeats]).sum(0) for i in range(0, len(parts), repeats)]


def magnitude_importance(model: Any) -> Widths:
    """The baseline: L2 norms of a part's weights."""
    c = model.config
    groups, neurons = [], []
    channels = model.model.embed_tokens.weight.square().sum(0)
    for layer, size in zip(model.model.layers, c.stored_layers, strict=True):
        a, m = layer.self_attn, layer.mlp
        by_value = a.o_proj.weight.square().sum(0) + a.q_proj.weight.square().sum(1)
        groups.append(by_value.view(size.num_key_value_heads, -1).sum(1).sqrt())
        rows = m.gate_proj.weight.square().sum(1) + m.up_proj.weight.square().sum(1)
        neurons.append((rows + m.down_proj.weight.square().sum(0)).sqrt())
        for linear in (a.q_proj, a.k_proj, a.v_proj, m.gate_proj, m.up_proj):
            channels = channels + linear.weight.square().sum(0)
        channels = channels + a.o_proj.weight.square().sum(1) + m.down_proj.weight.square().sum(1)
    return Widths(groups, neurons, channels.sqrt())


def random_importance(config: ModelConfig, seed: int) -> Widths:
    """The other baseline."""
    draw = torch.Generator().manual_seed(seed)
    return Widths(
        [torch.rand(size.num_key_value_heads, generator=draw) for size in config.stored_layers],
        [torch.rand(size.intermediate_size, generator=draw) for size in config.stored_layers],
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
        count = len(values) if count is None else count
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

    One that lost rows alone keeps its blocks, one that lost columns becomes floats.
    """

    def __init__(self, whole: Checkpoint, kept: Widths) -> None:
        c, sizes = whole.config, []
        self.kept = kept
        stored = zip(c.stored_layers, kept.groups, kept.neurons, strict=True)
        for size, groups, neurons in stored:
            kv_heads = int(groups.sum())
            heads = size.num_attention_heads // size.num_key_value_heads * kv_heads
            sizes.append(LayerSize(heads, kv_heads, int(neurons.sum())))
        config = replace(c, hidden_size=int(kept.channels.sum())).with_layer_sizes(sizes)
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
        if not name.startswith("model.layers."):
            is_norm = name == "model.norm.weight"
            return (channels, None) if is_norm else (None, channels)
        index, _, part, *rest = name.split(".")[2:]
        if not rest:  # input_layernorm.weight
            return channels, None
        size = self.whole.config.stored_layers[int(index)]
        groups, neurons = self.kept.groups[int(index)], self.kept.neurons[int(index)]
        values = groups.repeat_interleave(self.whole.config.head_dim)
        shared = size.num_attention_heads // size.num_key_value_heads
        queries = groups.repeat_interleave(shared * self.whole.config.head_dim)
        inner = {"q_proj": queries, "k_proj": values, "v_proj": values, "o_proj": queries}
        own = inner.get(part, neurons)
        rows, columns = (channels, own) if part in ("o_proj", "down_proj") else (own, channels)
        return rows, columns if rest == ["weight"] else None
