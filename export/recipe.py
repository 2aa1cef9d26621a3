"""What is to be done to a checkpoint, as data: enough to do it again."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from pocketslm.errors import ExportError
from pocketslm.export.lower import native
from pocketslm.export.quantize import rtn
from pocketslm.models.checkpoint import EMBEDDING, HEAD
from pocketslm.models.config import ModelConfig
from pocketslm.models.tensors import QuantTensor, Weight

Scheme = Literal["keep", "float", "int4", "int8"]
DType = Literal["fp32", "fp16"]
GROUP_SIZES = (32, 64, 128)
TARGETS = ("native", "onnx")  # in the order in which "auto" prefers them


@dataclass(frozen=True)
class Recipe:
    """How weights are stored and what is lowered.

    ``weights`` and ``head`` (embedding and output head): ``keep`` carries quantized source blocks
    exactly and rounds float matrices (``weights`` to int4, ``head`` to int8); ``int4`` and
    ``int8`` round everything again; ``float`` dequantizes. ``dtype`` is that of the ONNX graph's
    activations and KV cache. ``context`` is the longest sequence, by default the model's own up to
    4096 tokens. ``targets``: ``native`` (model.slm for the C++ operators and pocketslm-run) and
    ``onnx`` (model.onnx for onnxruntime and onnxruntime-genai); None: both, where they cover the
    model.
    """

    weights: Scheme = "keep"
    head: Scheme = "keep"
    group_size: int = 32
    symmetric: bool = True
    dtype: DType = "fp32"
    context: int | None = None
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("weights", "head"):
            if getattr(self, name) not in get_args(Scheme):
                raise ExportError(
                    f"{name} is {getattr(self, name)!r}, expected one of {get_args(Scheme)}"
                )
        if self.group_size not in GROUP_SIZES:
            raise ExportError(f"group size {self.group_size}, expected one of {GROUP_SIZES}")
        if self.dtype not in get_args(DType):
            raise ExportError(f"dtype {self.dtype!r}, expected one of {get_args(DType)}")
        if self.targets is not None and not set() < set(self.targets) <= set(TARGETS):
            raise ExportError(f"targets {self.targets}, expected some of {TARGETS}")
        if self.context is not None and self.context < 2:
            raise ExportError(f"context {self.context}, expected at least 2 tokens")

    def resolved(self, config: ModelConfig) -> Recipe:
        """The recipe with context and targets decided for a model.

        Raises ExportError if the model has fewer positions than the context asked for.
        """
        longest = config.max_position_embeddings
        context = self.context or min(longest, 4096)
        if context > longest:
            raise ExportError(f"context {context} is longer than the model's {longest} positions")
        covered = [t for t in TARGETS if t != "native" or native.uncovered(config) is None]
        return replace(self, context=context, targets=self.targets or tuple(covered))

    def apply(self, name: str, weight: Weight) -> Weight:
        """The weight as this recipe stores it; vectors stay as they are."""
        if len(weight.shape) != 2:
            return weight
        top = name in (EMBEDDING, HEAD)
        scheme = self.head if top else self.weights
        if scheme == "keep":
            if isinstance(weight, QuantTensor):
                return weight
            scheme = "int8" if top else "int4"
        array = weight.dequantize() if isinstance(weight, QuantTensor) else weight
        if scheme == "float":
            return array
        return rtn.quantize(array, int(scheme[3:]), self.group_size, self.symmetric)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"targets": None if self.targets is None else list(self.targets)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        targets = data.get("targets")
        return cls(**data | {"targets": None if targets is None else tuple(targets)})
