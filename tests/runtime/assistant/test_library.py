"""The library: what is kept is there again, whatever happens to the process."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pocketslm.errors import DocumentError
from pocketslm.runtime.assistant.answer import Answer, Citation
from pocketslm.runtime.assistant.document import Block, make_source
from pocketslm.runtime.assistant.library import Library
from pocketslm.runtime.assistant.readers import read_bytes

SOURCE = make_source("Trip", "md", [Block("Rome", 1), Block("We saw the Colosseum.", page=2)])
ANSWER = Answer("ask", "What?", "It.", "eos", citations=(Citation(0, 6, 27),), seconds=1.5)


def test_what_is_kept_is_there_again(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "library.db"
    with Library(file) as library:
        document = library.add(SOURCE)
        assert library.add(SOURCE).id == document.id  # the same text is kept once
        library.remember(document.id, ANSWER)
        library.rename(document.id, "Holiday")
    with Library(file) as library:
        (entry,) = library.entries()
        assert (entry.title, entry.kind, entry.pages, entry.chunks) == ("Holiday", "md", 2, 1)
        again = library.open(entry.id)
        assert (again.text, again.chunks) == (SOURCE.text, SOURCE.chunks)
        (asked,) = library.history(entry.id)
        assert asked.answer == ANSWER
        library.forget(entry.id, asked.id + 1)
        assert len(library.history(entry.id)) == 1
        library.forget(entry.id)
        assert library.history(entry.id) == []
        library.remember(entry.id, ANSWER)
        library.remove(entry.id)
        assert library.entries() == []
        with pytest.raises(DocumentError, match="no document 1"):
            library.open(1)
        with pytest.raises(DocumentError, match="no document 1"):
            library.remove(1)
        with pytest.raises(DocumentError, match="no document called 'Holiday'"):
            library.find("Holiday")
    rows = sqlite3.connect(file)
    for table in ("chunks", "postings", "history"):
        assert rows.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
    rows.close()


def test_a_library_of_version_1_is_renewed(tmp_path: Path) -> None:
    """Its documents get a language and an index in its stems; nothing that was asked is lost."""
    file = tmp_path / "library.db"
    with Library(file) as library:
        text = "Die Wohnungen sind an die Vermieterin zu zahlen, und das am ersten Tag des Monats."
        number = library.add(make_source("Miete", "txt", [Block(text)])).id
        library.remember(number, ANSWER)
    old = sqlite3.connect(file)
    old.executescript(
        "ALTER TABLE documents DROP COLUMN language; DROP TABLE meanings; DROP TABLE settings;"
        "UPDATE postings SET term = 'old' || term; PRAGMA user_version = 1"
    )
    old.close()
    with Library(file) as library:
        document = library.find("Miete")
        assert document.language == "de"
        assert library.postings([number], ["wohnung"])
        assert not library.postings([number], ["oldwohnung"])
        assert library.words([number]) == 6
        assert library.history(number)[0].answer == ANSWER
        library.remember(None, ANSWER)  # of all documents together
        assert library.history(None)[0].answer == ANSWER


def test_a_library_with_other_stems_is_indexed_anew(tmp_path: Path) -> None:
    file = tmp_path / "library.db"
    with Library(file) as library:
        number = library.add(make_source("log", "txt", [Block("The log was written by Ann.")])).id
        library.remember(number, ANSWER)
        library.keep_meanings(number, [(0, b"1234")])
    old = sqlite3.connect(file)
    old.executescript(
        "UPDATE postings SET term = 'written' WHERE term = 'write'; PRAGMA user_version = 2"
    )
    old.close()
    with Library(file) as library:
        assert library.postings([number], ["write"])
        assert not library.postings([number], ["written"])
        assert library.history(number)[0].answer == ANSWER
        assert library.meanings(number) == [(0, b"1234")]


def test_an_answer_for_a_document_that_is_gone_is_dropped(tmp_path: Path) -> None:
    with Library(tmp_path / "library.db") as library:
        number = library.add(SOURCE).id
        library.remove(number)
        library.remember(number, ANSWER)
        assert not library.keep_meanings(number, [(0, b"")])
        assert library.history(number) == []


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database" * 100)
    other = sqlite3.connect(tmp_path / "other")
    other.execute("CREATE TABLE t (x)")
    other.close()
    newer = sqlite3.connect(tmp_path / "newer")
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    cases = {"text": "not a database", "other": "no library of pocketslm", "newer": "version 99"}
    for name, message in cases.items():
        with pytest.raises(DocumentError, match=message):
            Library(tmp_path / name)
    with pytest.raises(DocumentError, match="cannot be used"):
        Library(tmp_path / "text" / "inside")


WRITER = """
import sys
from pocketslm.runtime.assistant.answer import Answer
from pocketslm.runtime.assistant.document import Block, make_source
from pocketslm.runtime.assistant.library import Library
from pocketslm.runtime.assistant.readers import read_bytes

library, number = Library(sys.argv[1]), int(sys.argv[2])
while True:
    number += 1
    text = " ".join(f"word{number}x{n} Name{n}." for n in range(2000))
    document = library.add(make_source(str(number), "txt", [Block(text)]))
    library.remember(document.id, Answer("ask", "?", text, "eos"))
    print(document.id, flush=True)
    if number % 3 == 0:
        library.remove(document.id)
"""


def test_kill_at_any_moment_leaves_the_library_whole(tmp_path: Path) -> None:
    """Writers are killed at many moments; each document is there with all its parts, or not."""
    file, finished = tmp_path / "library.db", set()
    for turn in range(12):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(file), str(1000 * turn)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None
        finished.add(int(writer.stdout.readline()))  # it works
        time.sleep(0.017 * turn)
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
        with Library(file) as library:
            for entry in library.entries():
                document = library.open(entry.id)
                assert document.chunks[-1].end == len(document.text)
                first = document.text.split()[0].rstrip(".")
                assert library.postings([entry.id], [first])
                assert library.words([entry.id]) == 4000
                assert len(library.history(entry.id)) <= 1
            check = library._database.execute("PRAGMA integrity_check").fetchone()
            assert check == ("ok",)
    with Library(file) as library:
        kept = {entry.id for entry in library.entries()}
    # What a writer had reported was kept, but for every third, which it removed.
    assert len(kept & finished) >= len(finished) // 2


def test_two_threads_may_write(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with Library(tmp_path / "library.db") as library, ThreadPoolExecutor(4) as pool:
        sources = [make_source(str(n), "txt", [Block(f"text number {n}")]) for n in range(40)]
        ids = {document.id for document in pool.map(library.add, sources)}
        assert len(ids) == len(library.entries()) == 40


def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path: Path) -> None:
    with Library(tmp_path / "library") as library:
        kept = library.add(read_bytes(b"Kept.", "kept.txt"))
        (pages,) = library._database.execute("PRAGMA page_count").fetchone()
        library._database.execute(f"PRAGMA max_page_count = {pages + 2}")
        long = " ".join(f"word{number}" for number in range(20_000))
        with pytest.raises(DocumentError, match="library cannot be written: database or disk is"):
            library.add(read_bytes(long.encode(), "long.txt"))
        assert [entry.id for entry in library.entries()] == [kept.id]
        library.rename(kept.id, "still writable")
