"""Android's side, through pyjnius: files, intents, sharing, screen readers. Runs on phones only.

What of this was tried where is in docs/explanation/app.md.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from android import activity, mActivity
from android.runnable import run_on_ui_thread
from jnius import PythonJavaClass, autoclass, cast, java_method
from kivy.clock import Clock, mainthread

from pocketslm.android.intents import Action
from pocketslm.android.phone import OnFile

Intent = autoclass("android.content.Intent")
PICK = 4711  # our request code
RESULT_OK = -1
NIGHT_MASK, NIGHT = 0x30, 0x20  # UI_MODE_NIGHT_MASK and UI_MODE_NIGHT_YES of Configuration
MIME = {"document": "*/*", "model": "application/zip"}


class Android:
    is_phone = True

    def __init__(self) -> None:
        self._chosen: OnFile | None = None
        activity.bind(on_activity_result=self._picked)

    def data_folder(self) -> Path:
        return Path(mActivity.getFilesDir().getAbsolutePath()) / "pocketslm"

    def choices(self) -> dict[str, str]:
        mode = mActivity.getResources().getConfiguration().uiMode & NIGHT_MASK
        language = str(autoclass("java.util.Locale").getDefault().getLanguage())
        return {"language": language, "theme": "dark" if mode == NIGHT else "light"}

    def pick(self, kind: str, title: str, endings: tuple[str, ...], chosen: OnFile) -> None:
        """The Storage Access Framework: the person chooses, no permission is needed."""
        self._chosen = chosen
        intent = Intent(Intent.ACTION_OPEN_DOCUMENT)
        intent.addCategory(Intent.CATEGORY_OPENABLE)
        intent.setType(MIME[kind])
        mActivity.startActivityForResult(intent, PICK)

    def do(self, action: Action) -> None:
        """A calendar entry or Android's share sheet: each asks the person once more."""
        intent = {"set_reminder": _reminder, "share_text": _share}[action.name](action)
        mActivity.startActivity(intent)

    def watch(self, opened: OnFile, describe: Callable[[], list[Any]]) -> None:
        shutil.rmtree(self._inbox(), ignore_errors=True)  # copies of the last time
        activity.bind(on_new_intent=lambda intent: self._open(intent, opened))
        self._open(mActivity.getIntent(), opened)
        self._reader = _start_screen_reader(describe)

    def _picked(self, request: int, result: int, intent: Any) -> None:
        chosen, self._chosen = self._chosen, None
        if request == PICK and result == RESULT_OK and intent and chosen:
            self._hand_over(intent.getData(), chosen)

    def _open(self, intent: Any, opened: OnFile) -> None:
        """A document that another app opens with this one (VIEW) or shares with it (SEND)."""
        if intent is None:
            return
        if intent.getAction() == Intent.ACTION_VIEW and intent.getData():
            self._hand_over(intent.getData(), opened)
        elif intent.getAction() == Intent.ACTION_SEND:
            stream = intent.getParcelableExtra(Intent.EXTRA_STREAM)
            text = intent.getStringExtra(Intent.EXTRA_TEXT)
            if stream:
                self._hand_over(cast("android.net.Uri", stream), opened)
            elif text:
                name = intent.getStringExtra(Intent.EXTRA_SUBJECT) or "shared"
                path = self._inbox() / f"{_file_name(name)}.txt"
                path.write_text(str(text), encoding="utf-8")
                _call(opened, path)

    def _hand_over(self, uri: Any, opened: OnFile) -> None:
        """Copy what a content address names, under its own name, then hand over the copy.

        On a thread of its own: a model has hundreds of megabytes. A copy that fails is handed over
        as a file that is not there, which the app tells the person.
        """
        resolver = mActivity.getContentResolver()
        path = self._inbox() / _file_name(_display_name(resolver, uri))
        descriptor = resolver.openFileDescriptor(uri, "r").detachFd()

        def copy() -> None:
            aside = path.with_name(f".{path.name}")
            with suppress(OSError):
                path.unlink(missing_ok=True)
                with os.fdopen(descriptor, "rb") as source, aside.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
                aside.replace(path)
            _call(opened, path)

        threading.Thread(target=copy, daemon=True).start()

    def _inbox(self) -> Path:
        folder = Path(mActivity.getCacheDir().getAbsolutePath()) / "inbox"
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@mainthread
def _call(opened: OnFile, path: Path) -> None:
    opened(path)


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in " .-_()" else "_" for c in name).strip(". ") or "file"


def _display_name(resolver: Any, uri: Any) -> str:
    columns = autoclass("android.provider.OpenableColumns")
    cursor = resolver.query(uri, None, None, None, None)
    if cursor is None:
        return str(uri.getLastPathSegment() or "document.txt")
    try:
        column = cursor.getColumnIndex(columns.DISPLAY_NAME)
        found = cursor.getString(column) if column >= 0 and cursor.moveToFirst() else None
        return str(found or "document.txt")
    finally:
        cursor.close()


def _share(action: Action) -> Any:
    intent = Intent(Intent.ACTION_SEND)
    intent.setType("text/plain")
    intent.putExtra(Intent.EXTRA_TEXT, str(action.arguments["text"]))
    return Intent.createChooser(intent, None)


def _reminder(action: Action) -> Any:
    """A new entry in the calendar app, which the person saves there: it needs no permission."""
    now = time.localtime()
    day = now.tm_mday + (action.arguments["day"] == "tomorrow")
    hour, minute = int(action.arguments["hour"]), int(action.arguments["minute"])
    begin = time.mktime((now.tm_year, now.tm_mon, day, hour, minute, 0, 0, 0, -1))
    events = autoclass("android.provider.CalendarContract$Events")
    intent = Intent(Intent.ACTION_INSERT)
    intent.setData(events.CONTENT_URI)
    intent.putExtra("title", str(action.arguments["title"]))
    long = autoclass("java.lang.Long")
    intent.putExtra("beginTime", long.valueOf(int(begin * 1000)))
    return intent


class _Taps(PythonJavaClass):
    """A screen reader's double tap becomes a touch."""

    __javainterfaces__ = ("org/pocketslm/ScreenReader$Taps",)
    __javacontext__ = "app"

    @java_method("(II)V")
    def tap(self, x: int, y: int) -> None:
        Clock.schedule_once(lambda _: self._touch(x, y))

    def _touch(self, x: int, y: int) -> None:
        from kivy.base import EventLoop
        from kivy.core.window import Window
        from kivy.input.providers.mouse import MouseMotionEvent

        place = (x / Window.width, 1 - y / Window.height)
        touch = MouseMotionEvent("screen reader", 0, place, is_touch=True)
        EventLoop.post_dispatch_input("begin", touch)
        EventLoop.post_dispatch_input("end", touch)


def _start_screen_reader(describe: Callable[[], list[Any]]) -> Any:
    """Tell Android's screen readers twice a second what has changed on the screen."""
    taps = _Taps()
    reader = autoclass("org.pocketslm.ScreenReader")(mActivity.getWindow().getDecorView(), taps)
    run_on_ui_thread(reader.attach)()
    last: list[Any] = []

    def update(_: float) -> None:
        nonlocal last
        nodes = describe()
        if nodes != last:
            last = nodes
            places = [edge for node in nodes for edge in node[2:]]
            reader.update([n.label for n in nodes], [n.role for n in nodes], places)

    Clock.schedule_interval(update, 0.5)
    return reader, taps
