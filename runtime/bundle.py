"""The bundle: the one contract between export and everything else, read and checked.

A bundle is a folder with ``pocketslm.json`` (this schema), graphs and tokenizer files under the
ecosystem's own names. A folder that onnxruntime-genai's builder made opens through the same door.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pocketslm import schema
from pocketslm.errors import BundleError, CheckpointError
from pocketslm.models.config import ModelConfig
from pocketslm.runtime.adapters import PREFIX, SUFFIX

MANIFEST = "pocketslm.json"
GENAI_CONFIG = "genai_config.json"
SCHEMA = 1
# Files that a reader uses if the bundle has them.
USED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "generation_config.json", GENAI_CONFIG),
)


@dataclass(frozen=True)
class Graph:
    """One runnable form of the model: which backend reads which file of the bundle."""

    backend: str
    file: str
    context: int
    kv_cache: str


@dataclass(frozen=True)
class FileEntry:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """``pocketslm.json``.

    - ``architecture``: the model's dimensions.
    - ``source``: name, format, licence and SHA-256 of the checkpoint.
    - ``recipe``: the options that make the same bundle again.
    - ``weights``: bytes by storage scheme.
    - ``quality``: what ``pocketslm eval`` measured, or None.
    """

    name: str
    architecture: dict[str, Any]
    source: dict[str, Any]
    recipe: dict[str, Any]
    graphs: list[Graph]
    files: dict[str, FileEntry]
    weights: dict[str, int]
    notes: list[str] = field(default_factory=list)
    quality: dict[str, Any] | None = None
    pocketslm: str = ""
    schema: int = SCHEMA

    @property
    def size_bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"size_bytes": self.size_bytes}, indent=2) + "\n"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. A foreign folder or file has no manifest and no config.

    - ``head_dim``: the head size in a foreign folder's genai_config.json, else 0.
    - ``seen``: the identity that each file had when its SHA-256 was computed.
    """

    path: Path
    graphs: tuple[Graph, ...]
    manifest: Manifest | None = None
    config: ModelConfig | None = None
    head_dim: int = 0
    seen: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def require_unchanged(self) -> None:
        """Raise BundleError if a file was replaced after its SHA-256 was computed.

        What was opened by its name since then is not what was checked.
        """
        for name, was in self.seen.items():
            path = self.path / name
            if not path.exists() or _identity(path.stat()) != was:
                raise BundleError(
                    f"{path} was replaced or changed while it was opened; open the bundle again"
                )

    @property
    def name(self) -> str:
        return self.manifest.name if self.manifest else self.path.resolve().name

    @property
    def context(self) -> int:
        """The longest sequence that every graph of the bundle takes, in tokens."""
        return min(graph.context for graph in self.graphs)

    @property
    def adapters(self) -> dict[str, Path]:
        """LoRA adapters that lie beside the weights, by name."""
        files = self.manifest.files if self.manifest else ()
        return {
            name.removeprefix(PREFIX).removesuffix(SUFFIX): self.path / name
            for name in files
            if name.startswith(PREFIX) and name.endswith(SUFFIX)
        }

    @property
    def generates(self) -> bool:
        """Whether the model generates text. Otherwise it computes embeddings."""
        return self.config is None or self.config.head

    @property
    def layer_runs(self) -> int:
        """How many times in a row each stored layer runs."""
        return self.config.repeats if self.config is not None else 1

    def graph_bytes(self, graph: Graph) -> int:
        """Size of a graph with its external data (``model.onnx`` and ``model.onnx.data``)."""
        files = set(self.path.glob(f"{graph.file}*"))
        if graph.backend == "onnx-pocketslm":
            files.add(self.path / "model.slm")
        return sum(path.stat().st_size for path in files)

    def graph(self, backend: str = "auto") -> Graph:
        """The graph for a backend, by default the first. Raises BundleError if there is none."""
        for graph in self.graphs:
            if backend in ("auto", graph.backend):
                return graph
        have = ", ".join(graph.backend for graph in self.graphs)
        raise BundleError(
            f"{self.path} has no graph for backend {backend!r}, it has: {have}; "
            f"export one with --target {backend}"
        )


def open_bundle(path: str | Path, *, verify: bool = True) -> Bundle:
    """Open and check a bundle folder, or a folder made by onnxruntime-genai's builder.

    A ``.pte`` file with its tokenizer beside it, such as ExecuTorch's export_llm makes, opens too.
    ``verify`` also compares every file with its SHA-256 (about 0.1 s for 100 MB). Raises
    BundleError for what is missing, altered, unknown or outside the folder, and for a file that
    would be used and is not listed.
    """
    path = Path(path)
    if path.suffix == ".pte" and path.is_file():
        return Bundle(path.parent, (_bare_graph(path),))
    if not path.is_dir():
        hint = "export it first with `pocketslm export`" if path.suffix == ".gguf" else "no folder"
        raise BundleError(f"{path} is not a bundle folder ({hint})")
    if (path / MANIFEST).exists():
        manifest = read_manifest(path)
        seen = _check_files(path, manifest, verify)
        try:
            config = ModelConfig.from_dict(manifest.architecture)
        except CheckpointError as error:
            raise BundleError(f"{path / MANIFEST}: {error}") from None
        return Bundle(path, tuple(manifest.graphs), manifest, config, seen=seen)
    if (path / GENAI_CONFIG).exists():
        graph, head_dim = _genai_graph(path)
        return Bundle(path, (graph,), head_dim=head_dim)
    raise BundleError(f"{path} has neither {MANIFEST} nor {GENAI_CONFIG}; it is not a bundle")


def read_manifest(folder: Path) -> Manifest:
    """Parse ``pocketslm.json`` strictly; BundleError for anything unexpected."""
    where = folder / MANIFEST
    data = _read_object(where)
    if data.get("schema") != SCHEMA:
        raise BundleError(
            f"{where} has schema {data.get('schema')!r}, this pocketslm reads {SCHEMA}; "
            "export again or use the version that wrote it"
        )
    data.pop("size_bytes", None)
    try:
        manifest: Manifest = schema.build(Manifest, data)
    except ValueError as error:
        raise BundleError(f"{where} does not follow the schema: {error}") from None
    for name in [*manifest.files, *(graph.file for graph in manifest.graphs)]:
        _check_name(where, name)
    for graph in manifest.graphs:
        if graph.file not in manifest.files:
            raise BundleError(f"{where}: graph file {graph.file!r} is not among its files")
        if graph.context < 1:
            raise BundleError(f"{where}: context {graph.context!r}, expected a positive integer")
    if not manifest.graphs:
        raise BundleError(f"{where} lists no graphs")
    return manifest


def file_entry(path: Path) -> FileEntry:
    import hashlib  # with OpenSSL's library, which takes 3 MB

    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return FileEntry(digest.hexdigest(), path.stat().st_size)


def _check_name(where: Path, name: Any) -> None:
    """Refuse all but plain relative names: no manifest may point outside its folder."""
    pure = PurePosixPath(name) if isinstance(name, str) else None
    if (
        pure is None
        or pure.is_absolute()
        or "\\" in name
        or set(pure.parts) & {"..", ""}
        or not name
    ):
        raise BundleError(f"{where}: {name!r} points outside the bundle or is not a file name")


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _check_files(folder: Path, manifest: Manifest, verify: bool) -> dict[str, tuple[int, ...]]:
    """Check every listed file. Returns the identity of each file that was verified."""
    root, seen = folder.resolve(), {}
    graphs = tuple(graph.file for graph in manifest.graphs)
    for path in sorted(folder.iterdir()):  # a graph's data file begins with the graph's name
        if path.name not in manifest.files and path.name.startswith((*USED, *graphs)):
            raise BundleError(
                f"{path} is used, but the manifest does not list it; remove it or export again"
            )
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file() or not path.resolve().is_relative_to(root):
            raise BundleError(f"{path} is missing from the bundle; export or copy it again")
        if path.stat().st_size != entry.bytes:
            raise BundleError(
                f"{path} has {path.stat().st_size} bytes, the manifest says {entry.bytes}; "
                "it was cut short or altered: export or copy it again"
            )
        if verify:
            seen[name] = _identity(path.stat())
            if file_entry(path).sha256 != entry.sha256:
                raise BundleError(f"{path} does not match its SHA-256; export or copy it again")
    return seen


def _genai_graph(folder: Path) -> tuple[Graph, int]:
    """The decoder of a folder made for onnxruntime-genai, and its head size."""
    where = folder / GENAI_CONFIG
    try:
        model = _read_object(where)["model"]
        file, context = model["decoder"]["filename"], int(model["context_length"])
        head_dim = int(model["decoder"]["head_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{where} is not a decoder's genai_config.json: {error}") from None
    _check_name(where, file)
    if not (folder / file).is_file():
        raise BundleError(f"{folder / file} is missing")
    return Graph("onnx", file, context, "as the graph says"), head_dim


def _bare_graph(path: Path) -> Graph:
    """The one graph of a .pte file, which only ExecuTorch itself can read."""
    try:
        from pocketslm.runtime.backends.executorch import bare_graph
    except ImportError as error:
        raise BundleError(
            f"reading {path} needs ExecuTorch ({error}); "
            "install it with `pip install pocketslm[executorch]`"
        ) from None
    return bare_graph(path)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        data = schema.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise BundleError(f"{path} is not a JSON object")
    return data
