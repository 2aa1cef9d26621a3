"""A second, slower look at the nearest sentences: which of them makes the question most probable?

Where documents hold few words of a question, likeness alone ranks their sentences. A language model
then reads each of the best in a request for a question, and says how probable the question is as
its answer (unsupervised passage reranking, arXiv 2204.07496). What is most probable and most alike
comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pocketslm.runtime.assistant.answer import Citation
from pocketslm.runtime.assistant.meaning import in_place
from pocketslm.runtime.assistant.quoting import FEW, Quotes, nearest, whole_quote
from pocketslm.runtime.assistant.retrieval import Hit

MORE = 20  # passages whose sentences are looked at
READ = 8  # sentences that the model reads
MOST = 3  # that are kept
LONGEST = 400  # characters of a sentence
# The odds of a sentence grow by this for each unit of the question's log-probability.
WORTH = 0.2


def is_doubtful(hits: Sequence[Hit], quotes: Quotes) -> bool:
    """Whether what was quoted seems no answer, or likeness alone chose it."""
    if not hits or all(hit.likeness is None for hit in hits):
        return False
    return not quotes.found or max(hit.coverage for hit in hits) < FEW


def reread(
    hits: Sequence[Hit],
    question: str,
    probability: Callable[[str], float],
    cancelled: Callable[[], bool] = lambda: False,
) -> tuple[Citation, ...]:
    """The sentences that are nearest on a second look, the best first; none if it was cancelled.

    ``probability`` is the logarithm of the question's, given a sentence.
    """
    scored: list[tuple[float, Citation]] = []
    for one in nearest(hits, question, READ):
        if cancelled():
            return ()
        start, end = one.citation.start, one.citation.end
        sentence = " ".join(one.document.text[start:end].split())
        placed = in_place(one.document.chunks[one.citation.chunk], sentence)[:LONGEST]
        scored.append((one.score + WORTH * probability(placed), whole_quote(one)))
    scored.sort(key=lambda each: -each[0])
    return tuple(citation for _, citation in scored[:MOST])
