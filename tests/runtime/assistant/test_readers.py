"""Readers: what a format says is read, what is damaged or hostile is refused in one sentence."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path

import pytest
from pypdf import PdfReader, PdfWriter

from pocketslm.errors import DocumentError
from pocketslm.runtime.assistant import readers
from pocketslm.runtime.assistant.document import CHUNK_CHARACTERS, Block, make_source
from pocketslm.runtime.assistant.readers import archive, pdf
from pocketslm.runtime.assistant.words import sentences
from support_documents import DOCX_XML, docx, epub, pdf_file, zipped

LAUGHS = (
    '<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "ha">'
    + "".join(
        f'<!ENTITY {b} "&{a};&{a};&{a};&{a};">' for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    + "]><w:document>&i;</w:document>"
)


def test_plain_text_has_paragraphs_pages_and_unwrapped_lines() -> None:
    wrapped = (
        "A line that an editor wrapped because it was too long\nfor its window.\n\nNext.\fTwo."
    )
    source = readers.read_bytes(wrapped.encode(), "notes.txt")
    assert source.text == (
        "A line that an editor wrapped because it was too long for its window.\n\nNext.\n\nTwo."
    )
    assert source.pages == 2
    assert (source.title, source.kind) == ("notes", "txt")
    poem = readers.read_bytes("Short\nlines\nstay.\n- a\n- b".encode("utf-16"), "poem.txt")
    assert poem.text == "Short\nlines\nstay.\n- a\n- b"
    assert readers.read_bytes("Grüße".encode("cp1252"), "old.txt").text == "Grüße"


def test_markdown_has_headings_and_no_marks() -> None:
    text = (
        '# A *Title*\n\nSome **bold**, `code` and a [link](http://x.y "t").\n\nUnder\n-----\n'
        "Two\n\n### Deep ###\n\n```py\n# not a heading\nx = 1\n```\nsnake_case_name * 2 * 3\n"
    )
    source = readers.read_bytes(text.encode(), "a.md")
    assert source.text == (
        "A Title\n\nSome bold, code and a link.\n\nUnder\n\nTwo\n\nDeep\n\n"
        "# not a heading\nx = 1\n\nsnake_case_name * 2 * 3"
    )
    assert [c.heading for c in source.chunks] == [
        "A Title",
        "A Title › Under",
        "A Title › Under › Deep",
    ]


def test_html_is_its_visible_text() -> None:
    page = (
        "<html><head><title>T</title><style>p{}</style></head><body><h1>One</h1><p>Fish &amp; "
        "chips<br>cheap<script>alert('x')</script><ul><li>a<li>b</ul><table><tr><td>1<td>2</table>"
        "<h2>Two</h2>unclosed <b>text"
    )
    source = readers.read_bytes(page.encode(), "a.html")
    assert (
        source.text == "One\n\nFish & chips\ncheap\n\n- a\n\n- b\n\n1 | 2\n\nTwo\n\nunclosed text"
    )
    latin = '<meta charset="iso-8859-1"><p>Grüße'.encode("latin-1")
    assert readers.read_bytes(latin, "b.htm").text == "Grüße"


def test_docx_has_headings_tables_and_pages() -> None:
    source = readers.read_bytes(docx(), "a.docx")
    assert source.text == "Report\n\nFirst\tpart.\n\na | b\n\nSecond page."
    assert [(c.page, c.heading) for c in source.chunks] == [(1, "Report")]
    assert source.pages == 2
    one_page = docx(DOCX_XML.replace("<w:lastRenderedPageBreak/>", ""))
    assert readers.read_bytes(one_page, "a.docx").pages is None


def test_epub_is_read_in_the_order_of_its_spine() -> None:
    source = readers.read_bytes(epub(), "book.epub")
    assert source.text == "One\n\nIt begins.\n\nTwo\n\nIt ends."
    assert [c.heading for c in source.chunks] == ["One", "Two"]


def test_pdf_has_pages() -> None:
    source = readers.read_bytes(pdf_file(["The first page.", "The second page."]), "a.pdf")
    assert source.text == "The first page.\n\nThe second page."
    assert source.pages == 2
    assert source.chunks[0].page == 1
    # A PDF is one under any name.
    assert readers.read_bytes(pdf_file(["Hello."]), "download").kind == "pdf"


def _locked() -> bytes:
    writer = PdfWriter(PdfReader(io.BytesIO(pdf_file(["secret"]))))
    writer.encrypt("password", algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def _bomb() -> bytes:
    """A stream that inflates to 256 MiB of spaces."""
    data = zlib.compress(zlib.compress(b" " * (256 << 20), 9), 9)
    return pdf_file([data], filters="[/FlateDecode /FlateDecode]")


def _zip_bomb() -> bytes:
    out = io.BytesIO()
    with (
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file,
        file.open("word/document.xml", "w") as member,
    ):
        for _ in range(archive.MAX_UNPACKED_BYTES >> 20):
            member.write(b" " * (1 << 20))
        member.write(b" ")
    return out.getvalue()


HOSTILE = {
    "empty text": (lambda: b" \n", "a.txt", "holds no text"),
    "binary text": (lambda: b"\0\1\2" * 9, "a.txt", "is not text"),
    "picture": (lambda: b"\x89PNG\r\n\x1a\n\0\0", "a.png", "is of an unknown kind"),
    "cut pdf": (lambda: pdf_file(["Hello"] * 3)[:200], "a.pdf", "damaged PDF"),
    "no pdf": (lambda: b"%PDF-1.7\n" + b"garbage " * 99, "a.pdf", "damaged PDF"),
    "scanned pdf": (lambda: pdf_file([""]), "a.pdf", "is it scanned?"),
    "locked pdf": (_locked, "a.pdf", "locked by a password"),
    "pdf bomb": (_bomb, "a.pdf", "a.pdf"),
    "cut docx": (lambda: docx()[:-40], "a.docx", "not a whole zip archive"),
    "docx that is no zip": (lambda: b"PK nothing", "a.docx", "not a whole zip archive"),
    "docx without text": (lambda: zipped({"x": "y"}), "a.docx", "lacks word/document.xml"),
    "zip bomb": (_zip_bomb, "a.docx", "unpacks to more than"),
    "billion laughs": (lambda: docx(LAUGHS), "a.docx", "declares XML entities"),
    "deep xml": (lambda: docx("<a>" * 99999), "a.docx", "nests XML deeper"),
    "broken xml": (lambda: docx("<a><b></a>"), "a.docx", "damaged XML"),
    "many members": (
        lambda: zipped({str(n): "" for n in range(archive.MAX_MEMBERS + 1)}),
        "a.epub",
        "holds more than",
    ),
    "epub without a package": (
        lambda: zipped({"META-INF/container.xml": "<a/>"}),
        "a.epub",
        "names",
    ),
    "epub that leaves": (lambda: epub(chapter="../../../etc/passwd"), "a.epub", "lacks"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_is_refused_in_a_sentence(name: str) -> None:
    make, file, message = HOSTILE[name]
    with pytest.raises(DocumentError, match=message.replace("?", r"\?")) as refused:
        readers.read_bytes(make(), file)
    assert "\n" not in str(refused.value)
    assert file in str(refused.value)


def test_limits_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("some text")
    monkeypatch.setattr(readers, "MAX_TEXT_CHARACTERS", 8)
    with pytest.raises(DocumentError, match="holds more than"):
        readers.read_file(file)
    monkeypatch.setattr(readers, "MAX_FILE_BYTES", 8)
    with pytest.raises(DocumentError, match="is larger than"):
        readers.read_file(file)
    monkeypatch.setattr(pdf, "MAX_PAGES", 1)
    with pytest.raises(DocumentError, match="has 2 pages"):
        readers.read_bytes(pdf_file(["a", "b"]), "a.pdf")
    with pytest.raises(DocumentError, match="No such file"):
        readers.read_file(tmp_path / "nowhere.txt")


def test_a_chunk_is_its_place_in_the_text(lee_text: Path) -> None:
    """Chunks lie in order, hold every sentence whole, and stay within their size."""
    lines = lee_text.read_text("utf-8").splitlines()
    source = make_source("lee", "txt", map(Block, lines))
    at = 0
    for index, chunk in enumerate(source.chunks):
        assert chunk.index == index
        assert source.text[at : chunk.start].strip() == ""
        assert 0 < chunk.end - chunk.start <= CHUNK_CHARACTERS
        at = chunk.end
    assert at == len(source.text)
    inside = [
        span for chunk in source.chunks for span in sentences(source.text, chunk.start, chunk.end)
    ]
    whole = sentences(source.text)
    assert len(set(whole) & set(inside)) > 0.99 * len(whole)  # the rest is longer than a chunk
    long = make_source("long", "txt", [Block("word " * 1000), Block("x" * 5000)])
    assert all(c.end - c.start <= CHUNK_CHARACTERS for c in long.chunks)


def test_sentences_end_where_they_end() -> None:
    text = (
        'Mr. Smith of the U.S. Navy paid $1.5 million. "Why?" he asked. No. 5 is alive! And so on'
    )
    assert [text[a:b] for a, b in sentences(text)] == [
        "Mr. Smith of the U.S. Navy paid $1.5 million.",
        '"Why?" he asked.',
        "No. 5 is alive!",
        "And so on",
    ]
