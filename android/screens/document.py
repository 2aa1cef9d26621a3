"""A document: its text with what was cited, and what was asked about it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from threading import Event
from typing import Any

from kivy.app import App
from kivy.clock import Clock
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
from pocketslm.android.screens.action import ask_before
from pocketslm.android.widgets.basics import Card
from pocketslm.android.widgets.text import Passage
from pocketslm.runtime.assistant.answer import Answer, Citation, Progress
from pocketslm.runtime.assistant.document import Document

LEAF_CHARACTERS = 5000
"""The reader shows a long document in leaves of about this size: its cost is that of one."""


class AnswerCard(Card):
    """A task, its answer as it grows, and what can be done with it."""

    task = StringProperty("ask")
    title = StringProperty("")
    body = StringProperty("")
    note = StringProperty("")
    live = BooleanProperty(False)
    citations = ListProperty()
    items = ListProperty()

    def show(self, answer: Answer, interrupted: bool = False) -> None:
        """The finished answer."""
        t = App.get_running_app().t
        self.live = False
        self.body = "" if answer.items else answer.text
        self.items = list(answer.items)
        self.citations = list(answer.citations)
        notes = []
        if interrupted:
            notes.append(t("interrupted"))
        elif answer.finish == "cancelled":
            notes.append(t("stopped"))
        if not answer.found:
            notes.append(t("not_found"))
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
            chip = Factory.Chip(text=app.t("passage", number=number), widest=dp(200))
            chip.bind(on_release=lambda _, citation=citation: screen.show(citation))
            flow.add_widget(chip)


class Reader(BoxLayout):
    """The text of a document, one leaf at a time, with a passage marked."""

    leaf = NumericProperty(0)
    leaves = NumericProperty(1)
    label = StringProperty("")

    def open(self, document: Document) -> None:
        """Cut into paragraphs, and these into leaves."""
        self._document = document
        self._starts: list[int] = []  # of each paragraph
        self._first = [0]  # paragraph of each leaf
        at = size = 0
        for paragraph in document.text.split("\n\n"):
            if size > LEAF_CHARACTERS:
                self._first.append(len(self._starts))
                size = 0
            self._starts.append(at)
            at += len(paragraph) + 2
            size += len(paragraph)
        self.leaves = len(self._first)
        self._mark: tuple[int, int] | None = None
        self.leaf = 0
        self._show()

    def turn(self, by: int) -> None:
        self.leaf = min(max(0, self.leaf + by), self.leaves - 1)
        self._show()

    def mark(self, citation: Citation) -> None:
        """Show and mark a passage."""
        self._mark = (citation.start, citation.end)
        paragraph = bisect_right(self._starts, citation.start) - 1
        self.leaf = bisect_right(self._first, paragraph) - 1
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
        end = self._first[self.leaf + 1] if self.leaf + 1 < self.leaves else len(self._starts)
        for number in range(begin, end):
            start = self._starts[number]
            stop = self._starts[number + 1] - 2 if number + 1 < len(self._starts) else len(text)
            passage = Passage(content=text[start:stop])
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

    def open(self, document: Document) -> None:
        """Show a document with its history."""
        app = App.get_running_app()
        self.document = document
        self.title = document.title
        self.ids.reader.open(document)
        self.ids.history.clear_widgets()
        for asked in app.library.history(document.id):
            self._card(asked.answer.task, asked.answer.request).show(asked.answer)
        self.ids.question.text = app.settings["drafts"].get(str(document.id), "")
        self._hint()
        self._to_end()

    def part_of(self, name: str) -> None:
        self.part = name

    def show(self, citation: Citation) -> None:
        """Turn to a cited passage."""
        self.part = "document"
        self.ids.reader.mark(citation)

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
        if self._job is not None:
            self._job.cancel.set()
            App.get_running_app().cancel_engine()

    def draft(self, text: str) -> None:
        """Keep what is typed; it survives the app."""
        if self.document is not None:
            app = App.get_running_app()
            drafts = {k: v for k, v in app.settings["drafts"].items() if k != str(self.document.id)}
            app.settings["drafts"] = drafts | ({str(self.document.id): text} if text else {})

    def share(self, text: str) -> None:
        ask_before(Action("share_text", {"text": text[:400]}))

    def act(self) -> None:
        """Let the model propose an action for what was typed."""
        app = App.get_running_app()
        request = self.ids.question.text.strip()
        if not request:
            app.notice(app.t("act_hint"))
            return

        def work(_: Event) -> Iterator[Action]:
            from pocketslm.android.intents import propose

            yield propose(app.model(), request)

        def proposed(action: Action) -> None:
            self.ids.question.text = ""
            ask_before(action)

        self._job = app.start("engine", work, proposed, self._idle)
        self.busy = self._job is not None

    def tick(self) -> None:
        """What the line above the question says now."""
        app = App.get_running_app()
        self.status = app.engine_status(self.busy)
        if self.busy:
            app.settings.save()  # the answer as far as it has come

    _job: Job | None = None

    def _start(self, task: str, request: str) -> None:
        app = App.get_running_app()
        if self.busy or self.document is None:
            return
        if not app.ready():
            app.notice(app.t("no_model"))
            return
        self.part = "assistant"
        document = self.document
        card = self._card(task, request)
        card.live, card.body = True, app.t("reading" if app.loaded() else "loading")
        pending = {"document": document.id, "task": task, "request": request, "text": ""}
        app.settings["pending"] = pending

        def work(cancel: Event) -> Iterator[Any]:
            from pocketslm.runtime.assistant.assistant import Assistant

            assistant = Assistant(app.model())
            if task == "summarize":
                yield from assistant.summarize(document, cancel)
            elif task == "suggest":
                yield from assistant.suggest(document, cancel)
            else:
                yield from assistant.ask(document, request, cancel)

        def event(event: Any) -> None:
            if isinstance(event, Answer):
                app.library.remember(document.id, event)
                card.show(event)
            elif isinstance(event, Progress):
                card.body = app.t("reading_part", done=event.done + 1, total=event.total)
            else:
                pending["text"] += event
                card.body = pending["text"]
            self._to_end()

        def failed(text: str) -> None:
            card.live, card.body = False, text

        def ended() -> None:
            app.settings["pending"] = None
            self._idle()

        self.busy = True
        self._job = app.start("engine", work, event, ended, failed)
        self._to_end()

    def _idle(self) -> None:
        self.busy, self._job = False, None

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
