"""Prompts are files: a folder for each family of models that wants its own, and ``default``."""

from __future__ import annotations

from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable

DEFAULT = "default"


# The languages of families of models that do not speak every language.
_SPOKEN = {"smollm2": ("en",), "tinyllama": ("en",), "phi": ("en",)}


def prompt(name: str, model: str, language: str = "") -> str:
    """The prompt called ``name`` for a model: of the family whose folder its name contains, and in
    a language where it is written in that."""
    folders = [f for f in sorted(_families(), key=len, reverse=True) if f in model.lower()]
    for folder in [*folders, DEFAULT]:
        for file in (f"{name}.{language}.txt", f"{name}.txt"):
            if (found := _folder() / folder / file).is_file():
                return found.read_text("utf-8").strip()
    raise FileNotFoundError(name)


def speaks(model: str, language: str) -> bool:
    """Whether a model can write a language. Returns True for an unknown language."""
    for family, languages in _SPOKEN.items():
        if family in model.lower():
            return not language or language in languages
    return True


@cache
def _families() -> tuple[str, ...]:
    return tuple(folder.name for folder in _folder().iterdir() if folder.name != DEFAULT)


def _folder() -> Traversable:
    return resources.files(__package__) / "prompts"
