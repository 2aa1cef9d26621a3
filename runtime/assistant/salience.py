"""The sentences that carry a document, and the questions that a sentence answers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from pocketslm.runtime.assistant.asking import holds, wanted
from pocketslm.runtime.assistant.document import Chunk, Document
from pocketslm.runtime.assistant.language import UNSPACED
from pocketslm.runtime.assistant.support import invented_names, numbers
from pocketslm.runtime.assistant.words import sentences, terms, words

Span = tuple[int, int]

# A sentence with fewer or more words than this is a heading, a fragment or a list.
LEAST_WORDS, MOST_WORDS = 8, 45
CHARACTERS_A_WORD = 2  # for scripts without spaces
SAMPLE = 20_000  # characters that show whether a text is prose
NOT_PROSE = frozenset(("csv", "xlsx", "log", "code"))
# A question for a reader names things; these words name the document itself.
_SELF = re.compile(
    r"\b(?:document|text|sentence|passage|article|author|question)s?\b", re.IGNORECASE
)
# The part of a question's terms that its sentence must hold.
HELD = 0.75
MOST_QUESTION_WORDS = 20
LEAST_NEW = 2  # a sentence has so many words that a question about it does not say
_WORDS = re.compile(r"\w+")
_COUNT = re.compile(
    r"(?<![\w.,$€£-])(?!(?:19|20)\d\d\b)\d[\d,]* (?!per|January|February|March|April|May|June|"
    r"July|August|September|October|November|December)[a-z]{3,}"
)
_TIME = re.compile(
    r"\b(?:(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day|today|yesterday|in (?:19|20)\d\d|"
    r"January|February|March|April|June|July|August|September|October|November|December)\b"
)


def key_sentences(document: Document, count: int) -> list[Span]:
    """At most ``count`` telling sentences, the best of evenly spread parts of the document."""
    chunks = document.chunks
    ranked = rank(document, chunks[:: max(1, len(chunks) // (8 * count))])
    parts: dict[int, Span] = {}
    for start, end in ranked:  # the best first
        parts.setdefault(start * count // max(1, len(document.text)), (start, end))
    best = sorted(parts.values(), key=ranked.index)
    return (best + [span for span in ranked if span not in best])[:count]


def rank(document: Document, chunks: Sequence[Chunk]) -> list[Span]:
    """The sentences of some chunks, the most telling first: those with words that the chunks
    repeat, and with names and numbers."""
    unspaced = CHARACTERS_A_WORD if document.language in UNSPACED else 0

    def length(span: Span) -> int:
        text = document.text[span[0] : span[1]]
        return len(text) // unspaced if unspaced else len(text.split())

    spans = [
        span
        for chunk in chunks
        for span in sentences(document.text, chunk.start, chunk.end)
        if LEAST_WORDS <= length(span) <= MOST_WORDS
    ]
    language = document.language
    found = {span: list(words(document.text[span[0] : span[1]], language)) for span in spans}
    often = Counter(word.term for some in found.values() for word in some)

    def weight(span: Span) -> float:
        some = {word.term: word for word in found[span]}
        telling = sum(1 for word in some.values() if word.named or word.term[0].isdigit())
        repeated = sum(math.log(often[term]) for term in some)
        return (repeated + telling) / math.sqrt(len(some) + 4)

    return sorted(spans, key=lambda span: (-weight(span), span))


def is_prose(document: Document) -> bool:
    """Whether a document is made of sentences, and not of rows, entries or code."""
    if document.kind in NOT_PROSE:
        return False
    if document.language in UNSPACED or document.language == "ar":
        return True
    spans = sentences(document.text[:SAMPLE])
    return bool(document.language) and any(
        LEAST_WORDS <= len(document.text[a:b].split()) <= MOST_WORDS for a, b in spans
    )


def questions_in(document: Document) -> Iterator[tuple[str, int, int]]:
    """The questions that a document's headings ask, with where the text below each stands."""
    for chunk in document.chunks:
        heading = chunk.heading.rpartition(" › ")[2]
        if heading.endswith(("?", "？", "؟")):
            yield heading, chunk.start, chunk.end


def question_words(sentence: str) -> list[str]:
    """How questions about a sentence may begin, the most fitting first."""
    found = ["How many"] if _COUNT.search(sentence) else []
    found += ["When"] if _TIME.search(sentence) else []
    return [*found, "What", "Who"]


def is_answered(question: str, passage: str, language: str = "en") -> bool:
    """Whether a question is whole, is about something, uses the words of its passage, and has no
    number or name that the passage lacks.
    """
    if not re.fullmatch(r"\w[^?\n]+ [^?\n]+\?", question) or _SELF.search(question):
        return False
    if not numbers(question) <= numbers(passage) or invented_names(question, passage, language):
        return False
    asked, there = terms(question, language), set(terms(passage, language))
    held = sum(term in there for term in asked)
    short = len(question.split()) <= MOST_QUESTION_WORDS
    known = {word.lower() for word in _WORDS.findall(question)}
    rest = _WORDS.sub(lambda word: "" if word[0].lower() in known else word[0], passage)
    want = wanted(question, language)
    held_in = passage if want.kind == "count" else rest
    answers = holds(held_in, want, language) == 1.0 or (
        not want.kind and len(there - set(asked)) >= LEAST_NEW
    )
    return short and len(asked) >= 2 and held >= HELD * len(asked) and answers
