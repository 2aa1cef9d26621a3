"""Words as retrieval sees them: terms, names and sentences of a text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

# An acronym with dots, a number with its separators, or a word.
_WORD = re.compile(r"(?:[^\W\d_]\.){2,}|\d+(?:[.,:]\d+)*|[^\W_]+")
# It takes time linear in the text: a run of full stops is tried once, and nothing is given back.
_SENTENCE_END = re.compile(
    r"(?<![.!?…。！？])[.!?…。！？]++[\"'”’»)\]]*+\s++(?=[\"'“‘«(\[]?[^\W_a-z])|\n\s*+"
)
# After these a full stop does not end a sentence.
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|Gen|Col|Lt|Sgt|Sen|Rep|Gov|No|vs|etc|e\.g|i\.e|cf|Fig|"
    r"Inc|Ltd|Co|Corp|Jan|Feb|Aug|Sept|Oct|Nov|Dec)|\b[^\W\d_]|(?:\b[^\W\d_]\.)+[^\W\d_])\.\s+$"
)
# English words that say nothing about what a passage is about.
STOP_WORDS = frozenset(
    _WORD.findall(
        """
        a about above after again against all also am an and any are as at be because been
        before being below between both but by can could did do does doing down during each few
        for from further had has have having he her here hers him his how i if in into is it its
        itself just let me more most my no nor not of off on once only or other our ours out
        over own same she should so some such than that the their theirs them then there these
        they this those through to too under until up us very was we were what when where which
        while who whom whose why will with would you your yours s t d ll m re ve don doesn didn
        isn wasn weren
        """
        # What questions and requests are made of.
        """
        article document text passage according tell say said says describe explain mention
        mentioned happen happened name give many much
        """
    )
)


class Word(NamedTuple):
    """One word: its term, where it stands, and whether it looks like (a part of) a name."""

    term: str
    start: int
    end: int
    named: bool


def words(text: str) -> Iterator[Word]:
    """The words of a text that are not stop words.

    A word counts as named where it is capitalised although no sentence begins with it.
    """
    end = 0
    for match in _WORD.finditer(text):
        between, word = text[end : match.start()], match.group()
        begins = end == 0 or any(mark in between for mark in '.!?:\n"“”')
        end = match.end()
        if (low := word.lower()) in STOP_WORDS and not (word.isupper() and len(word) > 1):
            continue
        yield Word(stem(low), match.start(), end, word[0].isupper() and not begins)


def terms(text: str) -> list[str]:
    """The distinct terms of a text in their order."""
    return list(dict.fromkeys(word.term for word in words(text)))


def stem(word: str) -> str:
    """A lower-case word without its commonest English endings.

    Light on purpose: forms of one word must meet, and other languages must not suffer.
    """
    if len(word) < 4 or not word.isalpha():
        return word
    for ending, put, least in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= least:
            word = word[: -len(ending)] + put
            break
    if len(word) > 4 and word[-1] == word[-2] and word[-1] not in "aeiouls":
        word = word[:-1]  # stopped -> stop
    return word.removesuffix("e") if len(word) > 3 else word


# Ending, replacement, letters that must stay before it.
_ENDINGS = (
    ("sses", "ss", 2),
    ("ies", "y", 2),
    ("ied", "y", 2),
    ("ing", "", 3),
    ("edly", "", 3),
    ("ed", "", 3),
    ("ly", "", 4),
    ("ches", "ch", 2),
    ("shes", "sh", 2),
    ("xes", "x", 2),
    ("ss", "ss", 1),
    ("us", "us", 2),
    ("s", "", 3),
)


def sentences(text: str, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
    """Where the sentences within text[start:end] begin and end, without the space between."""
    return list(each_sentence(text, start, end))


def each_sentence(text: str, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
    """As :func:`sentences`, one at a time: a text of millions of lines has as many."""
    end = len(text) if end is None else end
    begin = start
    for match in _SENTENCE_END.finditer(text, start, end):
        if _ABBREVIATION.search(text, max(begin, match.end() - 12), match.end()):
            continue
        yield from _stripped(text, begin, match.end())
        begin = match.end()
    yield from _stripped(text, begin, end)


def _stripped(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The span without space around it, none where nothing is left."""
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    if start < end:
        yield start, end
