"""Tables: llama-bench's columns and figures, and forms that other programs read."""

from __future__ import annotations

import csv
import io
import json
import re
from typing import Any

import pytest

from pocketslm.errors import UsageError
from pocketslm.profiling.records import Measurement
from pocketslm.profiling.tables import answers, artefact_names, format_rows, ratios

ALONE = """\
| model |    size | backend                           | threads |  test |   t/s, median (min .. max) | peak RSS |   load |
| ----- | ------: | --------------------------------- | ------: | ----: | -------------------------: | -------: | -----: |
| tiny  | 98.4 MB | pocketslm 0.1.0 (onnxruntime 1.0) |       2 | pp512 | 750.00 (500.00 .. 1000.00) |   206 MB | 120 ms |
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


def test_the_ratio_of_one_that_was_cut_short(make_row: Any) -> None:
    """It has fewer repetitions; those that were taken right after each other count."""
    ours = make_row(samples_ns=(10, 10, 10))
    peer = make_row(samples_ns=(20, 40), runtime="llama.cpp")
    (ratio,) = ratios([ours, peer])
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((8 / 3, 2, 4))


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


def test_several_texts_at_once_beside_one(make_row: Any) -> None:
    generated = {"n_prompt": 0, "n_gen": 2, "samples_ns": (30_000_000,)}
    one = make_row(**generated, step_ns=(10_000_000, 20_000_000))
    several = make_row(**generated, step_ns=(10_000_000, 20_000_000), parallel=3)
    assert "x3" not in format_rows([one])
    *_, first, second = format_rows([one, several]).splitlines()
    assert [cell.strip() for cell in first.split("|")][4:-1] == [
        *("tg2", "66.7", "1.00", "15.0 ms", "19.9 ms")
    ]
    assert [cell.strip() for cell in second.split("|")][4:7] == ["tg2 x3", "200.0", "3.00"]


def test_one_slow_repetition_moves_no_table(make_row: Any) -> None:
    calm, hit = (make_row(samples_ns=(10, 10, 10, 10, last)) for last in (10, 1000))
    shown = [re.search(r"([\d.]+) \(", format_rows([row])) for row in (calm, hit)]
    assert shown[0] is not None
    assert shown[1] is not None
    assert shown[0][1] == shown[1][1]
    assert (
        "(" not in format_rows([make_row(samples_ns=(512_000_000,))]).splitlines()[2].split("|")[6]
    )


def test_artefacts_of_one_name_are_told_apart(make_row: Any) -> None:
    both = {"n_gen": 2, "samples_ns": (9, 9), "prefill_ns": (4, 4), "step_ns": (1, 1, 1, 1)}
    a, b, again = (make_row(artefact_sha256=digit * 64, **both) for digit in "ab" + "a")
    assert artefact_names([a, again]) == ["tiny", "tiny"]
    assert artefact_names([a, b, again]) == [
        "tiny (aaaaaaaa)",
        "tiny (bbbbbbbb)",
        "tiny (aaaaaaaa)",
    ]
    found = [setup[0] for setup, _ in answers([a, b, again])]
    assert found == ["tiny (aaaaaaaa)", "tiny (bbbbbbbb)"]
    sizes = [make_row(artefact_sha256=None, size_bytes=size) for size in (1, 2)]
    assert artefact_names(sizes) == ["tiny (1 bytes)", "tiny (2 bytes)"]


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


ANSWERED = """\
| model | backend                           | threads | what                 | prompt | answer |   TTFT | input, t/s | output, t/s |  total |
| ----- | --------------------------------- | ------: | -------------------- | -----: | -----: | -----: | ---------: | ----------: | -----: |
| tiny  | pocketslm 0.1.0 (onnxruntime 1.0) |       2 | random tokens        |    200 |      4 | 400 ms |      500.0 |        20.0 | 0.60 s |
| tiny  | pocketslm 0.1.0 (onnxruntime 1.0) |       2 | summarize, 2 prompts |    400 |      8 | 400 ms |      400.0 |        20.0 | 1.40 s |
"""  # noqa: E501


def test_prompts_with_answers_in_slimlm_s_layout(make_row: Any) -> None:
    """200 tokens in 0.4 or 0.6 s, then 4 in 0.2 s; the two prompts of a task count together."""

    def row(prefill_ms: int, workload: str = "random") -> Measurement:
        row: Measurement = make_row(
            n_prompt=200,
            n_gen=4,
            samples_ns=((prefill_ms + 200) * 10**6,),
            prefill_ns=(prefill_ms * 10**6,),
            step_ns=(50_000_000,) * 4,
            workload=workload,
        )
        return row

    rows = [make_row(), row(400), row(400, "summarize"), row(600, "summarize")]
    main, answered = format_rows(rows).split("\n\n")
    assert "summarize pp200+tg4" in main
    assert answered == ANSWERED


def test_operators_by_their_share(make_row: Any) -> None:
    row = make_row(operator_ns={"head": 150, "qkv": 840, "norm": 9, "copy": 1})
    _, operators = format_rows([row]).split("\n\n")
    assert "| qkv 84%, head 15%, others 1% |" in operators
