"""pocketslm: put small language models on phones and edge boards.

Programs use a model by ``from pocketslm import Model, GenerationConfig``: docs/how-to/python.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pocketslm.runtime.config import GenerationConfig as GenerationConfig
    from pocketslm.runtime.model import Model as Model

__version__ = "0.1.0"
__all__ = ["GenerationConfig", "Model", "__version__"]


def __getattr__(name: str) -> object:
    """What programs use, imported where it is asked for: the package itself stays light."""
    if name == "Model":
        from pocketslm.runtime.model import Model

        return Model
    if name == "GenerationConfig":
        from pocketslm.runtime.config import GenerationConfig

        return GenerationConfig
    raise AttributeError(f"module 'pocketslm' has no attribute {name!r}")
