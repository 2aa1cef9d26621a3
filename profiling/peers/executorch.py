"""ExecuTorch through its Python bindings, on a .pte made by its export_llm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pocketslm.errors import BackendError, UsageError
from pocketslm.profiling.engine import Engine, Job, library_version, missing_library

_DISTRIBUTION = "executorch"
_CONTEXT = "get_max_context_len"


class ExecuTorch:
    """ExecuTorch on a given .pte, since making one takes minutes.

    The file takes (tokens [1, n], start [1]) and keeps the cache, as the files that run under
    ExecuTorch's own TextLLMRunner do. The bindings need torch in the process: its memory is part
    of base_rss_bytes.
    """

    name = "executorch"
    artefact = "a .pte file with a KV cache"

    def version(self) -> str:
        return library_version(_DISTRIBUTION)

    def available(self) -> str | None:
        return missing_library("executorch", _DISTRIBUTION)

    def prepare(self, source: Path, cache: Path) -> Path:
        raise UsageError(
            f"an ExecuTorch file is not made from {source} here; export it with "
            "`python -m executorch.extension.llm.export.export_llm` and give it as "
            f"--peer {self.name}=FILE.pte"
        )

    def import_library(self, job: Job) -> None:
        # The operators that such files use register themselves on import.
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
        from executorch.extension.pybindings import portable_lib  # noqa: F401
        from executorch.kernels import quantized  # noqa: F401
        from executorch.runtime import Runtime  # noqa: F401

    def open(self, job: Job) -> Engine:
        return _Engine(job)


class _Engine:
    backend = "portable_lib"

    def __init__(self, job: Job) -> None:
        import torch
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        self._tensor = torch.tensor
        # Despite its name this is how its thread count is set; nothing has run yet.
        portable_lib._unsafe_reset_threadpool(job.threads)
        try:
            self._program = Runtime.get().load_program(job.artefact)
            methods = self._program.method_names
            forward = self._program.load_method("forward") if "forward" in methods else None
            limit = self._program.load_method(_CONTEXT) if _CONTEXT in methods else None
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise BackendError(f"ExecuTorch cannot load {job.artefact}: {reason}") from None
        if forward is None or limit is None:
            raise BackendError(
                f"{job.artefact} has no methods forward and {_CONTEXT}, expected a file made by "
                "ExecuTorch's export_llm with model.use_kv_cache=True"
            )
        room = int(limit.execute(())[0])
        if job.context > room:
            raise BackendError(
                f"{job.artefact} holds {room} tokens, the test needs {job.context}; ask for fewer "
                "or export with a longer export.max_context_length"
            )
        # The largest input: export_llm makes it one less than the get_max_seq_len it declares.
        self._chunk = forward.metadata.input_tensor_meta(0).sizes()[-1]
        self._forward = forward
        self._length = self._next = 0

    def reset(self) -> None:
        self._length = 0

    def prefill(self, ids: list[int]) -> int:
        """In pieces of the largest input."""
        for start in range(0, len(ids), self._chunk):
            self._run(ids[start : start + self._chunk])
        return self._next

    def step(self) -> int:
        self._run([self._next])
        return self._next

    def _run(self, tokens: list[int]) -> None:
        inputs = self._tensor([tokens]), self._tensor([self._length])
        logits: Any = self._forward.execute(inputs)[0]
        self._next = int(logits.reshape(-1, logits.shape[-1])[-1].argmax())
        self._length += len(tokens)
