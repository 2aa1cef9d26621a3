"""The bundle reader: what it refuses, and that it says why in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pocketslm.errors import BackendError, BundleError, UsageError
from pocketslm.runtime.backends import open_session
from pocketslm.runtime.bundle import MANIFEST, open_bundle

Manifest = dict[str, Any]


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def rewrite(folder: Path, change: Callable[[Manifest], object]) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data))


def test_a_good_bundle_opens(copy: Path) -> None:
    bundle = open_bundle(copy)
    assert bundle.context == 256
    assert bundle.graph("onnx").file == "model.onnx"


def rename_file(to: str) -> Callable[[Manifest], object]:
    return lambda m: m["files"].__setitem__(to, m["files"].pop("model.onnx"))


CHANGES: dict[str, tuple[Callable[[Manifest], object], str]] = {
    "future schema": (lambda m: m.update(schema=2), "schema 2, this pocketslm reads 1"),
    "no schema": (lambda m: m.pop("schema"), "schema None"),
    "unknown field": (lambda m: m.update(surprise=1), "does not follow the schema"),
    "architecture of another type": (lambda m: m.update(architecture="x"), "architecture is 'x'"),
    "backend of another type": (lambda m: m["graphs"][0].update(backend=[]), "graphs.backend is"),
    "cache of another type": (lambda m: m["graphs"][0].update(kv_cache={}), "graphs.kv_cache is"),
    "fraction": (lambda m: m["graphs"][0].update(context=64.5), "graphs.context is 64.5"),
    "name of another type": (lambda m: m.update(name=3), "name is 3, expected a text"),
    "weights of another type": (lambda m: m.update(weights={"int4": "x"}), "weights.int4 is 'x'"),
    "notes of another type": (lambda m: m.update(notes=[3]), "notes is 3, expected a text"),
    "bytes of another type": (
        lambda m: m["files"]["model.onnx"].update(bytes=True),
        "files.model.onnx.bytes is True",
    ),
    "no number of bytes": (lambda m: m["files"]["model.onnx"].update(bytes=1e400), "no number"),
    "missing field": (lambda m: m.pop("architecture"), "does not follow the schema"),
    "no graphs": (lambda m: m.update(graphs=[]), "lists no graphs"),
    "graphs of another type": (lambda m: m.update(graphs=3), "does not follow the schema"),
    "graph outside": (lambda m: m["graphs"][0].update(file="../model.onnx"), "outside the bundle"),
    "file outside": (rename_file("../../etc/passwd"), "outside the bundle"),
    "absolute file": (rename_file("/etc/passwd"), "outside the bundle"),
    "backslash": (rename_file("..\\model.onnx"), "outside the bundle"),
    "graph not listed": (rename_file("other.onnx"), "not among its files"),
    "bad context": (lambda m: m["graphs"][0].update(context=-5), "context -5"),
    "no layers": (lambda m: m["architecture"].pop("stored_layers"), "architecture's description"),
    "a head of no size": (
        lambda m: m["architecture"]["stored_layers"][0]["attention"].update(head_dim=0),
        "head_dim is 0",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_manifests_that_are_refused(name: str, copy: Path) -> None:
    change, message = CHANGES[name]
    rewrite(copy, change)
    with pytest.raises(BundleError, match=message) as error:
        open_bundle(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "\0", "[" * 100_000])
def test_manifests_that_are_not_json_objects(text: str, copy: Path) -> None:
    (copy / MANIFEST).write_text(text)
    with pytest.raises(BundleError):
        open_bundle(copy)


@pytest.mark.parametrize("key", ["name", "sha256"])
def test_a_key_that_stands_twice_is_refused(key: str, copy: Path) -> None:
    text = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(text.replace(f'"{key}":', f'"{key}": "x", "{key}":', 1))
    with pytest.raises(BundleError, match=f"'{key}' stands twice"):
        open_bundle(copy)


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "generation_config.json", "tokenizer.json", "model.onnx.data"],
)
@pytest.mark.parametrize("linked", [False, True])
def test_what_is_used_is_listed(name: str, linked: bool, copy: Path, tmp_path: Path) -> None:
    """Else a file that nobody signed would be read; others beside the model are nobody's matter."""
    (copy / "README.txt").write_text("Mine.")
    open_bundle(copy)
    rewrite(copy, lambda m: m["files"].pop(name, None))
    (copy / name).unlink(missing_ok=True)
    outside = tmp_path / "outside"
    outside.write_text("{}")
    (copy / name).symlink_to(outside) if linked else (copy / name).write_text("{}")
    with pytest.raises(BundleError, match=f"{name} is used, but the manifest does not list it"):
        open_bundle(copy, verify=False)


def test_altered_files(copy: Path) -> None:
    data = copy / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    with pytest.raises(BundleError, match="does not match its SHA-256"):
        open_bundle(copy)
    open_bundle(copy, verify=False)  # sizes agree, and that was all that was asked
    data.write_bytes(content[:-1])
    with pytest.raises(BundleError, match="the manifest says"):
        open_bundle(copy, verify=False)
    data.unlink()
    with pytest.raises(BundleError, match="is missing"):
        open_bundle(copy)


def test_what_was_verified_is_what_is_opened(copy: Path) -> None:
    """Also where a file of the same bytes took another's place, which may have other ones later."""
    bundle = open_bundle(copy)
    open_session(bundle, "onnx")
    graph = copy / "model.onnx"
    other = shutil.copy(graph, copy / "other")
    Path(other).replace(graph)
    with pytest.raises(BundleError, match="replaced or changed while it was opened"):
        open_session(bundle, "onnx")
    open_session(open_bundle(copy), "onnx")
    open_session(open_bundle(copy, verify=False), "onnx")
    graph.unlink()
    with pytest.raises(BundleError, match="replaced or changed"):
        bundle.require_unchanged()


def test_a_link_that_leaves_the_bundle(copy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.move(copy / "tokenizer.json", outside)
    (copy / "tokenizer.json").symlink_to(outside)
    with pytest.raises(BundleError, match="is missing"):
        open_bundle(copy)


def test_what_is_no_bundle(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "model.gguf"):
        with pytest.raises(BundleError):
            open_bundle(path)
    (tmp_path / "genai_config.json").write_text('{"model": {}}')
    with pytest.raises(BundleError, match=r"genai_config\.json"):
        open_bundle(tmp_path)


def test_backends_that_are_not_there(copy: Path) -> None:
    bundle = open_bundle(copy)
    with pytest.raises(BackendError, match="'tpu' is unknown, expected one of: native, onnx"):
        open_session(bundle, "tpu")
    rewrite(copy, lambda m: m["graphs"][0].update(backend="executorch"))
    with pytest.raises(BundleError, match="it has: executorch, onnx"):
        open_session(open_bundle(copy), "native")
    # "auto" passes over what cannot run here.
    assert open_session(open_bundle(copy)).backend.startswith("onnxruntime")
    with pytest.raises(UsageError, match="context 999"):
        open_session(bundle, context=999)


@pytest.mark.parametrize(("backend", "file"), [("onnx", "model.onnx"), ("native", "model.slm")])
def test_a_damaged_graph_is_one_line(backend: str, file: str, copy: Path) -> None:
    (copy / file).write_bytes(b"not a graph")
    rewrite(copy, lambda m: m["files"][file].update(bytes=11))
    with pytest.raises((BackendError, BundleError), match=file) as error:
        open_session(open_bundle(copy, verify=False), backend)
    assert "\n" not in str(error.value)
