"""The screens; each is a class and a .kv file of its name."""

from __future__ import annotations

from pathlib import Path

from kivy.lang import Builder

from pocketslm.android.screens.document import DocumentScreen
from pocketslm.android.screens.library import LibraryScreen
from pocketslm.android.screens.models import ModelsScreen
from pocketslm.android.screens.settings import SettingsScreen

__all__ = ["DocumentScreen", "LibraryScreen", "ModelsScreen", "SettingsScreen"]

for _name in ("library", "document", "models", "settings"):
    Builder.load_file(str(Path(__file__).with_name(f"{_name}.kv")))
