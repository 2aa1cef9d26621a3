"""An ExecuTorch program put together by hand: values, instructions, memory plan, file.

The format is ExecuTorch's schema/program.fbs; its Python classes and flatbuffer writer are used.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from executorch.exir import schema
from executorch.exir._serialize._program import PTEFile, serialize_pte_binary
from executorch.exir.scalar_type import ScalarType

from pocketslm.models.config import ModelConfig
from pocketslm.models.tensors import Array

_TYPES = {
    "uint8": ScalarType.BYTE,
    "int8": ScalarType.CHAR,
    "int64": ScalarType.LONG,
    "float16": ScalarType.HALF,
    "float32": ScalarType.FLOAT,
    "float64": ScalarType.DOUBLE,
}
# Of each constant and segment: a cache line, and what XNNPACK asks for at most.
_ALIGNMENT = 64
_PLANNED = 1  # the memory that every activation and cache lives in; 0 means constants
_HEADER = struct.Struct("<4sIQQQ")  # schema/extended_header.cpp
_FOREVER = 1 << 62


@dataclass
class _Planned:
    """A tensor in planned memory and the instructions between which it is alive."""

    value: int
    bytes: int
    first: int = _FOREVER
    last: int = -1


class _Data:
    """Arrays one behind the other, each aligned."""

    def __init__(self) -> None:
        self._arrays: list[tuple[int, Array]] = []
        self.size = 0

    def append(self, array: Array) -> int:
        """The offset at which it begins."""
        offset = self.size + -self.size % _ALIGNMENT
        self._arrays.append((offset, np.ascontiguousarray(array)))
        self.size = offset + array.nbytes
        return offset

    def find(self, array: Array) -> int | None:
        """The offset of that very array, if it is among these."""
        return next((offset for offset, stored in self._arrays if stored is array), None)

    def write(self, file: BinaryIO, base: int) -> None:
        """``base``: where in the file offset 0 is."""
        for offset, array in self._arrays:
            file.write(b"\0" * (base + offset - file.tell()))
            file.write(array.data)


class ProgramBuilder:
    """The method ``forward``, and methods that return constants. Values are known by index."""

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._literals: dict[tuple[type, Any], int] = {}
        self._instructions: list[Any] = []
        self._operators: dict[str, int] = {}
        self._delegates: list[Any] = []
        self._planned: dict[int, _Planned] = {}
        self._constants: dict[str, int] = {}
        self._offsets = [0]  # of constants within their segment; the first means "none"
        # Whether it lies among the constants, offset and bytes; number 0 is all constants.
        self._segments: list[tuple[bool, int, int]] = []
        self._named: dict[str, int] = {}
        self._constant_data, self._segment_data = _Data(), _Data()

    # Values.

    def tensor(self, shape: Sequence[int], dtype: str = "float32", *, dynamic: bool = True) -> int:
        """An activation; of a dynamic one ``shape`` is the largest that it takes."""
        value = self._tensor(shape, dtype, dynamic=dynamic)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._planned[value] = _Planned(value, size)
        return value

    def state(self, shape: Sequence[int], dtype: str = "float32") -> int:
        """A tensor that keeps its content from call to call."""
        value = self.tensor(shape, dtype, dynamic=False)
        self._planned[value].first, self._planned[value].last = -1, _FOREVER
        return value

    def constant(self, key: str, array: Array) -> int:
        """A constant, stored once per ``key``."""
        if key not in self._constants:
            buffer = len(self._offsets)
            self._offsets.append(self._constant_data.append(array))
            dtype = array.dtype.name
            self._constants[key] = self._tensor(array.shape, dtype, buffer=buffer)
        return self._constants[key]

    def literal(self, value: Any) -> int:
        """None, a bool, an int or a float."""
        key = type(value), value
        if key not in self._literals:
            made: Any = schema.Null()
            if isinstance(value, bool):
                made = schema.Bool(value)
            elif isinstance(value, int):
                made = schema.Int(value)
            elif isinstance(value, float):
                made = schema.Double(value)
            self._literals[key] = self._value(made)
        return self._literals[key]

    def number(self) -> int:
        """An integer that an instruction writes."""
        return self._value(schema.Int(0))

    def _tensor(
        self, shape: Sequence[int], dtype: str, *, buffer: int = 0, dynamic: bool = False
    ) -> int:
        dynamism = schema.TensorShapeDynamism
        return self._value(
            schema.Tensor(
                scalar_type=_TYPES[dtype],
                storage_offset=0,
                sizes=list(shape),
                dim_order=list(range(len(shape))),
                requires_grad=False,
                layout=0,
                data_buffer_idx=buffer,
                allocation_info=None,
                shape_dynamism=dynamism.DYNAMIC_BOUND if dynamic else dynamism.STATIC,
            )
        )

    def _value(self, value: Any) -> int:
        self._values.append(schema.EValue(value))
        return len(self._values) - 1

    # Instructions.

    def call(self, operator: str, *arguments: int) -> None:
        """Run a kernel such as ``aten::embedding.out``; its outputs are among the arguments."""
        index = self._operators.setdefault(operator, len(self._operators))
        self._instruct(schema.KernelCall(index, list(arguments)), arguments)

    def delegate(self, backend: str, graph: bytes, arguments: Sequence[int]) -> None:
        """Run a graph that a backend compiles when the file is loaded."""
        location = schema.BackendDelegateDataReference(
            schema.DataLocation.SEGMENT, self._segment(np.frombuffer(graph, np.uint8))
        )
        self._delegates.append(schema.BackendDelegate(backend, location, []))
        self._instruct(schema.DelegateCall(len(self._delegates) - 1, list(arguments)), arguments)

    def _instruct(self, arguments: Any, values: Sequence[int]) -> None:
        for value in values:
            if value in self._planned:
                planned = self._planned[value]
                planned.first = min(planned.first, len(self._instructions))
                planned.last = max(planned.last, len(self._instructions))
        self._instructions.append(schema.Instruction(arguments))

    # Data.

    def named(self, key: str, array: Array) -> str:
        """Data that a delegate finds by its key, stored once; an array may be a constant too."""
        if key not in self._named:
            self._named[key] = self._segment(array)
        return key

    def _segment(self, array: Array) -> int:
        offset = self._constant_data.find(array)
        if offset is not None:
            self._segments.append((True, offset, array.nbytes))
        else:
            self._segments.append((False, self._segment_data.append(array), array.nbytes))
        return len(self._segments)

    # The file.

    def write(
        self,
        path: Path,
        inputs: Sequence[int],
        outputs: Sequence[int],
        metadata: dict[str, int | bool | list[int]],
    ) -> None:
        """``metadata``: methods without inputs and what they return."""
        for value in inputs:
            self._planned[value].first = -1
        for value in outputs:
            self._planned[value].last = _FOREVER
        plans = [
            _plan(
                "forward",
                self._values,
                [0, self._plan_memory()],
                inputs=list(inputs),
                outputs=list(outputs),
                instructions=self._instructions,
                operators=[schema.Operator(*name.split(".")) for name in self._operators],
                delegates=self._delegates,
            )
        ]
        for name, result in metadata.items():
            items = result if isinstance(result, list) else [result]
            kind = schema.Bool if isinstance(result, bool) else schema.Int
            values = [schema.EValue(kind(item)) for item in items]
            plans.append(_plan(name, values, [0], outputs=list(range(len(values)))))
        constants, others = self._constant_data, self._segment_data
        begin = constants.size + -constants.size % _ALIGNMENT
        segments = [(0, constants.size)]
        segments += [(at if among else begin + at, n) for among, at, n in self._segments]
        program = schema.Program(
            version=0,
            execution_plan=plans,
            constant_buffer=[],
            backend_delegate_data=[],
            segments=[schema.DataSegment(offset, size) for offset, size in segments],
            constant_segment=schema.SubsegmentOffsets(0, self._offsets),
            named_data=[schema.NamedData(key, index) for key, index in self._named.items()],
        )
        with path.open("wb") as file:
            binary = bytes(serialize_pte_binary(PTEFile(program)))
            file.write(_with_header(binary, begin + others.size))
            base = file.tell()
            constants.write(file, base)
            others.write(file, base + begin)

    def _plan_memory(self) -> int:
        """Give every activation a place; those that live at once do not overlap. Bytes in all."""
        placed: list[tuple[int, int, _Planned]] = []  # begin, end
        total = 0
        for tensor in sorted(self._planned.values(), key=lambda t: -t.bytes):
            begin = 0
            for other_begin, other_end, other in sorted(placed, key=lambda p: p[0]):
                apart = tensor.last < other.first or other.last < tensor.first
                if not apart and begin + tensor.bytes > other_begin:
                    begin = max(begin, other_end)
            end = begin + tensor.bytes + -tensor.bytes % _ALIGNMENT
            placed.append((begin, end, tensor))
            self._values[tensor.value].val.allocation_info = schema.AllocationDetails(
                _PLANNED, begin & 0xFFFFFFFF, begin >> 32
            )
            total = max(total, end)
        return total


def llm_metadata(
    config: ModelConfig, context: int, bos: int, eos: list[int]
) -> dict[str, int | bool | list[int]]:
    """The constant methods that ExecuTorch's LLM runner asks for."""
    return {
        "get_bos_id": bos,
        "get_eos_ids": eos,
        "get_vocab_size": config.vocab_size,
        "get_n_layers": len(config.layers),
        "get_max_seq_len": context,
        "get_max_context_len": context,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }


def _plan(
    name: str,
    values: list[Any],
    memory: list[int],
    *,
    inputs: Sequence[int] = (),
    outputs: Sequence[int] = (),
    instructions: Sequence[Any] = (),
    operators: Sequence[Any] = (),
    delegates: Sequence[Any] = (),
) -> Any:
    return schema.ExecutionPlan(
        name=name,
        container_meta_type=schema.ContainerMetadata("", ""),
        values=values,
        inputs=list(inputs),
        outputs=list(outputs),
        chains=[schema.Chain([], [], list(instructions), None)],
        operators=list(operators),
        delegates=list(delegates),
        non_const_buffer_sizes=memory,
    )


def _with_header(program: bytes, segment_bytes: int) -> bytes:
    """The flatbuffer with ExecuTorch's extended header behind its magic, padded for segments."""
    size = _HEADER.size + len(program)
    base = size + -size % _ALIGNMENT
    header = _HEADER.pack(b"eh00", _HEADER.size, size, base, segment_bytes)
    root = int.from_bytes(program[:4], "little") + len(header)
    whole = root.to_bytes(4, "little") + program[4:8] + header + program[8:]
    return whole + b"\0" * (base - size)
