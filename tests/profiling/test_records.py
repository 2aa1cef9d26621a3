"""Rows survive JSON, refuse what is not theirs, and summarise as llama-bench does."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketslm.errors import UsageError
from pocketslm.profiling.machine import Cluster, Limits, Machine
from pocketslm.profiling.records import (
    SCHEMA,
    Energy,
    Measurement,
    TracePoint,
    append_records,
    percentile,
    read_records,
)

PHONE = Machine(
    cpu="Cortex-X1",
    cores=8,
    arch="aarch64",
    ram_bytes=12 << 30,
    os="Android 14",
    kind="adb",
    product="Pixel 7 Pro",
    soc="GS201",
    clusters=(Cluster((6, 7), 1024, 2_850_000), Cluster((0, 1, 2, 3), 200)),
    governor="sched_pixel",
)


def test_json_round_trip(make_row: Any) -> None:
    for row in (
        make_row(),
        make_row(quality=None, rss_anon_bytes=None, rss_file_bytes=None),
        make_row(n_prompt=0, n_gen=2, n_depth=9, step_ns=(3, 4, 5, 6), samples_ns=(7, 11)),
        make_row(machine=PHONE, energy=Energy(1.5, "battery", "whole device"), throttled=True),
        make_row(trace=(TracePoint(0, {"cpu": 41.5}, (2_000_000, 1_800_000), 7), TracePoint(9))),
        make_row(limits=Limits(30e9, 330e9), operator_ns={"attention": 5}, pinning=(0, 1)),
    ):
        text = row.to_json()
        assert "\n" not in text
        assert Measurement.from_json(text) == row


def test_json_carries_samples_and_summary(make_row: Any) -> None:
    data = json.loads(make_row().to_json())
    assert data["schema"] == SCHEMA
    assert data["test"] == "pp512"
    assert data["samples_ns"] == [512_000_000, 1_024_000_000]
    assert data["machine"]["cpu"] == "Some CPU"
    assert data["summary"]["avg_ts"] == pytest.approx(750)


def machine_with(**changes: Any) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(PHONE))) | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 1}, "schema 1"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": True}, "threads is True, expected an integer"),
        ({"threads": 2.0}, "threads is 2.0"),
        ({"n_prompt": -1}, "n_prompt is -1"),
        ({"load_ns": "1"}, "load_ns is '1'"),
        ({"size_bytes": None}, "size_bytes is None"),
        ({"peak_rss_bytes": 0}, "peak_rss_bytes is 0"),
        ({"cold": 1}, "cold is 1"),
        ({"pinning": [-1]}, "pinning is -1"),
        ({"operator_ns": []}, "operator_ns is []"),
        ({"energy": {"joules": 1.0}}, "energy.source is missing"),
        ({"trace": [{"at_ns": 1, "khz": [], "rpm": 1}]}, "trace.rpm is unknown"),
        ({"backend": None}, "backend is None"),
        ({"samples_ns": []}, "samples_ns is empty"),
        ({"samples_ns": [0]}, "samples_ns is 0"),
        ({"samples_ns": [float("nan")]}, "samples_ns is nan"),
        ({"samples_ns": 5}, "samples_ns is 5, expected a list"),
        ({"n_gen": 1}, "prefill_ns has 0 values, expected 2"),
        ({"n_depth": 1}, "at most one of them"),
        ({"n_prompt": 0}, "both 0"),
        ({"step_ns": [1]}, "step_ns has 1 values"),
        ({"speed": 9}, "speed is unknown"),
        ({"machine": {"cpu": "x"}}, "machine.cores is missing"),
        ({"machine": None}, "machine is None, expected an object"),
        ({"size_bytes": 10**30}, "size_bytes is 1000"),
        ({"operator_ns": {"add": "9"}}, "operator_ns.add is '9', expected an integer"),
        ({"software": {"numpy": 2}}, "software.numpy is 2, expected a text"),
        ({"limits": {"bandwidth_bytes_s": "9", "int8_macs_s": 1}}, "limits.bandwidth_bytes_s is"),
        ({"trace": [{"at_ns": 1, "celsius": {"cpu": "hot"}}]}, "trace.celsius.cpu is 'hot'"),
        *[
            ({"machine": machine_with(**{name: value})}, f"machine.{name} is ")
            for name, value in (("cpu", {}), ("soc", 3), ("ram_bytes", "4"), ("product", {}))
        ],
        ({"machine": machine_with(clusters=[{"cpus": ["0"]}])}, "machine.clusters.cpus is '0'"),
    ],
)
def test_strict_about_fields(make_row: Any, changes: dict[str, Any], message: str) -> None:
    data = json.loads(make_row().to_json()) | changes
    with pytest.raises(UsageError) as caught:
        Measurement.from_dict(data)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["run", "machine", "samples_ns", "size_bytes", "schema"])
def test_missing_field(make_row: Any, name: str) -> None:
    data = json.loads(make_row().to_json())
    del data[name]
    with pytest.raises(UsageError, match=name):
        Measurement.from_dict(data)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '"x"', '{"quality": {"kl": 1' + "0" * 30 + "}}"]
)
def test_not_json_objects(text: str) -> None:
    with pytest.raises(UsageError, match="not a measurement"):
        Measurement.from_json(text)


def test_names_of_tests(make_row: Any) -> None:
    steps = tuple(range(1, 9))
    generated = {"n_prompt": 0, "n_gen": 4, "step_ns": steps}
    assert make_row().test == "pp512"
    assert make_row(**generated).test == "tg4"
    assert make_row(**generated, n_depth=512).test == "tg4 @ d512"
    assert make_row(**generated, n_depth=512, parallel=3).test == "tg4 x3 @ d512"


def test_summary(make_row: Any) -> None:
    row = make_row(samples_ns=(512_000_000, 1_024_000_000, 256_000_000))
    assert row.tokens_per_second == pytest.approx((1000, 500, 2000))
    summary = row.summary()
    assert summary["avg_ts"] == pytest.approx(3500 / 3)
    assert summary["median_ts"] == pytest.approx(1000)
    assert summary["stddev_ts"] == pytest.approx(statistics.stdev([1000, 500, 2000]))
    assert summary["avg_ns"] == pytest.approx(1_792_000_000 / 3)
    assert summary["p50_ns"] == 512_000_000


def test_generation_percentiles_are_of_steps(make_row: Any) -> None:
    row = make_row(n_prompt=0, n_gen=2, samples_ns=(30, 70), step_ns=(10, 20, 30, 40))
    assert row.tokens_per_second == pytest.approx((2e9 / 30, 2e9 / 70))
    assert row.summary()["p50_ns"] == 25
    several = replace(row, parallel=3)
    assert several.tokens_per_second == pytest.approx((6e9 / 30, 6e9 / 70))
    assert several.decode_tps == several.tokens_per_second
    assert several.summary()["p50_ns"] == 25
    assert Measurement.from_json(several.to_json()) == several
    with pytest.raises(UsageError, match="expected no prompt"):
        make_row(parallel=2)


def test_one_repetition_has_no_spread(make_row: Any) -> None:
    assert make_row(samples_ns=(5,)).summary()["stddev_ts"] == 0


def test_prompt_and_generation_add_up(make_row: Any) -> None:
    row = make_row(
        n_prompt=100, n_gen=2, samples_ns=(50, 70), prefill_ns=(20, 40), step_ns=(10, 20, 10, 20)
    )
    assert row.test == "pp100+tg2"
    assert row.ttft_ns == (20, 40)
    assert row.prefill_tps == pytest.approx((5e9, 2.5e9))
    assert row.decode_tps == pytest.approx((2e9 / 30, 2e9 / 30))
    assert row.summary()["ttft_ns_p50"] == 30
    assert make_row().ttft_ns == make_row().samples_ns
    assert make_row().decode_tps == ()


def test_energy_is_shared_by_every_token(make_row: Any) -> None:
    row = make_row(energy=Energy(2048.0, "powercap", "package"))
    assert row.joules_per_token == 2  # two repetitions of 512 tokens
    assert make_row().joules_per_token is None


def test_records_are_appended_and_read_back(make_row: Any, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    rows = [make_row(), make_row(threads=1), make_row(threads=4)]
    append_records(path, rows[:2])
    append_records(path, rows[2:])
    assert read_records(path) == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no records"),
        ("\n\n", "holds no records"),
        ('GOOD\n{"schema": 2', "line 2: not a measurement"),
        ('GOOD\n\n{"schema": 9}\n', "line 3: the measurement has schema 9"),
        ("\udc80", "cannot read the records"),
    ],
)
def test_bad_records_name_the_line(make_row: Any, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "records.jsonl"
    text = text.replace("GOOD", make_row().to_json())
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UsageError) as caught:
        read_records(path)
    assert message in str(caught.value)
    with pytest.raises(UsageError, match="cannot read the records"):
        read_records(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="cannot write the records"):
        append_records(tmp_path, [make_row()])


@given(
    st.lists(st.integers(1, 10**12), min_size=1, max_size=50),
    st.sampled_from([0, 1, 50, 90, 99, 100]),
)
def test_percentile_is_numpys(values: list[int], percent: int) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-12)
