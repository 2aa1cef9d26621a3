"""Content streams of PDFs: the scanner finds what pypdf's parser finds, and work is bounded."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable
from random import Random

import pytest
from pypdf import PdfReader
from pypdf.generic import ContentStream

from pocketslm.errors import DocumentError
from pocketslm.runtime.assistant import readers
from pocketslm.runtime.assistant.readers import pdf_streams
from support_documents import pdf_file, pdf_of_forms

# The last one damages a stream.
OPERATIONS = (
    *(b"BT", b"ET", b"q", b"Q", b"/F1 10 Tf", b"/F2 9.5 Tf", b"/F#31 8 Tf", b"14 TL", b"T*"),
    *(b"1 0 0 1 40 800 Tm", b"0 -12 Td", b"3 -.5 TD", b"1 0 0 -1 0 +842. cm", b"90 Tz", b".2 Tc"),
    *(b"(word)Tj", b"(a (nested (deep)) one)Tj", rb"(\(\051\\\n\0535 \q)Tj", b"(two\rlines)Tj"),
    *(b"<48656C 6c6>Tj", b"<>Tj", b"[(W)83(e)-333(a)-20<62>]TJ", b"[ (a) 1 (b) ]TJ", b"[]TJ"),
    *(b"[(x)[1]]TJ", rb"[(\(y) -400(z)]TJ", b"(quoted)'", b'1 2 (both) "', b"Tj", b"1 Tj"),
    *(b"0 0 m 5 5 l S", b"1 0 0 rg", b"/GS0 gs", b"/Span<</ActualText(a)/L<62>>>BDC", b"EMC"),
    *(b"% a remark\n", b"/X0 Do", b"1 w f* 9 9 9 9 re W* n", b"12345678901234 0 Td", b"true Tj"),
    *(b"BI /W 1 /H 1 /BPC 8 /CS /G ID x EI", b"/a<</b /c>>BDC", b"--5 0 Td", b"(open"),
)


@pytest.mark.parametrize("seed", range(4))
def test_the_scanner_finds_what_pypdf_finds(seed: int) -> None:
    rng = Random(seed)
    scanned = 0
    for _ in range(150):
        data = b"".join(
            rng.choice(OPERATIONS) + rng.choice((b" ", b"\n", b"\r\n \t"))
            for _ in range(rng.randint(1, 12))
        )
        found = pdf_streams._operations(data, pdf_streams.Work(0))
        if found is None:
            continue  # what is left to pypdf
        scanned += 1
        stream = ContentStream(None, None, "bytes")
        stream.set_data(data)
        expected = [one for one in stream.operations if one[1] in pdf_streams._KEPT]
        assert found == [(operands, operator) for operands, operator in expected], data
    assert scanned > 30


def page_text(data: bytes) -> str:
    """The text that a visitor sees."""
    parts: list[str] = []
    page = PdfReader(io.BytesIO(data)).pages[0]
    page.extract_text(visitor_text=lambda text, *_: parts.append(text))
    return "".join(parts)


@pytest.mark.parametrize("seed", range(3))
def test_pages_read_as_by_pypdf(seed: int) -> None:
    rng = Random(seed)
    for _ in range(25):
        parts = rng.choices(OPERATIONS[:-1], k=rng.randint(5, 60))
        page = re.sub(rb"[ \n]-?(20|83)\(", b"(", b" ".join((b"BT /F1 10 Tf", *parts)))
        data = pdf_file([page])
        alone = page_text(data)
        with pdf_streams.counting(pdf_streams.Work(0)):
            assert page_text(data) == alone, page
        assert page_text(data) == alone


def packed(content: bytes, pages: int = 1) -> bytes:
    return pdf_file([zlib.compress(content)] * pages, "/FlateDecode")


@pytest.mark.parametrize(
    "make",
    [
        lambda: pdf_of_forms(b"BT " + b"(a) Tj " * 10_000),
        lambda: pdf_of_forms(b"1 " * 50_000),
        lambda: pdf_of_forms(b"BI /W 1 ID a EI " + b"1 " * 50_000),
        lambda: packed(b"BT " + b"(a) Tj T* " * 20_000, 9),
        lambda: packed(b"/F9 1 Tf " * 40_000),
        lambda: packed(b"BT [" + b"(a)-500 " * 100_000 + b"]TJ"),
        lambda: packed(b"1 1 l " * 4_000_000),
    ],
    ids=("forms", "numbers", "inline images", "lines", "fonts", "gaps", "paths"),
)
def test_little_that_draws_much_is_refused(make: Callable[[], bytes]) -> None:
    with pytest.raises(DocumentError, match="draws too much on its pages for its size"):
        readers.read_bytes(make(), "a.pdf")
