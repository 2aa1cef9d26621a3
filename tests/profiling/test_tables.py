"""Tables: llama-bench's columns and figures, and forms that other programs read."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest

from pocketslm.errors import UsageError
from pocketslm.profiling.records import Measurement
from pocketslm.profiling.tables import format_rows, ratios

ALONE = """\
| model |    size | backend                           | threads |  test |             t/s | peak RSS |   load |
| ----- | ------: | --------------------------------- | ------: | ----: | --------------: | -------: | -----: |
| tiny  | 98.4 MB | pocketslm 0.1.0 (onnxruntime 1.0) |       2 | pp512 | 750.00 ± 353.55 |   206 MB | 120 ms |
"""  # noqa: E501


def test_md_of_one_row(make_row: Any) -> None:
    assert format_rows([make_row()]) == ALONE


def test_md_ends_with_ratios(make_row: Any) -> None:
    ours = make_row(samples_ns=(10, 20, 40))
    peer = make_row(
        samples_ns=(20, 30, 20), runtime="llama.cpp", runtime_version="0.3", backend="ggml"
    )
    table, comparison = format_rows([ours, peer]).split("\n\n")
    assert len(table.splitlines()) == 4
    assert comparison == (
        "| ours against                 | threads |  test | ratio | min .. max of rounds |\n"
        "| ---------------------------- | ------: | ----: | ----: | -------------------: |\n"
        "| tiny on llama.cpp 0.3 (ggml) |       2 | pp512 |  1.00 |         0.50 .. 2.00 |\n"
    )


def test_ratio_is_above_one_when_ours_is_faster(make_row: Any) -> None:
    ours = make_row(samples_ns=(10, 10, 10))
    peer = make_row(samples_ns=(20, 40, 30), runtime="llama.cpp")
    (ratio,) = ratios([peer, ours])
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((3, 2, 4))


def test_only_like_is_compared(make_row: Any) -> None:
    ours = make_row()
    generated = {"n_prompt": 0, "n_gen": 1, "step_ns": (1, 1)}
    assert not ratios([ours])
    assert not ratios([ours, make_row(runtime="llama.cpp", threads=1)])
    assert not ratios([ours, make_row(runtime="llama.cpp", run="another")])
    assert not ratios([ours, make_row(runtime="llama.cpp", n_prompt=511)])
    deep = make_row(**generated, n_depth=512)
    assert not ratios([deep, make_row(**generated, runtime="llama.cpp")])
    assert len(ratios([ours, make_row(runtime="llama.cpp")])) == 1


def test_bars_in_names_do_not_break_the_table(make_row: Any) -> None:
    lines = format_rows([make_row(artefact="a|b")]).splitlines()
    assert r"a\|b" in lines[2]
    assert len({len(line) for line in lines}) == 1


def test_json_and_jsonl_read_back(make_row: Any) -> None:
    rows = [make_row(), make_row(threads=1)]
    assert [Measurement.from_dict(d) for d in json.loads(format_rows(rows, "json"))] == rows
    lines = format_rows(rows, "jsonl").splitlines()
    assert [Measurement.from_json(line) for line in lines] == rows


def test_csv_has_every_field_flat(make_row: Any) -> None:
    rows = [make_row(model='say "hi", twice'), make_row(threads=1)]
    first, second = csv.DictReader(io.StringIO(format_rows(rows, "csv")))
    assert first["model"] == 'say "hi", twice'
    assert first["cpu"] == "Some CPU"
    assert float(first["avg_ts"]) == pytest.approx(750)
    assert float(first["stddev_ts"]) == pytest.approx(353.5534)
    assert json.loads(first["samples_ns"]) == [512_000_000, 1_024_000_000]
    assert second["threads"] == "1"
    assert None not in first  # no more cells than columns


@pytest.mark.parametrize(("style", "text"), [("json", "[]\n"), ("jsonl", ""), ("csv", "")])
def test_no_rows(style: str, text: str) -> None:
    assert format_rows([], style) == text


def test_unknown_format(make_row: Any) -> None:
    with pytest.raises(UsageError, match="'xml' is unknown, expected one of: md, json, jsonl, csv"):
        format_rows([make_row()], "xml")
