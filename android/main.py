"""Starts the app, on a phone and on a desktop."""

from __future__ import annotations

import os
from pathlib import Path


def run(
    data: Path | None = None, model: Path | None = None, size: tuple[int, int] = (412, 860)
) -> None:
    """Open the window and return when it is closed."""
    os.environ.setdefault("KIVY_NO_ARGS", "1")
    os.environ.setdefault("KIVY_LOG_MODE", "PYTHON")  # else it takes standard error for itself
    from kivy.config import Config

    Config.set("graphics", "width", str(size[0]))
    Config.set("graphics", "height", str(size[1]))
    Config.set("graphics", "multisamples", "4")
    Config.set("input", "mouse", "mouse,disable_multitouch")
    Config.set("kivy", "exit_on_escape", "0")
    from pocketslm.android.app import PocketApp

    app = PocketApp(data)
    if model is not None:
        *_, name = app.models.import_bundle(model)
        app.settings["model"] = name
    app.run()


if __name__ == "__main__":
    run()
