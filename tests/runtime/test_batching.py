"""Several generations at once give what each gives alone, and end without a slot being lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pocketslm.errors import BackendError, UsageError
from pocketslm.runtime import batching
from pocketslm.runtime.backends.native import NativeSession
from pocketslm.runtime.batching import Batch
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model, Record

PARALLEL = 3
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"prompt_lookup_num_tokens": 0},
    {"do_sample": True, "seed": 3, "temperature": 1.3},
    {"do_sample": True, "seed": 4, "top_k": 0, "top_p": 0.9, "logprobs": True},
    {"logprobs": True},
    {"repetition_penalty": 1.3},
    {"do_sample": True, "seed": 5, "repetition_penalty": 1.2, "penalize_prompt": False},
    {"regex": "[a-z]{3,9}", "do_sample": True, "seed": 6},
    {"stop_strings": ("e",), "do_sample": True, "seed": 7, "temperature": 2.0},
)


def asked(number: int) -> tuple[list[int], GenerationConfig]:
    """A prompt of its own length and options, some of which share a beginning."""
    options = {"max_new_tokens": 10 + 7 * (number % 4), **OPTIONS[number % len(OPTIONS)]}
    options["ignore_eos"] = "regex" not in options
    return [number % 3 + 1] * (5 + 13 * number % 60) + [number], GenerationConfig(**options)


def answer(model: Model, number: int) -> list[tuple[int, str, float | None, str | None]]:
    return [(r.token, r.text, r.logprob, r.finish) for r in model.generate(*asked(number))]


@pytest.fixture(scope="module")
def alone(tiny_bundle: Path) -> Model:
    return Model.load(tiny_bundle, "native", threads=1)


@pytest.fixture
def several(tiny_bundle: Path) -> Iterator[Model]:
    model = Model.load(tiny_bundle, "native", threads=2, parallel=PARALLEL)
    yield model
    batch = batch_of(model)
    assert sorted(batch._free) == list(range(PARALLEL)), "a slot was lost"
    assert not batch._seats
    model.close()


def batch_of(model: Model) -> Batch:
    assert isinstance(model.engine, Batch)
    return model.engine


def test_each_answer_is_the_one_alone(alone: Model, several: Model) -> None:
    """More at once than there are slots, with every kind of option; twice, with slots in use."""
    count = 4 * len(OPTIONS)
    expected = [answer(alone, number) for number in range(count)]
    assert several.parallel == PARALLEL
    for _ in range(2):
        with ThreadPoolExecutor(7) as threads:
            found = list(threads.map(lambda number: answer(several, number), range(count)))
        for ours, theirs in zip(found, expected, strict=True):
            assert [made[:2] + made[3:] for made in ours] == [m[:2] + m[3:] for m in theirs]
            for (*_, p, _), (*_, q, _) in zip(ours, theirs, strict=True):
                assert p == (q if q is None else pytest.approx(q, abs=1e-5))


def test_answers_go_on_while_a_prompt_is_read(
    several: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two tokens of an answer, no more than a part of another prompt runs."""
    monkeypatch.setattr(batching, "AHEAD", 100)
    batch = batch_of(several)
    calls: list[list[int]] = []
    make = batch.session.make

    def recorded(makers: Sequence[Any]) -> Any:
        made = make(makers)
        calls.append([len(one) for one in made])
        return made

    monkeypatch.setattr(batch.session, "make", recorded)
    plain = GenerationConfig(ignore_eos=True, prompt_lookup_num_tokens=0, max_new_tokens=20)
    first = several.generate([1, 2, 3], plain)
    made = [next(first)]
    second = several.records([4] * 60, plain)
    while next(second) is None:
        pass
    # Seven tokens a part, the last four of them with a token behind.
    assert calls == [[1]] + [[1, 0]] * 8 + [[1, 1]]
    made += first
    assert len(made) == 20
    assert len([record for record in second if record]) == 19


def test_a_slot_keeps_the_beginning_of_its_prompt(several: Model) -> None:
    batch = batch_of(several)
    plain = GenerationConfig(ignore_eos=True, max_new_tokens=4)
    documents = [[number] * 40 for number in (1, 2, 3)]
    for document in documents:
        list(several.generate(document, plain))
    session = batch.session
    assert isinstance(session, NativeSession)
    session.profile()
    for document in reversed(documents):
        list(several.generate([*document, 9, 9], plain))
    assert session.times().tokens <= 3 * (2 + 8 * 3)  # with guesses


def test_what_is_left_and_cancelled_frees_its_slot(alone: Model, several: Model) -> None:
    long = GenerationConfig(ignore_eos=True, max_new_tokens=200)
    left = [several.generate([number], long) for number in range(PARALLEL)]
    for one in left:
        next(one)
    left[0].close()  # type: ignore[attr-defined]
    assert answer(several, 2) == answer(alone, 2)
    # All that this thread left unfinished; the oldest of it gives way.
    assert isinstance(next(left[1]), Record)
    fresh = [several.generate([number], long) for number in (7, 8)]
    for one in fresh:
        next(one)
    with pytest.raises(UsageError, match="stale"):
        for _ in left[1]:
            pass
    for one in (left[2], fresh[0]):
        several.cancel()
        assert len(list(one)) <= 4
    fresh[1].close()  # type: ignore[attr-defined]
    assert answer(several, 3) == answer(alone, 3)


def test_one_error_is_nobody_else_s(alone: Model, several: Model) -> None:
    """A token that is none, in the middle of others' answers."""
    barrier = threading.Barrier(3)

    def ask(number: int) -> Any:
        barrier.wait()
        if number:
            return answer(several, number)
        with pytest.raises(UsageError, match="264 .*not within"):
            list(several.generate([1, 264], GenerationConfig(max_new_tokens=2)))
        return None

    with ThreadPoolExecutor(3) as threads:
        for _ in range(5):
            found = list(threads.map(ask, range(3)))
            assert found[1:] == [answer(alone, 1), answer(alone, 2)]


def test_a_change_of_the_session_waits_for_answers(several: Model) -> None:
    batch = batch_of(several)
    running = several.generate([1], GenerationConfig(ignore_eos=True, max_new_tokens=50))
    next(running)
    order: list[str] = []

    def change() -> None:
        with batch.exclusive():
            order.append("changed")

    thread = threading.Thread(target=change)
    thread.start()
    order.extend("made" for _ in running)
    thread.join()
    # The last step is given when the turn is over.
    assert order[:48] == ["made"] * 48
    assert sorted(order[48:]) == ["changed", "made"]
    several.close()
    with pytest.raises(UsageError, match="was closed"):
        several.generate([1])
    batch._free.sort()


def test_what_cannot_be_at_once_is_said(tiny_bundle: Path) -> None:
    assert Model.load(tiny_bundle, "onnx", threads=1, parallel=4).parallel == 1
    for count in (0, 17):
        with pytest.raises((UsageError, BackendError), match=f"{count} texts at once"):
            Model.load(tiny_bundle, parallel=count)
