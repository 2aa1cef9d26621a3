"""Readers: what a format says is read, what is damaged or hostile is refused in one sentence."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
from pypdf import PdfReader, PdfWriter

from pocketslm.cli import main
from pocketslm.errors import DocumentError, LockedError
from pocketslm.runtime.assistant import readers
from pocketslm.runtime.assistant.document import CHUNK_CHARACTERS, Block, make_source
from pocketslm.runtime.assistant.library import Library
from pocketslm.runtime.assistant.readers import archive, limits, pdf
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
    "picture": (lambda: b"\x89PNG\r\n\x1a\n\0\0", "a.png", "is a picture"),
    "sound": (lambda: b"RIFF\0\0\0\0WAVE", "a.wav", "is of an unknown kind"),
    "cut pdf": (lambda: pdf_file(["Hello"] * 3)[:200], "a.pdf", "damaged PDF"),
    "no pdf": (lambda: b"%PDF-1.7\n" + b"garbage " * 99, "a.pdf", "damaged PDF"),
    "scanned pdf": (lambda: pdf_file([""]), "a.pdf", "holds no text; "),
    "locked pdf": (_locked, "a.pdf", "needs a password"),
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


W = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"


def _word(body: str) -> bytes:
    return docx(f'<w:document xmlns:w="{W}"><w:body>{body}</w:body></w:document>')


def _member(method: int) -> bytes:
    """A document whose packed content is damaged."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        file.writestr("word/document.xml", DOCX_XML)
    data = bytearray(out.getvalue())
    data[60:80] = b"\xff" * 20
    return bytes(data)


DAMAGED = {
    "unknown encoding": (docx('<?xml version="1.0" encoding="foo"?><a/>'), "unknown encoding"),
    "utf-7": (docx('<?xml version="1.0" encoding="utf-7"?><a/>'), "unknown encoding"),
    "idna": (docx('<?xml version="1.0" encoding="idna"?><a/>'), "unknown encoding"),
    "damaged lzma": (_member(zipfile.ZIP_LZMA), "damaged word/document.xml"),
    "damaged bz2": (_member(zipfile.ZIP_BZIP2), "damaged word/document.xml"),
    "default attribute": (docx('<!DOCTYPE a [<!ATTLIST a b CDATA "x">]><a/>'), "declares XML"),
    "long namespace": (docx(f'<a xmlns="{"x" * 2000}"/>'), "namespace of more than"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_archives_are_refused(name: str) -> None:
    data, message = DAMAGED[name]
    with pytest.raises(DocumentError, match=message):
        readers.read_bytes(data, "a.docx")


def test_a_text_box_is_read_once() -> None:
    box = "<w:txbxContent><w:p><w:r><w:t>Boxed.</w:t></w:r></w:p></w:txbxContent>"
    compatible = "http://schemas.openxmlformats.org/markup-compatibility/2006"
    drawing = (
        f'<m:AlternateContent xmlns:m="{compatible}"><m:Choice>{box}</m:Choice>'
        f"<m:Fallback>{box}</m:Fallback></m:AlternateContent>"
    )
    source = readers.read_bytes(
        _word(f"<w:p><w:r><w:t>Before </w:t>{drawing}<w:t>after.</w:t></w:r></w:p>"), "a.docx"
    )
    assert source.text == "Boxed.\n\nBefore after."


def test_a_strict_document_is_read() -> None:
    strict = DOCX_XML.replace(W, "http://purl.oclc.org/ooxml/wordprocessingml/main")
    assert readers.read_bytes(docx(strict), "a.docx") == readers.read_bytes(docx(), "a.docx")


@pytest.mark.parametrize(
    "top", ["---\ntitle: Turbine\n\nauthor: X\n---\n", '+++\ntitle = "Turbine"\n+++\n']
)
def test_front_matter_is_no_text(top: str) -> None:
    assert readers.read_bytes(f"{top}\n# Results\n\nFailed.".encode(), "a.md").text == (
        "Results\n\nFailed."
    )


def test_a_rule_at_the_top_is_no_front_matter() -> None:
    text = b"---\nNot a field here.\n\n---\nMore."
    assert "Not a field here." in readers.read_bytes(text, "a.md").text
    assert "b: c" in readers.read_bytes(b"---\nb: c\nnever closed", "a.md").text


def test_marks_without_a_partner_stay() -> None:
    text = (
        b"**bold** and __strong__, *it*, a * b, snake_case_, 2*3*4, `a*b*` [![x](y)](z) **open\n\n"
        b"# C#\n\n# Closed #\n\n[w](u_(v)) <!-- gone --> <!-- open"
    )
    assert readers.read_bytes(text, "a.md").text == (
        "bold and strong, it, a * b, snake_case_, 2*3*4, a*b* x **open\n\nC#\n\nClosed\n\n"
        "w  <!-- open"
    )


UNCLOSED = {
    "head": ("<html><head><title>T</title><body><p>Text.", "Text."),
    "nav": ("<nav><a>Home</a><p>Text.", "Home\n\nText."),
    "closed nav": ("<nav><a>Home</a></nav><p>Text.", "Text."),
    "select": ("<select><option>a<p>Text.", "a\n\nText."),
    "comment": ("<p>a<!-- b<p>Text.", "a b\n\nText."),
    "declaration": ("<![x><p>Text.", "Text."),
    "end": ("<p>Text.<![x", "Text.<![x"),
    "quote": ('<a href="x>Link</a><p>Text.', "Link\n\nText."),
    "quoted end": ('<a title="a > b">Link</a>', "Link"),
    "less": ("<p>a < b <3 </ p>", "a < b <3"),
    "script": ("<script>if (a</b) x</script><p>Text.", "Text."),
    "number": (f"<p>&#{'9' * 5000}; &#x{'f' * 50};&#55296;.", "\ufffd \ufffd\ufffd."),
}


@pytest.mark.parametrize("name", UNCLOSED)
def test_a_broken_tag_costs_no_text(name: str) -> None:
    page, text = UNCLOSED[name]
    assert readers.read_bytes(page.encode(), "a.html").text == text


@pytest.mark.parametrize(
    "charset",
    [
        *("undefined", "punycode", "idna", "utf-7", "utf-16", "hex", "bz2_codec"),
        *("unicode_escape", "raw_unicode_escape", "mbcs", "cp0", "x"),
    ],
)
def test_a_page_may_declare_any_charset(charset: str) -> None:
    page = f'<meta charset="{charset}"><p>Grüße \\ud800'.encode()
    assert readers.read_bytes(page, "a.html").text == "Grüße \\ud800"


@pytest.mark.parametrize(
    ("charset", "text"),
    [
        ("iso-8859-1", "“quoted” – 5 €"),
        ("us-ascii", "naïve “text”"),
        ("gb2312", "镕基 喆 ￥"),
        ("shift_jis", "①～㈱"),
        ("ks_c_5601-1987", "뷁 한국"),
        ("euc-kr", "똠방각하"),
        ("tis-620", "ภาษาไทย"),
        ("Big5", "香港 囍"),
        ("windows-1251", "Привет"),
    ],
)
def test_a_charset_is_read_as_browsers_do(charset: str, text: str) -> None:
    wider = {"iso-8859-1": "cp1252", "us-ascii": "cp1252", "gb2312": "gbk", "shift_jis": "cp932"}
    wider |= {"ks_c_5601-1987": "cp949", "euc-kr": "cp949", "tis-620": "cp874"}
    data = text.encode(wider.get(charset, charset.lower()))
    page = b"<meta charset=%s><p>%s" % (charset.encode(), data)
    assert readers.read_bytes(page, "a.html").text == text
    mail = b"Subject: S\nContent-Type: text/plain; charset=%s\n\n%s" % (charset.encode(), data)
    assert readers.read_bytes(mail, "a.eml").text == f"S\n\n{text}"
    chapter = b'<?xml version="1.0" encoding="%s"?><p>%s</p>' % (charset.encode(), data)
    assert readers.read_bytes(chapter, "a.xhtml").text == text


def test_bytes_that_a_charset_lacks_do_not_change_it() -> None:
    page = b"<meta charset=gbk><p>" + "中文".encode("gbk") + b"\xff\xff" + "字".encode("gbk")
    text = readers.read_bytes(page, "a.html").text
    assert text.startswith("中文")
    assert text.endswith("字")


def test_a_power_is_no_number_of_more_digits() -> None:
    page = b"<p>10<sup>6</sup> of 10<sup>-3</sup> m<sup>2</sup>, the 1<sup>st</sup>, 1990<sup>[3]"
    assert readers.read_bytes(page, "a.html").text == "10^6 of 10^-3 m2, the 1st, 1990[3]"


def test_a_name_that_is_no_utf8_is_readable(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"caf\xe9.txt")
    file.write_text("Text.")
    with Library(":memory:") as library:
        assert library.add(file).title == "caf\ufffd"
        assert library.entries()[0].title == "caf\ufffd"


@pytest.mark.parametrize("algorithm", ["AES-128", "AES-256", "RC4-128"])
def test_a_pdf_that_anyone_may_open_is_opened(algorithm: str) -> None:
    writer = PdfWriter(PdfReader(io.BytesIO(pdf_file(["Open to all."]))))
    writer.encrypt("", "owner", algorithm=algorithm)
    out = io.BytesIO()
    writer.write(out)
    assert readers.read_bytes(out.getvalue(), "a.pdf").text == "Open to all."


def test_a_locked_pdf_is_opened_with_its_password() -> None:
    assert readers.read_bytes(_locked(), "a.pdf", "password").text == "secret"
    with pytest.raises(LockedError, match="needs another password"):
        readers.read_bytes(_locked(), "a.pdf", "passwort")


def test_the_password_of_a_pdf_is_asked_for_or_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    locked, key = tmp_path / "a.pdf", tmp_path / "key"
    locked.write_bytes(_locked())
    key.write_text("password\n")

    def add(*more: str) -> int:
        where = ["--library", str(tmp_path / f"{len(list(tmp_path.iterdir()))}.db")]
        return main(["doc", "add", str(locked), *where, *more])

    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert add() == 2
    assert "needs a password; name a file" in capsys.readouterr().err
    assert add("--password-file", str(key)) == 0
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.setattr("pocketslm.runtime.assistant.cli.getpass", lambda prompt: "password")
    assert add() == 0
    assert capsys.readouterr().err.count("1: a, 6 characters") == 2


def test_too_many_tags_are_refused_at_the_first_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_ELEMENTS", 100)
    seen: list[str] = []
    with pytest.raises(DocumentError, match="more than 100 tags"):
        archive.parse_xml(
            b"<a>" + b"<b/>" * 10**5 + b"</a>",
            lambda tag, _: seen.append(tag),
        )
    assert len(seen) == 100
    with pytest.raises(DocumentError, match="more than 100 tags"):
        readers.read_bytes(b"<b>x" * 10**5, "a.html")
    monkeypatch.setattr(limits, "MAX_BLOCKS", 10)
    for name, data in (
        ("a.docx", _word("<w:p><w:r><w:t>x</w:t></w:r></w:p>" * 20)),
        ("a.txt", b"x\n\n" * 20),
        ("a.md", b"# x\n" * 20),
        ("a.html", b"<p>x" * 20),
    ):
        with pytest.raises(DocumentError, match=r"more than (10 paragraphs|100 tags)"):
            readers.read_bytes(data, name)


# Each is repeated to 300 kB. A reader that is quadratic takes minutes for one of them.
REPEATED = {
    "md": [
        "[",
        "[a](",
        '[a](b "',
        "**a ",
        "*a ",
        "_a ",
        "`",
        "`a",
        "<!--",
        "#",
        "a\n",
        "\n \n",
        "**a",
    ],
    "html": [
        *("<", "</", "<!--", "<!", "<?", "<a ", '<a b="', "<a b='>", "<nav>", "<svg><nav>"),
        *("<![", "<b> ", "&#1", "<script>", "<h1>a<p>b", "<a b=c>"),
    ],
    "txt": [".", ". ", ".)", "a.", "\n", "\f", "a\n\n", "1.", "x" * 80 + "\n", "\"'"],
}
ONCE = {
    "md": ["# a" + " " * 300_000 + "b", "a\n" + "=" * 300_000 + "x", "[a](" + "(b)" * 100_000],
    "html": ["<a" + ' b=""' * 60_000, "<a " + "=" * 300_000 + ">", "&#" + "1" * 300_000 + ";"],
    "txt": ["." + " " * 300_000 + "(", "1" * 300_000],
}


def test_reading_is_linear_and_bounded(tmp_path: Path) -> None:
    texts = [
        (kind, part * (300_000 // len(part))) for kind in REPEATED for part in REPEATED[kind]
    ] + [(kind, text) for kind in ONCE for text in ONCE[kind]]
    for number, (kind, text) in enumerate(texts):
        (tmp_path / f"{number}.{kind}").write_text(text)
    cells = "<w:t>x" + " " * 300_000 + "</w:t><w:tc/>"
    breaks = (
        "<w:p><w:t>" + "x" * 300_000 + "</w:t>" + "<w:lastRenderedPageBreak/>" * 9000 + "</w:p>"
    )
    for name, body in (("cells", cells), ("breaks", breaks), ("empty", "<w:p/>" * 5_000_000)):
        (tmp_path / f"{name}.docx").write_bytes(_word(body))
    script = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from pocketslm.errors import DocumentError\n"
        "from pocketslm.runtime.assistant import readers\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "for file in Path(sys.argv[1]).iterdir():\n"
        "    try:\n        readers.read_file(file)\n    except DocumentError:\n        pass\n"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True, timeout=300)


def test_limits_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("some text")
    monkeypatch.setattr(limits, "MAX_TEXT_CHARACTERS", 8)
    with pytest.raises(DocumentError, match="holds more than"):
        readers.read_file(file)
    with monkeypatch.context() as less:
        less.setattr(readers, "MAX_FILE_BYTES", 8)
        with pytest.raises(DocumentError, match="is larger than"):
            readers.read_file(file)
    with pytest.raises(DocumentError, match="is larger than"):
        readers.read_file(Path("/dev/zero"))
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
