"""Weights of 2 to 6 bits through every target: each computes what the rounded weights say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pocketslm.export.pipeline import export_bundle
from pocketslm.export.recipe import Recipe
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.runtime.backends import open_session
from pocketslm.runtime.bundle import open_bundle

IDS = np.arange(2, 40)
# Of the logits' spread: int8 activations here, and one scale a row on ExecuTorch.
TOLERANCE = {"onnx": 0.05, "executorch": 0.3}


def logits(bundle: Path, backend: str) -> np.ndarray:
    session = open_session(open_bundle(bundle), backend, 1, 64)
    return session.forward(IDS, all_logits=True)


@pytest.mark.parametrize(
    ("bits", "grid", "other"),
    [
        (2, "min8", "onnx"),
        (3, "sym", "onnx"),
        (3, "min8", "executorch"),
        (5, "min", "onnx"),
        (6, "min8", "onnx"),
        (6, "sym", "executorch"),
    ],
)
def test_targets_agree(bits: int, grid: str, other: str, tiny_hf: Path, tmp_path: Path) -> None:
    scheme = f"int{bits}"
    recipe = Recipe(weights=scheme, head=scheme, grid=grid, targets=("native", other))  # type: ignore[arg-type]
    manifest = export_bundle(open_checkpoint(tiny_hf), tmp_path / "bundle", recipe)
    assert any(name.startswith(f"{scheme} g32") for name in manifest.weights)
    wide = 4 if bits < 4 else 8
    target = {"onnx": "ONNX", "executorch": "ExecuTorch"}[other]
    assert any(f"weights take {wide} bits in {target}" in note for note in manifest.notes)
    ours, theirs = logits(tmp_path / "bundle", "native"), logits(tmp_path / "bundle", other)
    assert np.sqrt(np.mean((ours - theirs) ** 2)) <= TOLERANCE[other] * ours.std()
