"""ExecuTorch: one session over a .pte that keeps its KV cache inside, ours or export_llm's."""

from __future__ import annotations

import logging
import os
import struct
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import executorch
import numpy as np
import numpy.typing as npt
import torch

from pocketslm.errors import BackendError, BundleError, UsageError
from pocketslm.runtime.backends import Logits, check_tokens, usable_cores
from pocketslm.runtime.bundle import Bundle, Graph

# Longer prompts run in pieces of this many tokens, which bounds the memory of activations.
PREFILL_CHUNK = 128
# After root offset and magic: the extended header of ExecuTorch's schema/extended_header.cpp.
_HEADER = struct.Struct("<8x4sIQQQ")
_CONTEXT, _FORWARD = "get_max_context_len", "forward"
# Kernels that the bindings lack. ExecuTorch's own Python would load them too, but imports half of
# torch's compiler on the way: 140 MB.
_LIBRARIES = (
    "extension/llm/custom_ops/libcustom_ops_aot_lib.so",
    "kernels/quantized/libquantized_ops_aot_lib.so",
)


def open_session(
    bundle: Bundle, graph: Graph, threads: int | None = None, context: int | None = None
) -> ExecuTorchSession:
    native = graph.backend == "executorch-pocketslm"
    return ExecuTorchSession(bundle.path / graph.file, threads, context, native)


def bare_graph(path: Path) -> Graph:
    """The graph of a .pte that no manifest describes; BundleError if it is not one of an LLM."""
    _check_length(path)
    program = _load_program(path, BundleError)
    names = {program.get_method_name(index) for index in range(program.num_methods())}
    if not {_FORWARD, _CONTEXT} <= names:
        raise BundleError(
            f"{path} has no methods {_FORWARD} and {_CONTEXT}, expected a file made by pocketslm "
            "or by ExecuTorch's export_llm with model.use_kv_cache=True"
        )
    context = int(program.load_method(_CONTEXT)(())[0])
    return Graph("executorch", path.name, context, "as the graph says")


class ExecuTorchSession:
    """One sequence; forward(tokens [1, n], start [1]) appends to the cache that the method holds.

    ExecuTorch has one thread pool a process: the last session's ``threads`` count for all.
    """

    def __init__(
        self, path: Path, threads: int | None, context: int | None, native: bool = False
    ) -> None:
        self.backend = f"executorch {version('executorch')}"
        self.threads = threads or usable_cores()
        self.length = 0
        with quiet():
            _bindings()._unsafe_reset_threadpool(self.threads)
        if native:
            self.backend += " + pocketslm"
            _load_native_operators()
        self._program = _load_program(path, BackendError)
        try:
            with quiet():
                self._forward = self._program.load_method(_FORWARD)
                limit = int(self._program.load_method(_CONTEXT)(())[0])
        except RuntimeError as error:
            raise BackendError(f"ExecuTorch cannot load {path}: {_one_line(error)}") from None
        meta = self._forward.method_meta()
        self.vocab_size = int(meta.output_tensor_meta(0).sizes()[-1])
        self.context = min(context or limit, limit)
        # export_llm makes the largest input one less than the length that it declares.
        self._chunk = int(meta.input_tensor_meta(0).sizes()[-1])
        if not native:  # our operator cuts a prompt up by itself
            self._chunk = min(PREFILL_CHUNK, self._chunk)

    def forward(self, tokens: npt.NDArray[np.int64], *, all_logits: bool = False) -> Logits:
        """See :class:`pocketslm.runtime.backends.Session`."""
        check_tokens(self, tokens)
        # Of a piece most files give the last token's logits only.
        step = 1 if all_logits else self._chunk
        pieces = [self._run(tokens[at : at + step]) for at in range(0, len(tokens), step)]
        return np.concatenate(pieces) if all_logits else pieces[-1]

    def truncate(self, length: int) -> None:
        """See :class:`pocketslm.runtime.backends.Session`."""
        if not 0 <= length <= self.length:
            raise UsageError(f"cannot truncate {self.length} cached tokens to {length}")
        self.length = length

    def _run(self, tokens: npt.NDArray[np.int64]) -> Logits:
        ids = torch.tensor(tokens, dtype=torch.int64)[None]
        outputs = self._forward((ids, torch.tensor([self.length])))
        self.length += len(tokens)
        logits: Logits = outputs[0].reshape(-1, self.vocab_size)[-1:].float().numpy()
        return logits


def _check_length(path: Path) -> None:
    """ExecuTorch maps the file and would read past its end; BundleError where it is cut short."""
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) == _HEADER.size:
        magic, _, program, base, segments = _HEADER.unpack(head)
        needed = max(program, base + segments) if magic == b"eh00" else 0
        if path.stat().st_size >= needed and head[4:6] == b"ET":
            return
    raise BundleError(f"{path} is not an ExecuTorch program or was cut short; copy it again")


def _load_program(path: Path, error_type: type[BackendError | BundleError]) -> Any:
    try:
        with quiet():
            return _bindings()._load_program(str(path))
    except (RuntimeError, ValueError) as error:
        raise error_type(f"ExecuTorch cannot load {path}: {_one_line(error)}") from None


def _bindings() -> Any:
    """ExecuTorch's bindings with every kernel that LLM graphs use."""
    with quiet():
        from executorch.extension.pybindings import _portable_lib

        root = Path(next(iter(executorch.__path__)))
        for library in _LIBRARIES:
            torch.ops.load_library(root / library)  # type: ignore[no-untyped-call]
    return _portable_lib


def _load_native_operators() -> None:
    """Our kernels, which find ExecuTorch's bindings loaded."""
    from pocketslm.runtime.ops import build

    try:
        torch.ops.load_library(build.executorch_library())  # type: ignore[no-untyped-call]
    except (build.BuildError, OSError) as error:
        raise BackendError(f"ExecuTorch cannot use the native operators: {error}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without what ExecuTorch logs to stderr and warns of; errors come as exceptions."""
    sys.stderr.flush()
    kept = os.dup(2)
    logging.disable(logging.WARNING)
    try:
        with Path(os.devnull).open("wb") as nowhere, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        logging.disable(logging.NOTSET)
        os.dup2(kept, 2)
        os.close(kept)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
