"""Bundles of tiny models of embeddings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from architectures import ROWS, write_folder

from pocketslm.export.pipeline import export_bundle
from pocketslm.export.recipe import Recipe
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.models.config import Pooling
from tokenizer_support import word_piece

FLOATS = Recipe(weights="float", head="float")
TEXTS = ["The cat sat on the mat.", "A DOG", "and then [SEP] it rained, all day long"]


def exported(
    folder: Path, name: str, pooling: Pooling, recipe: Recipe = FLOATS, words: bool = True
) -> Path:
    """A bundle of a tiny model of embeddings, with a tokenizer of BERT's kind if ``words``."""
    row = ROWS[name]
    fields = row.fields | {"vocab_size": 1500}
    source, _ = write_folder(folder / "model", replace(row, fields=fields, pooling=pooling))
    if words:
        (source / "tokenizer.json").write_text(word_piece())
        (source / "tokenizer_config.json").write_text("{}")
    export_bundle(open_checkpoint(source), folder / "bundle", recipe)
    return folder / "bundle"
