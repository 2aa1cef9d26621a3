"""The documents on this device."""

from __future__ import annotations

from pathlib import Path

from kivy.app import App
from kivy.factory import Factory
from kivy.properties import BooleanProperty, NumericProperty, StringProperty
from kivy.uix.screenmanager import Screen

from pocketslm.android.widgets.basics import TapCard
from pocketslm.android.widgets.sheet import confirm
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

    def refresh(self) -> None:
        """Show the documents whose titles hold what is searched for."""
        app = App.get_running_app()
        entries = app.library.entries()
        self.empty = not entries
        wanted = self.ids.search.text.strip().lower()
        shown = self.ids.documents
        shown.clear_widgets()
        for entry in entries:
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

    def add(self) -> None:
        app = App.get_running_app()
        app.phone.pick("document", app.t("choose_document"), ENDINGS, app.add_document)

    def add_sample(self) -> None:
        App.get_running_app().add_document(Path(sample_document()))

    def remove(self, number: int, title: str) -> None:
        app = App.get_running_app()

        def really() -> None:
            app.library.remove(number)
            self.refresh()

        text = app.t("remove_question", title=title)
        confirm(app.t("remove"), text, app.t("remove"), app.t("cancel"), really, "danger")
