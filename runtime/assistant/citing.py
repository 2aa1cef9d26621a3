"""Which sentences an answer rests on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from pocketslm.runtime.assistant.answer import Citation
from pocketslm.runtime.assistant.document import Chunk, Document
from pocketslm.runtime.assistant.words import sentences, terms

MOST = 3  # sentences for one answer
QUESTION = 0.5  # what a word of the question counts against one of the answer
# A further sentence must bring this part of the answer's weight.
NEW = 0.25


def cite(
    document: Document, chunks: Sequence[Chunk], answer: str, question: str = ""
) -> tuple[Citation, ...]:
    """The sentences of ``chunks`` that together hold the words of an answer, the best first.

    A word counts the more, the fewer sentences have it. Words of the question decide between
    sentences that hold as much of the answer.
    """
    spans = [
        (chunk.index, start, end)
        for chunk in chunks
        for start, end in sentences(document.text, chunk.start, chunk.end)
    ]
    held = [set(terms(document.text[start:end])) for _, start, end in spans]
    holding = Counter(term for found in held for term in found)

    def weight(term: str) -> float:
        return math.log1p(len(spans) / holding[term]) if holding[term] else 0.0

    asked = set(terms(question))
    open_ = set(terms(answer)) - asked
    total = sum(map(weight, open_))
    if not total:  # the answer has no word of its own: yes, no
        open_ = set(terms(answer)) | asked
        total = sum(map(weight, open_))
    cited: list[int] = []
    while open_ and len(cited) < MOST and total:
        gains = [sum(map(weight, found & open_)) for found in held]
        best = max(
            range(len(spans)),
            key=lambda at: gains[at] + QUESTION * sum(map(weight, held[at] & asked)),
        )
        if best in cited or gains[best] < NEW * total:
            break
        cited.append(best)
        open_ -= held[best]
    return tuple(Citation(*spans[at]) for at in cited)
