"""The client of ``pocketslm-run`` against children that answer anything: never another's tokens."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from pocketslm.errors import BackendError, UsageError
from pocketslm.runtime.backends.runner import PROGRAM, RunnerSession
from pocketslm.runtime.config import GenerationConfig

CONFIG = GenerationConfig(max_new_tokens=6, ignore_eos=True)
# It loads anything, and answers a generation with the code in the place of ANSWER.
CHILD = """
import json, sys, os
def emit(event, id, **fields):
    print(json.dumps({"event": event, "id": id, **fields}), flush=True)
def token(id, token):
    emit("token", id, token=token, text="")
def done(id, reason="length", **fields):
    emit("done", id, reason=reason, **fields)
for line in sys.stdin:
    request = json.loads(line)
    id, op = request["id"], request["op"]
    if op == "load":
        emit("loaded", id, isa="fake", context=100, vocab_size=10, threads=1, load_ms=1)
    elif op == "stats":
        emit("stats", id, length=0)
    elif op == "generate":
        ANSWER
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A session over a child whose answer to a generation is this code."""

    def start(answer: str) -> RunnerSession:
        program = tmp_path / "fake-run"
        program.write_text(f"#!{sys.executable}\n" + CHILD.replace("ANSWER", answer))
        program.chmod(0o755)
        monkeypatch.setenv(PROGRAM, str(program))
        return RunnerSession(tmp_path / "model.slm")

    return start


def generate(session: RunnerSession, config: GenerationConfig = CONFIG) -> list[int]:
    return [step.token for step in session.generate([1, 2], config, (9,), 6)]


GOOD = "[token(id, at) for at in range(6)]; done(id)"


@pytest.mark.parametrize(
    "answer",
    [
        "token('another', 3)",
        'print(\'{"event":"token","id":"\' + id + \'","token":3,"logprob":nan}\', flush=True)',
        "print('[' * 100000, flush=True)",
        "print('hello', flush=True)",
        "print('{}', flush=True)",
        "print('[1]', flush=True)",
        "print(json.dumps({'event': 'token', 'id': 5}), flush=True)",
        "token(id, 0); emit('stats', str(int(id) - 1))",
    ],
)
def test_an_answer_to_nothing_asked_ends_the_child(child: Any, answer: str) -> None:
    session = child(answer)
    before = session.pid
    with pytest.raises(BackendError, match="gave another answer than one to the request"):
        generate(session)
    assert session.pid is None
    assert session.ask(op="stats")["length"] == 0
    assert session.pid not in (None, before)


def test_a_good_child_is_read_to_the_end(child: Any) -> None:
    session = child(GOOD)
    assert generate(session) == generate(session) == list(range(6))
    eos = child("token(id, 0); done(id, 'eos', token=9)")
    steps = list(eos.generate([1, 2], CONFIG.but(ignore_eos=False), (9,), 6))
    assert [(step.token, step.finish) for step in steps] == [(0, None), (9, "eos")]


def test_a_generation_that_was_left_is_ended_by_the_next_request(child: Any) -> None:
    session = child(GOOD)
    first = session.generate([1, 2], CONFIG, (), 6)
    assert [step.token for step in islice(first, 2)] == [0, 1]
    assert generate(session) == list(range(6))
    with pytest.raises(UsageError, match="this generation is stale"):
        next(first)
    first = session.generate([1, 2], CONFIG, (), 6)
    next(first)
    assert session.ask(op="stats")["event"] == "stats"
    first.close()
    assert session.ask(op="stats")["event"] == "stats"


def test_a_cancel_after_death_is_nothing(child: Any) -> None:
    session = child("token(id, 0); os._exit(3)")
    stream = session.generate([1, 2], CONFIG, (), 6)
    assert next(stream).token == 0
    process = session._process
    assert process is not None
    process.wait()
    session.cancel()
    with pytest.raises(BackendError, match="ended with status 3"):
        next(stream)
    session.cancel()
    session.close()
    session.cancel()


def test_a_child_that_closes_its_output_does_not_hold_us(
    child: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pocketslm.runtime.backends.runner.GRACE_S", 0.2)
    session = child("token(id, 0); os.close(1); sys.stdin.readline()")
    with pytest.raises(BackendError, match="ended with SIGKILL"):
        generate(session)


def test_a_cancelled_generation_that_never_ends_is_ended(
    child: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pocketslm.runtime.backends.runner.GRACE_S", 0.2)
    session = child("token(id, 0)")
    stream = session.generate([1, 2], CONFIG, (), 6)
    next(stream)
    stream.close()
    assert session.pid is None
    assert session.ask(op="stats")["event"] == "stats"


def test_threads_ask_after_each_other(child: Any) -> None:
    session = child(GOOD)
    with ThreadPoolExecutor(4) as callers:
        found = list(callers.map(lambda _: session.ask(op="stats")["event"], range(80)))
    assert found == ["stats"] * 80
