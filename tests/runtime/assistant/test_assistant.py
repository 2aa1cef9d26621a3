"""Retrieval, citations, and the tasks over a tiny random model and over the real one."""

from __future__ import annotations

import json
import math
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pocketslm.errors import ContextOverflowError, UsageError
from pocketslm.profiling.assistant import finished, questions, recall, rouge, well_formed
from pocketslm.runtime.assistant.answer import Answer, Event
from pocketslm.runtime.assistant.assistant import Assistant, sample_document
from pocketslm.runtime.assistant.document import Block, Document, make_source
from pocketslm.runtime.assistant.language import detect, stem
from pocketslm.runtime.assistant.library import Library
from pocketslm.runtime.assistant.prompts import prompt
from pocketslm.runtime.assistant.quoting import PASSAGES, choose
from pocketslm.runtime.assistant.retrieval import search
from pocketslm.runtime.assistant.salience import is_answered, is_prose, key_sentences
from pocketslm.runtime.assistant.support import ground_of
from pocketslm.runtime.assistant.words import sentences, terms
from pocketslm.runtime.model import Model
from support_documents import pdf_file


@pytest.fixture(scope="module")
def tiny(tiny_bundle: Path) -> Assistant:
    return Assistant(Model.load(tiny_bundle, threads=1))


def test_forms_of_a_word_meet() -> None:
    for language, forms in (
        ("en", "fires fire fired"),
        ("en", "parties party"),
        ("en", "write writes wrote written"),
        ("en", "steal stole stolen"),
        ("en", "stopped stops stop"),
        ("de", "wohnung wohnungen"),
        ("fr", "tilleul tilleuls"),
        ("es", "bicicleta bicicletas"),
        ("ar", "المكتبة مكتبة"),
    ):
        assert len({stem(form, language) for form in forms.split()}) == 1, forms
    assert terms("What did the U.S. say about 1,200 fires?") == ["u.s.", "1,200", "fire"]
    assert terms("Wann muss ich die Miete zahlen?", "de") == ["miet", "zahl"]
    assert terms("额定功率860瓦", "zh") == ["额定", "定功", "功率", "860", "瓦"]


def test_the_language_of_a_text_is_seen() -> None:
    for language, text in {
        "en": "The rent is due on the first day of the month, and it is paid to the owner.",
        "de": "Die Miete ist am ersten Tag des Monats an die Vermieterin zu zahlen.",
        "fr": "Le loyer est payé au propriétaire le premier jour du mois.",
        "es": "El alquiler se paga al dueño el primer día del mes.",
        "ar": "المكتبة مفتوحة كل يوم",
        "zh": "图书馆每天开放",
        "ja": "図書館は毎日開いています",
        "": "Drill | A3 | 349 | Novak",
    }.items():
        assert detect(text) == language, text


def test_sentences_end_where_their_language_ends_them() -> None:
    def split(text: str) -> list[str]:
        return [text[a:b] for a, b in sentences(text)]

    assert split("图书馆开放。周五关闭。") == ["图书馆开放。", "周五关闭。"]
    assert split("Bis zum 10. Januar. Danach nicht.") == ["Bis zum 10. Januar.", "Danach nicht."]
    assert split("Dr. Lee came. He left.") == ["Dr. Lee came.", "He left."]


def test_bm25_is_that_of_fts5(news: Document) -> None:
    """SQLite's own ranking of the same terms finds the same passage first."""
    index = sqlite3.connect(":memory:")
    if ("ENABLE_FTS5",) not in index.execute("PRAGMA compile_options").fetchall():
        pytest.skip("this SQLite has no FTS5 to compare with")
    index.execute("CREATE VIRTUAL TABLE passages USING fts5(text)")
    for chunk in news.chunks:
        letters = " ".join(code(term) for term in _terms_of(news, chunk.index))
        index.execute("INSERT INTO passages (rowid, text) VALUES (?, ?)", (chunk.index, letters))
    for question in questions():
        wanted = " OR ".join(code(term) for term in terms(question.question))
        theirs = index.execute(
            "SELECT rowid, -bm25(passages) FROM passages WHERE passages MATCH ? ORDER BY rank "
            "LIMIT 3",
            (wanted,),
        ).fetchall()
        ours = search(news, question.question, 3, walk=False)
        assert [hit.chunk.index for hit in ours][:1] == [row for row, _ in theirs][:1]
        for hit, (_, score) in zip(ours[:1], theirs, strict=False):
            assert math.isclose(hit.score, score, rel_tol=0.05)  # idf with and without + 1
    index.close()


def code(term: str) -> str:
    """A term as letters that FTS5's tokenizer keeps together."""
    return "x" + term.encode().hex()


def _terms_of(document: Document, chunk: int) -> list[str]:
    rows = document.library._rows(
        "SELECT term, count FROM postings WHERE document = ? AND chunk = ?", document.id, chunk
    )
    return [term for term, count in rows for _ in range(count)]


def test_the_graph_finds_second_passages_and_loses_none(news: Document) -> None:
    def mean(hops: int, walk: bool) -> float:
        found = [recall(news, q, walk=walk) for q in questions() if len(q.evidence) == hops]
        assert len(found) >= 15
        return sum(found) / len(found)

    assert mean(1, True) >= mean(1, False) > 0.9
    assert mean(2, True) > mean(2, False) + 0.05


def test_questions_rest_on_their_articles(articles: list[str]) -> None:
    for question in questions():
        for number, span in question.evidence:
            assert span in articles[number], question


def test_what_no_passage_holds_is_not_found(news: Document) -> None:
    """By words alone, in 462 passages: half of the questions that nothing answers are refused, and
    hardly one that something does."""

    def found(question: str) -> bool:
        return choose(search(news, question, PASSAGES), question).found

    some = questions()
    assert sum(not found(q.question) for q in some if not q.evidence) >= 5
    assert sum(found(q.question) for q in some if len(q.evidence) == 1) >= 22
    assert search(news, "xyzzy") == search(news, "") == []


def test_the_quote_is_the_sentence_that_answers(library: Library) -> None:
    text = (
        "The bridge is old. It was built by Ann Lee in 1932. Boats pass under it. Ann Lee died.\n"
        'The last line said: "Wind west. Light burning." Then you need:\n- a saw\n- a nail\nEnd.'
    )
    document = library.add(make_source("bridge", "txt", [Block(text)]))

    def quote(question: str) -> str:
        found = choose(search(document, question, PASSAGES), question)
        assert found.found, question
        return document.text[found.citations[0].start : found.citations[0].end]

    assert quote("Who built the bridge?") == "It was built by Ann Lee in 1932."
    assert quote("When was the bridge built?") == "It was built by Ann Lee in 1932."
    assert quote("What was the last line?").endswith('Light burning."')
    assert quote("What do you need?") == "Then you need:\n- a saw\n- a nail"
    nothing = choose([], "Who?")
    assert (nothing.found, nothing.citations) == (False, ())


def test_a_compound_is_found_by_its_parts(library: Library) -> None:
    text = "Die Kündigung ist mit einer Frist von drei Monaten möglich. Die Miete ist fällig."
    document = library.add(make_source("vertrag", "txt", [Block(text)]))
    assert document.language == "de"
    (hit,) = search(document, "Wie lang ist die Kündigungsfrist?")
    assert hit.coverage > 0.5
    assert search(document, "Gibt es einen Stellplatz?") == []


def test_a_model_is_believed_only_as_far_as_one_sentence_supports_it() -> None:
    grounds = [
        "A well-behaved dog may come along for €35 for the whole stay.",
        "Parking in the yard costs €12 a day.",
        "Its chair is Anil Mehra; the manager, Ruth Okafor, has two helpers.",
        "Dogs are not allowed.",
    ]
    question = "What does it cost to bring my dog?"
    right = "A dog may come along for €35."
    assert ground_of(right, grounds, question) == 0
    for wrong in (
        "A dog may come along for €12.",  # a number of another sentence
        "A dog may come along for €35, says Bob.",  # a name of nobody
        "A dog may not come along for €35.",  # a negation
        "The manager is Anil Mehra.",  # words in another order
        "What does it cost?",  # nothing new
        'A dog may come along for "€35.',  # half a quotation
    ):
        assert ground_of(wrong, grounds[:3], question) is None, wrong
    assert ground_of("Dogs are allowed.", grounds[3:]) is None
    assert ground_of("The trip takes six days.", ["The trip takes 6 days."]) == 0
    assert ground_of("It cost 1500 euros.", ["It cost 1,500 euros."]) == 0


def test_telling_sentences_and_their_questions(news: Document) -> None:
    spans = key_sentences(news, 6)
    assert len(set(spans)) == 6
    assert all(news.text[end - 1] in '.!?"' for _, end in spans)
    assert max(start for start, _ in spans) > len(news.text) // 2  # from all of the document
    passage = "Ann Lee built the bridge in Leeds."
    assert is_answered("Who built the bridge?", passage)
    for bad in (
        "Who built it",
        "Who?",
        "What does the sentence say?",
        "Who sank the boats of Oslo?",
        "When did Ann Lee build the bridge in Leeds?",  # no time is said
    ):
        assert not is_answered(bad, passage)
    assert is_prose(news)


def test_prompts_are_chosen_by_family() -> None:
    assert "{document}" in prompt("document", "Unknown 7B")
    assert prompt("document", "SmolLM2-135M") == prompt("document", "Unknown 7B")


TASKS: dict[str, Callable[[Assistant, Document, threading.Event], Iterator[Event]]] = {
    "summarize": lambda assistant, document, cancel: assistant.summarize(document, cancel),
    "ask": lambda assistant, document, cancel: assistant.ask(document, "Who hid the cat?", cancel),
    "suggest": lambda assistant, document, cancel: assistant.suggest(document, cancel),
    "rewrite": lambda assistant, document, cancel: assistant.rewrite("A cat.", "Be brief", cancel),
}
CAT = "Tom hid the cat in Paris on Friday, and 12 dogs ran away from the old white house. "


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("repeats", [1, 30])
def test_a_task_streams_and_ends_with_its_answer(
    task: str, repeats: int, tiny: Assistant, library: Library
) -> None:
    """In a context of 256 byte tokens: the longer document never fits, and nothing overflows."""
    document = library.add(make_source("cat", "txt", [Block(CAT)] * repeats))
    small = Assistant(tiny.model, Assistant.DEFAULTS.but(max_new_tokens=12, ignore_eos=True))
    *events, answer = TASKS[task](small, document, threading.Event())
    assert isinstance(answer, Answer)
    assert answer.task == task
    pieces = "".join(event for event in events if isinstance(event, str))
    assert pieces.strip() == answer.text
    if task == "suggest":
        assert all(map(well_formed, answer.items))
    for citation in answer.citations:
        chunk = document.chunks[citation.chunk]
        assert chunk.start <= citation.start < citation.end <= chunk.end


@pytest.mark.parametrize("task", TASKS)
def test_cancel_ends_a_task_with_what_there_is(
    task: str, tiny: Assistant, library: Library
) -> None:
    document = library.add(make_source("cat", "txt", [Block(CAT)]))
    cancel = threading.Event()
    assistant = Assistant(tiny.model, Assistant.DEFAULTS.but(max_new_tokens=12, ignore_eos=True))
    events = []
    for event in TASKS[task](assistant, document, cancel):
        events.append(event)
        cancel.set()
    answer = events[-1]
    assert isinstance(answer, Answer)
    assert answer.finish == "cancelled"
    assert answer.new_tokens < 12
    *_, answer = TASKS[task](assistant, document, cancel)  # cancelled before it begins
    assert isinstance(answer, Answer)
    assert (answer.finish, answer.new_tokens) == ("cancelled", 0)


def test_what_cannot_be_done_is_said(tiny: Assistant, library: Library) -> None:
    document = library.add(make_source("cat", "txt", [Block(CAT)]))
    with pytest.raises(UsageError, match="question is empty"):
        list(tiny.ask(document, " "))
    with pytest.raises(UsageError, match="passage is empty"):
        list(tiny.rewrite("\n"))
    with pytest.raises(ContextOverflowError, match="too long to rewrite"):
        list(tiny.rewrite(CAT * 9, "x"))
    with pytest.raises(ContextOverflowError, match="shorten it"):
        list(tiny.ask(document, "Who hid the cat? " * 20))
    assert not list(tiny.ask([], "Who?"))[-1].found  # type: ignore[union-attr]
    answer = finished(tiny.ask(document, "What is the boiling point of nitrogen?"))
    assert (answer.found, answer.new_tokens, answer.finish) == (False, 0, "none")


def test_rouge_is_that_of_its_paper() -> None:
    """The examples of Lin 2004, section 3.1: the sentences share "police" and "the gunman"."""
    reference, one, two = (
        "police killed the gunman",
        "police kill the gunman",
        "the gunman kill police",
    )
    assert rouge(one, reference) == pytest.approx((0.75, 1 / 3, 0.75))
    assert rouge(two, reference) == pytest.approx((0.75, 1 / 3, 0.5))
    assert rouge("other", reference) == (0.0, 0.0, 0.0)


OFFLINE = """
import socket, sys
def refuse(*_, **__): raise AssertionError("a socket was opened")
socket.socket = socket.create_connection = socket.getaddrinfo = refuse
sys.addaudithook(lambda name, _: refuse() if name.startswith("socket.") else None)
from pocketslm.cli import main
for arguments in ["add {0}", "list", "ask {1} What? --document 1 -n 4", "suggest {1} --document 1",
                  "summarize {1} --document 1 -n 4", "rewrite {1} text -n 4", "remove 1"]:
    assert main(["doc", *arguments.format(*sys.argv[1:]).split()]) == 0, arguments
"""


def test_the_assistant_opens_no_socket(tiny_bundle: Path, tmp_path: Path) -> None:
    """Every command, with sockets forbidden; and the prohibition works."""
    note = tmp_path / "note.txt"
    note.write_text("What a short note.")
    command = [sys.executable, "-c", OFFLINE, str(note), str(tiny_bundle)]
    environment = {"POCKETSLM_DOCUMENTS": str(tmp_path / "library.db")}
    done = subprocess.run(
        command, env=_environment() | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    broken = OFFLINE.replace(
        "from pocketslm", "socket.getaddrinfo('localhost', 80)\nfrom pocketslm"
    )
    done = subprocess.run([sys.executable, "-c", broken], capture_output=True, check=False)
    assert b"a socket was opened" in done.stderr


def _environment() -> dict[str, str]:
    import os

    return dict(os.environ)


BOOK = """
import json, resource, sys
from pathlib import Path
from pocketslm.runtime.assistant.library import Library
import pypdf, pocketslm.runtime.assistant.readers.pdf
def memory(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = memory()
with Library(sys.argv[2]) as library:
    document = library.add(Path(sys.argv[1]))
    print(json.dumps([memory() - before, document.pages, len(document.text)]))
"""
MOST_BOOK_BYTES = 200 << 20


def test_a_book_of_500_pages_needs_little_memory(articles: list[str], tmp_path: Path) -> None:
    """Peak memory of a process that adds a real PDF of 500 full pages."""
    text = " ".join(articles * 3).encode("latin-1", "replace").decode("latin-1").split()
    pages = [
        "\n".join(" ".join(text[at : at + 10]) for at in range(start, start + 250, 10))
        for start in range(0, 500 * 250, 250)
    ]
    book = tmp_path / "book.pdf"
    book.write_bytes(pdf_file(pages))
    command = [sys.executable, "-c", BOOK, str(book), str(tmp_path / "library.db")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    extra, count, size = json.loads(done.stdout)
    assert count == 500
    assert size > 700_000
    assert extra < MOST_BOOK_BYTES


@pytest.mark.real
def test_the_real_model_answers_and_cites(smollm2_bundle: Path, library: Library) -> None:
    assistant = Assistant(Model.load(smollm2_bundle))
    document = library.add(sample_document())
    first = finished(assistant.ask(document, "When was Apollo 8 launched?"))
    assert first.text.startswith("The document says:\n“")
    assert "December 21, 1968" in first.text
    cited = [document.text[c.start : c.end] for c in first.citations]
    assert any("December 21, 1968" in passage for passage in cited)
    again = finished(assistant.ask(document, "Who read from the Book of Genesis?"))
    assert "Genesis" in again.text
    # What the second question read anew is a small part: that is why it starts at once.
    engine = assistant.model.engine  # type: ignore[attr-defined]
    assert len(engine.cache.tokens) >= again.prompt_tokens
    assert not finished(assistant.ask(document, "What is the currency of Denmark?")).found
    items = finished(assistant.suggest(document)).items
    assert all(map(well_formed, items))
    for item in items:
        assert finished(assistant.ask(document, item)).citations
    summary = finished(assistant.summarize(document))
    assert "Apollo 8" in summary.text
    assert summary.citations
    for a, b in sentences(summary.own):
        quotes = [document.text[c.start : c.end] for c in summary.citations]
        assert ground_of(summary.own[a:b], quotes) is not None


def test_sockets_exist_here() -> None:
    """What the offline test forbids would otherwise work."""
    with socket.socket() as plug:
        plug.bind(("127.0.0.1", 0))
