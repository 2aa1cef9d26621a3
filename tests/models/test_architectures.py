"""Every family of the table against transformers, written back, and through GGUF."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import ROWS, YARN_ROPE, outputs, reread, write_folder
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pocketslm.cli import main
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.models.config import ModelConfig
from pocketslm.models.hf_writer import save_hf
from pocketslm.models.reference import load_reference

# Two fp32 implementations of one model differ by rounding alone.
MAX_LOGIT_ERROR = 1e-3
LENGTH, FIRST = 200, 77


def max_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest absolute difference; NaN if there is one, which no bound accepts."""
    return float((ours - theirs).abs().max())


def some_ids(vocabulary: int) -> torch.Tensor:
    """Any but RoBERTa's padding, 1, for which transformers counts no position."""
    return torch.randint(2, vocabulary, (1, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ROWS)
def test_a_family_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    folder, theirs = write_folder(tmp_path / "model", row)
    checkpoint = open_checkpoint(folder)
    ours = load_reference(checkpoint)
    ids = some_ids(checkpoint.config.vocab_size)
    expected = outputs(row, theirs, ids)
    whole, _ = ours(ids, ours.empty_cache())
    assert max_error(whole, expected) <= MAX_LOGIT_ERROR
    # The same in two pieces, through the states, and the last position alone.
    if checkpoint.config.causal:
        _, cache = ours(ids[:, :FIRST], ours.empty_cache())
        last, _ = ours(ids[:, FIRST:], cache, 1)
        assert max_error(last[:, -1], expected[:, -1]) <= MAX_LOGIT_ERROR
    # Written back: the same configuration for us, the same model for transformers.
    save_hf(checkpoint, tmp_path / "again")
    again = open_checkpoint(tmp_path / "again")
    assert again.config == checkpoint.config
    assert again.notes == checkpoint.notes == []
    theirs = reread(row, tmp_path / "again")
    assert max_error(outputs(row, theirs, ids), expected) <= MAX_LOGIT_ERROR


@pytest.mark.parametrize(
    "name",
    ["llama", "smollm3", "ernie 4.5", "lfm2", "gemma3", "olmo3", "phi2", "gpt_neox"],
)
def test_a_stretched_table_without_a_base_has_the_familys_own(name: str, tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path, ROWS[name])
    path = folder / "config.json"
    data = json.loads(path.read_text())
    for given in ("rope_parameters", "rope_theta", "partial_rotary_factor"):
        data.pop(given, None)
    path.write_text(json.dumps(data | {"rope_scaling": YARN_ROPE}))
    theirs = AutoConfig.from_pretrained(folder)
    kind = {"layer_type": "full_attention"} if name in ("gemma3", "olmo3") else {}
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"), **kind)
    table = open_checkpoint(folder).config.rotaries[0]
    assert table.frequencies(0) == pytest.approx(expected.tolist(), rel=1e-5)
    assert table.factor == pytest.approx(factor)


@pytest.mark.parametrize("name", ROWS)
def test_configurations_as_json(name: str, tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path, ROWS[name])
    config = open_checkpoint(folder).config
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_inspect_tells_equal_layers_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = write_folder(tmp_path, ROWS["gemma3"])
    assert main(["inspect", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "layers 0-4  " in printed
    assert "layers 5  " in printed
    assert printed.count("window 32") == 1
    assert main(["inspect", str(folder), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["architecture"]["stored_layers"]) == 6
