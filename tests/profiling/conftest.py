"""A measurement to vary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pocketslm.profiling.machine import Machine
from pocketslm.profiling.records import Measurement

MakeRow = Callable[..., Measurement]


@pytest.fixture
def make_row() -> MakeRow:
    """A pp512 row of two repetitions at 1000 and 500 tokens/s, with fields changed."""

    def make(**changes: Any) -> Measurement:
        fields: dict[str, Any] = {
            "run": "r1",
            "started": "2030-01-02T03:04:05+00:00",
            "pocketslm": "0.1.0",
            "machine": Machine("Some CPU", 2, "x86_64", 8 << 30, "Linux-6"),
            "software": {"python": "3.11.7"},
            "model": "Tiny",
            "artefact": "tiny",
            "artefact_sha256": "ab" * 32,
            "size_bytes": 98_400_000,
            "runtime": "pocketslm",
            "runtime_version": "0.1.0",
            "backend": "onnxruntime 1.0",
            "threads": 2,
            "n_prompt": 512,
            "n_gen": 0,
            "n_depth": 0,
            "context": 512,
            "samples_ns": (512_000_000, 1_024_000_000),
            "step_ns": (),
            "load_ns": 120_400_000,
            "base_rss_bytes": 60_000_000,
            "peak_rss_bytes": 205_600_000,
            "rss_anon_bytes": 100_000_000,
            "rss_file_bytes": 90_000_000,
            "quality": {"perplexity": 29.07},
        }
        return Measurement(**(fields | changes))

    return make
