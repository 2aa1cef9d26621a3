"""The walk over a traced model that every lowering makes."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

from pocketslm.errors import ExportError
from pocketslm.export.lower.trace import Node, Traced
from pocketslm.models import ops
from pocketslm.models.tensors import Array, QuantTensor, Weight

WeightReader = Callable[[str, tuple[int, ...]], Weight]
Progress = Callable[[int, int], None]
_OPERATORS = {
    ops.embedding: "embedding",
    ops.positions: "positions",
    ops.linear: "linear",
    ops.rms_norm: "rms_norm",
    ops.layer_norm: "layer_norm",
    ops.rotary: "rotary",
    ops.temperature: "temperature",
    ops.attention: "attention",
    ops.short_conv: "short_conv",
    ops.activate: "activate",
    ops.gated: "gated",
    ops.scale: "scale",
    ops.softcap: "softcap",
    ops.last_tokens: "last_tokens",
    operator.add: "add",
    operator.getitem: "getitem",
}


class Walk:
    """Calls the subclass's method for each operator of the graph, in order.

    target: its name in messages. ``weights(name, shape)`` gives each parameter; quantized ones stay
    quantized. A subclass has one method an operator; a graph with an operator that it lacks is
    refused before anything is written.

    ``plain``: whether the target knows codes of 4 and 8 bits with float scales only. Others then
    reach it in the next wider form, code for code, which ``notes`` names.
    """

    target = ""
    plain = True

    def __init__(self, traced: Traced, weights: WeightReader) -> None:
        self.traced, self.config, self.weights = traced, traced.config, weights
        self.widened: dict[str, str] = {}
        for node in traced.nodes:
            if not hasattr(self, _OPERATORS[node.target]):
                name = _OPERATORS[node.target]
                raise refuse(self.target, f"the operator {name!r} is not supported there")

    def walk(self, progress: Progress) -> None:
        nodes = self.traced.nodes
        for done, node in enumerate(nodes, 1):
            getattr(self, _OPERATORS[node.target])(node)
            progress(done, len(nodes))

    def parameter(self, node: Node) -> tuple[str, Weight]:
        """Name and weight of a parameter's node."""
        name, shape = self.traced.parameters[node]
        weight = self.weights(name, shape)
        if not self.plain or not isinstance(weight, QuantTensor):
            return name, weight
        plain = weight.widened()
        if plain.bits != weight.bits or plain.table != weight.table:
            self.widened[name] = f"{weight.scheme} weights take {plain.bits} bits in {self.target}"
        return name, plain

    def notes(self) -> list[str]:
        """What became of weights that the target has no form for, a line each."""
        return [f"{text} ({n} matrices)" for text, n in Counter(self.widened.values()).items()]

    def vector(self, node: Node) -> tuple[str, Array]:
        """Name and floats of a parameter that is never quantized."""
        name, weight = self.parameter(node)
        assert not isinstance(weight, QuantTensor), name
        return name, weight

    def groups(self, norm: Node) -> int:
        """How many groups of its input an ``rms_norm`` normalizes each for itself."""
        (size,) = self.traced.parameters[norm.args[1]][1]
        return self.traced.widths[norm] // size


def refuse(target: str, what: str) -> ExportError:
    """The error for a model that a target cannot hold."""
    return ExportError(f"no {target} graph: {what}; choose another target")


def is_op(node: Any, operator_: Any) -> bool:
    return getattr(node, "target", None) is operator_
