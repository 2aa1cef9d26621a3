"""A checkpoint written back as a Hugging Face folder, for tools that read nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pocketslm.models import architectures
from pocketslm.models.checkpoint import Checkpoint, write_origin
from pocketslm.models.config import ModelConfig
from pocketslm.models.reference import load_reference


def save_hf(checkpoint: Checkpoint, folder: Path, model: Any = None) -> None:
    """Write config.json, model.safetensors (fp32, dequantized), origin.json and the tokenizer.

    ``model``: the same architecture with other weights or sizes, by default the checkpoint's own.
    Raises CheckpointError where the checkpoint cannot be read, OSError where it cannot be written.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    write_origin(checkpoint, folder)
    model = model or load_reference(checkpoint, context=8)
    state = {name: value.detach().cpu().numpy() for name, value in model.named_parameters()}
    names = architectures.by_name(model.config.architecture).hf
    save_file(
        names.write(model.config, state), folder / "model.safetensors", metadata={"format": "pt"}
    )
    files = checkpoint.tokenizer_files()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    generation = json.loads(files.get("generation_config.json", b"{}"))
    config = hf_config(model.config) | {
        key: generation[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if key in generation
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def hf_config(c: ModelConfig) -> dict[str, Any]:
    """``config.json`` as transformers reads it."""
    return architectures.by_name(c.architecture).write_hf(c)
