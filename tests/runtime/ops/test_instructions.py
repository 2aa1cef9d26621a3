"""Counting the instructions of the aarch64 build under qemu."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pocketslm.errors import BackendError
from pocketslm.runtime.ops import instructions


def test_paths_cost_fewer_instructions_the_more_the_cpu_has(
    arm_runner_path: Path, chat_model: Path, tmp_path: Path
) -> None:
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("needs qemu-user")
    plugin = instructions.build_plugin(tmp_path / "qemu_count.so")
    counts = {
        isa: instructions.per_token(arm_runner_path, plugin, chat_model, isa, 4)
        for isa in instructions.PATHS
    }
    assert counts["neon_i8mm"] == pytest.approx(counts["neon_dotprod"], rel=0.02)  # one row
    assert 0 < 2 * counts["neon_dotprod"] < counts["scalar"]
    with pytest.raises(BackendError, match="kernel path"):
        instructions.count(arm_runner_path, plugin, chat_model, "avx2", 1)
