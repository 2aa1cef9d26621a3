"""Documents made by hand: the smallest files of each format that have what the format can say."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from pocketslm.profiling.render import zipped

WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
DOCX_XML = (
    f'<?xml version="1.0"?><w:document xmlns:w="{WORD}"><w:body>'
    '<w:p><w:pPr><w:pStyle w:val="Heading1"/></w:pPr><w:r><w:t>Report</w:t></w:r></w:p>'
    "<w:p><w:r><w:t>First</w:t><w:tab/><w:t>part.</w:t></w:r></w:p>"
    "<w:tbl><w:tr><w:tc><w:p><w:r><w:t>a</w:t></w:r></w:p></w:tc>"
    "<w:tc><w:p><w:r><w:t>b</w:t></w:r></w:p></w:tc></w:tr></w:tbl>"
    "<w:p><w:r><w:lastRenderedPageBreak/><w:t>Second page.</w:t></w:r></w:p>"
    "</w:body></w:document>"
)


def docx(xml: str = DOCX_XML) -> bytes:
    return zipped({"word/document.xml": xml})


def epub(chapter: str = "one%20a.xhtml") -> bytes:
    page = "<?xml version='1.0'?><!DOCTYPE html><html><body><h1>{}</h1><p>{}</p></body></html>"
    return zipped(
        {
            "META-INF/container.xml": "<container><rootfiles>"
            '<rootfile full-path="book/content.opf"/></rootfiles></container>',
            "book/content.opf": '<package xmlns="http://www.idpf.org/2007/opf"><manifest>'
            '<item id="b" href="two.xhtml" media-type="application/xhtml+xml"/>'
            f'<item id="a" href="{chapter}" media-type="application/xhtml+xml"/>'
            '<item id="c" href="cover.png" media-type="image/png"/></manifest>'
            '<spine><itemref idref="c"/><itemref idref="a"/><itemref idref="b"/></spine></package>',
            "book/one a.xhtml": page.format("One", "It begins."),
            "book/two.xhtml": page.format("Two", "It ends."),
        }
    )


def pdf_file(pages: Sequence[str | bytes], filters: str = "") -> bytes:
    """A PDF with a line of text, or the lines of a text, on each page; bytes are a page's own
    content stream, packed as ``filters`` say."""
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Count {len(pages)} /Kids "
        f"[{' '.join(f'{4 + 2 * n} 0 R' for n in range(len(pages)))}] >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    ]
    data = [text.encode("latin-1") for text in objects]
    for number, page in enumerate(pages):
        content = page if isinstance(page, bytes) else _content(page)
        data.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents {5 + 2 * number} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>".encode()
        )
        packed = f" /Filter {filters}" if filters else ""
        head = f"<< /Length {len(content)}{packed} >>\nstream\n".encode()
        data.append(head + content + b"\nendstream")
    out, offsets = bytearray(b"%PDF-1.4\n"), []
    for number, body in enumerate(data, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n".encode() + body + b"\nendobj\n"
    start = len(out)
    out += f"xref\n0 {len(data) + 1}\n0000000000 65535 f \n".encode()
    out += b"".join(f"{offset:010} 00000 n \n".encode() for offset in offsets)
    out += f"trailer\n<< /Size {len(data) + 1} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF".encode()
    return bytes(out)


def pdf_of_forms(form: bytes) -> bytes:
    """A PDF whose page shows a form 5,000 times, as often as pypdf allows."""
    content = zlib.compress(form, 9)
    head = (
        "9 0 obj\n<< /Subtype /Form /BBox [0 0 9 9] /Resources << /Font << /F1 3 0 R >> >> "
        f"/Filter /FlateDecode /Length {len(content)} >>\nstream\n"
    )
    shown = pdf_file([b"/X Do " * 5000])
    shown = shown.replace(b"/Resources <<", b"/Resources << /XObject << /X 9 0 R >>")
    whole = head.encode() + content + b"\nendstream\nendobj\n"
    return shown.replace(b"xref", whole + b"xref", 1)


def _content(text: str) -> bytes:
    lines = []
    for line in text.split("\n"):
        escaped = line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")
        lines.append(f"({escaped}) Tj T*")
    body = "\n".join(lines)
    return f"BT /F1 10 Tf 12 TL 40 800 Td\n{body}\nET".encode("latin-1", "replace")
