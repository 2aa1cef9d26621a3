"""What the app is made of, without a window: words, settings, models, actions."""

from __future__ import annotations

import json
import random
import re
import string
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import support
from pocketslm.android import strings
from pocketslm.android.engine import meter
from pocketslm.android.engine.models import Models, _state_bytes, describe
from pocketslm.android.engine.worker import Job, Worker
from pocketslm.android.intents import SCHEMAS, Action, propose
from pocketslm.android.phone.desktop import Desktop
from pocketslm.android.reading import (
    PIECE_CHARACTERS,
    PIECE_LINES,
    button_of,
    in_order,
    markup_of,
    next_place,
    pieces,
    shared,
)
from pocketslm.android.settings import DEFAULTS, Settings
from pocketslm.errors import BundleError, ContextOverflowError, UsageError
from pocketslm.export.pipeline import export_bundle
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.runtime.assistant.answer import Answer, Citation
from pocketslm.runtime.assistant.document import Block, make_source
from pocketslm.runtime.assistant.library import Entry, Library
from pocketslm.runtime.bundle import Graph, open_bundle
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model

REQUESTS = 60
SEED = 3


# Words


def _places(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


@pytest.mark.parametrize("language", strings.LANGUAGES)
def test_each_language_says_everything(language: str) -> None:
    english, theirs = strings.table("en"), strings.table(language)
    assert theirs.keys() == english.keys()
    for key, text in theirs.items():
        assert _places(text) == _places(english[key]), key
        assert text.strip()


def test_arabic_is_joined_and_put_into_visual_order() -> None:
    # "كتاب" (book): the joined forms of Unicode's table, last letter leftmost.
    assert strings.visual("كتاب") == "\ufe8f\ufe8e\ufe98\ufedb"
    # Numbers and Latin words keep their own direction inside.
    assert strings.visual("כתב 123 abc") == "abc 123 בתכ"
    assert strings.visual("abc כתב") == "abc בתכ"


def test_lines_break_in_logical_order() -> None:
    text = "אחת שתיים שלוש ארבע"
    lines = strings.visual(text, 9, len).split("\n")
    assert [line[::-1] for line in lines] == ["אחת שתיים", "שלוש ארבע"]
    assert strings.visual("a b\nc", 1, len) == "a\nb\nc"


def test_a_paragraph_runs_as_its_first_letter_does() -> None:
    assert strings.runs_rtl("1. שלום abc")
    assert not strings.runs_rtl("1. abc שלום")
    assert strings.runs_rtl("12", otherwise=True)


def test_a_text_is_found_again_and_again() -> None:
    text = "Fire (1) and fire (2)."
    first = next_place(text, "fire")
    assert first == (0, 4)
    assert next_place(text, " FIRE ", 4) == (13, 17)
    assert next_place(text, "fire", 17) == first  # from the start again
    assert next_place(text, "(2)") == (18, 21)
    assert next_place(text, "water") is next_place(text, " ") is None


# Settings


def test_settings_survive_and_strange_files_give_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "a" / "settings.json"
    settings = Settings(path)
    changed: list[str] = []
    settings.watch(changed.append)
    settings["theme"] = "dark"
    settings["theme"] = "dark"
    assert changed == ["theme"]
    assert Settings(path)["theme"] == "dark"
    for bad in (
        "",
        "{",
        "[]",
        '{"theme": "pink", "threads": "4"}',
        '{"language": 3}',
        "[" * 100_000,
    ):
        path.write_text(bad)
        again = Settings(path)
        assert {name: again[name] for name in DEFAULTS} == DEFAULTS
    path.write_text('{"embedder": "minilm"}')  # as earlier versions wrote it
    assert Settings(path)["embedders"] == ["minilm"]


def test_a_first_start_takes_the_language_and_theme_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "settings.json"
    first = Settings(path, {"language": "ar", "theme": "dark"})
    assert (first["language"], first["theme"]) == ("ar", "dark")
    first["language"] = "en"
    assert Settings(path, {"language": "de", "theme": "light"})["language"] == "en"
    assert Settings(tmp_path / "other", {"language": "fr"})["language"] == "en"  # it has none
    monkeypatch.delenv("LC_ALL", raising=False)
    monkeypatch.delenv("LC_MESSAGES", raising=False)
    monkeypatch.setenv("LANG", "de_AT.UTF-8")
    assert Desktop().choices() == {"language": "de"}


# The worker


def test_work_runs_elsewhere_and_its_events_arrive_here(tmp_path: Path) -> None:
    worker, seen = Worker("test"), []
    threads: list[int] = []

    def work(cancel: threading.Event) -> Iterator[int]:
        threads.append(threading.get_ident())
        for number in range(1000):
            if cancel.is_set():
                return
            yield number
            time.sleep(0.001)

    def fail(_: threading.Event) -> Iterator[int]:
        raise UsageError("nothing to do")
        yield

    def bug(_: threading.Event) -> Iterator[int]:
        yield 1 // 0

    job = worker.submit(Job(work, seen.append, seen.append, lambda: seen.append("end")))
    _poll_until(worker, lambda: 3 in seen)
    job.cancel.set()
    _poll_until(worker, lambda: "end" in seen)
    assert len(seen) < 1000
    assert threads != [threading.get_ident()]
    seen.clear()
    for broken in (fail, bug):
        worker.submit(Job(broken, seen.append, seen.append, lambda: None))
    _poll_until(worker, lambda: len(seen) == 2)
    assert seen[0] == "nothing to do"
    assert seen[1].startswith("ZeroDivisionError")
    worker.close()


def _poll_until(worker: Worker, holds) -> None:  # type: ignore[no-untyped-def]
    for _ in range(1000):
        worker.poll()
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("the worker did not answer")


# Models


def test_a_job_that_runs_at_once_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that is faster than its starter must not have its job forgotten."""
    begun = threading.Event()
    start = threading.Thread.start

    def start_and_wait(self: threading.Thread) -> None:
        start(self)
        begun.wait(10) if self.name == "fast" else None

    class Fast(Worker):
        def _run(self) -> None:
            self.current = "mine"  # type: ignore[assignment]
            begun.set()

    monkeypatch.setattr(threading.Thread, "start", start_and_wait)
    assert Fast("fast").current == "mine"


@pytest.mark.parametrize(
    ("cache", "changes", "heads_and_bytes"),
    [
        ("fp16", {}, (8, 2 * 64)),
        ("fp32", {}, (8, 4 * 64)),
        ("int8", {}, (8, 64 + 4)),
        ("fp16", {"layer_sharing": True}, (16, 2 * 64)),
        ("fp16", {"layer_sizes": [[8, 2, 96], [4, 1, 96]] * 2}, (6, 2 * 64)),
    ],
)
def test_the_cache_is_counted_as_the_graph_keeps_it(
    cache: str, changes: dict[str, Any], heads_and_bytes: tuple[int, int]
) -> None:
    plain = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    config = support.tiny(num_hidden_layers=4, **plain | changes)
    heads, vector = heads_and_bytes
    graph = Graph("native", "model.slm", 256, cache)
    assert _state_bytes(graph, config) == 256 * 2 * heads * vector


def test_a_bundle_is_imported_as_a_folder_and_as_a_zip(tiny_bundle: Path, tmp_path: Path) -> None:
    models = Models(tmp_path / "models")
    *_, name = models.import_bundle(tiny_bundle)
    packed = _zip(tiny_bundle, tmp_path / "x.zip", "inside/")
    *_, again = models.import_bundle(packed)
    assert name == again == open_bundle(tiny_bundle).name
    (card,) = models.list()
    opened = open_bundle(tiny_bundle)
    assert opened.manifest is not None
    assert card.size_bytes == opened.manifest.size_bytes
    assert opened.config is not None
    width = sum(a.kv_width for a in opened.config.attentions)
    assert card.kv_bytes == 2 * 2 * width * card.context
    assert card.fit(free=card.need_bytes - 1) == "too_large"
    assert card.fit(free=card.need_bytes) == "tight"
    assert card.fit(free=2 * card.need_bytes) == "fits"
    assert card.bound_tps(card.weights_bytes * 7.0) == 7.0
    models.remove("../models")
    models.remove(name)
    assert models.list() == []


def _zip(
    folder: Path,
    target: Path,
    prefix: str = "",
    replaced: dict[str, bytes] | None = None,
    method: int = zipfile.ZIP_STORED,
) -> Path:
    with zipfile.ZipFile(target, "w", method) as archive:
        for path in folder.iterdir():
            data = (replaced or {}).get(path.name, path.read_bytes())
            archive.writestr(prefix + path.name, data)
    return target


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_zip_is_refused(method: int, tiny_bundle: Path, tmp_path: Path) -> None:
    models = Models(tmp_path / "models")
    path = _zip(tiny_bundle, tmp_path / "a.zip", method=method)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        starts = [entry.header_offset + 60 for entry in archive.infolist()]
    for start in starts:
        path.write_bytes(whole[:start] + b"\xff" * 40 + whole[start + 40 :])
        with pytest.raises(BundleError) as error:
            list(models.import_bundle(path))
        assert "None" not in str(error.value)
    assert list(models.folder.iterdir()) == []


def test_hostile_bundles_are_refused_and_leave_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    models = Models(tmp_path / "models")
    manifest = json.loads((tiny_bundle / "pocketslm.json").read_text())
    escaping = json.dumps(manifest | {"files": {"../../evil": {"sha256": "0", "bytes": 1}}})
    altered = bytearray((tiny_bundle / "model.slm").read_bytes())
    altered[-1] ^= 1
    bad = tmp_path / "bad.zip"
    bad.write_bytes(b"PK\x03\x04 nothing")
    empty = tmp_path / "empty.zip"
    zipfile.ZipFile(empty, "w").close()

    def changed(target: str, name: str, data: bytes) -> Path:
        return _zip(tiny_bundle, tmp_path / target, replaced={name: data})

    faults = {
        bad: "not a zip",
        empty: "no single bundle",
        changed("a.zip", "pocketslm.json", escaping.encode()): "outside",
        changed("b.zip", "tokenizer.json", b"{}"): "of another size",
        changed("c.zip", "model.slm", bytes(altered)): "does not match its SHA-256",
        tmp_path / "nowhere.zip": "cannot be imported",
    }
    for path, message in faults.items():
        with pytest.raises(BundleError, match=message):
            list(models.import_bundle(path))
    assert list(models.folder.iterdir()) == []
    assert not (tmp_path / "evil").exists()


def test_memory_is_that_of_the_kernel(tiny_bundle: Path) -> None:
    import psutil

    ours = meter.resident_bytes()
    assert abs(ours - psutil.Process().memory_info().rss) < 0.2 * ours
    assert meter.resident_bytes(2**22 + 1) == 0
    assert meter.free_bytes() > 0
    assert describe(open_bundle(tiny_bundle)).weights_bytes > 0


def test_the_meter_changes_no_token(tiny_bundle: Path) -> None:
    model = Model.load(tiny_bundle, threads=1)
    metered = meter.Metered(model)
    config = GenerationConfig(max_new_tokens=9, ignore_eos=True)
    expected = [record.token for record in model.generate("the inner", config)]
    assert [record.token for record in metered.generate("the inner", config)] == expected
    assert metered.tokens == 9
    assert metered.tps > 0
    assert (metered.logprobs([1, 2], [3]) == model.logprobs([1, 2], [3])).all()


# Actions


def test_every_call_of_a_random_model_is_valid(tmp_path: Path) -> None:
    """A model that knows nothing writes only valid calls: the schema does it."""
    config = replace(support.TINY, max_position_embeddings=2048)
    export_bundle(open_checkpoint(support.write_hf(tmp_path / "hf", config)), tmp_path / "bundle")
    model = Model.load(tmp_path / "bundle", threads=1)
    rng = random.Random(SEED)
    alphabet = 'abc "\\{}\n9:,' + "é"
    for _ in range(REQUESTS):
        action = propose(model, "x" + "".join(rng.choices(alphabet, k=rng.randint(0, 8))))
        assert action.valid(), action
        assert Action(action.name, json.loads(json.dumps(action.arguments))).valid()


@pytest.mark.real
def test_the_real_model_chooses_the_function(smollm2_bundle: Path) -> None:
    model = Model.load(smollm2_bundle, threads=2, verify=False)
    expected = {
        "Remind me tomorrow at 7 to feed the cat": "set_reminder",
        "Share with Eva that dinner is ready": "share_text",
    }
    for request, name in expected.items():
        action = propose(model, request)
        assert action.valid()
        assert action.name == name
    assert propose(model, "Remind me at 18:45 to call Tom").arguments["hour"] == 18


def test_actions_that_break_their_schema_are_seen() -> None:
    good = {"title": "read", "day": "today", "hour": 9, "minute": 0}
    assert Action("set_reminder", good).valid()
    bad = [
        {"hour": 24},
        {"hour": True},
        {"minute": "0"},
        {"day": "never"},
        {"title": ""},
        {"title": "x" * 81},
        {"extra": 1},
    ]
    for change in bad:
        assert not Action("set_reminder", good | change).valid(), change
    assert not Action("fly", {}).valid()
    assert not Action("share_text", {}).valid()
    assert set(SCHEMAS) == {"set_reminder", "share_text"}


def test_faults_of_a_proposal(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="nothing to do"):
        propose(Model.load(tiny_bundle, threads=1), " \n")
    with pytest.raises(ContextOverflowError, match="does not fit"):
        propose(Model.load(tiny_bundle, threads=1), "x")


# Reading


def test_no_piece_of_a_text_is_too_high_for_a_graphics_card() -> None:
    rows = "\n".join(f"2023-01-01,Payee {n},{n}.50,EUR" for n in range(1500))
    for text in (rows, "word " * 5000, "x" * 9000, "One.\n\nTwo.\n\n\nThree.", "", "\n\n"):
        cut = list(pieces(text))
        assert "".join("".join(text[a:b].split()) for a, b in cut) == "".join(text.split())
        assert all(
            text[a:b].count("\n") <= PIECE_LINES and b - a <= PIECE_CHARACTERS for a, b in cut
        )
        assert cut == sorted(cut)


def test_markdown_is_shown_and_nothing_else_is_markup() -> None:
    for text, shown in (
        ("## Notes ##", "[b]Notes[/b]"),
        ("# **All** of it", "[b]All of it[/b]"),
        ("- one\n  * two\n1. three", "\u2022 one\n  \u2022 two\n1. three"),
        ("It is **very** and *quite* __so__.", "It is [b]very[/b] and [i]quite[/i] [b]so[/b]."),
        ("2 * 3 * 4, a*b*c, ** alone **, snake_case_name", None),
        ("#hash, -5 degrees, `x = **y`", None),
        (
            "[b]no[/b] & [ref=mark]x[/ref]",
            "&bl;b&br;no&bl;/b&br; &amp; &bl;ref=mark&br;x&bl;/ref&br;",
        ),
    ):
        assert markup_of(text) == (text if shown is None else shown)
    long = "*" * 4000 + "**a" * 4000  # no time without end
    assert set(re.sub(r"\[/?[bi]\]", "", markup_of(long))) <= {"*", "a"}


def test_documents_are_sorted() -> None:
    entries = [
        Entry(3, "beta", "pdf", "2026-03-01", 2, 10, 1),
        Entry(2, "Alpha", "txt", "2026-02-01", None, 10, 1),
        Entry(1, "gamma", "pdf", "2026-01-01", 9, 10, 1),
    ]
    for by, ids in (("added", [3, 2, 1]), ("title", [2, 3, 1]), ("kind", [3, 1, 2])):
        assert [entry.id for entry in in_order(entries, by)] == ids


def test_what_is_shared_is_whole_and_says_where_it_stands() -> None:
    text = "The beginning of the Space Age was seen by all. " * 40
    with Library(":memory:") as library:
        document = library.add(
            make_source("Apollo", "pdf", [Block("Race", 1), Block(text, page=7)])
        )
        answer = Answer("ask", "When?", text, "eos", citations=(Citation(1, 6, 40, document.id),))
        sent = shared(answer, {document.id: document})
        assert sent.startswith("When?\n\nThe beginning")
        assert text.strip() in sent
        assert sent.endswith("Apollo, p. 7, Race")
        assert Action("share_text", {"text": sent}).valid()
        assert button_of(document, answer.citations[0], 1).startswith("1 · p. 7 · The beginning of")


def test_a_corrected_action_is_refused_by_field_and_never_replaced() -> None:
    right = {"title": "Read", "day": "today", "hour": 9, "minute": 0}
    assert Action("set_reminder", right).faults() == []
    for key, wrong in (("hour", 25), ("minute", 75), ("day", "Friday"), ("hour", "nine")):
        assert Action("set_reminder", right | {key: wrong}).faults() == [key]
