"""Mixed precision: the matrices that suffer most from 4 bits get 8, as far as a size allows.

What a matrix suffers is measured, not guessed: the KL divergence of the model's answers when it
alone is rounded. Matrices that read the same input are taken together. Each byte then goes where it
buys the most KL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketslm.errors import ExportError
from pocketslm.export.quantize.grid import round_to_grid
from pocketslm.export.recipe import Recipe
from pocketslm.models.checkpoint import Checkpoint
from pocketslm.models.reference import load_reference, parameter_shapes
from pocketslm.models.sites import LAYERS, is_rounded, layer_matrices
from pocketslm.models.tensors import QuantTensor

Site = tuple[str, ...]  # names of matrices


def mixed_precision(
    checkpoint: Checkpoint,
    recipe: Recipe,
    ids: Tensor,
    megabytes: float,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Recipe:
    """``recipe`` with overrides to int8 for as many matrices as ``megabytes`` of weights hold.

    ``ids`` [B, S]: windows of tokens to measure on. Raises ExportError where not even int4 fits.
    """
    checkpoint.config.need_own_layers("--size-budget")
    four = replace(recipe, weights="int4", overrides={})
    eight = replace(recipe, weights="int8", overrides={})
    sites = layer_matrices(checkpoint.config)
    shapes = parameter_shapes(checkpoint.config)
    costs = {
        site: sum(_bytes(eight, n, shapes[n]) - _bytes(four, n, shapes[n]) for n in site)
        for site in sites
    }
    least = sum(_stored_bytes(checkpoint, four, name, shape) for name, shape in shapes.items())
    room = int(megabytes * 1e6) - least
    if room < 0:
        raise ExportError(
            f"the size budget is {megabytes:g} MB, int4 weights take {least / 1e6:.1f} MB; "
            "allow more, or prune first"
        )
    losses = sensitivities(load_reference(checkpoint, ids.shape[1]), ids, four, sites, progress)
    chosen = allocate(losses, costs, room)
    names = [name for site in sites if site in chosen for name in site]
    return replace(four, overrides=dict.fromkeys(names, "int8"))


def allocate(losses: Mapping[Site, float], costs: Mapping[Site, int], room: int) -> set[Site]:
    """Sites worth the most ``losses`` a byte of ``costs``, one after the other while they fit."""
    chosen: set[Site] = set()
    for site in sorted(losses, key=lambda site: losses[site] / costs[site], reverse=True):
        if costs[site] <= room:
            chosen.add(site)
            room -= costs[site]
    return chosen


@torch.no_grad()
def sensitivities(
    model: Any,
    ids: Tensor,
    recipe: Recipe,
    sites: list[Site],
    progress: Callable[[float], None] = lambda fraction: None,
) -> dict[Site, float]:
    """Mean KL divergence in nats when the matrices of one site alone are rounded, for each site."""
    inputs = [model.embed(ids)]
    for index in range(len(model.model.layers)):
        inputs.append(model.run_layer(index, inputs[-1]))
    exact = F.log_softmax(model.finish(inputs[-1]), -1)
    found = {}
    for done, site in enumerate(sites, 1):
        first = int(site[0].split(".")[2])
        parameters = [model.get_parameter(name) for name in site]
        originals = [parameter.clone() for parameter in parameters]
        for name, parameter in zip(site, parameters, strict=True):
            spec = recipe.spec(name, quantized=False)
            assert spec is not None
            rounded = round_to_grid(parameter, spec, recipe.fit)
            parameter.copy_(torch.from_numpy(rounded.dequantize()))
        x = inputs[first]
        for index in range(first, len(model.model.layers)):
            x = model.run_layer(index, x)
        got = F.log_softmax(model.finish(x), -1)
        found[site] = float((exact.exp() * (exact - got)).sum(-1).mean())
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.copy_(original)
        progress(done / len(sites))
    return found


def _bytes(recipe: Recipe, name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a matrix rounded as the recipe says."""
    spec = recipe.spec(name, quantized=False)
    assert spec is not None
    offset = {"sym": 0, "zp": 1, "min": 2}[spec.kind]
    rows, columns = shape
    return rows * columns * spec.bits // 8 + rows * (columns // spec.size(columns)) * (2 + offset)


def _stored_bytes(checkpoint: Checkpoint, recipe: Recipe, name: str, shape: tuple[int, ...]) -> int:
    if len(shape) == 2 and name.startswith(LAYERS) and is_rounded(name):
        return _bytes(recipe, name, shape)
    weight = recipe.apply(name, checkpoint.weight(name))
    return weight.nbytes if isinstance(weight, QuantTensor) else weight.size * 4
