"""A desktop in place of a phone: files are chosen in the app, actions are only shown."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pocketslm.android.intents import Action
from pocketslm.android.phone import OnFile


class Desktop:
    is_phone = False

    def __init__(self) -> None:
        self.done: list[Action] = []

    def data_folder(self) -> Path:
        base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
        return Path(base) / "pocketslm"

    def choices(self) -> dict[str, str]:
        names = ("LC_ALL", "LC_MESSAGES", "LANG")
        first = next(filter(None, (os.environ.get(name, "") for name in names)), "")
        return {"language": first.partition("_")[0]}

    def pick(self, kind: str, title: str, endings: tuple[str, ...], chosen: OnFile) -> None:
        from pocketslm.android.widgets.sheet import FileSheet

        FileSheet(title, endings, kind == "model", Path.cwd(), chosen).open()

    def do(self, action: Action) -> None:
        self.done.append(action)

    def watch(self, opened: OnFile, describe: Callable[[], list[Any]]) -> None:
        pass
