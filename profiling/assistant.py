"""Measure what the document assistant quotes, cites, says, refuses, summarises and suggests.

Questions and documents come from `brought`. Two more sets are used: 300 news articles with older
questions, which need one passage or two; and Wikipedia articles, whose lead section is the
reference for a summary of the rest. Fractions have 95 % intervals (Wilson 1927).
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import fmean, median

from pocketslm.profiling.brought import EVERYWHERE, Brought, brought_questions, fill
from pocketslm.runtime.assistant.answer import Answer, Citation, Event
from pocketslm.runtime.assistant.assistant import Assistant, sample_document
from pocketslm.runtime.assistant.document import Block, Document, make_source
from pocketslm.runtime.assistant.library import Library
from pocketslm.runtime.assistant.meaning import Meanings
from pocketslm.runtime.assistant.readers.wikipedia import article
from pocketslm.runtime.assistant.retrieval import search
from pocketslm.runtime.assistant.scale import Embedder
from pocketslm.runtime.assistant.support import common_words, ground_of, invented_names, numbers
from pocketslm.runtime.assistant.words import sentences
from pocketslm.runtime.model import TextModel

K, MORE = 3, 10
SAMPLE = 40  # questions that the model answers, unless it answers all
# Wikipedia articles of 2 to 8 thousand words whose markup leaves clean text.
SUMMARIZED = ("Aardvark", "Aardwolf", "Aikido", "Asphalt", "Animal Farm", "Amateur astronomy")
Step = Callable[[str, float], None]


@dataclass(frozen=True)
class Figure:
    """A measured figure. ``low`` and ``high`` bound a fraction of ``count`` cases; other figures
    have a unit instead.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    count: int | None = None
    unit: str = ""


def fraction(name: str, cases: Sequence[bool]) -> Figure:
    """The fraction of cases that hold, with Wilson's interval."""
    n = len(cases)
    if not n:
        return Figure(name, math.nan, 0.0, 1.0, 0)
    p, z = sum(cases) / n, 1.96
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Figure(name, p, max(0.0, middle - half), min(1.0, middle + half), n)


def measure(
    model: TextModel,
    news: Path,
    wiki: Path,
    step: Step,
    *,
    embedders: Sequence[Embedder] = (),
    every: bool = False,
    tuned: bool = False,
    examples: Callable[[str], None] = lambda text: None,
) -> list[Figure]:
    """Measure everything, which takes a few minutes with a 135M model on two cores.

    - ``embedders``: find by meaning too.
    - ``every``: let the model answer every question, not SAMPLE of them.
    - ``tuned``: use the half of the questions on which constants were chosen, not the other half.
    - ``examples``: called with each question and the text that was shown, for reading.
    """
    asked = [question for question in brought_questions() if question.apart != tuned]
    figures: list[Figure] = []
    with Library(":memory:") as library:
        step("read documents", 0.0)
        shelf = fill(library, news, wiki)
        meanings = Meanings(library, embedders) if embedders else None
        if meanings is not None:
            todo = library.entries()
            for at, entry in enumerate(todo):
                for _ in meanings.index([entry.id]):
                    step("meaning", at / len(todo))
        everything = [library.open(entry.id) for entry in library.entries()]
        assistant = Assistant(model, meanings=meanings)
        figures += _retrieval(shelf, everything, asked, meanings, step)
        figures += _answers(assistant, shelf, everything, asked, step, every, examples)
        figures += _suggestions(assistant, list(shelf.values()), step, examples)
        figures += _summaries(assistant, library, wiki, step)
        figures += _first_tokens(assistant, library.add(sample_document()))
    return figures + _news(news)


def _shown_as(question: Brought) -> str:
    """The kinds of questions that one figure counts together."""
    return "paraphrases" if question.kind == "para" else "own words"


def _retrieval(
    shelf: dict[str, Document],
    everything: Sequence[Document],
    asked: Sequence[Brought],
    meanings: Meanings | None,
    step: Step,
) -> list[Figure]:
    """How often the passage with the answer is among the first, in its document and among all."""
    found: dict[str, list[bool]] = defaultdict(list)
    some = [question for question in asked if question.answerable]
    for at, question in enumerate(some):
        step("find", at / len(some))
        kind = _shown_as(question)
        for where in ("document", "library"):
            if where == "document" and question.document == EVERYWHERE:
                continue
            place = shelf[question.document] if where == "document" else everything
            hits = search(place, question.question, MORE, meanings=meanings)
            right = [question.stands_in(hit.document.passage(hit.chunk)) for hit in hits]
            for k in (K, MORE):
                found[f"recall@{k} in the {where}, {kind}"].append(any(right[:k]))
            if where == "document" and question.language != "en":
                found[f"recall@{K} in the document, {question.language}"].append(any(right[:K]))
    return [fraction(name, found[name]) for name in sorted(found)]


def _answers(
    assistant: Assistant,
    shelf: dict[str, Document],
    everything: Sequence[Document],
    asked: Sequence[Brought],
    step: Step,
    every: bool,
    examples: Callable[[str], None],
) -> list[Figure]:
    found: dict[str, list[bool]] = defaultdict(list)
    times: dict[str, list[float]] = defaultdict(list)
    for at, question in enumerate(asked):
        step("ask", at / len(asked))
        alone = question.document != EVERYWHERE
        place = [shelf[question.document]] if alone else list(everything)
        speak = every or at * SAMPLE // len(asked) != (at - 1) * SAMPLE // len(asked)
        answer = finished(assistant.ask(place, question.question)) if speak else None
        shown, seems = _quotes(assistant, place, question, found, times)
        if alone:
            _quotes(assistant, everything, question, found, times)
        of = {document.id: document for document in place}
        citations = answer.citations if answer else shown
        cited = [of[c.document].text[c.start : c.end] for c in citations]
        own = answer.own if answer else ""
        if speak:
            found["the model's own sentence is shown"].append(bool(own))
        if own:
            found["own sentence right, of those shown"].append(
                question.answerable and question.is_answer(own)
            )
            known = "\n".join([*cited, question.question])
            language = of[citations[0].document].language
            found["invented numbers or names, of those shown"].append(
                not numbers(own) <= numbers(known) or bool(invented_names(own, known, language))
            )
        text = "\n".join(f"  “{quote}”" for quote in cited)
        state = "found" if seems else "not found"
        examples(
            f"{question.document} [{question.kind}] {question.question} ({question.pattern}): "
            f"{state}\n{text}" + (f"\n  own: {own}" if own else "")
        )
    figures = [fraction(name, found[name]) for name in sorted(found)]
    for what, some in times.items():
        figures += [
            Figure(f"time {what}, median", 1000 * median(some), unit="ms"),
            Figure(f"time {what}, most", 1000 * max(some), unit="ms"),
        ]
    return figures


def _quotes(
    assistant: Assistant,
    place: Sequence[Document],
    question: Brought,
    found: dict[str, list[bool]],
    times: dict[str, list[float]],
) -> tuple[tuple[Citation, ...], bool]:
    """The quotes in the end, and whether they seem to answer; adds what is right of them at once
    and after the second look.
    """
    where = "document" if len(place) == 1 else "library"
    start = time.perf_counter()
    hits, quotes = assistant.find(place, question.question)
    quoted = time.perf_counter()
    times[f"to the quote, {where}"].append(quoted - start)
    again = assistant.read_again(place, hits, quotes, question.question)
    if again:
        times["of the second look"].append(time.perf_counter() - quoted)
    shown = tuple(dict.fromkeys((*again, *quotes.citations)))
    if not question.answerable:
        found[f"refused rightly (nothing answers), {where}"].append(not quotes.found)
        return shown, quotes.found
    of = {document.id: document for document in place}
    kind = _shown_as(question)
    found[f"refused wrongly, {where}, {kind}"].append(not quotes.found)
    for look, some in (("at once", quotes.citations), ("in the end", shown)):
        cited = [of[c.document].text[c.start : c.end] for c in some]
        right = question.is_answer(" ".join(cited)) and question.is_cited(cited)
        found[f"quotes hold the truth, {look}, {where}, {kind}"].append(right)
    if where == "library":
        ranked = [(one.document, one.chunk) for one in again]
        ranked += [(hit.document.id, hit.chunk.index) for hit in hits]
        passages = [
            of[number].passage(of[number].chunks[at]) for number, at in dict.fromkeys(ranked)
        ]
        for k in (K, MORE):
            found[f"recall@{k} in the library on the second look, {kind}"].append(
                any(map(question.stands_in, passages[:k]))
            )
    return shown, quotes.found


def _suggestions(
    assistant: Assistant,
    documents: Sequence[Document],
    step: Step,
    examples: Callable[[str], None],
) -> list[Figure]:
    counts, held = [], []
    for at, document in enumerate(documents):
        step("suggest", at / len(documents))
        items = finished(assistant.suggest(document)).items
        counts.append(len(items))
        for item in items:
            _, quotes = assistant.find([document], item)
            held.append(quotes.found and bool(quotes.citations) and well_formed(item))
        examples(f"{document.title} suggests: {' / '.join(items)}")
    return [
        fraction("suggestions that the assistant answers with a citation", held),
        fraction("documents with suggestions", [count > 0 for count in counts]),
        Figure("suggestions a document", fmean(counts)),
    ]


def well_formed(question: str) -> bool:
    """One line of a few words that ends in its only question mark."""
    return bool(re.fullmatch(r"[¿\w][^?？؟\n]+[?？؟]", question))


def _summaries(assistant: Assistant, library: Library, wiki: Path, step: Step) -> list[Figure]:
    ours, lead, supported = [], [], []
    for at, title in enumerate(SUMMARIZED):
        step("summarize", at / len(SUMMARIZED))
        blocks = list(article(wiki, title))
        first = next(at for at, block in enumerate(blocks) if block.level)
        reference = "\n".join(block.text for block in blocks[:first])
        document = library.add(make_source(title, "wiki", blocks[first:]))
        answer = finished(assistant.summarize(document))
        quotes = [document.text[c.start : c.end] for c in answer.citations]
        supported += [
            ground_of(answer.own[a:b], quotes) is not None for a, b in sentences(answer.own)
        ]
        shown = " ".join([*quotes, answer.own])
        ours.append(rouge(shown, reference))
        lead.append(rouge(_lead(document.text, len(shown.split())), reference))
    figures = [
        fraction("the model's sentences in summaries that a key sentence supports", supported)
    ]
    for at, name in enumerate(("ROUGE-1", "ROUGE-2", "ROUGE-L")):
        figures += [
            Figure(f"{name} of a summary", fmean(scores[at] for scores in ours)),
            Figure(f"{name} of the first sentences", fmean(scores[at] for scores in lead)),
        ]
    return figures


def _lead(text: str, count: int) -> str:
    """The first sentences of a text, up to ``count`` words."""
    end = 0
    for _, end in sentences(text):
        if len(text[:end].split()) >= count:
            break
    return text[:end]


def _first_tokens(assistant: Assistant, document: Document) -> list[Figure]:
    """TTFT of the model's own sentence: the first question on a document, and the second."""
    first, second = [], []
    other = document.library.add(
        make_source("other", "txt", [Block("Nothing of interest is here.")])
    )
    for _ in range(5):
        finished(assistant.ask(other, "Is there nothing of interest?"))
        first.append(finished(assistant.ask(document, "When was Apollo 8 launched?")).ttft_ms)
        second.append(finished(assistant.ask(document, "Who was the commander?")).ttft_ms)
    return [
        Figure("TTFT of the model, first question", median(first), unit="ms"),
        Figure("TTFT of the model, second question", median(second), unit="ms"),
    ]


@dataclass(frozen=True)
class Question:
    """``evidence``: the spans (number of the article, span) that answer together; empty if nothing
    does.
    """

    question: str
    evidence: tuple[tuple[int, str], ...]
    article: int


def questions() -> list[Question]:
    """The older questions, over the news."""
    text = resources.files(__package__).joinpath("assistant_questions.jsonl").read_text("utf-8")
    found = []
    for line in text.splitlines():
        data = json.loads(line)
        evidence = tuple((number, span) for number, span in data["evidence"])
        number = data["article"] if "article" in data else evidence[0][0]
        found.append(Question(data["question"], evidence, number))
    return found


def recall(document: Document, question: Question, *, walk: bool) -> float:
    """The part of a question's evidence that the first K passages hold whole."""
    hits = search(document, question.question, K, walk=walk)
    texts = [document.passage(hit.chunk) for hit in hits]
    return fmean(any(span in text for text in texts) for _, span in question.evidence)


def _news(news: Path) -> list[Figure]:
    """Recall by words alone, with and without the walk; its constants were chosen on these."""
    figures = []
    with Library(":memory:") as library:
        articles = news.read_text("utf-8").splitlines()
        document = library.add(make_source("news", "txt", map(Block, articles)))
        for hops in (1, 2):
            some = [question for question in questions() if len(question.evidence) == hops]
            for name, walk in (("BM25", False), ("BM25 and the walk", True)):
                value = fmean(recall(document, question, walk=walk) for question in some)
                figures.append(Figure(f"recall@{K} of {hops} passages of the news, {name}", value))
    return figures


def finished(events: Iterator[Event]) -> Answer:
    """The answer at the end of a task."""
    *_, answer = events
    assert isinstance(answer, Answer)
    return answer


def rouge(text: str, reference: str) -> tuple[float, float, float]:
    """F1 of ROUGE-1, -2 and -L (Lin 2004) over lower-case words, without stemming."""
    ours, theirs = (re.findall(r"\w+", part.lower()) for part in (text, reference))
    scores = []
    for n in (1, 2):
        a, b = (
            Counter(zip(*(part[i:] for i in range(n)), strict=False)) for part in (ours, theirs)
        )
        scores.append(_f1((a & b).total(), a.total(), b.total()))
    scores.append(_f1(common_words(ours, theirs), len(ours), len(theirs)))
    return scores[0], scores[1], scores[2]


def _f1(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs) if common else 0.0


def format_report(figures: Iterable[Figure]) -> str:
    """One line a figure."""
    rows = list(figures)
    width = max(len(figure.name) for figure in rows)
    lines = []
    for figure in rows:
        value = f"{figure.value:8.1f}" if figure.unit else f"{figure.value:8.3f}"
        if figure.low is not None:
            value += f"  {figure.low:.3f} to {figure.high:.3f}, n = {figure.count}"
        lines.append(f"{figure.name:{width}}  {value} {figure.unit}".rstrip() + "\n")
    return "".join(lines)
