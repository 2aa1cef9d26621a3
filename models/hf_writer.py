"""A checkpoint written back as a Hugging Face folder, for tools that read nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pocketslm.errors import CheckpointError
from pocketslm.models import architectures
from pocketslm.models.architectures.fields import Fields
from pocketslm.models.checkpoint import Checkpoint, one_line, write_origin
from pocketslm.models.config import ModelConfig
from pocketslm.models.pooling import write_pooling
from pocketslm.models.reference import load_reference

_DEFAULT = "the default"  # of a field that is left out
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def save_hf(checkpoint: Checkpoint, folder: Path, model: Any = None) -> None:
    """Write config.json, model.safetensors (fp32, dequantized), origin.json and the tokenizer, and
    what sentence-transformers reads of a model of embeddings.

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
    config: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        said = _object(files.get(name, b"{}"), name)
        config |= {key: said[key] for key in _IDS if said.get(key) is not None}
    config |= hf_config(model.config)  # a family may depend on one of the ids
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if (pooling := model.config.pooling) is not None:
        write_pooling(pooling, model.config.hidden_size, folder)


def _object(data: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {name}: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} is not a JSON object")
    return value


def hf_config(c: ModelConfig) -> dict[str, Any]:
    """``config.json`` as transformers reads it.

    Raises CheckpointError where the family's fields cannot say what the model is, as some that came
    from a GGUF or were pruned.
    """
    architecture = architectures.by_name(c.architecture)
    data = architecture.write_hf(c)
    again = architecture.read_hf(Fields(json.loads(json.dumps(data)), "config.json"))
    if not c.head:  # that is said beside it
        again = replace(again, head=False, tie_word_embeddings=False, pooling=c.pooling)
    if (where := _difference(c.to_dict(), again.to_dict())) is not None:
        raise CheckpointError(
            f"a config.json of {architecture.name} cannot say this model's {where}; export it "
            "without writing it back"
        )
    return data


def _difference(one: Any, other: Any, where: str = "configuration") -> str | None:
    """Where two descriptions differ by more than rounding; None: nowhere."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        names = [*one, *(name for name in other if name not in one)]
        pairs = [(one.get(name, _DEFAULT), other.get(name, _DEFAULT), name) for name in names]
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return where
        pairs = [(a, b, where) for a, b in zip(one, other, strict=True)]
    elif isinstance(one, float) and isinstance(other, float):
        return None if math.isclose(one, other, rel_tol=1e-6) else where
    else:
        return None if one == other else where
    found = (_difference(a, b, name) for a, b, name in pairs if name != "declared")
    return next((name for name in found if name is not None), None)
