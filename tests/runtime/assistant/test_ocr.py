"""Pictures of text, and PDFs whose pages are pictures, read by Tesseract."""

from __future__ import annotations

import io

import pytest
from pypdf import PdfReader, PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject, NumberObject

from pocketslm.errors import DocumentError
from pocketslm.runtime.assistant import readers
from pocketslm.runtime.assistant.readers import ocr
from support_documents import pdf_file

# Letters of 5 by 7 points, row by row.
LETTERS = {
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "D": "11110 10001 10001 10001 10001 10001 11110",
    "M": "10001 11011 10101 10101 10001 10001 10001",
    "Y": "10001 10001 01010 00100 00100 00100 00100",
    " ": "00000 00000 00000 00000 00000 00000 00000",
}
POINT = 4  # pixels
needs_tesseract = pytest.mark.skipif(
    not ocr.available(), reason="needs tesseract: apt-get install tesseract-ocr"
)


def _drawn(text: str) -> tuple[int, int, list[str]]:
    """Width, height and rows of a picture with a margin; "1" is black."""
    margin = ["0" * (6 * len(text) + 8)] * 6
    letters = [LETTERS[letter].split() for letter in text]
    rows = ["0000" + "".join(f"{letter[at]}0" for letter in letters) + "0000" for at in range(7)]
    large = [
        "".join(point * POINT for point in row)
        for row in (*margin, *rows, *margin)
        for _ in range(POINT)
    ]
    return len(large[0]), len(large), large


def _gray(text: str) -> tuple[int, int, bytes]:
    width, height, rows = _drawn(text)
    return width, height, bytes(255 - 255 * int(point) for row in rows for point in row)


def _scan(width: int, height: int, bits: int, pixels: bytes) -> bytes:
    """A PDF of one page without text, with a picture of gray pixels."""
    writer = PdfWriter(PdfReader(io.BytesIO(pdf_file([""]))))
    plain = DecodedStreamObject()
    plain.set_data(pixels)
    image = plain.flate_encode()
    for key, value in (("Width", width), ("Height", height), ("BitsPerComponent", bits)):
        image[NameObject(f"/{key}")] = NumberObject(value)
    image[NameObject("/Subtype")] = NameObject("/Image")
    image[NameObject("/ColorSpace")] = NameObject("/DeviceGray")
    pictures = DictionaryObject({NameObject("/Im1"): writer._add_object(image)})
    writer.pages[0]["/Resources"][NameObject("/XObject")] = pictures  # type: ignore[index]
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


@needs_tesseract
def test_a_picture_of_text_is_read() -> None:
    width, height, pixels = _gray("MAY DAY")
    picture = b"P5 %d %d 255\n" % (width, height) + pixels
    source = readers.read_bytes(picture, "note.png")
    assert (source.kind, source.text) == ("picture", "MAY DAY")
    with pytest.raises(DocumentError, match="holds no text"):
        readers.read_bytes(b"P5 %d %d 255\n" % (width, height) + b"\xff" * len(pixels), "a.png")


@needs_tesseract
@pytest.mark.parametrize("bits", [1, 8])
def test_a_scanned_pdf_is_read(bits: int) -> None:
    width, height, pixels = _gray("MAY DAY")
    if bits == 1:
        points = "".join(row.ljust(-(-width // 8) * 8, "0") for row in _drawn("MAY DAY")[2])
        pixels = bytes(int(points[at : at + 8], 2) ^ 0xFF for at in range(0, len(points), 8))
    source = readers.read_bytes(_scan(width, height, bits, pixels), "scan.pdf")
    assert (source.text, source.chunks[0].page) == ("MAY DAY", 1)


def test_without_tesseract_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocr, "PROGRAM", "no-such-program")
    with pytest.raises(DocumentError, match="is a picture of text, which needs"):
        readers.read_bytes(b"\x89PNG", "a.png")
