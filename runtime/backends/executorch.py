"""ExecuTorch: one session over a .pte that keeps its KV cache inside, ours or export_llm's.

ExecuTorch's Python bindings take torch's tensors, and importing torch costs 90 MB and a second. So
this module loads its libraries without the bindings and calls them through
``runtime/ops/bindings/executorch_program.h``.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import weakref
from importlib.metadata import version
from pathlib import Path
from typing import Any

import executorch
import numpy as np
import numpy.typing as npt

from pocketslm.errors import BackendError, BundleError, UsageError
from pocketslm.runtime.backends import Logits, OneProcess, check_logits, check_tokens, usable_cores
from pocketslm.runtime.backends.native_library import ErrorText, NativeError
from pocketslm.runtime.bundle import Bundle, Graph
from pocketslm.runtime.ops import build

# Longer prompts run in pieces of this many tokens, which bounds the memory of activations.
PREFILL_CHUNK = 128
# After root offset and magic: the extended header of ExecuTorch's schema/extended_header.cpp.
_HEADER = struct.Struct("<8x4sIQQQ")
_CONTEXT = "get_max_context_len"
# ExecuTorch itself, and kernels of LLM graphs that register themselves.
_LIBRARIES = (
    "extension/pybindings/_portable_lib.*.so",
    "extension/llm/custom_ops/libcustom_ops_aot_lib.so",
    "kernels/quantized/libquantized_ops_aot_lib.so",
)
_size, _pointer = ctypes.c_size_t, ctypes.c_void_p


class _Clock(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("calls", ctypes.c_uint64), ("ns", ctypes.c_uint64))


def open_session(
    bundle: Bundle,
    graph: Graph,
    threads: int | None = None,
    context: int | None = None,
    *,
    timed: bool = False,
) -> ExecuTorchSession:
    native = graph.backend == "executorch-pocketslm"
    return ExecuTorchSession(bundle.path / graph.file, threads, context, native, timed=timed)


def bare_graph(path: Path) -> Graph:
    """The graph of a .pte that no manifest describes; BundleError if it is not one of an LLM."""
    try:
        context = Program(path).numbers(_CONTEXT)[0]
    except BundleError as error:
        raise BundleError(
            f"{error}; expected a file made by pocketslm or by ExecuTorch's export_llm with "
            "model.use_kv_cache=True"
        ) from None
    return Graph("executorch", path.name, context, "as the graph says")


class Program:
    """A .pte file in ExecuTorch's runtime. Raises BundleError if the file is something else."""

    def __init__(self, path: Path) -> None:
        _check_length(path)
        self.path = path
        self._library = load_library()
        self._handle = _pointer()
        error = ErrorText()
        status = self._library.pslm_et_open(
            str(path).encode(), ctypes.byref(self._handle), error.argument
        )
        error.check(status, f"ExecuTorch cannot load {path}")
        weakref.finalize(self, self._library.pslm_et_close, self._handle)

    def numbers(self, method: str) -> list[int]:
        """What a method without inputs returns; BundleError if there is none."""
        found, count, error = (ctypes.c_int64 * 64)(), _size(64), ErrorText()
        status = self._library.pslm_et_numbers(
            self._handle, method.encode(), found, ctypes.byref(count), error.argument
        )
        error.check(status, str(self.path))
        return list(found[: count.value])

    def load(self, *, timed: bool = False) -> tuple[int, int]:
        """Load ``forward``. Returns the most tokens that it takes at once, and its vocabulary's
        size.

        ``timed``: operators outside the delegate are timed, see :func:`operator_times`.
        """
        longest, vocabulary, error = _size(), _size(), ErrorText()
        status = self._library.pslm_et_load(
            self._handle, timed, ctypes.byref(longest), ctypes.byref(vocabulary), error.argument
        )
        error.check(status, f"ExecuTorch cannot load {self.path}")
        return longest.value, vocabulary.value

    def forward(self, tokens: npt.NDArray[np.int64], start: int, logits: Logits) -> None:
        """Append tokens [n]. Writes the logits [vocabulary] of the last one into ``logits``."""
        error = ErrorText()
        status = self._library.pslm_et_forward(
            self._handle, tokens.ctypes.data, len(tokens), start, logits.ctypes.data, error.argument
        )
        error.check(status)


class ExecuTorchSession:
    """One sequence; forward(tokens [1, n], start [1]) appends to the cache that the method holds.

    ExecuTorch has one thread pool per process, so the last session's ``threads`` apply to all.
    """

    def __init__(
        self,
        path: Path,
        threads: int | None,
        context: int | None,
        native: bool = False,
        *,
        timed: bool = False,
    ) -> None:
        self.backend = f"executorch {version('executorch')}" + " + pocketslm" * native
        self.threads = threads or usable_cores()
        self.length = 0
        self._process = OneProcess()  # of the cache and the program
        load_library().pslm_et_set_threads(self.threads)
        try:
            self._program = Program(path)
            limit = self._program.numbers(_CONTEXT)[0]
            # export_llm makes the largest input one less than the length that it declares.
            longest, self.vocab_size = self._program.load(timed=timed)
        except BundleError as error:
            raise BackendError(str(error)) from None
        self.context = min(context or limit, limit)
        # Our operator cuts a prompt up by itself.
        self._chunk = longest if native else min(PREFILL_CHUNK, longest)

    def forward(self, tokens: npt.NDArray[np.int64], *, all_logits: bool = False) -> Logits:
        """See :class:`pocketslm.runtime.backends.Session`."""
        with self._process.lock:
            check_tokens(self, tokens)
            tokens = np.ascontiguousarray(tokens, np.int64)
            # Most files return logits only for the last token of a call.
            step = 1 if all_logits else self._chunk
            logits = np.empty((len(tokens) if all_logits else 1, self.vocab_size), np.float32)
            for at in range(0, len(tokens), step):
                piece, out = tokens[at : at + step], logits[at if all_logits else 0]
                self._program.forward(piece, self.length + at, out)
            check_logits(self, logits)
            self.length += len(tokens)
        return logits

    def truncate(self, length: int) -> None:
        """See :class:`pocketslm.runtime.backends.Session`."""
        with self._process.lock:
            if not 0 <= length <= self.length:
                raise UsageError(f"cannot truncate {self.length} cached tokens to {length}")
            self.length = length


def operator_times() -> dict[str, tuple[int, int]]:
    """Calls and nanoseconds of each operator since the last program was loaded ``timed``."""
    room = load_library().pslm_et_clocks(None, 0)
    clocks = (_Clock * room)()
    load_library().pslm_et_clocks(clocks, room)
    return {clock.name.decode(): (clock.calls, clock.ns) for clock in clocks}


def _check_length(path: Path) -> None:
    """Raise BundleError if the file is cut short: ExecuTorch would read past its end."""
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) == _HEADER.size:
        magic, _, program, base, segments = _HEADER.unpack(head)
        needed = max(program, base + segments) if magic == b"eh00" else 0
        if path.stat().st_size >= needed and head[4:6] == b"ET":
            return
    raise BundleError(f"{path} is not an ExecuTorch program or was cut short; copy it again")


@functools.cache
def load_library() -> ctypes.CDLL:
    """ExecuTorch's libraries, and ours over them with its signatures declared."""
    root = Path(next(iter(executorch.__path__)))
    # MKL, which computes the attention on x86, rounds by where its buffers happen to lie in memory,
    # and int8 activations turn that into another text in each run. This setting asks for the same
    # bits every time.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    try:
        for pattern in _LIBRARIES:
            for path in root.glob(pattern):
                ctypes.CDLL(str(path))
        library = ctypes.CDLL(str(build.executorch_library()))
    except (build.BuildError, OSError) as error:
        raise BackendError(f"ExecuTorch's libraries could not be loaded: {error}") from error
    p, status = ctypes.POINTER, ctypes.c_int
    signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "set_threads": (None, (ctypes.c_uint32,)),
        "open": (status, (ctypes.c_char_p, p(_pointer), NativeError)),
        "close": (None, (_pointer,)),
        "numbers": (status, (_pointer, ctypes.c_char_p, _pointer, p(_size), NativeError)),
        "load": (status, (_pointer, ctypes.c_int, p(_size), p(_size), NativeError)),
        "forward": (status, (_pointer, _pointer, _size, ctypes.c_int64, _pointer, NativeError)),
        "clocks": (_size, (_pointer, _size)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"pslm_et_{name}")
        function.restype, function.argtypes = result, arguments
    return library
