"""One model, many callers: threads, generators that interleave, forks, and threads that fail."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import callers
import numpy as np
import pytest
from native_support import tiny_config, write_tiny

from pocketslm.errors import UsageError
from pocketslm.runtime.backends.native import NativeModel, NativeSession
from pocketslm.runtime.backends.native_library import ErrorText
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model

CALLERS, ROUNDS = 8, 6
BACKENDS = ["native", "onnx", "runner"]
GREEDY = GenerationConfig(max_new_tokens=12, ignore_eos=True)
HANG_S = 120
STALE = "this generation is stale"
BUSY = 7


@pytest.fixture(params=BACKENDS)
def model(request: pytest.FixtureRequest, tiny_bundle: Path) -> Model:
    return Model.load(tiny_bundle, request.param, threads=2)


def prompt(caller: int) -> list[int]:
    return [1, 2, 3, *range(10 + 20 * caller, 20 + 20 * caller)]


def tokens(model: Model, ids: list[int], config: GenerationConfig = GREEDY) -> list[int]:
    return [record.token for record in model.generate(ids, config)]


def test_threads_get_what_they_would_get_alone(model: Model) -> None:
    assert not callers.differing(model, CALLERS, ROUNDS, adapters=False)


@pytest.mark.parametrize("parallel", [1, 3])
def test_threads_with_adapters_of_their_own(parallel: int, tmp_path: Path) -> None:
    with Model.load(callers.bundle(tmp_path), "native", threads=2, parallel=parallel) as model:
        assert not callers.differing(model, CALLERS, ROUNDS, adapters=True)


def test_an_answer_that_differs_is_found(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = callers.GREEDY.but(do_sample=True, top_k=0, temperature=9.0)
    monkeypatch.setattr(callers, "CONFIGS", [drawn])
    with Model.load(tiny_bundle, "native", threads=1) as model:
        assert callers.differing(model, 2, 3, adapters=False).total() == 6


INTERRUPTIONS: dict[str, Callable[[Model], object]] = {
    "a generation": lambda model: tokens(model, prompt(1)),
    "the beginning of one": lambda model: next(model.generate(prompt(1), GREEDY)),
    "logits": lambda model: model.engine.logits(prompt(1)),
    "probabilities": lambda model: model.logprobs(prompt(1), prompt(2)),
    "a sampled one": lambda model: tokens(model, prompt(1), GREEDY.but(do_sample=True, min_p=0.1)),
}


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
def test_an_unfinished_generation_is_stale_after_another_use(
    model: Model, interruption: str
) -> None:
    expected = tokens(model, prompt(0))
    first = model.generate(prompt(0), GREEDY)
    assert [next(first).token for _ in range(3)] == expected[:3]
    INTERRUPTIONS[interruption](model)
    with pytest.raises(UsageError, match=STALE):
        next(first)
    assert list(first) == []
    assert tokens(model, prompt(0)) == expected


def test_interleaved_generations_never_mix(model: Model) -> None:
    alone = [tokens(model, prompt(0)), tokens(model, prompt(1))]
    first, second = model.generate(prompt(0), GREEDY), model.generate(prompt(1), GREEDY)
    assert next(first).token == alone[0][0]
    assert next(second).token == alone[1][0]
    with pytest.raises(UsageError, match=STALE):
        next(first)
    assert [record.token for record in second] == alone[1][1:]


def test_another_adapter_makes_it_stale(tiny_bundle: Path) -> None:
    model = Model.load(tiny_bundle, "native", threads=1)
    first = model.generate(prompt(0), GREEDY)
    next(first)
    model.use_adapter(None)
    with pytest.raises(UsageError, match=STALE):
        next(first)


@pytest.mark.parametrize("length", [1, 12])
def test_who_waits_goes_on_when_a_generation_ends(model: Model, length: int) -> None:
    """Its last record was read and nothing more, or its reader closes it."""
    expected = tokens(model, prompt(1))
    held = model.generate(prompt(0), GREEDY.but(max_new_tokens=length))
    next(held)
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(tokens, model, prompt(1))
        if length > 1:
            held.close()  # type: ignore[attr-defined]
        assert waiting.result(HANG_S) == expected


def test_a_thread_that_did_not_begin_it_may_end_it(model: Model) -> None:
    expected = tokens(model, prompt(0))
    stream = model.generate(prompt(0), GREEDY)
    begun = [next(stream).token]
    with ThreadPoolExecutor(1) as other:
        begun += other.submit(lambda: [record.token for record in stream]).result(HANG_S)
    assert begun == expected


# A native session by itself.


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> NativeModel:
    path = tmp_path_factory.mktemp("native") / "model.slm"
    write_tiny(path, tiny_config())
    return NativeModel(path)


def test_calls_of_threads_come_after_each_other(native: NativeModel) -> None:
    session = native.session(threads=2)
    calls = 40

    def step(at: int) -> int:
        session.forward_top(np.array([at % 100]), 3)
        session.forward(np.array([at % 100]))
        return session.step_greedy(at % 100)

    with ThreadPoolExecutor(CALLERS) as pool:
        found = list(pool.map(step, range(calls)))
    assert session.length == 3 * calls
    assert all(0 <= token < 100 for token in found)


def test_a_closed_session_is_an_error(native: NativeModel) -> None:
    session = native.session(threads=2)
    session.close()
    session.close()
    for call in (lambda: session.forward(np.array([1])), lambda: session.step_greedy(1)):
        with pytest.raises(UsageError, match="session was closed"):
            call()


def raw_forward(session: NativeSession, ids: np.ndarray, out: np.ndarray) -> int:
    """Through the C border, past the lock of the Python session."""
    error = ErrorText()
    return session._library.pslm_forward(
        session._shared.handle,
        ids.ctypes.data,
        ids.size,
        1,
        out.ctypes.data,
        out.size,
        error.argument,
    )


def test_the_c_border_tells_a_second_thread_that_a_session_is_busy(native: NativeModel) -> None:
    session = native.session(threads=1)
    library, handle = session._library, session._shared.handle
    ids = np.arange(600, dtype=np.int32) % 100
    found: list[int] = []
    done = threading.Event()

    def intrude() -> None:
        out, best = np.empty(100, np.float32), ctypes.c_int32()
        while not done.is_set():
            found.append(raw_forward(session, ids[:1], out))
            found.append(
                library.pslm_step_greedy(handle, 1, ctypes.byref(best), ErrorText().argument)
            )
            found.append(library.pslm_truncate(handle, 0))

    intruder = threading.Thread(target=intrude)
    intruder.start()
    try:
        out = np.empty(100, np.float32)
        for _ in range(500):
            found.append(raw_forward(session, ids, out))
            found.append(library.pslm_truncate(handle, 0))
            if found.count(BUSY) > 20:
                break
    finally:
        done.set()
        intruder.join()
    # 4: the context is full, which a call that found its turn may tell.
    assert set(found) <= {0, 1, 4, BUSY}
    assert BUSY in found
    session.truncate(0)
    expected = native.session(threads=1).forward(ids)
    np.testing.assert_array_equal(session.forward(ids), expected)


def run(code: str, *arguments: str) -> str:
    """What another Python prints; a hang is a failure."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_fork_is_told_and_does_not_wait_for_threads_it_has_not(
    native: NativeModel, tmp_path: Path
) -> None:
    code = """
import os, sys
import numpy as np
from pocketslm.errors import BackendError
from pocketslm.runtime.backends.native import NativeModel
model = NativeModel(sys.argv[1])
session, alone = model.session(threads=2), model.session(threads=1)
expected = session.forward(np.arange(9))
child = os.fork()
if child == 0:
    try:
        session.forward(np.arange(3))
    except BackendError as error:
        np.testing.assert_array_equal(alone.forward(np.arange(9)), expected)
        own = model.session(threads=2)
        np.testing.assert_array_equal(own.forward(np.arange(9)), expected)
        print("child:", error, flush=True)
        session.close()  # frees nothing, and ends
        sys.exit(0)
    sys.exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
session.truncate(0)
np.testing.assert_array_equal(session.forward(np.arange(9)), expected)
print("parent: fine")
"""
    path = tmp_path / "model.slm"
    write_tiny(path, tiny_config())
    lines = run(code, str(path)).splitlines()
    assert lines == [
        "child: this session's threads stayed behind in a fork; open one in this process",
        "parent: fine",
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fork_amid_another_thread_s_generation(backend: str, tiny_bundle: Path) -> None:
    """Its locks are held by nobody in the new process, and a child process stays the parent's."""
    code = """
import os, sys, threading
from pocketslm.errors import BackendError
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model
model = Model.load(sys.argv[1], sys.argv[2], threads=2)
config = GenerationConfig(max_new_tokens=8, ignore_eos=True)
def tokens():
    return [record.token for record in model.generate([1, 2, 3], config)]
expected = tokens()
begun, go_on = threading.Event(), threading.Event()
found = []
def generate():
    stream = model.generate([1, 2, 3], config)
    found.append(next(stream).token)
    begun.set()
    go_on.wait()
    found.extend(record.token for record in stream)
thread = threading.Thread(target=generate)
thread.start()
begun.wait()
child = os.fork()
if child == 0:
    try:
        assert tokens() == expected
        print("child: an answer", flush=True)
    except BackendError as error:
        print("child:", error, flush=True)
    os._exit(0)  # as multiprocessing does: other libraries' threads are not there to end
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
go_on.set()
thread.join()
assert found == expected
print("parent: an answer")
"""
    child, parent = run(code, str(tiny_bundle), backend).splitlines()
    assert parent == "parent: an answer"
    expected = "an answer" if backend == "runner" else "this session's threads stayed behind"
    assert child.startswith(f"child: {expected}")


def test_threads_that_cannot_start_are_an_error_and_leave_none_behind(tmp_path: Path) -> None:
    """Some can, and the next cannot: each thread takes a stack of the address space."""
    code = """
import os, resource, sys, threading
from pocketslm.errors import BackendError
from pocketslm.runtime.backends.native import NativeModel
model = NativeModel(sys.argv[1])
model.session(threads=2)  # whatever loads lazily
threads = len(os.listdir("/proc/self/task"))
pages = int(open("/proc/self/statm").read().split()[0])
used = pages * resource.getpagesize()
_, most = resource.getrlimit(resource.RLIMIT_AS)
for more in (20, 60, 100, 300):
    resource.setrlimit(resource.RLIMIT_AS, (used + (more << 20), most))
    try:
        model.session(threads=64)
    except BackendError as error:
        print(error)
    assert len(os.listdir("/proc/self/task")) == threads
resource.setrlimit(resource.RLIMIT_AS, (most, most))
assert model.session(threads=3).threads == 3
"""
    path = tmp_path / "model.slm"
    write_tiny(path, tiny_config())
    found = run(code, str(path)).splitlines()
    assert len(found) == 4
    assert all("cannot start threads" in line or "out of memory" in line for line in found)
    assert any("cannot start threads" in line for line in found)
