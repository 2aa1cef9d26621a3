"""Backends: each runs one kind of graph behind the same small session."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pocketslm.errors import BackendError
from pocketslm.runtime.bundle import Bundle

Logits = npt.NDArray[np.float32]

# Backend name -> (module, pip extra). Listed in the order of preference for "auto".
BACKENDS = {"onnx": ("pocketslm.runtime.backends.onnx", "runtime")}


class Session(Protocol):
    """A loaded graph and its KV cache, for one sequence.

    backend: a short name with version; vocab_size; context: the longest sequence in tokens;
    length: tokens in the cache now; threads in use.
    """

    backend: str
    vocab_size: int
    context: int
    length: int
    threads: int

    def forward(self, tokens: npt.NDArray[np.int64], *, all_logits: bool = False) -> Logits:
        """Append tokens [n] to the cache; logits [1, V] of the last, or [n, V] of all.

        The array may be reused by the next call. Raises ContextOverflowError.
        """
        ...

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens of the cache."""
        ...


def open_session(
    bundle: Bundle, backend: str = "auto", threads: int | None = None, context: int | None = None
) -> Session:
    """Load the bundle's graph for a backend ("auto": the first it has).

    ``context`` limits the KV cache below the graph's own limit. Raises BundleError where the
    bundle has no such graph, BackendError where the backend is unknown or not installed.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise BackendError(
            f"backend {backend!r} is unknown, expected one of: {', '.join(BACKENDS)}"
        )
    graph = bundle.graph(backend)
    if graph.backend not in BACKENDS:
        raise BackendError(f"{bundle.path} needs backend {graph.backend!r}, unknown here")
    module, extra = BACKENDS[graph.backend]
    try:
        loaded = import_module(module)
    except ImportError as error:
        raise BackendError(
            f"backend {graph.backend!r} is not installed ({error}); "
            f"install it with `pip install pocketslm[{extra}]`"
        ) from None
    session: Session = loaded.open_session(bundle, graph, threads, context)
    return session
