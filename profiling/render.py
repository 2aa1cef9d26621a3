"""Write the benchmark's documents in many file formats, from one plain notation.

The notation: "# " and "## " begin headings, a blank line ends a paragraph, rows of a table stand
between vertical bars, "- " begins an item, and a line "---" ends a page or a mail. A file's name
says its language and its kind: ``lease.de.odt``.
"""

from __future__ import annotations

import base64
import io
import quopri
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from html import escape
from typing import NamedTuple

_BREAK = "---"


class Part(NamedTuple):
    """A part of a document. ``kind`` is h1, h2, p, li, table or break."""

    kind: str
    text: str = ""
    rows: tuple[tuple[str, ...], ...] = ()


def render(text: str, kind: str) -> bytes:
    """A file of this kind with the text."""
    return _WRITERS[kind](text)


def parts(text: str) -> Iterator[Part]:
    """The parts of a text in the notation."""
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        lines = paragraph.splitlines()
        if lines[0] == _BREAK:
            yield Part("break")
        elif heading := re.match(r"(#+) (.*)", lines[0]):
            yield Part(f"h{len(heading[1])}", heading[2])
        elif lines[0].startswith("|"):
            rows = (line.strip("| ").split(" | ") for line in lines if not set(line) <= set("|-"))
            yield Part("table", "", tuple(map(tuple, rows)))
        elif lines[0].startswith("- "):
            yield from (Part("li", line.removeprefix("- ")) for line in lines)
        else:
            yield Part("p", " ".join(lines))


def _plain(text: str) -> bytes:
    """Text as an editor keeps it, in lines of at most 78 characters."""
    import textwrap

    shown = []
    for part in parts(text):
        if part.kind == "table":
            shown.append("\n".join("  ".join(row) for row in part.rows))
        elif part.kind != "break":
            shown.append("\n".join(textwrap.wrap(part.text, 78)) or part.text)
    return "\n\n".join(shown).encode()


def _html(text: str) -> bytes:
    return f"<!DOCTYPE html><html><head><meta charset=utf-8></head><body>{_body(text)}".encode()


def _body(text: str) -> str:
    made = []
    for part in parts(text):
        if part.kind == "table":
            rows = (
                "".join(f"<td>{escape(cell)}</td>" for cell in row).join(("<tr>", "</tr>"))
                for row in part.rows
            )
            made.append(f"<table>{''.join(rows)}</table>")
        elif part.kind != "break":
            made.append(f"<{part.kind}>{escape(part.text)}</{part.kind}>")
    return "\n".join(made)


def _docx(text: str) -> bytes:
    def paragraph(text: str, style: str = "") -> str:
        kept = f'<w:pPr><w:pStyle w:val="{style}"/></w:pPr>' if style else ""
        return f"<w:p>{kept}<w:r><w:t>{escape(text)}</w:t></w:r></w:p>"

    made = []
    for part in parts(text):
        if part.kind == "table":
            rows = (
                "".join(f"<w:tc>{paragraph(cell)}</w:tc>" for cell in row).join(
                    ("<w:tr>", "</w:tr>")
                )
                for row in part.rows
            )
            made.append(f"<w:tbl>{''.join(rows)}</w:tbl>")
        elif part.kind != "break":
            style = f"Heading{part.kind[1]}" if part.kind[0] == "h" else ""
            made.append(paragraph(part.text, style))
    space = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    body = f'<w:document xmlns:w="{space}"><w:body>{"".join(made)}</w:body></w:document>'
    return zipped({"word/document.xml": body})


def _odt(text: str) -> bytes:
    made = []
    for part in parts(text):
        words = escape(part.text)
        if part.kind == "table":
            rows = (
                "".join(
                    f"<table:table-cell><text:p>{escape(cell)}</text:p></table:table-cell>"
                    for cell in row
                ).join(("<table:table-row>", "</table:table-row>"))
                for row in part.rows
            )
            made.append(f"<table:table>{''.join(rows)}</table:table>")
        elif part.kind[0] == "h":
            level = part.kind[1]
            made.append(f'<text:h text:outline-level="{level}">{words}</text:h>')
        elif part.kind == "break":
            made.append("<text:p><text:soft-page-break/></text:p>")
        else:
            made.append(f"<text:p>{words}</text:p>")
    oasis = "urn:oasis:names:tc:opendocument:xmlns"
    spaces = " ".join(f'xmlns:{name}="{oasis}:{name}:1.0"' for name in ("office", "text", "table"))
    body = f"<office:body><office:text>{''.join(made)}</office:text></office:body>"
    return zipped(
        {
            "mimetype": "application/vnd.oasis.opendocument.text",
            "content.xml": f"<office:document-content {spaces}>{body}</office:document-content>",
        }
    )


_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006/relationships"


def _relations(kind: str, targets: list[str]) -> str:
    each = "".join(
        f'<Relationship Id="r{at}" Type="{_OFFICE}/{kind}" Target="{target}"/>'
        for at, target in enumerate(targets)
    )
    return f'<Relationships xmlns="{_PACKAGE}">{each}</Relationships>'


def _pptx(text: str) -> bytes:
    """A slide for each first heading."""
    slides: list[list[str]] = []

    def shape(words: str, *, title: bool = False) -> str:
        place = '<p:nvPr><p:ph type="title"/></p:nvPr>' if title else ""
        return (
            f"<p:sp><p:nvSpPr>{place}</p:nvSpPr><p:txBody><a:p><a:r><a:t>{escape(words)}</a:t>"
            "</a:r></a:p></p:txBody></p:sp>"
        )

    for part in parts(text):
        if part.kind == "h1":
            slides.append([])
        if part.kind == "table":
            rows = (
                "".join(
                    f"<a:tc><a:txBody><a:p><a:r><a:t>{escape(cell)}</a:t></a:r></a:p></a:txBody>"
                    "</a:tc>"
                    for cell in row
                ).join(("<a:tr>", "</a:tr>"))
                for row in part.rows
            )
            slides[-1].append(f"<p:graphicFrame><a:tbl>{''.join(rows)}</a:tbl></p:graphicFrame>")
        else:
            slides[-1].append(shape(part.text, title=part.kind == "h1"))
    spaces = (
        'xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main" '
        f'xmlns:p="http://schemas.openxmlformats.org/presentationml/2006/main" xmlns:r="{_OFFICE}"'
    )
    order = "".join(f'<p:sldId id="{256 + at}" r:id="r{at}"/>' for at in range(len(slides)))
    files = {
        "ppt/presentation.xml": f"<p:presentation {spaces}><p:sldIdLst>{order}</p:sldIdLst>"
        "</p:presentation>",
        "ppt/_rels/presentation.xml.rels": _relations(
            "slide", [f"slides/slide{at}.xml" for at in range(len(slides))]
        ),
    }
    for at, shapes in enumerate(slides):
        tree = f"<p:cSld><p:spTree>{''.join(shapes)}</p:spTree></p:cSld>"
        files[f"ppt/slides/slide{at}.xml"] = f"<p:sld {spaces}>{tree}</p:sld>"
    return zipped(files)


def _xlsx(text: str) -> bytes:
    """Words are shared strings, numbers are numbers, and dates are days with a date format."""
    from datetime import date

    strings: dict[str, int] = {}
    sheets: list[tuple[str, list[str]]] = []
    for part in parts(text):
        if part.kind == "h1":
            sheets.append((part.text, []))
        for number, row in enumerate(part.rows, 1):
            cells = []
            for at, cell in enumerate(row):
                place = f'r="{chr(65 + at)}{number}"'
                if re.fullmatch(r"\d{4}-\d\d-\d\d", cell):
                    days = (date.fromisoformat(cell) - date(1899, 12, 30)).days
                    cells.append(f'<c {place} s="1"><v>{days}</v></c>')
                elif re.fullmatch(r"[\d,]+\.\d\d", cell):
                    cells.append(f"<c {place}><v>{cell.replace(',', '')}</v></c>")
                else:
                    shared = strings.setdefault(cell, len(strings))
                    cells.append(f'<c {place} t="s"><v>{shared}</v></c>')
            sheets[-1][1].append(f'<row r="{number}">{"".join(cells)}</row>')
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    names = "".join(
        f'<sheet name="{escape(name)}" sheetId="{at + 1}" r:id="r{at}"/>'
        for at, (name, _) in enumerate(sheets)
    )
    files = {
        "xl/workbook.xml": f'<workbook {space} xmlns:r="{_OFFICE}"><sheets>{names}</sheets>'
        "</workbook>",
        "xl/_rels/workbook.xml.rels": _relations(
            "worksheet", [f"worksheets/sheet{at}.xml" for at in range(len(sheets))]
        ),
        "xl/styles.xml": f"<styleSheet {space}><cellXfs><xf/>"
        '<xf numFmtId="14"/></cellXfs></styleSheet>',
        "xl/sharedStrings.xml": f"<sst {space}>"
        + "".join(f"<si><t>{escape(string)}</t></si>" for string in strings)
        + "</sst>",
    }
    for at, (_, rows) in enumerate(sheets):
        files[f"xl/worksheets/sheet{at}.xml"] = (
            f"<worksheet {space}><sheetData>{''.join(rows)}</sheetData></worksheet>"
        )
    return zipped(files)


def _csv(text: str) -> bytes:
    import csv

    out = io.StringIO()
    writer = csv.writer(out)
    for part in parts(text):
        writer.writerows(part.rows)
    return out.getvalue().encode()


def _eml(text: str) -> bytes:
    """A mail in quoted-printable with a picture attached in base64."""
    head, _, body = text.partition("\n\n")
    words = "\n\n".join(part.text for part in parts(body))
    coded = quopri.encodestring(words.encode()).decode()
    picture = base64.encodebytes(bytes(range(256)) * 40).decode()
    return (
        f"{head}\nMIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=frontier\n\n"
        "--frontier\nContent-Type: text/plain; charset=utf-8\n"
        f"Content-Transfer-Encoding: quoted-printable\n\n{coded}"
        "\n--frontier\nContent-Type: image/png\nContent-Transfer-Encoding: base64\n"
        f"Content-Disposition: attachment; filename=map.png\n\n{picture}--frontier--\n"
    ).encode()


def _mbox(text: str) -> bytes:
    mails = re.split(r"\n---\n", text)
    return b"".join(b"From sender Mon Sep 16 2024\n" + mail.encode() + b"\n\n" for mail in mails)


def _rtf(text: str) -> bytes:
    def coded(text: str) -> str:
        marked = re.sub(r"([\\{}])", r"\\\1", text)
        return "".join(c if c < "\x7f" else f"\\u{ord(c)}?" for c in marked)

    made = []
    for part in parts(text):
        level = f"\\outlinelevel{int(part.kind[1]) - 1} " if part.kind[0] == "h" else ""
        made.append(f"\\pard{level or ' '}{coded(part.text)}\\par\n")
    fonts = "{\\fonttbl{\\f0\\froman Times New Roman;}}{\\*\\generator Writer;}"
    return f"{{\\rtf1\\ansi\\ansicpg1252\\deff0{fonts}\n{''.join(made)}}}".encode()


def _epub(text: str) -> bytes:
    """A chapter for each second heading."""
    title, *chapters = re.split(r"\n(?=## )", text)
    page = "<html xmlns='http://www.w3.org/1999/xhtml'><body>{}</body></html>"
    files = {
        "META-INF/container.xml": "<container><rootfiles>"
        '<rootfile full-path="book/content.opf"/></rootfiles></container>',
        "book/title.xhtml": page.format(_body(title)),
    }
    names = ["title"]
    for number, chapter in enumerate(chapters):
        names.append(f"c{number}")
        files[f"book/c{number}.xhtml"] = page.format(_body(chapter))
    items = "".join(
        f'<item id="{name}" href="{name}.xhtml" media-type="application/xhtml+xml"/>'
        for name in names
    )
    order = "".join(f'<itemref idref="{name}"/>' for name in names)
    files["book/content.opf"] = (
        f'<package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}</manifest>'
        f"<spine>{order}</spine></package>"
    )
    return zipped(files)


def zipped(
    files: Mapping[str, str] | Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED
) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return out.getvalue()


# Helvetica's widths in thousandths of an em: space to "~", then that of most accented letters.
_WIDTHS = tuple(
    int(width)
    for width in re.findall(
        r"\d+",
        "278 278 355 556 556 889 667 191 333 333 389 584 278 333 278 278 556 556 556 556 556 "
        "556 556 556 556 556 278 278 584 584 584 556 1015 667 667 722 722 667 611 778 722 278 "
        "500 667 556 833 722 778 667 778 722 667 611 722 667 944 667 667 611 278 278 278 469 "
        "556 333 556 556 500 556 556 278 556 556 222 222 500 222 833 556 556 556 556 333 500 "
        "278 556 500 722 500 500 500 334 260 334 584 ",
    )
)


def pdf(text: str, columns: int = 1) -> bytes:
    """A PDF in Helvetica, justified as typesetters do it: gaps between words are movements of the
    pen, and spaces are never drawn.
    """
    size, leading, top, bottom, left, gap = 10, 13, 790, 60, 60, 20
    width = (475 - gap * (columns - 1)) / columns
    pages: list[list[str]] = [[]]
    column, y = 0, top

    def advance(lines: int) -> None:
        nonlocal column, y
        if y - leading * lines < bottom:
            column, y = column + 1, top
            if column == columns:
                pages.append([])
                column = 0

    for part in parts(text):
        if part.kind == "break":
            pages.append([])
            column, y = 0, top
            continue
        big = 14 if part.kind == "h1" else 12 if part.kind == "h2" else size
        for words, last in _broken(part.text, width / big * 1000):
            advance(1)
            y -= leading if big == size else leading + 4
            pages[-1].append(_line(words, left + column * (width + gap), y, big, width, last))
        y -= leading // 2
    return _pdf_file(pages)


def _measure(word: str) -> int:
    return sum(_WIDTHS[ord(c) - 32] if 32 <= ord(c) < 127 else 556 for c in word)


def _broken(text: str, width: float) -> Iterator[tuple[list[str], bool]]:
    """Lines of words, and whether each is the last."""
    line: list[str] = []
    used = 0
    for word in text.split():
        if line and used + 278 + _measure(word) > width:
            yield line, False
            line, used = [], 0
        used += _measure(word) + (278 if line else 0)
        line.append(word)
    yield line, True


def _line(words: list[str], x: float, y: float, size: int, width: float, last: bool) -> str:
    free = width / size * 1000 - sum(map(_measure, words))
    gap = 278.0 if last or len(words) < 2 else max(180.0, min(500.0, free / (len(words) - 1)))
    shown = f" {-gap:.0f} ".join(
        "({})".format(re.sub(r"([\\()])", r"\\\1", word)) for word in words
    )
    return f"BT /F1 {size} Tf 1 0 0 1 {x:.1f} {y:.1f} Tm [{shown}] TJ ET"


def _pdf_file(pages: list[list[str]]) -> bytes:
    kids = " ".join(f"{4 + 2 * n} 0 R" for n in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Count {len(pages)} /Kids [{kids}] >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    ]
    for number, page in enumerate(pages):
        content = "\n".join(page).encode("cp1252", "replace")
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents {5 + 2 * number} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>".encode()
        )
        objects.append(b"<< /Length %d >>\nstream\n%b\nendstream" % (len(content), content))
    out, offsets = bytearray(b"%PDF-1.4\n"), []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%b\nendobj\n" % (number, body)
    start = len(out)
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode()
    out += b"".join(f"{offset:010} 00000 n \n".encode() for offset in offsets)
    out += (
        f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF".encode()
    )
    return bytes(out)


_WRITERS: dict[str, Callable[[str], bytes]] = {
    "txt": _plain,
    "log": str.encode,
    "py": str.encode,
    "md": str.encode,
    "html": _html,
    "docx": _docx,
    "odt": _odt,
    "pptx": _pptx,
    "xlsx": _xlsx,
    "csv": _csv,
    "eml": _eml,
    "mbox": _mbox,
    "rtf": _rtf,
    "epub": _epub,
    "pdf": pdf,
    "2pdf": lambda text: pdf(text, 2),
}
