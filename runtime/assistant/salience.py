"""Which sentences carry a document, and which questions a sentence answers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from pocketslm.runtime.assistant.document import Chunk, Document
from pocketslm.runtime.assistant.words import Word, sentences, terms, words

Span = tuple[int, int]

# A sentence of fewer or more words is a heading, a fragment or a list.
LEAST_WORDS, MOST_WORDS = 8, 45
# A question for a reader names things; these words name the document itself.
_SELF = re.compile(
    r"\b(?:document|text|sentence|passage|article|author|question)s?\b", re.IGNORECASE
)
# The part of a question's terms that its sentence must hold.
HELD = 0.75
MOST_QUESTION_WORDS = 20
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
    spans = [
        span
        for chunk in chunks
        for span in sentences(document.text, chunk.start, chunk.end)
        if LEAST_WORDS <= len(document.text[span[0] : span[1]].split()) <= MOST_WORDS
    ]
    found = {span: list(words(document.text[span[0] : span[1]])) for span in spans}
    often = Counter(word.term for some in found.values() for word in some)

    def weight(span: Span) -> float:
        some = {word.term: word for word in found[span]}
        telling = sum(1 for word in some.values() if word.named or word.term[0].isdigit())
        repeated = sum(math.log(often[term]) for term in some)
        return (repeated + telling) / math.sqrt(len(some) + 4)

    return sorted(spans, key=lambda span: (-weight(span), span))


def condense(document: Document, characters: int) -> str:
    """At most ``characters`` of the document: everywhere its most telling sentences."""
    share = characters / len(document.text)
    kept: list[str] = []
    left = 0.0  # what a chunk does not take, the next may
    for chunk in document.chunks:
        left += (chunk.end - chunk.start) * share
        chosen = []
        for start, end in rank(document, [chunk]):
            if end - start < left:
                chosen.append((start, end))
                left -= end - start + 1
        kept += [document.text[start:end] for start, end in sorted(chosen)]
    return "\n".join(kept)


def common_names(document: Document, count: int) -> dict[str, tuple[Chunk, int]]:
    """The names most often found in the document, as written, with a place where they stand."""
    found: dict[str, tuple[Chunk, int]] = {}
    often: Counter[str] = Counter()
    for chunk in document.chunks:
        for name, at in _names(document.text, chunk):
            found.setdefault(name, (chunk, at))
            often[name] += 1
    return {name: found[name] for name, _ in often.most_common(count)}


def _names(text: str, chunk: Chunk) -> Iterator[tuple[str, int]]:
    """Runs of named words with nothing but a space between."""
    run: list[Word] = []
    for word in [*words(text[chunk.start : chunk.end]), None]:
        if word and word.named and (not run or word.start == run[-1].end + 1):
            run.append(word)
            continue
        if run:
            start, end = chunk.start + run[0].start, chunk.start + run[-1].end
            yield text[start:end], start
        run = [word] if word and word.named else []


def question_words(sentence: str) -> list[str]:
    """How questions about a sentence may begin, the most fitting first."""
    found = ["How many"] if _COUNT.search(sentence) else []
    found += ["When"] if _TIME.search(sentence) else []
    return [*found, "What", "Who"]


def is_answered(question: str, passage: str) -> bool:
    """Whether a question is whole, about something, and in the words of its passage."""
    if not re.fullmatch(r"\w[^?\n]+ [^?\n]+\?", question) or _SELF.search(question):
        return False
    asked, there = terms(question), set(terms(passage))
    held = sum(term in there for term in asked)
    short = len(question.split()) <= MOST_QUESTION_WORDS
    return short and len(asked) >= 2 and held >= HELD * len(asked)
