"""onnxruntime: one session whose KV cache is shared between its inputs and outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from pocketslm.errors import BackendError, UsageError
from pocketslm.runtime.backends import Logits, OneProcess, check_logits, check_tokens, usable_cores
from pocketslm.runtime.bundle import Bundle, Graph

# Longer prompts run in pieces of this many tokens, which bounds the memory of activations and costs
# no speed: SmolLM2-135M in int4, 512 tokens, 2 threads of a Zen 4 server: 64 at a time 830 tok/s
# and 231 MB at the peak, 128 at a time 807 tok/s and 239 MB.
PREFILL_CHUNK = 64
_FLOATS: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}
Array = npt.NDArray[Any]
_ERRORS_ONLY = 3  # onnxruntime log severity


def open_session(
    bundle: Bundle, graph: Graph, threads: int | None = None, context: int | None = None
) -> OnnxSession:
    return OnnxSession(bundle, graph, threads, context)


class OnnxSession:
    """One sequence over a graph with onnxruntime-genai's input and output names.

    The cache buffers [1, kv heads, context, head size] are bound once as past and as present, so
    GroupQueryAttention appends in place; a decode step allocates nothing. Their pages come from
    the system when they are first written, so an unused context costs no memory.
    """

    def __init__(
        self,
        bundle: Bundle,
        graph: Graph,
        threads: int | None,
        context: int | None,
        profile: str | None = None,
    ) -> None:
        """``profile``: the beginning of the path to which onnxruntime writes its own profile."""
        self.backend = f"onnxruntime {ort.__version__}"
        self.context = context or graph.context
        self.threads = threads or usable_cores()
        self.length = 0
        self._process = OneProcess()  # guards the cache and what is bound
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = _ERRORS_ONLY
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, profile
        self._chunk = PREFILL_CHUNK
        if graph.backend == "onnx-pocketslm":
            self._use_native_operators(options)
        try:
            self._session = ort.InferenceSession(
                str(bundle.path / graph.file), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # as below
            reason = " ".join(str(error).split())[:300]
            where = bundle.path / graph.file
            raise BackendError(f"onnxruntime cannot load {where}: {reason}") from None
        self._bind(bundle)

    def _use_native_operators(self, options: ort.SessionOptions) -> None:
        """Let onnxruntime call our operators, with our threads: none of its own would have work."""
        from pocketslm.runtime.backends.native_library import library_path

        self.backend += " + pocketslm"
        self._chunk = self.context  # the operator splits a prompt by itself
        options.intra_op_num_threads = 1
        options.add_session_config_entry("pocketslm.threads", str(self.threads))
        try:
            options.register_custom_ops_library(str(library_path()))
        except Exception as error:  # as below
            reason = " ".join(str(error).split())[:300]
            raise BackendError(f"onnxruntime cannot use the native operators: {reason}") from None

    def _bind(self, bundle: Bundle) -> None:
        """Bind everything whose place never changes."""
        inputs = {value.name: value for value in self._session.get_inputs()}
        outputs = {value.name: value for value in self._session.get_outputs()}
        defaults = {value.name for value in self._session.get_overridable_initializers()}
        if not {"input_ids", "attention_mask"} <= inputs.keys() or "logits" not in outputs:
            raise BackendError("the graph has no input_ids, attention_mask and logits")
        self._io = self._session.io_binding()
        width = int(outputs["logits"].shape[2])  # the width of hidden states if there is no head
        self.vocab_size = width if bundle.config is None else bundle.config.vocab_size
        self._logits_dtype = _FLOATS[outputs["logits"].type]
        self._logits = np.zeros((1, 1, width), self._logits_dtype)
        self._io.bind_output("logits", "cpu")  # first, so that it is output 0
        self._bound = 0, 0  # tokens in, rows of logits out
        self._caches = []
        self._columns: list[tuple[str, str, tuple[Array, ...]]] = []
        self._turn = 0  # which of each pair of columns is the past
        for name, value in inputs.items():
            if not name.startswith("past_key_values."):
                continue
            if value.type not in _FLOATS:
                raise BackendError(f"KV cache type {value.type} is not supported, expected float")
            present = name.replace("past_key_values", "present")
            dtype = _FLOATS[value.type]
            if len(value.shape) == 3:  # the columns of a convolution, [1, channels, columns]
                pair = tuple(np.zeros((1, *value.shape[1:]), dtype) for _ in range(2))
                self._columns.append((name, present, pair))
                continue
            # Some graphs leave the head size symbolic; the bundle knows it.
            # The native operators fill it in blocks of 16 positions.
            head_dim = value.shape[3] if isinstance(value.shape[3], int) else bundle.head_dim
            shape = (1, value.shape[1], -(-self.context // 16) * 16, head_dim)
            buffer = np.zeros(shape, dtype)
            self._io.bind_input(name, "cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
            self._io.bind_output(present, "cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
            self._caches.append(buffer)
        self._keeps = bool(self._caches or self._columns)  # an encoder starts anew with each text
        if not self._keeps:
            self._chunk = self.context
        self._trims = "logits_to_keep" in defaults
        self._has_positions = "position_ids" in inputs
        self._mask = np.ones((1, self.context), np.int64)
        self._positions = np.arange(self.context)[None]
        self._keep = np.ones(1, np.int64)
        self._ids = np.zeros((1, self._chunk), np.int64)
        if self._trims:
            self._bind_int64("logits_to_keep", self._keep, (1,))

    def forward(self, tokens: npt.NDArray[np.int64], *, all_logits: bool = False) -> Logits:
        """See :class:`pocketslm.runtime.backends.Session`."""
        with self._process.lock:
            check_tokens(self, tokens)
            try:
                pieces = [
                    self._run(tokens[at : at + self._chunk], self.length + at, all_logits)
                    for at in range(0, len(tokens), self._chunk)
                ]
                logits = np.concatenate(pieces) if all_logits else pieces[-1]
                check_logits(self, logits)
            except BackendError:
                if self._columns:  # they have moved on; the beginning is the only way back
                    self._forget()
                raise
            self.length += len(tokens) if self._keeps else 0
        return logits

    def truncate(self, length: int) -> None:
        """See :class:`pocketslm.runtime.backends.Session`."""
        with self._process.lock:
            if not 0 <= length <= self.length:
                raise UsageError(f"cannot truncate {self.length} cached tokens to {length}")
            if self._columns and length not in (0, self.length):
                raise UsageError(
                    f"{self.length} cached tokens cannot be truncated to {length}: a convolution's "
                    "state has no way back; truncate to 0"
                )
            if length == 0:
                self._forget()
            self.length = length

    def _forget(self) -> None:
        for *_, pair in self._columns:
            pair[self._turn].fill(0)
        self.length = 0

    @property
    def rewind_limit(self) -> int:
        """See :class:`pocketslm.runtime.backends.ForgettingSession`."""
        return self.length if self._columns else min(self.length, 1)

    @property
    def profile_start_ns(self) -> int:
        """The time at which the profile began."""
        return int(self._session.get_profiling_start_time_ns())

    def end_profile(self) -> str:
        """Write the profile. Returns its path."""
        return str(self._session.end_profiling())

    def _run(self, tokens: npt.NDArray[np.int64], start: int, all_logits: bool) -> Logits:
        count = len(tokens)
        total = start + count
        self._ids[0, :count] = tokens
        self._bind_int64("attention_mask", self._mask, (1, total))
        if self._has_positions:
            self._bind_int64("position_ids", self._positions, (1, count), offset=start)
        rows = count if all_logits or not self._trims else 1
        # Decode steps keep what the step before bound; what onnxruntime allocated is not kept.
        if rows > 1 or (count, rows) != self._bound:
            self._bind_int64("input_ids", self._ids, (1, count))
            self._bind_logits(rows)
            self._bound = count, rows
        for past, present, pair in self._columns:
            for bind, name, buffer in (
                (self._io.bind_input, past, pair[self._turn]),
                (self._io.bind_output, present, pair[1 - self._turn]),
            ):
                bind(name, "cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
        try:
            self._session.run_with_iobinding(self._io)
        except Exception as error:  # onnxruntime's own exception types are not public
            reason = " ".join(str(error).split())[:300]
            raise BackendError(f"onnxruntime cannot run the graph: {reason}") from None
        self._turn = 1 - self._turn
        logits = self._logits if rows == 1 else self._io.get_outputs()[0].numpy()
        kept: Logits = (logits[0] if all_logits else logits[0, -1:]).astype(np.float32, copy=False)
        return kept

    def _bind_logits(self, rows: int) -> None:
        self._keep[0] = rows
        if rows == 1:
            out = self._logits
            self._io.bind_output("logits", "cpu", 0, out.dtype, out.shape, out.ctypes.data)
        else:  # onnxruntime allocates: the graph declares one row and would refuse a larger buffer
            self._io.bind_output("logits", "cpu")

    def _bind_int64(
        self,
        name: str,
        array: npt.NDArray[np.int64],
        shape: tuple[int, ...],
        offset: int = 0,
    ) -> None:
        pointer = array.ctypes.data + offset * array.itemsize
        self._io.bind_input(name, "cpu", 0, np.int64, shape, pointer)
