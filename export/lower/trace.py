"""The architecture traced once, on fake weights: what every lowering walks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pocketslm.models import architectures
from pocketslm.models.config import ModelConfig

# Sizes at which the graph is traced. The operators are opaque, so no size gets baked in.
_TRACED_LENGTH, _TRACED_PAST = 4, 8


@dataclass(frozen=True)
class Traced:
    """An FX graph of ``pocketslm`` operators.

    ``parameters`` maps placeholder names to parameter names and shapes (a tied head has the
    embedding's name), ``buffers`` to constant arrays; ``past`` lists the cache placeholders as
    (key, value) per layer. The output node's arguments are the logits, then key and value per
    layer.
    """

    graph: Any
    parameters: dict[str, tuple[str, tuple[int, ...]]]
    buffers: dict[str, Any]
    past: list[tuple[str, str]]
    input_ids: str


def trace(config: ModelConfig, context: int) -> Traced:
    """Trace the architecture of ``config`` for caches of up to ``context`` tokens."""
    module = architectures.load(config.architecture)
    with torch.device("meta"):
        model = module.Model(config, context).eval()
        ids = torch.zeros(1, _TRACED_LENGTH, dtype=torch.long)
        shapes = [
            (1, size.num_key_value_heads, _TRACED_PAST, config.head_dim) for size in config.layers
        ]
        past = [(torch.empty(shape), torch.empty(shape)) for shape in shapes]
    program = torch.export.export(model, (ids, past, 1), strict=False)
    signature = program.graph_signature
    first_name = {id(value): name for name, value in model.named_parameters()}

    def parameter(name: str) -> tuple[str, tuple[int, ...]]:
        value = model.get_parameter(name)
        return first_name[id(value)], tuple(value.shape)

    cos, sin = module.rope_tables(config, context)
    tables = {"cos": cos.numpy(), "sin": sin.numpy()}
    inputs = list(signature.user_inputs)
    caches = inputs[1 : 1 + 2 * len(config.layers)]
    return Traced(
        graph=program.graph,
        parameters={p: parameter(n) for p, n in signature.inputs_to_parameters.items()},
        buffers={p: tables[n] for p, n in signature.inputs_to_buffers.items()},
        past=list(zip(caches[::2], caches[1::2], strict=True)),
        input_ids=inputs[0],
    )
