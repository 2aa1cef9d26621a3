"""The models on this device: import of bundles, and what each needs before it is loaded."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from pocketslm.android.engine.meter import free_bytes, read_bandwidth
from pocketslm.errors import BundleError
from pocketslm.folders import aside, put
from pocketslm.models.config import PREFILL_BATCH, ModelConfig
from pocketslm.runtime.assistant.readers.archive import DAMAGE
from pocketslm.runtime.bundle import MANIFEST, Bundle, Graph, open_bundle, read_manifest
from pocketslm.runtime.cores import CHOICES, MOST_BYTES

# Beside weights and cache: code, buffers, the tokenizer, a document.
OVERHEAD_BYTES = 60 << 20
# Up to this part of the free memory a model fits; up to all of it, it is tight.
COMFORTABLE = 0.6
MAX_BUNDLE_BYTES = 16 << 30
MAX_FILES = 64


@dataclass(frozen=True)
class ModelCard:
    """What a person wants to know of a model before it is loaded; sizes in bytes."""

    path: Path
    name: str
    size_bytes: int
    weights_bytes: int
    kv_bytes: int
    context: int
    top1: float | None  # agreement with the source, 0 to 1

    @property
    def need_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + OVERHEAD_BYTES

    def fit(self, free: int | None = None) -> Literal["fits", "tight", "too_large"]:
        """Whether it fits the memory that is free now."""
        free = free_bytes() if free is None else free
        if self.need_bytes > free:
            return "too_large"
        return "fits" if self.need_bytes <= COMFORTABLE * free else "tight"

    def bound_tps(self, bytes_per_second: float) -> float:
        """No engine writes faster: each token reads all the weights once."""
        return bytes_per_second / max(1, self.weights_bytes)


class Models:
    """A folder of bundles."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._bandwidth = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        with aside(folder, "."):  # what an import that was killed has left goes
            pass

    @property
    def bandwidth(self) -> float:
        """Bytes per second, measured once."""
        self._bandwidth = self._bandwidth or read_bandwidth()
        return self._bandwidth

    def list(self) -> list[ModelCard]:
        """Every model that is whole, by name."""
        cards = []
        for path in sorted(self.folder.iterdir()):
            if path.name.startswith("."):  # of an import under way
                continue
            try:
                cards.append(describe(open_bundle(path, verify=False)))
            except BundleError:
                continue
        return cards

    def path(self, name: str) -> Path:
        return self.folder / name

    def embeds(self, name: str) -> bool:
        """Whether a model gives embeddings, and so finds by meaning instead of speaking."""
        config = open_bundle(self.path(name), verify=False).config
        return config is not None and config.pooling is not None

    def remove(self, name: str) -> None:
        shutil.rmtree(self.folder / _plain(name), ignore_errors=True)

    def import_bundle(self, source: Path) -> Iterator[str]:
        """Copy a bundle folder, or unpack a zip of one; the last thing yielded is its name.

        It is written aside, checked against its SHA-256s, then renamed. Raises BundleError for
        what is no bundle, is altered, or would write outside its folder or more than it says.
        """
        try:
            with aside(self.folder, ".") as folder:
                copy = folder / "bundle"
                if source.is_dir():
                    manifest = open_bundle(source, verify=False).manifest
                    names = [MANIFEST, *manifest.files] if manifest else None
                    if names is None:
                        raise BundleError(f"{source} has no {MANIFEST}; import a pocketslm bundle")
                    for name in names:
                        (copy / name).parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(source / name, copy / name)
                        yield name
                    if (source / CHOICES).is_file():
                        shutil.copyfile(source / CHOICES, copy / CHOICES)
                else:
                    yield from _unpack(source, copy)
                name = _plain(open_bundle(copy, verify=True).name)
                put(copy, self.folder / name, replace=True)
        except OSError as error:
            reason = error.strerror or error
            raise BundleError(f"{source.name} cannot be imported: {reason}") from None
        yield name


def describe(bundle: Bundle) -> ModelCard:
    """The card of a bundle, from its manifest and the sizes of its files."""
    manifest = bundle.manifest
    graph = bundle.graphs[0]
    quality = (manifest.quality or {}) if manifest else {}
    return ModelCard(
        path=bundle.path,
        name=bundle.path.name,
        size_bytes=manifest.size_bytes if manifest else bundle.graph_bytes(graph),
        weights_bytes=bundle.graph_bytes(graph),
        kv_bytes=_state_bytes(graph, bundle.config),
        context=graph.context,
        top1=quality.get("top1_agreement", quality.get("top1")),
    )


# Of a number in the cache, by the graph's word for it; of int8 also a float scale for each head.
_KV_BYTES = {"int8": 1, "fp16": 2, "fp32": 4}
_SCALE_BYTES = 4


def _state_bytes(graph: Graph, config: ModelConfig | None) -> int:
    """What the states of a full context take, as the graph keeps them."""
    if config is None:
        return 0
    return config.state_bytes(
        graph.context,
        _KV_BYTES.get(graph.kv_cache, max(_KV_BYTES.values())),
        scale_bytes=_SCALE_BYTES if graph.kv_cache == "int8" else 0,
        batch=PREFILL_BATCH if graph.backend == "native" else 0,  # the others use no windows
    )


def _plain(name: str) -> str:
    """A name for a folder: nothing in it leads elsewhere."""
    kept = "".join(c if c.isalnum() or c in "-_. " else "_" for c in name).strip(". ")
    return kept or "model"


def _unpack(source: Path, copy: Path) -> Iterator[str]:
    """The files that the zip's manifest lists, each exactly as large as it says."""
    try:
        with zipfile.ZipFile(source) as archive:
            entries = {entry.filename: entry for entry in archive.infolist() if not entry.is_dir()}
            found = [name for name in entries if PurePosixPath(name).name == MANIFEST]
            if len(found) != 1 or len(entries) > MAX_FILES:
                raise BundleError(f"{source.name} holds no single bundle ({MANIFEST})")
            root = found[0][: -len(MANIFEST)]
            if entries[found[0]].file_size > 1 << 20:
                raise BundleError(f"{source.name}: its {MANIFEST} is too large")
            copy.mkdir(parents=True)
            (copy / MANIFEST).write_bytes(archive.read(found[0]))
            manifest = read_manifest(copy)  # its names stay inside the folder
            if not 0 < manifest.size_bytes <= MAX_BUNDLE_BYTES:
                raise BundleError(f"{source.name} says it unpacks to {manifest.size_bytes} bytes")
            for name, expected in manifest.files.items():
                entry = entries.get(root + name)
                if entry is None or entry.file_size != expected.bytes:
                    raise BundleError(f"{source.name}: {name} is missing or of another size")
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as packed, (copy / name).open("wb") as file:
                    # A zip may lie about sizes: never more than was promised.
                    left = expected.bytes
                    while left and (block := packed.read(min(left, 1 << 20))):
                        file.write(block)
                        left -= len(block)
                yield name
            entry = entries.get(root + CHOICES)
            if entry is not None and entry.file_size <= MOST_BYTES:
                (copy / CHOICES).write_bytes(archive.read(entry))
    except (*DAMAGE, RuntimeError) as error:
        raise BundleError(f"{source.name} is not a zip that can be read: {error}") from None
