"""Choices; each is in force at once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kivy.app import App
from kivy.factory import Factory
from kivy.uix.screenmanager import Screen

from pocketslm import __version__
from pocketslm.android.engine import ENGINES, ON_DESKTOP, ON_PHONE
from pocketslm.android.settings import TEXT_SIZES
from pocketslm.android.strings import LANGUAGES
from pocketslm.runtime.backends import usable_cores


class SettingsScreen(Screen):
    def refresh(self) -> None:
        app = App.get_running_app()
        t = app.t
        body = self.ids.body
        body.clear_widgets()
        self._choices("theme", [(name, t(f"theme_{name}"), "") for name in ("light", "dark")])
        self._choices("language", [(key, name, "") for key, name in LANGUAGES.items()])
        self._choices("text_size", [(name, t(f"text_{name}"), "") for name in TEXT_SIZES])
        engines = ON_PHONE if app.phone.is_phone else ON_DESKTOP
        self._choices(
            "engine",
            [
                (key, t(ENGINES[key][0]), t(ENGINES[key][1]) if ENGINES[key][1] else "")
                for key in engines
            ],
        )
        counts = [0, *range(1, min(8, usable_cores()) + 1)]
        names = [(count, t("threads_auto") if not count else str(count), "") for count in counts]
        self._choices("threads", names)
        for title, text in (
            ("privacy", t("privacy_text")),
            ("about", t("about_text", version=__version__)),
        ):
            card = self._card(t(title))
            card.add_widget(
                Factory.Text(
                    content=text, color=app.theme.muted, font_size=Factory.Caption().font_size * 1.1
                )
            )

    def _card(self, title: str) -> Any:
        card = Factory.Card()
        card.add_widget(Factory.Heading(content=title))
        self.ids.body.add_widget(card)
        return card

    def _choices(self, name: str, options: Sequence[tuple[Any, str, str]]) -> None:
        app = App.get_running_app()
        card = self._card(app.t(name))
        for value, text, note in options:
            choice = Factory.Choice(text=text, note=note, chosen=app.settings[name] == value)
            choice.bind(on_release=lambda _, value=value: self._choose(name, value))
            card.add_widget(choice)

    def _choose(self, name: str, value: Any) -> None:
        App.get_running_app().settings[name] = value
        self.refresh()
