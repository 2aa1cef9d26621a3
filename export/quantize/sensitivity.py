"""Mixed precision: each matrix gets the bits that buy the most within a size.

What a matrix suffers is measured, not guessed: the KL divergence of the model's answers when it
alone is rounded as the export will round it, on text that the rounding has not seen. Matrices that
read the same input are taken together; the embedding is one of them, with the output head where
both are one matrix. The bytes then go where they buy the most KL together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pocketslm.errors import ExportError
from pocketslm.export.quantize import calibration
from pocketslm.export.quantize.grid import Spec, round_to_grid
from pocketslm.export.recipe import Recipe, Scheme
from pocketslm.models.checkpoint import EMBEDDING, HEAD, Checkpoint
from pocketslm.models.config import ModelConfig
from pocketslm.models.reference import load_reference, parameter_shapes
from pocketslm.models.sites import LAYERS, layer_matrices
from pocketslm.models.sites import Site as LayerSite
from pocketslm.models.tensors import stored_bytes

Site = tuple[str, ...]  # names of matrices
Losses = dict[Site, dict[int, float]]  # mean KL in nats, by bits
WIDTHS = (2, 3, 4, 5, 6, 8)
_RUN = 2  # widths, the narrowest, that the model is run for
_STEPS = 20_000  # of the size, in which it is given out
_ROWS = 4096  # of a matrix, about; their errors tell what the other widths lose
# Tokens that losses are measured on; logits are made of every second one: neighbours suffer alike,
# and a large head costs more than the layers.
_TOKENS, _EVERY = 1024, 2


def mixed_precision(
    checkpoint: Checkpoint,
    recipe: Recipe,
    ids: Tensor,
    megabytes: float,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Recipe:
    """``recipe`` with the bits of each matrix such that weights take at most ``megabytes``.

    ``ids`` [B, S]: windows of tokens, as for :func:`sensitivities`. Raises ExportError where not
    even the fewest bits fit.
    """
    checkpoint.config.need_own_layers("--size")
    sizes = Sizes(checkpoint, recipe)
    sizes.check(megabytes)
    model = load_reference(checkpoint, ids.shape[1])
    return sizes.within(megabytes, sensitivities(model, ids, sizes.base, sizes.widths, progress))


def all_sites(config: ModelConfig) -> list[Site]:
    """Those of each layer, then the embedding and the head, which may be one matrix."""
    head = () if config.tie_word_embeddings else ((HEAD,),)
    return [*layer_matrices(config), (EMBEDDING,), *head]


class Sizes:
    """What the matrices of a checkpoint take at each width, rounded as a recipe says.

    costs: bytes of each site by bits. fixed: bytes of all that is not rounded.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe) -> None:
        self.base = replace(recipe, weights="int4", head="int4", overrides={})
        self.widths = [bits for bits in WIDTHS if recipe.grid != "zp" or bits in (4, 8)]
        shapes = parameter_shapes(checkpoint.config)
        sites = all_sites(checkpoint.config)
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

    A knapsack, filled site by site for every size at once, in steps of room / 20,000; what the
    steps leave then goes to single sites. An embedding may be most of the bytes: taken by what each
    byte buys, it would get a bit less than is best wherever its next step does not quite fit.
    """
    least = {site: min(by_bits.values()) for site, by_bits in costs.items()}
    free = room - sum(least.values())
    step = max(1, free // _STEPS)
    best = np.zeros(free // step + 1)  # of the sites so far, by the steps that they may take
    choices: list[np.ndarray[Any, Any]] = []  # the index of a site's width
    steps = {
        site: {bits: -((least[site] - cost) // step) for bits, cost in by_bits.items()}
        for site, by_bits in costs.items()
    }
    for site, by_bits in steps.items():
        with_it = np.full((len(by_bits), len(best)), np.inf)
        for row, (bits, taken) in zip(with_it, by_bits.items(), strict=True):
            if taken < len(best):
                row[taken:] = best[: len(best) - taken] + losses[site][bits]
        choices.append(with_it.argmin(0))
        best = with_it.min(0)
    chosen, at = {}, len(best) - 1
    for (site, by_bits), choice in zip(reversed(steps.items()), reversed(choices), strict=True):
        chosen[site] = list(by_bits)[choice[at]]
        at -= by_bits[chosen[site]]
    room -= sum(costs[site][bits] for site, bits in chosen.items())
    while upgrades := list(_affordable(losses, costs, chosen, room)):
        _, site, bits = max(upgrades)
        room -= costs[site][bits] - costs[site][chosen[site]]
        chosen[site] = bits
    return chosen


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
    widths: Sequence[int] = WIDTHS,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Losses:
    """Mean KL divergence when the matrices of one site alone are rounded to so many bits.

    It is measured on the first windows of ``ids`` [B, S]. A recipe with a calibration rounds for
    what the other windows make a matrix read, as the export does, but for AWQ and tuning. The model
    is run for the two narrowest widths: the KL of a wider one is as much less as the squared error
    of what the matrices make of their inputs is.
    """
    count = max(1, min(_TOKENS // ids.shape[1], len(ids) - 1))
    measured, others = ids[:count], ids[count:] if len(ids) > count else ids
    exact = _logits(model, 0, model.embed(measured))
    probabilities = exact.softmax(-1)
    total = len(all_sites(model.config))
    found: Losses = {}
    for site, index, x, read in _with_inputs(model, measured, others):

        def divergence(site: Site = site, index: int = index, x: Tensor = x) -> float:
            start = model.embed(measured) if site[0] == EMBEDDING else x
            return _divergence(probabilities, _logits(model, index, start) - exact)

        found[site] = _losses(model, site, recipe, widths, read, divergence)
        progress(len(found) / total)
    return found


def _divergence(probabilities: Tensor, change: Tensor) -> float:
    """Mean KL of logits [B, S, V] that changed so from those with these probabilities; ``change``
    is overwritten. Small ones do not drown in the logits, as they would in a difference of
    log-probabilities."""
    mean = torch.einsum("bsv,bsv->bs", probabilities, change)
    grown = torch.einsum("bsv,bsv->bs", probabilities, change.expm1_())
    return float((grown.log1p() - mean).mean())


def _with_inputs(
    model: Any, measured: Tensor, others: Tensor
) -> Iterator[tuple[Site, int, Tensor, Tensor | None]]:
    """Each site; the layer from which the model runs anew when it changes, and what this layer
    makes of ``measured`` reads; ``X^T X`` of what the site reads of ``others``."""
    x, other = model.embed(measured), model.embed(others)
    by_first = {site[0]: site for site in all_sites(model.config)}
    for index in range(len(model.model.layers)):
        read: dict[str, Tensor] = {}

        def keep(
            site: LayerSite, hessian: Tensor, at: int = index, read: dict[str, Tensor] = read
        ) -> None:
            read[f"{LAYERS}{at}.{site.name}.weight"] = hessian

        other = calibration.run_layer(model, index, other, keep)
        for name, hessian in read.items():
            yield by_first[name], index, x, hessian
        x = model.run_layer(index, x)
    head = calibration.second_moment(model.normalized(other))
    tied = model.config.tie_word_embeddings
    yield (EMBEDDING,), 0, x, head if tied else None
    if not tied:
        yield (HEAD,), len(model.model.layers), x, head


def _losses(
    model: Any,
    site: Site,
    recipe: Recipe,
    widths: Sequence[int],
    read: Tensor | None,
    divergence: Callable[[], float],
) -> dict[int, float]:
    """What ``divergence`` says of the model with the site rounded, by bits; it is whole again."""
    weights = {name: model.get_parameter(name) for name in site}
    originals = {name: weight.clone() for name, weight in weights.items()}
    losses: dict[int, float] = {}
    for bits in widths[:_RUN]:
        for name, weight in weights.items():
            weight.copy_(_rounded(name, originals[name], bits, recipe, read))
        losses[bits] = divergence()
    for name, weight in weights.items():
        weight.copy_(originals[name])

    def error(bits: int) -> float:
        """Of what the matrices make of their inputs, squared; of as many rows as tell."""
        total = 0.0
        for name, original in originals.items():
            rows = original[:: max(1, len(original) // _ROWS)]
            lost = _rounded(name, rows, bits, recipe, read) - rows
            square = (lost * (lost if read is None else lost @ read)).sum()
            total += float(square) * len(original) / len(rows)
        return total

    last = widths[:_RUN][-1]
    scale = losses[last] / max(error(last), 1e-30)
    return losses | {bits: scale * error(bits) for bits in widths[_RUN:]}


def _rounded(name: str, weight: Tensor, bits: int, recipe: Recipe, read: Tensor | None) -> Tensor:
    """A matrix, or rows of it, as the export rounds them; ``read``: ``X^T X`` of their inputs, if
    that plays a part."""
    spec = _spec(recipe, name, bits)
    if read is None or recipe.calibration is None:
        stored = round_to_grid(weight, spec, recipe.fit)
    else:
        options = recipe.fit, recipe.use_gptq, calibration.damping(name)
        stored = calibration.round_for(weight, read, spec, *options)
    return torch.from_numpy(stored.dequantize()).to(weight.device)


def _logits(model: Any, index: int, x: Tensor) -> Tensor:
    """Of every second position, when layer ``index`` reads x [B, S, H]: [B, S / 2, V]."""
    for at in range(index, len(model.model.layers)):
        x = model.run_layer(at, x)
    logits: Tensor = model.finish(x[:, ::_EVERY])
    return logits


def _scheme(bits: int) -> Scheme:
    scheme: Scheme = f"int{bits}"  # type: ignore[assignment]
    return scheme


def _spec(recipe: Recipe, name: str, bits: int) -> Spec:
    spec = replace(recipe, overrides={name: _scheme(bits)}).spec(name, quantized=False)
    assert spec is not None
    return spec
