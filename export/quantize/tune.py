"""Tuning what rounding left free: scales, minimums and norms learn the unrounded model's answers.

Codes stay as the methods before chose them, which see one matrix at a time; the loss here is the
forward KL divergence between the logits of the two whole models. Scales and minimums are trained as
in PEQA (Kim et al. 2023, https://arxiv.org/abs/2305.14152), norms as in Norm Tweaking (Li et al.
2023, https://arxiv.org/abs/2309.02784). What is stored is as large as before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pocketslm.export.heal import HealConfig, forward_kl, learning_rate
from pocketslm.export.quantize.grid import Grid, Spec, half
from pocketslm.models.tensors import Array, QuantTensor, Weight

# The rate is that of factors around 1: a step changes a scale by a thousandth.
CONFIG = HealConfig(steps=64, batch=4, sequence=256, learning_rate=1e-3)
_JUDGED_EVERY = 8  # steps


def tune(
    model: Any,
    teacher: Any,
    ids: Tensor,
    stored: dict[str, Weight],
    spec_of: Callable[[str], Spec | None],
    progress: Callable[[float], None] = lambda fraction: None,
    config: HealConfig = CONFIG,
) -> dict[str, Weight]:
    """``stored``, the rounded weights of ``model``, with scales, minimums and norms tuned.

    Both are reference models, ``teacher`` the unrounded one; ``ids`` [B, S] are tokens to learn
    from; an eighth of them judges instead, and the best values by it are kept, so that a model that
    only learns its text by heart stays as it was. ``model`` ends with what is returned in place.
    Raises ExportError where a tuned value is too large to be stored.
    """
    model.requires_grad_(False)
    learnt = _learnt(model, stored)
    trained = [parameter for part in learnt.values() for parameter in part.parameters()]
    optimizer = torch.optim.Adam(trained, betas=(0.9, 0.95))
    sequences = ids.reshape(-1, min(config.sequence, ids.shape[1])).to(model.device)
    aside = max(1, len(sequences) // 8)
    judges, sequences = sequences[:aside], sequences[min(aside, len(sequences) - 1) :]

    def divergence(batch: Tensor) -> Tensor:
        with torch.no_grad():
            target, _ = teacher(batch, teacher.empty_cache(len(batch)))
        logits, _ = model(batch, model.empty_cache(len(batch)))
        return forward_kl(target, logits)

    def judged() -> float:
        with torch.no_grad():
            return float(torch.stack([divergence(part[None]) for part in judges]).mean())

    least, best = judged(), [parameter.detach().clone() for parameter in trained]
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        drawn = np.random.default_rng((config.seed, step)).integers(0, len(sequences), config.batch)
        divergence(sequences[torch.from_numpy(drawn)]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % _JUDGED_EVERY == 0 and (loss := judged()) < least:
            least, best = loss, [parameter.detach().clone() for parameter in trained]
        progress((step + 1) / config.steps)
    with torch.no_grad():
        for parameter, value in zip(trained, best, strict=True):
            parameter.copy_(value)
    return stored | {name: _settle(model, name, stored.get(name), spec_of) for name in learnt}


class Levels(nn.Module):
    """A rounded matrix: ``(code - zero) * scale * (1 + gain) + minimum + scale * shift``."""

    def __init__(self, weight: QuantTensor, device: torch.device) -> None:
        super().__init__()
        rows, _ = weight.shape

        def groups(values: Array) -> Tensor:
            return torch.from_numpy(values).to(device).view(rows, -1, 1)

        self.codes = torch.from_numpy(weight.unpacked()).to(device)
        self.group = weight.group_size
        self.zeros: Tensor | float = 2.0 ** (weight.bits - 1)
        if weight.zero_points is not None:
            self.zeros = groups(weight.zero_points)
        self.base = groups(weight.scales.astype(np.float32))
        self.gain = nn.Parameter(torch.zeros_like(self.base))
        self.low: Tensor | None = None
        if weight.minimums is not None:
            self.zeros, self.low = 0.0, groups(weight.minimums.astype(np.float32))
            self.shift = nn.Parameter(torch.zeros_like(self.base))

    def scales(self) -> Tensor:
        return self.base * (1 + self.gain)

    def minimums(self) -> Tensor | None:
        return None if self.low is None else self.low + self.base * self.shift

    def forward(self, weight: Tensor) -> Tensor:
        codes = self.codes.view(len(weight), -1, self.group).float()
        values, low = (codes - self.zeros) * self.scales(), self.minimums()
        return (values if low is None else values + low).view_as(weight)


class Gain(nn.Module):
    """A norm's weight times ``1 + gain``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (1 + self.gain)


def _learnt(model: Any, stored: dict[str, Weight]) -> dict[str, Levels | Gain]:
    """What trains, by the name of the weight it stands for, registered with ``model``."""
    learnt: dict[str, Levels | Gain] = {}
    for name, parameter in list(model.named_parameters()):
        weight = stored.get(name)
        if isinstance(weight, QuantTensor):
            learnt[name] = Levels(weight, parameter.device)
        elif name.endswith("norm.weight"):
            learnt[name] = Gain(parameter)
    for name, part in learnt.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        parametrize.register_parametrization(module, "weight", part)
    return learnt


@torch.no_grad()
def _settle(
    model: Any, name: str, weight: Weight | None, spec_of: Callable[[str], Spec | None]
) -> Weight:
    """The tuned weight as it is stored, also put back into ``model``."""
    module = model.get_submodule(name.removesuffix(".weight"))
    (part,) = module.parametrizations["weight"]
    parametrize.remove_parametrizations(module, "weight")
    if isinstance(part, Gain):
        norm: Array = module.weight.cpu().numpy()
        return norm
    spec = spec_of(name)
    assert isinstance(weight, QuantTensor)
    assert spec is not None
    low = part.minimums()
    if spec.kind == "min8":
        assert low is not None
        whole = Grid(spec, part.scales(), torch.zeros_like(low), low).whole()
        settled = QuantTensor.with_whole_scales(weight.codes, spec.bits, weight.group_size, whole)
    else:
        settled = replace(
            weight,
            scales=_fp16(spec.held(part.scales())),
            minimums=None if low is None else _fp16(half(low)),
        )
    module.weight.copy_(torch.from_numpy(settled.dequantize()))
    return settled


def _fp16(values: Tensor) -> Array:
    """[N, G, 1] as [N, G]."""
    array: Array = values[..., 0].cpu().numpy().astype(np.float16)
    return array
