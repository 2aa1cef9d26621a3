"""The document assistant: summarise, ask, suggest questions, rewrite; on the device, no screen.

Every task is a generator of `Event`: pieces of text as they are made, and at last one `Answer`.
To stop one, set the ``threading.Event`` given as ``cancel``, from any thread: it ends with what it
has, as finish "cancelled". Closing the generator stops it too.

Prompts begin with the document or its passages in their order, so that a model which keeps the
KV cache of what it read does not read them again for the next task.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import ClassVar

from pocketslm.errors import ContextOverflowError, UsageError
from pocketslm.runtime.assistant.answer import Answer, Event, Finish, Progress, Task
from pocketslm.runtime.assistant.citing import cite
from pocketslm.runtime.assistant.document import Chunk, Document
from pocketslm.runtime.assistant.prompts import prompt
from pocketslm.runtime.assistant.retrieval import search
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Record, TextModel

NOT_FOUND = "The document does not say."


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
    NEW_TOKENS: ClassVar = {"summarize": 160, "ask": 120, "suggest": 40, "rewrite": 320}
    # A small model reads this many tokens of a document well; of a longer one it gets passages.
    READ_TOKENS = 1200
    PASSAGES = 3

    def __init__(self, model: TextModel, config: GenerationConfig = DEFAULTS) -> None:
        self.model, self.config = model, config

    def summarize(
        self, document: Document, cancel: threading.Event | None = None
    ) -> Iterator[Event]:
        """What the document says, in a few sentences; of a long one, by summaries of its parts."""
        run = _Run(self, "summarize", cancel=cancel)
        budget = self._budget("summarize", self._prompt("combine"))
        text, level = document.text, "summarize"
        while len(parts := self._parts(text, budget)) > 1 and not run.cancelled():
            notes = []
            for done, part in enumerate(parts):
                yield Progress(done, len(parts) + 1)
                for _ in run.pieces(self._ids(part, self._prompt(level))):
                    pass
                notes.append(run.text.strip())
                run.text = ""
            shorter = "\n".join(notes)
            if len(shorter) >= len(text):  # summaries that do not get shorter never end
                shorter = shorter[: len(text) // 2]
            text, level = shorter, "combine"
        yield from run.pieces(self._ids(parts[0], self._prompt(level)))
        yield run.answer(citations=cite(document, document.chunks, run.text))

    def ask(
        self, document: Document, question: str, cancel: threading.Event | None = None
    ) -> Iterator[Event]:
        """An answer with the passages it rests on; found=False where the document has none."""
        if not (question := " ".join(question.split())):
            raise UsageError("the question is empty")
        run = _Run(self, "ask", question, cancel)
        request = self._prompt("ask").replace("{question}", question)
        hits = search(document, question, self.PASSAGES)
        if not hits:
            yield NOT_FOUND
            run.text = NOT_FOUND
            yield run.answer(found=False)
            return
        text, chunks = self._context(document, [hit.chunk for hit in hits], "ask", request)
        yield from run.pieces(self._ids(text, request))
        yield run.answer(citations=cite(document, chunks, run.text, question))

    def suggest(self, document: Document, cancel: threading.Event | None = None) -> Iterator[Event]:
        """Three questions that the document answers; ``items`` of the answer are always three."""
        run = _Run(self, "suggest", cancel=cancel)
        request = self._prompt("suggest")
        text, _ = self._context(document, document.chunks, "suggest", request)
        ids = self._ids(text, request)
        items: list[str] = []
        for number, begin in enumerate(("What", "Who", "When"), 1):
            ids += self.model.tokenizer.encode(f"{number}. {begin}")
            run.text = ""
            for _ in run.pieces(ids, stop=("\n", "?")):
                pass
            item = f"{begin}{run.text.rstrip('?')}?"
            items.append(" ".join(item.split()))
            ids += self.model.tokenizer.encode(f"{run.text}?\n")
            yield f"{number}. {items[-1]}\n"
        run.text = "".join(f"{number}. {item}\n" for number, item in enumerate(items, 1))
        yield run.answer(items=tuple(items))

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
        request = self._prompt("rewrite").replace("{instruction}", instruction)
        if len(self._parts(passage, self._budget("rewrite", request))) > 1:
            raise ContextOverflowError("the passage is too long to rewrite at once; take a part")
        yield from run.pieces(self._ids(passage, request, frame="passage"))
        yield run.answer()

    def _context(
        self, document: Document, chunks: Sequence[Chunk], task: Task, request: str
    ) -> tuple[str, Sequence[Chunk]]:
        """What of the document goes into the prompt: all of a short one, else these chunks."""
        budget = self._budget(task, request)
        if len(self._parts(document.text, budget)) == 1:
            return document.text, document.chunks
        kept: list[Chunk] = []
        for chunk in chunks:
            if sum(self._tokens(document.passage(other)) for other in [*kept, chunk]) > budget:
                break
            kept.append(chunk)
        kept.sort(key=lambda chunk: chunk.index)
        return "\n\n".join(document.passage(chunk) for chunk in kept), kept

    def _parts(self, text: str, budget: int) -> list[str]:
        """The text in parts of at most ``budget`` tokens, cut between paragraphs or words."""
        parts: list[str] = []
        while text:
            end = min(len(text), budget * 8)
            while (tokens := self._tokens(text[:end])) > budget:
                end = min(end - 1, int(end * budget / tokens * 0.98))
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

    def _budget(self, task: Task, request: str) -> int:
        """How many tokens of a document fit beside a request and what is to be generated."""
        used = len(self._ids("", request)) + 2 * self._new_tokens(task)
        room = self.model.context - used
        if room < 16:
            raise ContextOverflowError(
                f"the request takes {used} tokens of the context of {self.model.context}; shorten "
                "it or export with a longer --context"
            )
        return min(room, self.READ_TOKENS)

    def _new_tokens(self, task: Task) -> int:
        return self.config.max_new_tokens or min(self.NEW_TOKENS[task], self.model.context // 4)

    def _ids(self, text: str, request: str, frame: str = "document") -> list[int]:
        before, _, after = self._prompt(frame).partition("{document}")
        content = before + text + after.replace("{request}", request)
        return self.model.tokenizer.apply_chat_template([{"role": "user", "content": content}])

    def _prompt(self, name: str) -> str:
        return prompt(name, self.model.name)


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

    def pieces(self, ids: Sequence[int], stop: tuple[str, ...] = ()) -> Iterator[str]:
        """Generate, add to the text and yield its pieces."""
        config = self._assistant.config
        config = config.but(
            max_new_tokens=self._assistant._new_tokens(self._task),
            stop_strings=config.stop_strings + stop,
        )
        if self.cancelled():
            return
        records = self._assistant.model.generate(ids, config)
        seen: list[Record] = []
        finish: Finish = "cancelled"
        for record in records:
            seen.append(record)
            self.text += record.text
            if record.text:
                yield record.text
            if record.finish:
                finish = record.finish
            elif self.cancelled():
                break
        records.close()  # type: ignore[attr-defined]
        if not seen:  # cancelled while the prompt was read
            return
        first, last = seen[0], seen[-1]
        seconds = (last.time_ns - first.time_ns) / 1e9
        self._answer = replace(
            self._answer,
            finish=finish,
            prompt_tokens=len(ids),
            new_tokens=len(seen),
            ttft_ms=first.time_ns / 1e6,
            decode_tps=(len(seen) - 1) / seconds if seconds else None,
        )

    def answer(self, **changes: object) -> Answer:
        """The end of the task."""
        return replace(
            self._answer,
            text=self.text.strip(),
            seconds=time.perf_counter() - self._start,
            **({"finish": "cancelled"} if self.cancelled() else {}) | changes,  # type: ignore[arg-type]
        )
