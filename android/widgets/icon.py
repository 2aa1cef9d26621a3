"""Icons as strokes on a grid of 24, so that no icon font is needed."""

from __future__ import annotations

import math
from itertools import pairwise

from kivy.app import App
from kivy.graphics import Color, InstructionGroup, Line
from kivy.properties import BooleanProperty, ColorProperty, StringProperty
from kivy.uix.widget import Widget


def _arc(x: float, y: float, r: float, start: float = 0, end: float = 360) -> list[float]:
    steps = max(8, int(abs(end - start) / 15))
    angles = [math.radians(start + (end - start) * i / steps) for i in range(steps + 1)]
    return [value for a in angles for value in (x + r * math.cos(a), y + r * math.sin(a))]


# Strokes as x, y, x, y ...; y grows upwards.
STROKES: dict[str, list[list[float]]] = {
    "back": [[14.5, 18.5, 8, 12, 14.5, 5.5]],
    "forward": [[9.5, 18.5, 16, 12, 9.5, 5.5]],
    "add": [[12, 5, 12, 19], [5, 12, 19, 12]],
    "close": [[6, 6, 18, 18], [6, 18, 18, 6]],
    "library": [
        [4.5, 5, 4.5, 19.5, 8.5, 19.5, 8.5, 5, 4.5, 5],
        [8.5, 5, 8.5, 19.5, 12.5, 19.5, 12.5, 5, 8.5, 5],
        [14.6, 18.6, 18.2, 19.5, 21, 5.6, 17.2, 4.7, 14.6, 18.6],
    ],
    "document": [
        [6, 3.5, 6, 20.5, 14, 20.5, 18.5, 16, 18.5, 3.5, 6, 3.5],
        [9, 12, 15.5, 12],
        [9, 8, 15.5, 8],
    ],
    "models": [
        [7, 7, 7, 17, 17, 17, 17, 7, 7, 7],
        *([x, 17, x, 20.5] for x in (9.7, 14.3)),
        *([x, 3.5, x, 7] for x in (9.7, 14.3)),
        *([3.5, y, 7, y] for y in (9.7, 14.3)),
        *([17, y, 20.5, y] for y in (9.7, 14.3)),
    ],
    "settings": [
        [4, 17, 10.2, 17],
        [14.8, 17, 20, 17],
        _arc(12.5, 17, 2.3),
        [4, 7, 6.2, 7],
        [10.8, 7, 20, 7],
        _arc(8.5, 7, 2.3),
    ],
    "send": [[12, 5, 12, 19], [6.5, 13.5, 12, 19, 17.5, 13.5]],
    "stop": [[8, 8, 8, 16, 16, 16, 16, 8, 8, 8]],
    "remove": [
        [5, 17.5, 19, 17.5],
        [9.5, 17.5, 9.5, 20, 14.5, 20, 14.5, 17.5],
        [7, 17.5, 8, 4, 16, 4, 17, 17.5],
    ],
    "sort": [[5, 17.5, 19, 17.5], [5, 12, 15, 12], [5, 6.5, 11, 6.5]],
    "search": [_arc(10.5, 13.5, 6), [15, 9, 20, 4]],
    "copy": [
        [9, 4, 9, 16, 19, 16, 19, 4, 9, 4],
        [6.5, 8, 5, 8, 5, 20, 15, 20, 15, 18.5],
    ],
    "edit": [[4.5, 4.5, 5.5, 8.5, 16, 19, 19, 16, 8.5, 5.5, 4.5, 4.5], [13.5, 16.5, 16.5, 13.5]],
    "share": [
        [12, 9.5, 12, 20],
        [8, 16.5, 12, 20.5, 16, 16.5],
        [7, 12.5, 5, 12.5, 5, 4, 19, 4, 19, 12.5, 17, 12.5],
    ],
    "action": [[13, 21, 6, 11, 11.5, 11, 11, 3, 18, 13, 12.5, 13, 13, 21]],
    "summary": [[5, 18, 19, 18], [5, 13, 19, 13], [5, 8, 13, 8]],
    "suggest": [
        _arc(12, 13.5, 5.5, -60, 240),
        [9.3, 8.7, 9.3, 6.5, 14.7, 6.5, 14.7, 8.7],
        [10.5, 3.8, 13.5, 3.8],
    ],
    "check": [[5, 12, 10, 7, 19, 17]],
    "folder": [[3.5, 6, 3.5, 18.5, 9.5, 18.5, 11.5, 16.2, 20.5, 16.2, 20.5, 6, 3.5, 6]],
    "up": [[12, 5, 12, 19], [6.5, 13.5, 12, 19, 17.5, 13.5]],
}
MIRRORED = {"back", "forward"}


class Icon(Widget):
    """One of STROKES, in a colour, as large as the widget."""

    name = StringProperty("add")
    color = ColorProperty("#000000")
    mirror = BooleanProperty(False)

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self._group = InstructionGroup()
        self.canvas.add(self._group)
        for what in ("pos", "size", "name", "color", "mirror"):
            self.fbind(what, self._draw)
        app = App.get_running_app()
        if app is not None:
            self.mirror = app.rtl
            app.fbind("rtl", self.setter("mirror"))
        self._draw()

    def _draw(self, *_: object) -> None:
        self._group.clear()
        self._group.add(Color(*self.color))
        side = min(self.size)
        # Not center_x: Kivy may not have updated it yet.
        x0, y0 = self.x + (self.width - side) / 2, self.y + (self.height - side) / 2
        flip = self.mirror and self.name in MIRRORED
        for stroke in STROKES[self.name]:
            points: list[float] = []
            for x, y in zip(stroke[::2], stroke[1::2], strict=True):
                points += [x0 + (24 - x if flip else x) / 24 * side, y0 + y / 24 * side]
            if any(a != b for a, b in pairwise(points)):
                line = Line(
                    points=points, width=max(1.0, side / 24 * 0.85), cap="round", joint="round"
                )
                self._group.add(line)
