"""Text that shows which inputs the layers get, and the walk through the layers that rounds them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pocketslm.errors import UsageError
from pocketslm.export.quantize import awq, gptq
from pocketslm.export.quantize.grid import Fit, Spec, round_to_grid
from pocketslm.export.text import read_text
from pocketslm.models.tensors import Weight

# Matrices that read the same input, by the first of them to run.
SITES = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


def last_tokens(text: Path, encode: Callable[[str], list[int]], tokens: int, window: int) -> Tensor:
    """The last ``tokens`` tokens of a text as int64 windows [tokens / window, window].

    The last, because evaluation takes the first: the two stay disjoint in a text that is long
    enough. Raises UsageError where the text cannot be read or has too few.
    """
    content = read_text(text)
    # Tokens are seldom longer than eight characters; the rest need not be tokenized.
    ids = encode(content[-8 * tokens :])
    count = tokens // window
    if count < 1 or len(ids) < count * window:
        raise UsageError(f"{text} has {len(ids)} tokens for calibration, expected {tokens}")
    return torch.from_numpy(np.asarray(ids[-count * window :], np.int64)).view(count, window)


@torch.no_grad()
def quantize_layers(
    model: Any,
    ids: Tensor,
    spec_of: Callable[[str], Spec | None],
    fit: Fit,
    *,
    use_awq: bool = False,
    use_gptq: bool = False,
    progress: Callable[[float], None] = lambda fraction: None,
) -> dict[str, Weight]:
    """Round a reference model's layers in place, first to last; the rounded weights by name.

    Each matrix sees the inputs that the already rounded ones before it make of ``ids`` [B, S].
    ``spec_of`` a matrix name is what to round it to, None: not at all. AWQ passes over a layer that
    is not rounded whole; the vectors that it may have changed are among the weights.
    """
    x = model.model.embed_tokens(ids.to(model.cos.device))
    stored: dict[str, Weight] = {}
    for index, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{index}."
        names = [name for site in SITES.values() for name in site]
        specs = [spec_of(f"{prefix}{name}.weight") for name in names]
        if use_awq and specs[0] is not None and None not in specs:
            hessians = _hessians(layer, partial(model.run_layer, index, x))
            awq.rescale(layer, hessians, specs[0], model.config.head_dim)
            for name, parameter in layer.named_parameters():
                if parameter.dim() == 1:
                    stored[prefix + name] = parameter.cpu().numpy()

        def round_site(site: str, hessian: Tensor, layer: Any = layer, at: str = prefix) -> None:
            by_spec: dict[Spec, list[str]] = {}
            for name in SITES[site]:
                if (spec := spec_of(f"{at}{name}.weight")) is not None:
                    by_spec.setdefault(spec, []).append(name)
            for spec, names in by_spec.items():
                parameters = [layer.get_submodule(name).weight for name in names]
                stacked = torch.cat(parameters)  # rows are rounded alike, so all in one go
                if use_gptq:
                    rounded = gptq.quantize(stacked, hessian, spec, fit)
                else:
                    rounded = round_to_grid(stacked, spec, fit, hessian.diagonal())
                start = 0
                for name, parameter in zip(names, parameters, strict=True):
                    rows = rounded.rows(slice(start, start := start + len(parameter)))
                    parameter.copy_(torch.from_numpy(rows.dequantize()))
                    stored[f"{at}{name}.weight"] = rows

        x = run_layer(model, index, x, round_site)
        progress((index + 1) / len(model.model.layers))
    return stored


def run_layer(model: Any, index: int, x: Tensor, visit: Callable[[str, Tensor], None]) -> Tensor:
    """x [B, S, H] through stored layer ``index``; ``visit(site, X^T X)`` may change its matrices.

    It is called just before they run, with what the matrices before them make of x; of a shared
    layer with what they read in both runs.
    """
    run: Callable[[], Tensor] = partial(model.run_layer, index, x)
    layer = model.model.layers[index]
    if not model.config.layer_sharing:
        return _with_inputs(layer, visit, run)
    for site in SITES:
        visit(site, _hessians(layer, run)[site])
    return run()


def _hessians(layer: Any, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """``X^T X`` of what each site reads, summed over the runs of a shared layer."""
    found: dict[str, Tensor] = {}

    def add(site: str, hessian: Tensor) -> None:
        found[site] = found[site] + hessian if site in found else hessian

    _with_inputs(layer, add, run)
    return found


def _with_inputs(
    layer: Any, visit: Callable[[str, Tensor], None], run: Callable[[], Tensor]
) -> Tensor:
    """Run a layer; ``visit(site, X^T X)`` is called just before the site's matrices run."""

    def hook(site: str) -> Callable[[Any, tuple[Tensor]], None]:
        def before(module: Any, inputs: tuple[Tensor]) -> None:
            flat = inputs[0].reshape(-1, inputs[0].shape[-1])
            visit(site, flat.T @ flat / len(flat))

        return before

    handles = [layer.get_submodule(site).register_forward_pre_hook(hook(site)) for site in SITES]
    try:
        return run()
    finally:
        for handle in handles:
            handle.remove()
