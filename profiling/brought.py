"""Documents of many kinds and languages, as people bring them, with questions about them.

The documents were written for this benchmark, except for a long PDF of Wikipedia articles and the
news articles that fill the library. The kinds of questions: "own" uses the words of its document,
"para" shares no content word with it, "table" and "list" want a cell or all of some items, "both"
is asked of all documents together, and nothing answers "none". Half of the questions of
``questions.txt``, by a hash of their words, and all of ``apart.txt`` are set apart: no constant of
the assistant was chosen on them. Those of ``tuning.txt`` are there to choose on. The last two hold
more paraphrases and unanswerable questions.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from pocketslm.profiling.render import pdf, render
from pocketslm.runtime.assistant.document import Block, Document, make_source
from pocketslm.runtime.assistant.library import Library
from pocketslm.runtime.assistant.readers import read_bytes
from pocketslm.runtime.assistant.readers.wikipedia import article

BOOK = ("Aardwolf", "Aikido", "Alchemy", "Agriculture", "Amateur astronomy", "Asphalt")
BOOK_NAME = "book.en.pdf"
EVERYWHERE = "*"  # stands for the document of a question that is asked of all
SHELF = 50  # documents of the library, with news articles to fill it


@dataclass(frozen=True)
class Brought:
    """A question. Right answers match ``pattern`` and stand at one of the ``spans``."""

    document: str
    kind: str
    question: str
    pattern: str
    spans: tuple[str, ...]
    file: str = "questions.txt"

    @property
    def apart(self) -> bool:
        """Whether the question is set apart."""
        if self.file != "questions.txt":
            return self.file == "apart.txt"
        return hashlib.sha256(self.question.encode()).digest()[0] % 2 == 0

    @property
    def language(self) -> str:
        return self.document.split(".")[1] if self.document != EVERYWHERE else ""

    @property
    def answerable(self) -> bool:
        return bool(self.spans)

    def is_answer(self, text: str) -> bool:
        return bool(re.search(self.pattern, _flat(text), re.IGNORECASE))

    def is_cited(self, quotes: list[str]) -> bool:
        """Whether the quotes hold the answer where it stands in the document."""
        held = [_flat(quote) for quote in quotes]
        return self.is_answer(" ".join(held)) and any(
            _flat(span) in quote or quote in _flat(span) for span in self.spans for quote in held
        )

    def stands_in(self, passage: str) -> bool:
        return any(_flat(span) in _flat(passage) for span in self.spans)


def brought_questions() -> list[Brought]:
    """The questions that ship with the package."""
    return [*_read("questions.txt"), *_read("tuning.txt"), *_read("apart.txt")]


def _read(name: str) -> Iterator[Brought]:
    document = ""
    for line in (_folder() / name).read_text("utf-8").splitlines():
        if line.startswith("== "):
            document = line.removeprefix("== ")
            continue
        kind, question, pattern, spans = (
            part.replace("\\|", "|").strip() for part in re.split(r"(?<!\\)\|(?= )", line)
        )
        wanted = () if spans == "-" else tuple(spans.split(" && "))
        yield Brought(document, kind, question, pattern, wanted, name)


def written() -> dict[str, bytes]:
    """The documents that ship with the package, each as a file of its kind."""
    files = sorted(path.name for path in _folder().iterdir())
    return {
        name: render((_folder() / name).read_text("utf-8"), name.rpartition(".")[2])
        for name in files
        if name.count(".") == 2
    }


def fill(library: Library, news: Path, wiki: Path) -> dict[str, Document]:
    """Fill a library with SHELF documents. Returns those with questions, by name."""
    shelf = {}
    for name, data in (written() | {BOOK_NAME: _book(wiki)}).items():
        title, _, kind = name.split(".")
        shelf[name] = library.add(read_bytes(data, f"{title}.{kind.lstrip('2')}"))
    for number, text in enumerate(news.read_text("utf-8").splitlines()[: SHELF - len(shelf)]):
        library.add(make_source(f"news {number}", "txt", [Block(text)]))
    return shelf


def _book(wiki: Path) -> bytes:
    parts = []
    for title in BOOK:
        parts.append(f"# {title}")
        blocks = (block._replace(text=_flat(block.text)) for block in article(wiki, title))
        parts += [f"## {b.text}" if b.level else b.text for b in blocks if b.text]
    return pdf("\n\n".join(parts))


def _flat(text: str) -> str:
    return " ".join(text.split())


def _folder() -> Path:
    return Path(str(resources.files(__package__).joinpath("documents")))
