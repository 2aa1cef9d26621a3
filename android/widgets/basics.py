"""Rows that mirror, cards, things to tap."""

from __future__ import annotations

from typing import Any

from kivy.core.text import Label as CoreLabel
from kivy.metrics import dp
from kivy.properties import BooleanProperty, ColorProperty, NumericProperty, StringProperty
from kivy.uix.behaviors import ButtonBehavior
from kivy.uix.boxlayout import BoxLayout
from kivy.uix.scrollview import ScrollView
from kivy.uix.stacklayout import StackLayout
from kivy.uix.widget import Widget

from pocketslm.android import strings
from pocketslm.android.widgets.text import Directed, font_for


class Row(Directed, BoxLayout):
    """Children side by side; from right to left where the language runs so.

    fixed: the height; where it is negative, what the children need.
    """

    fixed = NumericProperty(-1)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.fbind("rtl", self._trigger_layout)

    def do_layout(self, *arguments: Any) -> None:
        super().do_layout(*arguments)
        if self.rtl and self.orientation == "horizontal":
            for child in self.children:
                child.x = self.x + self.right - child.right


class Column(BoxLayout):
    """Children below each other, as high as they are together."""


class Flow(Directed, StackLayout):
    """Children in lines that wrap, as high as they need."""


class Card(Column):
    """A rounded surface around what belongs together."""


class Page(ScrollView):
    """A page that scrolls."""


class Labelled(ButtonBehavior):
    """What can be tapped. ``label``: what a screen reader says; ``role``: what it is."""

    label = StringProperty("")
    role = "button"


class Tappable(Labelled, Widget):
    """Anything that can be tapped."""


class Tap(Labelled, Row):
    """A row that can be tapped."""


class TapCard(Labelled, Card):
    """A card that can be tapped."""


class Push(Tap):
    """A button with a text and perhaps an icon; ``kind``: filled, soft or plain.

    ``spoken``: what a screen reader says where the text alone does not tell.
    """

    text = StringProperty("")
    spoken = StringProperty("")
    icon = StringProperty("")
    kind = StringProperty("soft")


class Chip(Tap):
    """A question to tap: as wide as its text, but no wider than ``widest``, where it wraps."""

    text = StringProperty("")
    marked = BooleanProperty(False)
    widest = NumericProperty(400)
    natural = NumericProperty(0)
    type_size = NumericProperty(14)

    def on_type_size(self, *_: Any) -> None:
        self.on_text()

    def on_text(self, *_: Any) -> None:
        label = CoreLabel(font_name=font_for(self.text), font_size=self.type_size)
        self.natural = label.get_extents(strings.shaped(self.text))[0] + dp(32)


class IconButton(Tappable):
    icon = StringProperty("add")
    color = ColorProperty("#000000")
    ground = ColorProperty("#00000000")


class Choice(Tap):
    """One of several; the chosen one is marked."""

    text = StringProperty("")
    note = StringProperty("")
    chosen = BooleanProperty(False)
    role = "radio"


class Navigation(Labelled, BoxLayout):
    """A place to go, with icon and name, in the bar or rail."""

    text = StringProperty("")
    icon = StringProperty("library")
    chosen = BooleanProperty(False)
    role = "tab"


class Meter(Widget):
    """A bar that is filled by ``value`` (0 to 1)."""

    value = NumericProperty(0)
    color = ColorProperty("#000000")
