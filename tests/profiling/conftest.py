"""A measurement to vary."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fuzz import seeds

from pocketslm.profiling.records import Measurement

MakeRow = Callable[..., Measurement]


@pytest.fixture
def make_row() -> MakeRow:
    """A row to change fields of."""
    return seeds.make_row
