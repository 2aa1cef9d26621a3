"""The model traced once, on symbols: what every lowering walks."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from pocketslm.models import ops
from pocketslm.models.config import ModelConfig
from pocketslm.models.transformer import Model, rope_tables

# torch.fx.Node; its arguments are typed so widely that each use would need a cast.
Node = Any


@dataclass(frozen=True)
class Traced:
    """A graph of ``pocketslm`` operators for sequences of up to ``context`` tokens.

    nodes: the operators' nodes, in order.
    parameters: node -> parameter name and shape (a tied head has the embedding's name).
    tables: node -> name and array of a rotary table.
    input_ids: the tokens. states: node -> layer that runs, and which of its states it is.
    output: the logits. present: the new states of each layer, in the order of ``states``.
    widths: node -> the size of its last axis.
    """

    config: ModelConfig
    context: int
    nodes: list[Node]
    parameters: dict[Node, tuple[str, tuple[int, ...]]]
    tables: dict[Node, tuple[str, Any]]
    input_ids: Node
    states: dict[Node, tuple[int, int]]
    output: Node
    present: list[tuple[Node, ...]]
    widths: dict[Node, int]


class _Tracer(fx.Tracer):
    """Goes into every module; the list of states has an entry for each layer."""

    proxy_buffer_attributes = True
    traced_func_name = "last_logits"

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = layers

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return False

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        states: Any = obj
        return iter([states[index] for index in range(self.layers)])


def trace(config: ModelConfig, context: int) -> Traced:
    """Trace the model of ``config``; the last position alone is what the head gets."""
    with torch.device("meta"):
        model = Model(config, context=1).eval()
    graph = _Tracer(len(config.layers)).trace(model)
    first_name = {id(value): name for name, value in model.named_parameters()}
    tables = {
        f"{kind}_{index}": table.numpy()
        for index, rotary in enumerate(config.rotaries)
        for kind, table in zip(("cos", "sin"), rope_tables(rotary, context), strict=True)
    }
    input_ids, past = (node for node in graph.nodes if node.op == "placeholder")
    nodes: list[Node] = []
    parameters: dict[Node, tuple[str, tuple[int, ...]]] = {}
    used: dict[Node, tuple[str, Any]] = {}
    layers: dict[Node, int] = {}
    states: dict[Node, tuple[int, int]] = {}
    widths: dict[Node, int] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in tables:
            used[node] = node.target, tables[node.target]
        elif node.op == "get_attr":
            value = model.get_parameter(node.target)
            parameters[node] = first_name[id(value)], tuple(value.shape)
        elif node.target is operator.getitem and node.args[0] is past:
            layers[node] = node.args[1]
        elif node.target is operator.getitem and node.args[0] in layers:
            states[node] = layers[node.args[0]], node.args[1]
        elif node.op == "call_function":
            nodes.append(node)
            source = node.args[0]
            if node.target in (ops.embedding, ops.linear):
                table = parameters[node.args[1]][1]
                widths[node] = table[1 if node.target is ops.embedding else 0]
            elif node.target is ops.positions:
                widths[node] = parameters[node.args[2]][1][1]
            else:
                widths[node] = widths[source]
        elif node.op == "output":
            output, present = node.args[0]
    return Traced(
        config,
        context,
        nodes,
        parameters,
        used,
        input_ids,
        states,
        output,
        [tuple(state) for state in present],
        widths,
    )
