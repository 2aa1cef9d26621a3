"""A checkpoint of which parts are left out, as a checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from pocketslm.models.checkpoint import Checkpoint
from pocketslm.models.config import ModelConfig
from pocketslm.models.tensors import Weight


class Pruned(ABC):
    """``whole`` with another ``config``; what is left of each weight, a subclass says."""

    def __init__(self, whole: Checkpoint, config: ModelConfig, note: str) -> None:
        self.whole, self.config = whole, config
        self.path, self.format, self.name = whole.path, whole.format, whole.name
        self.licence, self.made_from = whole.licence, whole.made_from
        self.sparse = whole.sparse
        self.notes = [*whole.notes, note]

    def files(self) -> list[Path]:
        return self.whole.files()

    def stored_bytes(self) -> dict[str, int]:
        return self.whole.stored_bytes()

    def tokenizer_files(self) -> dict[str, bytes]:
        return self.whole.tokenizer_files()

    @abstractmethod
    def weight(self, name: str) -> Weight:
        """What is left of a weight, by its name in the pruned model."""


class Changed(Pruned):
    """``whole`` with the weights that ``model``, its reference model, has by now.

    ``note`` says why; ``sparse``: how many of them are zero, where it is not as before.
    """

    def __init__(self, whole: Checkpoint, model: Any, note: str, sparse: str | None = None) -> None:
        super().__init__(whole, whole.config, note)
        self.sparse = sparse or whole.sparse
        self.state = dict(model.named_parameters())

    def weight(self, name: str) -> Weight:
        array: np.ndarray[Any, Any] = self.state[name].detach().cpu().numpy()
        return array
