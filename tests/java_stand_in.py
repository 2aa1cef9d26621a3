"""onnxruntime's Java classes, as far as they are called, over the Python wheel: the same library.

``autoclass`` and ``cast`` take the place of pyjnius. What a session takes and refuses is what the
graph's inputs say, as in ``OrtSession.java``: no others, and none with a default.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

_TYPES = {"tensor(int64)": "INT64", "tensor(float)": "FLOAT", "tensor(float16)": "FLOAT16"}
_DTYPES = {"INT64": np.int64, "FLOAT": np.float32, "FLOAT16": np.float16}


class HashMap(dict[str, Any]):
    def put(self, name: str, value: Any) -> None:
        self[name] = value

    def keySet(self) -> Any:
        return SimpleNamespace(toArray=lambda: list(self))


class ByteBuffer:
    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)

    @staticmethod
    def allocateDirect(size: int) -> ByteBuffer:
        return ByteBuffer(bytes(size))

    def order(self, order: str) -> ByteBuffer:
        assert order == "native"
        return self

    def put(self, data: bytes) -> None:
        assert len(data) == len(self.data)
        self.data[:] = data

    def rewind(self) -> None:
        pass

    def remaining(self) -> int:
        return len(self.data)

    def get(self, into: bytearray) -> None:
        into[:] = self.data


class Named:
    def __init__(self, name: str) -> None:
        self.name = name

    def toString(self) -> str:
        return self.name


class OnnxTensor:
    open = 0

    def __init__(self, array: Any) -> None:
        self.array: Any = array
        OnnxTensor.open += 1

    @staticmethod
    def createTensor(_: Any, buffer: ByteBuffer, shape: list[int], kind: Named) -> OnnxTensor:
        data = np.frombuffer(bytes(buffer.data), _DTYPES[kind.name])
        return OnnxTensor(data.reshape(shape))

    def getByteBuffer(self) -> ByteBuffer:
        return ByteBuffer(self.array.tobytes())

    def close(self) -> None:
        assert self.array is not None, "closed twice"
        self.array = None
        OnnxTensor.open -= 1


class Result:
    def __init__(self, values: dict[str, Any]) -> None:
        self._values = {name: OnnxTensor(array) for name, array in values.items()}

    def get(self, name: str) -> Any:
        return SimpleNamespace(get=lambda: self._values[name])

    def close(self) -> None:
        for tensor in self._values.values():
            tensor.close()


class OrtSession:
    def __init__(self, path: str) -> None:
        self._session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        self._outputs = [one.name for one in self._session.get_outputs()]

    def getInputInfo(self) -> HashMap:
        return self._infos(self._session.get_inputs())

    def getOutputInfo(self) -> HashMap:
        return self._infos(self._session.get_outputs())

    @staticmethod
    def _infos(values: Iterable[Any]) -> HashMap:
        found = HashMap()
        for one in values:
            shape = [size if isinstance(size, int) else -1 for size in one.shape]
            info = SimpleNamespace(type=Named(_TYPES[one.type]), getShape=lambda shape=shape: shape)
            found[one.name] = SimpleNamespace(getInfo=lambda info=info: info)
        return found

    def run(self, inputs: HashMap) -> Result:
        known = self.getInputInfo()
        if unknown := inputs.keys() - known.keys():
            raise ValueError(f"Unknown input name {unknown}, expected one of {list(known)}")
        feed = {name: tensor.array for name, tensor in inputs.items()}
        return Result(dict(zip(self._outputs, self._session.run(None, feed), strict=True)))

    def close(self) -> None:
        self._session = None


CLASSES = {
    "ai.onnxruntime.OnnxTensor": OnnxTensor,
    "ai.onnxruntime.OnnxJavaType": SimpleNamespace(**{name: Named(name) for name in _DTYPES}),
    "java.util.HashMap": HashMap,
    "java.nio.ByteBuffer": ByteBuffer,
    "java.nio.ByteOrder": SimpleNamespace(nativeOrder=lambda: "native"),
    "ai.onnxruntime.OrtEnvironment": SimpleNamespace(
        getEnvironment=lambda: SimpleNamespace(createSession=lambda path, _: OrtSession(path))
    ),
    "ai.onnxruntime.OrtSession$SessionOptions": lambda: SimpleNamespace(
        setIntraOpNumThreads=lambda count: None
    ),
}


def autoclass(name: str) -> Any:
    return CLASSES[name]


def cast(_: str, value: Any) -> Any:
    return value
