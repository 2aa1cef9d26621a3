"""What the system around the app offers: Android's, or what stands in for it on a desktop."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from pocketslm.android.intents import Action

OnFile = Callable[[Path], None]


class Phone(Protocol):
    """The system. ``is_phone`` says whether actions really happen."""

    is_phone: bool

    def data_folder(self) -> Path:
        """Where the app keeps its library, models and settings."""
        ...

    def choices(self) -> dict[str, str]:
        """The system's language and theme, as far as they are known: settings begin with them."""
        ...

    def pick(self, kind: str, title: str, endings: tuple[str, ...], chosen: OnFile) -> None:
        """Let the person choose a file; ``kind``: "document" or "model"."""
        ...

    def do(self, action: Action) -> None:
        """Carry out an action that the person has confirmed."""
        ...

    def watch(self, opened: OnFile, describe: Callable[[], list[Any]]) -> None:
        """Hand over documents that other apps open or share with this one, now and later, and let
        a screen reader ask what is on the screen."""
        ...


def this_system() -> Phone:
    if hasattr(sys, "getandroidapilevel"):
        from pocketslm.android.phone.android import Android

        return Android()
    from pocketslm.android.phone.desktop import Desktop

    return Desktop()
