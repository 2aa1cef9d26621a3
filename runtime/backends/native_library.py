"""The shared library of the native operators: found or built, and its C border declared."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

from pocketslm.errors import (
    BackendError,
    BundleError,
    ContextOverflowError,
    PocketSlmError,
    UsageError,
)
from pocketslm.runtime.ops import built

ABI_VERSION = 11
MOST_MADE = 8  # tokens of a text in a step

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


class ModelInfo(ctypes.Structure):
    _fields_ = (
        *((name, _u32) for name in ("hidden_size", "layers", "heads", "kv_heads", "head_dim")),
        *((name, _u32) for name in ("intermediate_size", "vocab_size", "max_context")),
        *((name, _u32) for name in ("output_size", "states")),
        *((name, _u64) for name in ("file_bytes", "bytes_per_token")),
        *((name, _u64) for name in ("macs_per_token", "head_macs")),
    )


class Options(ctypes.Structure):
    _fields_ = (
        *((name, _u32) for name in ("context", "threads", "kv_type", "pin")),
        ("isa", ctypes.c_char_p),
    )


class UpdateEntry(ctypes.Structure):
    _fields_ = (
        *((name, _u32) for name in ("role", "layer", "rows", "cols", "rank")),
        *((name, ctypes.c_void_p) for name in ("a", "b")),
    )


class PenaltyEntry(ctypes.Structure):
    _fields_ = (("factor", ctypes.c_float), ("seen", ctypes.c_void_p), ("count", _size))
    tokens: Any = None  # where ``seen`` points to


class Generation(ctypes.Structure):
    _fields_ = (
        *(("max_tokens", _u32), ("temperature", ctypes.c_float), ("top_k", _u32)),
        *((name, ctypes.c_float) for name in ("top_p", "min_p", "typical_p")),
        ("repetition_penalty", ctypes.c_float),
        *((name, _u32) for name in ("spare_prompt", "logprobs", "guesses")),
        *(("seed", _u64), ("ends", ctypes.c_void_p), ("end_count", _size)),
        ("constraint", ctypes.c_void_p),
    )


class MadeEntry(ctypes.Structure):
    _fields_ = (("token", ctypes.c_int32), ("finish", _u32), ("logprob", ctypes.c_double))


class Turn(ctypes.Structure):
    _fields_ = (
        ("generator", ctypes.c_void_p),
        ("error", NativeError),
        *((name, _u32) for name in ("status", "count")),
        ("made", MadeEntry * MOST_MADE),
    )


class Entry(ctypes.Structure):
    _fields_ = (
        *((name, _u32) for name in ("slot", "wanted")),
        *(("tokens", ctypes.c_void_p), ("count", _size), ("following", _size)),
        *((name, ctypes.c_void_p) for name in ("best", "logits")),
        *(("room", _size), ("penalty", ctypes.POINTER(PenaltyEntry))),
        ("log_total", ctypes.c_double),
    )


class Times(ctypes.Structure):
    _fields_ = (
        *((name, _u64) for name in ("calls", "tokens", "embedding_ns", "qkv_ns", "attention_ns")),
        *((name, _u64) for name in ("output_ns", "gate_up_ns", "down_ns", "head_ns")),
    )


class SessionInfo(ctypes.Structure):
    _fields_ = (
        *((name, _u32) for name in ("context", "threads", "kv_type")),
        ("kv_bytes", _u64),
        ("isa", ctypes.c_char_p),
    )


def library_path() -> Path:
    """The shared library, compiled now if need be; ``$POCKETSLM_LIBRARY`` names another."""
    if override := os.environ.get("POCKETSLM_LIBRARY"):
        return Path(override)
    if found := built.built_library():
        return found
    from pocketslm.runtime.ops import build

    try:
        return build.library()
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
        "model_describe": (ctypes.c_int, (pointer, p(ModelInfo))),
        "model_blob": (pointer, (pointer, _u32, p(_size))),
        "tokenizer_open": (ctypes.c_int, (pointer, p(pointer), NativeError)),
        "tokenizer_close": (None, (pointer,)),
        "tokenizer_takes": (_u32, (pointer,)),
        "tokenizer_pieces": (ctypes.c_int, (pointer, p(pointer), p(p(_u32)), p(_size))),
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
        "session_open_slots": (
            ctypes.c_int,
            (pointer, p(Options), _u32, p(pointer), NativeError),
        ),
        "use_slot": (ctypes.c_int, (pointer, _u32, NativeError)),
        "forward_slots": (ctypes.c_int, (pointer, p(Entry), _size, NativeError)),
        "session_close": (None, (pointer,)),
        "session_describe": (ctypes.c_int, (pointer, p(SessionInfo))),
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
            (pointer, pointer, _size, _size, p(PenaltyEntry), pointer, NativeError),
        ),
        "generator_open": (
            ctypes.c_int,
            (pointer, pointer, _size, p(Generation), p(pointer), NativeError),
        ),
        "generate": (ctypes.c_int, (p(Turn), _size, NativeError)),
        "generator_next": (ctypes.c_int, (pointer, p(MadeEntry), NativeError)),
        "generator_close": (None, (pointer,)),
        "set_updates": (ctypes.c_int, (pointer, _u32, p(UpdateEntry), _size, NativeError)),
        "use_adapter": (ctypes.c_int, (pointer, _u32, NativeError)),
        "set_profiling": (ctypes.c_int, (pointer, _u32)),
        "read_times": (ctypes.c_int, (pointer, p(Times))),
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


class ErrorText:
    """A buffer for one error line, and the exception for a failed status."""

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(512)
        self.argument = NativeError(ctypes.cast(self._buffer, ctypes.c_char_p), len(self._buffer))

    def check(self, status: int, what: str = "") -> None:
        if status != 0:
            raise self.exception(status, what)

    def exception(self, status: int, what: str = "") -> PocketSlmError:
        """What says that a call failed."""
        text = self._buffer.value.decode(errors="replace")
        text = text or _TEXTS.get(status, f"status {status}")
        self._buffer.value = b""
        return _ERRORS.get(status, BackendError)(f"{what}: {text}" if what else text)
