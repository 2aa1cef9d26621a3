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


@pytest.mark.parametrize(("slowness", "expected"), [(1, 0.5), (3, 0.25)])
def test_shares_follow_speed_until_threads_finish_together(
    slowness: int, expected: float, probe: ctypes.CDLL
) -> None:
    """The second thread takes so many times as long, as a little core does.

    The limits leave room for a machine that does other things meanwhile.
    """
    turns = (ctypes.c_uint32 * 2)(2000, 2000 * slowness)
    for _ in range(3):
        found = [ctypes.c_double() for _ in range(3)]
        probe.probe_pool(turns, *map(ctypes.byref, found))
        share, before, after = (one.value for one in found)
        if abs(share - expected) <= 0.08 and (slowness == 1 or after <= before / 2):
            return
    pytest.fail(f"the share is {share}, expected {expected}; waiting {before}, then {after}")
