"""numpy, imported where an array is first made: it takes 13 MB, and the native engine makes text
without arrays."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
else:

    class _Numpy:
        def __getattr__(self, name: str) -> Any:
            found = getattr(import_module("numpy"), name)
            setattr(self, name, found)  # so that it is asked for once
            return found

    np = _Numpy()

__all__ = ["np"]
