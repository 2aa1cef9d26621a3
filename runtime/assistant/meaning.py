"""The meanings of passages and sentences: vectors of embedding models, kept in the library.

Vectors are computed in the background after a document was added, a few passages at a time. They
are used as soon as they exist; those that a stop left out are computed the next time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pocketslm.runtime.assistant.document import Chunk, Document
from pocketslm.runtime.assistant.library import Library
from pocketslm.runtime.assistant.scale import (
    Embedder,
    Vector,
    as_passages,
    as_questions,
    measured,
    read_scales,
    write_scales,
)
from pocketslm.runtime.assistant.words import sentences

# Chunks whose vectors are kept in one transaction.
BATCH = 16
MOST_SENTENCES = 40  # in a chunk: a table of single words means no more than its first rows
_SETTING, _SCALES = "embedder", "scales"


@dataclass(frozen=True, slots=True)
class Progress:
    """``done`` of ``total`` passages of a document."""

    done: int
    total: int


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


@dataclass(frozen=True, slots=True)
class Likeness:
    """How much a chunk and each of its sentences are like a question, in that order.

    - ``ranking``: by all models, for comparing passages of any document.
    - ``deciding``: by the model that knows the document's language and the fewest others, for what
      answers.
    """

    ranking: Vector
    deciding: Vector


class Meanings:
    """The vectors of a library's documents by one model or several. Those of others are dropped."""

    def __init__(
        self, library: Library, embedders: Embedder | Sequence[Embedder], name: str = ""
    ) -> None:
        """``name`` tells the models from others (default: their own)."""
        self.library = library
        self.embedders = list(embedders) if isinstance(embedders, Sequence) else [embedders]
        self.name = name or " + ".join(embedder.name for embedder in self.embedders)
        self._kept: dict[int, tuple[str, _Vectors]] = {}
        self._lock = threading.Lock()
        if library.setting(_SETTING) != self.name:
            library.forget_meanings()
            library.set(_SCALES, "")
            library.set(_SETTING, self.name)
        if not library.setting(_SCALES):
            library.set(_SCALES, write_scales(map(measured, self.embedders)))
        self._scales = read_scales(library.setting(_SCALES))

    def understands(self, document: Document) -> bool:
        """Whether a model knows the document's language."""
        return any(scale.knows(document.language) for scale in self._scales)

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
                    rows.append((chunk.index, self._packed(texts)))
                if not self.library.keep_meanings(number, rows):
                    break
                with self._lock:
                    self._kept.pop(number, None)
                yield Progress(min(at + BATCH, len(todo)), len(todo))

    def _packed(self, texts: Sequence[str]) -> bytes:
        return b"".join(pack(as_passages(embedder, texts)) for embedder in self.embedders)

    def question(self, text: str) -> list[Vector]:
        """A question's vector by each model."""
        return [as_questions(embedder, [text])[0] for embedder in self.embedders]

    def likeness(self, document: Document, question: Sequence[Vector]) -> dict[int, Likeness]:
        """How much each chunk is like a question, of which :meth:`question` gave the vectors."""
        with self._lock:
            # After a document was removed, another may get its number.
            added, vectors = self._kept.get(document.id, ("", None))
            if vectors is None or added != document.added:
                rows = self.library.meanings(document.id)
                vectors = _Vectors(rows, [vector.size for vector in question])
                self._kept[document.id] = (document.added, vectors)
        cosines = vectors.cosines(question)
        if not cosines:
            return {}
        by_model = list(zip(self._scales, cosines, strict=True))
        ranking = np.mean([scale.likeness(some) for scale, some in by_model], axis=0)
        knowing = [pair for pair in by_model if pair[0].knows(document.language)] or by_model
        scale, some = min(knowing, key=lambda pair: len(pair[0].languages))
        return vectors.by_chunk(ranking, scale.likeness(some, document.language))


class _Vectors:
    """A document's vectors in memory, as they are kept: of a chunk those of each model in turn."""

    def __init__(self, rows: Sequence[tuple[int, bytes]], sizes: Sequence[int]) -> None:
        each = sum(sizes) + 4 * len(sizes)
        counts = [len(data) // each for _, data in rows]
        self._chunks = [chunk for chunk, _ in rows]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._factors, self._codes = [], []
        begins = [0] * len(rows)
        for size in sizes:
            parts = []
            for at, ((_, data), count) in enumerate(zip(rows, counts, strict=True)):
                end = begins[at] + count * (size + 4)
                parts.append(data[begins[at] : end])
                begins[at] = end
            whole = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, size + 4)
            self._factors.append(np.ascontiguousarray(whole[:, :4]).view("<f4")[:, 0])
            self._codes.append(whole[:, 4:].view(np.int8))

    def cosines(self, question: Sequence[Vector]) -> list[Vector]:
        """By each model, those of all vectors; none where there are no vectors."""
        if not self._chunks:
            return []
        return [
            codes.astype(np.float32) @ vector * factors
            for codes, factors, vector in zip(self._codes, self._factors, question, strict=True)
        ]

    def by_chunk(self, ranking: Vector, deciding: Vector) -> dict[int, Likeness]:
        parts = (np.split(values, self._ends[:-1]) for values in (ranking, deciding))
        return dict(zip(self._chunks, map(Likeness, *parts), strict=True))


def in_place(chunk: Chunk, sentence: str) -> str:
    """A sentence behind its heading, which says what the sentence is about."""
    heading = chunk.heading.rpartition(" › ")[2]
    return f"{heading}: {sentence}" if heading and heading not in sentence else sentence
