"""Facts about a checkpoint or bundle, for ``pocketslm inspect``."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from pocketslm.runtime.bundle import GENAI_CONFIG, MANIFEST, open_bundle


def describe(
    name_or_path: str, say: Callable[[str], None] = lambda message: None
) -> dict[str, Any]:
    """Facts by name, in the order to print them; raises what opening it raises."""
    path = Path(name_or_path)
    if (path / MANIFEST).exists() or (path / GENAI_CONFIG).exists():
        return _describe_bundle(path)
    if path.suffix == ".pte":
        return _describe_program(path)
    from pocketslm.models.catalog import resolve

    return _describe_checkpoint(resolve(name_or_path, say))


def _describe_bundle(path: Path) -> dict[str, Any]:
    bundle = open_bundle(path)
    graphs = {
        graph.backend: f"{graph.file}, context {graph.context}, {graph.kv_cache} KV cache"
        for graph in bundle.graphs
    }
    facts: dict[str, Any] = {"kind": "bundle", "name": bundle.name, "graphs": graphs}
    manifest = bundle.manifest
    if manifest is None:
        return facts | {"kind": "onnxruntime-genai folder"}
    return facts | {
        "size bytes": manifest.size_bytes,
        "weights bytes": manifest.weights,
        "architecture": manifest.architecture,
        "source": manifest.source,
        "recipe": manifest.recipe,
        "quality": manifest.quality or "not measured; see `pocketslm eval`",
        "notes": manifest.notes,
    }


def _describe_program(path: Path) -> dict[str, Any]:
    graph = open_bundle(path).graphs[0]
    from pocketslm.profiling.delegate import operators_outside

    return {
        "kind": "ExecuTorch program",
        "name": path.name,
        "size bytes": path.stat().st_size,
        "context": graph.context,
        "operators outside the delegate": dict(operators_outside(path)),
    }


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    from pocketslm.models.checkpoint import open_checkpoint
    from pocketslm.models.config import PREFILL_BATCH
    from pocketslm.models.reference import parameter_shapes

    checkpoint = open_checkpoint(path)
    state = checkpoint.config.state_bytes(4096, 2, batch=PREFILL_BATCH)
    return {
        "kind": f"{checkpoint.format} checkpoint",
        "name": checkpoint.name,
        "licence": checkpoint.licence or "not stated",
        "parameters": sum(map(prod, parameter_shapes(checkpoint.config).values())),
        "architecture": checkpoint.config.to_dict(),
        "stored bytes": checkpoint.stored_bytes(),
        "state bytes at 4096 tokens (fp16)": state,
        "notes": checkpoint.notes,
    }
