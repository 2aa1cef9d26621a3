"""LoRA adapters that a bundle carries beside its weights: ``adapter-NAME.safetensors``.

The tensors have PEFT's names; A is [rank, in], and B [out, rank] has PEFT's scale in it already.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from pocketslm import schema
from pocketslm.errors import BundleError
from pocketslm.runtime.arrays import np

if TYPE_CHECKING:
    import numpy.typing as npt

PREFIX, SUFFIX = "adapter-", ".safetensors"
# The largest fp16 number. No factor of a trained adapter comes near it.
LARGEST = 65504.0
_NAME = re.compile(
    r"base_model\.model\.model\.layers\.(\d{1,4})\.(?:self_attn|mlp)\.(\w+_proj)"
    r"\.lora_([AB])\.weight"
)


@dataclass(frozen=True, eq=False)
class Update:
    """Adds b [out, rank] @ a [rank, in] to one matrix of a layer: ``part``, such as q_proj."""

    layer: int
    part: str
    a: npt.NDArray[np.float32]
    b: npt.NDArray[np.float32]


def read_updates(path: Path, runs: int = 1) -> list[Update]:
    """Read an adapter's file. A layer that runs several times (``runs``) is updated each time.

    Raises BundleError if the file cannot be read or holds something else.
    """
    found: dict[tuple[int, str], dict[str, npt.NDArray[np.float32]]] = {}
    for name, array in _read(path).items():
        match = _NAME.fullmatch(name)
        if match is None or array.ndim != 2:
            raise BundleError(f"{path}: {name!r} is not a factor of a layer's matrix")
        if not (np.abs(array) <= LARGEST).all():  # NaN neither
            raise BundleError(f"{path}: {name!r} has numbers that are not within +-{LARGEST:g}")
        found.setdefault((int(match[1]), match[2]), {})[match[3]] = array
    for (layer, part), factors in found.items():
        if len(factors) != 2 or factors["A"].shape[0] != factors["B"].shape[1]:
            raise BundleError(f"{path}: the factors of {part} in layer {layer} do not fit together")
    return [
        Update(layer * runs + run, part, factors["A"], factors["B"])
        for (layer, part), factors in found.items()
        for run in range(runs)
    ]


def _read(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """The float32 tensors of a safetensors file: an 8-byte length, JSON, data."""
    arrays = {}
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size - 8:
                raise ValueError("it ends within its header")
            header = schema.loads(file.read(length))
            data = file.read()
        header.pop("__metadata__", None)
        for name, entry in header.items():
            shape, (begin, end) = entry["shape"], entry["data_offsets"]
            if entry["dtype"] != "F32" or not 0 <= begin <= end <= len(data):
                raise ValueError(f"{name} is not float32, or lies outside")
            if min(shape) < 1 or prod(shape) * 4 != end - begin:
                raise ValueError(f"{name} has shape {shape} and {end - begin} bytes")
            arrays[name] = np.frombuffer(data[begin:end], "<f4").reshape(shape)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BundleError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    return arrays
