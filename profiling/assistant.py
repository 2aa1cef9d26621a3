"""The document assistant measured on real texts: what it finds, cites, summarises and suggests.

Texts: the news articles and Wikipedia articles of the catalog. Questions with the spans that answer
them were written by hand over the news, those of two spans so that no single article answers them.
A Wikipedia article's own lead section is the reference for a summary of the rest.
"""

from __future__ import annotations

import bz2
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from statistics import fmean, median
from typing import TypeVar

from pocketslm.runtime.assistant.answer import Answer, Event
from pocketslm.runtime.assistant.assistant import Assistant, sample_document
from pocketslm.runtime.assistant.document import Block, Document, make_source
from pocketslm.runtime.assistant.library import Library
from pocketslm.runtime.assistant.retrieval import answers, search
from pocketslm.runtime.assistant.words import sentences
from pocketslm.runtime.model import TextModel

K = 3
# Wikipedia articles of 2 to 8 thousand words whose markup leaves clean text.
SUMMARIZED = ("Aardvark", "Aardwolf", "Aikido", "Asphalt", "Animal Farm", "Amateur astronomy")
T = TypeVar("T")
Step = Callable[[str, float], None]


@dataclass(frozen=True)
class Report:
    """Fractions (0 to 1) unless the name says otherwise; ROUGE as F1."""

    recall_bm25: float
    recall_graph: float
    recall_bm25_two_hop: float
    recall_graph_two_hop: float
    answer_correct: float
    answer_cited: float
    answer_cited_in_300: float
    refused_answerable: float
    refused_unanswerable: float
    suggestions_well_formed: float
    suggestions_distinct: float
    rouge1: float
    rouge2: float
    rouge_l: float
    rouge1_lead: float
    rouge2_lead: float
    rouge_l_lead: float
    ttft_first_ms: float
    ttft_second_ms: float
    ttft_ratio: float


@dataclass(frozen=True)
class Question:
    """evidence: (number of the article, span in it) that together answer; none: nothing does."""

    question: str
    evidence: tuple[tuple[int, str], ...]
    article: int


def measure(model: TextModel, news: Path, wiki: Path, step: Step) -> Report:
    """Everything, in about five minutes with a 135M model on two cores."""
    articles = news.read_text("utf-8").splitlines()
    asked = questions()
    with Library(":memory:") as library:
        everything = library.add(make_source("news", "txt", map(Block, articles)))
        alone = {
            number: library.add(make_source(f"article {number}", "txt", [Block(articles[number])]))
            for number in dict.fromkeys(q.article for q in asked)
        }
        assistant = Assistant(model)
        values: dict[str, float] = {}
        values |= _retrieval(everything, asked)
        values |= _answers(assistant, everything, alone, asked, step)
        values |= _suggestions(assistant, alone.values(), step)
        values |= _summaries(assistant, library, wiki, step)
        values |= _first_tokens(assistant, library.add(sample_document()))
    return Report(**values)


def questions() -> list[Question]:
    """The questions that ship with the package."""
    text = resources.files(__package__).joinpath("assistant_questions.jsonl").read_text("utf-8")
    found = []
    for line in text.splitlines():
        data = json.loads(line)
        evidence = tuple((number, span) for number, span in data["evidence"])
        article = data["article"] if "article" in data else evidence[0][0]
        found.append(Question(data["question"], evidence, article))
    return found


def recall(document: Document, question: Question, *, walk: bool) -> float:
    """The part of a question's evidence that stands whole in the first K passages."""
    hits = search(document, question.question, K, walk=walk)
    texts = [document.passage(hit.chunk) for hit in hits]
    return fmean(any(span in text for text in texts) for _, span in question.evidence)


def _retrieval(document: Document, asked: Sequence[Question]) -> dict[str, float]:
    values = {}
    for hops, ending in ((1, ""), (2, "_two_hop")):
        some = [q for q in asked if len(q.evidence) == hops]
        for name, walk in (("bm25", False), ("graph", True)):
            mean = fmean(recall(document, q, walk=walk) for q in some)
            values[f"recall_{name}{ending}"] = mean
    return values


def _answers(
    assistant: Assistant,
    everything: Document,
    alone: dict[int, Document],
    asked: Sequence[Question],
    step: Step,
) -> dict[str, float]:
    single = [q for q in asked if len(q.evidence) == 1]
    correct, cited, cited_in_all, refused = [], [], [], []
    for question in _steps("ask", single, step):
        (_, span) = question.evidence[0]
        document = alone[question.article]
        answer = finished(assistant.ask(document, question.question))
        correct.append(_plain(span) in _plain(answer.text))
        cited.append(_cites(document, answer, span))
        refused.append(not answer.found)
        answer = finished(assistant.ask(everything, question.question))
        cited_in_all.append(_cites(everything, answer, span))
    nothing = [q for q in asked if not q.evidence]
    return {
        "answer_correct": fmean(correct),
        "answer_cited": fmean(cited),
        "answer_cited_in_300": fmean(cited_in_all),
        "refused_answerable": fmean(refused),
        "refused_unanswerable": fmean(
            not answers(everything, q.question, search(everything, q.question, K)) for q in nothing
        ),
    }


def _cites(document: Document, answer: Answer, span: str) -> bool:
    return any(span in document.text[c.start : c.end] for c in answer.citations)


def _suggestions(
    assistant: Assistant, documents: Iterable[Document], step: Step
) -> dict[str, float]:
    lists = [
        finished(assistant.suggest(document)).items
        for document in _steps("suggest", list(documents), step)
    ]
    return {
        "suggestions_well_formed": fmean(map(well_formed, lists)),
        "suggestions_distinct": fmean(
            len({_plain(item) for item in items}) == 3 for items in lists
        ),
    }


def well_formed(items: Sequence[str]) -> bool:
    """Three questions, each one line of a few words that ends in its only question mark."""
    return len(items) == 3 and all(re.fullmatch(r"\w[^?\n]+ [^?\n]+\?", item) for item in items)


def _summaries(assistant: Assistant, library: Library, wiki: Path, step: Step) -> dict[str, float]:
    ours, lead = [], []
    for title in _steps("summarize", SUMMARIZED, step):
        blocks = list(article(wiki, title))
        first = next(at for at, block in enumerate(blocks) if block.level)
        reference = "\n".join(block.text for block in blocks[:first])
        document = library.add(make_source(title, "wiki", blocks[first:]))
        summary = finished(assistant.summarize(document)).text
        ours.append(rouge(summary, reference))
        length = len(summary.split())
        lead.append(rouge(_lead(document.text, length), reference))
    names = ("rouge1", "rouge2", "rouge_l")
    values = {name: fmean(scores[at] for scores in ours) for at, name in enumerate(names)}
    return values | {
        f"{name}_lead": fmean(scores[at] for scores in lead) for at, name in enumerate(names)
    }


def _lead(text: str, count: int) -> str:
    """The first sentences of a text, as many as have ``count`` words."""
    end = 0
    for _, end in sentences(text):
        if len(text[:end].split()) >= count:
            break
    return text[:end]


def _first_tokens(assistant: Assistant, document: Document) -> dict[str, float]:
    """TTFT of the first question on a document, after another one, and of the second."""
    first, second = [], []
    other = document.library.add(make_source("other", "txt", [Block("Nothing of interest here.")]))
    for _ in range(5):
        finished(assistant.ask(other, "Is there nothing of interest?"))
        first.append(finished(assistant.ask(document, "When was Apollo 8 launched?")).ttft_ms)
        second.append(finished(assistant.ask(document, "Who was the commander?")).ttft_ms)
    return {
        "ttft_first_ms": median(first),
        "ttft_second_ms": median(second),
        "ttft_ratio": median(a / b for a, b in zip(first, second, strict=True)),
    }


def finished(events: Iterator[Event]) -> Answer:
    """The answer at the end of a task."""
    *_, answer = events
    assert isinstance(answer, Answer)
    return answer


def _steps(name: str, items: Sequence[T], step: Step) -> Iterator[T]:
    for at, item in enumerate(items):
        step(name, at / len(items))
        yield item


def rouge(text: str, reference: str) -> tuple[float, float, float]:
    """F1 of ROUGE-1, -2 and -L (Lin 2004) over lower-case words, without stemming."""
    ours, theirs = (re.findall(r"\w+", part.lower()) for part in (text, reference))
    scores = []
    for n in (1, 2):
        a, b = (
            Counter(zip(*(part[i:] for i in range(n)), strict=False)) for part in (ours, theirs)
        )
        scores.append(_f1((a & b).total(), a.total(), b.total()))
    row = [0] * (len(theirs) + 1)  # longest common subsequence, row by row
    for word in ours:
        before = 0
        for at, other in enumerate(theirs, 1):
            before, row[at] = row[at], before + 1 if word == other else max(row[at], row[at - 1])
    scores.append(_f1(row[-1], len(ours), len(theirs)))
    return scores[0], scores[1], scores[2]


def _f1(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs) if common else 0.0


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[\w$]+", text.lower()))


_NESTED = re.compile(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_MARKUP = (
    (re.compile(r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<(math|gallery).*?</\1>", re.DOTALL), ""),
    (re.compile(r"<[^>]+>|'{2,}|__\w+__"), ""),
    (re.compile(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]"), ""),
    (re.compile(r"\[\[(?:[^|\[\]]*\|)?([^|\[\]]*)\]\]"), r"\1"),
    (re.compile(r"\[https?://\S+ ?([^\]]*)\]"), r"\1"),
    (re.compile(r"\([\s,;]*\)|&nbsp;"), " "),
)
_HEADING = re.compile(r"(={2,6})\s*(.+?)\s*\1$")
_LAST = ("See also", "References", "Notes", "External links", "Further reading")


def article(wiki: Path, title: str) -> Iterator[Block]:
    """Paragraphs and headings of an article in the XML dump, without its markup."""
    import html

    dump = bz2.decompress(wiki.read_bytes()).decode("utf-8")
    page = dump[dump.index(f"<title>{title}</title>") :]
    text = html.unescape(page[page.index("<text") : page.index("</text>")].partition(">")[2])
    count = 1
    while count:
        text, count = _NESTED.subn("", text)
    for pattern, put in _MARKUP:
        text = pattern.sub(put, text)
    for line in text.splitlines():
        if heading := _HEADING.match(line.strip()):
            if heading[2] in _LAST:
                return
            yield Block(heading[2], len(heading[1]) - 1)
        elif line[:1] not in ("|", "!", ":", "*", "#", ";", "{", "}"):
            yield Block(line)


def format_report(report: Report) -> str:
    """One line a figure."""
    width = max(len(field.name) for field in fields(report))
    values = ((field.name, getattr(report, field.name)) for field in fields(report))
    return "".join(f"{name:{width}}  {value:.3f}\n" for name, value in values)
