"""llama-bench's output, as one of its versions wrote it, stands beside our rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pocketslm.errors import UsageError
from pocketslm.profiling.llama_bench import read_rows
from pocketslm.profiling.records import append_records
from pocketslm.profiling.tables import format_rows

# The fields of llama.cpp's README for llama-bench, figures changed.
ROW = {
    "build_commit": "8cf427ff",
    "build_number": 5163,
    "cpu_info": "AMD EPYC",
    "gpu_info": "",
    "backends": "CPU",
    "model_filename": "models/smol.Q4_0.gguf",
    "model_type": "llama 135M Q4_0",
    "model_size": 91_700_000,
    "model_n_params": 134_515_008,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_threads": 2,
    "type_k": "f16",
    "n_prompt": 512,
    "n_gen": 0,
    "n_depth": 0,
    "test_time": "2025-04-24T11:57:09Z",
    "avg_ns": 640_000_000,
    "stddev_ns": 1,
    "avg_ts": 800.0,
    "stddev_ts": 1.0,
    "samples_ns": [640_000_000, 640_000_000],
    "samples_ts": [800.0, 800.0],
}


@pytest.mark.parametrize("style", ["json", "jsonl"])
def test_rows_are_read(tmp_path: Path, style: str) -> None:
    rows = [ROW, ROW | {"n_prompt": 0, "n_gen": 128}]
    path = tmp_path / "bench"
    path.write_text(json.dumps(rows) if style == "json" else "\n".join(map(json.dumps, rows)))
    prompt, generation = read_rows(path)
    assert (prompt.test, generation.test) == ("pp512", "tg128")
    assert prompt.tokens_per_second == (800, 800)
    assert prompt.run == generation.run
    assert "800.00 (800.00 .. 800.00)" in format_rows([prompt, generation])


def test_our_own_records_come_by_the_same_door(tmp_path: Path, make_row: Any) -> None:
    append_records(tmp_path / "own", [make_row()])
    assert read_rows(tmp_path / "own") == [make_row()]


def test_what_records_cannot_hold(tmp_path: Path) -> None:
    (tmp_path / "bench").write_text(json.dumps(ROW | {"n_depth": 512}))
    with pytest.raises(UsageError, match="a row of llama-bench that records cannot hold"):
        read_rows(tmp_path / "bench")
    (tmp_path / "other").write_text("{}")
    with pytest.raises(UsageError, match="line 1"):
        read_rows(tmp_path / "other")
