"""The native operators as a backend: numpy and ctypes over the C border of ``runtime/ops``."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketslm.errors import (
    BackendError,
    BundleError,
    ContextOverflowError,
    PocketSlmError,
    UsageError,
)
from pocketslm.runtime import forks
from pocketslm.runtime.adapters import Update
from pocketslm.runtime.backends import check_threads, check_tokens
from pocketslm.runtime.bundle import Bundle, Graph
from pocketslm.runtime.ops import build
from pocketslm.runtime.ops.ids import ROLE

ABI_VERSION = 6
KV_TYPES = {"fp16": 0, "int8": 1}
LOGITS_LAST, LOGITS_ALL = 1, 2
# The roles that the matrices which an adapter may update have in a model.slm.
ROLES = {"q_proj": ROLE["query"], "k_proj": ROLE["key"], "v_proj": ROLE["value"]}
ROLES |= {"o_proj": ROLE["output"], "gate_proj": ROLE["gate"], "up_proj": ROLE["up"]}
ROLES |= {"down_proj": ROLE["down"]}

_ERRORS: dict[int, type[PocketSlmError]] = {
    1: UsageError,
    2: BundleError,
    3: BundleError,
    4: ContextOverflowError,
    5: BackendError,
    6: BackendError,
    7: BackendError,
    8: BackendError,
    9: BackendError,
    10: UsageError,
}
# Where a call has no place for a line of its own.
_TEXTS = {
    7: "another thread uses this session",
    8: "this session's threads stayed behind in a fork; open one in this process",
}

_u32, _u64, _size = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_size_t


class NativeError(ctypes.Structure):
    _fields_ = (("text", ctypes.c_char_p), ("capacity", _size))


class _ModelInfo(ctypes.Structure):
    _fields_ = (
        *((name, _u32) for name in ("hidden_size", "layers", "heads", "kv_heads", "head_dim")),
        *((name, _u32) for name in ("intermediate_size", "vocab_size", "max_context")),
        *((name, _u32) for name in ("output_size", "states")),
        *((name, _u64) for name in ("file_bytes", "bytes_per_token")),
        *((name, _u64) for name in ("macs_per_token", "head_macs")),
    )


class _Options(ctypes.Structure):
    _fields_ = (
        *((name, _u32) for name in ("context", "threads", "kv_type", "pin")),
        ("isa", ctypes.c_char_p),
    )


class _Update(ctypes.Structure):
    _fields_ = (
        *((name, _u32) for name in ("role", "layer", "rows", "cols", "rank")),
        *((name, ctypes.c_void_p) for name in ("a", "b")),
    )


class _Times(ctypes.Structure):
    _fields_ = (
        *((name, _u64) for name in ("calls", "tokens", "embedding_ns", "qkv_ns", "attention_ns")),
        *((name, _u64) for name in ("output_ns", "gate_up_ns", "down_ns", "head_ns")),
    )


class _SessionInfo(ctypes.Structure):
    _fields_ = (
        *((name, _u32) for name in ("context", "threads", "kv_type")),
        ("kv_bytes", _u64),
        ("isa", ctypes.c_char_p),
    )


def open_session(
    bundle: Bundle, graph: Graph, threads: int | None, context: int | None
) -> NativeSession:
    """A session over the bundle's ``model.slm``; see :mod:`pocketslm.runtime.backends`."""
    if graph.kv_cache not in KV_TYPES:
        known = ", ".join(KV_TYPES)
        raise BackendError(f"KV cache type {graph.kv_cache!r} is not supported; known: {known}")
    model = NativeModel(bundle.path / graph.file)
    limit = min(graph.context, model.info.max_context)
    return NativeSession(
        model, context=min(context or limit, limit), threads=threads, kv_type=graph.kv_cache
    )


def library_path() -> Path:
    """The shared library, compiled now if need be; ``$POCKETSLM_LIBRARY`` names another."""
    override = os.environ.get("POCKETSLM_LIBRARY")
    try:
        return Path(override) if override else build.library()
    except (build.BuildError, OSError) as error:
        raise BackendError(f"the native operators could not be built: {error}") from error


@functools.cache
def load_library() -> ctypes.CDLL:
    """The shared library with its signatures declared."""
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(f"the native operators could not be loaded: {error}") from error
    pointer, p = ctypes.c_void_p, ctypes.POINTER
    signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "abi_version": (_u32, ()),
        "isa_names": (p(ctypes.c_char_p), ()),
        "model_open": (ctypes.c_int, (ctypes.c_char_p, p(pointer), NativeError)),
        "model_close": (None, (pointer,)),
        "model_describe": (ctypes.c_int, (pointer, p(_ModelInfo))),
        "model_blob": (pointer, (pointer, _u32, p(_size))),
        "tokenizer_open": (ctypes.c_int, (pointer, p(pointer), NativeError)),
        "tokenizer_close": (None, (pointer,)),
        **dict.fromkeys(
            ("encode", "decode"),
            (ctypes.c_int, (pointer, pointer, _size, _u32, pointer, _size, p(_size), NativeError)),
        ),
        "vocabulary_open": (
            ctypes.c_int,
            (pointer, pointer, _size, pointer, _size, _u32, p(pointer), NativeError),
        ),
        "grammar_open": (ctypes.c_int, (_u32, ctypes.c_char_p, _size, p(pointer), NativeError)),
        "constraint_open": (ctypes.c_int, (pointer, pointer, p(pointer), NativeError)),
        **dict.fromkeys(
            ("vocabulary_close", "grammar_close", "constraint_close", "constraint_restart"),
            (None, (pointer,)),
        ),
        **dict.fromkeys(
            ("constraint_apply", "constraint_mask"),
            (ctypes.c_int, (pointer, pointer, _size, NativeError)),
        ),
        "constraint_advance": (ctypes.c_int, (pointer, ctypes.c_int32, NativeError)),
        "constraint_state": (_u32, (pointer,)),
        "session_open": (ctypes.c_int, (pointer, p(_Options), p(pointer), NativeError)),
        "session_close": (None, (pointer,)),
        "session_describe": (ctypes.c_int, (pointer, p(_SessionInfo))),
        "forward": (
            ctypes.c_int,
            (pointer, pointer, _size, ctypes.c_int, pointer, _size, NativeError),
        ),
        "forward_top": (
            ctypes.c_int,
            (pointer, pointer, _size, _size, pointer, pointer, p(ctypes.c_double), NativeError),
        ),
        "step_greedy": (ctypes.c_int, (pointer, ctypes.c_int32, p(ctypes.c_int32), NativeError)),
        "forward_greedy": (
            ctypes.c_int,
            (pointer, pointer, _size, _size, pointer, NativeError),
        ),
        "lookup_open": (ctypes.c_int, (p(pointer), NativeError)),
        "lookup_close": (None, (pointer,)),
        "lookup_push": (ctypes.c_int, (pointer, pointer, _size, NativeError)),
        "lookup_guess": (ctypes.c_int, (pointer, pointer, _size, p(_size), NativeError)),
        "lookup_judge": (ctypes.c_int, (pointer, _size, NativeError)),
        "set_updates": (ctypes.c_int, (pointer, p(_Update), _size, NativeError)),
        "set_profiling": (ctypes.c_int, (pointer, _u32)),
        "read_times": (ctypes.c_int, (pointer, p(_Times))),
        "length": (_size, (pointer,)),
        "truncate": (ctypes.c_int, (pointer, _size)),
        "rewind_limit": (_size, (pointer,)),
        "kv_bytes": (_size, (pointer, _size)),
        "kv_save": (ctypes.c_int, (pointer, _size, pointer, _size)),
        "kv_restore": (ctypes.c_int, (pointer, _size, pointer, _size)),
        "matmul": (
            ctypes.c_int,
            (
                ctypes.c_char_p,
                _u32,
                pointer,
                _size,
                _size,
                _size,
                pointer,
                _size,
                pointer,
                NativeError,
            ),
        ),
        "packed_bytes": (_size, (_u32, _size, _size)),
        "measure_bandwidth": (ctypes.c_double, (_u32, _size)),
        "measure_int8_peak": (ctypes.c_double, (ctypes.c_char_p, _u32)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"pslm_{name}")
        function.restype, function.argtypes = result, arguments
    if library.pslm_abi_version() != ABI_VERSION:
        raise BackendError(f"{path} has another ABI version; rebuild it")
    return library


def isa_names() -> list[str]:
    """Kernel paths that this CPU can run, best first."""
    names = load_library().pslm_isa_names()
    found: list[str] = []
    while names[len(found)]:
        found.append(names[len(found)].decode())
    return found


def _encode(isa: str | None) -> bytes | None:
    return None if isa is None else isa.encode()


class ErrorText:
    """A buffer for one error line, and the exception for a failed status."""

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(512)
        self.argument = NativeError(ctypes.cast(self._buffer, ctypes.c_char_p), len(self._buffer))

    def check(self, status: int, what: str = "") -> None:
        if status != 0:
            text = self._buffer.value.decode(errors="replace")
            text = text or _TEXTS.get(status, f"status {status}")
            self._buffer.value = b""
            raise _ERRORS.get(status, BackendError)(f"{what}: {text}" if what else text)


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
        info = _ModelInfo()
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
    ) -> NativeSession:
        return NativeSession(
            self, context=context, threads=threads, kv_type=kv_type, isa=isa, pin=pin
        )

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.pslm_model_close(self._handle)


class NativeLookup:
    """See :class:`pocketslm.runtime.backends.Lookup`; ``runtime/ops/lookup.h`` says how."""

    MOST = 7  # guesses that a call gives

    def __init__(self) -> None:
        self._library = load_library()
        self._handle = ctypes.c_void_p()
        self._error = ErrorText()
        self._found = (ctypes.c_int32 * self.MOST)()
        self._count = ctypes.c_size_t()
        self._error.check(
            self._library.pslm_lookup_open(ctypes.byref(self._handle), self._error.argument)
        )

    def push(self, tokens: Sequence[int]) -> None:
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        self._error.check(
            self._library.pslm_lookup_push(self._handle, ids, len(ids), self._error.argument)
        )

    def guess(self, most: int) -> list[int]:
        status = self._library.pslm_lookup_guess(
            self._handle,
            self._found,
            min(most, self.MOST),
            ctypes.byref(self._count),
            self._error.argument,
        )
        self._error.check(status)
        return self._found[: self._count.value]

    def judge(self, right: int) -> None:
        self._error.check(
            self._library.pslm_lookup_judge(self._handle, right, self._error.argument)
        )

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.pslm_lookup_close(self._handle)


class NativeSession:
    """A context over a model: tokens go in, logits come out, keys and values stay.

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
    ) -> None:
        if kv_type not in KV_TYPES:
            raise UsageError(f"KV type {kv_type!r}; known: {', '.join(KV_TYPES)}")
        check_threads(threads)
        if context is not None and not 1 <= context <= model.info.max_context:
            raise UsageError(f"context is {context}, expected 1 to {model.info.max_context}")
        self.model = model  # keeps the mapping alive
        self._library = load_library()
        self._handle = ctypes.c_void_p()
        options = _Options(context or 0, threads or 0, KV_TYPES[kv_type], int(pin), _encode(isa))
        error = ErrorText()
        status = self._library.pslm_session_open(
            model._handle, ctypes.byref(options), ctypes.byref(self._handle), error.argument
        )
        if status == 6:
            asked = isa or os.environ.get("POCKETSLM_ISA", "auto")
            raise BackendError(f"kernel path {asked!r}; this CPU has: {', '.join(isa_names())}")
        error.check(status)
        info = _SessionInfo()
        self._library.pslm_session_describe(self._handle, ctypes.byref(info))
        self.vocab_size = model.info.vocab_size
        self.context: int = info.context
        self.threads: int = info.threads
        self.kv_bytes: int = info.kv_bytes
        self.isa: str = info.isa.decode()
        self.kv_type: str = kv_type
        self.backend = f"native {self.isa}"
        self._next = ctypes.c_int32()
        self._error = ErrorText()
        self.after_fork()
        forks.watch(self)

    def after_fork(self) -> None:
        """The library itself knows which sessions have lost their threads."""
        # Of calls, their buffers and the handle, which calls of other threads must not find closed.
        self._lock = threading.Lock()

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
                self._open(),
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
                self._open(),
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
                self._open(), token, ctypes.byref(self._next), self._error.argument
            )
            self._error.check(status)
            return self._next.value

    def forward_greedy(
        self, tokens: npt.NDArray[np.integer[Any]], following: int = 1
    ) -> npt.NDArray[np.int32]:
        """See :class:`pocketslm.runtime.backends.TopSession`."""
        ids = np.asarray(tokens)
        check_tokens(self, ids)
        if not 1 <= following <= ids.size:
            raise UsageError(f"what follows {following} tokens of {ids.size} was asked for")
        ids = np.ascontiguousarray(ids, dtype=np.int32)
        found = np.empty(following, np.int32)
        with self._lock:
            status = self._library.pslm_forward_greedy(
                self._open(),
                ids.ctypes.data,
                ids.size,
                following,
                found.ctypes.data,
                self._error.argument,
            )
            self._error.check(status)
        return found

    def lookup(self) -> NativeLookup | None:
        """See :class:`pocketslm.runtime.backends.GuessingSession`."""
        # A convolution's state goes forward only.
        return None if self.length and self.rewind_limit == self.length else NativeLookup()

    @property
    def rewind_limit(self) -> int:
        """See :class:`pocketslm.runtime.backends.ForgettingSession`."""
        with self._lock:
            return int(self._library.pslm_rewind_limit(self._handle))

    def truncate(self, length: int) -> None:
        """See :class:`pocketslm.runtime.backends.Session`."""
        limit, filled = self.rewind_limit, self.length
        if length != 0 and not limit <= length <= filled:
            raise UsageError(
                f"cannot truncate {filled} cached tokens to {length}, expected 0 or {limit} to "
                f"{filled}"
            )
        with self._lock:
            self._error.check(self._library.pslm_truncate(self._open(), length))

    def use_adapter(self, updates: Sequence[Update]) -> None:
        """Replace the low-rank updates of the matrices. An empty list restores the plain weights.

        The context is forgotten, because other weights made it. Raises UsageError where an update
        does not belong to the model.
        """
        array = (_Update * len(updates))()
        kept = []  # until they are copied
        for one, update in zip(array, updates, strict=True):
            a, b = (np.ascontiguousarray(part.T, np.float32) for part in (update.a, update.b))
            kept += [a, b]
            one.role, one.layer = ROLES.get(update.part, 0), update.layer
            one.rows, one.cols, one.rank = b.shape[1], *a.shape
            one.a, one.b = a.ctypes.data, b.ctypes.data
        with self._lock:
            status = self._library.pslm_set_updates(
                self._open(), array, len(updates), self._error.argument
            )
            self._error.check(status)

    def profile(self, on: bool = True) -> None:
        """Begin to measure the time of each operator from zero, or stop."""
        with self._lock:
            self._library.pslm_set_profiling(self._open(), int(on))

    def times(self) -> OperatorTimes:
        """Time by operator since :meth:`profile`."""
        times = _Times()
        with self._lock:
            self._library.pslm_read_times(self._open(), ctypes.byref(times))
        return OperatorTimes(**{f.name: getattr(times, f.name) for f in fields(OperatorTimes)})

    def save(self, length: int | None = None) -> bytes:
        """The state after the first positions, for a prefix cache; lengths as in truncate()."""
        limit, filled = self.rewind_limit, self.length
        count = filled if length is None else length
        if count != 0 and not limit <= count <= filled:
            raise UsageError(f"cannot save {count} positions, expected 0 or {limit} to {filled}")
        with self._lock:
            size = self._library.pslm_kv_bytes(self._open(), count)
            buffer = ctypes.create_string_buffer(max(1, size))
            self._error.check(self._library.pslm_kv_save(self._open(), count, buffer, len(buffer)))
        return buffer.raw[:size]

    def restore(self, length: int, saved: bytes) -> None:
        """Replace the context by ``length`` positions that :meth:`save` gave."""
        with self._lock:
            status = self._library.pslm_kv_restore(self._open(), length, saved, len(saved))
        if status != 0:
            raise UsageError(f"the saved state does not hold {length} positions of this model")

    def _open(self) -> ctypes.c_void_p:
        if not self._handle:
            raise UsageError("this session was closed; open another one")
        return self._handle

    def close(self) -> None:
        """Give its memory and threads back; later calls raise UsageError."""
        with self._lock:
            handle, self._handle = self._handle, ctypes.c_void_p()
            self._library.pslm_session_close(handle)

    def __del__(self) -> None:
        if hasattr(self, "_lock"):  # it was opened
            self.close()
