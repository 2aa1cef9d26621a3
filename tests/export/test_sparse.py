"""Wanda and N:M zeros by their definition; what heals them keeps every one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pocketslm.cli import main
from pocketslm.errors import ExportError, UsageError
from pocketslm.export.heal import HealConfig, add_lora, heal_folder
from pocketslm.export.prune import sparse
from pocketslm.export.prune.sparse import Pattern, parse_pattern
from pocketslm.models.checkpoint import Checkpoint, open_checkpoint
from pocketslm.models.hf_writer import save_hf
from pocketslm.models.reference import load_reference

IDS = torch.from_numpy(np.random.default_rng(0).integers(0, 264, (3, 24)))
QUICK = HealConfig(steps=4, batch=2, sequence=16, learning_rate=1e-2)
ALL_SITES = [
    f"model.layers.{layer}.{part}_proj.weight"
    for layer in range(2)
    for part in (
        *(f"self_attn.{name}" for name in "qkvo"),
        *(f"mlp.{name}" for name in ("gate", "up", "down")),
    )
]


@pytest.fixture(scope="module")
def checkpoint(tiny_hf: Path) -> Checkpoint:
    return open_checkpoint(tiny_hf)


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2:4 model as the command writes it."""
    place = tmp_path_factory.mktemp("sparse")
    (place / "text").write_text("All happy families are alike. " * 60)
    command = ["prune", str(checkpoint.path), str(place / "out"), "--sparse", "2:4"]
    assert main([*command, "--text", str(place / "text"), "--tokens", "512"]) == 0
    return place / "out"


def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(IDS, model.empty_cache(len(IDS)))[0]
    return out.detach()


def zeros(checkpoint: Checkpoint) -> dict[str, Any]:
    return {name: np.asarray(checkpoint.weight(name)) == 0 for name in ALL_SITES}


def test_patterns() -> None:
    assert parse_pattern("2:4") == Pattern(2, 4)
    assert parse_pattern("0.25") == Pattern(0.75, None)
    assert [str(parse_pattern(text)) for text in ("4:8", "0.5")] == ["4:8", "0.5"]
    for text in ("4:4", "0:4", "1.5", "0.0", "half", "2:4:8", "-0.5", "nan"):
        with pytest.raises(UsageError, match="expected a share of zeros"):
            parse_pattern(text)


def test_scores_are_wanda_s_row_by_row() -> None:
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.5, 9.0, 8.0, 7.0], [8, 7, 6, 5, 4, 3, 2, 1]])
    norms = torch.tensor([9.0, 1.0, 1.0, 0.1, 20.0, 1.0, 1.0, 0.1])
    by_size = sparse.kept_weights(weight, None, Pattern(2, 4))
    assert by_size[0].tolist() == [False, True, True, False, False, True, True, False]
    scored = sparse.kept_weights(weight, norms, Pattern(2, 4))
    assert scored[0].tolist() == [True, True, False, False, True, True, False, False]
    half = sparse.kept_weights(weight, norms, Pattern(0.5, None))
    assert half[0].tolist() == [True, False, False, False, True, True, True, False]
    assert half.sum(1).tolist() == [4, 4]
    most = sparse.kept_weights(weight, norms, parse_pattern("0.25"))
    assert most.sum(1).tolist() == [6, 6]
    with pytest.raises(ExportError, match="3:5 does not divide rows of 8"):
        sparse.kept_weights(weight, norms, Pattern(3, 5))


def test_norms_are_those_of_the_inputs_that_the_sparse_matrices_before_make(
    checkpoint: Checkpoint,
) -> None:
    model, whole = load_reference(checkpoint), load_reference(checkpoint)
    sparse.sparsify(model, IDS, Pattern(2, 4))
    seen: list[torch.Tensor] = []
    down = model.model.layers[1].mlp.down_proj
    down.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten(0, 1)))
    logits(model)
    dense = whole.model.layers[1].mlp.down_proj.weight
    expected = sparse.kept_weights(dense, seen[0].norm(dim=0), Pattern(2, 4))
    assert torch.equal(down.weight, dense * expected)
    by_size = sparse.kept_weights(dense, None, Pattern(2, 4))
    assert not torch.equal(expected, by_size)
    assert torch.equal(model.lm_head.weight, whole.lm_head.weight)


def test_compressed_bytes_are_values_left_and_a_bit_each(checkpoint: Checkpoint) -> None:
    model = load_reference(checkpoint)
    matrices = sum(model.get_parameter(name).numel() for name in ALL_SITES)
    dense = sum(parameter.numel() for parameter in model.parameters()) * 4
    sparse.sparsify(model, IDS, Pattern(4, 8), wanda=False)
    assert sparse.compressed_bytes(model) == dense - 4 * matrices // 2 + matrices // 8


def test_spp_changes_nothing_at_first_and_no_zero_ever(checkpoint: Checkpoint) -> None:
    model = load_reference(checkpoint)
    sparse.sparsify(model, IDS, Pattern(2, 4))
    expected = logits(model)
    before = {name: model.get_parameter(name).clone() for name in ALL_SITES}
    add_lora(model, 16, sparse.Spp)
    assert torch.equal(logits(model), expected)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    for name, weight in before.items():
        update = model.get_submodule(name.removesuffix(".weight"))
        changed = update.weight
        assert torch.equal(changed == 0, weight == 0)
        spp = update.parametrizations.weight[0]
        repeats = len(weight) // 16  # each row of A serves so many rows in succession
        formula = weight * (1 + spp.a.repeat_interleave(repeats, 0) * spp.b)
        assert torch.equal(changed, weight + weight * (spp.a.repeat_interleave(repeats, 0) * spp.b))
        assert float((changed - formula).detach().abs().max()) < 1e-5


@pytest.mark.parametrize("rank", [None, 16])
def test_healing_a_sparse_student_keeps_its_zeros(
    folder: Path, checkpoint: Checkpoint, tmp_path: Path, rank: int | None
) -> None:
    student = open_checkpoint(folder)
    config = replace(QUICK, lora_rank=rank)
    heal_folder(student, checkpoint, folder.parent / "text", tmp_path / "healed", config)
    healed = open_checkpoint(tmp_path / "healed")
    assert healed.sparse == student.sparse == "2:4"
    before, after = zeros(student), zeros(healed)
    for name in ALL_SITES:
        assert before[name].mean() == 0.5
        assert np.array_equal(before[name], after[name])
        assert not np.array_equal(student.weight(name), healed.weight(name))


def test_what_is_not_sparse_may_fill_its_zeros(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The harness sees zeros disappear: as many as a sparse student keeps."""
    model = load_reference(checkpoint)
    sparse.sparsify(model, IDS, Pattern(2, 4))
    save_hf(checkpoint, tmp_path / "student", model)
    text = tmp_path / "text"
    text.write_text("All happy families are alike. " * 60)
    student = open_checkpoint(tmp_path / "student")
    heal_folder(student, checkpoint, text, tmp_path / "healed", QUICK)
    filled = zeros(open_checkpoint(tmp_path / "healed"))
    assert all(part.mean() < 0.1 for part in filled.values())


def test_the_zeros_are_said_to_bring_no_speed(folder: Path) -> None:
    notes = open_checkpoint(folder).notes
    assert any("2:4" in note and "no target skips the zeros" in note for note in notes)
