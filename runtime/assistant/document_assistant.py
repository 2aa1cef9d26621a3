"""The document assistant: summarise and question a text, on the device, with no screen.

Every prompt begins with the document, so that a second task on the same document reuses the KV
cache of the first and starts at once. Prompts are files beside this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from pocketslm.errors import ContextOverflowError, UsageError
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model, Record

MAX_DOCUMENT_BYTES = 16 << 20


def read_document(path: Path) -> str:
    """The text of a UTF-8 file; UsageError for what is missing, too large, empty or not text."""
    try:
        if path.stat().st_size > MAX_DOCUMENT_BYTES:
            raise UsageError(f"{path} is larger than {MAX_DOCUMENT_BYTES >> 20} MiB of text")
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text; convert it to .txt first") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    return text


def sample_document() -> Path:
    """A short document that ships with the package, to try things on."""
    return Path(str(resources.files(__package__).joinpath("samples", "apollo-8.txt")))


class DocumentAssistant:
    """One document and a model to ask about it."""

    # Greedy, and slow to repeat itself: small models fall into loops. Words of the document are
    # not penalized, or answers would avoid them.
    DEFAULTS = GenerationConfig(
        max_new_tokens=160,
        repetition_penalty=1.1,
        penalize_prompt=False,
        stop_strings=("</document>",),
    )

    def __init__(self, model: Model, document: str) -> None:
        if not document.strip():
            raise UsageError("the document is empty")
        self.model, self.document = model, document

    def summarize(self, config: GenerationConfig = DEFAULTS) -> Iterator[Record]:
        """A summary, streamed; ContextOverflowError where the document is too long."""
        return self._answer(_prompt("summarize"), config)

    def ask(self, question: str, config: GenerationConfig = DEFAULTS) -> Iterator[Record]:
        """An answer to ``question``, streamed; ContextOverflowError as above."""
        if not question.strip():
            raise UsageError("the question is empty")
        return self._answer(_prompt("ask").replace("{question}", question.strip()), config)

    def _answer(self, request: str, config: GenerationConfig) -> Iterator[Record]:
        before, after = _prompt("document").split("{document}")
        content = before + self.document + after.replace("{request}", request)
        ids = self.model.tokenizer.apply_chat_template([{"role": "user", "content": content}])
        context, new = self.model.engine.session.context, config.max_new_tokens or 1
        if len(ids) + new > context:
            raise ContextOverflowError(
                f"the document and request take {len(ids)} tokens and leave no room for {new} more "
                f"in the context of {context}; take a shorter document or export with a longer "
                "--context"
            )
        return self.model.generate(ids, config)


def _prompt(name: str) -> str:
    text = resources.files(__package__).joinpath("prompts", f"{name}.txt").read_text("utf-8")
    return text.strip()
