"""Adapt-Pruner: its schedule and scores by the paper's formulas, and what is left of a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import support
from pocketslm.cli import main
from pocketslm.errors import ExportError, UsageError
from pocketslm.export.heal import HealConfig, heal, heal_folder
from pocketslm.export.prune import adaptive, depth, width
from pocketslm.export.prune.folder import RECORD_FILE
from pocketslm.export.prune.pruned import Changed
from pocketslm.models.checkpoint import Checkpoint, open_checkpoint
from pocketslm.models.config import ModelConfig
from pocketslm.models.reference import load_reference
from pocketslm.runtime.backends import open_session
from pocketslm.runtime.bundle import open_bundle

MAX_GRAPH_ERROR = 0.02  # of float weights over an fp16 cache and an 8-bit head
MAX_LOGIT_ERROR = 1e-4  # of a model with parts masked against one without them, in fp32
MAX_SCORE_ERROR = 1e-4  # relative, of sums of products in another order


def sized(**changes: Any) -> ModelConfig:
    return support.tiny(
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        **changes,
    )


CONFIG = sized()
IDS = torch.from_numpy(np.random.default_rng(0).integers(0, 264, (3, 24)))
TEXT = np.random.default_rng(1).integers(0, 256, 600)
QUICK = HealConfig(steps=8, batch=4, sequence=16, learning_rate=1e-3, checkpoint_every=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(support.write_hf(tmp_path_factory.mktemp("adaptive") / "hf", CONFIG))


def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(IDS, model.empty_cache(len(IDS)))[0]
    return out.detach()


def max_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max())


def test_the_schedule_spares_important_layers_and_keeps_the_mean() -> None:
    before, importance = [0.1, 0.2, 0.3, 0.2], [-0.9, -0.95, -0.99, -0.96]
    after = adaptive.schedule(before, importance, 0.03, 0.02)
    assert np.mean(after) == pytest.approx(np.mean(before) + 0.03)
    assert after[0] == pytest.approx(0.1 + 0.03 - 0.02)  # the largest, so scaled to 1
    assert after[2] - before[2] > after[3] - before[3] > after[1] - before[1] > after[0] - before[0]
    assert adaptive.schedule(before, importance, 0.03, 0.0) == pytest.approx(
        [s + 0.03 for s in before]
    )
    assert adaptive.schedule([0.0, 0.5], [1.0, -1.0], 0.01, 0.02) == pytest.approx([0.0, 0.53])
    assert adaptive.schedule([0.98, 0.98], [2.0, 2.0], 0.05, 0.02) == [0.99, 0.99]


def test_importance_and_scores_are_the_paper_s(checkpoint: Checkpoint) -> None:
    model = load_reference(checkpoint)
    importance, scores = adaptive.measure(model, IDS)
    influence = depth.block_influence(model, IDS)
    assert importance == pytest.approx([value - 1 for value in influence], abs=1e-5)
    plain = load_reference(checkpoint).requires_grad_(True)
    out = plain(IDS, plain.empty_cache(3))[0][:, :-1].flatten(0, 1)
    F.cross_entropy(out, IDS[:, 1:].flatten()).backward()
    block = plain.model.layers[2]
    taylor = {
        name: (weight * weight.grad).abs().detach() for name, weight in block.named_parameters()
    }
    neuron = taylor["mlp.gate_proj.weight"][7].sum() + taylor["mlp.up_proj.weight"][7].sum()
    neuron += taylor["mlp.down_proj.weight"][:, 7].sum()
    heads, values = slice(2 * 16, 4 * 16), slice(16, 32)  # of the second KV head
    head = taylor["self_attn.q_proj.weight"][heads].sum()
    head += taylor["self_attn.o_proj.weight"][:, heads].sum()
    for part in ("k_proj", "v_proj"):
        head += taylor[f"self_attn.{part}.weight"][values].sum()
    assert abs(float(scores.neurons[2][7] / neuron) - 1) < MAX_SCORE_ERROR
    assert abs(float(scores.groups[2][1] / head) - 1) < MAX_SCORE_ERROR


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_what_adds_nothing_goes_first_and_changes_nothing(
    architecture: str, tmp_path: Path
) -> None:
    config = sized(architecture=architecture, attention_bias=architecture == "qwen2")
    whole = open_checkpoint(support.write_hf(tmp_path / "hf", config))
    model = load_reference(whole)
    dead = torch.zeros(256, dtype=torch.bool)
    dead[3:131:2] = True  # 64
    for layer in model.model.layers:
        layer.mlp.down_proj.weight[:, dead] = 0
        layer.mlp.up_proj.weight[dead] = 0
    expected, trained = logits(model), Changed(whole, model, "dead")
    share = 64 / 256 * 256 * 3 / (256 * 3 + 3 * 2 * 3 * 16)
    kept = adaptive.prune(model, adaptive.everything(config), IDS, share, amplitude=0)
    assert all(torch.equal(neurons, ~dead) for neurons in kept.neurons)
    assert all(groups.all() for groups in kept.groups)
    assert max_error(logits(model), expected) < MAX_LOGIT_ERROR
    narrow = load_reference(width.Narrowed(trained, kept))
    assert narrow.config.intermediate_size == 192
    assert max_error(logits(narrow), expected) < MAX_LOGIT_ERROR


def test_amplitude_zero_is_uniform_and_another_is_not(checkpoint: Checkpoint) -> None:
    widths = {}
    for amplitude in (0.0, 0.02):
        seen: list[float] = []
        model = load_reference(checkpoint)
        whole = adaptive.everything(CONFIG)
        kept = adaptive.prune(model, whole, IDS, 0.4, amplitude=amplitude, progress=seen.append)
        assert abs(adaptive.share_removed(CONFIG, kept) - 0.4) < 0.04  # 32 neurons are a tenth
        assert seen == sorted(seen)
        narrow = width.Narrowed(checkpoint, kept)
        assert max_error(logits(load_reference(narrow)), logits(model)) < MAX_LOGIT_ERROR
        widths[amplitude] = narrow.config.layers
        assert all(layer.mlp.width % 32 == 0 for layer in narrow.config.layers)
    assert len(set(widths[0.0])) == 1
    assert len(set(widths[0.02])) > 1


def test_no_layer_is_ever_empty(checkpoint: Checkpoint) -> None:
    model, whole = load_reference(checkpoint), adaptive.everything(CONFIG)
    with pytest.raises(ExportError, match="a share of 0.97 to remove"):
        adaptive.prune(model, whole, IDS, 0.97)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(UsageError, match="adaptive is"):
            adaptive.check_share(share)
    with pytest.raises(UsageError, match="leave lora_rank or adaptive out"):
        HealConfig(adaptive=0.2, lora_rank=4)


class Stopped(Exception):
    pass


def test_pruning_while_healing_resumes_and_ends_narrow(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []
    students: list[tuple[Any, width.Widths]] = []

    def prune(model: Any, kept: width.Widths, ids: torch.Tensor, share: float) -> width.Widths:
        shares.append(share)
        students.append((model, original(model, kept, ids, share)))
        return students[-1][1]

    original = adaptive.prune
    monkeypatch.setattr(adaptive, "prune", prune)
    config = replace(QUICK, adaptive=0.3, stages=2, learning_rate=1e-4)
    whole, losses = heal(checkpoint, checkpoint, TEXT, tmp_path / "whole", config)
    assert shares == [0.15, 0.3]
    student, kept = students[-1]
    for layer, neurons in zip(student.model.layers, kept.neurons, strict=True):
        assert not layer.mlp.down_proj.weight[:, ~neurons].any()  # training did not wake them up
    assert 0 < losses[3] < losses[4]  # the second stage hurts, too
    narrowed = sum(layer.mlp.width for layer in whole.config.layers)
    assert narrowed < 0.8 * 4 * 256

    def stop(step: int, steps: int, kl: float) -> None:
        if step == 5:
            raise Stopped

    with pytest.raises(Stopped):
        heal(checkpoint, checkpoint, TEXT, tmp_path / "stopped", config, stop)
    resumed, again = heal(checkpoint, checkpoint, TEXT, tmp_path / "stopped", config)
    assert again == losses
    for (name, value), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_the_commands_write_layers_of_their_own_size_that_export(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike. " * 60)
    source, out = str(checkpoint.path), tmp_path / "pruned"
    command = [
        "prune",
        source,
        str(out),
        "--text",
        str(text),
        "--tokens",
        "512",
        "--adaptive",
        "0.4",
    ]
    assert main(command) == 0
    assert "neurons" in capsys.readouterr().out
    assert json.loads((out / RECORD_FILE).read_text())["adaptive"] == 0.4
    pruned = open_checkpoint(out)
    assert not pruned.config.is_uniform
    assert main(["export", str(out), str(tmp_path / "bundle"), "--weights", "float"]) == 0
    bundle = open_bundle(tmp_path / "bundle")
    expected = logits(load_reference(pruned))[0]
    assert len(bundle.graphs) > 1
    for graph in bundle.graphs:
        got = open_session(bundle, graph.backend, threads=1).forward(
            IDS[0].numpy(), all_logits=True
        )
        assert float((torch.from_numpy(got) - expected).std() / expected.std()) < MAX_GRAPH_ERROR
    config = replace(QUICK, steps=2, stages=1, adaptive=0.4)
    heal_folder(checkpoint, checkpoint, text, tmp_path / "healed", config)
    healed = open_checkpoint(tmp_path / "healed").config
    assert sum(layer.mlp.width for layer in healed.layers) < 0.8 * 4 * 256
