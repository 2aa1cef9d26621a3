"""ExecuTorch's LlmModule, as its AAR brings it to Android, behind the interface of a model.

It tokenizes and samples by itself, so prompts go in as text and only greedy or temperature
sampling is possible; there are no log-probabilities.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pocketslm.errors import BackendError, ContextOverflowError
from pocketslm.runtime.bundle import Bundle, open_bundle
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Record
from pocketslm.runtime.tokenizer import Tokenizer, load_tokenizer

TEXT_MODEL = 1  # LlmModule.MODEL_TYPE_TEXT


class ExecuTorchModel:
    """See :class:`pocketslm.runtime.model.TextModel`."""

    backend = "ExecuTorch (Java)"

    def __init__(self, bundle: Bundle, module: Any, tokenizer: Tokenizer, context: int) -> None:
        self._bundle, self._module = bundle, module
        self._tokenizer, self._context = tokenizer, context
        self._thread: threading.Thread | None = None

    @classmethod
    def load(cls, path: Path) -> ExecuTorchModel:
        """A bundle's ExecuTorch graph; raises BundleError or BackendError."""
        bundle = open_bundle(path, verify=False)
        graph = bundle.graph("executorch")
        try:
            from jnius import autoclass

            module = autoclass("org.pytorch.executorch.extension.llm.LlmModule")(
                TEXT_MODEL, str(path / graph.file), str(path / "tokenizer.json"), 0.0
            )
            status = module.load()
        except Exception as error:  # pyjnius raises its own types, and what Java throws
            raise BackendError(f"ExecuTorch's Java library: {error}") from None
        if status:
            raise BackendError(f"ExecuTorch cannot load {graph.file}: status {status}")
        return cls(bundle, module, load_tokenizer(path), graph.context)

    @property
    def name(self) -> str:
        return self._bundle.name

    @property
    def context(self) -> int:
        return self._context

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def generate(
        self, prompt: str | Sequence[int], config: GenerationConfig | None = None
    ) -> Iterator[Record]:
        """See `Model.generate`; a record is what ExecuTorch hands over at once."""
        config = config or GenerationConfig()
        ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        limit = min(self._context, len(ids) + (config.max_new_tokens or self._context))
        if len(ids) >= limit:
            raise ContextOverflowError(
                f"{len(ids)} prompt tokens do not fit the context of {self._context}; shorten the "
                "prompt"
            )
        return self._records(text, limit, config)

    def cancel(self) -> None:
        self._module.stop()

    def close(self) -> None:
        self._module.resetNative()

    def _records(self, text: str, limit: int, config: GenerationConfig) -> Iterator[Record]:
        start = time.perf_counter_ns()
        pieces: queue.Queue[str | None] = queue.Queue()
        callback = _callback(pieces)

        def run() -> None:
            try:
                self._module.generate(text, limit, callback, False)
            finally:
                pieces.put(None)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        special = {self._tokenizer.decode([i], False) for i in self._tokenizer.eos_token_ids}
        stops = (*config.stop_strings, *sorted(special))
        longest = max(len(stop) for stop in stops) if stops else 0
        held, token = "", -1
        try:
            while (piece := pieces.get()) is not None:
                held += piece
                now = time.perf_counter_ns() - start
                found = [at for stop in stops if (at := held.find(stop)) >= 0]
                if found:
                    yield Record(token, held[: min(found)], math.nan, now, "stop")
                    return
                certain = max(0, len(held) - longest)
                yield Record(token, held[:certain], math.nan, now)
                held = held[certain:]
            yield Record(token, held, math.nan, time.perf_counter_ns() - start, "length")
        finally:
            self._module.stop()
            thread.join()


def _callback(pieces: queue.Queue[str | None]) -> Any:
    from jnius import PythonJavaClass, java_method

    class Callback(PythonJavaClass):
        __javainterfaces__ = ("org/pytorch/executorch/extension/llm/LlmCallback",)
        __javacontext__ = "app"

        @java_method("(Ljava/lang/String;)V")
        def onResult(self, result: str) -> None:
            pieces.put(result)

        @java_method("(Ljava/lang/String;)V")
        def onStats(self, stats: str) -> None:
            pass

    return Callback()
