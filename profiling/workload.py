"""The document task as a benchmark: the prompts that the assistant makes for real documents.

The assistant works on each document once, on this machine. Its prompts and the lengths of the
answers become tests that can run anywhere. Their ids and lengths come from this machine's answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pocketslm.errors import UsageError
from pocketslm.profiling.assistant import finished
from pocketslm.profiling.plan import Test, at_least
from pocketslm.runtime.assistant.answer import Task
from pocketslm.runtime.assistant.assistant import Assistant, sample_document
from pocketslm.runtime.assistant.library import Library
from pocketslm.runtime.assistant.salience import key_sentences
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model, Record, TextModel
from pocketslm.runtime.tokenizer import Tokenizer


def document_tests(
    bundle: Path, documents: Sequence[Path] = (), context: int | None = None
) -> list[Test]:
    """Summarise, suggest questions, ask the first of them, for each document.

    A task that calls the model several times becomes several tests. ``documents`` are files that
    ``pocketslm doc`` reads, by default the one that ships with the package. ``context`` is as in
    ``plan``. Raises DocumentError for a file that cannot be read, UsageError for too small a
    context.
    """
    asked = _Asked(Model.load(bundle))
    assistant = Assistant(asked)
    with Library(":memory:") as library:
        for path in documents or [sample_document()]:
            document = library.add(path)
            asked.task = "summarize"
            finished(assistant.summarize(document))
            asked.task = "suggest"
            questions = finished(assistant.suggest(document)).items
            asked.task = "ask"
            # If it suggests nothing, sentences of the document serve as questions. Questions
            # without an answer do not reach the model.
            said = (document.text[a:b] for a, b in key_sentences(document, 3))
            next(
                (q for q in (*questions, *said) if finished(assistant.ask(document, q)).found), None
            )
    if not asked.calls:
        raise UsageError(
            "the model is asked nothing about tables, code and languages unknown to it"
        )
    needed = max(len(ids) + new for _, ids, new in asked.calls)
    if context is not None:
        at_least("context", needed, [context])
    return [Test(len(ids), new, 0, context or needed, ids, task) for task, ids, new in asked.calls]


class _Asked:
    """A TextModel that records its calls: task, prompt, new tokens."""

    def __init__(self, model: TextModel) -> None:
        self._model = model
        self.task: Task = "summarize"
        self.calls: list[tuple[Task, list[int], int]] = []

    @property
    def name(self) -> str:
        return self._model.name

    @property
    def backend(self) -> str:
        return self._model.backend

    @property
    def context(self) -> int:
        return self._model.context

    @property
    def tokenizer(self) -> Tokenizer:
        return self._model.tokenizer

    def generate(
        self, prompt: str | Sequence[int], config: GenerationConfig | None = None
    ) -> Iterator[Record]:
        assert not isinstance(prompt, str)
        new = 0
        for record in self._model.generate(prompt, config):
            new += 1
            yield record
        self.calls.append((self.task, list(prompt), new))
