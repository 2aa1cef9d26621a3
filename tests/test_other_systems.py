"""Every module imports, and onnxruntime answers, where Python has nothing that is POSIX's alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model

CODE = """
import builtins, importlib, os, pkgutil, select, signal, sys
import numpy, onnxruntime, tokenizers, torch.distributed.run  # what others need stays

ABSENT = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog", "curses"}
NAMES = {
    os: "sched_getaffinity sched_setaffinity sysconf fork register_at_fork posix_fadvise killpg "
        "setsid mkfifo statvfs getloadavg setpriority",
    select: "poll epoll",
    signal: "SIGKILL SIGSTOP SIGCONT SIGHUP SIGUSR1 SIGALRM setitimer pthread_sigmask",
}
ordinary = builtins.__import__

def import_(name, globals=None, locals=None, fromlist=(), level=0):
    if name.split(".")[0] in ABSENT and (globals or {}).get("__name__", "").startswith("pocketslm"):
        raise ImportError(f"no module {name} on this system")
    return ordinary(name, globals, locals, fromlist, level)

builtins.__import__ = import_
for module, names in NAMES.items():
    for name in names.split():
        delattr(module, name)

import pocketslm
(root,) = pocketslm.__path__
names = ["pocketslm." + one.name for one in pkgutil.iter_modules([root]) if not one.ispkg]
names.remove("pocketslm.setup")
for folder in ("models", "runtime", "export", "profiling"):  # android/ is for phones
    prefix = f"pocketslm.{folder}"
    names += [prefix, *(m.name for m in pkgutil.walk_packages([f"{root}/{folder}"], prefix + "."))]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)

from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model
model = Model.load(sys.argv[1], "onnx")
said = model.generate("the inner", GenerationConfig(max_new_tokens=8))
print(len(names), *(one.token for one in said))
"""


def test_the_package_imports_and_answers_without_posix(tiny_bundle: Path) -> None:
    command = [sys.executable, "-P", "-W", "ignore", "-c", CODE, str(tiny_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    count, *tokens = map(int, done.stdout.split())
    assert count > 100
    model = Model.load(tiny_bundle, "onnx")
    said = model.generate("the inner", GenerationConfig(max_new_tokens=8))
    assert tokens == [one.token for one in said] != []
