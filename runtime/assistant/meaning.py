"""The meanings of passages and sentences: vectors of an embedding model, kept in the library.

Vectors are computed in the background after a document was added, a few passages at a time. They
are used as soon as they exist; those that a stop left out are computed the next time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pocketslm.runtime.assistant.document import Chunk, Document
from pocketslm.runtime.assistant.library import Library
from pocketslm.runtime.assistant.words import sentences

# Chunks whose vectors are kept in one transaction.
BATCH = 16
MOST_SENTENCES = 40  # in a chunk: a table of single words means no more than its first rows
_SETTING = "embedder"
Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Progress:
    """``done`` of ``total`` passages of a document."""

    done: int
    total: int


class Embedder(Protocol):
    """Such as `Model` of an embedding bundle."""

    @property
    def name(self) -> str: ...

    def embed(self, texts: Sequence[str], *, truncate: bool = False) -> Vector: ...


def spans_of(document: Document, chunk: Chunk) -> list[tuple[int, int]]:
    """The spans that a chunk's vectors stand for: the chunk, then its sentences."""
    return [
        (chunk.start, chunk.end),
        *sentences(document.text, chunk.start, chunk.end)[:MOST_SENTENCES],
    ]


def pack(vectors: Vector) -> bytes:
    """Vectors [n, size] as a factor and ``size`` bytes each."""
    factors = np.abs(vectors).max(axis=1, keepdims=True) / 127
    factors = np.maximum(factors, np.float32(1e-12)).astype("<f4")
    codes = np.rint(vectors / factors).astype(np.int8)
    return b"".join(f.tobytes() + c.tobytes() for f, c in zip(factors, codes, strict=True))


class Meanings:
    """The vectors of a library's documents by one model. Vectors of another model are dropped."""

    def __init__(self, library: Library, embedder: Embedder, name: str = "") -> None:
        """``name`` tells the model from others (default: its own)."""
        self.library, self.embedder = library, embedder
        self.name = name or embedder.name
        self._kept: dict[int, tuple[str, _Vectors]] = {}
        self._lock = threading.Lock()
        if library.setting(_SETTING) != self.name:
            library.forget_meanings()
            library.set(_SETTING, self.name)

    def index(
        self, documents: Sequence[int] | None = None, cancel: threading.Event | None = None
    ) -> Iterator[Progress]:
        """Compute the missing vectors of some documents or of all. Yields after each batch."""
        if documents is None:
            documents = self.library.without_meanings()
        for number in documents:
            document = self.library.open(number)
            have = {chunk for chunk, _ in self.library.meanings(number)}
            todo = [chunk for chunk in document.chunks if chunk.index not in have]
            for at in range(0, len(todo), BATCH):
                if cancel is not None and cancel.is_set():
                    return
                rows = []
                for chunk in todo[at : at + BATCH]:
                    texts = [document.text[a:b] for a, b in spans_of(document, chunk)]
                    texts[1:] = [in_place(chunk, text) for text in texts[1:]]
                    rows.append((chunk.index, pack(self.embedder.embed(texts, truncate=True))))
                if not self.library.keep_meanings(number, rows):
                    break
                with self._lock:
                    self._kept.pop(number, None)
                yield Progress(min(at + BATCH, len(todo)), len(todo))

    def question(self, text: str) -> Vector:
        vector: Vector = self.embedder.embed([text], truncate=True)[0]
        return vector

    def likeness(self, document: Document, question: Vector) -> dict[int, Vector]:
        """For each chunk, the cosines of its vectors (the chunk, its sentences) to a question's
        vector.
        """
        with self._lock:
            # After a document was removed, another may get its number.
            added, vectors = self._kept.get(document.id, ("", None))
            if vectors is None or added != document.added:
                rows = self.library.meanings(document.id)
                vectors = _Vectors(rows, question.size)
                self._kept[document.id] = (document.added, vectors)
        return vectors.likeness(question)


class _Vectors:
    """A document's vectors in memory, as they are kept."""

    def __init__(self, rows: Sequence[tuple[int, bytes]], size: int) -> None:
        each = size + 4
        data = np.frombuffer(b"".join(data for _, data in rows), np.uint8).reshape(-1, each)
        self._factors = np.ascontiguousarray(data[:, :4]).view("<f4")[:, 0]
        self._codes = data[:, 4:].view(np.int8)
        self._chunks = [chunk for chunk, _ in rows]
        self._ends = np.cumsum([len(data) // each for _, data in rows], dtype=np.int64)

    def likeness(self, question: Vector) -> dict[int, Vector]:
        if not self._chunks:
            return {}
        cosines: Vector = self._codes.astype(np.float32) @ question * self._factors
        return dict(zip(self._chunks, np.split(cosines, self._ends[:-1]), strict=True))


def in_place(chunk: Chunk, sentence: str) -> str:
    """A sentence behind its heading, which says what the sentence is about."""
    heading = chunk.heading.rpartition(" › ")[2]
    return f"{heading}: {sentence}" if heading and heading not in sentence else sentence
