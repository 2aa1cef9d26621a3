"""Mixed precision: what is measured, and what a size budget buys."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import support
from pocketslm.cli import main
from pocketslm.errors import ExportError
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.quantize.sensitivity import allocate, mixed_precision, sensitivities
from pocketslm.export.recipe import Recipe
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.models.reference import load_reference
from pocketslm.models.sites import layer_matrices

IDS = torch.from_numpy(np.random.default_rng(0).integers(0, 264, (2, 50)))
ALL = layer_matrices(support.TINY)


def test_each_site_is_measured_alone(tiny_hf: Path) -> None:
    """Against the definition: a whole forward pass with that site rounded."""
    recipe = Recipe(weights="int4")
    model = load_reference(open_checkpoint(tiny_hf))
    seen: list[float] = []
    found = sensitivities(model, IDS, recipe, ALL, seen.append)
    assert seen[-1] == 1
    exact = model(IDS, model.empty_cache(2))[0].log_softmax(-1)  # the model is whole again
    for site in (ALL[0], ALL[5]):
        rounded = load_reference(open_checkpoint(tiny_hf))
        for name in site:
            weight = recipe.apply(name, rounded.get_parameter(name).numpy())
            rounded.get_parameter(name).copy_(torch.from_numpy(weight.dequantize()))  # type: ignore[union-attr]
        got = rounded(IDS, rounded.empty_cache(2))[0].log_softmax(-1)
        kl = float((exact.exp() * (exact - got)).sum(-1).mean())
        assert found[site] == pytest.approx(kl, rel=1e-3)
    assert min(found.values()) > 1e-5


def test_bytes_go_where_they_buy_most() -> None:
    losses = {("a",): 8.0, ("b",): 6.0, ("c",): 1.0, ("d",): 0.9}
    costs = {("a",): 100, ("b",): 50, ("c",): 5, ("d",): 20}
    assert allocate(losses, costs, 79) == {("c",), ("b",), ("d",)}
    assert allocate(losses, costs, 4) == set()
    assert allocate(losses, costs, 1000) == set(losses)


@pytest.mark.parametrize("grid", ["sym", "zp", "min"])
def test_the_bundle_keeps_to_the_budget(grid: str, tiny_hf: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_hf)
    base = Recipe(weights="int4", grid=grid)  # type: ignore[arg-type]
    sizes = []
    for name, scheme in (("four", "int4"), ("eight", "int8")):
        whole = Recipe(weights=scheme, grid=grid)  # type: ignore[arg-type]
        sizes.append(sum(export_bundle(checkpoint, tmp_path / name, whole).weights.values()))
    budget = (sizes[0] + sizes[1]) / 2 / 1e6
    recipe = mixed_precision(checkpoint, base, IDS, budget)
    assert 0 < len(recipe.overrides) < 14
    made = sum(export_bundle(checkpoint, tmp_path / "mixed", recipe).weights.values())
    smallest_step = 64 * 64 // 2
    assert budget * 1e6 - 4 * smallest_step < made <= budget * 1e6
    assert mixed_precision(checkpoint, base, IDS, sizes[0] / 1e6 + 1e-9).overrides == {}
    with pytest.raises(ExportError, match="int4 weights take"):
        mixed_precision(checkpoint, base, IDS, sizes[0] / 1e6 - 1e-3)


def test_the_option_writes_the_choice_into_the_recipe(
    tmp_path: Path, tiny_hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike. " * 60)
    command = ["export", str(tiny_hf), str(tmp_path / "b"), "--calibration", str(text)]
    command += ["--calibration-tokens", "1024"]
    assert main([*command, "--size-budget", "0.08", "--json", "--method", "search"]) == 0
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    assert set(recipe["overrides"].values()) == {"int8"}
