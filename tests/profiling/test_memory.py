"""What the system says about this process and machine."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from pocketslm.profiling.machine import software, this_machine
from pocketslm.profiling.memory import Memory, parse_status

STATUS = (
    "Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t 1024 kB\nRssAnon:\t 512 kB\nRssFile:\t 8 kB\n"
)
MIB = 1 << 20
# Linux counts pages in batches for each processor, so its figures are off by some of them.
SLACK = 4 * MIB


def test_parse_status() -> None:
    assert parse_status(STATUS) == Memory(2 * MIB, MIB // 2, 8 * 1024)
    older = "VmHWM:\t    2048 kB\nVmRSS:\t 1024 kB\n"
    assert parse_status(older) == Memory(2 * MIB)


def test_peak_grows_and_stays() -> None:
    peaks = in_child(f"""
peaks = [memory().peak_rss_bytes]
touched = np.ones({64 * MIB}, np.uint8)
peaks.append(memory().peak_rss_bytes)
del touched
peaks.append(memory().peak_rss_bytes)
print(*peaks)
""")
    before, during, after = peaks
    assert during - before > 64 * MIB - SLACK
    assert abs(after - during) < SLACK


def test_without_proc() -> None:
    """getrusage counts the parent too, but it is never below the truth, nor off by its unit."""
    told, truth = in_child("""
from pathlib import Path
from pocketslm.profiling import memory as module
truth = memory().peak_rss_bytes
module._STATUS = Path("absent")
assert memory().rss_anon_bytes is None
print(memory().peak_rss_bytes, truth)
""")
    assert truth - SLACK < told < 512 * truth


def test_a_child_does_not_report_its_parent() -> None:
    held = np.ones(256 * MIB, np.uint8)
    (peak,) = in_child("print(memory().peak_rss_bytes)")
    assert MIB < peak < held.nbytes


def in_child(code: str) -> list[int]:
    """The integers that ``code`` prints in a process that has not been large before."""
    code = f"import numpy as np\nfrom pocketslm.profiling.memory import memory\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def test_machine() -> None:
    machine = this_machine()
    assert machine.cpu
    assert machine.cores >= 1
    assert machine.ram_bytes > 64 * MIB
    assert {"python", "numpy"} <= software().keys()
