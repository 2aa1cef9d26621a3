"""What a user installs: every package is in the wheel, and the runtime needs no torch."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def test_every_package_folder_is_listed() -> None:
    top = ("models", "export", "runtime", "profiling", "android")
    found = {"pocketslm", "optimum.commands.register"}
    for name in top:
        for init in (ROOT / name).rglob("__init__.py"):
            found.add(".".join(("pocketslm", *init.parent.relative_to(ROOT).parts)))
    assert set(SETUPTOOLS["packages"]) == found


def test_optimum_carries_our_export(tiny_hf: Path, tmp_path: Path) -> None:
    """`optimum-cli export pocketslm --model ... out/` makes a bundle; its errors are one line."""
    if importlib.util.find_spec("optimum") is None:
        pytest.skip("optimum is not installed")
    command = [sys.executable, "-c", "from optimum.commands.optimum_cli import main; main()"]
    command += ["export", "pocketslm", "--model", str(tiny_hf), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "pocketslm.json").exists()
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "exists already" in again.stderr.splitlines()[-1]


@pytest.mark.real
def test_the_runtime_installs_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    """A new environment with only the `runtime` extra runs a bundle, and has no torch."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "out", "*.egg-info", "tests")
    shutil.copytree(ROOT, source, ignore=ignored)
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    subprocess.run([*pip, f"{source}[runtime]"], check=True)
    code = f"""
import importlib.util, pathlib, pocketslm
assert importlib.util.find_spec("torch") is None
from pocketslm.runtime.ops import build
assert build.library().is_relative_to(pathlib.Path(pocketslm.__file__).parent)
assert not pathlib.Path(pocketslm.__file__).is_relative_to({str(ROOT)!r})
from pocketslm.runtime.model import Model
from pocketslm.runtime.assistant.assistant import sample_document
assert sample_document().exists()
from pocketslm.runtime.config import GenerationConfig
config = GenerationConfig(max_new_tokens=5)
print(len(list(Model.load({str(tiny_bundle)!r}).generate("Hi", config))))
"""
    done = subprocess.run(
        [python, "-I", "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert 1 <= int(done.stdout) <= 5
    script = tmp_path / "env" / "bin" / "pocketslm"
    listed = subprocess.run([script, "fetch", "--list"], capture_output=True, text=True, check=True)
    assert "smollm2-135m-instruct" in listed.stdout
    refused = subprocess.run(
        [script, "export", "smollm2-135m-instruct", "x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2
    assert "is not installed" in refused.stderr
