"""Through every screen of the app, as a person goes; and the pictures of it.

    python tests/android/walk.py BUNDLE docs/screenshots

makes the pictures again (under ``xvfb-run -s "-screen 0 1280x1024x24"`` where there is no screen).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from io import BytesIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from support_documents import pdf_file

PHONE, TABLET = (412, 860), (1200, 800)
QUESTION = "When was Apollo 8 launched?"
ENTER, ESCAPE = 13, 27


def main(work: Path, bundle: Path, shots: Path | None) -> None:
    """work: an empty folder; everything is written there."""
    os.environ |= {"KIVY_HOME": str(work / "kivy"), "KIVY_NO_ARGS": "1", "KIVY_NO_FILELOG": "1"}
    os.environ["LC_ALL"] = "C"  # the app begins in the system's language
    os.environ.setdefault("KIVY_LOG_MODE", "PYTHON")  # else it takes standard error for itself
    sockets: list[str] = []

    def watch(event: str, _: object) -> None:
        if event in ("socket.connect", "socket.bind", "socket.sendto"):
            sockets.append(event)

    sys.addaudithook(watch)
    from kivy.config import Config

    # Smooth edges are for the pictures: without a graphics card they are most of all the work.
    samples = 4 if shots else 0
    for name, value in (("width", PHONE[0]), ("height", PHONE[1]), ("multisamples", samples)):
        Config.set("graphics", name, str(value))
    from kivy.core.clipboard import Clipboard
    from kivy.core.window import Window
    from person import Person, Walk
    from pypdf import PdfReader, PdfWriter

    from pocketslm.android.app import PocketApp
    from pocketslm.runtime.assistant.assistant import sample_document
    from pocketslm.runtime.backends.native_library import load_library
    from pocketslm.runtime.backends.runner import program

    # Compiled before the walk, should they not be in the cache: that may take minutes.
    program()
    load_library()
    files = work / "files"
    files.mkdir()
    shutil.copy(sample_document(), files / "Apollo 8.txt")
    (files / "broken.pdf").write_bytes(b"%PDF-1.7 and nothing else")
    locked = PdfWriter(PdfReader(BytesIO(pdf_file(["Hidden words."]))))
    locked.encrypt("password", algorithm="RC4-128")
    locked.write(files / "locked.pdf")
    (files / "model").symlink_to(bundle, target_is_directory=True)
    os.chdir(files)
    app = PocketApp(work / "data")
    me = Person(app, shots)

    def documents() -> Walk:
        yield from me.wait(lambda: me.says("Nothing here yet"), "the empty library")
        yield from me.shot("library-empty")
        yield from me.tap("Add a document")
        yield from me.tap("broken.pdf")
        yield from me.wait(lambda: me.says("could not be opened"), "the refusal of a broken file")
        yield from me.tap("Add a document")
        yield from me.tap("locked.pdf")
        yield from me.wait(lambda: me.says("Password of locked.pdf"), "the question of a password")
        me.find("Password of locked.pdf").text = "password"
        yield from me.tap("Open")
        yield from me.wait(lambda: me.says("Ask a question"), "the document that was locked")
        yield from me.key(ESCAPE)
        yield from me.tap("Remove: locked")
        yield from me.tap("Remove")
        yield from me.settle()
        yield from me.tap("Add a document")
        yield from me.tap("Apollo 8.txt")
        yield from me.wait(lambda: me.says("Ask a question"), "the document")
        yield from me.tap("Summarise")
        yield from me.wait(lambda: me.says("No model yet"), "a sentence about the missing model")

    def models() -> Walk:
        yield from me.tap("Models")
        assert me.says("No model yet")
        yield from me.tap("Import a model")
        yield from me.tap("model")
        yield from me.tap("Choose this folder")
        yield from me.wait(lambda: app.ready(), "the import")
        yield from me.settle()
        (name,) = [card.name for card in app.models.list()]
        assert me.says("MB free: fits")
        assert me.says("at most")
        yield from me.tap(f"Measure speed: {name}")
        yield from me.wait(lambda: me.says("writes"), "the measurement")
        if me.shots:
            yield 4.6  # until the notice has gone
        yield from me.shot("models")

    def answers() -> Walk:
        yield from me.tap("Library")
        yield from me.tap("Open: Apollo 8")
        yield from me.tap("Summarise")
        yield from me.answered()
        assert me.says("tokens · ")
        yield from me.tap("Ask about this document")
        yield from me.type(QUESTION)
        yield from me.key(ENTER)
        yield from me.answered()
        assert "1968" in _last(app).text
        yield from me.shot("answer")
        citation = _last(app).citations[0]
        assert "1968" in app.screen("document").document.text[citation.start : citation.end]
        app.screen("document").ids.answers.scroll_y = 0
        yield from me.tap("Passage 1")
        yield from me.settle()
        assert app.screen("document").part == "document"
        marked = [p for p in app.screen("document").ids.reader._passages() if p.marks]
        assert marked
        yield from me.shot("citation")
        reader = app.screen("document").ids.reader
        yield from me.tap("Find in the document")
        yield from me.type("genesis")
        yield from me.key(ENTER)
        start, end = reader._mark
        assert app.screen("document").document.text[start:end] == "Genesis"
        assert [p for p in reader._passages() if p.marks]
        yield from me.shot("find")
        yield from me.tap("Rename")
        me.find("Rename").text = "The flight"
        yield from me.tap("Save")
        yield from me.wait(lambda: me.says("The flight"), "the new title")
        yield from me.tap("Rename")
        me.find("Rename").text = "Apollo 8"
        yield from me.tap("Save")
        yield from me.settle()
        yield from me.tap("Assistant")
        yield from me.tap("Questions")
        yield from me.answered()
        assert 1 <= len(_last(app).items) <= 3
        yield from me.shot("suggestions")
        yield from me.tap(_last(app).items[0])
        yield from me.answered()
        assert _last(app).task == "ask"

    def stopping() -> Walk:
        screen = app.screen("document")
        yield from me.tap("Summarise")
        card = screen.ids.history.children[0]
        before = me.frames
        while len(card.body) <= 20:  # its first words
            yield 0.02
        screen.stop()  # the model has little to say: a finger would be too late
        yield from me.wait(lambda: not screen.busy, "the stop")
        assert me.frames > before + 3, "the window stood still while the model worked"
        assert _last(app).finish in ("cancelled", "stop", "eos"), _last(app)
        assert app.settings["pending"] is None

    def actions() -> Walk:
        yield from me.tap("Ask about this document")
        yield from me.type("Remind me tomorrow at 9 to read the Apollo report")
        yield from me.tap("Action")
        yield from me.wait(lambda: me.says("Do this?"), "the proposal")
        yield from me.settle()
        yield from me.shot("action")
        assert app.phone.done == []
        # What a person corrects counts, and what cannot be keeps the sheet open.
        hour = me.find("Hour")
        hour.text = "25"
        yield from me.tap("Do it")
        yield from me.wait(lambda: me.says("Please correct: Hour"), "the refusal of hour 25")
        assert app.phone.done == []
        hour.text = "7"
        yield from me.tap("today")
        yield from me.tap("Do it")
        (action,) = app.phone.done
        assert action.valid()
        assert (action.arguments["day"], action.arguments["hour"]) == ("today", 7)
        yield from me.wait(lambda: me.says("On a phone this would"), "what would have happened")

    def languages() -> Walk:
        yield from me.tap("Settings")
        if me.shots:
            yield 4.6  # until the notice has gone
        yield from me.shot("settings")
        yield from me.tap("Dark")
        yield from me.tap("Deutsch")
        assert me.says("Einstellungen")
        yield from me.tap("Bibliothek")
        yield from me.shot("library-dark-german")
        yield from me.tap("Einstellungen")
        yield from me.tap("العربية")
        assert app.rtl
        yield from me.tap("المكتبة")
        yield from me.tap("فتح: Apollo 8")
        yield from me.settle()
        yield from me.shot("arabic-dark")
        yield from me.tap("الإعدادات")
        yield from me.tap("English")
        yield from me.tap("Light")

    def engines() -> Walk:
        yield from me.tap("Own process")
        yield from me.tap("1")  # thread
        yield from me.tap("Library")
        yield from me.tap("Open: Apollo 8")
        yield from _ask(me, QUESTION)
        assert "1968" in _last(app).text
        assert app.model().backend.startswith("runner")
        me.kill_engine()
        yield from _ask(me, QUESTION)
        assert me.says("it starts again with the next request")
        yield from _ask(me, QUESTION)
        assert "1968" in _last(app).text

    def turning() -> Walk:
        """Rotation, background and low memory lose nothing."""
        yield from me.tap("Ask about this document")
        yield from me.type("Who was")
        Window.size = TABLET
        yield from me.wait(lambda: app.wide, "the wide layout")
        yield 0.5  # until the window has been told
        app.screen("document").show(app.library.history(1)[-1].answer.citations[0])
        yield from me.settle()
        yield from me.shot("tablet")
        assert app.on_pause()
        app.low_memory()
        yield from me.wait(lambda: not app.loaded(), "the model's memory back")
        app.on_resume()
        assert me.find("Ask about this document").text == "Who was"
        # What a start finds where the app was ended in the middle of an answer.
        pending = {"document": 1, "task": "ask", "request": QUESTION, "text": "Apollo 8 was"}
        app.settings["pending"] = pending
        app._keep_interrupted()
        assert (_last(app).text, _last(app).finish) == ("Apollo 8 was", "interrupted")
        yield from me.type(" the commander?")
        yield from me.tap("Send")
        yield from me.answered()
        assert _last(app).request == "Who was the commander?"
        Window.size = PHONE
        yield from me.wait(lambda: not app.wide, "the narrow layout")

    def everything() -> Walk:
        """A long table is shown in pieces; a question on the library's screen asks all documents;
        what is shared is whole; a document may go while it is read."""
        yield 0.5  # until the narrow layout has its place
        for at in range(2):
            yield from me.tap("Library")
            yield from me.wait(lambda: me.says("Your documents"), "the library")
            (files / f"expenses {at}.log").write_text(
                "\n".join(f"2024-01-01 entry {at} {n} costs {n * 7} euros" for n in range(1500))
            )
            yield from me.tap("Add a document")
            yield from me.tap(f"expenses {at}.log")
            yield from me.wait(lambda at=at: me.says(f"expenses {at}"), "the table")
        yield from me.tap("Document")
        passages = app.screen("document").ids.reader._passages()
        assert passages
        assert max(passage.texture_size[1] for passage in passages) < 4096
        yield from me.shot("table")
        yield from me.tap("Library")
        listed = app.screen("library").ids.documents
        order = [card.title for card in listed.children[::-1]]
        assert order == ["expenses 1", "expenses 0", "Apollo 8"]
        yield from me.tap("Sort by")
        yield from me.tap("Title")
        yield from me.wait(lambda: not me.says("Kind of file"), "the end of the sheet")
        assert [card.title for card in listed.children[::-1]] == sorted(order)
        yield from me.tap("Settings")
        yield from me.tap("Large")
        assert app.settings["text_size"] == "large"
        yield from me.tap("Library")
        yield from me.shot("library-large")
        app.settings["text_size"] = "normal"
        yield from me.tap("Search titles, or ask all documents")
        yield from me.type(QUESTION)
        yield from me.key(ENTER)
        library = app.screen("library")
        yield from me.wait(lambda: library._answer and not library._answer.live, "the answer")
        answer = app.library.history(None)[-1].answer
        assert "1968" in answer.text
        yield from me.shot("library-answer")
        yield from me.tap(f"Copy: {QUESTION}")
        assert answer.text in Clipboard.paste()
        yield from me.tap(f"Share: {QUESTION}")
        yield from me.wait(lambda: me.says("Do this?"), "the sheet")
        yield from me.settle()
        yield from me.tap("Do it")
        text = app.phone.done[-1].arguments["text"]
        assert answer.text in text
        assert "Apollo 8" in text.rsplit("\n", 1)[-1]
        yield from me.wait(lambda: not me.says("Do this?"), "the end of the sheet")
        yield from me.tap("Passage 1")
        yield from me.wait(lambda: me.says("Assistant"), "the document")
        assert app.screen("document").title == "Apollo 8"
        # Remove a document while it is being read.
        yield from me.tap("Library")
        yield from me.tap("Open: expenses 1")
        yield from me.tap("Assistant")
        app.screen("document").ask("What does entry 1 700 cost?")
        yield from me.tap("Library")
        for at in (1, 0):
            yield from me.tap(f"Remove: expenses {at}")
            yield from me.tap("Remove")
            yield from me.settle()
        yield from me.wait(lambda: app._workers["engine"].current is None, "the end of the work")
        assert [entry.title for entry in app.library.entries()] == ["Apollo 8"]
        yield from me.tap("Open: Apollo 8")

    def removing() -> Walk:
        yield from me.key(ESCAPE)
        assert app.place == "library"
        yield from me.tap("Remove: Apollo 8")
        yield from me.tap("Cancel")
        yield from me.settle()
        assert len(app.library.entries()) == 1
        yield from me.tap("Remove: Apollo 8")
        yield from me.tap("Remove")
        yield from me.settle()
        assert me.says("Nothing here yet")

    def walk() -> Walk:
        for part in (documents, models, answers, stopping, actions):
            yield from part()
            print(part.__name__, flush=True)
        for part in (languages, engines, turning, everything, removing):
            yield from part()
            print(part.__name__, flush=True)

    me.run(walk())
    assert sockets == [], "the app used the network"


def _ask(me, question):  # type: ignore[no-untyped-def]
    yield from me.tap("Ask about this document")
    yield from me.type(question)
    yield from me.tap("Send")
    yield from me.answered()


def _last(app):  # type: ignore[no-untyped-def]
    """The newest answer of the history, as it is kept."""
    return app.library.history(app.settings["document"])[-1].answer


if __name__ == "__main__":
    # Back here at the end, from a folder that is removed: lines are counted from here.
    with contextlib.chdir("."), tempfile.TemporaryDirectory() as folder:
        bundle, *rest = (Path(argument).resolve() for argument in sys.argv[1:])
        main(Path(folder), bundle, rest[0] if rest else None)
