"""A checkpoint as a PyTorch model in fp32: what every target is held against."""

from __future__ import annotations

import torch

from pocketslm.models.checkpoint import Checkpoint, read_weight
from pocketslm.models.config import ModelConfig
from pocketslm.models.tensors import floats
from pocketslm.models.transformer import Model


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its name; a tied head is not listed again."""
    with torch.device("meta"):
        model = Model(config, context=1)
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def load_reference(checkpoint: Checkpoint, context: int | None = None) -> Model:
    """The model with the checkpoint's weights, dequantized, in eval mode.

    Raises CheckpointError where a weight is missing or has another shape than the config says.
    """
    with torch.device("meta"):
        model = Model(checkpoint.config, context=1)
    state = {}
    for name, parameter in model.named_parameters():  # tied weights are named once
        array = floats(read_weight(checkpoint, name, tuple(parameter.shape)))
        state[name] = torch.from_numpy(array if array.flags.writeable else array.copy())
    model.load_state_dict(state, strict=False, assign=True)
    model.tie()
    model.set_tables(context or checkpoint.config.max_position_embeddings)
    return model.eval().requires_grad_(False)
