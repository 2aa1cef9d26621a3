"""Programs and models that several tests of the native operators share; each is built once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fuzz import seeds

from pocketslm.runtime.ops import build


@pytest.fixture(scope="session")
def runner_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.build_runner(tmp_path_factory.mktemp("runner") / "pocketslm-run")


@pytest.fixture(scope="session")
def arm_runner_path() -> Path:
    """The runner as a phone executes it; skips where it cannot be built or run here."""
    if shutil.which("qemu-aarch64-static") is None:
        pytest.skip("needs qemu-user-static")
    try:
        build.find_toolchain("aarch64-linux")
    except build.BuildError as error:
        pytest.skip(str(error))
    return build.runner("aarch64-linux")


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with every kind of weight, the byte tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("chat") / "model.slm"
    seeds.chat_model(path)
    return path
