"""Text in any direction, and the text of a document with marked passages."""

from __future__ import annotations

from typing import Any

from kivy.app import App
from kivy.clock import Clock
from kivy.core.text import Label as CoreLabel
from kivy.graphics import Color, RoundedRectangle
from kivy.metrics import dp
from kivy.properties import (
    BooleanProperty,
    ColorProperty,
    ListProperty,
    NumericProperty,
    StringProperty,
)
from kivy.uix.label import Label
from kivy.uix.textinput import TextInput
from kivy.utils import escape_markup

from pocketslm.android import strings
from pocketslm.android.reading import markup_of


def font_for(text: str) -> str:
    """Roboto comes with Kivy; DejaVu has the Arabic and Hebrew letters that it lacks."""
    return "DejaVu" if strings.has_rtl(text) else "Roboto"


class Directed:
    """A widget's ``rtl``: whether the app's language runs from right to left."""

    rtl = BooleanProperty(False)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        app = App.get_running_app()
        if app is not None:
            self.rtl = app.rtl
            app.fbind("rtl", self.setter("rtl"))  # type: ignore[attr-defined]


class Text(Directed, Label):
    """A label that wraps, grows in height and knows right-to-left text.

    content: the text as it is written; ``text`` is what Kivy draws. oneline: shorten, do not wrap.
    plain: as wide as it is. fixed: the height, where it is not negative.
    """

    content = StringProperty("")
    oneline = BooleanProperty(False)
    plain = BooleanProperty(False)
    centred = BooleanProperty(False)
    fixed = NumericProperty(-1)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for what in (
            "content",
            "width",
            "font_size",
            "bold",
            "rtl",
            "oneline",
            "plain",
            "centred",
            "padding",
        ):
            self.fbind(what, self._lay_out)
        self._lay_out()

    def _lay_out(self, *_: object) -> None:
        content = self.content
        shaped = strings.has_rtl(content)
        self.font_name = font_for(content)
        side = "right" if strings.runs_rtl(content, self.rtl) else "left"
        self.halign = "center" if self.centred else side
        if self.plain:
            self.text_size = (None, None)
            self.text = strings.visual(content) if shaped else content
            return
        width = max(1.0, self.width)
        inner = width - self.padding[0] - self.padding[2]
        if self.oneline:
            self.shorten = True
            self.text_size = (width, None)
            content = " ".join(content.split())
            self.text = strings.visual(content) if shaped else content
            return
        self.text_size = (width, None)
        if shaped:
            visual = strings.visual(content, inner, self._measure)
            self.text = escape_markup(visual) if self.markup else visual
        else:
            self.text = self.drawn(content)

    def drawn(self, content: str) -> str:
        """What Kivy is to draw for text that runs from left to right."""
        return content

    def _measure(self, text: str) -> float:
        label = CoreLabel(font_name=self.font_name, font_size=self.font_size, bold=self.bold)
        width: float = label.get_extents(text)[0]
        return width


class Said(Text):
    """What a model wrote, whose Markdown is shown."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=True, **options)

    def drawn(self, content: str) -> str:
        return markup_of(content)


class Passage(Text):
    """A paragraph of a document, with ranges of it (start, end) marked."""

    marks = ListProperty()
    mark_color = ColorProperty("#FFE8A3")

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=True, **options)
        for what in ("marks", "mark_color", "pos", "texture_size", "refs"):
            self.fbind(what, self._mark)
        self.fbind("marks", self._lay_out)
        self._lay_out()

    def drawn(self, content: str) -> str:
        parts, at = [], 0
        for start, end in sorted(self.marks):
            inside = escape_markup(content[start:end])
            parts += [escape_markup(content[at:start]), f"[ref=mark]{inside}[/ref]"]
            at = end
        return "".join([*parts, escape_markup(content[at:])])

    def _mark(self, *_: object) -> None:
        self.canvas.before.clear()
        if not self.marks:
            return
        boxes = self.refs.get("mark", [])
        if strings.has_rtl(self.content):  # its letters were put in another order: mark it whole
            boxes = [(0, 0, self.texture_size[0], self.texture_size[1])]
        left = self.x + (self.width - self.texture_size[0]) / 2
        top = self.y + (self.height + self.texture_size[1]) / 2
        with self.canvas.before:
            Color(*self.mark_color)
            for x1, y1, x2, y2 in boxes:
                RoundedRectangle(
                    pos=(left + x1 - dp(2), top - y2),
                    size=(x2 - x1 + dp(4), y2 - y1),
                    radius=[dp(4)],
                )


class Field(TextInput):
    """A line or more to type in. ``label`` is what a screen reader says."""

    label = StringProperty("")
    fixed = NumericProperty(-1)

    def on_text(self, _: Any, text: str) -> None:
        if not text:
            self.scroll_x = 0  # else the hint stays where the text was

    def on_font_name(self, *_: Any) -> None:
        # Kivy measures the hint before it has the new font: have it measured again.
        Clock.schedule_once(lambda _: self.property("hint_text").dispatch(self))
