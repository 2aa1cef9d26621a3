"""A bounded part of ``python -m tests.fuzz``: every target, past findings first."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz import campaign, lines, mutate
from fuzz.target import Target
from fuzz.worker import TARGETS, Feeder
from native_support import need_sanitizers

from pocketslm.errors import UsageError

# The slower ones.
INPUTS = {"command": 120, "request": 100, "checkpoint": 150, "template": 150, "tokenizer": 150}
FAST, NATIVE = 400, 1500


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    need_sanitizers(campaign.SANITIZERS, folder)
    campaign.prepare(folder)
    return folder


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_found(state: Path, name: str) -> None:
    fast = NATIVE if TARGETS[name].sanitized else FAST
    limit = INPUTS.get(name, fast) + len(TARGETS[name].findings())
    counts = campaign.one(state, name, 0, limit=limit)
    reports = [Path(path).with_suffix(".txt").read_text("utf-8") for path in counts["findings"]]
    assert not reports, reports[0]
    assert counts["inputs"] >= limit
    assert counts["accepted"] > 0


class Weak(Target):
    """What fails in every way that counts as a finding."""

    name = "weak"
    cpu_seconds = 1

    def run(self, data: bytes) -> None:
        match data:
            case b"typed":
                raise UsageError("as it should")
            case b"untyped":
                raise KeyError("x")
            case b"slow":
                while True:
                    pass


def test_what_is_a_finding(tmp_path: Path) -> None:
    feeder = Feeder(Weak(tmp_path, tmp_path), tmp_path / "current", tmp_path / "found")
    assert [feeder.feed(data) for data in (b"fine", b"typed", b"untyped", b"slow")] == [
        *(True, False, False, False)
    ]
    found = [path.read_bytes() for path in feeder.found.values()]
    assert found == [b"untyped", b"slow"]
    assert (feeder.inputs, feeder.accepted) == (4, 1)


@pytest.mark.parametrize("body", ["exit 1", 'echo \'{"event":"x","id":"fuzz","y":NaN}\''])
def test_a_runner_that_ends_or_answers_no_json_is_found(
    state: Path, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = state / "weak"
    (home / "protocol").mkdir(parents=True, exist_ok=True)
    program = home / "pocketslm-run"
    program.write_text(f"#!/bin/sh\nwhile read line; do {body}; done\n")
    program.chmod(0o755)
    target = TARGETS["protocol"](home / "protocol", home)
    with pytest.raises(AssertionError, match="ended|no JSON"):
        target.run(b"{}")


@pytest.mark.parametrize(
    "change",
    [mutate.binary, mutate.text, mutate.json_tree, mutate.json_lines, mutate.safetensors],
    ids=lambda one: one.__name__,
)
def test_changes_are_repeatable_and_bounded(change: Callable[..., bytes]) -> None:
    seed = b'{"a": [1, 2.5, "x", null], "b": {"c": true}}'
    made = [change(seed, random.Random(n)) for n in range(300)]
    assert made == [change(seed, random.Random(n)) for n in range(300)]
    assert len(set(made)) > 100
    assert max(map(len, made)) <= mutate.MAX_BYTES + 100


def test_totals_add_up(tmp_path: Path) -> None:
    counts = {"inputs": 3, "accepted": 2, "seconds": 0.5, "findings": ["x"]}
    for _ in range(2):
        campaign.add(tmp_path, "model", counts)
    total = campaign.read_totals(tmp_path)["model"]
    assert total == {"runs": 2, "inputs": 6, "accepted": 4, "seconds": 1.0, "findings": 2}
    assert campaign.table({"model": total}).splitlines()[-1].split() == ["all", "6", "4", "1", "2"]


def test_lines_are_counted(state: Path) -> None:
    table = lines.measure(state, ["task"], 50)
    name, reached, of, *_ = table.splitlines()[1].split()
    assert name == "export/tasks.py"
    assert 0 < int(reached) < int(of)
