"""The engines that come as AARs, with stand-ins for their Java classes: what crosses the border.

The stand-ins have the methods that are called, with the types of the real ones; no phone and no
real model is in this test.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def test_engines_over_java(tiny_bundle: Path, tmp_path: Path) -> None:
    if shutil.which("javac") is None or importlib.util.find_spec("jnius") is None:
        pytest.skip("needs a JDK (apt-get install default-jdk-headless) and pyjnius")
    sources = [str(path) for path in (HERE / "java").rglob("*.java")]
    classes = tmp_path / "classes"
    subprocess.run(["javac", "-Xlint:all", "-d", str(classes), *sources], check=True)
    script = [sys.executable, str(HERE / "java_engines.py"), str(classes)]
    done = subprocess.run(
        [*script, str(tiny_bundle / "model.onnx"), str(tiny_bundle)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "both"
