"""onnxruntime's Java library, as its AAR brings it to Android, behind the session interface.

Its CPU kernels are those of the Python wheel. The cache goes from one call's outputs to the next
call's inputs as Java objects; only token ids and logits cross the border.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketslm.errors import BackendError, BundleError, UsageError
from pocketslm.runtime.backends import Logits, check_tokens
from pocketslm.runtime.bundle import open_bundle
from pocketslm.runtime.generation import Engine
from pocketslm.runtime.model import Model
from pocketslm.runtime.tokenizer import load_tokenizer

PREFILL_CHUNK = 64


def load(path: Path, threads: int) -> Model:
    """A bundle's ONNX graph as a model; raises BundleError or BackendError."""
    bundle = open_bundle(path, verify=False)
    graph = bundle.graph("onnx")
    if bundle.manifest is None:
        raise BundleError(f"{path} has no pocketslm.json; import a pocketslm bundle")
    dimensions = bundle.manifest.architecture
    shape = tuple(int(dimensions[k]) for k in ("num_hidden_layers", "num_key_value_heads"))
    session = JavaOnnxSession(
        path / graph.file,
        layers=shape[0],
        kv_heads=shape[1],
        head_dim=bundle.head_dim,
        vocab_size=int(dimensions["vocab_size"]),
        context=graph.context,
        fp16=graph.kv_cache == "fp16",
        threads=threads,
    )
    return Model(bundle, Engine(session), load_tokenizer(path))


class JavaOnnxSession:
    """See :class:`pocketslm.runtime.backends.Session`."""

    def __init__(
        self,
        path: Path,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        vocab_size: int,
        context: int,
        fp16: bool,
        threads: int,
    ) -> None:
        try:
            from jnius import autoclass

            self._tensor = autoclass("ai.onnxruntime.OnnxTensor")
            self._types = autoclass("ai.onnxruntime.OnnxJavaType")
            self._map = autoclass("java.util.HashMap")
            self._bytes = autoclass("java.nio.ByteBuffer")
            self._order = autoclass("java.nio.ByteOrder")
            self._environment = autoclass("ai.onnxruntime.OrtEnvironment").getEnvironment()
            options = autoclass("ai.onnxruntime.OrtSession$SessionOptions")()
            if threads:
                options.setIntraOpNumThreads(threads)
            self._session = self._environment.createSession(str(path), options)
        except Exception as error:  # pyjnius raises its own types, and what Java throws
            raise BackendError(f"onnxruntime's Java library: {error}") from None
        self.backend = "onnxruntime (Java)"
        self.vocab_size, self.context, self.threads = vocab_size, context, threads
        self._layers, self._shape, self._fp16 = layers, (kv_heads, head_dim), fp16
        self._ids: list[int] = []
        self._past: Any = None  # the last call's result, which owns the cache
        self._held = 0  # tokens in it

    @property
    def length(self) -> int:
        return len(self._ids)

    def truncate(self, length: int) -> None:
        """Forget all but the first tokens; what is kept is read again by the next forward."""
        if not 0 <= length <= len(self._ids):
            raise UsageError(f"cannot truncate {len(self._ids)} cached tokens to {length}")
        if length < len(self._ids):
            del self._ids[length:]
            self._drop()

    def forward(self, tokens: npt.NDArray[np.integer[Any]], *, all_logits: bool = False) -> Logits:
        ids = np.asarray(tokens)
        check_tokens(self, ids)
        whole = [*self._ids, *ids.tolist()]
        parts = []
        while self._held < len(whole):
            parts.append(self._run(whole[self._held : self._held + PREFILL_CHUNK]))
        self._ids = whole
        logits: Logits = np.concatenate(parts)
        return logits[-len(ids) :] if all_logits else logits[-1:]

    def close(self) -> None:
        self._drop()
        self._session.close()

    def _drop(self) -> None:
        if self._past is not None:
            self._past.close()
        self._past, self._held = None, 0

    def _run(self, ids: list[int]) -> Logits:
        """One call of the graph; logits [n, V]."""
        total = self._held + len(ids)
        inputs = self._map()
        made = {
            "input_ids": self._int64(np.array([ids])),
            "attention_mask": self._int64(np.ones((1, total))),
        }
        for layer in range(self._layers):
            for kind in ("key", "value"):
                name = f"{layer}.{kind}"
                if self._past is None:
                    made[f"past_key_values.{name}"] = self._empty()
                else:
                    cached = self._past.get(f"present.{name}").get()
                    inputs.put(f"past_key_values.{name}", cached)
        for name, tensor in made.items():
            inputs.put(name, tensor)
        try:
            result = self._session.run(inputs)
        except Exception as error:  # as above
            raise BackendError(f"onnxruntime's Java library: {error}") from None
        finally:
            for tensor in made.values():
                tensor.close()
        if self._past is not None:
            self._past.close()
        self._past, self._held = result, total
        data = result.get("logits").get().getByteBuffer()
        raw = bytearray(data.remaining())
        data.get(raw)
        width = np.float32 if len(raw) == 4 * len(ids) * self.vocab_size else np.float16
        return np.frombuffer(raw, width).astype(np.float32).reshape(len(ids), self.vocab_size)

    def _int64(self, values: npt.NDArray[Any]) -> Any:
        data = values.astype(np.int64).tobytes()
        return self._make(data, self._types.INT64, list(values.shape))

    def _empty(self) -> Any:
        heads, size = self._shape
        kind = self._types.FLOAT16 if self._fp16 else self._types.FLOAT
        return self._make(b"", kind, [1, heads, 0, size])

    def _make(self, data: bytes, kind: Any, shape: list[int]) -> Any:
        buffer = self._bytes.allocateDirect(len(data)).order(self._order.nativeOrder())
        buffer.put(data)
        buffer.rewind()
        return self._tensor.createTensor(self._environment, buffer, shape, kind)
