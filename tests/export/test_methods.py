"""The table of methods: whole, resumable, and never of two settings at once."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import support
from pocketslm.errors import UsageError
from pocketslm.export import bits, methods
from pocketslm.models.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> methods.Workbench:
    folder = tmp_path_factory.mktemp("methods")
    text, model = folder / "letters.txt", folder / "model"
    support.write_hf(model, support.tiny(num_hidden_layers=6))
    letters = np.random.default_rng(0).choice(list("etaoin shrdlu"), 3000)
    text.write_text("".join(letters))
    return methods.Workbench(open_checkpoint(model), text, str(text), windows=1, tokens=1024)


def test_every_row_is_made_once(
    bench: methods.Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, few in (("GROUP_SIZES", (32,)), ("GRIDS", ("sym",)), ("METHODS", ("rtn", "gptq"))):
        monkeypatch.setattr(methods, name, few)
    monkeypatch.setattr(bits, "BITS", (4.0, 6.0))
    monkeypatch.setattr(bits, "METHODS", ("search+gptq",))
    results, said = tmp_path / "rows.jsonl", list[str]()
    found = methods.rows(bench, results, methods.TABLES, said.append)
    assert len(said) == len(found) == 2 + 3 + 12 + 4 + 6 + 2
    assert {row.table for row in found} == set(methods.TABLES)
    plain = {(row.method, row.detail): row for row in found}
    assert plain["gptq", "sym g32"].kl < plain["rtn", "sym g32"].kl
    few, many = (plain["search+gptq", f"{width} bits a weight"] for width in (4.0, 6.0))
    assert few.kl > many.kl
    assert 0.95 * 6 / 4 < many.size_mb / few.size_mb < 1.05 * 6 / 4
    drawn = bits.chart(found)
    assert drawn.startswith("<svg")
    assert drawn.count(">search+gptq</text>") == 1
    kept = results.with_suffix(".losses.json")
    before = kept.read_bytes()
    lines = results.read_text().splitlines()
    results.write_text("\n".join(lines[:-1]) + "\n")
    monkeypatch.delattr(bits, "sensitivities")  # known from the first run
    assert methods.rows(bench, results, ("bits",), said.append, "6.0")[0].kl == many.kl
    assert kept.read_bytes() == before
    for wrong, error in (
        (b"{", "is not a file of losses"),
        (b"\xff", "is not a file of losses"),
        (b"[" * 100_000, "is not a file of losses"),
        (before.replace(b'"identity"', b'"x"'), "is not a file of losses"),
        (before.replace(b'{"2": ', b'{"2": [], "9": '), "is not a file of losses"),
        (before.replace(b'{"2": ', b'{"7": ', 1), "lacks losses, or has some of no matrix"),
        (before.replace(b"o_proj", b"x_proj", 1), "lacks losses, or has some of no matrix"),
        (before.replace(b'"letters.txt"', b'"other"'), "losses of another model"),
    ):
        kept.write_bytes(wrong)
        results.write_text("\n".join(lines[:-1]) + "\n")
        assert wrong != before, error
        with pytest.raises(UsageError, match=error):
            methods.rows(bench, results, ("bits",), said.append, "6.0")
    results.write_text("\n".join(lines[:5]) + "\n")
    again = list[str]()
    methods.rows(bench, results, ("quantize", "depth"), again.append)
    assert again == said[4:5]
    chosen = methods.rows(bench, results, methods.TABLES, again.append, "sleb")
    assert [row.method.split(":")[0] for row in chosen] == ["sleb"]
    with pytest.raises(UsageError, match="no row of depth has 'gptq'"):
        methods.rows(bench, results, ("depth",), again.append, "gptq")
    table = methods.markdown(found)
    assert table.count("\n\n") == 5
    assert "| sym g32 | gptq |" in table


def test_results_of_another_setting_are_refused(bench: methods.Workbench, tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    results.write_text('{"model": "another"}\n')
    with pytest.raises(UsageError, match="another model or setting"):
        methods.rows(bench, results, ("depth",), print)
    row = methods.Row("depth", "sleb", "x", 1.0, 0.0, 0.1, 0.9, 1.0, 1.0)
    wrong: list[Any] = [
        *("nonsense", "", "[" * 100_000, "\udcff"),
        *(
            f"{json.dumps(bench.identity)}\n{json.dumps(other)}"
            for other in (
                {"table": "x"},
                [1],
                asdict(row) | {"kl": "much"},
                asdict(row) | {"kl": 10**400},
                asdict(row) | {"method": 3},
            )
        ),
    ]
    for text in wrong:
        results.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(UsageError, match="not a file of results"):
            methods.rows(bench, results, ("depth",), print)


def test_test_and_calibration_text_stay_apart(tiny_hf: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("x" * 1200)
    with pytest.raises(UsageError, match="512 to measure with and 1024 others"):
        methods.Workbench(open_checkpoint(tiny_hf), text, str(text), windows=1, tokens=1024)
