"""Words as retrieval sees them: terms, names and sentences of a text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from pocketslm.runtime.assistant.language import has_names, stem, stop_words

# An acronym with dots, a number with its separators, or a word.
_WORD = re.compile(r"(?:[^\W\d_]\.){2,}|\d+(?:[.,:]\d+)*|[^\W_]+")
# It takes time linear in the text: a run of full stops is tried once, and nothing is given back.
_SENTENCE_END = re.compile(
    r"(?<![.!?…])[.!?…]++[\"'”’»)\]]*+\s++(?=[\"'“‘«(\[¿¡]?[^\W_a-z])|[。！？]++[”’」』）]*+\s*+|\n\s*+"
)
# After these a full stop does not end a sentence.
_ABBREVIATION = re.compile(
    r"(?:\b\d{1,2}|\b(?:Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|Gen|Col|Lt|Sgt|Sen|Rep|Gov|No|vs|etc|e\.g|i\.e|cf|Fig|"
    r"Inc|Ltd|Co|Corp|Jan|Feb|Aug|Sept|Oct|Nov|Dec|"
    r"Nr|bzw|ca|usw|Abs|Art|Str|Hr|Fr|Mme|Sra|Dra)|\b[^\W\d_]|(?:\b[^\W\d_]\.)+[^\W\d_])\.\s+$"
)
_SENTENCE_BEGIN = re.compile('[.!?:\n"“”]')  # in what stands before a word
# Characters of scripts without spaces: two neighbours are a term.
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]+")

COMPOUNDING = frozenset(("de", "nl", "da", "no", "sv"))
LEAST_PART = 4  # letters of a compound's part
_PRICE = (
    *("cost", "costs", "price", "kosten", "kostet", "preis", "coûte", "coûtent", "prix"),
    *("cuesta", "cuestan", "precio", "سعر", "ثمن", "价格"),
)
# Chinese characters of a question that say nothing about its subject.
_FUNCTION = re.compile(r"[的是了吗呢么谁哪几]|多少|什么|多久")


class Word(NamedTuple):
    """One word: its term, where it stands, and whether it looks like (a part of) a name."""

    term: str
    start: int
    end: int
    named: bool


def words(text: str, language: str = "en") -> Iterator[Word]:
    """The words of a text that are not stop words; of Chinese, Japanese and Korean, each two
    characters that stand together.

    A word counts as named where it is capitalised although no sentence begins with it, in
    languages whose capitals mean names.
    """
    before = 0
    stops, names = stop_words(language), has_names(language)
    for match in _WORD.finditer(text):
        word = match.group()
        start, end = match.span()
        if not word.isascii() and _UNSPACED.search(word):
            yield from _pairs(word, start)
        elif (low := word.lower()) not in stops or (word.isupper() and len(word) > 1):
            named = names and word[0].isupper()
            if named:
                named = before > 0 and not _SENTENCE_BEGIN.search(text, before, start)
            yield Word(stem(low, language), start, end, named)
        before = end


def _pairs(word: str, start: int) -> Iterator[Word]:
    """The terms of a run of letters with unspaced ones among them."""
    at = 0
    for match in _UNSPACED.finditer(word):
        if match.start() > at:
            yield Word(word[at : match.start()].lower(), start + at, start + match.start(), False)
        run, at = match.group(), match.end()
        for place in range(max(1, len(run) - 1)):
            begin = start + match.start() + place
            yield Word(run[place : place + 2], begin, begin + len(run[place : place + 2]), False)
    if at < len(word):
        yield Word(word[at:].lower(), start + at, start + len(word), False)


def terms(text: str, language: str = "en") -> list[str]:
    """The distinct terms of a text in their order."""
    return list(dict.fromkeys(word.term for word in words(text, language)))


def asked_terms(question: str, language: str = "en") -> list[str]:
    """The terms of a question that say what it is about.

    Words such as "cost" only say which kind of answer is wanted: the text has an amount instead.
    """
    found = terms(question, language)
    kind = {stem(word, language) for word in _PRICE}
    kept = [term for term in found if term not in kind and not _FUNCTION.search(term)]
    return kept or found


def compound_parts(term: str, language: str) -> list[tuple[str, str]]:
    """The pairs of terms that a compound may be made of, such as "frist" in "kündigungsfrist"."""
    if language not in COMPOUNDING:
        return []
    return [
        (stem(term[:at], language), stem(term[at:], language))
        for at in range(LEAST_PART, len(term) - LEAST_PART + 1)
    ]


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
