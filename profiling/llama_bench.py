"""llama-bench's own output (``-o json`` or ``jsonl``) as records, to stand in the same tables."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pocketslm.errors import UsageError
from pocketslm.profiling.machine import Machine
from pocketslm.profiling.records import SCHEMA, Measurement, parse_records, read_text


def read_rows(path: str | Path) -> list[Measurement]:
    """Read our records or llama-bench's. Raises UsageError for anything else."""
    text = read_text(path)
    objects = _objects(text)
    if objects and all("build_commit" in one and "samples_ns" in one for one in objects):
        # One file is one run: llama-bench has no name for it.
        run = hashlib.sha256(text.encode()).hexdigest()[:32]
        return [_row(one, run, path) for one in objects]
    return parse_records(text, path)


def _objects(text: str) -> list[dict[str, Any]]:
    """The objects of a JSON list or of JSON lines. Empty if the text is neither."""
    try:
        whole = text.lstrip().startswith("[")
        found = json.loads(text) if whole else [json.loads(line) for line in text.splitlines()]
    except (ValueError, RecursionError):
        return []
    return found if all(isinstance(one, dict) for one in found) else []


def _row(data: dict[str, Any], run: str, path: str | Path) -> Measurement:
    """llama-bench names neither memory nor load time, nor single steps."""
    try:
        return Measurement.from_dict(
            {
                "schema": SCHEMA,
                "run": run,
                "started": data["test_time"],
                "pocketslm": "",
                "machine": asdict(Machine(data["cpu_info"], 0, "", 0, "")),
                "software": {},
                "model": data["model_type"],
                "artefact": Path(data["model_filename"]).name,
                "size_bytes": data["model_size"],
                "runtime": "llama.cpp",
                "runtime_version": f"{data['build_number']} ({data['build_commit']})",
                "backend": data.get("backends", "ggml"),
                "threads": data["n_threads"],
                "n_prompt": data["n_prompt"],
                "n_gen": data["n_gen"],
                "n_depth": data.get("n_depth", 0),
                "samples_ns": data["samples_ns"],
            }
        )
    except (KeyError, TypeError, UsageError) as error:
        raise UsageError(
            f"{path}: a row of llama-bench that records cannot hold: {error}"
        ) from None
