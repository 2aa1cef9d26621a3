"""Export of models larger than memory: matrices come one by one, in pieces, or not at all."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from native_support import SCHEMES, make_weight, packed

import support
from pocketslm.errors import ExportError
from pocketslm.export.lower import native_layout
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.quantize import grid, search
from pocketslm.export.quantize.calibration import quantize_layers
from pocketslm.export.quantize.grid import KINDS, Kind, Spec, round_to_grid
from pocketslm.export.recipe import Recipe
from pocketslm.models.checkpoint import Checkpoint, open_checkpoint
from pocketslm.models.reference import Layers, load_reference, parameter_shapes
from pocketslm.models.tensors import QuantTensor, Weight

IDS = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (4, 16)))


class Counting:
    """A checkpoint that knows how many bytes of what it gave are still in memory."""

    def __init__(self, whole: Checkpoint) -> None:
        self.whole, self.given, self.most = whole, list[weakref.ref[Any]](), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def weight(self, name: str) -> Weight:
        array = np.array(self.whole.weight(name))
        alive = [part for one in self.given if (part := one()) is not None]
        self.most = max(self.most, array.nbytes + sum(part.nbytes for part in alive))
        self.given.append(weakref.ref(array))
        return array


@pytest.mark.parametrize("method", ["rtn", "float", "gptq"])
def test_no_more_than_a_layer_and_a_matrix_are_in_memory(method: str, tmp_path: Path) -> None:
    config = support.tiny(num_hidden_layers=6)
    checkpoint = Counting(open_checkpoint(support.write_hf(tmp_path / "hf", config)))
    sizes = {name: 4 * int(np.prod(shape)) for name, shape in parameter_shapes(config).items()}
    layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    text = tmp_path / "text.txt"
    text.write_text("the rain in spain stays mainly in the plain. " * 9)
    recipe = Recipe(weights="float", head="float")
    if method != "float":
        recipe = Recipe(
            weights="int4",
            method=method,
            calibration=str(text) if method == "gptq" else None,
            calibration_tokens=64,
            calibration_window=16,
        )
    export_bundle(checkpoint, tmp_path / "out", recipe)
    assert len(checkpoint.given) >= len(sizes)
    assert layer / 3 < checkpoint.most <= layer + max(sizes.values())
    assert checkpoint.most < sum(sizes.values()) / 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_is_rounded_in_pieces_as_whole(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(70, 64, generator=torch.Generator().manual_seed(0))
    spec, importance = Spec(4, 32, kind), torch.rand(64)
    whole = round_to_grid(weight, spec, search.fit, importance)
    monkeypatch.setattr(grid, "_CACHED", 64 * 3)
    in_pieces = round_to_grid(weight, spec, search.fit, importance)
    for one, other in zip(whole.arrays(), in_pieces.arrays(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_matrix_is_packed_in_pieces_as_whole(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = make_weight(scheme, 100, 256, np.random.default_rng(1))
    head = scheme == "q8 apart"
    kind, whole = packed(weight, head=head)
    monkeypatch.setattr(native_layout, "_PIECE", 1)  # a block of rows at a time
    kind_, in_pieces = packed(weight, head=head)
    assert kind == kind_
    np.testing.assert_array_equal(whole, in_pieces)


def test_layers_one_at_a_time_are_rounded_as_in_the_whole_model(tiny_hf: Path) -> None:
    checkpoint = open_checkpoint(tiny_hf)
    layers = Layers(checkpoint, 16)
    spec = Spec(4, 32, "min")
    options: dict[str, Any] = {"use_awq": True, "use_gptq": True}
    whole = dict(
        quantize_layers(load_reference(checkpoint), IDS, lambda _: spec, search.fit, **options)
    )
    apart = quantize_layers(
        layers.model, IDS, lambda _: spec, search.fit, hold=layers.held, **options
    )
    for name, weight in apart:
        expected = whole.pop(name)
        if isinstance(weight, QuantTensor):
            assert isinstance(expected, QuantTensor)
            np.testing.assert_array_equal(weight.dequantize(), expected.dequantize())
        else:
            np.testing.assert_array_equal(weight, expected)
    assert not whole
    assert all(p.is_meta for p in layers.model.model.layers.parameters())


def test_too_small_a_disk_is_said_before_anything_is_made(
    tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, out = open_checkpoint(tiny_hf), tmp_path / "out"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(ExportError, match=r"has 0\.0 GB left, this export needs about 0\.0 GB"):
        export_bundle(checkpoint, out, Recipe(targets=("native",)))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=400_000))
    bundle = export_bundle(checkpoint, out, Recipe(targets=("native",)))
    assert 2 * sum(bundle.weights.values()) < 400_000
