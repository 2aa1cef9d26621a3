"""The architectures: one PyTorch file each, found by Hugging Face or GGUF name, loaded lazily.

An architecture module has ``Model(config, context)`` with Hugging Face's parameter names, and
``sanitize_gguf(name, weight, config)`` for what GGUF stores differently.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pocketslm.errors import UnknownArchitectureError

# Our architecture name -> its module. Hugging Face's `model_type` and GGUF's
# `general.architecture` are looked up here as they are, or through the aliases.
_MODULES = {"llama": "llama", "qwen2": "llama"}
_ALIASES = {"mobilellm": "llama"}


def canonical(name: str) -> str:
    """The architecture that ``name`` (a model_type or GGUF architecture) stands for.

    Raises UnknownArchitectureError, listing the known names.
    """
    name = _ALIASES.get(name, name)
    if name not in _MODULES:
        known = ", ".join(sorted(_MODULES | _ALIASES))
        raise UnknownArchitectureError(
            f"architecture {name!r} is not supported, expected one of: {known}"
        )
    return name


def load(architecture: str) -> Any:
    """The module of a canonical architecture; imports torch."""
    return import_module(f"pocketslm.models.architectures.{_MODULES[canonical(architecture)]}")
