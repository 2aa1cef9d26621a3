"""A model of random weights is one that we and llama.cpp run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from architectures import ROWS, write_folder

from pocketslm.errors import UsageError
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.models.reference import load_reference
from pocketslm.models.tensors import QuantTensor
from pocketslm.profiling import shape
from pocketslm.profiling.peers import genai_builder


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen2"])
def test_what_is_written_is_a_checkpoint(name: str, tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path / "hf", ROWS[name])
    config = open_checkpoint(folder).config
    shape.write_random(config, tmp_path / "m.gguf")
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.config.stored_layers == config.stored_layers
    assert checkpoint.notes == []
    assert checkpoint.tokenizer_files()
    weight = checkpoint.weight("model.layers.1.mlp.up_proj.weight")
    assert isinstance(weight, QuantTensor)
    values = weight.dequantize()
    assert np.abs(values.mean()) < 0.05 * values.std() + values.std() / 9  # codes are -8 to 7
    assert values.std() == pytest.approx(config.hidden_size**-0.5, rel=0.1)
    load_reference(checkpoint, 8)


def test_what_needs_more_keys_is_refused(tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path / "hf", ROWS["gemma3"])
    with pytest.raises(UsageError, match="no GGUF of random weights for gemma3_text"):
        shape.write_random(open_checkpoint(folder).config, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_genai_s_builder_finds_both_rotary_tables(tmp_path: Path) -> None:
    from transformers import AutoConfig

    folder, _ = write_folder(tmp_path / "hf", ROWS["gemma3 layers"])
    config = genai_builder.flatten(AutoConfig.from_pretrained(folder))
    assert config.rope_parameters["rope_type"] == "linear"
    assert (config.rope_theta, config.rope_local_base_freq) == (50000.0, 3000.0)
    plain, _ = write_folder(tmp_path / "plain", ROWS["qwen3"])
    before = AutoConfig.from_pretrained(plain)
    assert genai_builder.flatten(before) is before
