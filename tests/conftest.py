"""Fixtures: real weights and text from the catalog, and a tiny model exported for real."""

from __future__ import annotations

import bz2
import re
from pathlib import Path

import pytest

import support
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.recipe import Recipe
from pocketslm.models.catalog import fetch
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.models.gguf_reader import GGUFFile
from pocketslm.models.tokenizer_files import tokenizer_files_from_gguf

# The files that take longest, so that no process is left alone with one at the end. The first need
# no program that bootstrap.py may still be compiling: those under sanitizers and for Arm come late.
LONGEST = (
    *("test_gemma_real", "test_tokenizer_families", "test_export", "test_app", "test_checkpoints"),
    *("test_executorch", "test_packaging", "test_kernels", "test_runner_tokenizer"),
    *("test_families_compress", "test_tokenizer", "test_architectures", "test_fuzz"),
    # While the first of those for Arm waits for its program, the other process has these to do.
    *("test_programs", "test_sanitizers", "test_kill", "test_real_model"),
    *("test_device_bench", "test_instructions"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"{name}.py": at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as shipped: Q4_1 with a Q8_0 embedding."""
    return fetch("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with SmolLM2's tokenizer files."""
    folder = tmp_path_factory.mktemp("smollm2-tokenizer")
    for name, content in tokenizer_files_from_gguf(GGUFFile(smollm2_gguf).metadata).items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def lee_text() -> Path:
    return fetch("lee")


@pytest.fixture(scope="session")
def lee_lines(lee_text: Path) -> list[str]:
    """10,000 lines of real text: the news articles, then Wikipedia with its markup."""
    lines = lee_text.read_text(encoding="utf-8").splitlines()
    dump = bz2.decompress(fetch("wiki").read_bytes()).decode("utf-8")
    lines += [line for line in dump.splitlines() if re.search(r"\w", line)]
    assert len(lines) >= 10_000
    return lines[:10_000]


@pytest.fixture(scope="session")
def smollm2_bundle(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model with its blocks carried exactly."""
    out = tmp_path_factory.mktemp("real") / "smollm2"
    export_bundle(open_checkpoint(smollm2_gguf), out)
    return out


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.write_hf(tmp_path_factory.mktemp("tiny") / "hf")


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with float weights: as exact as the backend is."""
    out = tmp_path_factory.mktemp("tiny") / "bundle"
    export_bundle(open_checkpoint(tiny_hf), out, Recipe(weights="float", head="float"))
    return out
