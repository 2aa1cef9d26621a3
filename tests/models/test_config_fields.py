"""Fields of config.json that foreign folders spell otherwise or leave out: as transformers reads
them, or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ROWS, YARN_ROPE, Row, outputs, reread, write_folder
from transformers import AutoConfig

from pocketslm.errors import CheckpointError
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.models.hf_writer import hf_config, save_hf
from pocketslm.models.reference import load_reference

MAX_LOGIT_ERROR = 1e-3
IDS = (torch.arange(80)[None] * 37 + 11) % 250
GONE = object()  # the field is not in the file
_LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.3 * i for i in range(8)],
    "original_max_position_embeddings": 128,
}
_TWO = {
    "full_attention": {"rope_type": "default", "rope_theta": 50000.0},
    "sliding_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 3000.0},
}


def configure(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not GONE}))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        # Epsilons, activations, caps and windows that a family has where the file names none.
        *((name, {"rms_norm_eps": GONE}) for name in ("olmo2", "exaone4", "hunyuan", "phi4 mini")),
        ("phi2", {"hidden_act": GONE}),
        ("gemma2", {"attn_logit_softcapping": GONE, "final_logit_softcapping": GONE}),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
        ("exaone4 windows", {"sliding_window": GONE}),
        ("qwen2 windows", {"max_window_layers": GONE, "layer_types": GONE}),
        ("ministral 3", {"rope_parameters": GONE}),
        # Of windows, layer_types says where they are.
        (
            "smollm3",
            {
                "use_sliding_window": True,
                "sliding_window": 32,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
        ),
        # YaRN's mscale alone does nothing; a factor of LongRoPE goes before the ratio of contexts.
        ("llama", {"rope_parameters": YARN_ROPE | {"mscale": 0.4}}),
        ("llama", {"rope_parameters": _LONG | {"factor": 32.0}}),
        # The original context beside the parameters goes before the one among them.
        ("llama yarn", {"original_max_position_embeddings": 32}),
        ("ministral 3", {"original_max_position_embeddings": 32}),
        # Rotary tables of layers with a window.
        ("olmo3", {"rope_parameters": _TWO}),
        ("gemma3", {"rope_parameters": _TWO}),
        ("gpt_neox", {"rotary_emb_base": 500}),
    ],
)
def test_a_field_means_what_transformers_takes_it_for(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    folder, _ = write_folder(tmp_path / "model", ROWS[name])
    configure(folder, changes)
    theirs = reread(ROWS[name], folder)
    checkpoint = open_checkpoint(folder)
    ours = load_reference(checkpoint, IDS.shape[1])
    expected = outputs(ROWS[name], theirs, IDS)
    error = float((ours(IDS, ours.empty_cache())[0] - expected).abs().max())
    assert error <= MAX_LOGIT_ERROR * float(expected.abs().max())
    # Written back, it is the same for us and for transformers.
    save_hf(checkpoint, tmp_path / "again")
    assert open_checkpoint(tmp_path / "again").config == checkpoint.config
    again = outputs(ROWS[name], reread(ROWS[name], tmp_path / "again"), IDS)
    assert float((again - expected).abs().max()) <= MAX_LOGIT_ERROR * float(expected.abs().max())


@pytest.mark.parametrize("name", ["mistral", "olmo3", "exaone4 windows"])
def test_a_window_that_is_not_named_is_the_familys(name: str, tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path, ROWS[name])
    configure(folder, {"sliding_window": GONE})
    expected = AutoConfig.from_pretrained(folder).sliding_window
    windows = {a.window for a in open_checkpoint(folder).config.attentions}
    assert windows - {None} == {expected} == {4096}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"is_causal": False}, "is_causal is false"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which"),
        (
            "qwen3",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
            "partial_rotary_factor is 0.25, which",
        ),
        ("gemma3", {"rope_parameters": {"rope_theta": 7000.0}}, "no entry for each of"),
        ("gemma2", {"layer_types": GONE, "sliding_window_pattern": 3}, "pattern is 3 without"),
        ("olmo3", {"layer_types": GONE, "sliding_window_pattern": 2}, "pattern is 2 without"),
    ],
)
def test_fields_that_programs_read_differently_are_refused(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder, _ = write_folder(tmp_path, ROWS[name])
    configure(folder, changes)
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value)


def test_an_encoder_that_was_a_decoder_sees_all_tokens(tmp_path: Path) -> None:
    """As gte-Qwen2 has it: a Qwen whose ``is_causal`` is false, for embeddings."""
    row = ROWS["qwen3 embedding"]
    folder, _ = write_folder(tmp_path / "model", row)
    causal = load_reference(open_checkpoint(folder))
    configure(folder, {"is_causal": False})
    theirs = reread(row, folder)
    checkpoint = open_checkpoint(folder)
    ours = load_reference(checkpoint)
    found = ours(IDS, ours.empty_cache())[0]
    assert float((found - outputs(row, theirs, IDS)).abs().max()) <= MAX_LOGIT_ERROR
    assert float((found - causal(IDS, causal.empty_cache())[0]).abs().max()) > 0.1
    save_hf(checkpoint, tmp_path / "again")
    assert open_checkpoint(tmp_path / "again").config == checkpoint.config


def _sees(name: str, model_type: str) -> dict[str, Any]:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    row: Row = ROWS[name]
    return {
        "text_config": row.fields | {"model_type": row.model_type},
        "vision_config": vision | {"model_type": model_type},
        "image_token_index": 255,
    }


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("gemma3", _sees("gemma3", "siglip_vision_model") | {"mm_tokens_per_image": 4}),
        ("mistral3", _sees("ministral 3", "pixtral")),
        ("mistral3", _sees("ministral 3", "pixtral") | {"tie_word_embeddings": False}),
    ],
)
def test_what_transformers_saves_of_a_model_that_sees_is_read(
    kind: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    """transformers 5 writes ``tie_word_embeddings`` for the whole, beside ``text_config``."""
    import transformers
    from architectures import BASE

    fields = fields | {"text_config": BASE | fields["text_config"]}
    classes = {"gemma3": "Gemma3ForConditionalGeneration"}
    name = classes.get(kind, "Mistral3ForConditionalGeneration")
    torch.manual_seed(0)
    model = getattr(transformers, name)(AutoConfig.for_model(kind, **fields)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(IDS).logits
    checkpoint = open_checkpoint(tmp_path)
    ours = load_reference(checkpoint)
    assert float((ours(IDS, ours.empty_cache())[0] - expected).abs().max()) <= MAX_LOGIT_ERROR
    assert checkpoint.config.tie_word_embeddings == fields.get("tie_word_embeddings", True)


def test_what_a_family_cannot_say_is_not_written(tmp_path: Path) -> None:
    """EXAONE 4's layers without positions stand beside windows alone."""
    folder, _ = write_folder(tmp_path, ROWS["exaone4 windows"])
    config = open_checkpoint(folder).config
    assert hf_config(config)["model_type"] == "exaone4"
    alone = replace(config, stored_layers=config.stored_layers[3:])
    with pytest.raises(CheckpointError, match="cannot say this model's rotary"):
        hf_config(alone)
