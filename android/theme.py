"""The look: colours of a light and a dark appearance; sizes are in widgets/widgets.kv."""

from __future__ import annotations

from typing import Any

from kivy.event import EventDispatcher
from kivy.properties import ColorProperty

LIGHT = {
    "ground": "#F5F4EF",
    "surface": "#FFFFFF",
    "sunken": "#ECEAE2",
    "ink": "#1D1C1A",
    "muted": "#6A675F",
    "line": "#E1DED4",
    "accent": "#1F6B5C",
    "contrast": "#FFFFFF",
    "soft": "#DDEBE6",
    "mark": "#FFE8A3",
    "danger": "#B0392E",
}
DARK = {
    "ground": "#121412",
    "surface": "#1D201D",
    "sunken": "#272B27",
    "ink": "#ECEAE3",
    "muted": "#A09E95",
    "line": "#313530",
    "accent": "#82CBB8",
    "contrast": "#0D211B",
    "soft": "#223830",
    "mark": "#5C4B14",
    "danger": "#EC8B80",
}


class Theme(EventDispatcher):
    """The colours in use; widgets bind to them, so that a change shows at once."""

    ground = ColorProperty(LIGHT["ground"])
    surface = ColorProperty(LIGHT["surface"])
    sunken = ColorProperty(LIGHT["sunken"])
    ink = ColorProperty(LIGHT["ink"])
    muted = ColorProperty(LIGHT["muted"])
    line = ColorProperty(LIGHT["line"])
    accent = ColorProperty(LIGHT["accent"])
    contrast = ColorProperty(LIGHT["contrast"])
    soft = ColorProperty(LIGHT["soft"])
    mark = ColorProperty(LIGHT["mark"])
    danger = ColorProperty(LIGHT["danger"])

    def use(self, name: str) -> None:
        """ "light" or "dark"."""
        colours: dict[str, Any] = DARK if name == "dark" else LIGHT
        for key, value in colours.items():
            setattr(self, key, value)
