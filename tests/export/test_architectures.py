"""Every family of the table on every target, held against the PyTorch model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import EVERYWHERE, ROWS, write_folder

from pocketslm.errors import ExportError
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.recipe import Recipe
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.models.reference import load_reference
from pocketslm.runtime.backends import open_session
from pocketslm.runtime.bundle import open_bundle

# Relative to the largest logit: fp32 graphs differ by rounding, the native one by its fp16 cache.
MAX_ERROR = {"onnx": 2e-5, "executorch": 2e-4, "native": 2e-3}
FLOATS = Recipe(weights="float", head="float")
IDS = np.random.default_rng(3).integers(0, 264, 150)
FIRST = 70


@pytest.mark.parametrize("target", EVERYWHERE)
@pytest.mark.parametrize("name", ROWS)
def test_a_target_computes_the_model(name: str, target: str, tmp_path: Path) -> None:
    from dataclasses import replace

    row = ROWS[name]
    folder, _ = write_folder(tmp_path / "model", row)
    checkpoint = open_checkpoint(folder)
    recipe = replace(FLOATS, targets=(target,))
    if target not in row.targets:
        with pytest.raises(ExportError, match="choose another target"):
            export_bundle(checkpoint, tmp_path / "bundle", recipe)
        return
    export_bundle(checkpoint, tmp_path / "bundle", recipe)
    session = open_session(open_bundle(tmp_path / "bundle"), target, threads=2)
    model = load_reference(checkpoint)
    expected, _ = model(torch.from_numpy(IDS)[None], model.empty_cache())
    expected = expected[0].numpy()
    bound = MAX_ERROR[target] * np.abs(expected).max()
    if not checkpoint.config.causal:  # each call is a text of its own
        for _ in range(2):
            whole = session.forward(IDS, all_logits=True)
            assert np.abs(whole - expected).max() <= bound
            assert session.length == 0
        return
    first = session.forward(IDS[:FIRST])
    assert np.abs(first[-1] - expected[FIRST - 1]).max() <= bound
    for position in range(FIRST, FIRST + 4):
        one = session.forward(IDS[position : position + 1])
        assert np.abs(one[-1] - expected[position]).max() <= bound
    rest = session.forward(IDS[FIRST + 4 :])
    assert np.abs(rest[-1] - expected[-1]).max() <= bound
