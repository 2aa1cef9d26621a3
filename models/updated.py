"""A checkpoint with something added to its weights, such as a LoRA adapter that PEFT saved."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from pocketslm.errors import CheckpointError
from pocketslm.models import architectures
from pocketslm.models.checkpoint import EMBEDDING, HEAD, Checkpoint, one_line, read_json
from pocketslm.models.reference import parameter_shapes
from pocketslm.models.tensors import Array, Weight, floats

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MOST = 1e6  # of a rank or alpha that anyone has trained with
_FACTORS = (".lora_A.weight", ".lora_B.weight")
# Fields of PEFT's LoraConfig that make an adapter more than A and B, where they are set.
_MORE = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "layer_replication",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "alora_invocation_tokens",
)


class Updated(ABC):
    """``base`` with what ``file`` adds to its weights; weights without an update stay as they are.

    ``note`` says what was added.
    """

    def __init__(self, base: Checkpoint, file: Path, name: str, note: str) -> None:
        self.base, self.file = base, file
        self.path, self.format, self.config = base.path, base.format, base.config
        self.name = f"{base.name}+{name}"
        self.licence, self.made_from = base.licence, base.made_from
        self.sparse: str | None = None  # an update fills zeros in
        self.notes = [*base.notes, note]

    def files(self) -> list[Path]:
        return [*self.base.files(), self.file]

    def stored_bytes(self) -> dict[str, int]:
        return self.base.stored_bytes() | {"update": self.file.stat().st_size}

    def tokenizer_files(self) -> dict[str, bytes]:
        return self.base.tokenizer_files()

    def weight(self, name: str) -> Weight:
        if name == HEAD and self.config.tie_word_embeddings:
            name = EMBEDDING
        weight = self.base.weight(name)
        update = self.update(name, tuple(weight.shape))
        if update is None:
            return weight
        if update.shape != tuple(weight.shape):
            raise CheckpointError(
                f"{self.file}: {name} has shape {update.shape}, expected {tuple(weight.shape)}"
            )
        total: Array = floats(weight) + update
        return total

    @abstractmethod
    def update(self, name: str, shape: tuple[int, ...]) -> Array | None:
        """What is added to a weight of this shape; None: nothing."""


class WithAdapter(Updated):
    """``base`` with PEFT's LoRA adapter of a folder merged in: ``W + alpha / r * B A``.

    https://arxiv.org/abs/2106.09685; with ``use_rslora`` the factor is ``alpha / sqrt(r)``
    (https://arxiv.org/abs/2312.03732). Raises CheckpointError for any other kind of adapter, and
    where it does not fit the base.
    """

    def __init__(self, base: Checkpoint, folder: Path) -> None:
        note = f"the adapter {folder.resolve().name} was merged into {base.name}"
        super().__init__(base, folder / ADAPTER_WEIGHTS, folder.resolve().name, note)
        where = folder / ADAPTER_CONFIG
        data = read_json(where)
        more = [name for name in _MORE if data.get(name)]
        more += [
            name
            for name, plain in (("peft_type", "LORA"), ("bias", "none"))
            if data.get(name, plain) != plain
        ]
        # Other initial values (pissa, loftq) go with a base that was changed with them.
        more += ["init_lora_weights"] * (
            data.get("init_lora_weights", True) not in (True, False, "gaussian")
        )
        if more:
            raise CheckpointError(
                f"{where}: {more[0]} is {data[more[0]]!r}, expected a plain LoRA adapter; merge it "
                "with PEFT's merge_and_unload"
            )
        rank: Any = data.get("r")
        alpha: Any = data.get("lora_alpha")
        self.rank = rank
        for key, value, kind, least in (
            ("r", rank, int, 1),
            ("lora_alpha", alpha, int | float, -_MOST),
        ):
            number = isinstance(value, kind) and not isinstance(value, bool)
            if not (number and least <= value <= _MOST):
                raise CheckpointError(f"{where}: {key} is {value!r:.40}, expected a number")
        self.scale = alpha / (sqrt(rank) if data.get("use_rslora") else rank)
        self._map = architectures.by_name(self.config.architecture).hf
        self._names = self._matrices()
        self.notes += [
            f"{folder.resolve().name} has a {name} of its own, which is not used; if the adapter "
            "was trained with it, put it into the base's folder"
            for name in _own_files(base, folder)
        ]

    def _matrices(self) -> set[str]:
        """Our names of the matrices that have both factors, each of the right shape.

        A factor has the name that the family's own files give the matrix, which may be several of
        ours in one.
        """
        shapes: dict[str, list[int]] = {}
        with self._open() as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                shapes[name] = file.get_slice(name).get_shape()
        wanted: dict[str, dict[str, tuple[int, ...]]] = {}
        for ours, shape in parameter_shapes(self.config).items():
            if len(shape) == 2:
                wanted.setdefault(self._map.stored(ours), {})[ours] = shape
        found: set[str] = set()
        for name, given in shapes.items():
            suffix = next((suffix for suffix in _FACTORS if name.endswith(suffix)), None)
            stored = f"{name.removeprefix(_PREFIX).removesuffix(suffix or '')}.weight"
            if suffix is None or stored not in wanted or self._map.transposed:
                raise CheckpointError(
                    f"{self.file}: {name!r} is not a factor of one of {self.base.name}'s matrices"
                )
            parts = wanted[stored]
            rows, columns = sum(s[0] for s in parts.values()), next(iter(parts.values()))[1]
            expected = [self.rank, columns] if suffix == _FACTORS[0] else [rows, self.rank]
            if given != expected or any(_factor(stored, s) not in shapes for s in _FACTORS):
                raise CheckpointError(
                    f"{self.file}: {name!r} has shape {given}, expected {expected} and a factor "
                    "beside it"
                )
            found |= parts.keys()
        if not found:
            raise CheckpointError(f"{self.file} has no tensors")
        return found

    def _open(self) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {self.file}: {one_line(error)}") from None

    def factors(self) -> dict[str, Array]:
        """All A [r, in] and B [out, r] by PEFT's names; B times the scale."""
        found: dict[str, Array] = {}
        with self._open() as file:
            for name in sorted(self._names):
                a, b = self._pair(file, name)
                b *= np.float32(self.scale)
                found |= dict(zip((_factor(name, s) for s in _FACTORS), (a, b), strict=True))
        return found

    def _pair(self, file: Any, name: str) -> tuple[Array, Array]:
        """A and B of our matrix ``name``; B's rows are in our order."""
        stored = self._map.stored(name)
        a, b = (file.get_tensor(_factor(stored, s)).float().numpy() for s in _FACTORS)
        return a, floats(self._map.read(name, self.config, lambda _: b))

    def update(self, name: str, shape: tuple[int, ...]) -> Array | None:
        if name not in self._names:
            return None
        with self._open() as file:
            a, b = self._pair(file, name)
        product: Array = np.float32(self.scale) * (b @ a)
        return product


def _own_files(base: Checkpoint, folder: Path) -> list[str]:
    """Tokenizer files beside an adapter that say something else than the base's."""
    names = ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json")
    there = {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
    ours = base.tokenizer_files() if there else {}
    differ = []
    if "tokenizer.json" in there and _said(ours, names[0]) != _said(there, names[0]):
        differ.append("tokenizer.json")
    template = _template(there)
    if template is not None and template != _template(ours):
        differ.append("chat template")
    return differ


def _template(files: Mapping[str, bytes]) -> Any:
    config = _said(files, "tokenizer_config.json")
    in_config = config.get("chat_template") if isinstance(config, dict) else None
    return files["chat_template.jinja"].decode() if "chat_template.jinja" in files else in_config


def _said(files: Mapping[str, bytes], name: str) -> Any:
    """A JSON file's content; None where it is none."""
    try:
        return json.loads(files.get(name, b"null"))
    except (ValueError, RecursionError):
        return None


def _factor(matrix: str, suffix: str) -> str:
    return f"{_PREFIX}{matrix.removesuffix('.weight')}{suffix}"
