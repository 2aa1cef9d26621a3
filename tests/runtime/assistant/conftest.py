"""A library in memory or a file, and a small document of several passages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pocketslm.runtime.assistant.document import Block, Document, make_source
from pocketslm.runtime.assistant.library import Library


@pytest.fixture
def library() -> Iterator[Library]:
    with Library(":memory:") as library:
        yield library


@pytest.fixture(scope="session")
def articles(lee_text: Path) -> list[str]:
    return lee_text.read_text("utf-8").splitlines()


@pytest.fixture
def news(library: Library, articles: list[str]) -> Document:
    """300 news articles as one document."""
    return library.add(make_source("news", "txt", map(Block, articles)))
