"""Finding by meaning, and in all documents, with an embedder of a few words."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pocketslm.cli import main
from pocketslm.export.pipeline import export_bundle
from pocketslm.models.catalog import fetch
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.profiling.assistant import finished
from pocketslm.runtime.assistant.assistant import Assistant
from pocketslm.runtime.assistant.document import Block, Document, make_source
from pocketslm.runtime.assistant.library import Library
from pocketslm.runtime.assistant.meaning import Meanings, pack
from pocketslm.runtime.assistant.quoting import BY_MEANING, PASSAGES, choose
from pocketslm.runtime.assistant.retrieval import search
from pocketslm.runtime.assistant.scale import (
    SPREAD,
    UNRELATED,
    Embedder,
    Scale,
    Vector,
    measured,
    pairs,
)
from pocketslm.runtime.model import Model, Record

# Words that mean the same share a dimension.
MEANT = ({"cock", "cockerel", "cockerels"}, {"queue", "wait"}, {"camp", "night"}, {"price", "cost"})


class Words:
    embedding_prompts: Mapping[str, str] = {}

    def __init__(self, name: str = "words", *languages: str) -> None:
        self.name, self.texts = name, 0
        self.scale = Scale({"en": UNRELATED}, SPREAD, languages or ("en",))

    def embed(
        self, texts: Sequence[str], *, prompt: str | None = None, truncate: bool = False
    ) -> Vector:
        self.texts += len(texts)
        vectors = np.full((len(texts), len(MEANT) + 1), 0.01, np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for at, some in enumerate(MEANT):
                row[at] += bool(some & set(text.lower().strip("?.").replace(".", " ").split()))
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(autouse=True)
def scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedder of words is too simple to be measured: it says its scale."""

    def of(embedder: Embedder) -> Scale:
        return embedder.scale if isinstance(embedder, Words) else measured(embedder)

    monkeypatch.setattr("pocketslm.runtime.assistant.meaning.measured", of)


@pytest.fixture
def shelf(library: Library) -> list[Document]:
    sentence = "Paragraph {0} is about stones, the sea and {0} birds. "
    filler = [Block(sentence.format(number) * 12) for number in range(9)]
    return [
        library.add(
            make_source("rules", "txt", [*filler, Block("Hens are fine, but no cockerels here.")])
        ),
        library.add(make_source("fees", "txt", [*filler[1:], Block("The cost is 85 pounds.")])),
    ]


def test_meaning_finds_what_shares_no_word(library: Library, shelf: list[Document]) -> None:
    question = "May I have a cock?"
    assert search(shelf, question) == []  # by words
    meanings = Meanings(library, Words())
    assert search(shelf, question, meanings=meanings) == []  # nothing is computed yet
    steps = list(meanings.index())
    assert steps[-1].done == steps[-1].total
    hits = search(shelf, question, PASSAGES, meanings=meanings)
    assert "cockerels" in hits[0].document.passage(hits[0].chunk)
    quotes = choose(hits, question)
    citation = quotes.citations[0]
    assert citation.document == shelf[0].id
    assert shelf[0].text[citation.start : citation.end] == "Hens are fine, but no cockerels here."


def test_likeness_alone_answers_only_in_the_language_of_its_model(library: Library) -> None:
    english = "Hens are fine here, but there are to be no cockerels in the garden."
    german = "Hier sind Hennen in Ordnung, aber im Garten soll es keine cockerels geben."
    for text, question, found in (
        (english, "May I have a cock?", True),
        (english, "Must I queue?", False),  # it is not alike
        (german, "Darf ich einen cock haben?", False),
    ):
        document = library.add(make_source(text[:5], "txt", [Block(text)]))
        assert document.language == ("en" if text is english else "de")
        meanings = Meanings(library, Words())
        list(meanings.index())
        hits = search(document, question, PASSAGES, meanings=meanings)
        assert hits[0].coverage == 0.0
        assert choose(hits, question).found is found, question


class Paired:
    """Gives each question of some languages the vector of its sentence, and others one vector."""

    name = "paired"
    embedding_prompts: Mapping[str, str] = {"query": "q: ", "document": ""}

    def __init__(self, *languages: str) -> None:
        self.rows = {text: at for at, pair in enumerate(pairs(*languages)) for text in pair}
        self.asked: list[str | None] = []

    def embed(
        self, texts: Sequence[str], *, prompt: str | None = None, truncate: bool = False
    ) -> Vector:
        self.asked.append(prompt)
        vectors = np.full((len(texts), 1 + len(self.rows)), 1e-3, np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            vector[0] = 1.0
            if text in self.rows:
                vector[1 + self.rows[text]] = 0.7
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_the_scale_of_a_model_says_what_its_cosines_are_worth() -> None:
    embedder = Paired("en", "de")
    scale = measured(embedder)
    assert scale.languages == ("en", "de")
    assert scale.knows("de") and scale.knows("") and not scale.knows("fr")  # noqa: PT018
    assert set(embedder.asked) == {"query", "document"}
    cosine = np.array([scale.unrelated["en"], scale.unrelated["en"] + scale.spread], np.float32)
    np.testing.assert_allclose(
        scale.likeness(cosine), [UNRELATED, UNRELATED + SPREAD], rtol=0, atol=1e-5
    )
    # Of a language that is not known, cosines are taken as of English.
    np.testing.assert_array_equal(scale.likeness(cosine, "fr"), scale.likeness(cosine))
    assert measured(Paired()).languages == ()


def test_several_models_rank_together_and_the_one_for_the_language_decides(
    library: Library,
) -> None:
    german = "Hier sind Hennen in Ordnung, aber im Garten soll es keine cockerels geben."
    document = library.add(make_source("Garten", "txt", [Block(german)]))
    assert document.language == "de"
    english, both = Words("english"), Words("both", "en", "de", "fr")
    both.scale = Scale({"en": UNRELATED, "de": UNRELATED + 0.5}, SPREAD, both.scale.languages)
    meanings = Meanings(library, [english, both])
    assert meanings.name == "english + both"
    assert meanings.understands(document)
    list(meanings.index())
    (alike,) = meanings.likeness(document, meanings.question("May I have a cock?")).values()
    alone = Meanings(Library(":memory:"), [english])
    assert not alone.understands(document)
    sentence = float(Words().embed([german])[0] @ Words().embed(["cock"])[0])
    np.testing.assert_allclose(alike.ranking[1], sentence, rtol=0, atol=0.02)
    np.testing.assert_allclose(alike.deciding[1], sentence - 0.5, rtol=0, atol=0.02)
    hits = search(document, "May I have a cock?", meanings=meanings)
    assert choose(hits, "May I have a cock?").found == (sentence - 0.5 >= BY_MEANING.least)
    kept = library.meanings(document.id)
    assert len(kept[0][1]) == 2 * 2 * (len(MEANT) + 1 + 4)  # two models, a chunk and its sentence
    list(Meanings(library, [english]).index())
    assert len(library.meanings(document.id)[0][1]) == 2 * (len(MEANT) + 1 + 4)


class Reader:
    """A model that finds the question after sentences with one word probable, and says nothing."""

    def __init__(self, word: str) -> None:
        self.word = word
        self.name, self.backend, self.context, self.tokenizer = "reader", "none", 512, Letters()

    def generate(self, prompt: object, config: object = None) -> Iterator[Record]:
        yield from ()

    def logprobs(self, ids: Sequence[int], following: Sequence[int]) -> Vector:
        known = self.word in "".join(map(chr, ids))
        return np.full(len(following), -1.0 if known else -9.0, np.float32)


class Letters(SimpleNamespace):
    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def apply_chat_template(self, messages: list[dict[str, str]]) -> list[int]:
        return self.encode(messages[0]["content"])


def test_a_second_look_finds_among_several_documents(library: Library) -> None:
    """What is doubtful is read again; the first quotes stay where they are."""
    texts = ("Hens are fine here, but there are no cockerels.", "The cost is 85 pounds.")
    shelf = [library.add(make_source(text[:4], "txt", [Block(text)])) for text in texts]
    meanings = Meanings(library, Words())
    list(meanings.index())
    plain = finished(Assistant(Reader("?"), meanings=meanings).ask(shelf, "May I have a cock?"))
    assistant = Assistant(Reader("85 pounds"), meanings=meanings)
    answer = finished(assistant.ask(shelf, "May I have a cock?"))
    assert answer.text.startswith(plain.text.partition("\n\n")[0])
    assert "second reading" in answer.text
    best = answer.citations[0]
    assert (best.document, shelf[1].text[best.start : best.end]) == (shelf[1].id, texts[1])
    assert set(plain.citations) <= set(answer.citations)
    stop = threading.Event()
    stop.set()
    assert "second reading" not in finished(assistant.ask(shelf, "A cock?", stop)).text
    assert "second reading" not in finished(assistant.ask(shelf, "Is the cost 85 pounds?")).text
    assert "second reading" not in finished(assistant.ask(shelf[0], "May I have a cock?")).text


def test_words_that_meet_by_chance_do_not_outweigh_meaning(
    library: Library, shelf: list[Document]
) -> None:
    meanings = Meanings(library, Words())
    list(meanings.index())
    question = "May a cock climb over stones, walls, roofs and hedges?"
    hits = search(shelf, question, PASSAGES, meanings=meanings)
    assert "cockerels" in hits[0].document.passage(hits[0].chunk)
    assert hits[0].coverage == 0.0 < hits[1].coverage < 0.5
    # Words that cover the question do.
    hits = search(shelf, "Is the sea about stones and birds?", PASSAGES, meanings=meanings)
    assert "stones" in hits[0].document.passage(hits[0].chunk)


def test_all_documents_are_searched_at_once(library: Library, shelf: list[Document]) -> None:
    """By words: the right document comes first, and only those that are given are searched."""
    best = search(shelf, "How many pounds is the cost?")[0]
    assert best.document.title == "fees"
    assert {hit.document.id for hit in search(shelf[:1], "stones and the sea")} == {shelf[0].id}
    assert search([], "stones") == []


def test_what_was_computed_is_kept_and_a_stop_loses_none(
    library: Library, shelf: list[Document]
) -> None:
    first, cancel = Words(), threading.Event()
    for _ in Meanings(library, first).index(cancel=cancel):
        cancel.set()
    assert 0 < len(library.meanings(shelf[0].id)) + len(library.meanings(shelf[1].id)) < 30
    second = Words()
    list(Meanings(library, second).index())
    third = Words()
    list(Meanings(library, third).index())
    assert second.texts > 0
    assert third.texts == 0
    library.remove(shelf[0].id)
    assert library.meanings(shelf[0].id) == []
    other = Words("others")
    list(Meanings(library, other).index())  # the vectors of one model say nothing to another
    assert other.texts > 0


def test_vectors_are_bytes_with_a_factor() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(5, 384)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    data = pack(vectors)
    assert len(data) == 5 * (384 + 4)
    rows = np.frombuffer(data, np.uint8).reshape(5, -1)
    back = rows[:, 4:].view(np.int8) * np.ascontiguousarray(rows[:, :4]).view("<f4")
    cosines = (back * vectors).sum(1) / np.linalg.norm(back, axis=1)
    assert cosines.min() > 0.9995
    assert pack(np.zeros((1, 4), np.float32)) == pack(np.full((1, 4), 0, np.float32))


def test_a_library_without_a_model_of_embeddings_finds_by_words(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bundle that generates text is refused; one that is gone is said, and words do."""
    (tmp_path / "rent.txt").write_text("The rent is due on the first day of the month.")
    (tmp_path / "dogs.txt").write_text("Dogs must be kept on a lead in the garden.")
    where = ["--library", str(tmp_path / "library.db")]
    assert main(["doc", "meaning", *where]) == 2
    assert "finds by words only" in capsys.readouterr().err
    assert main(["doc", "meaning", str(tiny_bundle), *where]) == 2
    assert "has no embeddings" in capsys.readouterr().err
    files = [str(tmp_path / name) for name in ("rent.txt", "missing.txt", "dogs.txt")]
    assert main(["doc", "add", *files, *where]) == 2
    said = capsys.readouterr().err
    assert "2: dogs" in said
    assert "missing.txt" in said
    with Library(tmp_path / "library.db") as library:
        library.set("embeddings", str(tmp_path / "gone"))
    ask = ["doc", "ask", str(tiny_bundle), "Where must dogs be kept?", "-n", "4", *where]
    assert main(ask) == 0
    out, said = capsys.readouterr()
    assert "“Dogs must be kept on a lead in the garden.” (dogs)" in out
    assert "in: 2 documents" in said
    assert "found by words only" in said
    assert main(["doc", "history", *where]) == 0
    assert "Where must dogs be kept?" in capsys.readouterr().out
    assert main([*ask, "--document", "dogs", "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    (citation,) = answer["citations"]
    assert citation["quote"] == "Dogs must be kept on a lead in the garden."
    assert citation["title"] == "dogs"
    assert main(["doc", "show", "dogs", *where]) == 0
    assert capsys.readouterr().out == "Dogs must be kept on a lead in the garden.\n"


@pytest.mark.real
def test_minilm_finds_by_meaning(tmp_path: Path, library: Library) -> None:
    export_bundle(open_checkpoint(fetch("all-minilm-l6-v2")), tmp_path / "minilm")
    texts = ("Hens may be kept.", "The rent is 85 pounds.", "Taps close in winter.")
    document = library.add(make_source("rules", "txt", [Block(text * 12) for text in texts]))
    meanings = Meanings(library, Model.load(tmp_path / "minilm"))
    list(meanings.index())
    hits = search(document, "What do I have to pay?", meanings=meanings)
    assert "85 pounds" in document.passage(hits[0].chunk)


@pytest.mark.real
def test_multilingual_e5_finds_by_meaning_in_other_languages(
    tmp_path: Path, library: Library
) -> None:
    export_bundle(open_checkpoint(fetch("multilingual-e5-small")), tmp_path / "e5")
    texts = ("Hennen sind erlaubt.", "Die Miete kostet 85 Euro.", "Im Winter ist das Wasser aus.")
    document = library.add(make_source("Regeln", "txt", [Block(text * 12) for text in texts]))
    meanings = Meanings(library, Model.load(tmp_path / "e5", threads=2))
    assert meanings.understands(document)
    list(meanings.index())
    hits = search(document, "Wie viel muss ich zahlen?", meanings=meanings)
    assert "85 Euro" in document.passage(hits[0].chunk)
