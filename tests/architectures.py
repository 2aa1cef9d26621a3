"""The table of architectures: one row a family or variant, which every test of families runs over.

A row is a transformers configuration of a tiny model. ``TARGETS`` says what lowers it: a target
that is left out refuses it by name, which is tested too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import support

_BASE = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 259,
}
_WINDOW = {"sliding_window": 32}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
EVERYWHERE = ("native", "onnx", "executorch")


@dataclass(frozen=True)
class Row:
    """model_type: of transformers; fields: of its configuration, beside the tiny sizes."""

    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = EVERYWHERE


ROWS = {
    "llama": Row("llama", {"tie_word_embeddings": True}),
    "llama untied": Row("llama"),
    "llama with biases": Row("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3": Row("llama", {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 500000.0}}),
    "llama yarn": Row("llama", {"rope_parameters": YARN_ROPE | {"rope_theta": 10000.0}}),
    "mistral": Row("mistral", {"head_dim": 32, **_WINDOW}),
    "qwen2": Row("qwen2", {"tie_word_embeddings": True}),
    "qwen3": Row("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen2 windows": Row("qwen2", {"use_sliding_window": True, "max_window_layers": 2, **_WINDOW}),
}


def tiny_transformer(row: Row, seed: int = 0) -> Any:
    """The row's model of transformers with random weights, large enough that logits differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(row.model_type, **_BASE | row.fields)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
        else:
            centre = 0.0 if name.endswith("bias") else parameter.data.clone()
            parameter.data.normal_(0, 0.1).add_(centre)
    return model


def write_folder(folder: Path, row: Row, seed: int = 0) -> tuple[Path, Any]:
    """The row's model as a Hugging Face folder with the tests' tokenizer; folder and model."""
    model = tiny_transformer(row, seed)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for name, text in support.tokenizer_files().items():
        (folder / name).write_text(text)
    return folder, model
