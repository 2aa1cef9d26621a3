"""Weights as a recipe stores them, made one after the other and kept on disk, and the room for it.

No more than one of them is in memory, whatever the model's size.
"""

from __future__ import annotations

import pickle
import shutil
import tempfile
from collections import Counter
from math import prod
from pathlib import Path

from pocketslm.errors import ExportError
from pocketslm.export.recipe import Recipe
from pocketslm.models.checkpoint import Checkpoint, read_weight
from pocketslm.models.reference import parameter_shapes
from pocketslm.models.sites import is_rounded
from pocketslm.models.tensors import QuantTensor, Weight

# Targets whose files hold weights of their own.
_OWN_WEIGHTS = ("native", "onnx", "executorch", "executorch-pocketslm")


class Shelf:
    """Weights by name, in a file without a name that goes with the process."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open as long as this is
        self._places: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __setitem__(self, name: str, weight: Weight) -> None:
        self._places[name] = self._file.seek(0, 2)
        pickle.dump(weight, self._file, protocol=5)

    def __getitem__(self, name: str) -> Weight:
        self._file.seek(self._places[name])
        weight: Weight = pickle.load(self._file)
        return weight

    def close(self) -> None:
        self._file.close()


class StoredWeights:
    """Reads weights as the recipe stores them, and keeps count of what came of them.

    ``shelf`` holds those that calibration decided. What is rounded here goes there too, so that a
    second lowering, or a tied head, does not round it again.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, shelf: Shelf) -> None:
        self.checkpoint, self.recipe, self.shelf = checkpoint, recipe, shelf
        self.bytes_by_scheme: Counter[str] = Counter()
        self.notes: list[str] = []
        self._seen: set[str] = set()

    def __call__(self, name: str, shape: tuple[int, ...]) -> Weight:
        if name in self._seen and name in self.shelf:
            return self.shelf[name]
        source = read_weight(self.checkpoint, name, shape)
        ready = name in self.shelf
        weight = self.shelf[name] if ready else self.recipe.apply(name, source)
        if name not in self._seen:
            self._seen.add(name)
            scheme = weight.scheme if isinstance(weight, QuantTensor) else self.recipe.dtype
            self.bytes_by_scheme[scheme] += weight.nbytes
            self._note(source, weight)
        if not ready and isinstance(weight, QuantTensor) and weight is not source:
            self.shelf[name] = weight
        return weight

    def _note(self, source: Weight, weight: Weight) -> None:
        """Say where something was lost, once for each way of losing it."""
        if not isinstance(weight, QuantTensor) or weight is source:
            return
        was = source.scheme if isinstance(source, QuantTensor) else "float"
        note = f"{was} weights were rounded to {weight.scheme}"
        if weight.group_size != self.recipe.group_size:
            note += f" (rows do not divide into groups of {self.recipe.group_size})"
        if note not in self.notes:
            self.notes.append(note)


def need_room(checkpoint: Checkpoint, recipe: Recipe, folder: Path) -> None:
    """ExportError where the disk of ``folder`` is surely too small for the export."""
    weights = 0
    for name, shape in parameter_shapes(checkpoint.config).items():
        rounded = len(shape) == 2 and is_rounded(name)
        spec = recipe.spec(name, quantized=False) if rounded else None
        weights += 4 * prod(shape) if spec is None else spec.nbytes(*shape)
    if "keep" in (recipe.weights, recipe.head):  # blocks that are kept are as small as they were
        weights = min(weights, sum(checkpoint.stored_bytes().values()))
    copies = 1 + sum(target in _OWN_WEIGHTS for target in recipe.targets or ())  # 1: the shelf
    free = shutil.disk_usage(folder).free
    if copies * weights > free:
        raise ExportError(
            f"the disk of {folder.parent} has {free / 1e9:.1f} GB left, this export needs about "
            f"{copies * weights / 1e9:.1f} GB; make room, export to another disk, or leave targets "
            "out"
        )
