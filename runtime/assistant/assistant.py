"""The document assistant: summarise, ask, suggest questions, rewrite; on the device, no screen.

Every task is a generator of `Event`: pieces of text as they are made, and finally one `Answer`. To
stop a task, set the ``threading.Event`` that it was given as ``cancel``, from any thread. The task
then ends with the text so far and the finish "cancelled". Closing the generator stops it too.

An answer begins with quotes from the document, which need no model and are there at once. Where
they are doubtful, the model reads the nearest sentences again. Its own words follow only if their
numbers, names and negations stand in the text that it read.

Prompts begin with the document or its passages in their order, so that a model which keeps the
KV cache of what it read does not read them again for the next task.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from pocketslm.errors import BackendError, ContextOverflowError, PocketSlmError, UsageError
from pocketslm.runtime.assistant.answer import Answer, Citation, Event, Finish, Task
from pocketslm.runtime.assistant.document import Document
from pocketslm.runtime.assistant.following import standing_alone
from pocketslm.runtime.assistant.language import detect
from pocketslm.runtime.assistant.meaning import Meanings
from pocketslm.runtime.assistant.prompts import prompt, speaks
from pocketslm.runtime.assistant.quoting import PASSAGES, Quotes, choose
from pocketslm.runtime.assistant.rereading import MORE, is_doubtful, reread
from pocketslm.runtime.assistant.retrieval import Hit, search
from pocketslm.runtime.assistant.salience import (
    is_answered,
    is_prose,
    key_sentences,
    question_words,
    questions_in,
)
from pocketslm.runtime.assistant.support import ground_of
from pocketslm.runtime.assistant.words import sentences
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model, Record, ScoringModel, TextModel
from pocketslm.runtime.prefixes import Prefixes, shared

SUGGESTIONS = 3
KEY_SENTENCES = 5  # of a summary
TRIES = 2  # questions asked for with one sentence
NEW_TOKENS: dict[Task, int] = {"summarize": 120, "ask": 60, "suggest": 32, "rewrite": 320}
# For English. A part of a document is first assumed to have the most, then counted.
MOST_CHARACTERS_A_TOKEN = 8
# Tokens left free, because joined texts may take more tokens than the texts apart.
JOINTS = 8
LEAST_READ = 16
ENDS = ".!?。！？"  # of sentences that were not cut
QUOTE = 480  # characters of a sentence that a question is made of


def sample_document() -> Path:
    """A short document that ships with the package, to try things on."""
    return Path(str(resources.files(__package__).joinpath("samples", "apollo-8.txt")))


class Assistant:
    """A model that works on documents.

    config: how to generate; its ``max_new_tokens`` overrides those of the tasks. meanings: the
    vectors of the documents' library, to find by meaning as well; None finds by words only.
    prefixes: those of the library, so that a document which goes whole into a prompt is read once
    for all processes. Raises BackendError where the model cannot keep them.
    """

    # Greedy, and slow to repeat itself: small models fall into loops. Words of the document are
    # not penalized, or answers would avoid them.
    DEFAULTS = GenerationConfig(
        repetition_penalty=1.1, penalize_prompt=False, stop_strings=("</document>", "</text>")
    )
    # A small model reads this many tokens of a document well; of a longer one it gets passages.
    READ_TOKENS = 1200
    PASSAGES = 3

    def __init__(
        self,
        model: TextModel,
        config: GenerationConfig = DEFAULTS,
        meanings: Meanings | None = None,
        prefixes: Prefixes | None = None,
    ) -> None:
        self.model, self.config, self.meanings = model, config, meanings
        self._keeping: Model | None = None
        if prefixes is not None:
            if not isinstance(model, Model):
                raise BackendError(f"{model.backend} cannot keep prefixes; use --backend native")
            model.use_prefixes(prefixes)
            self._keeping = model

    def summarize(
        self, document: Document, cancel: threading.Event | None = None
    ) -> Iterator[Event]:
        """The document's key sentences, then the sentences of the model's summary that they
        support.

        A table, a log or code cannot be summarised as prose: the answer says what it is and how it
        begins.
        """
        run = _Run(self, "summarize", cancel=cancel)
        prose = is_prose(document)
        spans = key_sentences(document, KEY_SENTENCES) if prose else _first(document)
        citations = tuple(self._citation(document, *span) for span in sorted(spans))
        lead = self._prompt("key" if prose else "begins", document.language)
        quotes = [_line(document.text[c.start : c.end]) for c in citations]
        yield run.add("\n".join([lead, *(f"- {quote}" for quote in quotes)]))
        speaking = prose and quotes and speaks(self.model.name, document.language)
        if speaking and not run.cancelled():
            request = self._prompt("summarize")
            read = self._head("\n".join(quotes), self._budget("summarize", request))
            said = run.take(self._ids(read, request))
            kept = [
                said[a:b]
                for a, b in sentences(said)
                if said[b - 1] in ENDS
                and ground_of(said[a:b], quotes, "", document.language) is not None
            ]
            if kept:
                yield run.says(self._prompt("own", document.language), " ".join(kept))
        yield run.answer(citations=citations)

    def ask(
        self,
        documents: Document | Sequence[Document],
        question: str,
        cancel: threading.Event | None = None,
        before: str = "",
    ) -> Iterator[Event]:
        """Answer a question from one document, or from several of one library.

        ``before`` is the question before it, as it was understood (``Answer.asked``). A question
        that goes on from it, such as "And when?", takes words of it.

        The sentences that answer it come first, with title, page and heading; then the model's own
        sentence, if it is supported. If nothing answers the question, the answer says so and shows
        the nearest sentences, ``found`` is False and the model is not asked.
        """
        if not (question := " ".join(question.split())):
            raise UsageError("the question is empty")
        run = _Run(self, "ask", question, cancel)
        shelf = [documents] if isinstance(documents, Document) else list(documents)
        spoken = shelf[0].language if len(shelf) == 1 else detect(f"{before} {question}")
        question = standing_alone(question, before, spoken)
        hits, quotes = self.find(shelf, question)
        of = {document.id: document for document in shelf}
        first = of[quotes.citations[0].document] if quotes.citations else next(iter(shelf), None)
        language = first.language if first else ""
        by_meaning = any(hit.likeness is not None for hit in hits)
        run.answers(asked=question, by_meaning=by_meaning, found=quotes.found)
        if not quotes.citations:
            yield run.add(self._prompt("not-found", language))
            yield run.answer()
            return
        citations = quotes.citations
        lead = self._prompt("says" if quotes.found else "nearest", language)
        lines = [
            quoted(of[citation.document], citation, named=len(shelf) > 1)
            for citation in quotes.citations
        ]
        yield run.add("\n".join([lead, *lines]))
        again = self.read_again(shelf, hits, quotes, question, run.cancelled)
        if new := [one for one in again if one not in citations]:
            lines = [quoted(of[one.document], one, named=True) for one in new]
            yield run.add("\n".join(["", self._prompt("again", language), *lines]))
        citations = tuple(dict.fromkeys((*again, *citations)))
        if quotes.found and speaks(self.model.name, language) and not run.cancelled():
            request, begin = self._request("ask", question=question), self._prompt("ask-begin")
            text = self._context(shelf, hits, request, begin)
            ids = self._ids(text, request, begin=begin)
            if self._keeping is not None and text is shelf[0].text:
                same = shared(ids, self._ids(text, self._request("ask", question="")))
                run.read(self._keeping, shelf[0], ids[:same])
            said = run.take(ids, capital=True)
            own = next((said[a:b] for a, b in sentences(said)), "")
            grounds = [of[c.document].text[c.start : c.end] for c in quotes.grounds]
            at = ground_of(own, grounds, question, language)
            if at is not None and own[-1] in ENDS:
                if all(quotes.grounds[at].start != c.start for c in citations):
                    citations = (*citations, quotes.grounds[at])
                    ground = quotes.grounds[at]
                    line = quoted(of[ground.document], ground, named=len(shelf) > 1)
                    yield run.add(f"\n{line}")
                yield run.says(self._prompt("own", language), own)
        yield run.answer(citations=citations)

    def find(self, shelf: Sequence[Document], question: str) -> tuple[list[Hit], Quotes]:
        """The passages and sentences that answer a question, without the model."""
        hits = search(shelf, question, MORE, meanings=self.meanings)
        return hits, choose(hits[:PASSAGES], question)

    def read_again(
        self,
        shelf: Sequence[Document],
        hits: Sequence[Hit],
        quotes: Quotes,
        question: str,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> tuple[Citation, ...]:
        """The sentences of several documents that are nearest on a second look, the best first.

        Empty where what :meth:`find` gave is not doubtful, and where the model does not know the
        question's language or cannot score texts.
        """
        model = self.model
        if len(shelf) == 1 or not is_doubtful(hits[:PASSAGES], quotes):
            return ()
        if not isinstance(model, ScoringModel) or not speaks(model.name, detect(question)):
            return ()
        asked = model.tokenizer.encode(question)

        def probability(sentence: str) -> float:
            request = self._request("reread", sentence=sentence)
            ids = model.tokenizer.apply_chat_template([{"role": "user", "content": request}])
            return float(model.logprobs(ids, asked).sum())

        try:
            return reread(hits, question, probability, cancelled)
        except PocketSlmError:  # the context is tiny, or the engine has no logits but the last
            return ()

    def suggest(self, document: Document, cancel: threading.Event | None = None) -> Iterator[Event]:
        """At most three questions that the assistant itself answers with the sentence that each
        came from; none where there are none.

        Questions that the document itself asks come first, then those that the model makes of
        telling sentences.
        """
        run = _Run(self, "suggest", cancel=cancel)
        items: dict[str, Citation] = {}  # by the question

        def take(question: str, start: int, end: int) -> Iterator[str]:
            if len(items) == SUGGESTIONS or question in items:
                return
            _, quotes = self.find([document], question)
            first = quotes.citations[0] if quotes.found else None
            if first and first.start < end and first.end > start:
                items[question] = first
                yield run.add(f"{len(items)}. {question}\n")

        for question, start, end in questions_in(document):
            yield from take(question, start, end)
        if speaks(self.model.name, document.language) and is_prose(document):
            for start, end in key_sentences(document, 3 * SUGGESTIONS):
                sentence = _line(document.text[start:end])
                for begin in question_words(sentence)[:TRIES]:
                    if len(items) == SUGGESTIONS or run.cancelled():
                        break
                    question = f"{begin} {self._question(run, sentence, begin)}?"
                    if is_answered(question, sentence, document.language):
                        before = len(items)
                        yield from take(question, start, end)
                        if len(items) > before:
                            break
        if not items:
            yield run.add(self._prompt("no-questions", document.language))
        yield run.answer(items=tuple(items), citations=tuple(items.values()), found=bool(items))

    def rewrite(
        self,
        passage: str,
        instruction: str = "in simple words",
        cancel: threading.Event | None = None,
    ) -> Iterator[Event]:
        """Say the passage differently. Raises ContextOverflowError if it is too long."""
        if not passage.strip():
            raise UsageError("the passage is empty")
        run = _Run(self, "rewrite", instruction, cancel)
        request = self._request("rewrite", instruction=instruction)
        if not self._fits(passage, self._budget("rewrite", request)):
            raise ContextOverflowError("the passage is too long to rewrite at once; take a part")
        yield from run.pieces(self._ids(passage, request, frame="passage"))
        yield run.answer(own=run.text.strip())

    def _citation(self, document: Document, start: int, end: int) -> Citation:
        chunk = next(chunk for chunk in document.chunks if chunk.start <= start < chunk.end)
        return Citation(chunk.index, start, end, document.id)

    def _context(
        self, shelf: Sequence[Document], hits: Sequence[Hit], request: str, begin: str
    ) -> str:
        """The text for the prompt: all of a short document, or the first passages that fit."""
        budget = self._budget("ask", request, begin)
        if len(shelf) == 1 and self._fits(shelf[0].text, budget):
            return shelf[0].text
        kept: list[Hit] = []
        for hit in hits[: self.PASSAGES]:
            more = sorted([*kept, hit], key=lambda hit: (hit.document.id, hit.chunk.index))
            if not self._fits(_join(more), budget):
                break
            kept = more
        # Even one may be too long for a tiny context.
        return _join(kept) if kept else self._head(_join(hits[:1]), budget)

    def _question(self, run: _Run, sentence: str, begin: str) -> str:
        """The rest of a question that a sentence answers."""
        request = self._request("suggest", evidence=sentence[:QUOTE])
        content = [{"role": "user", "content": request}]
        tokenizer = self.model.tokenizer
        ids = tokenizer.apply_chat_template(content)
        ids += tokenizer.encode(f"{self._prompt('suggest-begin')} {begin}")
        if len(ids) + self._new_tokens("suggest") > self.model.context:
            return ""
        return run.take(ids, stop=("\n", "?"))

    def _fits(self, text: str, budget: int) -> bool:
        return len(text) <= budget * MOST_CHARACTERS_A_TOKEN and self._tokens(text) <= budget

    def _head(self, text: str, budget: int) -> str:
        """The beginning of a text of at most ``budget`` tokens, cut between paragraphs or words."""
        end = min(len(text), budget * MOST_CHARACTERS_A_TOKEN)
        while (tokens := self._tokens(text[:end])) > budget:
            end = min(end - 1, int(end * budget / tokens))
        if end < len(text):
            for mark in ("\n\n", "\n", ". ", " "):
                if (at := text.rfind(mark, end // 2, end)) > 0:
                    end = at + len(mark)
                    break
        return text[:end].strip()

    def _tokens(self, text: str) -> int:
        return len(self.model.tokenizer.encode(text))

    def _budget(self, task: Task, request: str, begin: str = "") -> int:
        """How many tokens of a document fit beside a request and what is to be generated."""
        used = len(self._ids("", request, begin=begin)) + self._new_tokens(task) + JOINTS
        room = self.model.context - used
        if room < LEAST_READ:
            raise ContextOverflowError(
                f"the request takes {used} tokens of the context of {self.model.context}; shorten "
                "it, lower --max-new-tokens or export with a longer --context"
            )
        return min(room, self.READ_TOKENS)

    def _new_tokens(self, task: Task) -> int:
        return self.config.max_new_tokens or min(NEW_TOKENS[task], self.model.context // 4)

    def _ids(
        self, text: str, request: str, *, frame: str = "document", begin: str = ""
    ) -> list[int]:
        """The prompt's tokens. ``begin`` is the forced beginning of the answer."""
        before, _, after = self._prompt(frame).partition("{document}")
        content = before + text + after.replace("{request}", request)
        tokenizer = self.model.tokenizer
        return [
            *tokenizer.apply_chat_template([{"role": "user", "content": content}]),
            *tokenizer.encode(begin),
        ]

    def _request(self, name: str, /, **values: str) -> str:
        """Fill in the {names} of a prompt. Braces in the values stay as they are."""
        return re.sub(r"\{(\w+)\}", lambda found: values[found[1]], self._prompt(name))

    def _prompt(self, name: str, language: str = "") -> str:
        return prompt(name, self.model.name, language)


def quoted(document: Document, citation: Citation, *, named: bool = False) -> str:
    """A cited passage on one line, with its page and heading, and its document's title if named."""
    chunk = document.chunks[citation.chunk]
    where = (
        document.title if named else "",
        f"page {chunk.page}" if chunk.page else "",
        chunk.heading,
    )
    place = ", ".join(filter(None, where))
    quote = f"“{_line(document.text[citation.start : citation.end])}”"
    return f"{quote} ({place})" if place else quote


def _line(text: str) -> str:
    return " ".join(text.split())


def _first(document: Document) -> list[tuple[int, int]]:
    """The first lines of a document."""
    return sentences(document.text[: document.chunks[0].end])[:KEY_SENTENCES]


def _join(hits: Sequence[Hit]) -> str:
    return "\n\n".join(hit.document.passage(hit.chunk) for hit in hits)


class _Run:
    """A task under way: its text so far, and its cost."""

    def __init__(
        self,
        assistant: Assistant,
        task: Task,
        request: str = "",
        cancel: threading.Event | None = None,
    ) -> None:
        self.text = ""
        self._assistant, self._task, self._request = assistant, task, request
        self._cancel = cancel or threading.Event()
        self._start = time.perf_counter()
        self._read_ms = 0.0  # of a prompt's beginning
        self._answer = Answer(task, request, "", "none")

    def cancelled(self) -> bool:
        return self._cancel.is_set()

    def add(self, text: str) -> str:
        """Add text that no model made."""
        self.text += text
        return text

    def says(self, lead: str, own: str) -> str:
        """Add the model's own words, under a line that says whose they are."""
        self.answers(own=own)
        return self.add(f"\n\n{lead} {own}")

    def answers(self, **changes: Any) -> None:
        """What the answer will say."""
        self._answer = replace(self._answer, **changes)

    def read(self, model: Model, document: Document, beginning: Sequence[int]) -> None:
        """Read what the prompts about a document begin with, and keep it for the next question."""
        start = time.perf_counter()
        model.keep_prefix(beginning, str(document.id))
        document.library.forget_prefix(document.id)
        self._read_ms += (time.perf_counter() - start) * 1e3

    def pieces(
        self, ids: Sequence[int], stop: tuple[str, ...] = (), *, capital: bool = False
    ) -> Iterator[str]:
        """Generate, add to the text and yield its pieces, without space before the first.

        capital: the text, which continues a forced beginning, shall begin a sentence.
        """
        config = self._assistant.config
        config = config.but(
            max_new_tokens=self._assistant._new_tokens(self._task),
            stop_strings=config.stop_strings + stop,
        )
        if self.cancelled():
            return
        seen: list[Record] = []
        finish: Finish = "cancelled"
        records = self._assistant.model.generate(ids, config)
        try:
            for record in records:
                seen.append(record)
                piece = record.text if self.text else record.text.lstrip()
                if capital and not self.text:
                    piece = piece[:1].upper() + piece[1:]
                self.text += piece
                if piece:
                    yield piece
                if record.finish:
                    finish = record.finish
                elif self.cancelled():
                    break
        finally:
            records.close()  # type: ignore[attr-defined]  # a generator, by `TextModel`
        if not seen:  # cancelled while the prompt was read
            return
        seconds = (seen[-1].time_ns - seen[0].time_ns) / 1e9
        self._answer = replace(
            self._answer,
            finish=finish,
            prompt_tokens=len(ids),
            new_tokens=len(seen),
            ttft_ms=self._read_ms + seen[0].time_ns / 1e6,
            decode_tps=(len(seen) - 1) / seconds if seconds else None,
        )

    def take(self, ids: Sequence[int], stop: tuple[str, ...] = (), *, capital: bool = False) -> str:
        """Generate a text that is not yet part of the answer."""
        before, self.text = self.text, ""
        for _ in self.pieces(ids, stop, capital=capital):
            pass
        text, self.text = self.text.strip(), before
        return text

    def answer(self, **changes: Any) -> Answer:
        """The end of the task."""
        answer = replace(
            self._answer, text=self.text.strip(), seconds=time.perf_counter() - self._start
        )
        return replace(answer, **changes | ({"finish": "cancelled"} if self.cancelled() else {}))
