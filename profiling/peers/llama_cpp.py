"""llama.cpp through llama-cpp-python's C interface: what llama-bench calls, plus the argmax."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pocketslm.errors import BackendError, UsageError
from pocketslm.profiling.engine import Engine, Job, library_version, missing_library
from pocketslm.runtime.arrays import np

_DISTRIBUTION = "llama-cpp-python"


class LlamaCpp:
    """llama.cpp on a GGUF file as it is, or rounded again by its own tool to another type."""

    artefact = "a .gguf file"

    def __init__(self, kind: str | None = None) -> None:
        self._kind = kind
        self.name = f"llama.cpp-{kind.lower()}" if kind else "llama.cpp"

    def version(self) -> str:
        return library_version(_DISTRIBUTION)

    def available(self) -> str | None:
        return missing_library("llama_cpp", _DISTRIBUTION)

    def prepare(self, source: Path, cache: Path) -> Path:
        files = sorted(source.glob("*.gguf")) if source.is_dir() else [source]
        if len(files) != 1 or files[0].suffix != ".gguf":
            raise UsageError(
                f"{source} is not a .gguf file, which is what llama.cpp runs; convert it with "
                f"llama.cpp's convert_hf_to_gguf.py and give it as --peer {self.name}=FILE.gguf"
            )
        return _rounded(files[0], self._kind, cache) if self._kind else files[0]

    def import_library(self, job: Job) -> None:
        import llama_cpp

        llama_cpp.llama_backend_init()

    def open(self, job: Job) -> Engine:
        return _Engine(job)


def _rounded(source: Path, kind: str, cache: Path) -> Path:
    """The output of ``llama-quantize --allow-requantize SOURCE OUT KIND``, written once."""
    target = cache / f"{source.stem.rpartition('.')[0] or source.stem}.{kind}.gguf"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".rounding.", dir=cache) as aside:
        file = Path(aside, target.name)
        quantize(source, kind, file)
        file.replace(target)
    return target


def quantize(
    source: Path,
    kind: str,
    target: Path,
    importance: Mapping[str, np.ndarray] | None = None,
    *,
    pure: bool = False,
) -> None:
    """Write ``target``, the GGUF ``source`` rounded again to llama.cpp's type ``kind``.

    ``importance``: float32 mean squares of each tensor's inputs, by its name in the file. ``pure``:
    every matrix, the embedding too, takes that type; else llama.cpp mixes wider ones in. Raises
    BackendError if llama.cpp cannot do it.
    """
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    options.allow_requantize = True
    options.pure = pure
    if importance:
        entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
        for entry, (name, values) in zip(entries, importance.items(), strict=False):
            entry.name = name.encode()
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = values.size
        options.imatrix = ctypes.cast(entries, type(options.imatrix))
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(options)
    )
    if status:
        raise BackendError(f"llama.cpp cannot round {source} to {kind}: status {status}")


class _Engine:
    backend = "ggml"

    def __init__(self, job: Job) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._model = llama_cpp.llama_model_load_from_file(
            job.artefact.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise BackendError(
                f"llama.cpp cannot load {job.artefact}; is it a GGUF file of an architecture that "
                f"{_DISTRIBUTION} {llama_cpp.__version__} knows?"
            )
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = job.context
        options.n_batch = job.context
        options.n_threads = options.n_threads_batch = job.threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise BackendError(
                f"llama.cpp cannot make a context of {job.context} tokens for {job.artefact}; "
                "ask for fewer tokens"
            )
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self._next = (llama_cpp.llama_token * 1)()

    def reset(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def prefill(self, ids: list[int]) -> int:
        return self._run((self._lib.llama_token * len(ids))(*ids))

    def step(self) -> int:
        return self._run(self._next)

    def _run(self, tokens: ctypes.Array[ctypes.c_int32]) -> int:
        batch = self._lib.llama_batch_get_one(tokens, len(tokens))
        if status := self._lib.llama_decode(self._context, batch):
            raise BackendError(f"llama.cpp's llama_decode failed with status {status}")
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        best = int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())
        self._next[0] = best
        return best
