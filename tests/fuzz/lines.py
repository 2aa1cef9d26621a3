"""Which lines the inputs reach: of Python by `coverage`, of C++ by gcov."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from pocketslm.runtime.ops import build

from . import campaign, native
from .worker import TARGETS

# The runner ends without the functions that are called at an end, gcov's among them.
_DUMP = """
extern "C" void __gcov_dump(void);
extern "C" [[noreturn]] void __real__Exit(int);
extern "C" [[noreturn]] void __wrap__Exit(int status) {
  __gcov_dump();
  __real__Exit(status);
}
"""
Lines = dict[str, dict[int, bool]]  # file -> line -> whether it was reached


def measure(state: Path, names: list[str], inputs: int) -> str:
    """Feed so many inputs to each target; a table of the files that they are for."""
    state.mkdir(parents=True, exist_ok=True)
    campaign.prepare(state)
    found: Lines = defaultdict(dict)
    with tempfile.TemporaryDirectory(prefix="lines") as folder:
        compiled = [name for name in names if TARGETS[name].sanitized]
        if compiled:
            _merge(found, _of_native(state, compiled, inputs, Path(folder)))
        for name in names:
            if not TARGETS[name].sanitized:
                _merge(found, _of_python(state, name, inputs, Path(folder)))
    return _table(found)


def _merge(found: Lines, more: Lines) -> None:
    for file, reached in more.items():
        for line, was in reached.items():
            found[file][line] = found[file].get(line, False) or was


def _work(
    state: Path, name: str, inputs: int, folder: Path, prefix: list[str], **more: str
) -> None:
    """Run a worker over a first run's inputs, with the programs of ``folder`` if it has any."""
    home = folder / "home" if (folder / "home").exists() else state / "home"
    arguments = [str(home), str(folder / "found"), str(folder / "current")]
    command = [*prefix, name, *arguments, "0", "1e9", str(inputs), str(folder / "result")]
    environment = campaign.environment(state, name) | more
    subprocess.run(command, env=environment, cwd=campaign.ROOT, check=True)


def _of_python(state: Path, name: str, inputs: int, folder: Path) -> Lines:
    covers = [str(campaign.ROOT / pattern) for pattern in TARGETS[name].covers]
    data, report = folder / "coverage", folder / "report.json"
    tool = [sys.executable, "-m", "coverage"]
    run = [*tool, "run", f"--data-file={data}", f"--include={','.join(covers)}"]
    _work(state, name, inputs, folder, [*run, "-m", "tests.fuzz.worker"])
    export = [*tool, "json", "-q", f"--data-file={data}", "-o", str(report)]
    subprocess.run(export, cwd=campaign.ROOT, check=True)
    files = json.loads(report.read_text())["files"]
    return {
        file: dict.fromkeys(one["executed_lines"], True)
        | dict.fromkeys(one["missing_lines"], False)
        for file, one in files.items()
    }


def _of_native(state: Path, names: list[str], inputs: int, folder: Path) -> Lines:
    """With a library and a runner of their own, since one is compiled for the other purpose."""
    home = folder / "home"
    home.mkdir()
    for path in (state / "home").iterdir():
        if path.is_dir():
            (home / path.name).symlink_to(path)
    objects, dump = folder / "objects", folder / "dump.cpp"
    dump.write_text(_DUMP)
    flags = ["--coverage", "-fprofile-update=atomic", "-O1"]
    toolchain = build.find_toolchain()
    library = (*build.COMMON, *build.TEXT)
    runner = (*library, *(f"runner/{name}" for name in build.RUNNER))
    of_runner = {issubclass(TARGETS[name], native.OfRunner) for name in names}
    for is_runner, output, units, link in (
        (False, "libpocketslm.so", library, ["-shared", "--coverage"]),
        (True, "pocketslm-run", runner, ["--coverage", "-Wl,--wrap=_Exit", str(dump)]),
    ):
        if is_runner not in of_runner:
            continue
        build.compile_and_link(home / output, toolchain, units, flags, link, keep=objects / output)
    more = {"POCKETSLM_LIBRARY": str(home / "libpocketslm.so"), "LD_PRELOAD": ""}
    for name in names:
        _work(state, name, inputs, folder, [sys.executable, "-m", "tests.fuzz.worker"], **more)
    found: Lines = defaultdict(dict)
    for path in sorted(objects.rglob("*.gcda")):
        done = subprocess.run(
            ["gcov", "--json-format", "--stdout", str(path)],
            capture_output=True,
            check=True,
            cwd=path.parent,
        )
        for text in done.stdout.splitlines():
            for file in json.loads(text)["files"]:
                name = os.path.relpath(file["file"], campaign.ROOT)
                if name.startswith("runtime/ops"):
                    counts = {one["line_number"]: one["count"] > 0 for one in file["lines"]}
                    _merge(found, {name: counts})
    return found


def _table(found: Lines) -> str:
    rows = [(file, sum(one.values()), len(one)) for file, one in sorted(found.items()) if one]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    head = f"{'file':48}{'reached':>8}{'of':>7}{'share':>7}"
    return "\n".join(
        [head, *(f"{file:48}{reached:>8}{of:>7}{reached / of:>7.0%}" for file, reached, of in rows)]
    )
