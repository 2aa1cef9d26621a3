"""A checkpoint written back as a Hugging Face folder, for tools that read nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pocketslm.errors import CheckpointError
from pocketslm.models.checkpoint import Checkpoint, one_line, write_origin
from pocketslm.models.config import ModelConfig
from pocketslm.models.reference import load_reference

_IDS = ("bos_token_id", "eos_token_id")
_CLASS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def save_hf(checkpoint: Checkpoint, folder: Path, model: Any = None) -> None:
    """Write config.json, model.safetensors (fp32, dequantized), origin.json and the tokenizer.

    ``model``: the same architecture with other weights or sizes, by default the checkpoint's own.
    Raises CheckpointError where the checkpoint cannot be read, OSError where it cannot be written.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    write_origin(checkpoint, folder)
    model = model or load_reference(checkpoint, context=8)
    state = {name: value.detach().contiguous() for name, value in model.named_parameters()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    files = checkpoint.tokenizer_files()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    config = hf_config(model.config)
    for name in ("config.json", "generation_config.json"):
        said = _object(files.get(name, b"{}"), name)
        config |= {key: said[key] for key in _IDS if said.get(key) is not None}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _object(data: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {name}: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} is not a JSON object")
    return value


def hf_config(c: ModelConfig) -> dict[str, Any]:
    """``config.json`` as transformers reads it."""
    if c.rope_divisors is not None:
        raise CheckpointError("a GGUF's stretched RoPE has no Hugging Face form to write back")
    data: dict[str, Any] = {
        "architectures": [_CLASS[c.architecture]],
        "model_type": c.architecture,
        "torch_dtype": "float32",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_position_embeddings,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": c.tie_word_embeddings,
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
        "hidden_act": c.hidden_act,
    }
    if c.layer_sharing:
        data["layer_sharing"] = True
        if c.architecture == "llama":  # so that transformers does not run half of the model
            data |= {"architectures": ["MobileLLMForCausalLM"], "model_type": "mobilellm"}
    if c.layer_sizes is not None:  # no field of transformers' says it; only we read this one
        data["layer_sizes"] = [size._asdict() for size in c.layer_sizes]
    return data
