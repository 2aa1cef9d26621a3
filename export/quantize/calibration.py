"""The walk through a model that rounds each matrix for what it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pocketslm.export.quantize import awq, gptq
from pocketslm.export.quantize.grid import Fit, Spec, round_to_grid
from pocketslm.models.checkpoint import EMBEDDING, HEAD
from pocketslm.models.sites import LAYERS, Site, matrices, sites
from pocketslm.models.tensors import QuantTensor, Weight

# GPTQ's damping of a head that is the embedding, too, and must not leave its own values too far.
_TIED = 1.0

Visit = Callable[[Site, Tensor], None]


@torch.no_grad()
def quantize_layers(
    model: Any,
    ids: Tensor,
    spec_of: Callable[[str], Spec | None],
    fit: Fit,
    *,
    use_awq: bool = False,
    use_gptq: bool = False,
    head: Callable[[str], Tensor] | None = None,
    hold: Callable[[int], AbstractContextManager[None]] = lambda index: nullcontext(),
    progress: Callable[[float], None] = lambda fraction: None,
) -> Iterator[tuple[str, Weight]]:
    """Round a reference model in place, layers first to last, then its head; yield the rounded
    weights by name.

    Each matrix sees the inputs that the already rounded ones before it make of ``ids`` [B, S].
    ``spec_of`` a matrix name is what to round it to, None: not at all. AWQ passes over a layer that
    is not rounded whole; the vectors that it may have changed are among the weights. ``head``: the
    matrix [V, H] of a name where it is not the model's own, which then stays. ``hold`` is entered
    with a layer's index as long as it is needed.
    """
    model.config.need_own_layers("calibration")
    x = model.embed(ids.to(model.device))
    for index, layer in enumerate(model.model.layers):
        stored: dict[str, Weight] = {}
        prefix = f"{LAYERS}{index}."
        described = model.config.stored_layers[index]
        specs = [spec_of(f"{prefix}{name}.weight") for name in matrices(described)]

        def round_site(
            site: Site,
            hessian: Tensor,
            layer: Any = layer,
            at: str = prefix,
            stored: dict[str, Weight] = stored,
        ) -> None:
            by_spec: dict[Spec, list[str]] = {}
            for name in site.matrices:
                if (spec := spec_of(f"{at}{name}.weight")) is not None:
                    by_spec.setdefault(spec, []).append(name)
            for spec, names in by_spec.items():
                parameters = [layer.get_submodule(name).weight for name in names]
                # Rows are rounded alike, so all in one go.
                rounded = round_for(torch.cat(parameters), hessian, spec, fit, use_gptq)
                start = 0
                for name, parameter in zip(names, parameters, strict=True):
                    rows = rounded.rows(slice(start, start := start + len(parameter)))
                    parameter.copy_(torch.from_numpy(rows.dequantize()))
                    stored[f"{at}{name}.weight"] = rows

        with hold(index):
            if use_awq and specs[0] is not None and None not in specs:
                hessians = _hessians(model, index, x)
                awq.rescale(layer, described, hessians, specs[0])
                for name, parameter in layer.named_parameters():
                    if parameter.dim() == 1:
                        stored[prefix + name] = parameter.cpu().numpy()
            x = run_layer(model, index, x, round_site)
        yield from stored.items()
        progress((index + 1) / len(model.model.layers))
    name = EMBEDDING if model.config.tie_word_embeddings else HEAD
    if (spec := spec_of(name)) is not None:
        weight = model.get_parameter(name) if head is None else head(name)
        hessian = second_moment(model.normalized(x))
        rounded = round_for(weight, hessian, spec, fit, use_gptq, damping(name))
        if head is None:
            weight.copy_(torch.from_numpy(rounded.dequantize()))
        yield name, rounded


def damping(name: str) -> float:
    """GPTQ's of a matrix that has a Hessian: of an embedding, it is the head, too."""
    return _TIED if name == EMBEDDING else gptq.DAMPING


def round_for(
    weight: Tensor,
    hessian: Tensor,
    spec: Spec,
    fit: Fit,
    use_gptq: bool,
    damping: float = gptq.DAMPING,
) -> QuantTensor:
    """``weight`` [N, K] rounded for inputs with ``hessian`` [K, K]."""
    if use_gptq:
        return gptq.quantize(weight, hessian, spec, fit, damping=damping)
    return round_to_grid(weight, spec, fit, hessian.diagonal())


def second_moment(x: Tensor) -> Tensor:
    """``X^T X`` of x [B, S, K], a token on average: [K, K]."""
    flat = x.reshape(-1, x.shape[-1])
    return flat.T @ flat / len(flat)


def run_layer(model: Any, index: int, x: Tensor, visit: Visit) -> Tensor:
    """x [B, S, H] through stored layer ``index``; ``visit(site, X^T X)`` may change its matrices.

    It is called just before they run, with what the matrices before them make of x; of a shared
    layer with what they read in both runs.
    """
    if not model.config.layer_sharing:
        return _with_inputs(model, index, x, visit)
    for site in sites(model.config.stored_layers[index]):
        visit(site, _hessians(model, index, x)[site.name])
    out: Tensor = model.run_layer(index, x)
    return out


def _hessians(model: Any, index: int, x: Tensor) -> dict[str, Tensor]:
    """``X^T X`` of what each site reads, summed over the runs of a shared layer."""
    found: dict[str, Tensor] = {}

    def add(site: Site, hessian: Tensor) -> None:
        found[site.name] = found[site.name] + hessian if site.name in found else hessian

    _with_inputs(model, index, x, add)
    return found


def _with_inputs(model: Any, index: int, x: Tensor, visit: Visit) -> Tensor:
    """Run a layer; ``visit(site, X^T X)`` is called just before the site's matrices run."""
    layer = model.model.layers[index]

    def hook(site: Site) -> Callable[[Any, tuple[Tensor]], None]:
        def before(module: Any, inputs: tuple[Tensor]) -> None:
            visit(site, second_moment(inputs[0]))

        return before

    handles = [
        layer.get_submodule(site.name).register_forward_pre_hook(hook(site))
        for site in sites(model.config.stored_layers[index])
    ]
    try:
        out: Tensor = model.run_layer(index, x)
        return out
    finally:
        for handle in handles:
            handle.remove()
