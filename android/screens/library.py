"""The documents on this device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

from kivy.app import App
from kivy.factory import Factory
from kivy.properties import BooleanProperty, NumericProperty, StringProperty
from kivy.uix.screenmanager import Screen

from pocketslm.android.reading import in_order
from pocketslm.android.screens.document import AnswerCard
from pocketslm.android.settings import SORTS
from pocketslm.android.widgets.basics import TapCard
from pocketslm.android.widgets.sheet import choose, confirm
from pocketslm.runtime.assistant.answer import Answer
from pocketslm.runtime.assistant.assistant import sample_document
from pocketslm.runtime.assistant.library import Entry
from pocketslm.runtime.assistant.readers import KINDS

ENDINGS = tuple(ending for _, endings in KINDS.values() for ending in endings)


class DocumentCard(TapCard):
    number = NumericProperty(0)
    title = StringProperty("")
    kind = StringProperty("")
    detail = StringProperty("")


class LibraryScreen(Screen):
    empty = BooleanProperty(True)
    _answer: AnswerCard | None = None

    def refresh(self) -> None:
        """Show the documents whose titles hold what is searched for."""
        app = App.get_running_app()
        entries = app.library.entries()
        self.empty = not entries
        wanted = self.ids.search.text.strip().lower()
        shown = self.ids.documents
        shown.clear_widgets()
        if self._answer is not None:
            shown.add_widget(self._answer)
        for entry in in_order(entries, app.settings["sort"]):
            if wanted in entry.title.lower():
                shown.add_widget(self._card(entry))
        if self.empty:
            shown.add_widget(Factory.EmptyLibrary())

    def _card(self, entry: Entry) -> DocumentCard:
        t = App.get_running_app().t
        length = (
            t("pages", count=entry.pages)
            if entry.pages
            else t("words", count=f"{entry.characters:,}".replace(",", "\u202f"))
        )
        return DocumentCard(
            number=entry.id,
            title=entry.title,
            kind=entry.kind.upper(),
            detail=f"{entry.kind.upper()} · {length} · {entry.added[:10]}",
            label=f"{t('open')}: {entry.title}",
        )

    def ask(self) -> None:
        """Ask all documents what was typed."""
        app = App.get_running_app()
        question = self.ids.search.text.strip()
        if not question or (self._answer is not None and self._answer.live):
            return
        if not app.ready():
            app.notice(app.t("no_model"))
            return
        card = self._answer = AnswerCard(task="ask", title=question, named=True)
        card.live, card.body = True, app.t("reading" if app.loaded() else "loading")
        said: list[str] = []

        def work(cancel: Event) -> Iterator[Any]:
            from pocketslm.runtime.assistant.assistant import Assistant

            shelf = [app.library.open(entry.id) for entry in app.library.entries()]
            assistant = Assistant(app.model(), meanings=app.meanings())
            yield from assistant.ask(shelf, question, cancel, app.library.last_question(None))

        def event(event: Any) -> None:
            if isinstance(event, Answer):
                app.library.remember(None, event)
                card.show(event)
            elif isinstance(event, str):
                said.append(event)
                card.body = "".join(said)

        def failed(text: str) -> None:
            card.live, card.body = False, text

        app.start("engine", work, event, on_error=failed)
        self.ids.search.text = ""
        self.refresh()

    def sort(self) -> None:
        """Let a person choose what the documents are sorted by."""
        app = App.get_running_app()

        def chosen(value: str) -> None:
            app.settings["sort"] = value
            self.refresh()

        options = [(name, app.t(f"sort_{name}")) for name in SORTS]
        choose(app.t("sort"), options, app.settings["sort"], app.t("cancel"), chosen)

    def add(self) -> None:
        app = App.get_running_app()
        app.phone.pick("document", app.t("choose_document"), ENDINGS, app.add_document)

    def add_sample(self) -> None:
        App.get_running_app().add_document(Path(sample_document()))

    def remove(self, number: int, title: str) -> None:
        app = App.get_running_app()

        def really() -> None:
            app.screen("document").removed(number)
            app.library.remove(number)
            self.refresh()

        text = app.t("remove_question", title=title)
        confirm(app.t("remove"), text, app.t("remove"), app.t("cancel"), really, "danger")
