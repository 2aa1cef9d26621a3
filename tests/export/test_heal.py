"""Healing: it lowers the divergence, survives interruption, and LoRA changes nothing at first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import support
from pocketslm.errors import UsageError
from pocketslm.export.heal import (
    STATE,
    HealConfig,
    add_lora,
    forward_kl,
    heal,
    heal_folder,
    learning_rate,
)
from pocketslm.models.checkpoint import Checkpoint, open_checkpoint
from pocketslm.models.reference import load_reference

QUICK = HealConfig(steps=12, batch=4, sequence=16, learning_rate=1e-3, checkpoint_every=5)
IDS = np.random.default_rng(0).integers(0, 256, 400)


@pytest.fixture(scope="module")
def teacher(tiny_hf: Path) -> Checkpoint:
    return open_checkpoint(tiny_hf)


@pytest.fixture(scope="module")
def student(teacher: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The teacher without the MLP of its first block."""
    folder = support.write_hf(tmp_path_factory.mktemp("student") / "hf")
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.mlp.down_proj.weight"].zero_()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(folder)


@pytest.mark.parametrize("rank", [None, 8])
def test_healing_lowers_the_divergence(
    student: Checkpoint, teacher: Checkpoint, tmp_path: Path, rank: int | None
) -> None:
    config = replace(QUICK, steps=40, learning_rate=5e-3, lora_rank=rank)
    _, losses = heal(student, teacher, IDS, tmp_path, config)
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


class Stopped(Exception):
    pass


@pytest.mark.parametrize("rank", [None, 4])
def test_a_resumed_run_equals_an_uninterrupted_one(
    student: Checkpoint, teacher: Checkpoint, tmp_path: Path, rank: int | None
) -> None:
    config = replace(QUICK, lora_rank=rank, hidden=True)
    whole, losses = heal(student, teacher, IDS, tmp_path / "whole", config)

    def stop(step: int, steps: int, kl: float) -> None:
        if step == 8:
            raise Stopped

    with pytest.raises(Stopped):
        heal(student, teacher, IDS, tmp_path / "stopped", config, stop)
    torch.manual_seed(99)  # what else the process drew must not matter
    resumed, again = heal(student, teacher, IDS, tmp_path / "stopped", config)
    assert again == losses
    for (name, value), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(value, other), name
    changed = load_reference(student)
    assert not torch.equal(whole.lm_head.weight, changed.lm_head.weight) or rank is not None


def test_another_run_in_the_same_folder_is_refused(
    student: Checkpoint, teacher: Checkpoint, tmp_path: Path
) -> None:
    heal(student, teacher, IDS, tmp_path, replace(QUICK, steps=1))
    with pytest.raises(UsageError, match="another model, text or setting"):
        heal(student, teacher, IDS, tmp_path, replace(QUICK, steps=1, seed=7))


def _without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state.pop(name)


@pytest.mark.parametrize(
    "damage",
    [
        _without("identity"),
        _without("optimizer"),
        lambda state: state.update(step=-1),
        lambda state: state.update(step="1"),
        lambda state: state.update(losses=[None]),
        lambda state: state.update(kept=3),
        lambda state: state["trained"].pop(),
        lambda state: state["trained"].__setitem__(0, torch.zeros(3)),
        lambda state: state.update(optimizer={"state": 1}),
    ],
)
def test_a_damaged_checkpoint_is_one_line(
    damage: Callable[[dict[str, Any]], Any],
    student: Checkpoint,
    teacher: Checkpoint,
    tmp_path: Path,
) -> None:
    config = replace(QUICK, steps=1)
    heal(student, teacher, IDS, tmp_path, config)
    path = tmp_path / STATE
    state = torch.load(path, weights_only=True)
    damage(state)
    torch.save(state, path)
    content = path.read_bytes()
    for changed in (content, content[: len(content) // 2], b"", b"x" * 100):
        path.write_bytes(changed)
        with pytest.raises(UsageError, match=r"is damaged \(.*remove .* to begin anew") as error:
            heal(student, teacher, IDS, tmp_path, config)
        assert "\n" not in str(error.value)


def test_lora_changes_nothing_at_first(teacher: Checkpoint) -> None:
    plain, lora = load_reference(teacher), load_reference(teacher)
    add_lora(lora, 4)
    ids = torch.from_numpy(IDS[None, :16])
    assert torch.equal(plain(ids, plain.empty_cache())[0], lora(ids, lora.empty_cache())[0])
    trained = {name for name, p in lora.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.endswith((".a", ".b")) for name in trained)


def test_forward_kl_is_torch_s() -> None:
    p, q = torch.randn(2, 2, 3, 11, generator=torch.Generator().manual_seed(0)).unbind()
    expected = F.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="none").sum(-1).mean()
    assert abs(float(forward_kl(p, q) - expected)) < 1e-6
    assert float(forward_kl(p, p)) == 0.0
    assert float(forward_kl(p, q)) != pytest.approx(float(forward_kl(q, p)), rel=1e-3)


def test_the_learning_rate_rises_and_falls() -> None:
    config = HealConfig(steps=100, warmup=0.1, learning_rate=1.0 - 1e-9)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_bad_settings_and_texts_are_errors(
    student: Checkpoint, teacher: Checkpoint, tmp_path: Path
) -> None:
    for change in ({"steps": 0}, {"lora_rank": 0}, {"learning_rate": float("nan")}, {"warmup": 1}):
        with pytest.raises(UsageError, match=next(iter(change))):
            replace(QUICK, **change)
    with pytest.raises(UsageError, match="the text has 16 tokens"):
        heal(student, teacher, IDS[:16], tmp_path, QUICK)
    assert not list(tmp_path.iterdir())


def test_a_healed_folder_is_a_checkpoint(
    student: Checkpoint, teacher: Checkpoint, tmp_path: Path
) -> None:
    text, out = tmp_path / "text", tmp_path / "healed"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    config = replace(QUICK, steps=2)
    losses = heal_folder(student, teacher, text, out, config, held_out=100)
    assert len(losses) == 2
    healed = open_checkpoint(out)
    assert healed.config == student.config
    assert healed.tokenizer_files().keys() == student.tokenizer_files().keys()
    name = "model.layers.1.mlp.up_proj.weight"
    assert not np.array_equal(healed.weight(name), student.weight(name))
    assert {path.name for path in tmp_path.iterdir()} == {"text", "healed"}
    with pytest.raises(UsageError, match="exists already"):
        heal_folder(student, teacher, text, out, config)
    with pytest.raises(UsageError, match="expected more than 16"):
        heal_folder(student, teacher, text, tmp_path / "new", config, held_out=10**6)
    assert not (tmp_path / "new").exists()
