"""Mixed precision: what is measured, and what a size budget buys."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import support
from pocketslm.cli import main
from pocketslm.errors import ExportError
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.quantize.calibration import quantize_layers
from pocketslm.export.quantize.grid import Spec
from pocketslm.export.quantize.sensitivity import (
    WIDTHS,
    Site,
    all_sites,
    allocate,
    mixed_precision,
    sensitivities,
)
from pocketslm.export.recipe import Recipe
from pocketslm.models.checkpoint import EMBEDDING, open_checkpoint
from pocketslm.models.reference import load_reference

IDS = torch.from_numpy(np.random.default_rng(0).integers(0, 264, (5, 250)))
MEASURED, OTHERS = IDS[:4], IDS[4:]  # four windows are the most within 1024 tokens


@pytest.mark.parametrize("method", ["rtn", "search", "search+gptq"])
@pytest.mark.parametrize("tied", [True, False])
def test_each_site_is_measured_alone(tied: bool, method: str, tmp_path: Path) -> None:
    """Against the definition: a whole forward pass with that site rounded as an export rounds."""
    config = replace(support.TINY, tie_word_embeddings=tied)
    folder = support.write_hf(tmp_path / "model", config)
    text = None if method == "rtn" else "given"
    recipe = Recipe(weights="int4", head="int4", method=method, calibration=text)
    model = load_reference(open_checkpoint(folder))
    seen: list[float] = []
    found = sensitivities(model, IDS, recipe, progress=seen.append)
    assert seen[-1] == 1
    sites = all_sites(config)
    assert list(found) == sites
    exact = model(MEASURED, model.empty_cache(4))[0].log_softmax(-1)  # the model is whole again
    for site, bits in ((sites[0], 3), (sites[5], 2), ((EMBEDDING,), 3), (sites[-1], 2)):
        scheme = f"int{bits}"
        rounding = replace(recipe, weights=scheme, head=scheme)
        rounded = load_reference(open_checkpoint(folder))

        def spec(name: str, site: Site = site, rounding: Recipe = rounding) -> Spec | None:
            return rounding.spec(name, quantized=False) if name in site else None

        if text is None or (site == (EMBEDDING,) and not tied):
            for name in site:
                weight = rounding.apply(name, rounded.get_parameter(name).numpy())
                rounded.get_parameter(name).copy_(torch.from_numpy(weight.dequantize()))  # type: ignore[union-attr]
        else:
            list(quantize_layers(rounded, OTHERS, spec, recipe.fit, use_gptq=recipe.use_gptq))
        got = rounded(MEASURED, rounded.empty_cache(4))[0].log_softmax(-1)
        kl = float((exact.exp() * (exact - got)).sum(-1)[:, ::2].mean())
        assert found[site][bits] == pytest.approx(kl, rel=1e-3)
    for losses in found.values():
        assert list(losses) == sorted(losses)
        assert losses[2] > losses[4] > losses[5] > losses[6] > losses[8] > 0


def test_a_step_that_does_not_quite_fit_is_paid_by_others() -> None:
    """The large one at 4 bits and some small ones at 2 is best, though each small step buys more a
    byte; also where the sizes are no whole steps."""
    for unit in (1, 1001):
        costs = {("large",): {2: 200 * unit, 4: 400 * unit}}
        losses = {("large",): {2: 3.0, 4: 0.0}}
        for i in range(10):
            costs[f"{i}",] = {2: 10 * unit, 4: 20 * unit}
            losses[f"{i}",] = {2: 0.2, 4: 0.0}
        found = allocate(losses, costs, 580 * unit)
        assert found["large",] == 4
        assert sorted(found.values()) == [2, 2] + [4] * 9


def test_bytes_go_where_they_buy_most() -> None:
    costs = {("a",): {4: 100, 8: 200}, ("b",): {4: 50, 8: 100}, ("c",): {4: 5, 8: 10}}
    losses = {("a",): {4: 9.0, 8: 1.0}, ("b",): {4: 7.0, 8: 1.0}, ("c",): {4: 2.0, 8: 1.0}}
    assert allocate(losses, costs, 155) == {("a",): 4, ("b",): 4, ("c",): 4}
    assert allocate(losses, costs, 159) == {("a",): 4, ("b",): 4, ("c",): 4}
    assert allocate(losses, costs, 214) == {("a",): 4, ("b",): 8, ("c",): 8}
    assert allocate(losses, costs, 1000) == {("a",): 8, ("b",): 8, ("c",): 8}


def test_allocation_is_the_best_of_all() -> None:
    """Against every choice for six sites of other sizes and sensitivities."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        sizes, weights = rng.integers(10, 100, 6), rng.uniform(0.1, 10, 6)
        costs = {(str(i),): {b: int(n) * b for b in WIDTHS} for i, n in enumerate(sizes)}
        losses = {(str(i),): {b: w * 4.0**-b for b in WIDTHS} for i, w in enumerate(weights)}
        room = int(sizes.sum() * 3.7)
        found = allocate(losses, costs, room)
        assert sum(costs[site][bits] for site, bits in found.items()) <= room
        best = min(
            sum(losses[site][bits] for site, bits in zip(costs, choice, strict=True))
            for choice in itertools.product(WIDTHS, repeat=6)
            if sum(costs[site][bits] for site, bits in zip(costs, choice, strict=True)) <= room
        )
        assert sum(losses[site][bits] for site, bits in found.items()) == pytest.approx(best)


@pytest.mark.parametrize("grid", ["sym", "zp", "min", "min8"])
def test_the_bundle_keeps_to_the_size(grid: str, tiny_hf: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_hf)
    least = "int4" if grid == "zp" else "int2"
    base = Recipe(weights="int4", grid=grid)  # type: ignore[arg-type]
    sizes = []
    for name in (least, "int8"):
        whole = Recipe(weights=name, head=name, grid=grid)  # type: ignore[arg-type]
        sizes.append(sum(export_bundle(checkpoint, tmp_path / name, whole).weights.values()))
    budget = (sizes[0] + sizes[1]) / 2 / 1e6
    recipe = mixed_precision(checkpoint, base, IDS, budget)
    assert len(set(recipe.overrides.values())) > 1
    made = sum(export_bundle(checkpoint, tmp_path / "mixed", recipe).weights.values())
    assert 0.9 * budget * 1e6 < made <= budget * 1e6
    smallest = mixed_precision(checkpoint, base, IDS, sizes[0] / 1e6 + 1e-9)
    assert set(smallest.overrides.values()) == {least}
    with pytest.raises(ExportError, match=f"weights of {least[3:]} bits take"):
        mixed_precision(checkpoint, base, IDS, sizes[0] / 1e6 - 1e-3)


def test_windows_end_with_the_model_s_positions(tmp_path: Path) -> None:
    few = replace(support.TINY, max_position_embeddings=64)
    folder = support.write_hf(tmp_path / "hf", few)
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike. " * 60)
    command = ["export", str(folder), str(tmp_path / "b"), "--calibration", str(text)]
    assert main([*command, "--calibration-tokens", "512", "--size", "0.08"]) == 0


def test_the_option_writes_the_choice_into_the_recipe(
    tmp_path: Path, tiny_hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike. " * 60)
    command = ["export", str(tiny_hf), str(tmp_path / "b"), "--calibration", str(text)]
    command += ["--calibration-tokens", "1024"]
    assert main([*command, "--size", "0.08", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert sum(made["weights"].values()) <= 80_000
    recipe = made["recipe"]
    assert (recipe["method"], recipe["grid"]) == ("search+gptq", "min8")
    assert len(set(recipe["overrides"].values())) > 1
