"""Pruning, healing, quantization, deltas and adapters on families beside Llama's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_support import factors, write_adapter
from architectures import ROWS, write_folder

from pocketslm.errors import UsageError
from pocketslm.export.delta import DeltaCheckpoint, make_delta
from pocketslm.export.heal import HealConfig, heal_folder
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.prune.folder import PruneConfig, prune_folder
from pocketslm.export.prune.pruned import Changed
from pocketslm.export.quantize import awq
from pocketslm.export.quantize.grid import Spec
from pocketslm.export.recipe import Recipe
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.models.hf_writer import save_hf
from pocketslm.models.reference import load_reference
from pocketslm.models.sites import sites
from pocketslm.models.updated import WithAdapter
from pocketslm.runtime.backends import open_session
from pocketslm.runtime.bundle import open_bundle
from pocketslm.runtime.model import Model

FAMILIES = ("gemma3", "qwen3", "llama 3", "lfm2")
MAX_FLOAT_ERROR = 1e-5  # of a checkpoint read again
# Of logits, relative to their spread: int4 layers in a random model, against its float weights.
MAX_ROUNDED = 0.5
MAX_AWQ_ERROR = 1e-4
MAX_MERGED_ERROR = 2e-3  # of logits over an fp16 cache
IDS = np.random.default_rng(6).integers(97, 122, 60)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("family") / "hf"
    write_folder(path, ROWS[request.param])
    text = np.random.default_rng(1).integers(97, 122, 6000).astype(np.uint8).tobytes()
    (path.parent / "text.txt").write_bytes(text)
    return path


def logits(checkpoint: Any) -> np.ndarray:
    model = load_reference(checkpoint, 64) if hasattr(checkpoint, "weight") else checkpoint
    out, _ = model(torch.from_numpy(IDS)[None], model.empty_cache())
    array: np.ndarray = out[0].numpy()
    return array


def test_pruned_and_healed_and_read_again(folder: Path, tmp_path: Path) -> None:
    whole, text = open_checkpoint(folder), folder.parent / "text.txt"
    config = PruneConfig(
        layers=1, by="last", kv_heads=1, neurons=64, channels=32, tokens=512, window=64
    )
    pruned = prune_folder(whole, tmp_path / "pruned", config, text)
    again = open_checkpoint(tmp_path / "pruned")
    assert again.config == pruned.config
    assert again.config.num_hidden_layers == whole.config.num_hidden_layers - 1
    assert (again.config.hidden_size, again.config.intermediate_size) == (32, 64)
    assert {a.kv_heads for a in again.config.attentions} == {1}
    assert np.abs(logits(again) - logits(pruned)).max() <= MAX_FLOAT_ERROR
    quick = HealConfig(steps=3, batch=2, sequence=32, lora_rank=2)
    losses = heal_folder(again, whole, text, tmp_path / "healed", quick)
    assert np.isfinite(losses).all()
    healed = open_checkpoint(tmp_path / "healed")
    assert healed.config == again.config
    assert not np.array_equal(logits(healed), logits(again))
    export_bundle(healed, tmp_path / "bundle", Recipe(targets=("native",)))
    session = open_session(open_bundle(tmp_path / "bundle"), "native", threads=1)
    assert np.isfinite(session.forward(IDS)).all()


def test_pruned_at_a_rate_of_its_own(folder: Path, tmp_path: Path) -> None:
    config = PruneConfig(adaptive=0.2, tokens=256, window=64)
    prune_folder(open_checkpoint(folder), tmp_path / "out", config, folder.parent / "text.txt")
    again = open_checkpoint(tmp_path / "out")
    assert np.isfinite(logits(again)).all()


@pytest.mark.parametrize("method", ["awq+search+gptq+tune", "hqq"])
def test_quantized(method: str, folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder)
    recipe = Recipe(
        weights="int4",
        grid="min",
        method=method,
        calibration=str(folder.parent / "text.txt"),
        calibration_tokens=1024,
        calibration_window=64,
        targets=("native",),
    )
    export_bundle(checkpoint, tmp_path / "bundle", recipe)
    session = open_session(open_bundle(tmp_path / "bundle"), "native", threads=1)
    expected = logits(checkpoint)
    error = session.forward(IDS, all_logits=True) - expected
    assert error.std() <= MAX_ROUNDED * expected.std()


def test_a_delta_gives_the_tuned_model_again(folder: Path, tmp_path: Path) -> None:
    base = open_checkpoint(folder)
    model = load_reference(base, 8)
    for name, parameter in model.named_parameters():
        if "layers.1." in name and parameter.dim() == 2:
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_hf(Changed(base, model, "tuned"), tmp_path / "tuned", model)
    tuned = open_checkpoint(tmp_path / "tuned")
    make_delta(base, tuned, tmp_path / "delta.safetensors")
    restored = DeltaCheckpoint(base, tmp_path / "delta.safetensors")
    moved = np.abs(logits(tuned) - logits(base)).mean()
    assert np.abs(logits(restored) - logits(tuned)).mean() < moved


@pytest.mark.parametrize("name", ["gemma3", "qwen3"])
def test_a_carried_adapter_is_the_merged_one(name: str, tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path / "hf", ROWS[name])
    base = open_checkpoint(folder)
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    adapter = write_adapter(tmp_path / "polite", factors(base.config, targets))
    recipe = Recipe(weights="float", head="float", targets=("native",))
    export_bundle(base, tmp_path / "carried", recipe, adapters=[adapter])
    export_bundle(WithAdapter(base, adapter), tmp_path / "merged", recipe)
    model = Model.load(tmp_path / "carried", threads=1)
    plain = model.engine.session.forward(IDS, all_logits=True)
    model.use_adapter("polite")
    got = model.engine.session.forward(IDS, all_logits=True)
    merged = Model.load(tmp_path / "merged", threads=1).engine.session
    expected = merged.forward(IDS, all_logits=True)
    error = (got - expected).std() / expected.std()
    assert error <= MAX_MERGED_ERROR
    assert not (plain - expected).std() / expected.std() <= MAX_MERGED_ERROR


@pytest.mark.parametrize("name", [name for name in ROWS if name != "mobillama"])  # refused there
def test_awq_moves_factors_and_changes_nothing(name: str, tmp_path: Path) -> None:
    """Before anything is rounded: norms and matrices of any family make up for each other."""
    checkpoint = open_checkpoint(write_folder(tmp_path, ROWS[name])[0])
    model = load_reference(checkpoint, 64)
    expected, before = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    for layer, described in zip(model.model.layers, model.config.stored_layers, strict=True):
        hessians = {}
        for site in sites(described):
            width = layer.get_submodule(site.name).weight.shape[1]
            x = torch.randn(300, width, generator=generator) * torch.arange(1, width + 1) ** 2
            hessians[site.name] = x.T @ x / 300
        awq.rescale(layer, described, hessians, Spec(4, 16, "sym"))
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert np.abs(logits(model) - expected).max() <= MAX_AWQ_ERROR


def test_one_mlp_of_all_layers_is_stored_once_and_rounded_once(tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path / "hf", ROWS["mobillama"])
    checkpoint = open_checkpoint(folder)
    for method in ("rtn", "search"):
        recipe = Recipe(weights="int4", method=method, targets=("native",))
        export_bundle(checkpoint, tmp_path / method, recipe)
        session = open_session(open_bundle(tmp_path / method), "native", threads=1)
        expected = logits(checkpoint)
        error = session.forward(IDS, all_logits=True) - expected
        assert error.std() <= MAX_ROUNDED * expected.std()
    own, _ = write_folder(
        tmp_path / "own", replace(ROWS["mobillama"], published={}, shared_mlp=False)
    )
    export_bundle(open_checkpoint(own), tmp_path / "separate", Recipe(targets=("native",)))
    export_bundle(checkpoint, tmp_path / "shared", Recipe(targets=("native",)))
    saved = 3 * 3 * 96 * 64 // 2  # int4: three matrices of three more layers
    sizes = [(tmp_path / n / "model.slm").stat().st_size for n in ("separate", "shared")]
    assert sizes[0] - sizes[1] >= saved


def test_what_changes_layers_one_by_one_refuses_a_shared_mlp(tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path / "hf", ROWS["mobillama"])
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike. " * 200)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(UsageError, match="layers share one MLP"):
        prune_folder(checkpoint, tmp_path / "out", PruneConfig(layers=1, by="last"), text)
    quick = HealConfig(steps=1, batch=1, sequence=32)
    with pytest.raises(UsageError, match="layers share one MLP"):
        heal_folder(checkpoint, checkpoint, text, tmp_path / "out", quick)
    recipe = Recipe(weights="int4", method="gptq", calibration=str(text), calibration_tokens=512)
    with pytest.raises(UsageError, match="layers share one MLP"):
        export_bundle(checkpoint, tmp_path / "out", recipe)
    recipe = Recipe(neurons=64, calibration=str(text), calibration_tokens=512)
    with pytest.raises(UsageError, match="layers share one MLP"):
        export_bundle(checkpoint, tmp_path / "out", recipe)
