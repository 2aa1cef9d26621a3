"""What lies over a screen: a question that wants an answer, a file to choose, a passing notice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kivy.animation import Animation
from kivy.app import App
from kivy.clock import Clock
from kivy.factory import Factory
from kivy.metrics import dp
from kivy.properties import StringProperty
from kivy.uix.modalview import ModalView

from pocketslm.android.widgets.basics import Row, Tap


class Notice(Row):
    """One sentence at the foot of the window, gone after a while."""

    text = StringProperty("")

    @classmethod
    def show(cls, text: str) -> Notice:
        from kivy.core.window import Window

        for old in [child for child in Window.children if isinstance(child, cls)]:
            Window.remove_widget(old)
        notice = cls(text=text, size_hint=(None, None), opacity=0)
        notice.width = min(dp(480), Window.width - dp(32))
        notice.center_x = Window.width / 2
        notice.y = dp(168)
        Window.add_widget(notice)
        Animation(opacity=1, duration=0.15).start(notice)
        Clock.schedule_once(lambda _: Window.remove_widget(notice), 4.5)
        return notice


class Sheet(ModalView):
    """A panel over the screen; ``add`` puts widgets into its column."""

    def add(self, widget: Any) -> Any:
        self.ids.body.add_widget(widget)
        return widget

    def buttons(self, *buttons: tuple[str, str, Callable[[], object]]) -> None:
        """(text, kind, what it does), at the end of the line; each closes the sheet, unless what it
        does returns False."""
        row = self.add(Factory.Row(spacing=dp(8), padding=(0, dp(8), 0, 0)))
        row.add_widget(Factory.Widget(size_hint_y=None, height=dp(44)))
        for text, kind, action in buttons:
            button = Factory.Push(text=text, kind=kind)

            def tapped(_: Any, action: Callable[[], object] = action) -> None:
                if action() is not False:
                    self.dismiss()

            button.bind(on_release=tapped)
            row.add_widget(button)


def confirm(
    title: str, text: str, yes: str, no: str, action: Callable[[], None], kind: str
) -> None:
    """Ask before ``action``."""
    sheet = Sheet()
    sheet.add(Factory.Heading(content=title))
    sheet.add(Factory.Text(content=text))
    sheet.buttons((no, "plain", lambda: None), (yes, kind, action))
    sheet.open()


def choose(
    title: str,
    options: Sequence[tuple[str, str]],
    now: str,
    no: str,
    action: Callable[[str], object],
) -> None:
    """Let a person tap one of several (value, text)."""
    sheet = Sheet()
    sheet.add(Factory.Heading(content=title))
    for value, text in options:

        def tapped(_: Any, value: str = value) -> None:
            sheet.dismiss()
            action(value)

        sheet.add(Factory.Choice(text=text, chosen=value == now)).bind(on_release=tapped)
    sheet.buttons((no, "plain", lambda: None))
    sheet.open()


def ask_text(
    title: str,
    text: str,
    yes: str,
    no: str,
    action: Callable[[str], object],
    *,
    secret: bool = False,
) -> None:
    """Let a person type a line, which ``action`` gets unless it is empty."""
    sheet = Sheet()
    sheet.add(Factory.Heading(content=title))
    field = sheet.add(Factory.Field(text=text, label=title, multiline=False, password=secret))

    def done() -> bool:
        if typed := field.text.strip():
            action(typed)
        return bool(typed)

    sheet.buttons((no, "plain", lambda: None), (yes, "filled", done))
    sheet.open()


class FileLine(Tap):
    """A file or folder to tap."""

    icon = StringProperty("document")
    text = StringProperty("")


class FileSheet(Sheet):
    """Choose a file, or a folder where ``folders`` is true, by walking through folders."""

    def __init__(
        self,
        title: str,
        endings: Sequence[str],
        folders: bool,
        start: Path,
        chosen: Callable[[Path], None],
    ) -> None:
        super().__init__()
        self._title, self._endings, self._folders = title, tuple(endings), folders
        self._chosen = chosen
        self.enter(start)

    def enter(self, folder: Path) -> None:
        """Show what a folder holds."""
        t = App.get_running_app().t
        body = self.ids.body
        body.clear_widgets()
        self.add(Factory.Heading(content=self._title))
        self.add(Factory.Caption(content=str(folder)))
        self._line("up", t("up"), lambda: self.enter(folder.parent))
        try:
            found = sorted(folder.iterdir(), key=lambda p: (not p.is_dir(), p.name.lower()))
        except OSError:
            found = []
        for path in found:
            if path.name.startswith("."):
                continue
            if path.is_dir():
                self._line("folder", path.name, partial(self.enter, path))
            elif path.suffix.lower() in self._endings:
                self._line("document", path.name, partial(self._take, path))
        actions: list[tuple[str, str, Callable[[], object]]] = [
            (t("cancel"), "plain", lambda: None)
        ]
        if self._folders:
            actions.append((t("choose_this"), "filled", lambda: self._chosen(folder)))
        self.buttons(*actions)

    def _line(self, icon: str, text: str, action: Callable[[], None]) -> None:
        line = FileLine(icon=icon, text=text)
        line.bind(on_release=lambda _: action())
        self.add(line)

    def _take(self, path: Path) -> None:
        self.dismiss()
        self._chosen(path)
