"""A pruned checkpoint as a Hugging Face folder, which everything else reads, heals and exports."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from pocketslm.errors import UsageError
from pocketslm.export.calibration_text import last_tokens
from pocketslm.export.prune import adaptive, depth, sparse, width
from pocketslm.export.prune.pruned import Changed
from pocketslm.folders import published
from pocketslm.models.checkpoint import Checkpoint
from pocketslm.models.hf_writer import save_hf
from pocketslm.models.reference import load_reference
from pocketslm.runtime.tokenizer import load_tokenizer_files

DepthMethod = Literal["sleb", "influence", "last"]
RECORD_FILE = "pruning.json"


@dataclass(frozen=True)
class PruneConfig:
    """What to take out: ``layers``, chosen by ``by``, then parts of those left.

    ``share``: at last, every second layer gives way to the one before it, which runs twice.

    ``kv_heads`` (with their query heads), ``neurons`` and ``channels`` are how many each layer or
    the model keeps, the most important by their activations; None keeps all. ``adaptive``: the part
    of the layers' weights to remove then, as KV heads and neurons, more of them from layers of
    little importance, or the same from each (``uniform``). ``sparse``: the zeros that Wanda puts
    into the matrices in the end, such as ``0.5`` or ``2:4``. Importance is measured on the last
    ``tokens`` of a text, in windows of ``window``.
    """

    layers: int = 0
    by: DepthMethod = "sleb"
    share: bool = False
    kv_heads: int | None = None
    neurons: int | None = None
    channels: int | None = None
    adaptive: float | None = None
    uniform: bool = False
    sparse: str | None = None
    tokens: int = 8192
    window: int = 512

    def __post_init__(self) -> None:
        if self.by not in get_args(DepthMethod):
            raise UsageError(f"by is {self.by!r}, expected one of {get_args(DepthMethod)}")
        if self.layers < 0:
            raise UsageError(f"{self.layers} layers to remove, expected at least 0")
        if self.adaptive is not None:
            adaptive.check_share(self.adaptive)
        if self.sparse is not None:
            sparse.parse_pattern(self.sparse)
        widths = self.kv_heads or self.neurons or self.channels or self.adaptive
        if not (self.layers or self.share or widths or self.sparse):
            raise UsageError(
                "nothing to prune; give layers, share, kv_heads, neurons, channels, adaptive or "
                "sparse"
            )


def prune_folder(
    checkpoint: Checkpoint,
    out: Path,
    config: PruneConfig,
    text: Path,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Checkpoint:
    """Write the pruned checkpoint to ``out``, whole or not at all; what was written.

    ``pruning.json`` there says which layers went. Raises UsageError where ``out`` is in the way or
    the text is needed and too short, ExportError where there is less than is to be removed or kept.
    """
    checkpoint.config.need_head("prune")
    checkpoint.config.need_own_layers("prune")
    positions = checkpoint.config.max_position_embeddings
    config = replace(config, window=min(config.window, positions))
    if out.exists():
        raise UsageError(f"{out} exists already; choose another")

    @functools.cache  # not read where nothing looks at it
    def ids() -> Tensor:
        files = checkpoint.tokenizer_files()
        return last_tokens(text, load_tokenizer_files(files).encode, config.tokens, config.window)

    pruned, removed = checkpoint, list[int]()
    if config.layers:
        model = load_reference(checkpoint, config.window)
        count = checkpoint.config.num_hidden_layers
        if config.by == "last":
            removed = depth.last(count, config.layers)
        elif config.by == "influence":
            removed = depth.least_influence(depth.block_influence(model, ids()), config.layers)
        else:
            removed = depth.sleb(model, ids(), config.layers, progress)
        pruned = depth.WithoutLayers(checkpoint, removed)
    kept = {"groups": config.kv_heads, "neurons": config.neurons, "channels": config.channels}
    if any(kept.values()):
        model = load_reference(pruned, config.window)
        importance = width.activation_importance(model, ids())
        pruned = width.Narrowed(pruned, width.keep_top(importance, **kept))
    if config.adaptive is not None:
        model = load_reference(pruned, config.window)
        left = adaptive.prune(
            model,
            adaptive.everything(pruned.config),
            ids(),
            config.adaptive,
            amplitude=0.0 if config.uniform else adaptive.AMPLITUDE,
            progress=progress,
        )
        pruned = width.Narrowed(pruned, left)
    if config.share:
        pruned = depth.Shared(pruned)
    if config.sparse is not None:
        model = load_reference(pruned, config.window)
        pattern = sparse.parse_pattern(config.sparse)
        sparse.sparsify(model, ids(), pattern, progress=progress)
        note = f"zeros by Wanda in the layers ({pattern}); {sparse.NOTE}"
        pruned = Changed(pruned, model, note, sparse=str(pattern))
    with published(out) as folder:
        save_hf(pruned, folder)
        record = asdict(config) | {"removed_layers": removed, "text": text.name}
        (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")
    return pruned
