"""Shared layers: stored once, run twice, the same numbers as the unrolled model on every target."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import support
from pocketslm.cli import main
from pocketslm.errors import ExportError
from pocketslm.export.heal import HealConfig, heal_folder
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.prune import depth, width
from pocketslm.export.quantize import calibration
from pocketslm.export.recipe import TARGETS, Recipe
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.models.config import ModelConfig
from pocketslm.models.reference import load_reference
from pocketslm.profiling.cost import Cost
from pocketslm.runtime.backends import open_session
from pocketslm.runtime.backends.native import NativeModel
from pocketslm.runtime.bundle import open_bundle, read_manifest
from pocketslm.runtime.tokenizer import load_tokenizer

MAX_FLOAT_ERROR = 1e-5  # of the same sums in another order, of their size
RUN_BYTES = 24000  # of a file: sections, names or nodes of two second runs
FOUR = support.tiny(num_hidden_layers=4)
IDS = torch.from_numpy(np.random.default_rng(0).integers(0, 264, (3, 40)))
RUNNERS = {target: target for target in TARGETS} | {"runner": "native"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Half of four layers; the same shared, as the command writes them; and unrolled by hand."""
    root = tmp_path_factory.mktemp("sharing")
    whole = support.write_hf(root / "whole", FOUR)
    text = root / "text.txt"
    text.write_text("All happy families are alike. " * 200)
    command = ["prune", str(whole), str(root / "shared"), "--text", str(text), "--tokens", "1024"]
    assert main([*command, "--share"]) == 0
    assert main([*command[:2], str(root / "half"), *command[3:], "--layers", "2"]) == 0
    unrolled = support.write_hf(root / "unrolled", FOUR)
    state = load_file(whole / "model.safetensors")
    for name in state:
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            state[name] = state[f"model.layers.{int(layer) // 2 * 2}.{rest}"].clone()
    save_file(state, unrolled / "model.safetensors", metadata={"format": "pt"})
    return {name: root / name for name in ("half", "shared", "unrolled", "text.txt")}


@pytest.fixture(scope="module")
def bundles(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("sharing-bundles")
    with_executorch = find_spec("executorch") is not None
    targets = tuple(t for t in TARGETS if with_executorch or not t.startswith("executorch"))
    recipe = Recipe(weights="int4", head="int8", targets=targets)
    names = ("half", "shared", "unrolled")
    for name in names:
        export_bundle(open_checkpoint(folders[name]), out / name, recipe)
    return {name: out / name for name in names}


def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(IDS, model.empty_cache(len(IDS)))[0]
    return out


def test_the_command_s_folder_runs_every_second_layer_twice(folders: dict[str, Path]) -> None:
    data = json.loads((folders["shared"] / "config.json").read_text())
    assert (data["num_hidden_layers"], data["layer_sharing"]) == (2, True)
    assert data["model_type"] == "mobilellm"  # or transformers would run each layer once
    shared, unrolled = (open_checkpoint(folders[name]) for name in ("shared", "unrolled"))
    assert shared.config.layers == unrolled.config.layers
    assert len(shared.config.stored_layers) == 2
    assert shared.config.state_bytes(9, 4) == unrolled.config.state_bytes(9, 4)
    assert shared.stored_bytes()["F32"] < 0.6 * unrolled.stored_bytes()["F32"]
    model = load_reference(shared)
    assert torch.equal(logits(model), logits(load_reference(unrolled)))
    assert not torch.equal(logits(model), logits(load_reference(open_checkpoint(folders["half"]))))
    x = torch.randn(1, 5, 64)
    assert torch.equal(
        model.run_layer(1, x),
        load_reference(unrolled).run_layer(3, load_reference(unrolled).run_layer(2, x)),
    )
    with pytest.raises(ExportError, match="shares its layers already"):
        depth.Shared(shared)


@pytest.mark.parametrize("backend", RUNNERS)
def test_logits_are_the_unrolled_model_s(backend: str, bundles: dict[str, Path]) -> None:
    if backend.startswith("executorch") and find_spec("executorch") is None:
        pytest.skip("executorch is not installed")

    def run(name: str) -> np.ndarray[Any, Any]:
        session = open_session(open_bundle(bundles[name]), backend, threads=1)
        ids = IDS[0].numpy()
        session.forward(ids[:30])
        session.truncate(20)
        pieces = [ids[20:25], *ids[25:29, None]]
        return np.concatenate([session.forward(piece).copy() for piece in pieces])

    shared = run("shared")
    np.testing.assert_array_equal(shared, run("unrolled"))
    assert np.abs(shared - run("half")).max() > 0.01


def test_weights_are_stored_once(bundles: dict[str, Path]) -> None:
    half, shared, unrolled = map(read_manifest, bundles.values())
    assert shared.weights == half.weights
    assert shared.weights["int4 g32 sym"] * 2 == unrolled.weights["int4 g32 sym"]
    large = [name for name, entry in half.files.items() if entry.bytes > 30000]
    assert {"model.slm", "model.onnx.data"} <= set(large)
    for name in large:
        least, size, most = (each.files[name].bytes for each in (half, shared, unrolled))
        assert 0 <= size - least < RUN_BYTES
        assert most - size >= shared.weights["int4 g32 sym"]


def test_cache_and_computation_are_twice_the_half_s(bundles: dict[str, Path]) -> None:
    half, shared, unrolled = (NativeModel(path / "model.slm") for path in bundles.values())
    assert shared.info.layers == 2 * half.info.layers == unrolled.info.layers
    assert shared.info.macs_per_token == 2 * half.info.macs_per_token
    assert shared.info.bytes_per_token == half.info.bytes_per_token
    _, cost, expected = (
        Cost.of(ModelConfig.from_dict(read_manifest(path).architecture))
        for path in bundles.values()
    )
    assert replace(cost, config=expected.config) == expected
    assert cost.kv_bytes(100, 2) == expected.kv_bytes(100, 2)


def test_calibration_sees_both_runs(folders: dict[str, Path]) -> None:
    """What a shared layer's matrices read is what the two unrolled layers' matrices read."""
    shared, unrolled = (load_reference(open_checkpoint(folders[n])) for n in ("shared", "unrolled"))
    x = shared.model.embed_tokens(IDS)
    found = calibration._hessians(shared, 0, x)
    first = calibration._hessians(unrolled, 0, x)
    second = calibration._hessians(unrolled, 1, unrolled.run_layer(0, x))
    assert len(found) == 4
    for site in found:
        expected = first[site] + second[site]
        assert (found[site] - expected).abs().max() < MAX_FLOAT_ERROR * expected.abs().max()
        assert not (found[site] - first[site]).abs().max() < MAX_FLOAT_ERROR * expected.abs().max()
    both, twice = (width.activation_importance(model, IDS) for model in (shared, unrolled))
    for one, (a, b) in zip(both.neurons, zip(*[iter(twice.neurons)] * 2, strict=True), strict=True):
        assert torch.allclose(one, a + b)


def test_gptq_and_healing_keep_layers_shared(folders: dict[str, Path], tmp_path: Path) -> None:
    shared, teacher = (open_checkpoint(folders[name]) for name in ("shared", "unrolled"))
    text = folders["text.txt"]
    options = {"calibration": str(text), "calibration_tokens": 1024, "calibration_window": 64}
    errors = []
    for method in ("rtn", "awq+search+gptq"):
        recipe = Recipe(weights="int4", method=method, targets=("native",), **options)  # type: ignore[arg-type]
        manifest = export_bundle(shared, tmp_path / method, recipe)
        assert ModelConfig.from_dict(manifest.architecture) == shared.config
        ids = load_tokenizer(tmp_path / method).encode(text.read_text()[:200])
        session = open_session(open_bundle(tmp_path / method), "native", threads=1)
        got = torch.from_numpy(session.forward(np.array(ids), all_logits=True))
        model = load_reference(shared)
        expected = model(torch.tensor([ids]), model.empty_cache())[0][0]
        errors.append(float((got - expected).std() / expected.std()))
    assert errors[1] < errors[0] < 1
    quick = HealConfig(steps=2, batch=2, sequence=16)
    heal_folder(shared, teacher, text, tmp_path / "healed", quick)
    healed = open_checkpoint(tmp_path / "healed")
    assert healed.config == shared.config
    assert not torch.equal(logits(load_reference(healed)), logits(load_reference(shared)))
