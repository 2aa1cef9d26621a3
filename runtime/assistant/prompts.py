"""Prompts are files: a folder for each family of models that wants its own, and ``default``."""

from __future__ import annotations

from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable

DEFAULT = "default"


def prompt(name: str, model: str) -> str:
    """The prompt called ``name`` for a model: of the family whose folder its name contains."""
    for family in sorted(_families(), key=len, reverse=True):
        if family in model.lower() and (file := _folder() / family / f"{name}.txt").is_file():
            return file.read_text("utf-8").strip()
    return (_folder() / DEFAULT / f"{name}.txt").read_text("utf-8").strip()


@cache
def _families() -> tuple[str, ...]:
    return tuple(folder.name for folder in _folder().iterdir() if folder.name != DEFAULT)


def _folder() -> Traversable:
    return resources.files(__package__) / "prompts"
