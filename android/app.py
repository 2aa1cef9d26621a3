"""The app: what its screens share, and how it moves between them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import Any

from kivy.app import App
from kivy.clock import Clock
from kivy.core.window import Window
from kivy.lang import Builder
from kivy.metrics import dp
from kivy.properties import BooleanProperty, NumericProperty, ObjectProperty, StringProperty
from kivy.uix.screenmanager import NoTransition

from pocketslm.android import screens, strings, widgets
from pocketslm.android.engine import open_model
from pocketslm.android.engine.meter import Metered, resident_bytes
from pocketslm.android.engine.models import Models
from pocketslm.android.engine.worker import Job, Worker
from pocketslm.android.phone import Phone, accessibility, this_system
from pocketslm.android.settings import TEXT_SIZES, Settings
from pocketslm.android.theme import Theme
from pocketslm.android.widgets.sheet import Notice, ask_text
from pocketslm.errors import BackendError, LockedError, PocketSlmError
from pocketslm.runtime.assistant.answer import Answer
from pocketslm.runtime.assistant.library import Library
from pocketslm.runtime.assistant.meaning import Meanings
from pocketslm.runtime.assistant.readers import read_file
from pocketslm.runtime.model import Model

__all__ = ["PocketApp", "screens", "widgets"]

log = logging.getLogger("pocketslm.android")
WIDE = 720  # dp from which there are two columns
PLACES = ("library", "models", "settings")


class PocketApp(App):
    """``data``: the folder of library, models and settings."""

    title = "pocketslm"
    theme = ObjectProperty()
    language = StringProperty("en")
    rtl = BooleanProperty(False)
    text_scale = NumericProperty(1)
    wide = BooleanProperty(False)
    place = StringProperty("library")
    window_width = NumericProperty(400)
    window_height = NumericProperty(800)

    def __init__(self, data: Path | None = None, phone: Phone | None = None) -> None:
        super().__init__()
        self.phone = phone or this_system()
        self.data = data or self.phone.data_folder()
        self.settings = Settings(self.data / "settings.json", self.phone.choices())
        self.library = Library(self.data / "library.db")
        self.models = Models(self.data / "models")
        self.theme = Theme()
        self._workers = {"engine": Worker("engine"), "files": Worker("files")}
        self._model: Metered | None = None
        self._meanings: Meanings | None = None
        self._lock = Lock()

    # Life of the app

    def build(self) -> Any:
        for name in ("theme", "language", "text_size"):
            self._changed(name)
        self.settings.watch(self._changed)
        Window.bind(size=self._resized, on_keyboard=self._key)
        Window.bind(on_memorywarning=lambda *_: self.low_memory())
        Window.softinput_mode = "below_target"
        self._resized()
        root = Builder.load_file(str(Path(__file__).with_name("app.kv")))
        root.ids.manager.transition = NoTransition()
        Clock.schedule_interval(self._poll, 1 / 20)
        Clock.schedule_interval(lambda _: self.screen("document").tick(), 0.5)
        self.root = root
        return root

    def on_start(self) -> None:
        self._keep_interrupted()
        self.phone.watch(self.add_document, lambda: accessibility.nodes(Window))
        if self.settings["screen"] == "document":
            self.open_document(self.settings["document"])
        else:
            self.go(self.settings["screen"])

    def on_pause(self) -> bool:
        """In the background work goes on; should Android end the app, nothing is lost."""
        self.settings.save()
        return True

    def on_stop(self) -> None:
        self.settings.save()
        self.cancel_engine()
        for worker in self._workers.values():
            worker.close()
        if self._model is not None:  # no worker is left to do it
            self._model.close()
        self.library.close()

    def low_memory(self) -> None:
        """Save, and give the model's memory back where it is idle; it is loaded again on demand."""
        self.settings.save()
        if self._workers["engine"].current is None:
            self.unload()

    def _keep_interrupted(self) -> None:
        """What was being answered when the app ended goes into the history as far as it came."""
        pending = self.settings["pending"]
        self.settings["pending"] = None
        if not isinstance(pending, dict):
            return
        if pending.get("document") in [entry.id for entry in self.library.entries()]:
            text = str(pending.get("text", ""))
            task = pending.get("task", "ask")
            answer = Answer(task, str(pending.get("request", "")), text, "interrupted")
            self.library.remember(pending["document"], answer)

    # Places

    def go(self, place: str) -> None:
        """Show a screen."""
        manager = self.root.ids.manager
        manager.current = place if manager.has_screen(place) else "library"
        self.place = manager.current if manager.current in PLACES else "library"
        if manager.current in PLACES:
            self.screen(manager.current).refresh()
        self.settings["screen"] = manager.current

    def screen(self, name: str) -> Any:
        return self.root.ids.manager.get_screen(name)

    def open_document(self, number: int) -> None:
        """Show a document; the library where there is none of that number."""
        if number not in [entry.id for entry in self.library.entries()]:
            self.go("library")
            return
        self.settings["document"] = number
        self.screen("document").open(self.library.open(number))
        self.go("document")

    def _key(self, _: Any, key: int, *__: Any) -> bool:
        """Escape is Android's back."""
        if key != 27:
            return False
        if self.root.ids.manager.current == "library":
            return False
        self.go("library")
        return True

    # Words and looks

    def t(self, key: str, **values: object) -> str:
        return strings.translate(self.language, key, **values)

    def tr(self, language: str, key: str) -> str:
        """For .kv rules: ``language`` makes them follow a change."""
        return strings.translate(language, key)

    def hint(self, language: str, key: str) -> str:
        """A text for Kivy's own TextInput, which draws what it is given from left to right."""
        text = strings.translate(language, key)
        return strings.visual(text) if strings.has_rtl(text) else text

    def notice(self, text: str) -> None:
        Notice.show(text)

    def _changed(self, name: str) -> None:
        if name == "theme":
            self.theme.use(self.settings["theme"])
            Window.clearcolor = self.theme.ground
        elif name == "language":
            self.language = self.settings["language"]
            self.rtl = strings.is_rtl(self.language)
        elif name == "text_size":
            self.text_scale = TEXT_SIZES[self.settings["text_size"]]
        elif name in ("engine", "threads"):
            self.unload()

    def _resized(self, *_: Any) -> None:
        self.window_width, self.window_height = Window.size
        self.wide = Window.width >= dp(WIDE)

    # Work

    def start(
        self,
        worker: str,
        work: Callable[[Event], Iterator[Any]],
        on_event: Callable[[Any], None],
        on_end: Callable[[], None] = lambda: None,
        on_error: Callable[[str], None] | None = None,
    ) -> Job:
        """Do ``work`` on the thread "engine" or "files"; the callbacks run on this one."""
        job = Job(work, on_event, on_error or self.notice, on_end)
        return self._workers[worker].submit(job)

    def _poll(self, _: float) -> None:
        for worker in self._workers.values():
            worker.poll()

    def add_document(self, path: Path, password: str = "") -> None:
        """Read a file into the library; it is opened, unless the person went on to another one. The
        password of a locked one is asked for."""
        self.notice(self.t("adding", name=path.name))
        begun = self.root.ids.manager.current

        def work(_: Event) -> Iterator[int | None]:
            try:
                source = read_file(path, password)
            except LockedError:
                yield None
                return
            yield self.library.add(source).id

        def added(number: int | None) -> None:
            if number is None:
                title = self.t("password_of", name=path.name)
                again = partial(self.add_document, path)
                ask_text(title, "", self.t("open"), self.t("cancel"), again, secret=True)
                return
            now = self.root.ids.manager.current
            if now == begun and now != "document":
                self.open_document(number)
            else:
                self.notice(self.t("added", name=path.name))
                self.screen("library").refresh()
            self.read_meanings()

        def failed(text: str) -> None:
            self.notice(self.t("open_failed", reason=text))

        self.start("files", work, added, on_error=failed)

    def find_by(self, name: str) -> None:
        """Find by a model of embeddings too."""
        if name not in self.settings["embedders"]:
            self.settings["embedders"] = [*self.settings["embedders"], name]
        self.read_meanings()

    def read_meanings(self) -> None:
        """Compute the vectors that are missing, in the background."""

        def work(cancel: Event) -> Iterator[None]:
            meanings = self.meanings()
            for _ in meanings.index(cancel=cancel) if meanings is not None else ():
                yield None

        if self.settings["embedders"]:
            self.start("files", work, lambda _: None)

    def meanings(self) -> Meanings | None:
        """The library's vectors by the models of embeddings that were imported; None without."""
        paths = [self.models.path(name) for name in self.settings["embedders"]]
        paths = [path for path in paths if path.is_dir()]
        if not paths:
            return None
        name = " + ".join(path.name for path in paths)
        with self._lock:
            if self._meanings is None or self._meanings.name != name:
                try:
                    models = [Model.load(path, threads=1, verify=False) for path in paths]
                except PocketSlmError as error:  # words do; the answer says by what it was found
                    log.warning("found by words only: %s", error)
                    return None
                self._meanings = Meanings(self.library, models, name)
            return self._meanings

    def import_model(self, path: Path) -> None:
        """Copy a bundle among the models; the first one is used at once."""
        self.notice(self.t("importing", name=path.name))
        last = ""

        def step(name: str) -> None:
            nonlocal last
            last = name

        def ended() -> None:
            if last and self.models.path(last).is_dir():
                self.notice(self.t("imported", name=last))
                if self.models.embeds(last):
                    self.find_by(last)
                elif not self.settings["model"]:
                    self.settings["model"] = last
                elif self.settings["model"] == last:
                    self.unload()
            self.screen("models").refresh()

        self.start("files", lambda _: self.models.import_bundle(path), step, ended)

    # The model

    def ready(self) -> bool:
        """Whether there is a model to ask."""
        name = self.settings["model"]
        return bool(name) and self.models.path(name).is_dir()

    def loaded(self) -> bool:
        return self._model is not None

    def model(self) -> Metered:
        """The model in use, loaded now if need be; on the engine's thread only."""
        if not self.ready():
            raise BackendError(self.t("no_model"))
        if self._model is None:
            path = self.models.path(self.settings["model"])
            engine, threads = self.settings["engine"], self.settings["threads"]
            self._model = Metered(open_model(path, engine, threads, phone=self.phone.is_phone))
        return self._model

    def unload(self) -> None:
        """Give the model's memory back, once the work in progress is done."""

        def work(_: Event) -> Iterator[None]:
            model, self._model = self._model, None
            if model is not None:
                model.close()
            yield None

        if self._model is not None:
            self.start("engine", work, lambda _: None)

    def cancel_job(self, job: Job) -> None:
        """End a prompt that is being read, if it is this job's."""
        if self._workers["engine"].current is job:
            self.cancel_engine()

    def cancel_engine(self) -> None:
        """End a prompt that is being read, too."""
        if self._model is not None:
            self._model.cancel()

    def engine_status(self, busy: bool) -> str:
        """Tokens per second and memory, now."""
        model = self._model
        if model is None:
            return ""
        memory = resident_bytes() + (resident_bytes(model.pid) if model.pid else 0)
        values = {"memory": memory // 1_000_000, "engine": model.backend}
        if busy and model.tokens > 1:
            return self.t("live", tps=f"{model.tps:.0f}", **values)
        return self.t("idle", **values)
