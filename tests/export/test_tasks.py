"""Multiple-choice scoring against the definition, and samples against the whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pocketslm.cli import main
from pocketslm.errors import UsageError
from pocketslm.export.tasks import (
    Item,
    estimate,
    evaluate_task,
    log_likelihoods,
    read_items,
    read_margins,
    strata_of,
)
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.models.reference import load_reference
from pocketslm.runtime.backends import open_session
from pocketslm.runtime.bundle import open_bundle
from pocketslm.runtime.tokenizer import load_tokenizer

MAX_NATS = 0.02  # of a sum over a choice's tokens: fp32 against the fp16 cache of the backend
ITEMS = [
    Item("What is in the ether?", ("the other", "a", "rain in there"), 0),
    Item("Two of them are here: ", ("ink", "her"), 1),
    Item("he", ("x", "yes indeed"), 1),
    Item("Again, then:", ("no", "never"), 0),
]


def test_log_likelihoods_are_the_sum_over_the_choice(tiny_hf: Path, tiny_bundle: Path) -> None:
    model = load_reference(open_checkpoint(tiny_hf))
    encode = load_tokenizer(tiny_bundle).encode
    session = open_session(open_bundle(tiny_bundle), threads=1)
    for item in ITEMS:
        expected = []
        for choice in item.choices:
            space = "" if item.question.endswith(" ") else " "
            ids = encode(item.question + space + choice)
            start = len(encode(item.question.rstrip()))
            logits, _ = model(torch.tensor([ids]), model.empty_cache())
            steps = logits[0].double().log_softmax(-1)
            expected.append(sum(float(steps[i - 1, ids[i]]) for i in range(start, len(ids))))
        got = log_likelihoods(session, encode, item)
        assert np.abs(np.array(got) - expected).max() < MAX_NATS
        assert np.ptp(got) > MAX_NATS


def test_a_sample_of_everything_is_exact(tiny_bundle: Path) -> None:
    encode = load_tokenizer(tiny_bundle).encode
    session = open_session(open_bundle(tiny_bundle), threads=1)
    scores = [np.array(log_likelihoods(session, encode, item)) for item in ITEMS]
    hits = [s.argmax() == item.gold for s, item in zip(scores, ITEMS, strict=True)]
    norm = [
        (s / [len(c) for c in item.choices]).argmax() == item.gold
        for s, item in zip(scores, ITEMS, strict=True)
    ]
    for sample in (None, 4, 9):
        result, _ = evaluate_task(session, encode, "t", ITEMS, sample=sample)
        assert (result.acc, result.acc_norm) == (np.mean(hits), np.mean(norm))
        assert (result.acc_ci95, result.acc_norm_ci95) == (0, 0)
        assert result.acc_stderr == pytest.approx(np.std(hits, ddof=1) / 2)
    few, margins = evaluate_task(session, encode, "t", ITEMS, sample=3, seed=1)
    assert (few.items, few.total, len(margins)) == (3, 4, 3)
    again, others = evaluate_task(session, encode, "t", ITEMS, sample=3, seed=1)
    assert (again, others) == (few, margins)


@pytest.mark.parametrize("stratified", [False, True])
def test_the_interval_covers_the_whole_file(stratified: bool) -> None:
    """95 of 100 samples hold the truth: the mean over a file of which a part was drawn."""
    rng = np.random.default_rng(0)
    ability = rng.normal(0.2, 1, 1000)  # how far an item is ahead, in any run
    hits = ability + rng.normal(0, 0.4, 1000) > 0
    earlier = [list(ability + rng.normal(0, 0.4, 1000)) for _ in range(2)] if stratified else []
    strata = strata_of(1000, 300, earlier)
    assert sum(stratum.draws for stratum in strata) == 300
    assert sorted(np.concatenate([stratum.items for stratum in strata])) == list(range(1000))
    found = []
    for _ in range(400):
        drawn = [rng.choice(hits[s.items], s.draws, replace=False) for s in strata]
        found.append(estimate(strata, drawn))
    means, errors, halves = np.array(found).T
    assert 0.92 < (np.abs(means - hits.mean()) <= halves).mean() < 0.98
    assert abs(means.mean() - hits.mean()) < 3 * means.std() / 400**0.5
    plain = 1.959964 * (hits.var() * 700 / 999 / 300) ** 0.5
    if stratified:  # worth more than twice as many items drawn from all alike
        assert halves.mean() < 0.7 * plain
    else:
        assert halves.mean() == pytest.approx(plain, rel=0.01)
    assert (errors > halves / 1.959964).all()


@pytest.mark.parametrize("total", [4, 5, 9])
def test_a_stratified_sample_of_everything_is_exact(total: int) -> None:
    rng = np.random.default_rng(1)
    strata = strata_of(total, total, [rng.normal(size=total)])
    assert len(strata) > 1
    hits = rng.random(total) < 0.5
    mean, _, half = estimate(strata, [hits[stratum.items] for stratum in strata])
    assert mean == pytest.approx(hits.mean())
    assert half == 0
    with pytest.raises(UsageError, match="a sample of 1 items"):
        strata_of(total, 1)


def test_runs_that_were_saved_are_of_the_same_items(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, runs = tmp_path / "letters.jsonl", tmp_path / "runs.jsonl"
    lines = [{"query": i.question, "choices": i.choices, "gold": i.gold} for i in ITEMS]
    path.write_text("\n".join(map(json.dumps, lines)))
    command = ["eval", str(tiny_bundle), "--task", str(path)]
    assert main([*command, "--save", str(runs), "--json"]) == 0
    assert main([*command, "--save", str(runs)]) == 0
    whole = json.loads(capsys.readouterr().out.split("\n}")[0] + "}")
    margins = read_margins(runs, ITEMS)
    assert len(margins) == 2
    assert np.mean(np.array(margins[0]) > 0) == whole["acc"]
    assert main([*command, "--earlier", str(runs), "--sample", "4", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["acc"], again["acc_ci95"]) == (whole["acc"], 0)
    assert main([*command, "--save", str(runs), "--sample", "2"]) == 2
    with pytest.raises(UsageError, match="no whole run over these items"):
        read_margins(runs, ITEMS[:3])
    for broken in (
        *("{", '{"items": 3}', "[]", "7", "[" * 100_000),
        runs.read_text()
        .splitlines()[0]
        .replace('"margins": [', '"margins": [1' + "0" * 400 + ", "),
    ):
        runs.write_text(broken)
        with pytest.raises(UsageError, match="cannot read|no whole run"):
            read_margins(runs, ITEMS)


def test_forms_of_items(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    forms = [
        {"query": "q", "choices": ["a", "b"], "gold": 1},
        {"question": "q", "choices": ["a", "b"], "answer": "B"},
        {"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
        {"ctx": "q", "choices": ["a", "b"], "label": "1"},
        {"query": "q", "choices": ["a", "b"], "gold": "b"},
    ]
    path.write_text("\n".join(json.dumps(form) for form in forms) + "\n\n")
    assert read_items(path) == [Item("q", ("a", "b"), 1)] * len(forms)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"query": "q", "choices": ["a", "b"]}',
        '{"query": "q", "choices": ["a", "b"], "gold": 2}',
        '{"query": "q", "choices": ["a"], "gold": 0}',
        '{"query": 3, "choices": ["a", "b"], "gold": 0}',
        '{"choices": ["a", "b"], "gold": 0}',
        '{"query": "q", "choices": ["a", ""], "gold": 0}',
        '{"query": " ", "choices": ["a", "b"], "gold": 0}',
        '{"query": "q", "choices": "ab", "gold": 0}',
        '{"query": "q", "choices": ["a", "b"], "gold": 0.5}',
        '{"query": "q", "choices": ["a", "b"], "gold": true}',
        '{"query": "q", "query": "p", "choices": ["a", "b"], "gold": 0}',
        "[" * 99_999,
    ],
)
def test_lines_that_are_no_items(line: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"query": "q", "choices": ["a", "b"], "gold": 0}\n' + line)
    with pytest.raises(UsageError, match="line 2 is no multiple-choice item") as caught:
        read_items(path)
    assert "\n" not in str(caught.value)


def test_the_command_prints_accuracy(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "letters.jsonl"
    lines = [{"query": i.question, "choices": i.choices, "gold": i.gold} for i in ITEMS]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert main(["eval", str(tiny_bundle), "--task", str(path)]) == 0
    assert "acc_norm" in capsys.readouterr().out
    assert main(["eval", str(tiny_bundle), "--task", str(path), "--sample", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["task"], found["items"], found["total"]) == ("letters", 3, 4)
    path.write_text("")
    assert main(["eval", str(tiny_bundle), "--task", str(path)]) == 2
