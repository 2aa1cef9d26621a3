"""The architectures: one file each, found by discovery.

A file defines ``ARCHITECTURES``, a list of :class:`Architecture` objects: which names it answers
to, how its configuration is read and written, and where its weights lie. The arithmetic is that of
:mod:`pocketslm.models.transformer`, which follows the configuration; nothing here imports torch.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module

from pocketslm.errors import UnknownArchitectureError
from pocketslm.models.architectures.base import Architecture


@cache
def _known() -> dict[str, Architecture]:
    """Every architecture by its own name."""
    found: dict[str, Architecture] = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        loaded = import_module(f"{__name__}.{module.name}")
        for architecture in getattr(loaded, "ARCHITECTURES", ()):
            assert architecture.name not in found, architecture.name
            found[architecture.name] = architecture
    return found


@cache
def _names(form: str) -> dict[str, Architecture]:
    """Every architecture by each name that it has in one form of file."""
    found: dict[str, Architecture] = {}
    for architecture in _known().values():
        for name in getattr(architecture, form):
            assert name not in found, name
            found[name] = architecture
    return found


def by_name(name: str) -> Architecture:
    """An architecture by our own name, as a configuration has it."""
    return _look_up(name, _known())


def of_hf(model_type: str) -> Architecture:
    """The architecture of a Hugging Face ``model_type``."""
    return _look_up(model_type, _names("model_types"))


def of_gguf(name: str) -> Architecture:
    """The architecture of a GGUF file's ``general.architecture``."""
    return _look_up(name, _names("gguf_types"))


def _look_up(name: str, table: dict[str, Architecture]) -> Architecture:
    if name not in table:
        raise UnknownArchitectureError(
            f"architecture {name!r} is not supported, expected one of: {', '.join(sorted(table))}"
        )
    return table[name]
