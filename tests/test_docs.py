"""The site says what the code says: names, numbers and links are held to their source."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pocketslm.export.evaluate import Quality
from pocketslm.models.config import ModelConfig, Pooling
from pocketslm.profiling import machine, records
from pocketslm.runtime.bundle import USED, FileEntry, Graph, Manifest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
THEIRS = ("docs/ContribOperators.md", "docs/gguf.md")  # of other projects
MADE = ("docs/reference/cli.md", "docs/changes.md")  # by docs/hooks.py


def page(name: str) -> str:
    return (DOCS / "reference" / name).read_text(encoding="utf-8")


def source(name: str) -> str:
    return (ROOT / "runtime" / "ops" / name).read_text(encoding="utf-8")


def names(*types: Any) -> list[str]:
    return [field.name for one in types for field in fields(one)]


def require(text: str, wanted: list[str]) -> None:
    """Each name stands in the page as code."""
    assert len(wanted) > 2
    assert not [name for name in wanted if f"`{name}`" not in text]


def test_the_page_of_the_bundle() -> None:
    shown = [*USED, *names(Manifest, Graph, FileEntry, Quality, ModelConfig, Pooling)]
    require(page("bundle.md"), [*shown, "size_bytes"])


def test_the_page_of_records() -> None:
    types = (records.Measurement, records.Energy, records.TracePoint)
    require(page("records.md"), names(*types, machine.Machine, machine.Cluster, machine.Limits))


def test_the_page_of_the_runner() -> None:
    code, text = source("runner/protocol.cpp"), page("runner.md")
    known = re.search(r"known: (.*?)\";", code, re.DOTALL)
    assert known is not None
    operations = re.findall(r"\w+", known[1])
    assert [op for op in operations if f"\n### {op}\n" not in text] == []
    assert set(re.findall(r"^### (\w+)$", text, re.MULTILINE)) == set(operations)
    require(text, re.findall(r"request\.(?:text|number|count|flag|list|value)\(\"(\w+)\"", code))
    require(text, re.findall(r"emit\(\"(\w+)\"", code))
    require(text, re.findall(r"\\\"(\w+)\\\":", code.replace('\\"event\\"', "")))
    reasons = re.search(r"kReasons\[\] = \{([^}]*)\}", source("runner/engine.cpp"))
    assert reasons
    require(text, [*re.findall(r"\w+", reasons[1]), "cancelled"])


def test_the_page_of_the_c_interface() -> None:
    statuses = re.findall(r"(PSLM_(?:OK|ERROR_\w+)) = (\d+)", source("pocketslm.h"))
    assert len(statuses) > 8
    for name, number in statuses:
        assert f"| {number} | `{name}` |" in page("c-interface.md")


def test_the_page_of_model_slm() -> None:
    text = page("model-file.md")
    for kind, name, number in re.findall(r"^ID\((\w+), (\w+), (\d+)\)", source("ids.def"), re.M):
        assert f"`{name}`" in text, name
        if kind in ("ROLE", "CODE"):
            assert f"| {number} | `{name}`" in text, name
    header = re.search(r"struct FileHeader \{(.*?)\n\}", source("model_file.h"), re.DOTALL)
    assert header is not None
    declared = re.sub(r"//.*|\[\d+\]", "", header[1])
    require(text, re.findall(r"(\w+)[,;]", declared))


def test_references_to_pages() -> None:
    """Every mention of docs/... in code and texts is of a file, and of an anchor in it."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    found = 0
    for name in listed.stdout.splitlines():
        if not name.endswith((".py", ".md", ".h", ".cpp", ".toml", ".spec", ".yml")):
            continue
        text = (ROOT / name).read_text(encoding="utf-8")
        for path, anchor in re.findall(r"(?<![\w/])(docs/[\w/.-]+\.\w+)#?([\w-]*)", text):
            if path in (*THEIRS, *MADE):
                continue
            found += 1
            target = ROOT / path
            assert target.exists(), f"{name} refers to {path}"
            assert not anchor or anchor in anchors(target), f"{name} refers to {path}#{anchor}"
    assert found > 10


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    pytest.importorskip("mkdocs", reason="the site is built with the docs extra")
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_page_that_loads_something_from_another_host(hooks: ModuleType) -> None:
    loads = hooks.Loads()
    loads.feed('<a href="https://a.org">x</a> <img src="b.png"> <link href="c.css">')
    assert loads.outside == []
    loads.feed(
        '<script src="//a.org/x.js"></script> <link rel="stylesheet" href="https://b.org/c">'
    )
    assert loads.outside == ["//a.org/x.js", "https://b.org/c"]


def test_markdown_that_was_not_understood(hooks: ModuleType) -> None:
    assert hooks._SWALLOWED.search("<p>these:\n- one\n- two</p>")
    assert not hooks._SWALLOWED.search("<p>a - b\nand c</p>\n<ul>\n<li>- d</li></ul>")


def test_every_command_is_in_the_reference(hooks: ModuleType) -> None:
    text = hooks.command_line()
    for command in ("fetch", "export", "doc ask", "device list", "serve"):
        assert f"\n## pocketslm {command}\n" in f"\n{text}"
    assert "| `-t THREADS, --threads THREADS` |" in text
