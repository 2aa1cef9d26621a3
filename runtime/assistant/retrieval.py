"""Which passages of a document a question is about: BM25, and a walk over the names they share.

The graph is that of MiniRAG (https://arxiv.org/abs/2501.06713) without a model: chunks and names
are its nodes, a chunk has an edge to each name in it. A question that needs two passages, the
second of which shares no word with it but a name with the first, finds both.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from pocketslm.runtime.assistant.document import Chunk, Document
from pocketslm.runtime.assistant.words import terms, words

K1, B = 1.2, 0.75  # as SQLite's FTS5 and Lucene have them
# Walks begin at this many of the best chunks; WALK is what a walk's end gains for each name that
# it shares, times the score of its beginning, the rarity of the name, and TRUST plus the part of
# the question that the end itself holds.
SEEDS, WALK, TRUST = 3, 0.4, 0.3
# A name in more of the chunks than this says nothing about which belong together.
COMMON = 0.05
# The graph cannot lift a chunk by more than this many names.
MOST_NAMES = 4

# What of a question's weight a passage must hold to answer it; in a long document more words meet
# by chance, so every tenfold of chunks raises it.
LEAST_COVERAGE, COVERAGE_RISE = 0.25, 0.07
SHORT = 30  # chunks


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
    # As if of a longer document, or in one of few passages a word that is not there would be all.
    worth = {term: _idf(chunks_of[term], max(count, SHORT)) for term in wanted}
    total = sum(worth.values()) or 1.0
    score: dict[int, float] = defaultdict(float)
    covered: dict[int, float] = defaultdict(float)
    for term, chunk, often, length in postings:
        norm = K1 * (1 - B + B * length / average)
        score[chunk] += weight[term] * often * (K1 + 1) / (often + norm)
        covered[chunk] += worth[term] / total
    if walk:
        score = _walk(document, score, covered, set(wanted))
    best = sorted(score, key=lambda chunk: (-score[chunk], chunk))[:k]
    return [Hit(document.chunks[chunk], score[chunk], covered[chunk]) for chunk in best]


def answers(document: Document, question: str, hits: Sequence[Hit]) -> bool:
    """Whether the hits of a question can hold its answer.

    No where they share too little with it, or where no name in it is anywhere in the document.
    """
    least = LEAST_COVERAGE + COVERAGE_RISE * math.log10(max(1, len(document.chunks)))
    names = list({word.term for word in words(question) if word.named})
    known = not names or bool(document.library.postings(document.id, names))
    return known and max((hit.coverage for hit in hits), default=0.0) >= least


def _idf(holding: int, count: int) -> float:
    return math.log1p((count - holding + 0.5) / (holding + 0.5))


def _walk(
    document: Document, score: dict[int, float], covered: dict[int, float], wanted: set[str]
) -> dict[int, float]:
    """Scores with what comes over shared names from the best chunks; the best one stays first.

    Of several walks to a chunk the best counts.
    """
    seeds = sorted(score, key=lambda chunk: (-score[chunk], chunk))[:SEEDS]
    if not seeds:
        return score
    begins: dict[str, list[int]] = defaultdict(list)
    for name, chunk in document.library.names(document.id, seeds):
        if name not in wanted:
            begins[name].append(chunk)
    ends: dict[str, list[int]] = defaultdict(list)
    for name, chunk, *_ in document.library.postings(document.id, list(begins)):
        ends[name].append(chunk)
    count = len(document.chunks)
    shared: dict[tuple[int, int], float] = defaultdict(float)  # (begin, end) -> weight of names
    for name, chunks in ends.items():
        if len(chunks) <= max(2, COMMON * count):
            rarity = _idf(len(chunks), count) / _idf(1, count)
            for begin in begins[name]:
                for end in chunks:
                    shared[begin, end] += rarity
    gain: dict[int, float] = defaultdict(float)
    for (begin, end), weight in shared.items():
        if begin != end:
            walk = score[begin] * min(weight, MOST_NAMES) * (TRUST + covered.get(end, 0.0))
            gain[end] = max(gain[end], WALK * walk)
    walked = {end: score.get(end, 0.0) + gain[end] for end in {*score, *gain}}
    walked[seeds[0]] = max(walked.values())
    return walked
