"""What sentence-transformers' files say of pooling, and what of BERT is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import ROWS, write_folder

from pocketslm.errors import CheckpointError
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.models.config import Pooling
from pocketslm.models.pooling import LIMITS, MODULES, PROMPTS, read_pooling, write_pooling

POOLING = "1_Pooling/config.json"


@pytest.mark.parametrize(
    "pooling",
    [
        Pooling("mean", normalize=True, max_tokens=256),
        Pooling("cls", normalize=True, lowercase=True, max_tokens=512),
        Pooling("last"),
        Pooling("mean", prompts={"query": "query: ", "passage": "passage: "}),
    ],
)
def test_what_is_written_is_read(pooling: Pooling, tmp_path: Path) -> None:
    write_pooling(pooling, 64, tmp_path)
    assert read_pooling(tmp_path, 64) == (pooling, [])


def test_without_modules_there_is_no_pooling(tmp_path: Path) -> None:
    assert read_pooling(tmp_path, 64) == (None, [])


def module(kind: str, path: str = "") -> dict[str, Any]:
    return {"type": f"sentence_transformers.models.{kind}", "path": path}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (MODULES, [module("Transformer")], "lists Transformer, expected"),
        (
            MODULES,
            [module("Transformer"), module("Pooling", "1_Pooling"), module("Dense", "2_Dense")],
            "lists Transformer, Pooling, Dense",
        ),
        (MODULES, [module("Transformer", "0"), module("Pooling", "1_Pooling")], "itself"),
        (MODULES, [module("Transformer"), module("Pooling", "../other")], "outside its own"),
        (MODULES, {"type": "x"}, "is not a list of modules"),
        (POOLING, {"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens is not supported"),
        (POOLING, {}, "sets 0 modes of pooling"),
        (
            POOLING,
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            "sets 2 modes of pooling",
        ),
        (POOLING, {"word_embedding_dimension": 32}, "pools 32 values, the model has 64"),
        (LIMITS, {"max_seq_length": -1}, "max_seq_length is -1"),
        (PROMPTS, {"default_prompt_name": "query"}, "default_prompt_name is 'query'"),
        (PROMPTS, {"prompts": {"query": 3}}, "prompts of a pooling are not texts"),
    ],
)
def test_what_is_not_known_is_refused(
    name: str, content: Any, message: str, tmp_path: Path
) -> None:
    write_pooling(Pooling("mean"), 64, tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        read_pooling(tmp_path, 64)


def test_prompts_that_are_not_pooled_and_unknown_fields_are_named(tmp_path: Path) -> None:
    write_pooling(Pooling("mean", prompts={"query": "Query: ", "document": ""}), 64, tmp_path)
    given = json.loads((tmp_path / POOLING).read_text())
    (tmp_path / POOLING).write_text(json.dumps(given | {"include_prompt": False}))
    (tmp_path / LIMITS).write_text(json.dumps({"new_field": 3}))
    pooling, said = read_pooling(tmp_path, 64)
    assert pooling == Pooling("mean")
    notes = "\n".join(said)
    assert "include_prompt is false, so these prompts are not put before texts: query" in notes
    assert "new_field" in notes


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("position_embedding_type", "relative_key", "expected 'absolute'"),
        ("is_decoder", True, "only encoders"),
        ("num_key_value_heads", 2, "do not fill the hidden size"),
        ("head_dim", 32, "do not fill the hidden size"),
        ("hidden_act", "tanh", "activation 'tanh' is not supported"),
    ],
)
def test_berts_of_another_shape_are_refused(
    field: str, value: Any, message: str, tmp_path: Path
) -> None:
    folder, _ = write_folder(tmp_path, ROWS["bert"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_names_may_have_a_prefix_and_heads_of_training_are_not_read(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder, _ = write_folder(tmp_path, ROWS["bert"])
    plain = load_file(folder / "model.safetensors")
    assert "embeddings.LayerNorm.weight" in plain
    assert "pooler.dense.weight" in plain
    checkpoint = open_checkpoint(folder)
    names = ["model.embed_positions.weight", "model.layers.3.mlp_post_norm.bias"]
    expected = [checkpoint.weight(name) for name in names]
    prefixed = {f"bert.{name}": tensor for name, tensor in plain.items()}
    prefixed["cls.predictions.bias"] = np.zeros(264, np.float32)
    prefixed["bert.embeddings.position_ids"] = np.arange(256)[None]
    save_file(prefixed, folder / "model.safetensors")
    again = open_checkpoint(folder)
    for name, weight in zip(names, expected, strict=True):
        np.testing.assert_array_equal(again.weight(name), weight)
    save_file(prefixed | {"bert.adapter.weight": np.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="bert.adapter.weight"):
        open_checkpoint(folder)


def test_token_types_of_another_width_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder, _ = write_folder(tmp_path, ROWS["bert"])
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.token_type_embeddings.weight"] = tensors["embeddings.LayerNorm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="token_type_embeddings.* expected rows of 64"):
        open_checkpoint(folder).weight("model.embed_positions.weight")
