"""Two processes that heal as ``torchrun`` starts them, forked from one that has imported torch.

    python tests/heal_team.py STUDENT TEACHER TEXT FOLDER

kills one of two in the middle, starts them again, and prints what they said and ended with.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch._dynamo
import torch.distributed.nn  # noqa: F401

from pocketslm import cli
from pocketslm.export import heal

STEPS = 30  # a checkpoint after 25


def main() -> None:
    student, teacher, text, folder = sys.argv[1:]
    out = Path(folder, "out")
    command = ["heal", student, str(out), "--teacher", teacher, "--text", text, "--hidden"]
    command += ["--held-out", "0", "--steps", str(STEPS), "--batch", "4", "--sequence", "16"]
    command += ["--learning-rate", "0.001"]
    children = start(command, Path(folder))
    state = out.with_name(f".{out.name}.healing") / heal.STATE
    while not state.exists():
        time.sleep(0.01)
    os.kill(children[1], signal.SIGKILL)
    killed = [ended(child) for child in children]
    assert state.exists(), "it was over before one was killed"
    stopped = [Path(folder, f"said-{rank}").read_text() for rank in (0, 1)]
    whole = [ended(child) for child in start(command, Path(folder))]
    said = [Path(folder, f"said-{rank}").read_text() for rank in (0, 1)]
    print(json.dumps({"killed": killed, "stopped": stopped, "whole": whole, "said": said}))


def start(command: list[str], folder: Path) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in place.items()}
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            written = os.open(folder / f"said-{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(written, 1)
            os.dup2(written, 2)
            status = 1
            try:
                status = cli.main(command)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    return children


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    main()
