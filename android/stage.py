"""Puts together what a phone runs: ``main.py`` and the part of the package that it needs.

    python -m pocketslm.android.stage [FOLDER]

buildozer packs the folder (``build/android``), see ``buildozer.spec``.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = ROOT / "build" / "android"
# Of the package: these files and folders, but for what only a computer uses.
PARTS = (
    *("__init__.py", "collector.py", "errors.py", "folders.py", "locks.py", "schema.py", "LICENSE"),
    *("runtime", "android"),
    *("models/__init__.py", "models/config.py"),
)
WITHOUT = (
    *("android/recipes", "android/manifest", "android/java", "android/cli.py"),
    *("android/stage.py", "android/check.py", "runtime/cli.py", "runtime/assistant/cli.py"),
    *("runtime/server", "runtime/assistant/readers/wikipedia.py"),
)
ENDINGS = {".py", ".kv", ".json", ".txt", ".ttf", ".def"}
MAIN = '''"""Where python-for-android starts the app."""

from pocketslm.android.main import run

run()
'''


def stage(folder: Path = DEFAULT) -> Path:
    """Write the folder anew; returns it."""
    shutil.rmtree(folder, ignore_errors=True)
    for path in files():
        target = folder / "pocketslm" / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    (folder / "main.py").write_text(MAIN, encoding="utf-8")
    return folder


def files() -> Iterator[Path]:
    """What goes along; no native sources, no caches."""
    for part in PARTS:
        top = ROOT / part
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            name = path.relative_to(ROOT).as_posix()
            left_out = any(name == w or name.startswith(f"{w}/") for w in WITHOUT)
            keeps = path.suffix in ENDINGS or path.name == "LICENSE"
            if path.is_file() and keeps and not left_out and "__pycache__" not in name:
                yield path


if __name__ == "__main__":
    print(stage(Path(sys.argv[1]) if sys.argv[1:] else DEFAULT))
