"""A checkpoint behind one door: a Hugging Face folder or a GGUF file."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pocketslm.errors import CheckpointError
from pocketslm.models import architectures
from pocketslm.models.config import ModelConfig, config_from_gguf, config_from_hf
from pocketslm.models.tensors import Weight
from pocketslm.models.tokenizer_files import tokenizer_notes

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ORIGIN_FILE = "origin.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "config.json",  # for the ids of its special tokens
)


class Checkpoint(Protocol):
    """What export needs of a checkpoint; weights are read one by one, on demand.

    ``notes`` says in words what reading changed (such as K-quants that were dequantized);
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
    """Open a ``.gguf`` file or a Hugging Face folder; raises CheckpointError."""
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
    return GGUFCheckpoint(path)


def checkpoint_sha256(checkpoint: Checkpoint) -> str:
    """SHA-256 over the weight files, in name order."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.files()):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def read_weight(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Weight:
    """A weight whose shape is held against the architecture's; CheckpointError if they differ."""
    weight = checkpoint.weight(name)
    if tuple(weight.shape) != shape:
        raise CheckpointError(
            f"{checkpoint.path}: {name} has shape {tuple(weight.shape)}, expected {shape} from "
            "the config; is this the right config for these weights?"
        )
    return weight


class HFCheckpoint:
    """A folder with config.json and one or more .safetensors files."""

    format = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.resolve().name
        data = read_json(path / "config.json")
        model_type = data.get("model_type")
        if not isinstance(model_type, str):
            raise CheckpointError(f"{path}/config.json has no model_type")
        self.config = config_from_hf(data, architectures.canonical(model_type))
        origin = _read_origin(path)
        self.licence = _model_card_licence(path / "README.md") or origin["licence"]
        self.notes: list[str] = origin["notes"]
        self.made_from: list[str] = origin["made_from"]
        self.sparse: str | None = origin["sparse"]
        self._where = self._index()

    def _index(self) -> dict[str, Path]:
        """Tensor name to the file that holds it."""
        from safetensors import SafetensorError, safe_open

        index = self.path / "model.safetensors.index.json"
        if index.exists():
            names = set(read_json(index).get("weight_map", {}).values())
            if any(Path(name).name != name for name in names):
                raise CheckpointError(f"{index} names files outside its folder")
            files = [self.path / name for name in sorted(names)]
        else:
            files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{self.path} has no .safetensors files")
        where: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as tensors:
                    where.update(dict.fromkeys(tensors.keys(), file))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"cannot read {file}: {one_line(error)}") from None
        return where

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
        from safetensors import SafetensorError, safe_open

        if name == HEAD and self.config.tie_word_embeddings:
            name = EMBEDDING
        if name not in self._where:
            raise CheckpointError(f"{self.path} has no tensor {name!r}")
        try:
            with safe_open(self._where[name], framework="pt") as tensors:
                tensor = tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"cannot read {name!r} of {self._where[name]}: {one_line(error)}"
            ) from None
        array: np.ndarray[Any, Any] = tensor.float().numpy()
        return array

    def tokenizer_files(self) -> dict[str, bytes]:
        found = {name: self.path / name for name in _TOKENIZER_FILES}
        files = {name: path.read_bytes() for name, path in found.items() if path.exists()}
        if "tokenizer.json" not in files:
            raise CheckpointError(
                f"{self.path} has no tokenizer.json; save it with transformers' "
                "AutoTokenizer.save_pretrained"
            )
        return files


class GGUFCheckpoint:
    """One .gguf file; its metadata carries configuration, tokenizer and chat template."""

    format = "gguf"

    def __init__(self, path: Path) -> None:
        from pocketslm.models.gguf_reader import GGUFFile

        self.path = path
        self.file = GGUFFile(path)
        meta = self.file.metadata
        name = meta.get("general.architecture")
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: GGUF metadata has no general.architecture")
        self.name = path.stem
        self.made_from: list[str] = []
        self.sparse: str | None = None
        self.licence = meta.get("general.license")
        architecture = architectures.canonical(name)
        divisors = None
        if "rope_freqs.weight" in self.file.tensors:
            values = self.file.read("rope_freqs.weight")
            assert isinstance(values, np.ndarray)
            divisors = tuple(float(v) for v in values)
        self.config = config_from_gguf(meta, architecture, self.file.tensors, divisors)
        tensors = self.file.tensors.items()
        lossy = sorted({t.kind.name for n, t in tensors if not self.file.is_kept(n)})
        self.notes = (
            [f"{', '.join(lossy)} blocks were dequantized: no target holds them as they are"]
            if lossy
            else []
        ) + tokenizer_notes(meta)

    def files(self) -> list[Path]:
        return [self.path]

    def stored_bytes(self) -> dict[str, int]:
        sizes: Counter[str] = Counter()
        for info in self.file.tensors.values():
            sizes[info.kind.name] += info.nbytes
        return dict(sizes)

    def weight(self, name: str) -> Weight:
        if name == HEAD and self.config.tie_word_embeddings:
            name = EMBEDDING
        stored = gguf_name(name)
        if stored not in self.file.tensors:
            raise CheckpointError(f"{self.path} has no tensor {stored!r} ({name})")
        weight = self.file.read(stored)
        module = architectures.load(self.config.architecture)
        sanitized: Weight = module.sanitize_gguf(name, weight, self.config)
        return sanitized

    def tokenizer_files(self) -> dict[str, bytes]:
        from pocketslm.models.tokenizer_files import tokenizer_files_from_gguf

        files = tokenizer_files_from_gguf(self.file.metadata)
        return {k: v.encode() if isinstance(v, str) else v for k, v in files.items()}


_GGUF_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GGUF_TOP = {EMBEDDING: "token_embd.weight", HEAD: "output.weight"} | {
    "model.norm.weight": "output_norm.weight"
}


def gguf_name(name: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` -> ``blk.3.ffn_up.weight``."""
    if name in _GGUF_TOP:
        return _GGUF_TOP[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_GGUF_PARTS[part]}.{kind}"


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
