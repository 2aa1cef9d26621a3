"""Which passages answer a question: BM25 by words, a walk over shared names, and meaning.

The walk follows MiniRAG's heterogeneous graph (arXiv 2501.06713) without its model. Chunks and
names are its nodes, and a chunk has an edge to each name in it. Some questions need two passages,
of which the second shares no word with the question, only a name with the first: the walk finds
both. If there is a model of embeddings, meaning finds passages that share no word with the
question.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pocketslm.runtime.assistant.document import Chunk, Document
from pocketslm.runtime.assistant.meaning import Likeness, Meanings
from pocketslm.runtime.assistant.words import asked_terms, compound_parts

K1, B = 1.2, 0.75  # the values of SQLite's FTS5 and Lucene
# A walk starts at each of the SEEDS best chunks. For every shared name its end gains WALK *
# score(start) * rarity(name) * (TRUST + the part of the question that the end holds).
SEEDS, WALK, TRUST = 3, 0.4, 0.3
# A name in a larger part of the chunks does not tell which of them belong together.
COMMON = 0.05
# The graph cannot lift a chunk by more than this many names.
MOST_NAMES = 4
SHORT = 30  # chunks
# The weight of words beside meaning: the best BM25 score counts as much as a cosine of WORDS if its
# chunk holds the whole question, and by the square of the part otherwise: words that meet by chance
# must not outweigh meaning. A chunk's likeness is that of its most similar sentence, times
# SENTENCE, plus its own, times the rest.
WORDS, SENTENCE = 0.4, 0.7

Place = tuple[int, int]
"""(document's number, chunk)"""


@dataclass(frozen=True, slots=True)
class Hit:
    """A chunk of a document with its score.

    - ``coverage``: the part of the question's weight that its words carry (0 to 1).
    - ``likeness``: how much the chunk and its sentences are like the question, where that is known.
    - ``understood``: whether the model of embeddings knows the document's language.
    """

    document: Document
    chunk: Chunk
    score: float
    coverage: float
    likeness: Likeness | None = None
    understood: bool = False


def search(
    documents: Document | Sequence[Document],
    question: str,
    k: int = 3,
    *,
    walk: bool = True,
    meanings: Meanings | None = None,
) -> list[Hit]:
    """The k best chunks of one document or several, best first. Empty if nothing is like the
    question.

    ``walk=False`` is plain BM25. Without ``meanings`` only words count.
    """
    shelf = [documents] if isinstance(documents, Document) else list(documents)
    if not shelf:
        return []
    score, covered = _by_words(shelf, question, walk=walk)
    likeness: dict[Place, Likeness] = {}
    if meanings is not None and question.strip():
        asked = meanings.question(question)
        for document in shelf:
            for chunk, alike in meanings.likeness(document, asked).items():
                likeness[document.id, chunk] = alike
        score = _fused(score, covered, likeness)
    opened = {document.id: document for document in shelf}
    best = sorted(score, key=lambda place: (-score[place], place))[:k]
    return [
        Hit(
            opened[number],
            opened[number].chunks[chunk],
            score[number, chunk],
            covered.get((number, chunk), 0.0),
            likeness.get((number, chunk)),
            meanings is not None and meanings.understands(opened[number]),
        )
        for number, chunk in best
    ]


def by_language(documents: Iterable[Document]) -> dict[str, list[Document]]:
    found: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        found[document.language].append(document)
    return found


def asked_of(shelf: Sequence[Document], question: str, language: str) -> list[str]:
    """The terms that a question has for documents of one language: a compound that they do not
    have stands for its parts.
    """
    wanted = asked_terms(question, language)
    pairs = {term: compound_parts(term, language) for term in wanted}
    if not any(pairs.values()):
        return wanted
    numbers = [document.id for document in shelf]
    asked = {*wanted, *(part for some in pairs.values() for pair in some for part in pair)}
    known = shelf[0].library.known(numbers, sorted(asked))
    found: list[str] = []
    for term in wanted:
        parts: tuple[str, ...] = ()
        if term not in known:
            parts = max(pairs[term], key=lambda pair: sum(map(len, known & {*pair})), default=())
        found += [part for part in parts if part in known] or [term]
    return list(dict.fromkeys(found))


def _by_words(
    shelf: Sequence[Document], question: str, *, walk: bool
) -> tuple[dict[Place, float], dict[Place, float]]:
    """BM25 scores over the chunks of all documents, and the part of the question in each chunk."""
    count = sum(len(document.chunks) for document in shelf)
    library = shelf[0].library
    average = library.words([document.id for document in shelf]) / max(1, count)
    score: dict[Place, float] = defaultdict(float)
    covered: dict[Place, float] = defaultdict(float)
    for language, some in by_language(shelf).items():
        wanted = asked_of(some, question, language)
        postings = library.postings([document.id for document in some], wanted)
        chunks_of: dict[str, int] = defaultdict(int)
        for _, term, *_ in postings:
            chunks_of[term] += 1
        weight = {term: idf(chunks_of[term], count) for term in wanted}
        # Counts as in a longer document, or in one of few passages a missing word would be
        # everything.
        worth = {term: idf(chunks_of[term], max(count, SHORT)) for term in wanted}
        total = sum(worth.values()) or 1.0
        for number, term, chunk, often, length in postings:
            norm = K1 * (1 - B + B * length / average)
            score[number, chunk] += weight[term] * often * (K1 + 1) / (often + norm)
            covered[number, chunk] += worth[term] / total
        if walk and len(shelf) == 1:
            score = _walk(shelf[0], score, covered, set(wanted))
    return score, covered


def _fused(
    score: dict[Place, float], covered: dict[Place, float], likeness: dict[Place, Likeness]
) -> dict[Place, float]:
    """Scores by words, as far as these cover the question, plus scores by meaning.

    A chunk that only the walk has found counts as if it held TRUST of the question.
    """
    best = max(score.values(), default=0.0) or 1.0
    fused = {
        place: WORDS * covered.get(place, TRUST) ** 2 * value / best
        for place, value in score.items()
    }
    for place, found in likeness.items():
        chunk, sentences = float(found.ranking[0]), found.ranking[1:]
        sentence = float(sentences.max()) if sentences.size else chunk
        fused[place] = fused.get(place, 0.0) + SENTENCE * sentence + (1 - SENTENCE) * chunk
    return fused


def idf(holding: int, count: int) -> float:
    return math.log1p((count - holding + 0.5) / (holding + 0.5))


def _walk(
    document: Document,
    score: dict[Place, float],
    covered: dict[Place, float],
    wanted: set[str],
) -> dict[Place, float]:
    """Add to the scores what the best chunks pass on over shared names. The best one stays first.

    If several walks reach a chunk, the best counts.
    """
    seeds = sorted(score, key=lambda place: (-score[place], place))[:SEEDS]
    if not seeds:
        return score
    begins: dict[str, list[Place]] = defaultdict(list)
    for name, chunk in document.library.names(document.id, [chunk for _, chunk in seeds]):
        if name not in wanted:
            begins[name].append((document.id, chunk))
    ends: dict[str, list[Place]] = defaultdict(list)
    for number, name, chunk, *_ in document.library.postings([document.id], list(begins)):
        ends[name].append((number, chunk))
    count = len(document.chunks)
    shared: dict[tuple[Place, Place], float] = defaultdict(float)  # (begin, end) -> names' weight
    for name, places in ends.items():
        if len(places) <= max(2, COMMON * count):
            rarity = idf(len(places), count) / idf(1, count)
            for begin in begins[name]:
                for end in places:
                    shared[begin, end] += rarity
    gain: dict[Place, float] = defaultdict(float)
    for (begin, end), weight in shared.items():
        if begin != end:
            step = score[begin] * min(weight, MOST_NAMES) * (TRUST + covered.get(end, 0.0))
            gain[end] = max(gain[end], WALK * step)
    walked = {end: score.get(end, 0.0) + gain[end] for end in {*score, *gain}}
    walked[seeds[0]] = max(walked.values())
    return walked
