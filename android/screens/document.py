"""A document: its text with what was cited, and what was asked about it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Event
from typing import Any

from kivy.app import App
from kivy.clock import Clock
from kivy.core.clipboard import Clipboard
from kivy.factory import Factory
from kivy.metrics import dp
from kivy.properties import (
    BooleanProperty,
    ListProperty,
    NumericProperty,
    ObjectProperty,
    StringProperty,
)
from kivy.uix.boxlayout import BoxLayout
from kivy.uix.screenmanager import Screen

from pocketslm.android.engine.worker import Job
from pocketslm.android.intents import Action
from pocketslm.android.reading import button_of, next_place, pieces, shared
from pocketslm.android.screens.action import ask_before
from pocketslm.android.widgets.basics import Card
from pocketslm.android.widgets.sheet import ask_text
from pocketslm.android.widgets.text import Passage
from pocketslm.errors import DocumentError
from pocketslm.runtime.assistant.answer import Answer, Citation
from pocketslm.runtime.assistant.document import Document

LEAF_CHARACTERS = 5000
"""The reader shows a long document in leaves of about this size: its cost is that of one."""
CARDS = 20
"""Answers shown at once; earlier ones come when they are asked for."""


@dataclass
class Running:
    """A task under way on a document: its job, what it said, its card while that is shown."""

    task: str
    request: str
    body: str
    job: Job | None = None
    card: AnswerCard | None = None
    gone: bool = False  # the document was removed

    def say(self, body: str) -> None:
        self.body = body
        if self.card is not None:
            self.card.body = body


class AnswerCard(Card):
    """A task, its answer as it grows, and what can be done with it."""

    task = StringProperty("ask")
    title = StringProperty("")
    body = StringProperty("")
    note = StringProperty("")
    live = BooleanProperty(False)
    citations = ListProperty()
    items = ListProperty()
    answer = ObjectProperty(None, allownone=True)
    named = BooleanProperty(False)  # its passages are of several documents

    def show(self, answer: Answer) -> None:
        """The finished answer."""
        t = App.get_running_app().t
        self.live = False
        self.answer = answer
        self.body = "" if answer.items else answer.text
        self.items = list(answer.items)
        self.citations = list(answer.citations)
        notes = []
        if answer.finish == "interrupted":
            notes.append(t("interrupted"))
        elif answer.finish == "cancelled":
            notes.append(t("stopped"))
        if not answer.found:
            notes.append(t("not_found"))
        if answer.task == "ask":
            if answer.asked not in ("", answer.request):
                notes.append(t("asked_as", question=answer.asked))
            notes.append(t("by_meaning" if answer.by_meaning else "by_words"))
        if not answer.citations:
            notes.append(t("nothing_cited"))
        if answer.new_tokens:
            notes.append(t("tokens", count=answer.new_tokens))
            if answer.decode_tps:
                notes.append(t("per_second", count=f"{answer.decode_tps:.0f}"))
        self.note = " · ".join(notes)

    def on_citations(self, *_: Any) -> None:
        self._chips()

    def on_items(self, *_: Any) -> None:
        self._chips()

    def on_width(self, *_: Any) -> None:
        for chip in self.ids.chips.children:
            chip.widest = self.width - dp(32)

    def _chips(self) -> None:
        app = App.get_running_app()
        screen = app.screen("document")
        flow = self.ids.chips
        flow.clear_widgets()
        for item in self.items:
            chip = Factory.Chip(text=item, marked=True, widest=max(dp(120), self.width - dp(32)))
            chip.bind(on_release=lambda _, item=item: screen.ask(item))
            flow.add_widget(chip)
        for number, citation in enumerate(self.citations, 1):
            document = screen.document_of(citation)
            if document is None:  # it was removed
                continue
            text = button_of(document, citation, number, named=self.named)
            chip = Factory.Chip(text=text, widest=max(dp(120), self.width - dp(32)))
            chip.label = app.t("passage", number=number)
            chip.bind(on_release=lambda _, citation=citation: screen.show(citation))
            flow.add_widget(chip)

    def share(self) -> None:
        """Send the answer with where it stands, after it was seen and confirmed."""
        if self.answer is not None:
            ask_before(Action("share_text", {"text": self._with_places(self.answer)}))

    def copy(self) -> None:
        """Copy the answer with where it stands."""
        app = App.get_running_app()
        if self.answer is not None:
            Clipboard.copy(self._with_places(self.answer))
            app.notice(app.t("copied"))

    def _with_places(self, answer: Answer) -> str:
        screen = App.get_running_app().screen("document")
        found = {c.document: screen.document_of(c) for c in answer.citations}
        return shared(answer, {key: document for key, document in found.items() if document})


class Reader(BoxLayout):
    """The text of a document, one leaf at a time, with a passage marked."""

    leaf = NumericProperty(0)
    leaves = NumericProperty(1)
    label = StringProperty("")

    def open(self, document: Document) -> None:
        """Cut into pieces that fit a label, and these into leaves."""
        self._document = document
        self._pieces = list(pieces(document.text))
        self._starts = [start for start, _ in self._pieces]
        self._first = [0]  # piece of each leaf
        size = 0
        for number, (start, end) in enumerate(self._pieces):
            if size > LEAF_CHARACTERS:
                self._first.append(number)
                size = 0
            size += end - start
        self.leaves = len(self._first)
        self._mark: tuple[int, int] | None = None
        self.ids.find.text = ""
        self.leaf = 0
        self._show()

    def turn(self, by: int) -> None:
        self.leaf = min(max(0, self.leaf + by), self.leaves - 1)
        self._show()

    def find(self, text: str) -> None:
        """Show and mark the next place of a text; behind the last comes the first."""
        app = App.get_running_app()
        span = next_place(self._document.text, text, self._mark[1] if self._mark else 0)
        if span is not None:
            self.mark(*span)
        elif text.strip():
            app.notice(app.t("nowhere", text=text.strip()))

    def mark(self, start: int, end: int) -> None:
        """Show and mark a part of the text."""
        self._mark = (start, end)
        piece = max(0, bisect_right(self._starts, start) - 1)
        self.leaf = bisect_right(self._first, piece) - 1
        self._show()
        marked = next((p for p in self._passages() if p.marks), None)
        if marked:
            Clock.schedule_once(lambda _: self.ids.page.scroll_to(marked, dp(80), False), 0.1)

    def _passages(self) -> list[Passage]:
        return [child for child in self.ids.text.children if isinstance(child, Passage)][::-1]

    def _show(self) -> None:
        body, text = self.ids.text, self._document.text
        body.clear_widgets()
        begin = self._first[self.leaf]
        end = self._first[self.leaf + 1] if self.leaf + 1 < self.leaves else len(self._pieces)
        for start, stop in self._pieces[begin:end]:
            # Tabs are boxes in the font; each is one character, or marks would move.
            passage = Passage(content=text[start:stop].replace("\t", " "))
            if self._mark and self._mark[0] < stop and self._mark[1] > start:
                passage.marks = [
                    (max(self._mark[0], start) - start, min(self._mark[1], stop) - start)
                ]
            body.add_widget(passage)
        self.ids.page.scroll_y = 1


class DocumentScreen(Screen):
    """``part``: what a phone shows of the two halves, "assistant" or "document"."""

    title = StringProperty("")
    part = StringProperty("assistant")
    busy = BooleanProperty(False)
    status = StringProperty("")
    document = ObjectProperty(None, allownone=True)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._running: dict[int, Running] = {}  # by document
        self._shown = CARDS

    def open(self, document: Document) -> None:
        """Show a document with its history, and with the answer that is being made of it."""
        app = App.get_running_app()
        self.document = document
        self.title = document.title
        self.ids.reader.open(document)
        self._shown = CARDS
        self._history()
        self.ids.question.text = app.settings["drafts"].get(str(document.id), "")
        self._to_end()

    def earlier(self) -> None:
        """Show more of the history."""
        self._shown += CARDS
        self._history()

    def _history(self) -> None:
        app = App.get_running_app()
        self.ids.history.clear_widgets()
        asked = app.library.history(self.document.id)
        if len(asked) > self._shown:
            more = Factory.Push(text=app.t("earlier_answers"), kind="plain")
            more.bind(on_release=lambda _: self.earlier())
            self.ids.history.add_widget(more)
        for one in asked[-self._shown :]:
            self._card(one.answer.task, one.answer.request).show(one.answer)
        running = self._running.get(self.document.id)
        if running is not None and running.task != "act":
            running.card = self._card(running.task, running.request)
            running.card.live, running.card.body = True, running.body
        self.busy = running is not None
        self._hint()

    def document_of(self, citation: Citation) -> Document | None:
        """The document that a passage is of; None where it is gone."""
        if self.document is not None and citation.document in (0, self.document.id):
            return self.document
        try:
            return App.get_running_app().library.open(citation.document)
        except DocumentError:
            return None

    def removed(self, number: int) -> None:
        """Stop what is made of a document that is gone."""
        running = self._running.pop(number, None)
        if running is not None:
            running.gone = True
            self._cancel(running)

    def rename(self) -> None:
        """Give the document another title."""
        app = App.get_running_app()
        number = self.document.id

        def named(title: str) -> None:
            app.library.rename(number, title)
            self.document, self.title = app.library.open(number), title
            app.screen("library").refresh()

        ask_text(app.t("rename"), self.title, app.t("save"), app.t("cancel"), named)

    def part_of(self, name: str) -> None:
        self.part = name

    def show(self, citation: Citation) -> None:
        """Turn to a cited passage, of another document if need be."""
        document = self.document_of(citation)
        if document is None:
            return
        if self.document is None or document.id != self.document.id:
            App.get_running_app().open_document(document.id)
        self.part = "document"
        self.ids.reader.mark(citation.start, citation.end)

    def summarize(self) -> None:
        self._start("summarize", "")

    def suggest(self) -> None:
        self._start("suggest", "")

    def send(self) -> None:
        """Ask what was typed, or stop the answer that is being made."""
        if self.busy:
            self.stop()
        elif question := self.ids.question.text.strip():
            self.ids.question.text = ""
            self.ask(question)

    def ask(self, question: str) -> None:
        self._start("ask", question)

    def stop(self) -> None:
        if self.document is not None and self.document.id in self._running:
            self._cancel(self._running[self.document.id])

    def _cancel(self, running: Running) -> None:
        if running.job is not None:
            running.job.cancel.set()
            App.get_running_app().cancel_job(running.job)

    def draft(self, text: str) -> None:
        """Keep what is typed; it survives the app."""
        if self.document is not None:
            app = App.get_running_app()
            drafts = {k: v for k, v in app.settings["drafts"].items() if k != str(self.document.id)}
            app.settings["drafts"] = drafts | ({str(self.document.id): text} if text else {})

    def act(self) -> None:
        """Let the model propose an action for what was typed."""
        app = App.get_running_app()
        request = self.ids.question.text.strip()
        if not request:
            app.notice(app.t("act_hint"))
            return
        number = self.document.id

        def work(_: Event) -> Iterator[Action]:
            from pocketslm.android.intents import propose

            yield propose(app.model(), request)

        def proposed(action: Action) -> None:
            self.ids.question.text = ""
            ask_before(action)

        running = self._begin("act", request)
        running.job = app.start("engine", work, proposed, lambda: self._end(number))

    def tick(self) -> None:
        """What the line above the question says now."""
        app = App.get_running_app()
        self.status = app.engine_status(self.busy)
        if self.busy:
            app.settings.save()  # the answer as far as it has come

    def _start(self, task: str, request: str) -> None:
        app = App.get_running_app()
        if self.busy or self.document is None:
            return
        if not app.ready():
            app.notice(app.t("no_model"))
            return
        self.part = "assistant"
        document = self.document
        running = self._begin(task, request)
        running.card = self._card(task, request)
        running.card.live = True
        running.say(app.t("reading" if app.loaded() else "loading"))
        pending = {"document": document.id, "task": task, "request": request, "text": ""}

        def work(cancel: Event) -> Iterator[Any]:
            from pocketslm.runtime.assistant.assistant import Assistant

            assistant = Assistant(app.model(), meanings=app.meanings())
            if task == "summarize":
                yield from assistant.summarize(document, cancel)
            elif task == "suggest":
                yield from assistant.suggest(document, cancel)
            else:
                before = app.library.last_question(document.id)
                yield from assistant.ask(document, request, cancel, before)

        def event(event: Any) -> None:
            if running.gone:
                return
            if isinstance(event, Answer):
                app.library.remember(document.id, event)
                if running.card is not None:
                    running.card.show(event)
            elif isinstance(event, str):
                pending["text"] += event
                app.settings["pending"] = pending
                running.say(pending["text"])
            if self.document is document:
                self._to_end()

        def failed(text: str) -> None:
            if running.card is not None:
                running.card.live = False
            running.say(text)

        def ended() -> None:
            app.settings["pending"] = None
            self._end(document.id)

        running.job = app.start("engine", work, event, ended, failed)
        self._to_end()

    def _begin(self, task: str, request: str) -> Running:
        running = self._running[self.document.id] = Running(task, request, "")
        self.busy = True
        return running

    def _end(self, number: int) -> None:
        self._running.pop(number, None)
        self.busy = self.document is not None and self.document.id in self._running

    def _card(self, task: str, request: str) -> AnswerCard:
        t = App.get_running_app().t
        title = request or t({"summarize": "summary_of", "suggest": "suggestions"}.get(task, "act"))
        card = AnswerCard(task=task, title=title)
        self.ids.history.add_widget(card)
        self._hint()
        return card

    def _hint(self) -> None:
        self.ids.hint.opacity = 0 if self.ids.history.children else 1

    def _to_end(self) -> None:
        def move(_: float) -> None:
            page = self.ids.answers
            page.scroll_y = 0 if self.ids.history.height > page.height else 1

        Clock.schedule_once(move, 0.05)
