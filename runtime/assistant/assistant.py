"""The document assistant: summarise, ask, suggest questions, rewrite; on the device, no screen.

Every task is a generator of `Event`: pieces of text as they are made, and at last one `Answer`.
To stop one, set the ``threading.Event`` given as ``cancel``, from any thread: it ends with what it
has, as finish "cancelled". Closing the generator stops it too.

Prompts begin with the document or its passages in their order, so that a model which keeps the
KV cache of what it read does not read them again for the next task.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from pocketslm.errors import ContextOverflowError, UsageError
from pocketslm.runtime.assistant.answer import Answer, Citation, Event, Finish, Progress, Task
from pocketslm.runtime.assistant.citing import cite
from pocketslm.runtime.assistant.document import Chunk, Document
from pocketslm.runtime.assistant.prompts import prompt
from pocketslm.runtime.assistant.retrieval import answers, search
from pocketslm.runtime.assistant.salience import (
    common_names,
    condense,
    is_answered,
    key_sentences,
    question_words,
)
from pocketslm.runtime.assistant.words import sentences
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Record, TextModel

SUGGESTIONS = 3
TRIES = 2  # questions asked for with one sentence
NEW_TOKENS: dict[Task, int] = {"summarize": 160, "ask": 80, "suggest": 32, "rewrite": 320}
# Of English; a part of a document is first taken to have the most, and counted then.
CHARACTERS_A_TOKEN, MOST_CHARACTERS_A_TOKEN = 4, 8
# Tokens left free, because texts joined may be more tokens than apart.
JOINTS = 8
LEAST_READ = 16
QUOTE = 480  # characters of a sentence that a question is made of


def sample_document() -> Path:
    """A short document that ships with the package, to try things on."""
    return Path(str(resources.files(__package__).joinpath("samples", "apollo-8.txt")))


class Assistant:
    """A model that works on documents.

    config: how to generate; its ``max_new_tokens`` overrides those of the tasks.
    """

    # Greedy, and slow to repeat itself: small models fall into loops. Words of the document are
    # not penalized, or answers would avoid them.
    DEFAULTS = GenerationConfig(
        repetition_penalty=1.1, penalize_prompt=False, stop_strings=("</document>", "</text>")
    )
    # A small model reads this many tokens of a document well; of a longer one it gets passages.
    READ_TOKENS = 1200
    PASSAGES = 3
    # A document of more parts than this is cut to its telling sentences before it is summarised.
    MOST_PARTS = 12

    def __init__(self, model: TextModel, config: GenerationConfig = DEFAULTS) -> None:
        self.model, self.config = model, config

    def summarize(
        self, document: Document, cancel: threading.Event | None = None
    ) -> Iterator[Event]:
        """What the document says, in a few sentences; of a long one, by summaries of its parts."""
        run = _Run(self, "summarize", cancel=cancel)
        budget = self._budget("summarize", self._prompt("combine"))
        most = self.MOST_PARTS * budget * CHARACTERS_A_TOKEN
        text = document.text if len(document.text) <= most else condense(document, most)
        name = "summarize"
        while len(parts := self._parts(text, budget)) > 1 and not run.cancelled():
            notes = []
            for done, part in enumerate(parts):
                yield Progress(done, len(parts) + 1)
                notes.append(run.take(self._ids(part, self._prompt(name))))
            shorter = "\n".join(notes)
            # Where a model's notes are as long as what it read, half of them must do.
            text = shorter if len(shorter) < len(text) // 2 else shorter[: len(text) // 2]
            name = "combine"
        yield from run.pieces(self._ids(parts[0], self._prompt(name)))
        yield run.answer(citations=self._sources(document, run.text))

    def ask(
        self, document: Document, question: str, cancel: threading.Event | None = None
    ) -> Iterator[Event]:
        """An answer with the passages it rests on; found=False where the document has none."""
        if not (question := " ".join(question.split())):
            raise UsageError("the question is empty")
        run = _Run(self, "ask", question, cancel)
        hits = search(document, question, self.PASSAGES)
        if not answers(document, question, hits):
            yield (text := self._prompt("not-found"))
            yield run.answer(text=text, found=False)
            return
        found = [hit.chunk for hit in hits]
        request = self._request("ask", question=question)
        begin = self._prompt("ask-begin")
        text, chunks = self._context(document, found, request, begin)
        ids = self._ids(text, request, begin=begin)
        yield from run.pieces(ids, stop=("\n",), capital=True)
        yield run.answer(citations=cite(document, chunks, run.text, question))

    def suggest(self, document: Document, cancel: threading.Event | None = None) -> Iterator[Event]:
        """Three questions that the document answers; ``items`` are always three.

        Each is made of one telling sentence, and kept if its passage holds its words. Where too
        few remain, questions that need no model take their place.
        """
        run = _Run(self, "suggest", cancel=cancel)
        items: dict[str, Citation] = {}  # by the question
        used: Counter[str] = Counter()  # question words of the items
        for start, end in key_sentences(document, 2 * SUGGESTIONS):
            sentence = " ".join(document.text[start:end].split())
            chunk = next(chunk for chunk in document.chunks if chunk.start <= start < chunk.end)
            for begin in sorted(question_words(sentence), key=used.__getitem__)[:TRIES]:
                if len(items) == SUGGESTIONS or run.cancelled():
                    break
                question = f"{begin} {self._question(run, sentence, begin)}?"
                if is_answered(question, document.passage(chunk)) and question not in items:
                    items[question] = Citation(chunk.index, start, end)
                    used[begin] += 1
                    yield f"{len(items)}. {question}\n"
                    break
        for question, citation in self._plain_questions(document):
            if len(items) == SUGGESTIONS:
                break
            if question not in items:
                items[question] = citation
                yield f"{len(items)}. {question}\n"
        text = "\n".join(f"{number}. {item}" for number, item in enumerate(items, 1))
        yield run.answer(text=text, items=tuple(items), citations=tuple(items.values()))

    def rewrite(
        self,
        passage: str,
        instruction: str = "in simple words",
        cancel: threading.Event | None = None,
    ) -> Iterator[Event]:
        """The passage said differently; ContextOverflowError where it is too long."""
        if not passage.strip():
            raise UsageError("the passage is empty")
        run = _Run(self, "rewrite", instruction, cancel)
        request = self._request("rewrite", instruction=instruction)
        if not self._fits(passage, self._budget("rewrite", request)):
            raise ContextOverflowError("the passage is too long to rewrite at once; take a part")
        yield from run.pieces(self._ids(passage, request, frame="passage"))
        yield run.answer()

    def _context(
        self, document: Document, chunks: Sequence[Chunk], request: str, begin: str
    ) -> tuple[str, Sequence[Chunk]]:
        """What of the document goes into the prompt: all of a short one, else the first of these
        chunks that fit, in the document's order."""
        budget = self._budget("ask", request, begin)
        if self._fits(document.text, budget):
            return document.text, document.chunks
        kept: list[Chunk] = []
        for chunk in chunks:
            more = sorted([*kept, chunk], key=lambda chunk: chunk.index)
            if not self._fits(_join(document, more), budget):
                break
            kept = more
        if not kept:  # even one is too long for a tiny context
            return self._parts(document.passage(chunks[0]), budget)[0], chunks[:1]
        return _join(document, kept), kept

    def _sources(self, document: Document, summary: str) -> tuple[Citation, ...]:
        """For each sentence of a summary the one that it rests on most."""
        found: dict[Citation, None] = {}
        for start, end in sentences(summary):
            sentence = summary[start:end]
            hits = search(document, sentence, self.PASSAGES)
            for citation in cite(document, [hit.chunk for hit in hits], sentence)[:1]:
                found[citation] = None
        return tuple(found)

    def _plain_questions(self, document: Document) -> Iterator[tuple[str, Citation]]:
        """Questions that need no model: about the commonest names, or about any document."""
        start = document.chunks[0]
        for name, (chunk, at) in common_names(document, SUGGESTIONS).items():
            question = self._request("suggest-name", name=name)
            yield question, Citation(chunk.index, at, at + len(name))
        for question in self._prompt("suggest-any").splitlines():
            yield question, Citation(start.index, start.start, start.end)

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

    def _parts(self, text: str, budget: int) -> list[str]:
        """The text in parts of at most ``budget`` tokens, cut between paragraphs or words."""
        parts: list[str] = []
        while text:
            end = min(len(text), budget * MOST_CHARACTERS_A_TOKEN)
            while (tokens := self._tokens(text[:end])) > budget:
                end = min(end - 1, int(end * budget / tokens))
            if end < len(text):
                for mark in ("\n\n", "\n", ". ", " "):
                    if (at := text.rfind(mark, end // 2, end)) > 0:
                        end = at + len(mark)
                        break
            parts.append(text[:end].strip())
            text = text[end:].strip()
        return parts

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
        """The prompt's tokens; ``begin``: how the answer is made to begin."""
        before, _, after = self._prompt(frame).partition("{document}")
        content = before + text + after.replace("{request}", request)
        tokenizer = self.model.tokenizer
        return [
            *tokenizer.apply_chat_template([{"role": "user", "content": content}]),
            *tokenizer.encode(begin),
        ]

    def _request(self, name: str, /, **values: str) -> str:
        """A prompt with its {names} filled in; braces in the values stay what they are."""
        return re.sub(r"\{(\w+)\}", lambda found: values[found[1]], self._prompt(name))

    def _prompt(self, name: str) -> str:
        return prompt(name, self.model.name)


def _join(document: Document, chunks: Sequence[Chunk]) -> str:
    return "\n\n".join(document.passage(chunk) for chunk in chunks)


class _Run:
    """A task under way: its text so far, and what it took."""

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
        self._answer = Answer(task, request, "", "none")

    def cancelled(self) -> bool:
        return self._cancel.is_set()

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
            ttft_ms=seen[0].time_ns / 1e6,
            decode_tps=(len(seen) - 1) / seconds if seconds else None,
        )

    def take(self, ids: Sequence[int], stop: tuple[str, ...] = ()) -> str:
        """Generate a text of its own, which is no part of the answer."""
        for _ in self.pieces(ids, stop):
            pass
        text, self.text = self.text.strip(), ""
        return text

    def answer(self, **changes: Any) -> Answer:
        """The end of the task."""
        answer = replace(
            self._answer, text=self.text.strip(), seconds=time.perf_counter() - self._start
        )
        return replace(answer, **changes | ({"finish": "cancelled"} if self.cancelled() else {}))
