"""Mixed precision: each matrix gets the bits that buy the most within a size.

What a matrix suffers is measured, not guessed: the KL divergence of the model's answers when it
alone is rounded. Matrices that read the same input are taken together; the embedding is one of
them, with the output head where both are one matrix. Each byte then goes where it buys the most KL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketslm.errors import ExportError
from pocketslm.export.quantize.grid import Spec, round_to_grid
from pocketslm.export.recipe import Recipe, Scheme
from pocketslm.models.checkpoint import EMBEDDING, HEAD, Checkpoint
from pocketslm.models.reference import load_reference, parameter_shapes
from pocketslm.models.sites import LAYERS, layer_matrices
from pocketslm.models.tensors import stored_bytes

Site = tuple[str, ...]  # names of matrices
WIDTHS = (2, 3, 4, 5, 6, 8)
# The others follow from these: a site's KL grows with the squared error of its weights.
_MEASURED = (2, 3, 4)


def mixed_precision(
    checkpoint: Checkpoint,
    recipe: Recipe,
    ids: Tensor,
    megabytes: float,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Recipe:
    """``recipe`` with the bits of each matrix such that weights take at most ``megabytes``.

    ``ids`` [B, S]: windows of tokens to measure on. Raises ExportError where not even the fewest
    bits fit.
    """
    checkpoint.config.need_own_layers("--size")
    sizes = Sizes(checkpoint, recipe)
    sizes.check(megabytes)
    model = load_reference(checkpoint, ids.shape[1])
    losses = sensitivities(model, ids, sizes.base, list(sizes.costs), sizes.widths, progress)
    return sizes.within(megabytes, losses)


class Sizes:
    """What the matrices of a checkpoint take at each width, rounded as a recipe says.

    costs: bytes of each site by bits. fixed: bytes of all that is not rounded.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe) -> None:
        self.base = replace(recipe, weights="int4", head="int4", overrides={})
        self.widths = [bits for bits in WIDTHS if recipe.grid != "zp" or bits in (4, 8)]
        shapes = parameter_shapes(checkpoint.config)
        tops = [(name,) for name in (EMBEDDING, HEAD) if name in shapes]
        sites = [*layer_matrices(checkpoint.config), *tops]
        rest = shapes.keys() - {name for site in sites for name in site}
        self.fixed = sum(stored_bytes(self.base.apply(n, checkpoint.weight(n))) for n in rest)
        self.costs: dict[Site, dict[int, int]] = {
            site: {
                b: sum(_spec(self.base, n, b).nbytes(*shapes[n]) for n in site) for b in self.widths
            }
            for site in sites
        }

    def check(self, megabytes: float) -> None:
        """ExportError where not even the fewest bits fit."""
        least = self.fixed + sum(cost[self.widths[0]] for cost in self.costs.values())
        if megabytes * 1e6 < least:
            raise ExportError(
                f"the size is {megabytes:g} MB, weights of {self.widths[0]} bits take "
                f"{least / 1e6:.1f} MB; allow more, or prune first"
            )

    def within(self, megabytes: float, losses: Mapping[Site, Mapping[int, float]]) -> Recipe:
        """The recipe whose weights take at most so much, by the losses of :func:`sensitivities`."""
        self.check(megabytes)
        chosen = allocate(losses, self.costs, int(megabytes * 1e6) - self.fixed)
        overrides = {name: _scheme(chosen[site]) for site in self.costs for name in site}
        return replace(self.base, overrides=overrides)


def allocate(
    losses: Mapping[Site, Mapping[int, float]], costs: Mapping[Site, Mapping[int, int]], room: int
) -> dict[Site, int]:
    """The bits of each site, with the least sum of ``losses`` that ``room`` bytes buy at ``costs``.

    Steps from width to width are taken in the order of what they buy a byte, those of a site along
    the lower convex hull of its losses, while they fit. What is left then goes to single steps.
    """
    chosen = {site: min(by_bits) for site, by_bits in costs.items()}
    room -= sum(costs[site][bits] for site, bits in chosen.items())
    steps = [
        (_slope(losses[site], costs[site], a, b), site, b)
        for site in costs
        for a, b in pairwise(_hull(losses[site], costs[site]))
    ]
    for _, site, bits in sorted(steps, key=lambda step: step[0], reverse=True):
        price = costs[site][bits] - costs[site][chosen[site]]
        if price <= room and bits > chosen[site]:
            chosen[site], room = bits, room - price
    while upgrades := list(_affordable(losses, costs, chosen, room)):
        _, site, bits = max(upgrades)
        room -= costs[site][bits] - costs[site][chosen[site]]
        chosen[site] = bits
    return chosen


def _slope(losses: Mapping[int, float], costs: Mapping[int, int], a: int, b: int) -> float:
    """The loss that a byte saves between two widths."""
    return (losses[a] - losses[b]) / (costs[b] - costs[a])


def _hull(losses: Mapping[int, float], costs: Mapping[int, int]) -> list[int]:
    """The widths on the lower convex hull of loss over bytes, the narrowest first."""
    hull: list[int] = []
    for bits in sorted(costs):
        if hull and losses[bits] >= losses[hull[-1]]:
            continue
        while len(hull) > 1:
            last, before = hull[-1], hull[-2]
            if _slope(losses, costs, before, last) > _slope(losses, costs, last, bits):
                break
            hull.pop()
        hull.append(bits)
    return hull


def _affordable(
    losses: Mapping[Site, Mapping[int, float]],
    costs: Mapping[Site, Mapping[int, int]],
    chosen: Mapping[Site, int],
    room: int,
) -> Iterator[tuple[float, Site, int]]:
    """What single steps up that fit save, and which they are."""
    for site, now in chosen.items():
        for bits in costs[site]:
            saved = losses[site][now] - losses[site][bits]
            if 0 < costs[site][bits] - costs[site][now] <= room and saved > 0:
                yield saved, site, bits


@torch.no_grad()
def sensitivities(
    model: Any,
    ids: Tensor,
    recipe: Recipe,
    sites: Sequence[Site],
    widths: Sequence[int] = WIDTHS,
    progress: Callable[[float], None] = lambda fraction: None,
) -> dict[Site, dict[int, float]]:
    """Mean KL divergence in nats when the matrices of one site alone are rounded to so many bits.

    Widths above 4 bits are not run: their KL is that of 4 bits, as much less as the squared error
    of the weights is.
    """
    inputs = [model.embed(ids)]
    for index in range(len(model.model.layers)):
        inputs.append(model.run_layer(index, inputs[-1]))
    exact = F.log_softmax(model.finish(inputs[-1]), -1)
    found: dict[Site, dict[int, float]] = {}
    for done, site in enumerate(sites, 1):
        parameters = [model.get_parameter(name) for name in site]
        originals = [parameter.clone() for parameter in parameters]
        errors: dict[int, float] = {}
        losses: dict[int, float] = {}
        for bits in widths:
            errors[bits] = 0.0
            for name, parameter, original in zip(site, parameters, originals, strict=True):
                spec = _spec(recipe, name, bits)
                stored = round_to_grid(original, spec, recipe.fit).dequantize()
                rounded = torch.from_numpy(stored).to(original.device)
                errors[bits] += float((rounded - original).square().sum())
                parameter.copy_(rounded)
            if bits in _MEASURED or not losses:
                losses[bits] = _divergence(model, ids, inputs, exact, site)
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.copy_(original)
        last = max(losses)
        for bits in widths:
            if bits not in losses:
                losses[bits] = losses[last] * errors[bits] / max(errors[last], 1e-30)
        found[site] = losses
        progress(done / len(sites))
    return found


def _divergence(
    model: Any, ids: Tensor, inputs: Sequence[Tensor], exact: Tensor, site: Site
) -> float:
    """Mean KL of the model as it is to its ``exact`` log-probabilities; what runs before ``site``
    is known from ``inputs``."""
    layers = len(model.model.layers)
    if site[0] == EMBEDDING:
        x, first = model.embed(ids), 0
    else:
        first = int(site[0].split(".")[2]) if site[0].startswith(LAYERS) else layers
        x = inputs[first]
    for index in range(first, layers):
        x = model.run_layer(index, x)
    got = F.log_softmax(model.finish(x), -1)
    return float((exact.exp() * (exact - got)).sum(-1).mean())


def _scheme(bits: int) -> Scheme:
    scheme: Scheme = f"int{bits}"  # type: ignore[assignment]
    return scheme


def _spec(recipe: Recipe, name: str, bits: int) -> Spec:
    spec = replace(recipe, overrides={name: _scheme(bits)}).spec(name, quantized=False)
    assert spec is not None
    return spec
