"""Talk to ``pocketslm-run --json``. Every fuzzing process imports this, so it imports no torch."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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
