"""Adapt-Pruner (Pan et al. 2025, https://arxiv.org/abs/2502.03460): each layer at its own rate.

A layer that hardly turns its input is of little importance and is pruned faster. Step by step, on
the model as it is by then: importances ``I_l``, then sparsities ``s_l + D - A * I_l``, then the
coupled groups of least Taylor score in each layer are silenced. A group is a KV head with its query
heads, their value and output columns; or a neuron, its rows of gate and up and its column of down.

Silenced parts are zeros in the whole model, so it can be trained between the steps (``heal
--adaptive``); :class:`width.Narrowed` takes them out in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketslm.errors import ExportError, UsageError
from pocketslm.export.prune.width import Widths
from pocketslm.models.config import Layer, ModelConfig
from pocketslm.models.sites import axes, matrices

AMPLITUDE = 0.02  # A
STEP = 0.05  # D: the mean sparsity that one step adds
MOST = 0.99  # of a layer
MULTIPLE = 32  # of neurons a layer keeps: the kernels' group size


def check_share(share: float) -> None:
    """Raises UsageError where it is none that can be removed."""
    if not 0 < share < 1:
        raise UsageError(f"adaptive is {share}, expected a share of the layers between 0 and 1")


def schedule(
    sparsity: Sequence[float], importance: Sequence[float], step: float, amplitude: float
) -> list[float]:
    """The layers' sparsities after one more step; ``importance`` is centred and scaled here."""
    mean = sum(importance) / len(importance)
    centred = [value - mean for value in importance]
    most = max(map(abs, centred)) or 1.0
    return [
        min(max(s + step - amplitude * value / most, 0.0), MOST)
        for s, value in zip(sparsity, centred, strict=True)
    ]


def everything(config: ModelConfig) -> Widths:
    """What to keep before anything is pruned."""
    sizes = [layer.size for layer in config.stored_layers]
    return Widths(
        [torch.ones(size.num_key_value_heads, dtype=torch.bool) for size in sizes],
        [torch.ones(size.intermediate_size, dtype=torch.bool) for size in sizes],
        torch.ones(config.hidden_size, dtype=torch.bool),
    )


def share_removed(config: ModelConfig, kept: Widths) -> float:
    """The share of the layers' weights that is not kept; norms and biases are not counted."""
    whole = gone = 0
    for layer, groups, neurons in zip(config.stored_layers, kept.groups, kept.neurons, strict=True):
        of_group, of_neuron = _weights(config, layer)
        whole += of_group * len(groups) + of_neuron * len(neurons)
        gone += of_group * int((~groups).sum()) + of_neuron * int((~neurons).sum())
    return gone / whole


def prune(
    model: Any,
    kept: Widths,
    ids: Tensor,
    share: float,
    *,
    amplitude: float = AMPLITUDE,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Widths:
    """Silence parts of a reference model in place until ``share`` of its layers is gone.

    Importances and scores are those on windows of tokens ``ids`` [B, S]. ``kept`` is what earlier
    calls left; what this one leaves is returned. Attention goes in whole KV heads, rounded down;
    neurons stay a multiple of 32. ``amplitude`` 0 prunes all layers alike. Raises ExportError where
    the layers cannot become so small.
    """
    config = model.config
    sparsity = [1 - float(neurons.float().mean()) for neurons in kept.neurons]
    before = share_removed(config, kept)
    while (gone := share_removed(config, kept)) < share:
        importance, scores = measure(model, ids)
        following = schedule(sparsity, importance, STEP, amplitude)
        chosen = _lowest_out(kept, scores, following)
        if (reached := share_removed(config, chosen)) > share:  # the last step is a shorter one
            part = (share - gone) / (reached - gone)
            following = [s + part * (f - s) for s, f in zip(sparsity, following, strict=True)]
            chosen = _lowest_out(kept, scores, following)
            silence(model, chosen)
            return chosen
        if min(following) >= MOST:
            raise ExportError(f"a share of {share} to remove, the layers have {reached:.3f}")
        sparsity, kept = following, chosen
        silence(model, kept)
        progress((reached - before) / (share - before))
    return kept


def measure(model: Any, ids: Tensor) -> tuple[list[float], Widths]:
    """``I_l = -mean cos(x_in, x_out)`` of each layer, and the Taylor score of each group.

    The score is the sum of ``|w * dL/dw|`` over a group's rows and columns, L the loss in nats a
    token. Matrices require gradients from then on.
    """
    layers = model.model.layers
    cosines = torch.zeros(len(layers))

    def layer_hook(index: int) -> Callable[[Any, tuple[Tensor, ...], tuple[Tensor, Any]], None]:
        def after(module: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> None:
            cosine = F.cosine_similarity(inputs[0].detach(), output[0].detach(), dim=-1)
            cosines[index] += float(cosine.mean()) / (len(ids) * model.config.repeats)

        return after

    described = model.config.stored_layers
    pairs = list(zip(layers, described, strict=True))
    weights = [weight for layer, about in pairs for weight, *_ in _coupled(layer, about)]
    gradients = [torch.zeros_like(weight) for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    handles = [layer.register_forward_hook(layer_hook(i)) for i, layer in enumerate(layers)]
    try:
        for window in ids:  # logits of one window at a time
            logits = model(window[None], model.empty_cache())[0][0, :-1]
            loss = F.cross_entropy(logits.float(), window[1:]) / len(ids)
            for total, part in zip(gradients, torch.autograd.grad(loss, weights), strict=True):
                total += part
    finally:
        for handle in handles:
            handle.remove()
    found = iter(gradients)
    groups, neurons = [], []
    for layer, about in pairs:
        scores = {"heads": torch.zeros(about.size.num_key_value_heads)}
        scores["neurons"] = torch.zeros(about.size.intermediate_size)
        for weight, axis, kind in _coupled(layer, about):
            change = (weight.detach() * next(found)).abs().movedim(axis, 0)
            scores[kind] += change.reshape(len(scores[kind]), -1).sum(1).cpu()
        groups.append(scores["heads"])
        neurons.append(scores["neurons"])
    channels = torch.ones(model.config.hidden_size)
    return (-cosines).tolist(), Widths(groups, neurons, channels)


@torch.no_grad()
def silence(model: Any, kept: Widths) -> None:
    """Set to zero, in place, all parts that are not kept."""
    layers = zip(model.model.layers, model.config.stored_layers, strict=True)
    for (layer, about), groups, neurons in zip(layers, kept.groups, kept.neurons, strict=True):
        for weight, axis, kind in _coupled(layer, about):
            gone = ~(groups if kind == "heads" else neurons).to(weight.device)
            if gone.any():
                moved = weight.movedim(axis, 0)
                moved.view(len(gone), -1, *moved.shape[1:])[gone] = 0


def _lowest_out(kept: Widths, scores: Widths, sparsity: Sequence[float]) -> Widths:
    """Without those of least score, so many of each layer; what is gone already counts."""

    def highest(alive: Tensor, score: Tensor, count: int) -> Tensor:
        ranked = score.where(alive, -1).argsort(descending=True, stable=True)
        chosen = torch.zeros_like(alive)
        chosen[ranked[: min(count, int(alive.sum()))]] = True
        return chosen

    groups, neurons = [], []
    for index, share in enumerate(sparsity):
        heads, width = len(kept.groups[index]), len(kept.neurons[index])
        stay = heads - max(min(int(heads * share + 1e-9), heads - 1), 0)
        groups.append(highest(kept.groups[index], scores.groups[index], stay))
        stay = min(max(round(width * (1 - share) / MULTIPLE), 1) * MULTIPLE, width)
        neurons.append(highest(kept.neurons[index], scores.neurons[index], stay))
    return Widths(groups, neurons, kept.channels)


def _coupled(layer: Any, described: Layer) -> Iterator[tuple[Tensor, int, str]]:
    """A layer's tensors: the axis along which its parts lie, and which parts."""
    kinds = {"queries": "heads", "values": "heads", "neurons": "neurons"}
    for name in matrices(described):
        linear = layer.get_submodule(name)
        for axis, of in enumerate(axes(described, name)):
            if of not in kinds:
                continue
            yield linear.weight, axis, kinds[of]
            if axis == 0 and linear.bias is not None:
                yield linear.bias, 0, kinds[of]


def _weights(config: ModelConfig, layer: Layer) -> tuple[int, int]:
    """How many of a KV head with its queries, and of a neuron."""
    a, of_group = layer.attention, 0
    if a is not None:
        of_group = 2 * (a.heads // a.kv_heads + 1) * a.head_dim * config.hidden_size
    return of_group, (3 if layer.mlp.gated else 2) * config.hidden_size
