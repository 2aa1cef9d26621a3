"""Beginnings of prompts that are read once: their states in memory and, in a folder, for later
processes.

A state is a session's cache after some tokens. A prompt takes up the one that shares most with it,
and only reads the rest. A file of a folder is a line of JSON, the token ids and the state; it
appears whole, is mapped where it is read, and is removed where it is not what it says it is.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import threading
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

from pocketslm import schema
from pocketslm.errors import UsageError
from pocketslm.runtime import forks
from pocketslm.runtime.backends import SavingSession

FORMAT, VERSION = "pocketslm-prefix", 1
DISK, MEMORY = 1 << 30, 256 << 20
LEAST = 32  # tokens that it pays to keep; fewer are sooner read
SUFFIX = ".prefix"
ANYONE = "prompt"  # the name of what belongs to nothing else
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ALIGNED, _MOST_HEADER = 64, 4096

Ids: TypeAlias = "array[int]"  # of 32 bits


@dataclass(frozen=True)
class Identity:
    """What a state depends on.

    model and adapter: the SHA-256 of their files, "" without an adapter. engine: its
    `SavingSession.form`. whole: the model forgets tokens (a window, a convolution), so that a state
    serves only prompts which begin with all of its own.
    """

    model: str
    adapter: str
    engine: str
    whole: bool

    @property
    def digest(self) -> str:
        return _digest(json.dumps(asdict(self)).encode())


@dataclass(frozen=True, eq=False)
class State:
    """A session's cache after ``tokens``."""

    identity: Identity
    tokens: Ids
    data: bytes | memoryview

    def serves(self, ids: Ids) -> int:
        """How many tokens of a prompt it holds."""
        count = shared(self.tokens, ids)
        return 0 if self.identity.whole and count < len(self.tokens) else count

    def replaces(self, other: State) -> bool:
        """Whether whatever the other serves, this one does."""
        if self.identity != other.identity:
            return False
        count = shared(self.tokens, other.tokens)
        return count == len(other.tokens) and (not self.identity.whole or count == len(self.tokens))


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return next(
        (at for at, (mine, theirs) in enumerate(zip(one, other, strict=False)) if mine != theirs),
        min(len(one), len(other)),
    )


def _ids(tokens: Sequence[int]) -> Ids:
    try:
        return array("i", tokens)
    except OverflowError:
        raise UsageError("a token id is beyond 32 bits, expected one of the vocabulary") from None


class Prefixes:
    """States of prompts, of any models, for any threads and processes.

    folder: where they outlast the process; None: only in memory. disk and memory: bytes that they
    may take there; the least recently used go first. prompts: keep the state of every prompt in the
    folder, not only what :meth:`pocketslm.runtime.model.Model.keep_prefix` names. Raises UsageError
    where the folder cannot be made, or a limit is negative.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        disk: int = DISK,
        memory: int = MEMORY,
        prompts: bool = True,
    ) -> None:
        for name, limit in (("disk", disk), ("memory", memory)):
            if limit < 0:
                raise UsageError(f"{name} is {limit}, expected bytes from 0 on")
        self.folder = None if folder is None else Path(folder).expanduser()
        self.disk, self.memory = disk, memory
        self.prompts = prompts and self.folder is not None
        self._held: list[State] = []  # the most recently used last
        self.after_fork()
        forks.watch(self)
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"{folder} cannot hold prefixes: {error.strerror}") from None

    def after_fork(self) -> None:
        self._lock = threading.Lock()

    def find(self, identity: Identity, ids: Ids, least: int) -> State | None:
        """The state that serves most of a prompt, at least ``least`` tokens."""
        best, most = None, least - 1
        with self._lock:
            for state in self._held:
                if state.identity == identity and (count := state.serves(ids)) > most:
                    best, most = state, count
            if best is not None:
                self._held.remove(best)
                self._held.append(best)
        files = sorted(self._files(identity), key=lambda file: -file.state.serves(ids))
        for path, state, checksum in files:
            if state.serves(ids) <= most:
                break
            if _checksum(state.tokens, state.data) == checksum:
                with suppress(OSError):
                    os.utime(path)
                return state
            path.unlink(missing_ok=True)
        return best

    def hold(self, state: State) -> None:
        """Keep a state in memory."""
        if len(state.data) > self.memory:
            return
        with self._lock:
            self._held = [held for held in self._held if not state.replaces(held)]
            self._held.append(state)
            while sum(len(held.data) for held in self._held) > self.memory:
                del self._held[0]

    def holds(self, identity: Identity, tokens: Ids) -> bool:
        """Whether memory has these tokens already."""
        with self._lock:
            return any(
                held.identity == identity and held.serves(tokens) == len(tokens)
                for held in self._held
            )

    def keep(self, state: State, name: str = ANYONE) -> bool:
        """Keep a state in the folder, under a name by which it can be forgotten; False where it
        has no place there: the disk is full, or the state is larger than the limit."""
        if self.folder is None:
            return False
        data = _header(state), state.tokens.tobytes(), state.data
        size = sum(map(len, data))
        if size > self.disk:
            return False
        path = self._path(state.identity, state.tokens, name)
        try:
            for other, held, _ in self._files(state.identity, name):
                if state.replaces(held):
                    other.unlink(missing_ok=True)
            self._evict(self.disk - size)
            from pocketslm import folders

            with folders.aside(self.folder) as place:
                part = place / path.name
                with part.open("wb") as file:
                    file.writelines(data)
                folders.put_file(part, path)
        except OSError:
            return False
        return True

    def known(self, identity: Identity, tokens: Ids) -> int:
        """How many tokens of a prompt the folder serves."""
        return max((file.state.serves(tokens) for file in self._files(identity)), default=0)

    def keeps(self, identity: Identity, tokens: Ids, name: str = ANYONE) -> bool:
        """Whether the folder has just these tokens under this name."""
        return self.folder is not None and self._path(identity, tokens, name).exists()

    def forget(self, name: str) -> None:
        """Remove what the folder has under a name."""
        forget(self.folder, name)

    def _path(self, identity: Identity, tokens: Ids, name: str) -> Path:
        assert self.folder is not None
        digest = _digest(tokens.tobytes())
        return self.folder / f"{_named(name)}.{identity.digest}.{digest}{SUFFIX}"

    def _files(self, identity: Identity, name: str = "*") -> Iterator[_File]:
        """The folder's states of one identity; those that are none are removed."""
        if self.folder is None:
            return
        for path in self.folder.glob(f"{name}.{identity.digest}.*{SUFFIX}"):
            try:
                yield _read(path, identity)
            except OSError:  # another process removed it
                continue
            except ValueError:
                path.unlink(missing_ok=True)

    def _evict(self, limit: int) -> None:
        """Remove what was not used for longest, until the rest fits."""
        assert self.folder is not None
        found = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            with suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime_ns, path.name, status.st_size))
        total = sum(size for *_, size in found)
        for _, name, size in sorted(found):
            if total <= limit:
                break
            (self.folder / name).unlink(missing_ok=True)
            total -= size


def forget(folder: Path | None, name: str) -> None:
    """Remove what a folder of prefixes has under a name, also where it is not all written yet."""
    for path in folder.rglob(f"{_named(name)}.*{SUFFIX}") if folder is not None else ():
        path.unlink(missing_ok=True)


def _named(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UsageError(f"a prefix is called {name!r}, expected letters, digits, - and _")
    return name


def _digest(data: bytes) -> str:
    import hashlib  # with OpenSSL's library, which takes 3 MB

    return hashlib.sha256(data).hexdigest()[:16]


def _checksum(tokens: Ids, data: bytes | memoryview) -> int:
    """Tells a file that was cut or changed, in less than a token's time."""
    sizes = f"{len(tokens)} {len(data)}".encode()
    return zlib.crc32(data, zlib.crc32(tokens, zlib.crc32(sizes)))


@dataclass(frozen=True)
class _Header:
    """The first line of a file, which ends where numbers may begin. tokens and bytes: how many
    follow."""

    format: str
    version: int
    identity: Identity
    tokens: int
    bytes: int
    crc32: int


def _header(state: State) -> bytes:
    checksum = _checksum(state.tokens, state.data)
    header = _Header(FORMAT, VERSION, state.identity, len(state.tokens), len(state.data), checksum)
    line = json.dumps(asdict(header)).encode()
    return line + b" " * (-(len(line) + 1) % _ALIGNED) + b"\n"


class _File(NamedTuple):
    """A file and what it says of itself."""

    path: Path
    state: State
    checksum: int


def _read(path: Path, identity: Identity) -> _File:
    """Raises OSError, and ValueError where a file is cut or not of this identity."""
    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    line = bytes(data[:_MOST_HEADER]).partition(b"\n")[0]
    header = schema.build(_Header, schema.loads(line))
    at, size = len(line) + 1, 4 * header.tokens
    if header.identity != identity or (header.format, header.version) != (FORMAT, VERSION):
        raise ValueError("of something else")
    if min(header.tokens, header.bytes) < 0 or len(data) != at + size + header.bytes:
        raise ValueError("cut")
    tokens = array("i", bytes(data[at : at + size]))
    return _File(path, State(identity, tokens, data[at + size :]), header.crc32)


class Keeping:
    """What a session takes from a store, and puts there."""

    def __init__(
        self, store: Prefixes, session: SavingSession, model: str, adapter: str, whole: bool
    ) -> None:
        self.store, self._session = store, session
        self._identity = Identity(model, adapter, session.form, whole)

    def recall(self, ids: Sequence[int], cached: Sequence[int], reach: int) -> list[int] | None:
        """Restore the state that serves more of a prompt than the ``reach`` tokens that the session
        has; its tokens, or None where there is none that does. What the session then forgets is
        held in memory, where that is more than goes on."""
        if len(cached) - reach > max(LEAST, reach):
            self._hold(cached)
        least = reach + LEAST
        if len(ids) <= least:
            return None
        found = self.store.find(self._identity, _ids(ids[:-1]), least)
        if found is None:
            return None
        try:
            self._session.restore(len(found.tokens), found.data)
        except UsageError:  # it says the right things about itself, and is of the wrong size
            return None
        tokens: list[int] = found.tokens.tolist()
        return tokens

    def keeps(self, tokens: Sequence[int], name: str) -> bool:
        """Whether there is nothing to do for :meth:`keep`."""
        ids = _ids(tokens)
        if self.store.folder is None:
            return self.store.holds(self._identity, ids)
        return self.store.keeps(self._identity, ids, name)

    def keep(self, tokens: Sequence[int], name: str = ANYONE) -> bool:
        """Keep the session's state, which is that after ``tokens``; whether there was place."""
        if self.store.folder is None:
            self._hold(tokens)
            return self.keeps(tokens, name)
        return self.store.keep(self._state(tokens), name)

    def keep_prompt(self, tokens: Sequence[int]) -> None:
        """Keep the state after a prompt, if the store is to keep prompts and lacks much of it."""
        if self.store.prompts:
            ids = _ids(tokens)
            lacking = len(ids) - self.store.known(self._identity, ids)
            if lacking >= max(LEAST, len(ids) // 8):
                self.keep(tokens)

    def _hold(self, tokens: Sequence[int]) -> None:
        """Keep the session's state in memory."""
        ids = _ids(tokens)
        if self._session.length == len(ids) and not self.store.holds(self._identity, ids):
            self.store.hold(self._state(tokens))

    def _state(self, tokens: Sequence[int]) -> State:
        ids = _ids(tokens)
        return State(self._identity, ids, self._session.save())
