"""Predictions, by hand and against rows whose machine is known."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from pocketslm.cli import main
from pocketslm.errors import UsageError
from pocketslm.models.catalog import catalog
from pocketslm.profiling import fit
from pocketslm.profiling.machine import Limits, Machine
from pocketslm.profiling.records import append_records

NAME = "smollm2-135m-instruct"
# SmolLM2-135M by hand, from its published dimensions.
LAYERS = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
HEAD = 49152 * 576
KV_TOKEN = 2 * 30 * 3 * 64 * 2
LIMITS = Limits(20e9, 200e9)
ROUNDING = 1e-6  # of counts of bytes and nanoseconds


def stated(**changes: Any) -> fit.Device:
    device = fit.Device(4e9, LIMITS, fit.Reached(0.5, 0.25, 10e6), "stated")
    return dataclasses.replace(device, **changes)


def of(predictions: list[fit.Prediction], model: str, scheme: str) -> fit.Prediction:
    (found,) = [one for one in predictions if (one.model, one.scheme) == (model, scheme)]
    return found


def test_formulas_by_hand() -> None:
    one = of(fit.predict(stated(), 1000, 100), NAME, "int4 g32 sym")
    weights = (LAYERS * 4.5 + HEAD * 8.5) / 8
    assert one.size_bytes == weights
    resident = (LAYERS * 4.5 + HEAD * 4.5) / 8
    assert one.ram_bytes == resident + 1000 * KV_TOKEN + 10e6
    assert one.decode_tps == pytest.approx(0.5 * 20e9 / (weights + 1000 * KV_TOKEN))
    # Position i attends to i + 1 others, scores and sums: 2 x 9 heads x 64 x 30 layers each.
    macs = 100 * LAYERS + 30 * 2 * 9 * 64 * sum(range(1, 101)) + HEAD
    assert one.prefill_tps == pytest.approx(0.25 * 200e9 * 100 / macs)


def test_an_embedding_of_its_own_is_kept_but_not_read() -> None:
    tiny = of(fit.predict(stated(), 1, 1), "tinyllama-1.1b-chat", "int8 g32 sym")
    table = 32000 * 2048
    layers = 22 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 5632)
    assert tiny.size_bytes == (layers + 2 * table) * 8.5 / 8
    read = (layers + table) * 8.5 / 8 + 2 * 22 * 4 * 64 * 2
    assert tiny.decode_tps == pytest.approx(0.5 * 20e9 / read)


def test_every_model_in_every_scheme_by_size() -> None:
    rows = fit.predict(stated(), 2048, 512)
    models = [name for name, entry in catalog().items() if entry.config]
    assert {one.model for one in rows} == set(models)
    assert len(rows) == len(models) * len(fit.SCHEMES)
    sizes = [one.size_bytes for one in rows]
    assert sizes == sorted(sizes)
    for name in models:
        of_it = [one for one in rows if one.model == name]
        assert [one.scheme for one in of_it] == [scheme.name for scheme in fit.SCHEMES]
        speeds = [one.decode_tps for one in of_it]
        assert speeds == sorted(speeds, reverse=True)
        assert [one.prefill_tps is None for one in of_it] == [False, False, False, True]


def test_more_costs_more() -> None:
    short, long = fit.predict(stated(), 100, 100), fit.predict(stated(), 2000, 2000)
    for a, b in zip(short, long, strict=True):
        assert b.ram_bytes > a.ram_bytes
        assert b.decode_tps < a.decode_tps
    faster = fit.predict(stated(limits=Limits(40e9, 200e9)), 100, 100)
    for a, b in zip(short, faster, strict=True):
        assert b.decode_tps == pytest.approx(2 * a.decode_tps)
        assert b.prefill_tps == a.prefill_tps
    needed = short[3].ram_bytes
    assert fit.predict(stated(ram_bytes=needed), 100, 100)[3].fits
    assert not fit.predict(stated(ram_bytes=needed - 1), 100, 100)[3].fits


def test_a_context_beyond_the_model_is_its_own() -> None:
    most = of(fit.predict(stated(), 10**6, 512), "tinyllama-1.1b-chat", "fp16")
    assert most == of(fit.predict(stated(), 2048, 512), "tinyllama-1.1b-chat", "fp16")
    with pytest.raises(UsageError, match="context is 0"):
        fit.predict(stated(), 0, 512)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("ram", "4GB", 4e9),
        ("ram", "512 MiB", 2**29),
        ("bandwidth", "30.5GB/s", 30.5e9),
        ("int8", "0.3TMAC/s", 0.3e12),
    ],
)
def test_units(name: str, text: str, value: float) -> None:
    assert fit.quantity(name, text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ram", "4"),
        ("ram", "-4GB"),
        ("ram", "0GB"),
        ("ram", "4gb"),
        ("bandwidth", "30GB"),
        ("int8", "1TOPS"),
        ("int8", "nanGMAC/s"),
    ],
)
def test_wrong_units(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"--{name} is .* such as"):
        fit.quantity(name, text)


def test_what_is_missing() -> None:
    with pytest.raises(UsageError, match="both or neither"):
        fit.device(ram="4GB", bandwidth="30GB/s")
    with pytest.raises(UsageError, match="--ram is missing"):
        fit.device(bandwidth="30GB/s", int8="1TMAC/s")


@pytest.fixture
def rows(make_row: Any) -> list[Any]:
    """Two models on a machine that reaches half its bandwidth and a quarter of its peak, 20 MB."""
    made = []
    for name, _cost, _ in fit._models():
        if name not in (NAME, "smollm2-360m-instruct"):
            continue
        layers = _cost.layer_macs
        weights = round((layers * 4.5 + _cost.head_macs * 8.5) / 8)
        resident = round((layers + _cost.head_macs) * 4.5 / 8)
        token_kv = _cost.kv_bytes(1, 2)
        common = {
            "model": name,
            "artefact": name,
            "backend": "native avx2",
            "bytes_per_token": weights,
            "size_bytes": weights,
            "macs_per_token": layers,
            "head_macs": _cost.head_macs,
            "limits": LIMITS,
            "context": 600,
            "peak_rss_bytes": round(resident + 600 * token_kv + 20e6),
        }
        prompt_ns = round(_cost.prompt_macs(512) / (0.25 * 200e9) * 1e9)
        step_ns = round((weights + (500 + 4.5) * token_kv) / (0.5 * 20e9) * 1e9)
        made.append(make_row(**common, n_prompt=512, samples_ns=(prompt_ns,)))
        made.append(
            make_row(**common, n_prompt=0, n_gen=10, n_depth=500, samples_ns=(10 * step_ns,))
        )
    return made


def test_records_tell_what_is_reached(rows: list[Any]) -> None:
    found = fit.device(records=rows)
    assert found.limits == LIMITS
    assert found.ram_bytes == 8 << 30
    reached = found.reached
    assert (reached.decode, reached.prefill) == pytest.approx((0.5, 0.25), rel=ROUNDING)
    assert reached.fixed_bytes == pytest.approx(20e6, rel=ROUNDING)


def test_a_check_never_saw_its_own_model(rows: list[Any]) -> None:
    """Both models reach the same, so one predicts the other; a slowed one is off by as much."""
    checks = fit.check(rows)
    assert len(checks) == 8
    assert {one.scheme for one in checks} == {"int4 g32 sym"}
    assert [one.error for one in checks] == pytest.approx([0] * 8, abs=ROUNDING)
    slow = dataclasses.replace(rows[1], samples_ns=(round(rows[1].samples_ns[0] * 1.25),))
    (decode,) = [
        one
        for one in fit.check([rows[0], slow, *rows[2:]])
        if (one.model, one.test, one.unit) == (NAME, "tg10 @ d500", "t/s")
    ]
    assert decode.error == pytest.approx(0.25, rel=ROUNDING)
    # Alone, it is judged by the defaults, never by itself.
    alone = [one for one in fit.check(rows[1:2]) if one.unit == "t/s"]
    assert [one.error for one in alone] == pytest.approx([fit.Reached().decode / 0.5 - 1])


def test_rows_that_do_not_count(rows: list[Any]) -> None:
    others = [
        dataclasses.replace(rows[0], threads=1),
        dataclasses.replace(rows[0], backend="onnxruntime 1.0"),
        dataclasses.replace(rows[0], limits=None),
        dataclasses.replace(rows[0], head_macs=7),
    ]
    assert fit.check([*rows, *others]) == fit.check(rows)
    with pytest.raises(UsageError, match="no native row of a catalog model"):
        fit.device(records=others[1:])
    with pytest.raises(UsageError, match="with 4 threads"):
        fit.device(records=rows, threads=4)
    other = dataclasses.replace(rows[0], machine=Machine("Other", 2, "x86_64", 8 << 30, "Linux"))
    with pytest.raises(UsageError, match="several machines"):
        fit.device(records=[*rows, other])


def test_a_reading_that_cannot_be_is_measured_again(
    rows: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bandwidth was measured while the machine was busy, the decoding was not."""
    busy = dataclasses.replace(rows[1], limits=Limits(5e9, 200e9))
    calls: list[tuple[int, int | None]] = []

    def again(threads: int, size: int | None) -> Limits:
        calls.append((threads, size))
        return LIMITS

    monkeypatch.setattr(fit, "limits", again)
    monkeypatch.setattr(fit, "this_machine", lambda: rows[0].machine)
    said: list[str] = []
    assert fit.possible([rows[0], busy, busy], said.append) == [rows[0], rows[1], rows[1]]
    assert calls == [(busy.threads, busy.bytes_per_token)]
    assert "reached 200% of its limits, which cannot be: measured again, it is 50%" in said[0]
    # Not better, or not this machine: it does not count.
    monkeypatch.setattr(fit, "limits", lambda *_: Limits(6e9, 1e9))
    assert fit.possible([busy], said.append) == []
    monkeypatch.setattr(fit, "this_machine", lambda: Machine("Other", 2, "x86_64", 1, "Linux"))
    assert fit.possible([rows[0], busy], said.append) == [rows[0]]
    assert said[-1].endswith("left out; measure again with `bench --record`")


def test_records_of_nothing_possible_are_refused(rows: list[Any], tmp_path: Path) -> None:
    other = Machine("No such machine", 2, "x86_64", 8 << 30, "Linux")
    row = dataclasses.replace(rows[1], limits=Limits(5e9, 2e11), machine=other)
    append_records(tmp_path / "r.jsonl", [row])
    with pytest.raises(UsageError, match="holds no row that can be"):
        fit.fit(None, None, None, tmp_path / "r.jsonl", None, 64, 64)


def test_the_command_prints_the_error(
    rows: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    append_records(tmp_path / "r.jsonl", rows[:1])
    options = ["fit", "--records", str(tmp_path / "r.jsonl")]
    assert main(options) == 0
    said = capsys.readouterr().out
    measured = statistics.median(rows[0].prefill_tps)
    error = fit.Reached().prefill / 0.25 - 1
    (line,) = [line for line in said.splitlines() if f"{measured:.1f} t/s" in line]
    assert f"{error:+.0%}" in line
    assert main([*options, "--json", "--ram", "1GB"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["device"]["ram_bytes"] == 1e9
    assert data["checks"][0]["error"] == pytest.approx(error, rel=ROUNDING)
    assert len(data["predictions"]) == len(fit.predict(stated(), 1, 1))


def test_this_machine_is_measured_where_nothing_is_said() -> None:
    found = fit.device(threads=1)
    assert found.source == "measured here (-t 1)"
    assert found.limits.bandwidth_bytes_s > 0
    assert found.limits.int8_macs_s > 0
    assert found.ram_bytes > 0
