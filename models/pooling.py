"""How a checkpoint's embeddings are pooled: the files that sentence-transformers writes.

``modules.json`` lists what a text goes through: a transformer, a pooling, perhaps a normalization.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketslm.errors import CheckpointError
from pocketslm.models.architectures.fields import Fields
from pocketslm.models.checkpoint import one_line, read_json
from pocketslm.models.config import Pooling, PoolingKind

MODULES, LIMITS, PROMPTS = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
_POOLING = "1_Pooling"
_MODES: Mapping[str, PoolingKind] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
_KNOWN = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])


def read_pooling(folder: Path, hidden_size: int) -> tuple[Pooling | None, list[str]]:
    """The pooling of a folder and notes on it; None where it has no ``modules.json``.

    Raises CheckpointError for a module, a mode of pooling or a size that is not supported.
    """
    if not (folder / MODULES).exists():
        return None, []
    modules = _modules(folder / MODULES)
    kinds = [kind for kind, _ in modules]
    if kinds not in _KNOWN or modules[0][1]:
        raise CheckpointError(
            f"{folder / MODULES} lists {', '.join(kinds)[:80] or 'nothing'}, expected "
            "Transformer in the folder itself, Pooling, and perhaps Normalize"
        )
    pooling = _fields(folder / modules[1][1] / "config.json")
    limits, prompts = _fields(folder / LIMITS), _fields(folder / PROMPTS)
    if (width := pooling.integer("word_embedding_dimension", hidden_size)) != hidden_size:
        raise CheckpointError(f"{pooling.where}: pools {width} values, the model has {hidden_size}")
    for name in pooling.data:
        if name.startswith("pooling_mode_") and pooling.flag(name) and name not in _MODES:
            raise CheckpointError(
                f"{pooling.where}: {name} is not supported, expected one of {', '.join(_MODES)}"
            )
    chosen = [kind for name, kind in _MODES.items() if pooling.flag(name)]
    if len(chosen) != 1:
        raise CheckpointError(
            f"{pooling.where} sets {len(chosen)} modes of pooling, expected one of "
            + ", ".join(_MODES)
        )
    if (name := prompts("default_prompt_name")) is not None:
        raise CheckpointError(
            f"{prompts.where}: default_prompt_name is {str(name)[:40]!r}: texts would begin with a "
            "prompt, which is not supported"
        )
    given, notes = prompts.table("prompts"), []
    if not pooling.flag("include_prompt", True) and any(given.values()):
        notes.append(
            f"{pooling.where}: include_prompt is false, so these prompts are not put before texts: "
            + ", ".join(given)
        )
        given = {}
    for name in ("__version__", "similarity_fn_name", "model_type"):
        prompts(name)
    most = limits("max_seq_length")
    found = Pooling(
        chosen[0],
        normalize="Normalize" in kinds,
        lowercase=limits.flag("do_lower_case"),
        max_tokens=None if most is None else limits.integer("max_seq_length"),
        prompts=given,
    )
    return found, [*notes, *pooling.settle(), *limits.settle(), *prompts.settle()]


def write_pooling(pooling: Pooling, hidden_size: int, folder: Path) -> None:
    """The same files, for sentence-transformers and for us."""
    steps = [("Transformer", ""), ("Pooling", _POOLING)]
    steps += [("Normalize", "2_Normalize")] * pooling.normalize
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": path,
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, (kind, path) in enumerate(steps)
    ]
    modes = {name: kind == pooling.kind for name, kind in _MODES.items()}
    size = {"word_embedding_dimension": hidden_size}
    limits = {"max_seq_length": pooling.max_tokens, "do_lower_case": pooling.lowercase}
    files: dict[str, Any] = {
        MODULES: modules,
        f"{_POOLING}/config.json": size | modes,
        LIMITS: limits,
    }
    if pooling.prompts:
        files[PROMPTS] = {"prompts": dict(pooling.prompts), "default_prompt_name": None}
    (folder / _POOLING).mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _modules(path: Path) -> list[tuple[str, str]]:
    """Kind and folder of each module."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        found = [(str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in entries]
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is not a list of modules: {one_line(error)}") from None
    if any(Path(where).name != where for _, where in found):
        raise CheckpointError(f"{path} names folders outside its own")
    return found


def _fields(path: Path) -> Fields:
    """A file's fields; none of a file that is not there, but a pooling must say its mode."""
    return Fields(read_json(path) if path.exists() else {}, str(path))
