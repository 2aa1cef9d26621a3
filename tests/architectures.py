"""The table of architectures: one row a family or variant, which every test of families runs over.

A row is a transformers configuration of a tiny model. ``TARGETS`` says what lowers it: a target
that is left out refuses it by name, which is tested too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import support
from pocketslm.models.config import Pooling
from pocketslm.models.pooling import write_pooling

BASE = {
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
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 24, **_WINDOW}
_CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
_GRANITE = {
    "embedding_multiplier": 6.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.5,
    "logits_scaling": 4.0,
}
_GRANITE4 = {
    "layer_types": ["attention"] * 4,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": 96,
    "position_embedding_type": "rope",
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
}
_ALPHA = {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 10000.0}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.3 * i for i in range(8)],
    "original_max_position_embeddings": 64,
}
_PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
_GPT2 = {"n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 256, "n_inner": 96}
_GPT_NEO = {
    "num_layers": 4,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 2]],
    "window_size": 32,
}
_LFM2 = {
    "layer_types": ["conv", "conv", "full_attention", "conv"],
    "block_auto_adjust_ff_dim": False,
}
_LINEAR = {"rope_type": "linear", "factor": 4.0}
EVERYWHERE = ("native", "onnx", "executorch")


@dataclass(frozen=True)
class Row:
    """model_type: of transformers; fields: of its configuration, beside the tiny sizes.

    pooling: of a model of embeddings, whose hidden states are compared, not its logits.
    published: of a family that transformers lacks: the fields that its config.json has in place of
    those of the transformers model that its definition comes to (None: has not). shared_mlp: all
    layers of that model have the first one's MLP, stored once.
    """

    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = EVERYWHERE
    pooling: Pooling | None = None
    published: dict[str, Any] = field(default_factory=dict)
    shared_mlp: bool = False


_MINISTRAL = {
    "rope_parameters": YARN_ROPE
    | {"rope_theta": 10000.0, "llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 1.0}
}
# MiniCPM by its definition: h = 6 e(x); h += 1.4 / sqrt(4) f(norm(h)); logits of h / (64 / 16).
_AS_GRANITE = {
    "embedding_multiplier": 6.0,
    "attention_multiplier": 16**-0.5,
    "residual_multiplier": 1.4 / 4**0.5,
    "logits_scaling": 4.0,
}
_MINICPM = dict.fromkeys(_AS_GRANITE) | {
    "model_type": "minicpm",
    "scale_emb": 6.0,
    "scale_depth": 1.4,
    "dim_model_base": 16,
}
_WHOLE = _PARTIAL | {"partial_rotary_factor": 1.0}
_HALF = _PARTIAL | {"partial_rotary_factor": 0.5}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_NO_GROUPS = {"num_key_value_heads": 4}

ROWS = {
    "llama": Row("llama", {"tie_word_embeddings": True}),
    "llama untied": Row("llama"),
    "llama with biases": Row("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3": Row("llama", {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 500000.0}}),
    "llama linear": Row("llama", {"rope_parameters": _LINEAR | {"rope_theta": 10000.0}}),
    "llama yarn": Row("llama", {"rope_parameters": YARN_ROPE | {"rope_theta": 10000.0}}),
    "mistral": Row("mistral", {"head_dim": 32, **_WINDOW}),
    "ministral 3": Row("ministral3", {"head_dim": 32, **_MINISTRAL}),
    "minicpm": Row("granite", _AS_GRANITE, published=_MINICPM),
    "minicpm 4": Row("granite", _AS_GRANITE | {"rope_parameters": _LONG}, published=_MINICPM),
    "mobillama": Row(
        "llama",
        _NO_GROUPS,
        published={"model_type": "mobillama", "num_key_value_heads": 2},
        shared_mlp=True,
    ),
    "phonelm": Row("llama", {"hidden_act": "relu"}, published={"model_type": "phonelm"}),
    "qwen2": Row("qwen2", {"tie_word_embeddings": True}),
    "qwen2 windows": Row("qwen2", {"use_sliding_window": True, "max_window_layers": 2, **_WINDOW}),
    "qwen3": Row("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": Row("gemma2", _GEMMA | _CAPS | {"query_pre_attn_scalar": 32}),
    "gemma3": Row("gemma3_text", _GEMMA | {"num_hidden_layers": 6, "query_pre_attn_scalar": 32}),
    "gemma3 layers": Row(
        "gemma3_text",
        _GEMMA
        | {
            "layer_types": [_SLIDING, _SLIDING, _FULL, _SLIDING],
            "rope_parameters": {
                _FULL: _LINEAR | {"rope_theta": 50000.0},
                _SLIDING: {"rope_type": "default", "rope_theta": 3000.0},
            },
        },
    ),
    "smollm3": Row("smollm3", {"tie_word_embeddings": True}),
    "granite": Row("granite", _GRANITE),
    "granite 4 dense": Row("granitemoehybrid", _GRANITE | _GRANITE4),
    "olmo2": Row("olmo2"),
    "olmo3": Row("olmo3", {"sliding_window": 32}),
    "exaone4": Row("exaone4", {"sliding_window": None, "layer_types": [_FULL] * 4}),
    "exaone4 windows": Row("exaone4", {"sliding_window": 32, "sliding_window_pattern": 4}),
    "hunyuan": Row("hunyuan_v1_dense", {"head_dim": 32, "rope_parameters": _ALPHA}),
    "ernie 4.5": Row("ernie4_5", {"head_dim": 32}),
    "phi3": Row("phi3", {"rope_parameters": _LONG, "original_max_position_embeddings": 64}),
    "phi4 mini": Row("phi3", {"rope_parameters": _PARTIAL, "tie_word_embeddings": True}),
    "phi2": Row("phi", _NO_GROUPS),
    "phi2 whole heads": Row("phi", {"rope_parameters": _WHOLE} | _NO_GROUPS),
    "gpt2": Row("gpt2", _GPT2 | _NO_GROUPS),
    "gpt_neo": Row("gpt_neo", _GPT_NEO | _NO_GROUPS),
    "gpt_neox": Row("gpt_neox", {"rope_parameters": _HALF} | _NO_GROUPS),
    "gpt_neox whole heads": Row("gpt_neox", {"rope_parameters": _WHOLE} | _NO_GROUPS),
    "gpt_neox in turn": Row("gpt_neox", {"use_parallel_residual": False} | _NO_GROUPS),
    "lfm2": Row("lfm2", _LFM2),
    "bert": Row(
        "bert", _NO_GROUPS, ("native", "onnx"), Pooling("mean", normalize=True, max_tokens=128)
    ),
    "roberta": Row(
        "roberta",
        _NO_GROUPS | {"pad_token_id": 1, "type_vocab_size": 1},
        ("native", "onnx"),
        Pooling("mean", normalize=True),
    ),
    "qwen3 embedding": Row("qwen3", {"head_dim": 32}, ("native", "onnx"), Pooling("last")),
}


def tiny_transformer(row: Row, seed: int = 0) -> Any:
    """The row's model of transformers with random weights, large enough that logits differ."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(row.model_type, **BASE | row.fields)
    torch.manual_seed(seed)
    model = _class(row).from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
        else:
            centre = 0.0 if name.endswith("bias") else parameter.data.clone()
            parameter.data.normal_(0, 0.1).add_(centre)
    return _tied(row, model)


def _tied(row: Row, model: Any) -> Any:
    for layer in model.model.layers if row.shared_mlp else ():
        layer.mlp = model.model.layers[0].mlp
    return model


def reread(row: Row, folder: Path) -> Any:
    """The model in a folder, as transformers reads it."""
    if not row.published:
        return _class(row).from_pretrained(folder, dtype=torch.float32).eval()
    model = tiny_transformer(row, seed=1)
    left = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not left.unexpected_keys
    assert all(row.shared_mlp and ".mlp." in name for name in left.missing_keys)
    return model


def outputs(row: Row, model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, S, V] of a model of transformers; the last hidden states of one of embeddings."""
    with torch.no_grad():
        out = model(ids)
    found: torch.Tensor = out.logits if row.pooling is None else out.last_hidden_state
    return found


def _class(row: Row) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM

    return AutoModelForCausalLM if row.pooling is None else AutoModel


def write_folder(folder: Path, row: Row, seed: int = 0) -> tuple[Path, Any]:
    """The row's model as a Hugging Face folder with the tests' tokenizer; folder and model."""
    model = tiny_transformer(row, seed)
    if not row.published:
        model.save_pretrained(folder)
    else:
        model.config.save_pretrained(folder)
        save_file(dict(model.named_parameters()), folder / "model.safetensors")
        path = folder / "config.json"
        data = json.loads(path.read_text()) | row.published
        data = {name: value for name, value in data.items() if value is not None}
        path.write_text(json.dumps(data))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if row.pooling is not None:
        write_pooling(row.pooling, model.config.hidden_size, folder)
    for name, text in support.tokenizer_files().items():
        (folder / name).write_text(text)
    return folder, model
