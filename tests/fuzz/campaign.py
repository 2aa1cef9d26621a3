"""Fuzz every reader of foreign files, protocol and model file; totals add up over runs."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pocketslm.runtime.ops import build, built

from . import seeds, worker
from .worker import TARGETS

ROOT = Path(__file__).parents[2]
STATE = ROOT / "build" / "fuzz"
SANITIZERS = "address,undefined"
_HANG = 300.0  # seconds without an end, on a busy machine
Totals = dict[str, dict[str, Any]]


def prepare(state: Path) -> None:
    """Build what the targets need: seeds, and the library and the runner under sanitizers."""
    home = state / "home"
    stamp = home / "made"
    version = built.source_hash()
    if stamp.is_file() and stamp.read_text() == version:
        return
    seeds.make(home)
    build.build_runner(home / "pocketslm-run", sanitize=SANITIZERS)
    build.build_library(home, sanitize=SANITIZERS).rename(home / "libpocketslm.so")
    stamp.write_text(version)


def environment(state: Path, name: str) -> dict[str, str]:
    """Of a worker: the library, with its sanitizers where the target needs them."""
    found = os.environ | {"POCKETSLM_CACHE": str(state / "cache"), "OMP_NUM_THREADS": "1"}
    found["PYTHONPATH"] = str(ROOT)
    if name == "command":
        found.pop("POCKETSLM_CACHE")  # where the catalog's texts are
    if not TARGETS[name].sanitized:
        found["POCKETSLM_LIBRARY"] = str(build.library())  # the fresh cache has none
    else:
        # The second one, whose exceptions the first watches, before the library brings it.
        preload = [_of_compiler("libasan.so"), _of_compiler("libstdc++.so")]
        found |= {
            "LD_PRELOAD": " ".join(preload),
            # Python itself leaks; the runner, which is a program of its own, is held to account.
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "POCKETSLM_LIBRARY": str(state / "home" / "libpocketslm.so"),
        }
        if issubclass(TARGETS[name], worker.native.OfRunner):
            del found["LD_PRELOAD"], found["ASAN_OPTIONS"]
    return found


def _of_compiler(name: str) -> str:
    command = [*build.find_toolchain().command, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def one(
    state: Path, name: str, seed: int, *, seconds: float = 1e9, limit: int = 10**12
) -> dict[str, Any]:
    """Run a worker; its counts, with a finding where the process ended or hung."""
    with tempfile.TemporaryDirectory(prefix="fuzz") as scratch:
        current, result = Path(scratch) / "current", Path(scratch) / "result"
        report = Path(scratch) / "report"
        command = [sys.executable, "-m", "tests.fuzz.worker", name, str(state / "home")]
        command += [
            str(state / "findings"),
            str(current),
            str(seed),
            str(seconds),
            str(limit),
            str(result),
        ]
        start = time.monotonic()
        with report.open("wb") as errors:
            process = subprocess.Popen(
                command,
                env=environment(state, name),
                cwd=ROOT,
                stderr=errors,
                start_new_session=True,
            )
            try:
                while process.poll() is None:
                    time.sleep(0.05)
                    if _is_stuck(process.pid, time.monotonic() - start - seconds):
                        os.killpg(process.pid, signal.SIGKILL)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        if result.exists():
            found: dict[str, Any] = json.loads(result.read_text())
            return found
        text = report.read_text("utf-8", "replace")[-20_000:]
        data = worker.current_input(current) if current.exists() else b""
        path = worker.keep(state / "findings", name, data, f"status {process.returncode}\n{text}")
        return {
            "inputs": 0,
            "accepted": 0,
            "seconds": time.monotonic() - start,
            "findings": [str(path)],
        }


def _is_stuck(pid: int, late: float) -> bool:
    return late > _HANG


def run(state: Path, names: list[str], minutes: float, inputs: int | None, turn: float) -> int:
    """Targets in turns until the time is over; 1 where something was found."""
    state.mkdir(parents=True, exist_ok=True)
    prepare(state)
    end = time.monotonic() + minutes * 60
    bad = 0
    while True:
        for name in names:
            left = end - time.monotonic()
            if inputs is None and left <= 0:
                break
            seed = int(read_totals(state).get(name, {}).get("runs", 0))
            limits = {"limit": inputs} if inputs else {"seconds": min(turn, left)}
            counts = one(state, name, seed, **limits)  # type: ignore[arg-type]
            add(state, name, counts)
            found = counts["findings"]
            bad += len(found)
            print(
                f"{name}: {counts['inputs']} inputs, {counts['accepted']} accepted, "
                f"{counts['seconds']:.0f} s, {len(found)} findings",
                *found,
                flush=True,
            )
        if inputs is not None or time.monotonic() >= end:
            break
    print(table(read_totals(state)))
    return 1 if bad else 0


def read_totals(state: Path) -> Totals:
    path = state / "totals.json"
    found: Totals = json.loads(path.read_text()) if path.exists() else {}
    return found


def add(state: Path, name: str, counts: dict[str, Any]) -> None:
    """Add a run to the totals, which others may add to as well."""
    with (state / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        totals = read_totals(state)
        total = totals.setdefault(
            name, {"runs": 0, "inputs": 0, "accepted": 0, "seconds": 0.0, "findings": 0}
        )
        total["runs"] += 1
        for key in ("inputs", "accepted", "seconds"):
            total[key] = round(total[key] + counts[key], 1)
        total["findings"] += len(counts["findings"])
        aside = state / "totals.new"
        aside.write_text(json.dumps(totals, indent=1))
        aside.replace(state / "totals.json")


def table(totals: Totals) -> str:
    """The totals, a target a line."""
    columns = ("inputs", "accepted", "seconds", "findings")
    lines = [f"{'target':14}" + "".join(f"{name:>12}" for name in columns)]
    for name in [*totals, "all"]:
        values = [
            sum(one[key] for one in totals.values()) if name == "all" else totals[name][key]
            for key in columns
        ]
        lines.append(f"{name:14}" + "".join(f"{value:>12,.0f}" for value in values))
    return "\n".join(lines)


def replay(state: Path, path: Path) -> int:
    """Feed one input to the target whose folder it lies in, and say what came of it."""
    prepare(state)
    name = path.parent.name
    command = [sys.executable, "-m", "tests.fuzz.worker", name, str(state / "home"), str(path)]
    return subprocess.run(command, env=environment(state, name), cwd=ROOT, check=False).returncode
