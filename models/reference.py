"""A checkpoint as a PyTorch model in fp32: what every target is held against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

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
    # Tied weights are named once.
    _fill(model, checkpoint, [name for name, _ in model.named_parameters()])
    model.tie()
    model.set_tables(context or checkpoint.config.max_position_embeddings)
    return model.eval().requires_grad_(False)


class Layers:
    """A reference model for whoever goes through its layers once: it has one at a time.

    ``model`` can embed; its layers are empty unless they are held, its head always.
    """

    def __init__(self, checkpoint: Checkpoint, context: int) -> None:
        with torch.device("meta"):
            self.model = Model(checkpoint.config, context=1)
        self.checkpoint = checkpoint
        names = [name for name, _ in self.model.model.named_parameters(prefix="model")]
        _fill(self.model, checkpoint, [n for n in names if not n.startswith("model.layers.")])
        self.model.set_tables(context)
        self.model.eval().requires_grad_(False)

    @contextmanager
    def held(self, index: int) -> Iterator[None]:
        """Its layer ``index`` is there meanwhile, as the checkpoint has it."""
        layer = self.model.model.layers[index]
        prefix = f"model.layers.{index}."
        _fill(self.model, self.checkpoint, [prefix + n for n, _ in layer.named_parameters()])
        layer.requires_grad_(False)
        try:
            yield
        finally:
            layer.to("meta")


def _fill(model: Model, checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Give parameters of a model the checkpoint's values."""
    state = {}
    for name in names:
        shape = tuple(model.get_parameter(name).shape)
        array = floats(read_weight(checkpoint, name, shape))
        state[name] = torch.from_numpy(array if array.flags.writeable else array.copy())
    model.load_state_dict(state, strict=False, assign=True)
