"""A checkpoint as a PyTorch model in fp32: what every target is held against."""

from __future__ import annotations

from typing import Any

import torch

from pocketslm.models import architectures
from pocketslm.models.checkpoint import Checkpoint, read_weight
from pocketslm.models.config import ModelConfig
from pocketslm.models.tensors import QuantTensor


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its name; a tied head is not listed again."""
    with torch.device("meta"):
        model = architectures.load(config.architecture).Model(config, context=1)
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def load_reference(checkpoint: Checkpoint, context: int | None = None) -> Any:
    """The architecture's ``Model`` with the checkpoint's weights, dequantized, in eval mode.

    Raises CheckpointError where a weight is missing or has another shape than the config says.
    """
    config = checkpoint.config
    module = architectures.load(config.architecture)
    with torch.device("meta"):
        skeleton = module.Model(config, context)
    state = {}
    for name, parameter in skeleton.named_parameters():  # tied weights are named once
        weight = read_weight(checkpoint, name, tuple(parameter.shape))
        array = weight.dequantize() if isinstance(weight, QuantTensor) else weight
        state[name] = torch.from_numpy(array.copy() if not array.flags.writeable else array)
    skeleton.load_state_dict(state, strict=False, assign=True)
    if config.tie_word_embeddings:
        skeleton.lm_head.weight = skeleton.model.embed_tokens.weight
    tables = module.rope_tables(config, context or config.max_position_embeddings)
    skeleton.cos, skeleton.sin = tables
    return skeleton.eval().requires_grad_(False)
