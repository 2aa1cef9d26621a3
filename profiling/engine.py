"""The interface of a runtime to the benchmark, and our own runtime behind it.

A peer is prepared in the parent process (``available``, ``prepare``); every runtime is measured in
a worker process (``import_library``, ``open``), where one loop times them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from pocketslm import __version__
from pocketslm.errors import BackendError
from pocketslm.runtime.arrays import np
from pocketslm.runtime.backends import (
    BACKENDS,
    Part,
    Session,
    SlotSession,
    TopSession,
    Wanted,
    open_session,
)
from pocketslm.runtime.bundle import open_bundle


@dataclass(frozen=True)
class Job:
    """One test for one worker. Counts are as in a Measurement.

    ids: the tokens that go first: the prompt, or what is in the cache before decoding (a single
    token with ``n_depth`` 0). context: tokens that the KV cache must hold. cold: drop the artefact
    from the page cache first. parallel: texts to generate at once.
    """

    runtime: str
    artefact: str
    backend: str
    threads: int
    context: int
    n_prompt: int
    n_gen: int
    n_depth: int
    ids: list[int]
    cold: bool = False
    parallel: int = 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Engine(Protocol):
    """A loaded model with the cache of one sequence; ``backend`` says what computes."""

    backend: str

    def reset(self) -> None:
        """Forget every token."""
        ...

    def prefill(self, ids: list[int]) -> int:
        """Run the first tokens of a sequence in one call. Returns the most probable next token."""
        ...

    def step(self) -> int:
        """Run the token that was returned last. Returns the most probable next one."""
        ...


class Runtime(Protocol):
    """A runtime. ``name`` is as in ``Measurement.runtime``."""

    name: str

    def version(self) -> str:
        """The version of the installed library."""
        ...

    def import_library(self, job: Job) -> None:
        """Import what ``open`` needs, so that load times leave it out."""
        ...

    def open(self, job: Job) -> Engine:
        """Load the artefact; raises BackendError, BundleError."""
        ...


class Peer(Runtime, Protocol):
    """Another runtime. ``artefact`` describes the file that it runs."""

    artefact: str

    def available(self) -> str | None:
        """None if it can run here. Otherwise the reason, and what to do about it."""
        ...

    def prepare(self, source: Path, cache: Path) -> Path:
        """Make the artefact from a checkpoint. A file that has to be written goes under ``cache``.

        Raises UsageError if this runtime cannot use that checkpoint, BackendError if its own
        converter fails.
        """
        ...


class PocketSlm:
    """This package's runtime."""

    name = "pocketslm"

    def version(self) -> str:
        return __version__

    def import_library(self, job: Job) -> None:
        graph = open_bundle(job.artefact, verify=False).graph(job.backend)
        if graph.backend in BACKENDS:
            with suppress(ImportError):  # open_session says it better
                module = import_module(BACKENDS[graph.backend][0])
                if hasattr(module, "load_library"):  # may compile, which is not loading a model
                    module.load_library()

    def open(self, job: Job) -> Engine:
        bundle = open_bundle(job.artefact, verify=False)
        session = open_session(bundle, job.backend, job.threads, job.context, job.parallel)
        return engine_over(session, job, generates=bundle.generates)


def runtime_named(name: str) -> Runtime:
    """Our runtime or a peer. Raises UsageError for an unknown name."""
    if name == PocketSlm.name:
        return PocketSlm()
    from pocketslm.profiling.peers import peer_named  # which a worker of ours does without

    return peer_named(name)


def engine_over(session: Session, job: Job, *, generates: bool) -> Engine:
    """What runs the job on a session. Raises BackendError where that makes one text at a time."""
    if job.parallel == 1:
        return SessionEngine(session, generates=generates)
    if not isinstance(session, SlotSession) or len(session.slots) < job.parallel:
        raise BackendError(
            f"{session.backend} makes one text at a time; use --backend native for several"
        )
    return SlotsEngine(session)


def greedy_step(session: Session) -> Callable[[Sequence[int]], int]:
    """A function that appends tokens and gives the most probable next one, by the cheapest way that
    the session has.
    """
    if not isinstance(session, TopSession):
        return lambda tokens: int(session.forward(np.asarray(tokens, np.int64))[0].argmax())
    fused = session

    def step(tokens: Sequence[int]) -> int:
        if len(tokens) == 1:
            return fused.step_greedy(tokens[0])
        return fused.forward_greedy(tokens)[0]

    return step


class SessionEngine:
    """One of our backends, driven as ``Model.generate`` or ``Model.embed`` drives it."""

    def __init__(self, session: Session, *, generates: bool = True) -> None:
        self._session = session
        self.backend = session.backend
        self._step = greedy_step(session) if generates else self._encode
        self._next = 0

    def _encode(self, ids: Sequence[int]) -> int:
        """Compute the hidden states of all tokens, as a mean over them needs. No token follows."""
        self._session.forward(np.asarray(ids, np.int64), all_logits=True)
        return 0

    def reset(self) -> None:
        self._session.truncate(0)

    def prefill(self, ids: list[int]) -> int:
        self._next = self._step(ids)
        return self._next

    def step(self) -> int:
        self._next = self._step([self._next])
        return self._next


class SlotsEngine:
    """Several texts at once, driven as ``runtime.batching`` drives them; all begin alike."""

    def __init__(self, session: SlotSession) -> None:
        self._session = session
        self.backend = session.backend
        self._next = [0]

    def reset(self) -> None:
        for slot in self._session.slots:
            slot.truncate(0)

    def prefill(self, ids: list[int]) -> int:
        return self._run([ids] * len(self._session.slots))

    def step(self) -> int:
        return self._run([[token] for token in self._next])

    def _run(self, tokens: list[list[int]]) -> int:
        parts = [Part(slot, ids, Wanted.NEXT) for slot, ids in enumerate(tokens)]
        found = self._session.forward_slots(parts)
        self._next = [int(one.tokens[0]) for one in found if one.tokens is not None]
        return self._next[0]


def missing_library(module: str, distribution: str) -> str | None:
    """Why a library cannot be used, without importing it."""
    if find_spec(module) is not None:
        return None
    return f"{distribution} is not installed; install it with `pip install {distribution}`"


def library_version(distribution: str) -> str:
    from pocketslm.profiling.machine import installed_version

    return installed_version(distribution) or "unknown"
