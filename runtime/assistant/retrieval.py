"""Which passages of a document a question is about: BM25, and a walk over the names they share.

The graph is that of MiniRAG (https://arxiv.org/abs/2501.06713) without a model: chunks and names
are its nodes, a chunk has an edge to each name in it. A question that needs two passages, the
second of which shares no word with it but a name with the first, finds both.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from pocketslm.runtime.assistant.document import Chunk, Document
from pocketslm.runtime.assistant.words import terms

K1, B = 1.2, 0.75  # as SQLite's FTS5 and Lucene have them
# Walks begin at this many of the best chunks, and a walk's end counts so much of its beginning.
SEEDS, WALK = 4, 0.5
# A name in more of the chunks than this says nothing about which belong together.
COMMON = 0.2


@dataclass(frozen=True, slots=True)
class Hit:
    """A chunk with its score, and how much of the question's weight its words carry (0 to 1)."""

    chunk: Chunk
    score: float
    coverage: float


def search(document: Document, question: str, k: int = 3, *, walk: bool = True) -> list[Hit]:
    """The k best chunks, best first; none where no word of the question is in the document.

    walk: False is plain BM25.
    """
    wanted = terms(question)
    postings = document.library.postings(document.id, wanted)
    count = len(document.chunks)
    average = document.library.words(document.id) / max(1, count)
    chunks_of: dict[str, int] = defaultdict(int)
    for term, *_ in postings:
        chunks_of[term] += 1
    weight = {term: _idf(chunks_of[term], count) for term in wanted}
    total = sum(weight.values()) or 1.0
    score: dict[int, float] = defaultdict(float)
    covered: dict[int, float] = defaultdict(float)
    for term, chunk, often, length in postings:
        norm = K1 * (1 - B + B * length / average)
        score[chunk] += weight[term] * often * (K1 + 1) / (often + norm)
        covered[chunk] += weight[term] / total
    if walk:
        score = _walk(document, score, covered, set(wanted))
    best = sorted(score, key=lambda chunk: (-score[chunk], chunk))[:k]
    return [Hit(document.chunks[chunk], score[chunk], covered[chunk]) for chunk in best]


def _idf(holding: int, count: int) -> float:
    return math.log1p((count - holding + 0.5) / (holding + 0.5))


def _walk(
    document: Document, score: dict[int, float], covered: dict[int, float], wanted: set[str]
) -> dict[int, float]:
    """Scores with what reaches a chunk from the best ones over names that the question lacks."""
    seeds = sorted(score, key=lambda chunk: (-score[chunk], chunk))[:SEEDS]
    bridges: dict[str, list[int]] = defaultdict(list)
    for name, chunk in document.library.names(document.id, seeds):
        if name not in wanted:
            bridges[name].append(chunk)
    count = len(document.chunks)
    ends: dict[str, list[int]] = defaultdict(list)
    for name, chunk, *_ in document.library.postings(document.id, list(bridges)):
        ends[name].append(chunk)
    walked = dict(score)
    for name, chunks in ends.items():
        if len(chunks) < 2 or len(chunks) > max(2, COMMON * count):
            continue
        for start in bridges[name]:
            for end in chunks:
                if end != start:
                    gain = WALK * score[start] * _idf(len(chunks), count) / _idf(1, count)
                    walked[end] = walked.get(end, 0.0) + gain * covered.get(end, 0.0)
    return walked
