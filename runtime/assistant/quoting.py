"""Choose the sentences of a document that answer a question, without a language model.

Each sentence of the best passages gets the logarithm of the odds that it answers, by a logistic
regression whose features are named in FEATURES; another, of those in SIGNS, says whether there is
an answer at all. Their weights were fitted on one half of the questions of ``bench-doc``; the other
half was set apart and is what the benchmark reports.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pocketslm.runtime.assistant.answer import Citation
from pocketslm.runtime.assistant.asking import Wanted, holds, wanted
from pocketslm.runtime.assistant.document import Document
from pocketslm.runtime.assistant.meaning import MOST_SENTENCES
from pocketslm.runtime.assistant.retrieval import SHORT, Hit, asked_of, idf
from pocketslm.runtime.assistant.words import sentences, terms

FEATURES = (
    "bias",
    "words",  # how much of the question's weight the sentence or the document's title holds
    "heading",  # how much more the headings above it hold
    "beside",  # how much more the sentences before and after it hold
    "alike",  # its cosine to the question
    "kind",  # whether it holds the kind of answer that is wanted
    "passage",  # its passage's score, as a part of the best passage's
    "heads",  # whether it is a heading
)
WORDS, HEADS = FEATURES.index("words"), FEATURES.index("heads")
ALIKE, KIND = FEATURES.index("alike"), FEATURES.index("kind")
SIGNS = (
    "bias",
    "score",  # of the best sentence
    "covered",  # the part of the question's weight that a passage holds, at most
    "kind",  # as above, of the best sentence
    "margin",  # by how much its score is above that of the best sentence of another passage
    "alike",  # as above, of the best sentence
    "lacks",  # whether it lacks a number, time or colour that is wanted
)
MOST_MARGIN = 5.0
# How many sentences may support the model's, and how much of the question each must hold, compared
# with the best.
GROUNDS, GROUND = 5, 0.8
PASSAGES = 8  # whose sentences are looked at
MOST = 2  # sentences that are quoted
MOST_NEAREST = 3  # where they do not seem to answer
CLOSE = 1.0  # a further one is quoted where its odds are within e to the power of this
MOST_QUOTED = 4  # sentences that a quotation within one goes on for
MOST_ITEMS = 12  # of a list that is quoted with the sentence before it
_ITEM = re.compile(r"(?:[-*•–]|\d{1,2}[.)])\s")


class Weights(NamedTuple):
    """- ``sentence``: one weight for each feature.
    - ``answerable``: one for each sign. There is an answer where their sum is positive.
    - ``least``: where no passage holds a word of the question, there is an answer if a sentence is
      as much alike, in a language that the model of embeddings knows.
    """

    sentence: tuple[float, ...]
    answerable: tuple[float, ...]
    least: float


BY_MEANING = Weights(
    (-9.44, 4.06, 1.15, -1.60, 2.98, 0.96, 4.64, -2.43),
    (-1.04, 0.81, 0.65, 0.42, 0.31, 0.89, -0.69),
    0.3,
)
# How sentences are ranked where no passage holds as much of the question as FEW: what words meet
# there, meet by chance.
FEW = 0.5
FEW_WORDS = (-5.2, 0.0, 0.0, 0.0, 8.07, 0.67, 0.0, -3.0)
BY_WORDS = Weights(
    (-9.05, 5.38, 2.01, -1.25, 0.0, 1.10, 4.78, -1.93),
    (-0.55, 0.75, 0.96, 0.16, 0.30, 0.0, -0.79),
    math.inf,
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sentence with its features and score.

    - ``alike``: as the feature, but by the model that knows the document's language best.
    - ``certainty``: the score with it, which decides whether there is an answer.
    """

    document: Document
    citation: Citation
    features: tuple[float, ...]
    score: float
    alike: float
    certainty: float


@dataclass(frozen=True, slots=True)
class Quotes:
    """The sentences that answer best, the best first. ``found`` says whether they can be the
    answer. ``grounds`` are the only sentences that may support a model's own: they hold about as
    much of the question as the best.
    """

    citations: tuple[Citation, ...] = ()
    found: bool = False
    grounds: tuple[Citation, ...] = ()


def choose(hits: Sequence[Hit], question: str) -> Quotes:
    """The sentences that answer a question."""
    weights = BY_MEANING if any(hit.likeness is not None for hit in hits) else BY_WORDS
    ranked = sorted(candidates(hits, question, weights), key=lambda found: -found.score)
    if not ranked:
        return Quotes()
    found = _is_answered(hits, ranked, question, weights)
    if weights is BY_MEANING and max(hit.coverage for hit in hits) < FEW:
        anew = [replace(one, score=_odds(FEW_WORDS, one.features)) for one in ranked]
        ranked = sorted(anew, key=lambda one: -one.score)
    said = [found for found in ranked if not found.features[HEADS]] or ranked
    most = MOST if found else MOST_NEAREST
    close = [one for one in said[:most] if one.score >= said[0].score - CLOSE]
    grounds = [
        one.citation
        for one in said[:GROUNDS]
        if one.features[WORDS] >= GROUND * said[0].features[WORDS]
    ]
    citations = tuple(_merged([whole_quote(one) for one in close]))
    return Quotes(citations, found, tuple(grounds))


def nearest(hits: Sequence[Hit], question: str, most: int) -> list[Candidate]:
    """The sentences that are most alike to a question, whatever its words, the best first."""
    found = [
        replace(one, score=_odds(FEW_WORDS, one.features))
        for one in candidates(hits, question, BY_MEANING)
        if not one.features[HEADS]
    ]
    return sorted(found, key=lambda one: -one.score)[:most]


def _is_answered(
    hits: Sequence[Hit], ranked: Sequence[Candidate], question: str, weights: Weights
) -> bool:
    """Whether the best sentence can be an answer."""
    covered = max(hit.coverage for hit in hits)
    if not covered:
        understood = {hit.document.id for hit in hits if hit.understood}
        alike = (one.alike for one in ranked if one.document.id in understood)
        return max(alike, default=0.0) >= weights.least
    best = max(ranked, key=lambda one: one.certainty)
    others = (one.certainty for one in ranked if not _same_passage(one, best))
    kind = best.features[KIND]
    lacks = kind < 0 and wanted(question, best.document.language).kind != "person"
    signs = (
        1.0,
        best.certainty,
        covered,
        kind,
        min(MOST_MARGIN, best.certainty - max(others, default=-math.inf)),
        best.alike,
        float(lacks),
    )
    return _odds(weights.answerable, signs) > 0


def _odds(weights: Sequence[float], features: Sequence[float]) -> float:
    return sum(w * feature for w, feature in zip(weights, features, strict=True))


def _same_passage(a: Candidate, b: Candidate) -> bool:
    return (a.document.id, a.citation.chunk) == (b.document.id, b.citation.chunk)


def candidates(hits: Sequence[Hit], question: str, weights: Weights) -> Iterator[Candidate]:
    """The sentences of some passages."""
    wants: dict[str, Wanted] = {}  # by language
    best = max((hit.score for hit in hits), default=0.0) or 1.0
    shares: dict[int, dict[str, float]] = {}
    for hit in hits:
        document, chunk = hit.document, hit.chunk
        if document.id not in shares:
            shares[document.id] = _shares(document, question)
        share = shares[document.id]
        language = document.language
        if language not in wants:
            wants[language] = wanted(question, language)
        spans = sentences(document.text, chunk.start, chunk.end)
        held = [set(terms(document.text[a:b], document.language)) for a, b in spans]
        heading = set(terms(chunk.heading, document.language))
        title = set(
            terms(f"{document.title} {chunk.heading.partition(' › ')[0]}", document.language)
        )
        names = {name.strip() for name in chunk.heading.split(" › ")}
        for at, (start, end) in enumerate(spans):
            here = held[at]
            around = set().union(*held[max(0, at - 1) : at + 2]) - here - heading
            text = document.text[start:end]
            likeness, alike = _alike(hit, at)
            features = (
                1.0,
                _sum(share, here | title),
                _sum(share, heading - here - title),
                _sum(share, around),
                likeness,
                holds(text, wants[language], language),
                hit.score / best,
                float(" ".join(text.split()) in names),
            )
            score = _odds(weights.sentence, features)
            certainty = score + weights.sentence[ALIKE] * (alike - likeness)
            citation = Citation(chunk.index, start, end, document.id)
            yield Candidate(document, citation, features, score, alike, certainty)


def _alike(hit: Hit, sentence: int) -> tuple[float, float]:
    """How much a sentence is like the question, for ranking and for deciding."""
    if hit.likeness is None:
        return 0.0, 0.0
    ranking, deciding = hit.likeness.ranking, hit.likeness.deciding
    row = min(sentence, MOST_SENTENCES - 1) + 1
    row = row if row < ranking.size else 0
    return float(ranking[row]), float(deciding[row])


def _sum(share: dict[str, float], some: set[str]) -> float:
    return sum(share.get(term, 0.0) for term in some)


def _shares(document: Document, question: str) -> dict[str, float]:
    """The share of each term in the question's weight: the rarer in the document, the larger."""
    asked = asked_of([document], question, document.language)
    often: dict[str, int] = defaultdict(int)
    for _, term, *_ in document.library.postings([document.id], asked):
        often[term] += 1
    count = max(len(document.chunks), SHORT)
    worth = {term: idf(often[term], count) for term in asked}
    total = sum(worth.values()) or 1.0
    return {term: value / total for term, value in worth.items()}


def whole_quote(found: Candidate) -> Citation:
    """A sentence, with the rest of a quotation in it and the list that it announces."""
    citation, text = found.citation, found.document.text
    chunk, end = found.document.chunks[citation.chunk], citation.end
    after = sentences(text, citation.end, chunk.end)
    for _, b in after[:MOST_QUOTED]:
        if not _is_open(text[citation.start : end]):
            break
        end = b
    else:
        end = citation.end if _is_open(text[citation.start : end]) else end
    if text[end - 1] in ":：":
        for items, (a, b) in enumerate(after[:MOST_ITEMS]):
            if items and not _ITEM.match(text, a):
                break
            end = b
    return Citation(citation.chunk, citation.start, end, citation.document)


def _is_open(text: str) -> bool:
    """Whether a quotation begins in a text that does not end in it."""
    return text.count('"') % 2 == 1 or any(
        text.count(a) > text.count(b) for a, b in ("“”", "«»", "「」")
    )


def _merged(citations: Sequence[Citation]) -> Iterator[Citation]:
    """Drop citations that lie within an earlier one."""
    kept: list[Citation] = []
    for one in citations:
        if not any(
            k.document == one.document and k.start <= one.start and one.end <= k.end for k in kept
        ):
            kept.append(one)
            yield one
