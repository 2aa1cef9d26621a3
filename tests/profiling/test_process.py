"""The parent outlives whatever a worker does, and says it in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pocketslm.errors import BackendError, BundleError, PocketSlmError
from pocketslm.profiling.engine import Job
from pocketslm.profiling.process import Worker

JOB = Job("llama.cpp", "model.gguf", "auto", 1, 8, 4, 0, 0, [1, 2, 3, 4])
LOADED = '{"backend": "b", "load_ns": 1, "base_rss_bytes": 2}'
TIMEOUT_S = 60.0


def worker(code: str, timeout_s: float = TIMEOUT_S) -> Worker:
    """A worker whose program is ``code``, which has read the job's line."""
    return Worker(JOB, timeout_s, (sys.executable, "-c", f"import sys\ninput()\n{code}"))


def failure(code: str, timeout_s: float = TIMEOUT_S) -> PocketSlmError:
    with worker(code, timeout_s) as running, pytest.raises(PocketSlmError) as caught:
        running.load()
    assert "\n" not in str(caught.value)
    return caught.value


def test_answers() -> None:
    code = f"""
print('{LOADED}', flush=True)
for count, _ in enumerate(sys.stdin, 1):
    print('{{"sample_ns": %d, "step_ns": [], "peak_rss_bytes": 3,' % count,
          '"rss_anon_bytes": null, "rss_file_bytes": null}}', flush=True)
"""
    with worker(code) as running:
        assert running.load().base_rss_bytes == 2
        assert [running.run().sample_ns for _ in range(3)] == [1, 2, 3]


def test_crash_carries_the_last_line_of_stderr() -> None:
    error = failure("print('first', file=sys.stderr); raise SystemError('the very reason')")
    assert isinstance(error, BackendError)
    assert "llama.cpp worker for model.gguf ended with status 1" in str(error)
    assert str(error).endswith("SystemError: the very reason")


def test_crash_without_a_word() -> None:
    assert "status 7: it wrote nothing to stderr" in str(failure("sys.exit(7)"))


def test_ending_well_without_an_answer() -> None:
    assert "ended with status 0" in str(failure(""))


def test_crash_after_loading() -> None:
    with worker(f"print('{LOADED}', flush=True); input(); sys.exit('gone')") as running:
        running.load()
        with pytest.raises(BackendError, match="status 1: gone"):
            running.run()
        with pytest.raises(BackendError, match="status 1: gone"):  # a broken pipe, by now
            running.run()


@pytest.mark.parametrize(
    ("name", "hint"), [("SIGSEGV", ""), ("SIGKILL", ", often for want of memory")]
)
def test_killed_by_a_signal(name: str, hint: str) -> None:
    error = failure(f"import os, signal; os.kill(os.getpid(), signal.{name})")
    assert isinstance(error, BackendError)
    assert f"was ended by {name}{hint}: " in str(error)


@pytest.mark.parametrize(
    "answer", ["hello", "{", "[]", "3", "null", '"error"', "{}", '{"sample_ns": 1}', "\\x00"]
)
def test_garbage(answer: str) -> None:
    error = failure(f"print('''{answer}''', flush=True); input()")
    assert isinstance(error, BackendError)
    assert "expected JSON" in str(error)


def test_half_an_answer() -> None:
    assert "ended with status 0" in str(failure(f"print('{LOADED}', end='')"))


def test_typed_errors_come_through() -> None:
    error = failure("""print('{"error": "BundleError", "message": "cut short"}')""")
    assert isinstance(error, BundleError)
    assert str(error) == "cut short"


@pytest.mark.parametrize("name", ["Nonsense", "annotations", "__name__"])
def test_unknown_error_types(name: str) -> None:
    error = failure(f"""print('{{"error": "{name}", "message": "odd"}}')""")
    assert type(error) is BackendError
    assert str(error) == "odd"


def test_timeout() -> None:
    error = failure("import time; time.sleep(600)", timeout_s=0.5)
    assert isinstance(error, BackendError)
    assert "no answer within 0.5 s" in str(error)


def test_a_flood_on_stderr_blocks_nothing() -> None:
    with worker(f"sys.stderr.write('x' * 10_000_000); print('{LOADED}')") as running:
        running.load()


def test_no_process_is_left() -> None:
    with worker(f"print('{LOADED}', flush=True); import time; time.sleep(600)") as running:
        running.load()
        process = running._process
        assert process.poll() is None
    assert process.returncode == -signal.SIGKILL


def test_interrupt_leaves_no_process(tmp_path: Path) -> None:
    """Ctrl-C while waiting for a worker that does not listen to it."""
    pid_file = tmp_path / "pid"
    child = (
        "import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        f"open({str(pid_file)!r}, 'w').write(str(os.getpid()) + '.'); time.sleep(600)"
    )
    code = f"""
import sys
from pocketslm.profiling.engine import Job
from pocketslm.profiling.process import Worker
job = Job("llama.cpp", "m", "auto", 1, 8, 4, 0, 0, [1])
with Worker(job, 600, (sys.executable, "-c", {child!r})) as running:
    running.load()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # A shell's background jobs start with the signal ignored, and CI may be one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until(lambda: pid_file.exists() and pid_file.read_text().endswith("."))
    os.killpg(parent.pid, signal.SIGINT)
    parent.wait(TIMEOUT_S)
    assert parent.returncode != 0
    worker_pid = int(pid_file.read_text().rstrip("."))
    wait_until(lambda: not is_running(worker_pid))


def wait_until(holds: object) -> None:
    assert callable(holds)
    end = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
