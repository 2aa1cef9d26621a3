"""Programs and models that several tests of the native operators share; each is built once."""

from __future__ import annotations

import shutil
from pathlib import Path

import native_support
import pytest

import support
from pocketslm.export.lower.native import lower
from pocketslm.export.lower.native_chat import chat_parts
from pocketslm.export.lower.native_tokenizer import pack_tokenizer
from pocketslm.export.lower.trace import trace
from pocketslm.runtime.ops import build
from pocketslm.runtime.tokenizer import load_tokenizer_files


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
    config = native_support.tiny_config(vocab_size=support.TINY.vocab_size)
    tokenizer, reason = pack_tokenizer(support.tokenizer_files()["tokenizer.json"])
    assert tokenizer is not None, reason
    chat, reason = chat_parts(load_tokenizer_files(support.tokenizer_files()))
    assert not reason
    weights = native_support.tiny_weights(config, native_support.mixed_kinds)
    traced = trace(config, config.max_position_embeddings)
    lower(traced, weights, path, tokenizer=tokenizer, chat=chat)
    return path
