"""Set everything up in a virtual environment and run the demonstration or the tests.

    python3 bootstrap.py demo        fetch, export, summarise and question a document, measure
    python3 bootstrap.py test        format, lint, types, rules of the house, documentation, tests

Needs Python 3.11 or later and nothing else; what it runs, it prints.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
IMPORTS = ROOT / "build" / "mypy"  # a folder that holds the package under its own name
BUNDLE = "out/smollm2"
PACKAGES = ("models", "export", "runtime", "profiling", "android")
MODULES = ("cache", "cli", "collector", "errors", "folders", "inspection", "locks", "terminal")
MODULES += ("__main__",)

# What the tests run, as options of runtime/ops/build.py: the library, and the runner, also under
# sanitizers and, by zig, for Arm.
BUILDS = (
    "",
    "--runner --output build/native/run",
    "--runner --sanitize address,undefined --output build/native/run-address",
    "--runner --sanitize thread --output build/native/run-thread",
)
ARM_BUILDS = ("--runner --target aarch64-linux --output build/native/run-arm",)

# Two processes: the tests of one file stay together, since they share what is costly to make.
# PyTorch takes one thread in each: threads of two that wait for each other cost minutes.
# tests/conftest.py says which files go first.
PYTEST = ("pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "--durations=20")

# slipcover counts the lines that the two processes run, and takes a probe out once its line ran.
# pyproject.toml names the files. It is imported before pytest, which says so; warnings are errors.
COVERAGE = ROOT / "build" / "coverage.json"
COUNTING = ("python", "-m", "slipcover", "--json", "--out", str(COVERAGE), "-m")
QUIET = ("-W", "ignore:Module already imported so cannot be rewritten")
LEAST_COVERED = 90.0  # percent of the lines of Python, below which the tests fail
SHOWN = 10  # files of which the most lines did not run

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
            link()
            with compiling() as compiler:
                compiler(sys.executable, BUILDS)
                install("dev")
                compiler(str(PYTHON), ARM_BUILDS)
                test()
    except subprocess.CalledProcessError as error:
        print(f"\nfailed with status {error.returncode}: {shlex.join(error.cmd)}", file=sys.stderr)
        return 1
    except TooFewLines as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    print(f"\n{sys.argv[1]}: done in {time.monotonic() - start:.0f} s")
    return 0


def install(extra: str) -> None:
    """The package with an extra into ``.venv``, in place: edits count at once."""
    if not PYTHON.exists():
        run(sys.executable, "-m", "venv", str(VENV))
    # Python compiles what it imports. To compile all that is installed would take over a minute.
    # Twice quiet: pip 26 shows what setuptools says of every folder without Python files.
    pip = (str(PYTHON), "-m", "pip", "install", "-qq", "--no-compile")
    pip += ("--disable-pip-version-check",)
    # Python 3.11 brings a pip that takes a minute to find versions that fit together.
    run(*pip, "--upgrade", "pip", check=False)
    # This torch: a newer one would bring gigabytes that nobody here uses.
    run(*pip, "torch==2.13.0", "--editable", f".[{extra}]")


def link() -> None:
    """Link this folder as ``pocketslm``: mypy and Python find packages by the folder's name."""
    IMPORTS.mkdir(parents=True, exist_ok=True)
    place = IMPORTS / "pocketslm"
    if not place.is_symlink():
        place.symlink_to(ROOT, target_is_directory=True)


@contextmanager
def compiling() -> Iterator[Callable[[str, tuple[str, ...]], None]]:
    """What compiles while other things run, with what they leave of the cores.

    Compiled objects stay in the cache, where a test that needs them waits for the rest. A build
    that fails, as without sanitizers, is left to the test that needs it.
    """
    with ThreadPoolExecutor(1) as pool:

        def build(python: str, builds: tuple[str, ...]) -> None:
            for options in builds:
                command = ("nice", python, "-m", "pocketslm.runtime.ops.build", *options.split())
                pool.submit(run, *command, check=False, PYTHONPATH=str(IMPORTS))

        try:
            yield build
        finally:
            pool.shutdown(cancel_futures=True)


def test() -> None:
    run("ruff", "format", "--check", ".")
    run("ruff", "check", ".")
    run("python", "tests/house.py")
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(types), pool.submit(site)]:
            done.result()
    run(*COUNTING, *PYTEST, *QUIET, OMP_NUM_THREADS="1")
    coverage()


def types() -> None:
    names = [f"-ppocketslm.{name}" for name in PACKAGES]
    names += [f"-mpocketslm.{name}" for name in MODULES]
    run("mypy", "--config-file", str(ROOT / "pyproject.toml"), *names, cwd=IMPORTS)


def site() -> None:
    # Warnings are errors. The variable silences a notice about future versions of mkdocs.
    run("mkdocs", "build", "--quiet", "--strict", NO_MKDOCS_2_WARNING="1")


class TooFewLines(Exception):
    """The tests run a smaller share of the lines than they should."""


def coverage() -> None:
    """Print the lines that the tests ran; :class:`TooFewLines` where they are too few."""
    counted = json.loads(COVERAGE.read_text(encoding="utf-8"))
    files = sorted(counted["files"].items(), key=lambda one: -len(one[1]["missing_lines"]))
    print("\nlines of Python that did not run, and the share that did:")
    for name, file in files[:SHOWN]:
        share = file["summary"]["percent_covered"]
        print(f"{len(file['missing_lines']):6} {share:6.1f} % {name}")
    total = counted["summary"]
    share, lines = total["percent_covered"], total["covered_lines"] + total["missing_lines"]
    print(f"{total['missing_lines']:6} {share:6.1f} % of {lines} lines in {len(files)} files")
    if not share >= LEAST_COVERED:
        raise TooFewLines(
            f"the tests run {share:.1f} % of the lines of Python, expected {LEAST_COVERED} %; "
            f"test what is new; {COVERAGE.relative_to(ROOT)} names the lines"
        )


def run(*command: str, cwd: Path = ROOT, check: bool = True, **environment: str) -> None:
    print(f"$ {shlex.join(command)}", flush=True)
    # Python shall keep what it compiles: the tests start hundreds of processes.
    path = f"{VENV / 'bin'}{os.pathsep}{os.environ['PATH']}"
    usual = {"PATH": path, "PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run(command, check=check, cwd=cwd, env=os.environ | usual | environment)


if __name__ == "__main__":
    sys.exit(main())
