"""What is to be done to a checkpoint, as data: enough to do it again."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from pocketslm import schema
from pocketslm.errors import ExportError
from pocketslm.export.lower import native
from pocketslm.export.lower.walk import refuse
from pocketslm.export.quantize import hqq, rtn, search
from pocketslm.export.quantize.grid import KINDS, Fit, Kind, Spec, round_to_grid
from pocketslm.models.checkpoint import EMBEDDING, HEAD
from pocketslm.models.config import ModelConfig
from pocketslm.models.sites import is_rounded
from pocketslm.models.tensors import QuantTensor, Weight, floats

Scheme = Literal["keep", "float", "int2", "int3", "int4", "int5", "int6", "int8"]
DType = Literal["fp32", "fp16"]
KvCache = Literal["fp16", "int8"]
RECIPE_FILE = "recipe.toml"
# How the grid of a group is chosen, and what is done beside it with a text.
FITS: dict[str, Fit] = {"rtn": rtn.fit, "search": search.fit, "hqq": hqq.fit}
CALIBRATED = ("gptq", "awq", "tune")
GROUP_SIZES = (32, 64, 128)
# In the order in which "auto" prefers them.
TARGETS = ("native", "onnx", "onnx-pocketslm", "executorch", "executorch-pocketslm")
_OVER_NATIVE = ("onnx-pocketslm", "executorch-pocketslm")
_BY_DEFAULT = ("native", "onnx")


@dataclass(frozen=True)
class Recipe:
    """How weights are stored and what is lowered.

    ``weights`` and ``head`` (embedding and output head): ``keep`` carries quantized source blocks
    exactly and rounds float matrices (``weights`` to int4, of a model of embeddings to int8,
    ``head`` to int8); ``int2`` to ``int8`` round everything again; ``float`` dequantizes;
    ``overrides`` says otherwise for single matrices by name. ``grid`` is the offset that a group of
    fewer than 8 bits has: none, a zero point, a minimum, or a minimum that is stored, as the scales
    then are, as a whole number of 8 bits; 8 bits have no minimums of the last kind, but none.

    ``method`` joins with ``+`` how the grid is chosen (rtn, search, hqq; default rtn) and what is
    done to the layers beside it (gptq, awq, tune). ``calibration`` is the text that shows the
    layers' inputs: a catalog name or file, its last ``calibration_tokens`` in windows of
    ``calibration_window``; with it, search weighs errors too. ``calibration_sha256`` is filled in.

    ``vocabulary``: the ids of the tokens that stay, as ranges such as ``0-270,300``; None: all.
    ``removed_layers``: those that do not, as ranges. ``neurons``: how many of the MLP stay in each
    layer, the most important on the calibration text; None: all.

    ``dtype`` is that of the ONNX graph's activations and KV cache, ``kv_cache`` that of the native
    graph, and of ``executorch``, which has fp32 in place of fp16. ``context`` is the longest
    sequence, by default the model's own up to 4096 tokens.
    ``targets``: ``native`` (model.slm for the C++ operators and pocketslm-run) and
    ``onnx`` (model.onnx for onnxruntime and onnxruntime-genai); None: both, where they cover the
    model. ``onnx-pocketslm``: model.slm once more, through onnxruntime with our operators in it.
    ``executorch``: model.pte for ExecuTorch and its LLM runner; ``executorch-pocketslm``: the same
    with model.slm and our operators in it.
    """

    weights: Scheme = "keep"
    head: Scheme = "keep"
    group_size: int = 32
    grid: Kind = "sym"
    method: str = "rtn"
    calibration: str | None = None
    calibration_tokens: int = 16384
    calibration_window: int = 512
    calibration_sha256: str | None = None
    overrides: Mapping[str, Scheme] = field(default_factory=dict)
    vocabulary: str | None = None
    removed_layers: str | None = None
    neurons: int | None = None
    dtype: DType = "fp32"
    kv_cache: KvCache = "fp16"
    context: int | None = None
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("weights", "head"):
            if getattr(self, name) not in get_args(Scheme):
                raise ExportError(
                    f"{name} is {getattr(self, name)!r}, expected one of {get_args(Scheme)}"
                )
        parts = self.method.split("+")
        if not set(parts) <= {*FITS, *CALIBRATED} or len(FITS.keys() & set(parts)) > 1:
            raise ExportError(
                f"method {self.method!r}, expected one of {', '.join(FITS)}, with or without "
                f"{', '.join('+' + part for part in CALIBRATED)}"
            )
        if self.needs_calibration and self.calibration is None:
            what = f"method {self.method!r}" if self.neurons is None else "leaving neurons out"
            raise ExportError(f"{what} needs a calibration text")
        for name, allowed in (("grid", KINDS), ("kv_cache", get_args(KvCache))):
            if getattr(self, name) not in allowed:
                raise ExportError(f"{name} is {getattr(self, name)!r}, expected one of {allowed}")
        if not set(self.overrides.values()) <= set(get_args(Scheme)):
            raise ExportError(f"overrides name a scheme that is none of {get_args(Scheme)}")
        if self.group_size not in GROUP_SIZES:
            raise ExportError(f"group size {self.group_size}, expected one of {GROUP_SIZES}")
        if self.grid == "min8" and self.group_size != 32:
            raise ExportError(f"grid min8 has groups of 32, not of {self.group_size}")
        widths = {self.weights, self.head, *self.overrides.values()}
        if self.grid == "zp" and not widths.isdisjoint(("int2", "int3", "int5", "int6")):
            raise ExportError("grid zp is for 4 and 8 bits; choose sym, min or min8")
        if self.dtype not in get_args(DType):
            raise ExportError(f"dtype {self.dtype!r}, expected one of {get_args(DType)}")
        if self.targets is not None and not set() < set(self.targets) <= set(TARGETS):
            raise ExportError(f"targets {self.targets}, expected some of {TARGETS}")
        for target in self.targets or ():
            if target in _OVER_NATIVE and "native" not in (self.targets or ()):
                raise ExportError(f"target {target} reads model.slm; add the target native")
        for name in ("calibration_tokens", "calibration_window", "neurons"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ExportError(f"{name} is {value}, expected at least 1")
        if self.context is not None and self.context < 2:
            raise ExportError(f"context {self.context}, expected at least 2 tokens")

    def resolved(self, config: ModelConfig) -> Recipe:
        """The recipe with context and targets decided for a model.

        Raises ExportError if the model has fewer positions than the context asked for, or gives
        embeddings and is to do something that such models do not.
        """
        longest = config.max_position_embeddings
        context = self.context or min(longest, 4096)
        if context > longest:
            raise ExportError(f"context {context} is longer than the model's {longest} positions")
        if not config.head:
            if others := [t for t in self.targets or () if t not in _BY_DEFAULT]:
                raise refuse(others[0], "the model gives embeddings, which it has no graph for")
            if self.needs_calibration:
                raise ExportError(
                    f"method {self.method!r} or fewer neurons need a model that generates text, "
                    "this one gives embeddings; use rtn, search or hqq without a text"
                )
            # All of them are float, and 4 bits turn an embedding too far.
            weights = "int8" if self.weights == "keep" else self.weights
            self = replace(self, weights=weights)
        covered = [t for t in _BY_DEFAULT if t != "native" or native.uncovered(config) is None]
        return replace(self, context=context, targets=self.targets or tuple(covered))

    @property
    def fit(self) -> Fit:
        """How the grid of a group is chosen."""
        return next((FITS[part] for part in self.method.split("+") if part in FITS), rtn.fit)

    @property
    def use_gptq(self) -> bool:
        return "gptq" in self.method.split("+")

    @property
    def use_awq(self) -> bool:
        return "awq" in self.method.split("+")

    @property
    def use_tune(self) -> bool:
        return "tune" in self.method.split("+")

    @property
    def needs_calibration(self) -> bool:
        parts = self.method.split("+")
        return not set(parts).isdisjoint(CALIBRATED) or self.neurons is not None

    def scheme(self, name: str, *, quantized: bool) -> Scheme:
        """How a matrix is stored; ``quantized``: the source holds it in blocks, which may be kept.

        ``keep`` is the answer only for such a matrix.
        """
        top = name in (EMBEDDING, HEAD)
        scheme = self.overrides.get(name, self.head if top else self.weights)
        if scheme == "keep" and not quantized:
            return "int8" if top else "int4"
        return scheme

    def spec(self, name: str, *, quantized: bool) -> Spec | None:
        """What a matrix is rounded to; None where it is kept or stays float."""
        scheme = self.scheme(name, quantized=quantized)
        if not scheme.startswith("int"):
            return None
        bits, grid = int(scheme[3:]), self.grid
        if grid == "min8" and bits == 8:
            grid = "sym"
        plain = "executorch" in (self.targets or ())
        return Spec(bits, self.group_size, grid, plain_scales=plain)

    def apply(self, name: str, weight: Weight) -> Weight:
        """The weight as this recipe stores it without calibration; vectors stay as they are."""
        quantized = isinstance(weight, QuantTensor)
        if len(weight.shape) != 2 or self.scheme(name, quantized=quantized) == "keep":
            return weight
        if not is_rounded(name):
            return floats(weight)
        array = floats(weight)
        spec = self.spec(name, quantized=quantized)
        return array if spec is None else round_to_grid(torch.from_numpy(array), spec, self.fit)

    def to_dict(self) -> dict[str, Any]:
        lists = {"targets": None if self.targets is None else list(self.targets)}
        return asdict(self) | lists | {"overrides": dict(self.overrides)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of :meth:`to_dict`; ExportError for a field that is unknown or wrong."""
        try:
            recipe: Recipe = schema.build(cls, dict(data))
        except ValueError as error:
            raise ExportError(f"the recipe's {error}") from None
        return recipe

    def to_toml(self) -> str:
        """One line a field that is set, the overrides as a table."""
        data = {name: value for name, value in self.to_dict().items() if value is not None}
        overrides = data.pop("overrides")
        lines = [f"{name} = {_toml(value)}" for name, value in data.items()]
        if overrides:
            lines += ["", "[overrides]"]
            lines += [f'"{name}" = {_toml(scheme)}' for name, scheme in overrides.items()]
        return "\n".join(lines) + "\n"


def read_recipe(path: Path) -> Recipe:
    """A recipe.toml; ExportError where it cannot be read or is not one."""
    try:
        return Recipe.from_dict(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(
            f"cannot read {path} as a recipe: {' '.join(str(error).split())}"
        ) from None


def _toml(value: Any) -> str:
    """Strings, whole numbers and lists of them: what JSON and TOML write alike."""
    return json.dumps(value)
