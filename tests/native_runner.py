"""Talk to ``pocketslm-run --json``."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import native_support

from pocketslm.export.lower.native import lower
from pocketslm.export.lower.native_tokenizer import pack_tokenizer
from pocketslm.export.lower.trace import trace


class Runner:
    """A running ``pocketslm-run --json``."""

    def __init__(self, command: list[str]) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [*command, "--json"], stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )

    def send(self, **request: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def event(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            assert self.process.stderr is not None
            raise AssertionError(f"the runner ended: {self.process.stderr.read()[-2000:]}")
        return json.loads(line)

    def ask(self, **request: Any) -> dict[str, Any]:
        self.send(**request)
        return self.event()

    def generate(self, **request: Any) -> tuple[list[int], str, dict[str, Any]]:
        """Tokens, text and the last event."""
        self.send(op="generate", **request)
        tokens, text = [], ""
        while (event := self.event())["event"] == "token":
            tokens.append(event["token"])
            text += event["text"]
        return tokens, text, event


@contextmanager
def running(command: list[str]) -> Iterator[Runner]:
    runner = Runner(command)
    try:
        yield runner
    finally:
        runner.process.kill()
        runner.process.communicate()


@contextmanager
def running_with(runner_path: Path, text: str, folder: Path) -> Iterator[Runner]:
    """The runner with a tiny model that has the tokenizer of `text`, a tokenizer.json."""
    packed, reason = pack_tokenizer(text)
    assert packed is not None, reason
    tokenizer = json.loads(text)
    ids = [*tokenizer["model"]["vocab"].values(), *(t["id"] for t in tokenizer["added_tokens"])]
    config = native_support.tiny_config(vocab_size=1 + max(ids))
    path = folder / "model.slm"
    weights = native_support.tiny_weights(config, lambda _, w: w)
    lower(trace(config, 640), weights, path, tokenizer=packed)
    with running([str(runner_path)]) as runner:
        assert runner.ask(op="load", path=str(path), threads=1, context=300)["tokenizer"]
        yield runner
