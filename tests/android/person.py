"""A person at the app's window: looks for what the screen says, taps there, types."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kivy.animation import Animation
from kivy.clock import Clock
from kivy.core.window import Window
from kivy.tests.common import UnitTestTouch
from kivy.uix.behaviors import ButtonBehavior
from kivy.uix.modalview import ModalView
from kivy.uix.scrollview import ScrollView

from pocketslm.android.app import PocketApp
from pocketslm.android.phone.accessibility import nodes
from pocketslm.android.widgets.text import Field

Walk = Iterator[float]
"""What a person does: each yield waits so many seconds, while the app goes on."""

PATIENCE = 300.0  # seconds until the app counts as stuck; nothing is timed
DRAWN = 12  # where no picture is kept, one frame in so many: without a graphics card it takes long
BRIEFLY = 0.3  # seconds; what is scheduled for later than that is no answer to a touch


class Person:
    """Runs walks inside the app's own loop; a walk's exception ends the app and is raised."""

    def __init__(self, app: PocketApp, shots: Path | None = None) -> None:
        self.app, self.shots = app, shots
        self.frames = 0
        self._failure: BaseException | None = None
        self._step: Callable[..., None] | None = None

    def run(self, walk: Walk) -> None:
        """Start the app, walk, end the app."""

        def step(_: float = 0) -> None:
            try:
                Clock.schedule_once(step, next(walk))
            except StopIteration:
                self.app.stop()
            except BaseException as failure:
                self._failure = failure
                self.app.stop()

        def frame(_: float) -> None:
            self.frames += 1

        def passed_over(*_: object) -> bool:
            """Whether a frame is not drawn; what changed waits for the next that is."""
            return self.shots is None and self.frames % DRAWN != 0

        self._step = step
        Clock.schedule_interval(frame, 0)
        Window.bind(on_draw=passed_over, on_flip=passed_over)
        Clock.schedule_once(step, 0.5)
        self.app.run()
        if self._failure is not None:
            raise self._failure

    # What a person sees

    def says(self, text: str) -> bool:
        """Whether a text is on the screen."""
        return any(text in node.label for node in nodes(Window))

    def find(self, label: str) -> Any:
        """The widget with this label that can be touched; what lies on top comes first."""
        roots = [child for child in Window.children if isinstance(child, ModalView)]
        for root in roots[:1] or Window.children:
            for widget in root.walk():
                touchable = isinstance(widget, ButtonBehavior | Field)
                if touchable and getattr(widget, "label", "") == label and _visible(widget):
                    return widget
        there = sorted({node.label for node in nodes(Window) if node.role != "text"})
        raise AssertionError(f"nothing on the screen is called {label!r}; there are {there}")

    def unlabelled(self) -> list[str]:
        """What could be touched and says nothing to a screen reader."""
        found = []
        for root in Window.children:
            for widget in root.walk():
                touchable = isinstance(widget, ButtonBehavior | Field)
                if touchable and _visible(widget) and not widget.label:
                    found.append(repr(widget))
        return found

    def shot(self, name: str) -> Walk:
        """Keep the window's picture under this name."""
        assert self.unlabelled() == []
        if self.shots is None:
            return
        yield 0.4
        self.shots.mkdir(parents=True, exist_ok=True)
        made = Path(Window.screenshot(str(self.shots / f"{name}-.png")))
        made.rename(self.shots / f"{name}.png")

    # What a person does

    def tap(self, label: str) -> Walk:
        """Touch the middle of what has this label, after scrolling to it."""
        widget = self.find(label)
        yield from self._scroll_to(widget)
        x, y = widget.to_window(*widget.center)
        assert 0 <= x < Window.width, f"{label!r} is not on the screen"
        assert 0 <= y < Window.height, f"{label!r} is not on the screen"
        touch = UnitTestTouch(x, y)
        touch.touch_down()
        yield 0.05
        touch.touch_up()
        yield from self.settle()

    def type(self, text: str) -> Walk:
        """Type into the field that has the focus."""
        for character in text:
            Window.dispatch("on_textinput", character)
            yield 0.01

    def key(self, code: int) -> Walk:
        if not Window.dispatch("on_key_down", code, 0, None, []):
            Window.dispatch("on_keyboard", code, 0, None, [])
        Window.dispatch("on_key_up", code, 0)
        yield from self.settle()

    def wait(self, holds: Callable[[], bool], what: str) -> Walk:
        end = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < end, f"waited {PATIENCE:.0f} s for {what}"
            yield 0.05
        yield from self.settle()

    def settle(self) -> Walk:
        """Wait until all has its place: the app has done what it does by and by.

        A page waits a moment whether a touch scrolls it; sheets and pages move in.
        """
        still = 0
        while still < 3:  # frames, since what is done may schedule more
            still = 0 if self._moves() else still + 1
            yield 0

    def _moves(self) -> bool:
        if Animation._instances:
            return True
        return any(
            not event.loop and event.is_triggered and event.timeout <= BRIEFLY
            for event in Clock.get_events()
            if event.get_callback() is not self._step
        )

    def answered(self) -> Walk:
        """Wait for the end of the task that was begun."""
        screen = self.app.screen("document")
        yield from self.wait(lambda: not screen.busy, "an answer")
        assert not screen.ids.history.children[0].live

    def kill_engine(self) -> None:
        """What a phone short of memory may do to the engine's process."""
        assert self.app._model is not None
        assert self.app._model.pid is not None
        os.kill(self.app._model.pid, signal.SIGKILL)

    def _scroll_to(self, widget: Any) -> Walk:
        """Drag the page until the widget is in it."""
        page = widget.parent
        while page is not None and not isinstance(page, ScrollView):
            page = page.parent if page is not page.parent else None
        if page is None:
            return
        for _ in range(12):
            bottom, top = page.to_window(0, page.y)[1], page.to_window(0, page.top)[1]
            middle = widget.to_window(*widget.center)[1]
            if not page.do_scroll_y or bottom + 8 < middle < top - 8:
                break
            by = max(-0.6 * page.height, min(0.6 * page.height, (bottom + top) / 2 - middle))
            x, y = page.to_window(page.right - 6, page.center_y - by / 2)
            touch = UnitTestTouch(x, y)
            touch.touch_down()
            for part in range(1, 9):
                yield 0.02
                touch.touch_move(x, y + by * part / 8)
            yield 0.25  # held still, so that the page does not glide on
            touch.touch_move(x, y + by)
            touch.touch_up()
            yield 0.5


def _visible(widget: Any) -> bool:
    """Whether it is drawn and enabled, perhaps after scrolling up or down."""
    while widget is not None and widget is not Window:
        if widget.opacity == 0 or widget.disabled or widget.height < 1 or widget.width < 1:
            return False
        parent = widget.parent
        widget = parent if parent is not widget else None
    return True
