"""The native operators inside onnxruntime: one node over ``model.slm``.

``runtime/ops/bindings/onnxruntime.cpp`` describes the operator. The weights are an initializer
whose bytes are those of ``model.slm`` itself, mapped by onnxruntime: nothing is stored or held
twice. Inputs and outputs have onnxruntime-genai's names.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from pocketslm.export.lower.walk import refuse
from pocketslm.models.config import ModelConfig

GRAPH_FILE, MODEL_FILE = "pocketslm.onnx", "model.slm"
DOMAIN = "pocketslm"
OPSET, IR_VERSION = 21, 10


def lower(config: ModelConfig, folder: Path) -> None:
    """Write the graph over the ``model.slm`` that lies in ``folder`` already."""
    size = (folder / MODEL_FILE).stat().st_size
    weights = ir.ExternalTensor(
        MODEL_FILE, 0, size, ir.DataType.UINT8, shape=ir.Shape([size]), name="model"
    )
    keep = ir.Tensor(np.array([1], np.int64), name="logits_to_keep")
    constants = {
        tensor.name: ir.Value(
            name=tensor.name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape),
            const_value=tensor,
        )
        for tensor in (weights, keep)
    }
    ids = _value("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
    mask = _value("attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"])
    logits = _value("logits", ir.DataType.FLOAT, ["batch_size", 1, config.vocab_size])
    past, present = (_caches(config, name) for name in ("past_key_values", "present"))
    node = ir.Node(
        DOMAIN,
        "Decoder",
        [ids, mask, constants["model"], constants["logits_to_keep"], *past],
        outputs=[logits, *present],
        name="decoder",
    )
    graph = ir.Graph(
        # An input with a default: onnxruntime-genai need not know it, evaluation overrides it.
        [ids, mask, *past, constants["logits_to_keep"]],
        [logits, *present],
        nodes=[node],
        initializers=list(constants.values()),
        opset_imports={"": OPSET, DOMAIN: 1},
        name=config.architecture,
    )
    ir.save(ir.Model(graph, ir_version=IR_VERSION, producer_name="pocketslm"), folder / GRAPH_FILE)


def _caches(config: ModelConfig, name: str) -> list[ir.Value]:
    if len(config.attentions) != len(config.layers):
        raise refuse("onnx-pocketslm", "a layer's state is not keys and values")
    return [
        _value(
            f"{name}.{index}.{kind}",
            ir.DataType.FLOAT16,
            ["batch_size", a.kv_heads, "cache_length", a.head_dim],
        )
        for index, a in enumerate(config.attentions)
        for kind in ("key", "value")
    ]


def _value(name: str, dtype: ir.DataType, shape: list[str | int]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
