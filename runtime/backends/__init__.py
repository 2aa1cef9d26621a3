"""Backends: each runs one kind of graph behind the same small session."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from pocketslm.errors import (
    BackendError,
    ContextOverflowError,
    PocketSlmError,
    UsageError,
)
from pocketslm.runtime import forks
from pocketslm.runtime.arrays import np
from pocketslm.runtime.bundle import Bundle, Graph
from pocketslm.runtime.config import GenerationConfig

if TYPE_CHECKING:
    import numpy.typing as npt

    from pocketslm.runtime.adapters import Update
    from pocketslm.runtime.answer import Made
    from pocketslm.runtime.tokenizer.packed import PackedTokenizer

Logits: TypeAlias = "npt.NDArray[np.float32]"

# Backend name -> (module, pip extra). Listed in the order of preference for "auto".
BACKENDS = {
    "native": ("pocketslm.runtime.backends.native", "runtime"),
    "onnx": ("pocketslm.runtime.backends.onnx", "runtime"),
    "onnx-pocketslm": ("pocketslm.runtime.backends.onnx", "runtime"),
    "executorch": ("pocketslm.runtime.backends.executorch", "executorch"),
    "executorch-pocketslm": ("pocketslm.runtime.backends.executorch", "executorch"),
    "runner": ("pocketslm.runtime.backends.runner", "runtime"),
}
# Most backends read the graph of their own name. These do not.
GRAPHS = {"runner": "native"}

# Those whose sessions may have several contexts.
SLOTTED = ("native",)

MAX_THREADS = 64
MAX_SLOTS = 16


class Session(Protocol):
    """A loaded graph and its KV cache, for one sequence.

    Several threads may call it, one at a time, but all work on the same sequence. Use
    :class:`pocketslm.runtime.generation.Engine` to give each caller its own.

    - ``backend``: a short name with version.
    - ``context``: the longest sequence in tokens.
    - ``threads``: how many are in use.
    """

    backend: str
    vocab_size: int
    context: int
    threads: int

    @property
    def length(self) -> int:
        """Tokens in the cache now."""
        ...

    def forward(self, tokens: npt.NDArray[np.int64], *, all_logits: bool = False) -> Logits:
        """Append tokens [n] to the cache; logits [1, V] of the last, or [n, V] of all.

        A model of embeddings gives hidden states [1, H] or [n, H]; an encoder keeps no tokens. The
        next call may reuse the array. Raises ContextOverflowError, or BackendError if a logit is
        not finite; the cache is then unchanged.
        """
        ...

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens of the cache.

        Any length up to the present one will do, but see :class:`ForgettingSession`. Raises
        UsageError.
        """
        ...


@runtime_checkable
class ForgettingSession(Session, Protocol):
    """A session whose state forgets early tokens: attention with a window keeps only the tokens of
    the window, a convolution only its last columns.
    """

    @property
    def rewind_limit(self) -> int:
        """``truncate`` accepts 0, and any length from this one to the present one."""
        ...


@runtime_checkable
class SavingSession(Session, Protocol):
    """A session whose state can be had as bytes, and be put back."""

    @property
    def form(self) -> str:
        """What saved states depend on beside the weights; only those of the same form fit."""
        ...

    def save(self) -> bytes:
        """The state as it is now."""
        ...

    def restore(self, length: int, saved: bytes | memoryview) -> None:
        """Replace the state by one that was saved at ``length`` tokens. Raises UsageError."""
        ...


@runtime_checkable
class PackedSession(Session, Protocol):
    """A session whose model file has the tokenizer, too."""

    def tokenizer(self) -> PackedTokenizer | None:
        """What export packed of ``tokenizer.json``; None where it is of a form that it does not."""
        ...


@dataclass(frozen=True, slots=True)
class Penalty:
    """What a text repeats is less probable: see ``repetition_penalty`` in ``runtime.sampling``.

    factor: 1 to 100. seen: the end of the text, of any length, with the tokens of the call.
    """

    factor: float
    seen: Sequence[int]


@runtime_checkable
class TopSession(Session, Protocol):
    """A session that finds the most probable tokens without giving all logits."""

    def forward_top(
        self, tokens: npt.NDArray[np.int64], count: int
    ) -> tuple[npt.NDArray[np.int32], Logits, float]:
        """Append tokens [n]. Returns the ``count`` most probable next tokens (all if there are
        fewer), their logits, and the logarithm of the sum of exp over all logits.
        """
        ...

    def step_greedy(self, token: int) -> int:
        """Append one token. Returns the most probable next one as soon as it is certain."""
        ...

    def forward_greedy(
        self,
        tokens: Sequence[int],
        following: int = 1,
        penalty: Penalty | None = None,
    ) -> list[int]:
        """Append tokens [n]. Returns what most probably follows each of the last ``following``,
        penalized by what was seen up to it."""
        ...


class Maker(Protocol):
    """A text that a session makes by itself."""

    def make(self) -> list[Made]:
        """The next tokens, several where guesses were right; none where a part of a long prompt was
        read. Not after a finish. Raises UsageError where the session was used for something else.
        """
        ...


@runtime_checkable
class MakingSession(Session, Protocol):
    """A session that makes texts by itself: no logits cross its border."""

    def maker(
        self,
        ids: Sequence[int],
        config: GenerationConfig,
        eos: Collection[int],
        limit: int,
        limits: Any,
    ) -> Maker:
        """What goes on from the prompt ``ids``, of which the session holds the beginning, for at
        most ``limit`` tokens. limits: the constraint that the answer is held to, or None."""
        ...


@runtime_checkable
class AdapterSession(Session, Protocol):
    """A session that adds low-rank updates to its weights as it runs."""

    def set_adapter(self, number: int, updates: Sequence[Update]) -> None:
        """Let adapter ``number``, from 1 on, be these updates and no others. Of a session that uses
        it the context is forgotten: other weights made it. Raises UsageError where an update does
        not belong to the model, or the number is too high.
        """
        ...

    def use_adapter(self, number: int) -> None:
        """Take an adapter that was set from now on, or 0: none. The context is forgotten, if that
        is a change. Raises UsageError.
        """
        ...


class Wanted(IntEnum):
    """What :meth:`SlotSession.forward_slots` gives of the tokens that may come next.

    NEXT: the most probable one; TOP: the highest logits, as ``TopSession.forward_top`` gives them;
    LOGITS: all.
    """

    NOTHING = 0
    NEXT = 1
    TOP = 2
    LOGITS = 3


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens for one slot, and what is wanted behind them.

    following: the last so many tokens are those behind which it is wanted; of TOP one. highest: of
    TOP, how many. penalty: of NEXT.
    """

    slot: int
    tokens: Sequence[int]
    wanted: Wanted
    highest: int = 0
    penalty: Penalty | None = None
    following: int = 1


class Following(NamedTuple):
    """What may come next; what was not wanted is None."""

    tokens: npt.NDArray[np.int32] | None
    logits: Logits | None
    log_total: float | None


@runtime_checkable
class SlotSession(MakingSession, Protocol):
    """A session of several contexts, whose tokens go through the model together.

    slots: a session for each of the contexts, of which this session is the first.
    """

    slots: Sequence[MakingSession]

    def make(self, makers: Sequence[Any]) -> list[list[Made] | PocketSlmError]:
        """A step of texts of different slots, each of which gets what it gets alone: of each what
        :meth:`Maker.make` gives, or what is wrong with it."""
        ...

    def forward_slots(self, parts: Sequence[Part]) -> list[Following]:
        """Append tokens to slots, to each once at most; every slot gets the bits that it gets
        alone. What fails changes no slot. Raises as ``forward`` does."""
        ...


def check_tokens(session: Session, tokens: npt.NDArray[np.integer[Any]]) -> None:
    """What every backend refuses before anything is allocated or run.

    Raises UsageError for an empty call or ids outside the vocabulary, ContextOverflowError if the
    tokens do not fit.
    """
    if tokens.ndim != 1 or tokens.size == 0:
        raise UsageError(f"forward needs at least one token, as a vector, not {tokens.shape}")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise UsageError(f"token ids are whole numbers, not {tokens.dtype}")
    check_room(session, tokens.size)
    check_vocabulary(session, tokens.tolist())


def check_room(session: Session, count: int) -> None:
    """Raise ContextOverflowError if so many more tokens do not fit."""
    if session.length + count > session.context:
        raise ContextOverflowError(
            f"{session.length} + {count} tokens do not fit the context of "
            f"{session.context}; shorten the prompt or export with a longer --context"
        )


def check_vocabulary(session: Session, tokens: Collection[int]) -> None:
    """Raise UsageError for ids outside the vocabulary."""
    low, high = min(tokens), max(tokens)
    if low < 0 or high >= session.vocab_size:
        raise UsageError(f"token ids {low} to {high} are not within 0 to {session.vocab_size - 1}")


def check_logits(session: Session, logits: Logits) -> None:
    """Raise BackendError if a logit is NaN or infinite: no token could be chosen."""
    if not np.isfinite(logits).all():
        raise BackendError(
            f"{session.backend}: the model's logits are not finite: its weights are damaged"
        )


def check_threads(threads: int | None) -> None:
    """Raise UsageError for a number of threads that no backend starts."""
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"threads is {threads}, expected 1 to {MAX_THREADS}")


class OneProcess:
    """The lock of a session whose runtime has threads, which a fork would leave behind."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forked = False
        forks.watch(self)

    def after_fork(self) -> None:
        self._lock, self._forked = threading.Lock(), True

    @property
    def lock(self) -> threading.Lock:
        """Hold this while you use the session. Raises BackendError in a forked process."""
        if self._forked:
            raise BackendError(
                "this session's threads stayed behind in a fork; load the model in this process"
            )
        return self._lock


def usable_cores() -> int:
    """Logical cores that this process may run on; many containers allow only some of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def open_session(
    bundle: Bundle,
    backend: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    slots: int = 1,
) -> Session:
    """Load the bundle's graph for a backend.

    "auto" takes the first of the bundle's graphs whose backend works here: the native operators
    need a C++ compiler once, where the package was installed without one. ``context`` limits the
    KV cache below the graph's own limit. ``slots``: contexts to ask for; backends that have no
    :class:`SlotSession`, and models of embeddings, have one. Raises BundleError where the bundle
    has no such graph or its files changed since they were verified, BackendError where the backend
    is unknown or not installed.
    """
    if not 1 <= slots <= MAX_SLOTS:
        raise UsageError(f"{slots} texts at once, expected 1 to {MAX_SLOTS}")
    session = _first_that_opens(bundle, backend, threads, context, slots)
    bundle.require_unchanged()
    return session


def _first_that_opens(
    bundle: Bundle, backend: str, threads: int | None, context: int | None, slots: int
) -> Session:
    if backend != "auto":
        if backend not in BACKENDS:
            known = ", ".join(BACKENDS)
            raise BackendError(f"backend {backend!r} is unknown, expected one of: {known}")
        graph = bundle.graph(GRAPHS.get(backend, backend))
        return _open(bundle, graph, backend, threads, context, slots)
    reasons = []
    for graph in bundle.graphs:
        try:
            return _open(bundle, graph, graph.backend, threads, context, slots)
        except BackendError as error:
            reasons.append(str(error))
    raise BackendError("; ".join(reasons))


def _open(
    bundle: Bundle,
    graph: Graph,
    backend: str,
    threads: int | None,
    context: int | None,
    slots: int,
) -> Session:
    if backend not in BACKENDS:
        raise BackendError(f"{bundle.path} needs backend {backend!r}, unknown here")
    if not bundle.generates and backend not in ("native", "onnx"):
        raise BackendError(
            f"backend {backend!r} does not run models of embeddings; use --backend native or onnx"
        )
    if context is not None and not 1 <= context <= graph.context:
        raise UsageError(
            f"context {context} is not within the graph's 1 to {graph.context} tokens; "
            "export with a longer --context"
        )
    check_threads(threads)
    module, extra = BACKENDS[backend]
    try:
        loaded = import_module(module)
    except ImportError as error:
        raise BackendError(
            f"backend {backend!r} is not installed ({error}); "
            f"install it with `pip install pocketslm[{extra}]`"
        ) from None
    more = {"slots": slots} if backend in SLOTTED and bundle.generates else {}
    session: Session = loaded.open_session(bundle, graph, threads, context, **more)
    return session
