"""Pruning: what is taken out, and that the rest computes what masking would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ROWS, write_folder

import support
from pocketslm.cli import main
from pocketslm.errors import CheckpointError, ExportError, UsageError
from pocketslm.export.evaluate import evaluate_bundle
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.prune import depth, width
from pocketslm.export.prune.folder import RECORD_FILE, PruneConfig
from pocketslm.export.recipe import Recipe
from pocketslm.models.checkpoint import ORIGIN_FILE, open_checkpoint
from pocketslm.models.config import LayerSize, ModelConfig
from pocketslm.models.hf_writer import save_hf
from pocketslm.models.reference import load_reference
from pocketslm.models.tensors import QuantTensor
from pocketslm.runtime.backends import open_session
from pocketslm.runtime.bundle import open_bundle, read_manifest

MAX_GRAPH_ERROR = 0.02  # of float weights over an fp16 cache and an 8-bit head
MAX_LOGIT_ERROR = 1e-4  # of a model with parts masked against one without them, in fp32
SIX = support.tiny(num_hidden_layers=6)
IDS = torch.from_numpy(np.random.default_rng(0).integers(0, 264, (3, 40)))


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of six layers, of which layers 2 and 3 add nothing."""
    folder = support.write_hf(tmp_path_factory.mktemp("six") / "hf", SIX)
    model = load_reference(open_checkpoint(folder))
    for layer in (2, 3):
        model.model.layers[layer].self_attn.o_proj.weight.zero_()
        model.model.layers[layer].mlp.down_proj.weight.zero_()
    save_hf(open_checkpoint(folder), folder, model)
    return folder


def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(IDS, model.empty_cache(len(IDS)))[0]
    return out


def max_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max())


def test_layers_that_add_nothing_go_first_and_change_nothing(six: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(six)
    model = load_reference(checkpoint)
    influence = depth.block_influence(model, IDS)
    assert influence[2:4] == pytest.approx([0, 0], abs=1e-6)
    assert min(influence[:2] + influence[4:]) > 1e-3
    assert depth.least_influence(influence, 2) == [2, 3]
    save_hf(depth.WithoutLayers(checkpoint, [3, 2]), tmp_path)
    pruned = load_reference(open_checkpoint(tmp_path))
    assert pruned.config.num_hidden_layers == 4
    assert torch.equal(logits(pruned), logits(model))
    other = load_reference(depth.WithoutLayers(checkpoint, [1, 2]))
    assert max_error(logits(other), logits(model)) > MAX_LOGIT_ERROR


def test_sleb_is_the_greedy_choice_by_whole_evaluations(tiny_hf: Path, tmp_path: Path) -> None:
    """Against the definition: build each model without one more layer, take the least loss."""
    checkpoint = open_checkpoint(support.write_hf(tmp_path, SIX))
    seen: list[float] = []
    found = depth.sleb(load_reference(checkpoint), IDS, 2, seen.append)
    assert len(seen) == 4 + 3
    assert seen[-1] == 1
    expected: list[int] = []
    for _ in range(2):
        losses = {}
        for layer in set(range(1, 5)) - set(expected):
            model = load_reference(depth.WithoutLayers(checkpoint, [*expected, layer]))
            out = logits(model)[:, :-1].flatten(0, 1)
            losses[layer] = float(torch.nn.functional.cross_entropy(out, IDS[:, 1:].flatten()))
        expected.append(min(losses, key=lambda layer: losses[layer]))
    assert found == expected


def test_depth_pruning_carries_blocks(tiny_gguf: Path) -> None:
    whole = open_checkpoint(tiny_gguf)
    weight = depth.WithoutLayers(whole, [0]).weight("model.layers.0.mlp.up_proj.weight")
    source = whole.weight("model.layers.1.mlp.up_proj.weight")
    assert isinstance(weight, QuantTensor)
    assert isinstance(source, QuantTensor)
    np.testing.assert_array_equal(weight.codes, source.codes)


def test_last_layers() -> None:
    assert depth.last(30, 3) == [27, 28, 29]


def test_the_command_writes_a_smaller_model_that_exports(six: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "pruned"
    text.write_text("All happy families are alike. " * 60)
    options = ["--layers", "2", "--neurons", "64", "--kv-heads", "1", "--channels", "32"]
    command = ["prune", str(six), str(out), "--text", str(text), "--tokens", "1024", *options]
    assert main(command) == 0
    record = json.loads((out / RECORD_FILE).read_text())
    assert len(record["removed_layers"]) == 2
    assert main(command) == 2  # it exists already
    assert main(["export", str(out), str(tmp_path / "bundle"), "--weights", "float"]) == 0
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.manifest is not None
    config = ModelConfig.from_dict(bundle.manifest.architecture)
    assert config.hidden_size == 32
    assert [layer.size for layer in config.layers] == [LayerSize(2, 1, 64)] * 4
    expected = logits(load_reference(open_checkpoint(out)))[0]
    for graph in bundle.graphs:
        got = open_session(bundle, graph.backend, threads=1).forward(
            IDS[0].numpy(), all_logits=True
        )
        assert float((torch.from_numpy(got) - expected).std() / expected.std()) < MAX_GRAPH_ERROR


def test_prune_refuses_what_makes_no_sense(six: Path) -> None:
    with pytest.raises(UsageError, match="nothing to prune"):
        PruneConfig()
    with pytest.raises(UsageError, match="'guess'"):
        PruneConfig(layers=1, by="guess")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="at most 4 of 6"):
        depth.sleb(load_reference(open_checkpoint(six)), IDS, 5)


@pytest.mark.parametrize("removed", [[6], [-1], list(range(6))])
def test_layers_that_cannot_go(removed: list[int], six: Path) -> None:
    with pytest.raises(ExportError, match="expected some of"):
        depth.WithoutLayers(open_checkpoint(six), removed)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_narrowed_is_masked(architecture: str, tmp_path: Path) -> None:
    """Zeros in the whole model, and the parts really gone, compute the same."""
    biased = architecture == "qwen2"
    config = support.tiny(architecture=architecture, attention_bias=biased)
    checkpoint = open_checkpoint(support.write_hf(tmp_path / "hf", config))
    masked = load_reference(checkpoint)
    kept = width.keep_top(width.random_importance(config, 5), groups=1, neurons=64)
    for layer, groups, neurons in zip(masked.model.layers, kept.groups, kept.neurons, strict=True):
        layer.self_attn.o_proj.weight[:, ~groups.repeat_interleave(2 * 16)] = 0
        layer.mlp.down_proj.weight[:, ~neurons] = 0
    save_hf(width.Narrowed(checkpoint, kept), tmp_path / "narrow")
    narrow = load_reference(open_checkpoint(tmp_path / "narrow"))
    assert [layer.size for layer in narrow.config.layers] == [LayerSize(2, 1, 64)] * 2
    assert max_error(logits(narrow), logits(masked)) < MAX_LOGIT_ERROR


def test_channels_that_are_zero_go_first_and_change_nothing(tmp_path: Path) -> None:
    """A channel that nothing writes is zero everywhere; the norm's mean over fewer is made good."""
    checkpoint = open_checkpoint(support.write_hf(tmp_path / "hf"))
    model = load_reference(checkpoint)
    dead = torch.zeros(64, dtype=torch.bool)
    dead[[3, 11, 40, 41]] = True
    model.model.embed_tokens.weight[:, dead] = 0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[dead] = 0
        layer.mlp.down_proj.weight[dead] = 0
    expected = logits(model)
    kept = width.keep_top(width.activation_importance(model, IDS), channels=60)
    assert torch.equal(kept.channels, ~dead)
    save_hf(checkpoint, tmp_path / "zeros", model)
    narrow = load_reference(width.Narrowed(open_checkpoint(tmp_path / "zeros"), kept))
    blocks = [(b.input_layernorm, b.post_attention_layernorm) for b in narrow.model.layers]
    for norm in (narrow.model.norm, *(norm for block in blocks for norm in block)):
        norm.weight *= (64 / 60) ** 0.5
        norm.eps *= 64 / 60
    assert max_error(logits(narrow), expected) < MAX_LOGIT_ERROR


def test_importance_orders_neurons_by_what_they_do(tiny_hf: Path) -> None:
    model = load_reference(open_checkpoint(tiny_hf))
    model.model.layers[0].mlp.up_proj.weight[7] = 0
    model.model.layers[1].self_attn.v_proj.weight[16:] = 0
    importance = width.activation_importance(model, IDS)
    assert int(importance.neurons[0].argmin()) == 7
    assert importance.groups[1][1] == 0 < importance.groups[1][0]
    with pytest.raises(ExportError, match="97 MLP neurons to keep"):
        width.keep_top(importance, neurons=97)


def test_a_pruned_bundle_is_measured_against_what_it_was_pruned_from(
    six: Path, tmp_path: Path
) -> None:
    """Twice pruned: either of the two it was made from will do, a third will not."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    save_hf(depth.WithoutLayers(open_checkpoint(six), [2]), once)
    save_hf(depth.WithoutLayers(open_checkpoint(once), [2]), twice)
    checkpoint = open_checkpoint(twice)
    assert checkpoint.notes == ["layers [2] of 6 were removed", "layers [2] of 5 were removed"]
    export_bundle(checkpoint, tmp_path / "out", Recipe(weights="float", head="float"))
    text = tmp_path / "text.txt"
    text.write_text("etaoin shrdlu " * 20)
    for source in (six, once, twice):
        quality = evaluate_bundle(
            tmp_path / "out", source=open_checkpoint(source), text=text, window=32
        )
        assert quality.source == source.name
        assert abs(quality.kl) < MAX_LOGIT_ERROR  # the layers added nothing
    other = support.write_hf(tmp_path / "other", SIX, seed=1)
    with pytest.raises(UsageError, match="SHA-256 differs"):
        evaluate_bundle(tmp_path / "out", source=open_checkpoint(other), text=text, window=32)
    (twice / ORIGIN_FILE).write_text('{"made_from": "nonsense"}')
    with pytest.raises(CheckpointError, match="must be lists of texts"):
        open_checkpoint(twice)


def test_windows_are_no_longer_than_a_models_positions(tmp_path: Path) -> None:
    """GPT-2's positions are a table: beyond its end there is none to learn from."""
    folder, _ = write_folder(tmp_path / "model", ROWS["gpt2"])
    text = tmp_path / "text"
    text.write_text("etaoin shrdlu " * 200)
    common = ["--layers", "1", "--text", str(text), "--tokens", "1024"]
    assert main(["prune", str(folder), str(tmp_path / "pruned"), *common]) == 0
    options = ["--method", "gptq", "--calibration", str(text), "--calibration-tokens", "1024"]
    out = tmp_path / "bundle"
    assert main(["export", str(folder), str(out), *options, "--target", "native"]) == 0
    assert read_manifest(out).recipe["calibration_window"] == 256
