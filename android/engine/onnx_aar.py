"""onnxruntime's Java library, as its AAR brings it to Android, behind the session interface.

Its CPU kernels are those of the Python wheel. The cache goes from one call's outputs to the next
call's inputs as Java objects; only token ids and logits cross the border.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketslm.errors import BackendError, UsageError
from pocketslm.runtime.backends import Logits, check_tokens
from pocketslm.runtime.bundle import open_bundle
from pocketslm.runtime.generation import Engine
from pocketslm.runtime.model import Model
from pocketslm.runtime.tokenizer import load_tokenizer

PREFILL_CHUNK = 64
_PAST, _PRESENT = "past_key_values.", "present."


def load(path: Path, threads: int) -> Model:
    """A bundle's ONNX graph as a model; raises BundleError or BackendError."""
    bundle = open_bundle(path, verify=False)
    graph = bundle.graph("onnx")
    session = JavaOnnxSession(
        path / graph.file, head_dim=bundle.head_dim, context=graph.context, threads=threads
    )
    return Model(bundle, Engine(session), load_tokenizer(path))


class JavaOnnxSession:
    """See :class:`pocketslm.runtime.backends.Session`.

    What the graph takes and gives, its own inputs and outputs say. head_dim: where they leave it
    open. Java cannot give a value to an input with a default, as ``logits_to_keep`` is in our
    graphs: those give the last token's logits only.
    """

    def __init__(self, path: Path, *, head_dim: int, context: int, threads: int) -> None:
        try:
            from jnius import autoclass, cast

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
            inputs, outputs = (
                {
                    str(name): _value(cast("ai.onnxruntime.TensorInfo", found.get(name).getInfo()))
                    for name in found.keySet().toArray()
                }
                for found in (self._session.getInputInfo(), self._session.getOutputInfo())
            )
        except Exception as error:  # pyjnius raises its own types, and what Java throws
            raise BackendError(f"onnxruntime's Java library: {error}") from None
        self.backend = "onnxruntime (Java)"
        self.context, self.threads = context, threads
        self.vocab_size = self._check(inputs, outputs)
        self._trims = "logits_to_keep" in inputs
        self._caches = {
            name: (kind, [1, shape[1], 0, shape[3] if shape[3] > 0 else head_dim])
            for name, (kind, shape) in inputs.items()
            if name.startswith(_PAST)
        }
        self._ids: list[int] = []
        self._past: Any = None  # the last call's result, which owns the cache
        self._held = 0  # tokens in it

    @staticmethod
    def _check(inputs: dict[str, _Value], outputs: dict[str, _Value]) -> int:
        """The size of the vocabulary of a graph that this engine can run; else BackendError."""
        known = {"input_ids", "attention_mask", "logits_to_keep"}
        caches = {name for name in inputs if name.startswith(_PAST)}
        if unknown := sorted(inputs.keys() - known - caches):
            raise BackendError(f"the graph has an input {unknown[0]} that this engine cannot fill")
        wanted = {"logits", *(name.replace(_PAST, _PRESENT) for name in caches)}
        if missing := sorted({"input_ids", "attention_mask"} - inputs.keys()) or sorted(
            wanted - outputs.keys()
        ):
            raise BackendError(f"the graph has no {missing[0]}")
        kind, shape = outputs["logits"]
        if kind != "FLOAT" or len(shape) != 3 or shape[2] < 1:
            raise BackendError(f"the graph's logits are {kind} {shape}, expected FLOAT [1, n, V]")
        for name in caches:
            kind, shape = inputs[name]
            if kind not in ("FLOAT", "FLOAT16") or len(shape) != 4 or shape[1] < 1:
                raise BackendError(f"the graph's {name} is {kind} {shape}, expected four sizes")
        return outputs["logits"][1][2]

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
        one_by_one = all_logits and not self._trims
        again = len(whole) - len(ids)  # tokens that are known, perhaps to be read again
        parts = []
        while self._held < len(whole):
            chunk = min(PREFILL_CHUNK, len(whole) - self._held)
            if one_by_one:
                chunk = min(chunk, max(1, again - self._held))
            parts.append(self._run(whole[self._held : self._held + chunk], all_logits))
        self._ids = whole
        return np.concatenate(parts)[-len(ids) :] if all_logits else parts[-1]

    def close(self) -> None:
        self._drop()
        self._session.close()

    def _drop(self) -> None:
        if self._past is not None:
            self._past.close()
        self._past, self._held = None, 0

    def _run(self, ids: list[int], all_logits: bool) -> Logits:
        """One call of the graph; logits [n, V] of all tokens, or [1, V] of the last."""
        total = self._held + len(ids)
        rows = len(ids) if all_logits and self._trims else 1
        inputs = self._map()
        made = {
            "input_ids": self._int64(np.array([ids])),
            "attention_mask": self._int64(np.ones((1, total))),
        }
        if self._trims:
            made["logits_to_keep"] = self._int64(np.array([rows]))
        for name, (kind, empty) in self._caches.items():
            if self._past is None:
                made[name] = self._make(b"", getattr(self._types, kind), empty)
            else:
                inputs.put(name, self._past.get(name.replace(_PAST, _PRESENT)).get())
        for name, tensor in made.items():
            inputs.put(name, tensor)
        try:
            result = self._session.run(inputs)
            data = result.get("logits").get().getByteBuffer()
            raw = bytearray(data.remaining())
            data.get(raw)
        except Exception as error:  # as above
            raise BackendError(f"onnxruntime's Java library: {error}") from None
        finally:
            for tensor in made.values():
                tensor.close()
        if self._past is not None:
            self._past.close()
        self._past, self._held = result, total
        if len(raw) != rows * self.vocab_size * 4:
            raise BackendError(f"the graph gave {len(raw)} bytes of logits for {rows} tokens")
        return np.frombuffer(raw, np.float32).reshape(rows, self.vocab_size)

    def _int64(self, values: npt.NDArray[Any]) -> Any:
        data = values.astype(np.int64).tobytes()
        return self._make(data, self._types.INT64, list(values.shape))

    def _make(self, data: bytes, kind: Any, shape: list[int]) -> Any:
        buffer = self._bytes.allocateDirect(len(data)).order(self._order.nativeOrder())
        buffer.put(data)
        buffer.rewind()
        return self._tensor.createTensor(self._environment, buffer, shape, kind)


_Value = tuple[str, list[int]]  # a tensor's type in Java's words, its shape; -1: any size


def _value(info: Any) -> _Value:
    return str(info.type.toString()), [int(size) for size in info.getShape()]
