"""The native operators as a backend: ctypes over the C border of ``runtime/ops``."""

from __future__ import annotations

import copy
import ctypes
import os
import threading
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any
from weakref import ref

from pocketslm.errors import BackendError, BundleError, PocketSlmError, UsageError
from pocketslm.runtime import forks
from pocketslm.runtime.adapters import Update
from pocketslm.runtime.answer import Made
from pocketslm.runtime.arrays import np
from pocketslm.runtime.backends import (
    MAX_SLOTS,
    Following,
    Part,
    Penalty,
    Wanted,
    check_room,
    check_threads,
    check_tokens,
    check_vocabulary,
)
from pocketslm.runtime.backends.native_generator import NativeGenerator
from pocketslm.runtime.backends.native_library import (
    Entry,
    ErrorText,
    Generation,
    ModelInfo,
    Options,
    PenaltyEntry,
    SessionInfo,
    Times,
    Turn,
    UpdateEntry,
    isa_names,
    library_path,
    load_library,
)
from pocketslm.runtime.backends.native_tokenizer import NativeTokenizer
from pocketslm.runtime.bundle import Bundle, Graph, file_entry
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.ops.ids import ROLE

if TYPE_CHECKING:
    import numpy.typing as npt

    from pocketslm.runtime.constraint import Constraint

KV_TYPES = {"fp16": 0, "int8": 1}
LOGITS_LAST, LOGITS_ALL = 1, 2
# The roles that the matrices which an adapter may update have in a model.slm.
ROLES = {"q_proj": ROLE["query"], "k_proj": ROLE["key"], "v_proj": ROLE["value"]}
ROLES |= {"o_proj": ROLE["output"], "gate_proj": ROLE["gate"], "up_proj": ROLE["up"]}
ROLES |= {"down_proj": ROLE["down"]}


def open_session(
    bundle: Bundle, graph: Graph, threads: int | None, context: int | None, slots: int = 1
) -> NativeSession:
    """A session over the bundle's ``model.slm``; see :mod:`pocketslm.runtime.backends`."""
    if graph.kv_cache not in KV_TYPES:
        known = ", ".join(KV_TYPES)
        raise BackendError(f"KV cache type {graph.kv_cache!r} is not supported; known: {known}")
    model = NativeModel(bundle.path / graph.file)
    limit = min(graph.context, model.info.max_context)
    return model.session(
        context=min(context or limit, limit), threads=threads, kv_type=graph.kv_cache, slots=slots
    )


def _penalty_entry(penalty: Penalty) -> PenaltyEntry:
    tokens = array("i", penalty.seen)
    entry = PenaltyEntry(penalty.factor, *tokens.buffer_info())
    entry.tokens = tokens
    return entry


def _encode(isa: str | None) -> bytes | None:
    return None if isa is None else isa.encode()


@dataclass(frozen=True)
class NativeModelInfo:
    """What a model.slm says about itself.

    ``heads``, ``kv_heads``, ``head_dim`` and ``intermediate_size`` are those of the widest layer;
    ``output_size`` is ``vocab_size``, or ``hidden_size`` of an encoder; ``states`` counts what a
    session keeps of its tokens, such as keys and values of a layer.
    """

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_context: int
    output_size: int
    states: int
    file_bytes: int
    bytes_per_token: int
    macs_per_token: int
    head_macs: int


@dataclass(frozen=True)
class OperatorTimes:
    """Nanoseconds by operator, including the time spent waiting for other threads. Norms and
    quantization count towards the product that they feed. The times are sums over ``calls`` of the
    engine with ``tokens`` in all.
    """

    calls: int
    tokens: int
    embedding_ns: int
    qkv_ns: int
    attention_ns: int
    output_ns: int
    gate_up_ns: int
    down_ns: int
    head_ns: int


class NativeModel:
    """A mapped and checked model.slm, shared by its sessions."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._library = load_library()
        self._handle = ctypes.c_void_p()
        error = ErrorText()
        status = self._library.pslm_model_open(
            os.fsencode(path), ctypes.byref(self._handle), error.argument
        )
        error.check(status, str(path))
        info = ModelInfo()
        self._library.pslm_model_describe(self._handle, ctypes.byref(info))
        self.info = NativeModelInfo(
            **{f.name: getattr(info, f.name) for f in fields(NativeModelInfo)}
        )

    def session(
        self,
        *,
        context: int | None = None,
        threads: int | None = None,
        kv_type: str = "fp16",
        isa: str | None = None,
        pin: bool = False,
        slots: int = 1,
    ) -> NativeSession:
        return NativeSession(
            self, context=context, threads=threads, kv_type=kv_type, isa=isa, pin=pin, slots=slots
        )

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.pslm_model_close(self._handle)


class _Shared:
    """What the sessions of one handle share: the handle, and which of its slots is in use."""

    def __init__(self) -> None:
        self._library = load_library()
        self.handle = ctypes.c_void_p()
        self.slot = 0
        self.makers: dict[int, ref[NativeGenerator]] = {}  # by slot, the text that is made there
        self.turns = (Turn * MAX_SLOTS)()
        self.after_fork()
        forks.watch(self)

    def after_fork(self) -> None:
        """The library itself knows which sessions have lost their threads."""
        # Of calls, their buffers and the handle, which calls of other threads must not find closed.
        # A thread that has it may drop a generator, which takes it again.
        self.lock = threading.RLock()

    def end(self, slots: Sequence[int]) -> None:
        """Close the generators of slots."""
        for slot in slots:
            made = self.makers.pop(slot, None)
            if made is not None and (maker := made()) is not None and maker.handle:
                maker.close()

    def close(self) -> None:
        with self.lock:
            self.end(list(self.makers))
            handle, self.handle = self.handle, ctypes.c_void_p()
            self._library.pslm_session_close(handle)

    def __del__(self) -> None:
        self.close()


class NativeSession:
    """A context over a model: tokens go in, logits come out, keys and values stay.

    slots: contexts that share buffers and threads; this session is the first of ``self.slots``.
    Raises BackendError where it comes out of a fork of the process that opened it.
    """

    def __init__(
        self,
        model: NativeModel,
        *,
        context: int | None = None,
        threads: int | None = None,
        kv_type: str = "fp16",
        isa: str | None = None,
        pin: bool = False,
        slots: int = 1,
    ) -> None:
        if kv_type not in KV_TYPES:
            raise UsageError(f"KV type {kv_type!r}; known: {', '.join(KV_TYPES)}")
        check_threads(threads)
        if context is not None and not 1 <= context <= model.info.max_context:
            raise UsageError(f"context is {context}, expected 1 to {model.info.max_context}")
        self.model = model  # keeps the mapping alive
        self._library = load_library()
        self._shared, self._slot = _Shared(), 0
        options = Options(context or 0, threads or 0, KV_TYPES[kv_type], int(pin), _encode(isa))
        error = ErrorText()
        status = self._library.pslm_session_open_slots(
            model._handle,
            ctypes.byref(options),
            slots,
            ctypes.byref(self._shared.handle),
            error.argument,
        )
        if status == 6:
            asked = isa or os.environ.get("POCKETSLM_ISA", "auto")
            raise BackendError(f"kernel path {asked!r}; this CPU has: {', '.join(isa_names())}")
        error.check(status)
        info = SessionInfo()
        self._library.pslm_session_describe(self._shared.handle, ctypes.byref(info))
        self.vocab_size = model.info.vocab_size
        self.context: int = info.context
        self.threads: int = info.threads
        self.kv_bytes: int = info.kv_bytes
        self.isa: str = info.isa.decode()
        self.kv_type: str = kv_type
        self.backend = f"native {self.isa}"
        self._next = ctypes.c_int32()
        self._error = ErrorText()
        self._others = [self._at(slot) for slot in range(1, slots)]

    def _at(self, slot: int) -> NativeSession:
        """The same session with another slot in use."""
        other = copy.copy(self)
        other._slot = slot
        return other

    @property
    def slots(self) -> Sequence[NativeSession]:
        """See :class:`pocketslm.runtime.backends.SlotSession`."""
        return [self, *self._others]

    @property
    def _lock(self) -> threading.RLock:
        return self._shared.lock

    @property
    def length(self) -> int:
        """Positions filled so far."""
        with self._lock:
            return int(self._library.pslm_length(self._open()))

    def forward(
        self, tokens: npt.NDArray[np.integer[Any]], *, all_logits: bool = False
    ) -> npt.NDArray[np.float32]:
        """See :class:`pocketslm.runtime.backends.Session`."""
        ids = np.asarray(tokens)
        check_tokens(self, ids)
        ids = np.ascontiguousarray(ids, dtype=np.int32)
        rows = ids.size if all_logits else 1
        out = np.empty((rows, self.model.info.output_size), np.float32)
        with self._lock:
            status = self._library.pslm_forward(
                self._changing(),
                ids.ctypes.data,
                ids.size,
                LOGITS_ALL if all_logits else LOGITS_LAST,
                out.ctypes.data,
                out.size,
                self._error.argument,
            )
            self._error.check(status)
        return out

    def forward_top(
        self, tokens: npt.NDArray[np.integer[Any]], count: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], float]:
        """See :class:`pocketslm.runtime.backends.TopSession`."""
        ids = np.asarray(tokens)
        check_tokens(self, ids)
        ids = np.ascontiguousarray(ids, dtype=np.int32)
        count = min(count, self.vocab_size)
        best, logits = np.empty(count, np.int32), np.empty(count, np.float32)
        log_total = ctypes.c_double()
        with self._lock:
            status = self._library.pslm_forward_top(
                self._changing(),
                ids.ctypes.data,
                ids.size,
                count,
                best.ctypes.data,
                logits.ctypes.data,
                ctypes.byref(log_total),
                self._error.argument,
            )
            self._error.check(status)
        return best, logits, log_total.value

    def step_greedy(self, token: int) -> int:
        """Append one token. Returns the most probable next one. No logits are copied, and of a
        split 8-bit head only the rows that may win are read in full (see ``runtime/ops/head.cpp``).
        """
        if not 0 <= token < self.vocab_size:  # before ctypes cuts it to 32 bits
            raise UsageError(f"token {token} is outside the vocabulary of {self.vocab_size}")
        with self._lock:
            status = self._library.pslm_step_greedy(
                self._changing(), token, ctypes.byref(self._next), self._error.argument
            )
            self._error.check(status)
            return self._next.value

    def forward_greedy(
        self,
        tokens: Sequence[int],
        following: int = 1,
        penalty: Penalty | None = None,
    ) -> list[int]:
        """See :class:`pocketslm.runtime.backends.TopSession`."""
        if not 1 <= following <= len(tokens):
            raise UsageError(f"what follows {following} tokens of {len(tokens)} was asked for")
        check_room(self, len(tokens))
        check_vocabulary(self, tokens)
        ids, found = array("i", tokens), (ctypes.c_int32 * following)()
        penalized = ctypes.byref(_penalty_entry(penalty)) if penalty else None
        with self._lock:
            status = self._library.pslm_forward_greedy(
                self._changing(),
                *ids.buffer_info(),
                following,
                penalized,
                found,
                self._error.argument,
            )
            self._error.check(status)
        return list(found)

    def maker(
        self,
        ids: Sequence[int],
        config: GenerationConfig,
        eos: Collection[int],
        limit: int,
        limits: Constraint | None,
    ) -> NativeGenerator:
        """See :class:`pocketslm.runtime.backends.MakingSession`."""
        return NativeGenerator(self, ids, config, eos, limit, limits)

    def tokenizer(self) -> NativeTokenizer | None:
        """See :class:`pocketslm.runtime.backends.PackedSession`."""
        try:
            return NativeTokenizer(self.model)
        except BundleError:  # there is none, or one for another version of the library
            return None

    def make(self, makers: Sequence[NativeGenerator]) -> list[list[Made] | PocketSlmError]:
        """See :class:`pocketslm.runtime.backends.SlotSession`."""
        turns = self._shared.turns
        with self._lock:
            for turn, maker in zip(turns, makers, strict=False):
                turn.generator, turn.error = maker.open(), maker.error.argument
            status = self._library.pslm_generate(turns, len(makers), self._error.argument)
            self._error.check(status)
            return [maker.made(turn) for turn, maker in zip(turns, makers, strict=False)]

    def make_one(self, maker: NativeGenerator, turn: Any) -> None:
        """As :meth:`make` for a text alone, whose turn the maker keeps."""
        with self._lock:
            maker.open()
            self._error.check(self._library.pslm_generate(turn, 1, self._error.argument))

    def begin(self, maker: NativeGenerator, ids: array[int], how: Generation) -> None:
        """Open a generator in this slot, which ends the one before."""
        with self._lock:
            status = self._library.pslm_generator_open(
                self._changing(),
                *ids.buffer_info(),
                ctypes.byref(how),
                ctypes.byref(maker.handle),
                maker.error.argument,
            )
            maker.error.check(status)
            self._shared.makers[self._slot] = ref(maker)

    def end(self, maker: NativeGenerator) -> None:
        """Close a generator."""
        with self._lock:
            handle, maker.handle = maker.handle, ctypes.c_void_p()
            self._library.pslm_generator_close(handle)

    @property
    def rewind_limit(self) -> int:
        """See :class:`pocketslm.runtime.backends.ForgettingSession`."""
        with self._lock:
            return int(self._library.pslm_rewind_limit(self._open()))

    def truncate(self, length: int) -> None:
        """See :class:`pocketslm.runtime.backends.Session`."""
        limit, filled = self.rewind_limit, self.length
        if length != 0 and not limit <= length <= filled:
            raise UsageError(
                f"cannot truncate {filled} cached tokens to {length}, expected 0 or {limit} to "
                f"{filled}"
            )
        with self._lock:
            self._error.check(self._library.pslm_truncate(self._changing(), length))

    def set_adapter(self, number: int, updates: Sequence[Update]) -> None:
        """See :class:`pocketslm.runtime.backends.AdapterSession`."""
        array = (UpdateEntry * len(updates))()
        kept = []  # until they are copied
        for one, update in zip(array, updates, strict=True):
            a, b = (np.ascontiguousarray(part.T, np.float32) for part in (update.a, update.b))
            kept += [a, b]
            one.role, one.layer = ROLES.get(update.part, 0), update.layer
            one.rows, one.cols, one.rank = b.shape[1], *a.shape
            one.a, one.b = a.ctypes.data, b.ctypes.data
        with self._lock:
            status = self._library.pslm_set_updates(
                self._open(), number, array, len(updates), self._error.argument
            )
            self._error.check(status)

    def use_adapter(self, number: int) -> None:
        """See :class:`pocketslm.runtime.backends.AdapterSession`."""
        with self._lock:
            status = self._library.pslm_use_adapter(self._changing(), number, self._error.argument)
            self._error.check(status)

    def profile(self, on: bool = True) -> None:
        """Begin to measure the time of each operator from zero, or stop."""
        with self._lock:
            self._library.pslm_set_profiling(self._open(), int(on))

    def times(self) -> OperatorTimes:
        """Time by operator since :meth:`profile`."""
        times = Times()
        with self._lock:
            self._library.pslm_read_times(self._open(), ctypes.byref(times))
        return OperatorTimes(**{f.name: getattr(times, f.name) for f in fields(OperatorTimes)})

    @property
    def form(self) -> str:
        """The build, since layouts are private to it; the path, whose last bits may be its own; the
        cache's type; and the context, which a window's ring depends on."""
        return f"{file_entry(library_path()).sha256} {self.isa} {self.kv_type} {self.context}"

    def save(self, length: int | None = None) -> bytes:
        """The state after the first positions, for a prefix cache; lengths as in truncate()."""
        limit, filled = self.rewind_limit, self.length
        count = filled if length is None else length
        if count != 0 and not limit <= count <= filled:
            raise UsageError(f"cannot save {count} positions, expected 0 or {limit} to {filled}")
        with self._lock:
            size = self._library.pslm_kv_bytes(self._open(), count)
            data = (ctypes.c_char * size)()
            self._error.check(self._library.pslm_kv_save(self._open(), count, data, size))
        saved: bytes = data.raw
        return saved

    def restore(self, length: int, saved: bytes | memoryview) -> None:
        """Replace the context by ``length`` positions that :meth:`save` gave."""
        data = np.frombuffer(saved, np.uint8)
        with self._lock:
            handle = self._changing()
            status = self._library.pslm_kv_restore(handle, length, data.ctypes.data, data.size)
        if status != 0:
            raise UsageError(f"the saved state does not hold {length} positions of this model")

    def forward_slots(self, parts: Sequence[Part]) -> list[Following]:
        """See :class:`pocketslm.runtime.backends.SlotSession`."""
        entries = (Entry * len(parts))()
        found = []
        kept: list[Any] = []  # until the call is over
        for entry, part in zip(entries, parts, strict=True):
            tokens = np.asarray(part.tokens)
            check_tokens(self.slots[part.slot], tokens)
            tokens = np.ascontiguousarray(tokens, np.int32)
            room = {
                Wanted.NOTHING: 0,
                Wanted.NEXT: part.following,
                Wanted.TOP: min(part.highest, self.vocab_size),
                Wanted.LOGITS: part.following * self.vocab_size,
            }[part.wanted]
            best = np.empty(room, np.int32) if part.wanted in (Wanted.NEXT, Wanted.TOP) else None
            scored = part.wanted in (Wanted.TOP, Wanted.LOGITS)
            logits = np.empty(room, np.float32) if scored else None
            entry.slot, entry.wanted, entry.room = part.slot, part.wanted, room
            entry.tokens, entry.count = tokens.ctypes.data, tokens.size
            entry.following = part.following
            entry.best = best.ctypes.data if best is not None else None
            entry.logits = logits.ctypes.data if logits is not None else None
            if part.penalty is not None:
                kept.append(_penalty_entry(part.penalty))
                entry.penalty = ctypes.pointer(kept[-1])
            kept.append(tokens)
            found.append((best, logits))
        with self._lock:
            self._shared.end([part.slot for part in parts])
            status = self._library.pslm_forward_slots(
                self._open(), entries, len(parts), self._error.argument
            )
            self._error.check(status)
        return [
            Following(best, logits, entry.log_total if entry.wanted == Wanted.TOP else None)
            for entry, (best, logits) in zip(entries, found, strict=True)
        ]

    def _changing(self) -> ctypes.c_void_p:
        """The same for what changes the slot: a text that is made there ends."""
        self._shared.end([self._slot])
        return self._open()

    def _open(self) -> ctypes.c_void_p:
        """The handle, with this session's slot in use."""
        shared = self._shared
        if not shared.handle:
            raise UsageError("this session was closed; open another one")
        if shared.slot != self._slot:
            status = self._library.pslm_use_slot(shared.handle, self._slot, self._error.argument)
            self._error.check(status)
            shared.slot = self._slot
        return shared.handle

    def close(self) -> None:
        """Give its memory and threads back; later calls raise UsageError."""
        self._shared.close()
