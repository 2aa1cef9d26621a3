"""Set everything up in a virtual environment and run the demonstration or the tests.

    python3 bootstrap.py demo    fetch, export, summarise and question a document, measure
    python3 bootstrap.py test    format, lint, types, rules of the house, documentation, tests

Needs Python 3.11 or later and nothing else; what it runs, it prints.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
BUNDLE = "out/smollm2"
PACKAGES = ("models", "export", "runtime", "profiling", "android")
MODULES = ("cache", "cli", "errors", "folders", "inspection", "locks", "terminal", "__main__")

DEMO = f"""
pocketslm fetch smollm2-135m-instruct
pocketslm export smollm2-135m-instruct {BUNDLE} --overwrite
pocketslm doc summarize {BUNDLE}
pocketslm doc ask {BUNDLE} "When was Apollo 8 launched?" "Who were the astronauts of Apollo 8?"
pocketslm eval {BUNDLE} --windows 4
pocketslm bench {BUNDLE} -p 512 -n 128 -r 3 --backend native
pocketslm bench {BUNDLE} -p 512 -n 128 -r 3 --backend onnx
"""


def main() -> int:
    if sys.argv[1:] not in (["demo"], ["test"]):
        print(__doc__.strip())
        return 2
    if sys.version_info < (3, 11):  # noqa: UP036 - the reason is what an older one must be told
        print(f"pocketslm needs Python 3.11 or later, this is {sys.version.split()[0]}")
        return 2
    start = time.monotonic()
    try:
        if sys.argv[1] == "demo":
            install("all")
            for line in DEMO.strip().splitlines():
                run(*shlex.split(line))
        else:
            install("dev")
            test()
    except subprocess.CalledProcessError as error:
        print(f"\nfailed with status {error.returncode}: {shlex.join(error.cmd)}", file=sys.stderr)
        return 1
    print(f"\n{sys.argv[1]}: done in {time.monotonic() - start:.0f} s")
    return 0


def install(extra: str) -> None:
    """The package with an extra into ``.venv``, in place: edits count at once."""
    if not PYTHON.exists():
        run(sys.executable, "-m", "venv", str(VENV))
    # The exact torch first: a newer one would bring gigabytes that nobody here uses.
    pip = (str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "torch==2.13.0")
    run(*pip, "--editable", f".[{extra}]")


def test() -> None:
    run("ruff", "format", "--check", ".")
    run("ruff", "check", ".")
    # mypy finds packages by folder name; the package is this folder under another name.
    home = ROOT / "build" / "mypy"
    home.mkdir(parents=True, exist_ok=True)
    link = home / "pocketslm"
    if not link.is_symlink():
        link.symlink_to(ROOT, target_is_directory=True)
    names = [f"-ppocketslm.{name}" for name in PACKAGES]
    names += [f"-mpocketslm.{name}" for name in MODULES]
    run("mypy", "--config-file", str(ROOT / "pyproject.toml"), *names, cwd=home)
    run("python", "tests/house.py")
    # Warnings are errors. The variable silences a notice about future versions of mkdocs.
    run("mkdocs", "build", "--quiet", "--strict", NO_MKDOCS_2_WARNING="1")
    # Two processes: the tests of one file stay together, since they share what is costly to make.
    # PyTorch takes one thread in each: threads of two that wait for each other cost minutes.
    # tests/conftest.py says which files go first.
    command = (
        "pytest",
        "-n",
        "2",
        "--dist",
        "loadfile",
        "--no-loadscope-reorder",
        "--durations=10",
    )
    run(*command, OMP_NUM_THREADS="1")


def run(*command: str, cwd: Path = ROOT, **environment: str) -> None:
    print(f"$ {shlex.join(command)}", flush=True)
    path = f"{VENV / 'bin'}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, check=True, cwd=cwd, env=os.environ | {"PATH": path, **environment})


if __name__ == "__main__":
    sys.exit(main())
