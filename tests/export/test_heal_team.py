"""Healing in two processes: as one process does it, also when one of them was killed between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import heal_team
import numpy as np
import pytest

import support
from pocketslm.errors import UsageError
from pocketslm.export.heal import HealConfig, heal, heal_folder
from pocketslm.export.team import Team, alone, joined
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.models.reference import parameter_shapes

# Halves of a batch are summed in another order; Adam then divides by what may be hardly a number.
MAX_WEIGHT_ERROR = 2e-4
MAX_KL_ERROR = 1e-5


def test_two_processes_end_where_one_does(tiny_hf: Path, tmp_path: Path) -> None:
    student, teacher = open_checkpoint(support.write_hf(tmp_path / "s", seed=1)), tiny_hf
    text = tmp_path / "text.txt"
    text.write_text("the rain in spain stays mainly in the plain. " * 20)
    script = [sys.executable, heal_team.__file__, student.path, teacher, text, tmp_path]
    # Threads of OpenMP do not outlive a fork.
    alone_ = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        list(map(str, script)), env=alone_, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["killed"] == [2, -9]
    assert told["stopped"][0].splitlines()[-1].startswith("pocketslm: error: another process of")
    assert "Traceback" not in told["stopped"][0]
    assert told["whole"] == [0, 0]
    assert "in 2 processes" in told["said"][0]
    assert told["said"][1] == ""  # one alone tells
    config = HealConfig(
        steps=heal_team.STEPS, batch=4, sequence=16, learning_rate=1e-3, hidden=True
    )
    heal_folder(student, open_checkpoint(teacher), text, tmp_path / "one", config)
    one, two = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "out")
    assert not (tmp_path / ".out.healing").exists()
    moved = 0.0
    for name in parameter_shapes(one.config):
        a, b = np.asarray(one.weight(name)), np.asarray(two.weight(name))
        assert np.abs(a - b).max() <= MAX_WEIGHT_ERROR, name
        moved = max(moved, float(np.abs(a - np.asarray(student.weight(name))).max()))
    assert moved > 50 * MAX_WEIGHT_ERROR


def test_a_batch_is_shared_evenly_or_refused(tiny_hf: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_hf)
    three = Team(0, 3, alone().device)
    with pytest.raises(UsageError, match="give --batch a multiple of 3"):
        heal(checkpoint, checkpoint, np.arange(99), tmp_path, HealConfig(), team=three)


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="start with `torchrun`"), joined():
        pass
