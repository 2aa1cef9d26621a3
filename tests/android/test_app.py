"""The app in a real window, used as a person uses it, with the real model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

WALK = Path(__file__).with_name("walk.py")
SECONDS = 900  # until a walk counts as stuck; nothing is timed


@pytest.mark.real
def test_a_person_goes_through_every_screen(smollm2_bundle: Path) -> None:
    """Documents, models, answers, stop, actions, languages, engines, rotation, removal."""
    run = shutil.which("xvfb-run")
    if run is None:
        pytest.skip("needs a virtual screen: apt-get install xvfb libgl1-mesa-dri libgl1 libmtdev1")
    pytest.importorskip("kivy", reason="needs the app extra")
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    python = [sys.executable]
    # The screens run in this process alone, so its lines count, too: as if it were one of
    # pytest-xdist's. Left in the environment, slipcover would remove the folder at its end.
    if counted := environment.pop("SLIPCOVER_COVERAGE_DIR", None):
        python += ["-m", "slipcover", "--json", "--out", f"{counted}/coverage-gw-app.json"]
    done = subprocess.run(
        [run, "-a", "-s", "-screen 0 1280x1024x24", *python, str(WALK), str(smollm2_bundle)],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert done.stdout.split()[-1] == "removing"
