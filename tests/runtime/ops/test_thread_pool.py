"""Shares of work among threads of unequal speed."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from pocketslm.runtime.ops import build


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    source = str(Path(__file__).with_name("pool_probe"))
    output = tmp_path_factory.mktemp("probe") / "probe.so"
    toolchain, flags = build.find_toolchain(), ["-shared"]
    build.compile_and_link(output, toolchain, [source, "thread_pool"], [], flags)
    return ctypes.CDLL(str(output))


def test_shares_follow_speed_until_threads_finish_together(probe: ctypes.CDLL) -> None:
    """The second thread takes three times as long for the same work, as a little core does."""
    cost = (ctypes.c_uint32 * 2)(1, 3)
    found = [ctypes.c_double() for _ in range(3)]
    probe.probe_pool(cost, *map(ctypes.byref, found))
    share, before, after = (one.value for one in found)
    assert before == pytest.approx(1 / 3)  # of each thread's time, on average
    assert share == pytest.approx(1 / 4, abs=0.04)
    assert after <= 0.06
