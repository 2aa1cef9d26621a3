"""The native operators inside ExecuTorch: a program of one kernel, with ``model.slm`` in it.

``runtime/ops/bindings/executorch.cpp`` describes the kernel. Inputs, output and metadata are those
that ExecuTorch's LLM runner expects, as in :mod:`pocketslm.export.lower.executorch`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pocketslm.export.lower.executorch.program import ProgramBuilder, llm_metadata
from pocketslm.export.lower.walk import refuse
from pocketslm.models.config import ModelConfig

GRAPH_FILE = "pocketslm.pte"
_BLOCK = 16  # positions


def lower(
    config: ModelConfig, model: Path, path: Path, *, context: int, bos: int, eos: list[int]
) -> None:
    """Write the ``.pte`` with ``model`` in it; arguments as :func:`executorch.lower` has them."""
    program = ProgramBuilder()
    tokens = program.tensor([1, context], "int64")
    start = program.tensor([1], "int64", dynamic=False)
    weights = program.constant("model", np.memmap(model, np.uint8, "r"))
    shape = _cache_shape(config, context)
    keys, values = program.state(shape, "float16"), program.state(shape, "float16")
    logits = program.tensor([1, config.vocab_size], dynamic=False)
    program.call("pocketslm::decoder.out", tokens, start, weights, keys, values, logits, logits)
    program.write(path, [tokens, start], [logits], llm_metadata(config, context, bos, eos))


def _cache_shape(config: ModelConfig, context: int) -> list[int]:
    """One tensor for the caches of all layers, which must have heads of one size."""
    sizes = {a.head_dim for a in config.attentions}
    if len(sizes) != 1 or len(config.attentions) != len(config.layers):
        raise refuse("executorch-pocketslm", "layers differ in the size of their heads")
    heads = sum(a.kv_heads for a in config.attentions)
    return [heads, -(-context // _BLOCK) * _BLOCK, *sizes]
