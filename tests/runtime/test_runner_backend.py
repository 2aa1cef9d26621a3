"""``pocketslm-run`` as a child process gives what the library in this process gives."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from pocketslm.errors import BackendError, ContextOverflowError, UsageError
from pocketslm.runtime.backends.runner import PROGRAM, RunnerSession
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model, Record

LOGPROB_ATOL = 1e-4  # fp32 sums in another order
PROMPT = "the inner voice of the heather"


@pytest.fixture(scope="module")
def here(tiny_bundle: Path) -> Model:
    return Model.load(tiny_bundle, "native", threads=2)


@pytest.fixture(scope="module")
def child(tiny_bundle: Path) -> Iterator[Model]:
    model = Model.load(tiny_bundle, "runner", threads=2)
    yield model
    session(model).close()


def session(model: Model) -> RunnerSession:
    assert isinstance(model.engine.session, RunnerSession)
    return model.engine.session


def records(model: Model, **options: object) -> list[Record]:
    config = GenerationConfig(max_new_tokens=24).but(**options)
    return list(model.generate(PROMPT, config))


def test_it_says_what_it_is(child: Model, here: Model) -> None:
    ours, theirs = session(child), here.engine.session
    assert ours.backend.startswith("runner ")
    assert (ours.context, ours.vocab_size) == (theirs.context, theirs.vocab_size)
    assert ours.stats()["rss_bytes"] > 0
    assert len(ours.bench(16, 4, 2)["decode_ns"]) == 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ignore_eos": True},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 1.3, "penalize_prompt": False},
        {"stop_strings": ("e",)},
    ],
    ids=str,
)
def test_greedy_records_are_those_of_the_library(
    child: Model, here: Model, options: dict[str, object]
) -> None:
    ours = records(child, logprobs=True, **options)
    theirs = records(here, logprobs=True, **options)
    assert [(r.token, r.text, r.finish) for r in ours] == [
        (r.token, r.text, r.finish) for r in theirs
    ]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.logprob is not None
        assert other.logprob is not None
        assert abs(mine.logprob - other.logprob) < LOGPROB_ATOL
        assert mine.time_ns > 0
    plain = records(child, **options)
    assert [(r.token, r.text, r.finish, r.logprob) for r in plain] == [
        (r.token, r.text, r.finish, None) for r in ours
    ]


def test_guesses_change_no_token(child: Model, here: Model) -> None:
    """Hundreds of tokens that repeat themselves, up to a limit, an end and the context's end."""
    options = {"ignore_eos": True, "max_new_tokens": 150}
    alone = [r.token for r in records(here, prompt_lookup_num_tokens=0, **options)]
    for guesses in (0, 1, 5, None):
        assert [
            r.token for r in records(child, prompt_lookup_num_tokens=guesses, **options)
        ] == alone
    assert [r.token for r in records(child, prompt_lookup_num_tokens=3, **options)] == alone
    whole = [list(m.generate(PROMPT, GenerationConfig(ignore_eos=True))) for m in (child, here)]
    ours, theirs = ([(r.token, r.text, r.finish) for r in made] for made in whole)
    assert ours == theirs
    assert ours[-1][2] == "context"
    # What is cached after it is what was generated.
    again = here.tokenizer.encode(PROMPT, add_special_tokens=True) + alone[:60]
    config = GenerationConfig(max_new_tokens=20, ignore_eos=True)
    assert [r.token for r in child.generate(again, config)] == alone[60:80]


def test_sampling_follows_the_seed(child: Model) -> None:
    def tokens(seed: int, **options: object) -> list[int]:
        made = records(child, do_sample=True, temperature=3.0, seed=seed, **options)
        return [record.token for record in made]

    assert tokens(1) == tokens(1) != tokens(2)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 0},
        {"top_k": 5},
        {"top_k": 0, "top_p": 0.8},
        {"top_k": 0, "min_p": 0.05},
        {"top_k": 0, "typical_p": 0.3},
        {"top_k": 9, "typical_p": 0.8, "min_p": 0.01},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
        {"top_k": 0, "temperature": 0.7},
        {"top_k": 2**32 + 1, "prompt_lookup_num_tokens": 2**32},
        {"top_k": np.int64(7), "top_p": np.float32(0.8), "temperature": Fraction(3, 2)},
    ],
    ids=str,
)
def test_a_seed_draws_the_same_tokens_in_the_child_and_here(
    child: Model, here: Model, options: dict[str, object]
) -> None:
    for seed in (1, 2, 10**15):
        ours, theirs = (
            [
                record.token
                for record in records(
                    model,
                    **{"do_sample": True, "temperature": 3.0, "seed": seed, "ignore_eos": True}
                    | options,
                )
            ]
            for model in (child, here)
        )
        assert ours == theirs
        assert len(ours) == 24


def test_logits_are_the_same_bits(child: Model, here: Model) -> None:
    ids = np.array([5, 200, 31, 77, 140, 9])
    for model in (child, here):
        model.engine.session.truncate(0)
    ours = session(child).forward(ids, all_logits=True)
    np.testing.assert_array_equal(ours, here.engine.session.forward(ids, all_logits=True))
    ours = session(child).forward(ids[:1])
    np.testing.assert_array_equal(ours, here.engine.session.forward(ids[:1]))
    session(child).truncate(2)
    here.engine.session.truncate(2)
    ours = session(child).forward(ids[:2])
    np.testing.assert_array_equal(ours, here.engine.session.forward(ids[:2]))
    with pytest.raises(UsageError, match="cannot truncate"):
        session(child).truncate(99)


def test_the_prompt_is_read_once(child: Model) -> None:
    """The child reports what it did not read again."""
    prompt = child.tokenizer.encode(PROMPT)
    list(child.generate(prompt, GenerationConfig(max_new_tokens=2)))
    runner = session(child)
    name = runner._send({"op": "generate", "tokens": prompt, "max_tokens": 1, "ignore_eos": True})
    assert runner._event(name)["event"] == "token"
    assert runner._event(name)["reused_tokens"] == len(prompt) - 1


def test_closing_the_stream_ends_it_and_the_next_request_is_answered(child: Model) -> None:
    long = GenerationConfig(max_new_tokens=200, ignore_eos=True)
    stream = child.generate(PROMPT, long)
    assert len(list(islice(stream, 3))) == 3
    stream.close()  # type: ignore[attr-defined]
    assert len(records(child, ignore_eos=True)) == 24


def test_a_cancel_from_another_thread_ends_it(child: Model) -> None:
    stream = child.generate(PROMPT, GenerationConfig(max_new_tokens=220, ignore_eos=True))
    made = [next(stream)]
    canceller = threading.Thread(target=session(child).cancel)
    canceller.start()
    canceller.join()
    made += list(stream)
    assert 1 <= len(made) <= 220
    assert len(records(child)) > 0


def test_a_killed_child_is_one_error_and_then_works_again(child: Model) -> None:
    before = [record.token for record in records(child)]
    stream = child.generate(PROMPT, GenerationConfig(max_new_tokens=200, ignore_eos=True))
    pid = session(child).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(BackendError, match=r"SIGKILL \(out of memory\?\); it starts again"):
        list(stream)
    assert [record.token for record in records(child)] == before
    assert session(child).pid != pid


def test_faults_are_typed(
    child: Model, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ContextOverflowError):
        child.generate([1] * 300)
    with pytest.raises(ContextOverflowError, match="do not fit"):
        session(child).ask(op="generate", tokens=[1] * 300)
    assert len(records(child)) > 0
    with pytest.raises(BackendError, match="cannot open"):
        RunnerSession(tmp_path / "nowhere.slm")
    monkeypatch.setenv(PROGRAM, str(tmp_path / "nothing"))
    with pytest.raises(BackendError, match="cannot start .*No such file"):
        Model.load(tiny_bundle, "runner")
    monkeypatch.setenv(PROGRAM, "/bin/true")
    with pytest.raises(BackendError, match="ended with status 0"):
        Model.load(tiny_bundle, "runner")
