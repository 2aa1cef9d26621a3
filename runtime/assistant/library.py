"""The library: documents, their index and what was asked about them, in one SQLite file.

The index is a table of postings of our own rather than SQLite's FTS5: SQLite on Android is often
built without it, and here the same table is the graph of names as well (see `retrieval`).

Every change is one transaction on a write-ahead log, so that a process killed at any moment
leaves the library as it was before the change or after it.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pocketslm.errors import DocumentError
from pocketslm.runtime.assistant.answer import Answer, Citation
from pocketslm.runtime.assistant.document import Chunk, Document, Source
from pocketslm.runtime.assistant.language import detect
from pocketslm.runtime.assistant.readers import read_file
from pocketslm.runtime.assistant.words import words
from pocketslm.runtime.prefixes import Prefixes, forget

SCHEMA_VERSION = 3  # which also counts up when words are stemmed in another way
PREFIXES = 512 << 20  # bytes
# What sqlite3 raises of a damaged file, or of one that is full or locked: also where the name of a
# table is no UTF-8, which it puts into its message.
_DAMAGE = (sqlite3.Error, UnicodeError)
_APPLICATION_ID = 0x70736C6D  # "pslm"
_SCHEMA = """
CREATE TABLE documents (
    id INTEGER PRIMARY KEY,
    title TEXT NOT NULL,
    kind TEXT NOT NULL,
    added TEXT NOT NULL,
    sha256 TEXT NOT NULL UNIQUE,
    pages INTEGER,
    text TEXT NOT NULL,
    language TEXT NOT NULL DEFAULT ''
);
CREATE TABLE chunks (
    document INTEGER NOT NULL REFERENCES documents ON DELETE CASCADE,
    chunk INTEGER NOT NULL,
    start INTEGER NOT NULL,
    end INTEGER NOT NULL,
    page INTEGER,
    heading TEXT NOT NULL,
    words INTEGER NOT NULL,
    PRIMARY KEY (document, chunk)
) WITHOUT ROWID;
-- How often a term stands in a chunk, and whether it is (part of) a name there.
CREATE TABLE postings (
    document INTEGER NOT NULL REFERENCES documents ON DELETE CASCADE,
    term TEXT NOT NULL,
    chunk INTEGER NOT NULL,
    count INTEGER NOT NULL,
    named INTEGER NOT NULL,
    PRIMARY KEY (document, term, chunk)
) WITHOUT ROWID;
CREATE INDEX names ON postings (document, chunk) WHERE named;
"""
# What a library of version 1 lacks. An answer without a document belongs to all documents.
_SCHEMA_2 = """
CREATE TABLE history (
    id INTEGER PRIMARY KEY,
    document INTEGER REFERENCES documents ON DELETE CASCADE,
    asked TEXT NOT NULL,
    answer TEXT NOT NULL
);
CREATE INDEX history_of ON history (document);
-- What a chunk and each of its sentences mean: bytes with a factor, see `meaning`.
CREATE TABLE meanings (
    document INTEGER NOT NULL REFERENCES documents ON DELETE CASCADE,
    chunk INTEGER NOT NULL,
    vectors BLOB NOT NULL,
    PRIMARY KEY (document, chunk)
) WITHOUT ROWID;
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """A document in the list; ``characters`` of text, in ``chunks``."""

    id: int
    title: str
    kind: str
    added: str
    pages: int | None
    characters: int
    chunks: int


@dataclass(frozen=True, slots=True)
class Asked:
    """A past task, with its time and answer."""

    id: int
    time: str
    answer: Answer


class Library:
    """A library file, which is made if it does not exist. ":memory:" keeps it in memory.

    Safe to use from several threads and processes. Raises DocumentError for a file that is no
    library or of a newer version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        memory = self.path == ":memory:"
        self._prefixes = None if memory else Path(f"{self.path}.prefixes")
        self._lock = threading.RLock()
        try:
            if not memory:
                Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            # Transactions are ours to begin; another process may write for up to 10 s.
            self._database = sqlite3.connect(
                self.path, timeout=10, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare()
            except BaseException:
                self._database.close()
                raise
        except (*_DAMAGE, OSError) as error:
            raise DocumentError(f"{self.path} cannot be used as a library: {error}") from None

    def _prepare(self) -> None:
        run = self._database.execute
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = NORMAL")
        run("PRAGMA foreign_keys = ON")
        with self._transaction():
            (version,) = run("PRAGMA user_version").fetchone()
            (application,) = run("PRAGMA application_id").fetchone()
            (tables,) = run("SELECT count(*) FROM sqlite_master").fetchone()
            if version > SCHEMA_VERSION:
                raise DocumentError(
                    f"{self.path} is a library of version {version}, this program knows "
                    f"{SCHEMA_VERSION}; update it"
                )
            if tables and application != _APPLICATION_ID:
                raise DocumentError(f"{self.path} is a database, but no library of pocketslm")
            if not tables:
                self._script(_SCHEMA + _SCHEMA_2)
            elif version < SCHEMA_VERSION:
                if version < 2:
                    self._extend()
                self._index_anew()
            if version < SCHEMA_VERSION:
                run(f"PRAGMA application_id = {_APPLICATION_ID}")
                run(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _script(self, statements: str) -> None:
        for statement in statements.split(";\n"):
            self._database.execute(statement)

    def _extend(self) -> None:
        """Give a library of version 1 the tables of version 2, and its documents a language."""
        run = self._database.execute
        run("ALTER TABLE documents ADD COLUMN language TEXT NOT NULL DEFAULT ''")
        run("ALTER TABLE history RENAME TO old_history")
        run("DROP INDEX history_of")
        self._script(_SCHEMA_2)
        run("INSERT INTO history SELECT id, document, asked, answer FROM old_history")
        run("DROP TABLE old_history")
        for (number,) in run("SELECT id FROM documents").fetchall():
            (text,) = run("SELECT text FROM documents WHERE id = ?", (number,)).fetchone()
            run("UPDATE documents SET language = ? WHERE id = ?", (detect(text), number))

    def _index_anew(self) -> None:
        """Index the documents by the stems of this version."""
        run = self._database.execute
        run("DELETE FROM postings")
        for (number,) in run("SELECT id FROM documents").fetchall():
            document = self.open(number)
            run("DELETE FROM chunks WHERE document = ?", (number,))
            self._index(number, document)

    def add(self, source: Source | Path) -> Document:
        """Add a document, or the document in a file. Documents of equal text are kept once.

        Raises DocumentError for a file that cannot be read.
        """
        source = read_file(source) if isinstance(source, Path) else source
        digest = hashlib.sha256(source.text.encode("utf-8", "replace")).hexdigest()
        with self._transaction() as run:
            row = run("SELECT id FROM documents WHERE sha256 = ?", (digest,)).fetchone()
            if row is None:
                cursor = run(
                    "INSERT INTO documents (title, kind, added, sha256, pages, text, language) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        *(source.title, source.kind, _now(), digest),
                        *(source.pages, source.text, source.language),
                    ),
                )
                row = (cursor.lastrowid,)
                self._index(row[0], source)
        return self.open(row[0])

    def _index(self, document: int, source: Source | Document) -> None:
        many = self._database.executemany
        for chunk in source.chunks:
            counts, names = _count(source, chunk)
            row = (document, chunk.index, chunk.start, chunk.end, chunk.page, chunk.heading)
            many("INSERT INTO chunks VALUES (?, ?, ?, ?, ?, ?, ?)", [(*row, counts.total())])
            many(
                "INSERT INTO postings VALUES (?, ?, ?, ?, ?)",
                [(document, term, chunk.index, n, term in names) for term, n in counts.items()],
            )

    def entries(self) -> list[Entry]:
        """Every document, the newest first."""
        rows = self._rows(
            "SELECT id, title, kind, added, pages, length(text), "
            "(SELECT count(*) FROM chunks WHERE document = id) FROM documents ORDER BY id DESC"
        )
        return [Entry(*row) for row in rows]

    def open(self, document: int) -> Document:
        """The document with this number. Raises DocumentError if there is none."""
        found = self._rows(
            "SELECT title, kind, added, pages, text, language FROM documents WHERE id = ?", document
        )
        if not found:
            raise DocumentError(f"the library has no document {document}; `doc list` shows them")
        title, kind, added, pages, text, language = found[0]
        chunks = self._rows(
            "SELECT chunk, start, end, page, heading FROM chunks WHERE document = ? ORDER BY chunk",
            document,
        )
        parts = tuple(Chunk(*row) for row in chunks)
        return Document(document, title, kind, added, text, parts, pages, language, self)

    def find(self, name: str) -> Document:
        """The document with this number or title. Raises DocumentError unless one has it."""
        if name.isdecimal() and len(name) < 19:
            return self.open(int(name))
        rows = self._rows("SELECT id FROM documents WHERE title = ?", name)
        if len(rows) != 1:
            many = "several documents" if rows else "no document"
            raise DocumentError(f"the library has {many} called {name!r}; `doc list` shows them")
        return self.open(rows[0][0])

    def rename(self, document: int, title: str) -> None:
        with self._transaction() as run:
            run("UPDATE documents SET title = ? WHERE id = ?", (title, document))

    def remove(self, document: int) -> None:
        """Forget a document with its history and prefix; DocumentError where there is none."""
        with self._transaction() as run:
            if not run("DELETE FROM documents WHERE id = ?", (document,)).rowcount:
                raise DocumentError(
                    f"the library has no document {document}; `doc list` shows them"
                )
            forget(self._prefixes, str(document))

    def prefixes(self, disk: int = PREFIXES) -> Prefixes | None:
        """Where the states of prompts about its documents are kept, at most ``disk`` bytes of them:
        a folder beside it; None for a library in memory."""
        if self._prefixes is None:
            return None
        return Prefixes(self._prefixes, disk=disk, memory=0, prompts=False)

    def forget_prefix(self, document: int) -> None:
        """Remove the prefix of a document that is gone: it may have been removed while it was
        read."""
        with self._transaction() as run:
            if not run("SELECT 1 FROM documents WHERE id = ?", (document,)).fetchone():
                forget(self._prefixes, str(document))

    def remember(self, document: int | None, answer: Answer) -> None:
        """Add an answer to the history of a document, or of all of them (None).

        Does nothing if the document is gone: it may have been removed meanwhile.
        """
        data = json.dumps(asdict(answer), ensure_ascii=False)
        with self._transaction() as run:
            gone = "SELECT 1 FROM documents WHERE id = ?"
            if document is None or run(gone, (document,)).fetchone():
                run(
                    "INSERT INTO history (document, asked, answer) VALUES (?, ?, ?)",
                    (document, _now(), data),
                )

    def history(self, document: int | None) -> list[Asked]:
        """What was asked about a document, or about all of them (None), the oldest first."""
        rows = self._rows(
            "SELECT id, asked, answer FROM history WHERE document IS ? ORDER BY id", document
        )
        try:
            return [Asked(id_, time, _answer(json.loads(data))) for id_, time, data in rows]
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise DocumentError(f"{self.path} holds a damaged answer: {error}") from None

    def last_question(self, document: int | None) -> str:
        """The question asked last, as it was understood; "" if none was asked."""
        asked = (one.answer for one in reversed(self.history(document)))
        return next((one.asked or one.request for one in asked if one.task == "ask"), "")

    def forget(self, document: int | None, asked: int | None = None) -> None:
        """Delete one entry of a document's history, or all of it."""
        with self._transaction() as run:
            run(
                "DELETE FROM history WHERE document IS ? AND (? IS NULL OR id = ?)",
                (document, asked, asked),
            )

    def postings(
        self, documents: Sequence[int], terms: Sequence[str]
    ) -> list[tuple[int, str, int, int, int]]:
        """(document, term, chunk, count, words in the chunk) of each chunk with such a term."""
        return self._rows(
            "SELECT document, term, chunk, count, words FROM postings JOIN chunks USING "
            f"(document, chunk) WHERE document IN ({_marks(documents)}) AND term IN "
            f"({_marks(terms)})",
            *documents,
            *terms,
        )

    def known(self, documents: Sequence[int], terms: Sequence[str]) -> set[str]:
        """Those of some terms that stand in some documents."""
        rows = self._rows(
            f"SELECT DISTINCT term FROM postings WHERE document IN ({_marks(documents)}) AND term "
            f"IN ({_marks(terms)})",
            *documents,
            *terms,
        )
        return {term for (term,) in rows}

    def names(self, document: int, chunks: Sequence[int]) -> list[tuple[str, int]]:
        """(term, chunk) of the names in some chunks."""
        return self._rows(
            "SELECT term, chunk FROM postings WHERE document = ? AND named AND chunk IN "
            f"({_marks(chunks)})",
            document,
            *chunks,
        )

    def words(self, documents: Sequence[int]) -> int:
        """How many words that are no stop words some documents have."""
        rows = self._rows(
            f"SELECT total(words) FROM chunks WHERE document IN ({_marks(documents)})", *documents
        )
        return int(rows[0][0])

    def setting(self, name: str) -> str:
        """A setting of the library, "" where it has none."""
        rows = self._rows("SELECT value FROM settings WHERE name = ?", name)
        return str(rows[0][0]) if rows else ""

    def set(self, name: str, value: str) -> None:
        with self._transaction() as run:
            run("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, value))

    def meanings(self, document: int) -> list[tuple[int, bytes]]:
        """(chunk, its vectors) for every chunk that has vectors, in order."""
        return self._rows(
            "SELECT chunk, vectors FROM meanings WHERE document = ? ORDER BY chunk", document
        )

    def keep_meanings(self, document: int, rows: Sequence[tuple[int, bytes]]) -> bool:
        """Keep vectors of chunks. Returns False if the document is gone."""
        with self._transaction() as run:
            if not run("SELECT 1 FROM documents WHERE id = ?", (document,)).fetchone():
                return False
            for chunk, vectors in rows:
                run("INSERT OR REPLACE INTO meanings VALUES (?, ?, ?)", (document, chunk, vectors))
        return True

    def forget_meanings(self) -> None:
        with self._transaction() as run:
            run("DELETE FROM meanings")

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        """A transaction: all changes inside are kept, or none."""
        with self._lock:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                yield self._database.execute
                self._database.execute("COMMIT")
            except _DAMAGE as error:
                self._undo()
                raise DocumentError(f"{self.path} cannot be written: {error}") from None
            except BaseException:
                self._undo()
                raise

    def _undo(self) -> None:
        """End a transaction that failed; on a full disk SQLite has done so by itself."""
        if self._database.in_transaction:
            self._database.execute("ROLLBACK")

    def without_meanings(self) -> list[int]:
        """The documents with passages that have no vectors yet, the newest first."""
        rows = self._rows(
            "SELECT DISTINCT document FROM chunks WHERE NOT EXISTS (SELECT 1 FROM meanings WHERE "
            "meanings.document = chunks.document AND meanings.chunk = chunks.chunk) "
            "ORDER BY document DESC"
        )
        return [number for (number,) in rows]

    def _rows(self, statement: str, *values: Any) -> list[Any]:
        with self._lock:
            try:
                return self._database.execute(statement, values).fetchall()
            except _DAMAGE as error:
                raise DocumentError(f"{self.path} cannot be read: {error}") from None


def _marks(values: Sequence[Any]) -> str:
    return ",".join("?" * len(values))


def _count(source: Source | Document, chunk: Chunk) -> tuple[Counter[str], set[str]]:
    """Count each term of a chunk, its heading included, and tell which terms are names."""
    found: Iterable[Any] = list(words(source.text[chunk.start : chunk.end], source.language))
    counts = Counter(word.term for word in found)
    names = {word.term for word in found if word.named}
    for word in words(chunk.heading, source.language):
        counts[word.term] += 1
    return counts, names


def _answer(data: dict[str, Any]) -> Answer:
    citations = tuple(Citation(**citation) for citation in data.pop("citations"))
    return Answer(**data | {"citations": citations, "items": tuple(data["items"])})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
