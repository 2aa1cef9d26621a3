"""Small widgets in one visual language; their looks are in ``widgets.kv``."""

from __future__ import annotations

from pathlib import Path

from kivy.core.text import LabelBase
from kivy.lang import Builder

from pocketslm.android.widgets import basics, icon, sheet, text

__all__ = ["basics", "icon", "sheet", "text"]

_FONTS = Path(__file__).resolve().parent.parent / "fonts"
LabelBase.register(
    "DejaVu", str(_FONTS / "DejaVuSans.ttf"), fn_bold=str(_FONTS / "DejaVuSans-Bold.ttf")
)
Builder.load_file(str(Path(__file__).with_name("widgets.kv")))
