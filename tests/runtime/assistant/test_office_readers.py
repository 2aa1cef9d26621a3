"""Readers of mails, slides, tables and office texts, and what they refuse."""

from __future__ import annotations

import io
import zipfile

import pytest

from pocketslm.errors import DocumentError
from pocketslm.profiling.brought import brought_questions, written
from pocketslm.profiling.render import pdf, render
from pocketslm.runtime.assistant import readers
from pocketslm.runtime.assistant.readers import limits
from support_documents import pdf_file, zipped

TABLE = "# Tools\n\n| Tool | Bought | Price |\n|---|---|---|\n| Saw | 2020-02-03 | 780.00 |"


def text_of(data: bytes, name: str) -> str:
    return readers.read_bytes(data, name).text


def test_every_document_of_the_benchmark_holds_its_answers() -> None:
    """What was written in one notation is found in each kind of file."""
    files = {
        name: readers.read_bytes(data, name.replace(".2pdf", ".pdf"))
        for name, data in written().items()
    }
    assert len(files) >= 25
    assert len({source.kind for source in files.values()}) >= 10
    assert {source.language for source in files.values()} >= {"en", "de", "fr", "es", "ar", "zh"}
    asked = [question for question in brought_questions() if question.document in files]
    assert len(asked) >= 200
    for question in asked:
        if question.answerable:
            text = files[question.document].text
            assert question.is_answer(text), question
            assert question.stands_in(text), question
    old = [question for question in brought_questions() if question.file == "questions.txt"]
    assert 0.4 < sum(question.apart for question in old) / len(old) < 0.6
    assert not any(q.apart for q in brought_questions() if q.file == "tuning.txt")
    assert len({(q.document, q.question) for q in brought_questions()}) == len(brought_questions())


def test_rows_say_their_columns() -> None:
    row = "Tool: Saw | Bought: 2020-02-03 | Price: 780"
    assert text_of(render(TABLE, "xlsx"), "a.xlsx").endswith(row)
    assert text_of(render(TABLE, "csv"), "a.csv").endswith(row + ".00")
    assert text_of(b"a;b\n1;2\n\n3;4\n", "a.csv") == "a | b\n\na: 1 | b: 2\n\na: 3 | b: 4"
    assert text_of(b"1,2\n3,4\n", "a.csv") == "1 | 2\n\n3 | 4"  # no row of names
    assert text_of(b"one column\nof text\n", "a.csv") == "one column\nof text"
    assert text_of(b'name,what\nA,"two\nlines"\n', "a.csv").endswith("name: A | what: two lines")


def test_slides_are_pages_with_titles() -> None:
    source = readers.read_bytes(render("# One\n\nText\n\n# Two\n\n- a", "pptx"), "a.pptx")
    assert [(c.page, c.heading) for c in source.chunks] == [(1, "One"), (2, "Two")]
    assert source.text == "One\n\nText\n\nTwo\n\na"


def test_opendocument_has_headings_tables_and_spaces() -> None:
    assert text_of(render(TABLE, "odt"), "a.odt").endswith("Saw | 2020-02-03 | 780.00")
    spaces = "urn:oasis:names:tc:opendocument:xmlns"
    body = (
        f'<d xmlns:text="{spaces}:text:1.0" xmlns:office="{spaces}:office:1.0">'
        "<text:tracked-changes><text:p>gone</text:p></text:tracked-changes>"
        '<text:h text:outline-level="2">Head</text:h><text:p>a<text:s text:c="3"/>b<text:tab/>c'
        '<text:s text:c="999999999"/>d<office:annotation><text:p>note</text:p></office:annotation>'
        "</text:p></d>"
    )
    source = readers.read_bytes(zipped({"content.xml": body}), "a.odt")
    assert source.text == "Head\n\na   b\tc d"
    assert source.chunks[0].heading == "Head"


def test_rtf_is_its_text() -> None:
    rtf = (
        rb"{\rtf1\ansi\ansicpg1252{\fonttbl{\f0 Arial;}}{\*\generator X;}{\info{\author A}}"
        rb"\pard\outlinelevel0 Title\par\pard Gr\'fc\'dfe \u8364?5 {\b bold} \{x\}\par "
        rb"\trowd a\cell b\cell\row {\pict 0102}end}"
    )
    source = readers.read_bytes(rtf, "a.rtf")
    assert source.text == "Title\n\nGrüße €5 bold {x}\n\na | b\n\nend"
    assert source.chunks[0].heading == "Title"
    with pytest.raises(DocumentError, match="deeper than 1000"):
        readers.read_bytes(b"{\\rtf1" + b"{" * 2000, "a.rtf")
    with pytest.raises(DocumentError, match="is no RTF"):
        readers.read_bytes(b"hello", "a.rtf")


def test_a_mail_is_read_without_its_coding() -> None:
    mail = render("From: =?utf-8?q?J=C3=B6rg?= <j@x.y>\nSubject: Hi\n\nGrüße für €5", "eml")
    text = text_of(mail, "a.eml")
    assert text == "Hi\n\nFrom: Jörg <j@x.y>\n\nGrüße für €5\n\nAttachment: map.png"
    page = b"Subject: S\nContent-Type: text/html; charset=iso-8859-1\n\n<p>Gr\xfc\xdfe<p>two"
    assert text_of(page, "a.eml") == "S\n\nGrüße\n\ntwo"
    box = b"From a\nSubject: One\n\nfirst\n\nFrom b\nSubject: Two\n\nsecond\n"
    source = readers.read_bytes(box, "a.mbox")
    assert [c.heading for c in source.chunks] == ["One", "Two"]
    with pytest.raises(DocumentError, match="no file of mails"):
        readers.read_bytes(b"hello", "a.mbox")


def test_hostile_mails_are_refused() -> None:
    header = b"Content-Type: multipart/mixed; " + b";" * (1 << 20) + b"\n\nx"
    with pytest.raises(DocumentError, match="header of more than"):
        readers.read_bytes(header, "a.eml")
    folded = b"Content-Type: text/plain;\n" + b" a=b;\n" * 20_000 + b"\n\nx"
    with pytest.raises(DocumentError, match="header of more than"):
        readers.read_bytes(folded, "a.eml")
    nested = b"".join(
        b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (n, n) for n in range(900)
    )
    with pytest.raises(DocumentError, match="parts within each other"):
        readers.read_bytes(nested, "a.eml")


def test_hostile_workbooks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long text that is shared by many cells is counted each time."""
    monkeypatch.setattr(limits, "MAX_TEXT_CHARACTERS", 100_000)
    out = io.BytesIO(render(TABLE, "xlsx"))
    files = {
        name: zipfile.ZipFile(out).read(name).decode() for name in zipfile.ZipFile(out).namelist()
    }
    files["xl/sharedStrings.xml"] = files["xl/sharedStrings.xml"].replace("Saw", "S" * 5000)
    row = "".join(f'<c r="A{n}" t="s"><v>3</v></c>' for n in range(1, 2))
    rows = "".join(f"<row>{row}</row>" for _ in range(50))
    sheet = "xl/worksheets/sheet0.xml"
    files[sheet] = files[sheet].replace("</sheetData>", f"{rows}</sheetData>")
    with pytest.raises(DocumentError, match="million characters"):
        readers.read_bytes(zipped(files), "a.xlsx")
    with pytest.raises(DocumentError, match="lacks xl/workbook.xml"):
        readers.read_bytes(zipped({"a": "b"}), "a.xlsx")


def test_words_of_a_font_without_a_space_stand_apart() -> None:
    """Justified text moves the pen by a fifth of an em and draws no space."""
    page = b"BT /F1 10 Tf 40 800 Td [(Among) -190 (those) -190 (fi) 20 (les)] TJ ET"
    assert text_of(pdf_file([page]), "a.pdf") == "Among those files"
    # Where the letters of a font are broad, pypdf wants a wider gap than typesetters leave. Once it
    # does not, our change can go.
    from pypdf._text_extraction._text_extractor import TextExtraction

    from pocketslm.runtime.assistant.readers.pdf_streams import Work, _Extraction

    for page_of_words, seen in ((_Extraction(Work(0)), True), (TextExtraction(), False)):
        page_of_words.text = "Among"
        page_of_words.process_tj_offset(-190.0, 267.9)
        assert (page_of_words.text + page_of_words.output).endswith(" ") == seen


def test_a_pdf_has_headings_by_size_and_paragraphs_by_space() -> None:
    prose = "This is a sentence of some words that fills the line until its very end in 1965. " * 3
    text = f"# Title\n\n## 1. First\n\n{prose}\n\n{prose}\n\n## 2. Second\n\nEnd."
    for columns in (1, 2):
        source = readers.read_bytes(pdf(text, columns), "a.pdf")
        paragraph = " ".join(prose.split())
        assert source.text.split("\n\n") == [
            *("Title", "1. First", paragraph, paragraph, "2. Second", "End."),
        ]
        assert source.chunks[-1].heading == "Title › 2. Second"


def test_logs_and_code_keep_their_lines() -> None:
    log = "2024-05-02 06:00:01 INFO a long line of a log that no editor has ever wrapped\n" * 3
    assert text_of(log.encode(), "a.log") == log.strip()
    assert (
        text_of(b"def f():\n    return 1\n\nx = 2\n", "a.py") == "def f():\n    return 1\n\nx = 2"
    )


def test_a_short_line_above_a_paragraph_is_its_heading() -> None:
    source = readers.read_bytes(b"Rent\n\nIt is due on the first day.", "a.txt")
    assert source.chunks[0].heading == "Rent"


def _workbook(cells: str, styles: str, strings: str = "") -> bytes:
    out = io.BytesIO(render(TABLE, "xlsx"))
    files = {
        name: zipfile.ZipFile(out).read(name).decode() for name in zipfile.ZipFile(out).namelist()
    }
    files["xl/styles.xml"] = f"<styleSheet>{styles}</styleSheet>"
    files["xl/sharedStrings.xml"] = f"<sst>{strings}</sst>"
    files["xl/worksheets/sheet0.xml"] = (
        f"<worksheet><sheetData><row>{cells}</row></sheetData></worksheet>"
    )
    return zipped(files)


def test_a_cell_is_what_its_format_shows() -> None:
    formats = ["0%", "0.0%", "h:mm", "[h]:mm:ss", "mmmm yyyy", "mmm", '"day" 0', "# ##0.00_d", "@"]
    codes = "".join(
        f'<numFmt numFmtId="{200 + at}" formatCode="{code.replace(chr(34), "&quot;")}"/>'
        for at, code in enumerate(formats)
    )
    known = ["0", "9", "20", "46", *(str(200 + at) for at in range(len(formats)))]
    styles = "".join(f'<xf numFmtId="{number}"/>' for number in known)
    values = {
        (0, "9783161484100"): "9783161484100",
        (0, "0.1"): "0.1",
        (0, "0.30000000000000004"): "0.3",
        (1, "0.25"): "25%",
        (2, "0.5"): "12:00",
        (3, "1.5"): "36:00",
        (4, "0.07"): "7%",
        (6, "0.75"): "18:00",
        (7, "1.0000115740740741"): "24:00:01",
        (8, "45000"): "2023-03-15",
        (9, "45000"): "2023-03-15",
        (10, "5"): "5",
        (11, "5.5"): "5.5",
        (12, "44"): "44",
    }
    cells = "".join(f'<c s="{style}"><v>{value}</v></c>' for style, value in values)
    cells += '<c t="s"><v>0</v></c>'
    book = _workbook(
        cells,
        f"<numFmts>{codes}</numFmts><cellXfs>{styles}</cellXfs>",
        "<si><t>a_x000D_\nb_x0041_</t></si>",
    )
    shown = text_of(book, "a.xlsx").split("\n\n")[-1]
    assert shown.split(" | ") == [*values.values(), "a bA"]


@pytest.mark.parametrize(
    ("table", "rows"),
    [
        ("1,5;2,5;3,5\n4,5;5,5;6,5\n", "1,5 | 2,5 | 3,5\n\n4,5 | 5,5 | 6,5"),
        (
            '"Smith, A, B, C";Age\n"Doe, D";7\n',
            "Smith, A, B, C | Age\n\nSmith, A, B, C: Doe, D | Age: 7",
        ),
        ("Name,Colours\nA,red;blue\n", "Name | Colours\n\nName: A | Colours: red;blue"),
        ("sep=|\na,b|c\n1|2\n", "sep=\n\na,b | c\n\na,b: 1 | c: 2"),
        ("a,b\n1,2,\n3,4\n", "a | b\n\na: 1 | b: 2\n\na: 3 | b: 4"),
    ],
)
def test_the_delimiter_is_what_cuts_all_rows_alike(table: str, rows: str) -> None:
    assert text_of(table.encode(), "a.csv") == rows


def test_notes_and_boxes_do_not_cut_their_paragraph() -> None:
    spaces = "urn:oasis:names:tc:opendocument:xmlns"
    body = (
        f'<d xmlns:text="{spaces}:text:1.0" xmlns:draw="{spaces}:drawing:1.0">'
        "<text:p>It was signed<text:note><text:note-citation>1</text:note-citation>"
        "<text:note-body><text:p>See below.</text:p><text:p>Or not.</text:p></text:note-body>"
        "</text:note> in 1815.</text:p><text:p>A<draw:text-box><text:p>box</text:p></draw:text-box>"
        " b</text:p></d>"
    )
    text = text_of(zipped({"content.xml": body}), "a.odt")
    assert text == "It was signed in 1815.\n\nSee below.\n\nOr not.\n\nA b\n\nbox"


def test_text_that_was_moved_or_deleted_is_read_once() -> None:
    space = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    run = "<w:r><w:t>moved </w:t></w:r>"
    body = f"<w:moveFrom>{run}</w:moveFrom><w:r><w:t>here </w:t></w:r><w:moveTo>{run}</w:moveTo>"
    xml = f'<w:document xmlns:w="{space}"><w:body><w:p>{body}</w:p></w:body></w:document>'
    assert text_of(zipped({"word/document.xml": xml}), "a.docx") == "here moved"
    rtf = rb"{\rtf1 It costs {\deleted 5 }{\v hidden}\v0 7 euros.}"
    assert text_of(rtf, "a.rtf") == "It costs 7 euros."


def test_bytes_of_rtf_are_of_their_font() -> None:
    fonts = rb"{\fonttbl{\f0\fcharset0 Arial;}{\f1\fswiss\fcharset204{\*\fname A;}Arial Cyr;}}"
    rtf = rb"{\rtf1\ansi\ansicpg1252" + fonts + rb"\f0 Caf\'e9\emspace {\f1 \'cc\'e8\'f0} \'e9}"
    assert text_of(rtf, "a.rtf") == "Café Мир é"
    assert text_of(rb"{\rtf1\mac Caf\'8e}", "a.rtf") == "Café"


def test_a_mail_is_read_whole_and_once() -> None:
    def part(kind: str, text: str) -> str:
        return f"--b\nContent-Type: text/{kind}\n\n{text}\n"

    def mail(kind: str, *parts: str) -> str:
        head = f"Subject: S\nContent-Type: multipart/{kind}; boundary=b\n\n"
        return text_of(f"{head}{''.join(parts)}--b--\n".encode(), "a.eml")

    page, footer = part("html", "<p>The price is 7.</p>"), part("plain", "To unsubscribe")
    assert mail("mixed", page, footer) == "S\n\nThe price is 7.\n\nTo unsubscribe"
    assert mail("alternative", footer, page) == "S\n\nTo unsubscribe"
    assert mail("alternative", part("plain", " "), page) == "S\n\nThe price is 7."
