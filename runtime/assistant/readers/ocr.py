"""Pictures of text, read by the program `tesseract` where it is installed, in its languages.

Formats are those that Tesseract reads. Of a PDF whose pages are pictures, JPEG and raw pixels are
read; other codings, such as that of fax machines, are not.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from typing import Any

from pocketslm.errors import DocumentError
from pocketslm.runtime.assistant.document import Block

PROGRAM = "tesseract"
SECONDS = 120  # for one picture
MISSING = f"is a picture of text, which needs {PROGRAM} ({PROGRAM}-ocr on Debian); phones lack it"
_LAYOUT = "osd"  # what Tesseract lists as a language, but is none
# Components of a pixel -> the magic number of the format of plain pixels, one bit or eight each.
_PLAIN = {("/DeviceGray", 1): b"P4", ("/DeviceGray", 8): b"P5", ("/DeviceRGB", 8): b"P6"}


def available() -> bool:
    return shutil.which(PROGRAM) is not None


def read(data: bytes) -> Iterator[Block]:
    if not available():
        raise DocumentError(MISSING)
    yield from read_picture(data, None)


def read_picture(data: bytes, page: int | None) -> Iterator[Block]:
    """The paragraphs of a picture. Raises DocumentError if Tesseract cannot read it."""
    command = [PROGRAM, "stdin", "stdout", "-l", _languages()]
    try:
        done = subprocess.run(command, input=data, capture_output=True, check=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise DocumentError(f"is a picture that takes more than {SECONDS} s to read") from None
    except (OSError, subprocess.CalledProcessError):
        raise DocumentError(f"is a picture that {PROGRAM} cannot read") from None
    for paragraph in done.stdout.decode("utf-8", "replace").split("\n\n"):
        if text := " ".join(paragraph.split()):
            yield Block(text, 0, page)


def pictures_of(page: Any) -> Iterator[bytes]:
    """The pictures on a page of pypdf in a format that Tesseract reads."""
    for name in _entry(_entry(page, "/Resources"), "/XObject").values():
        found = name.get_object()
        if found.get("/Subtype") != "/Image":
            continue
        filters = found.get("/Filter") or []
        last = filters if isinstance(filters, str) else [*filters, ""][-1]
        plain = _PLAIN.get((str(found.get("/ColorSpace")), int(found.get("/BitsPerComponent", 0))))
        if last == "/DCTDecode":
            yield found.get_data()
        elif plain and last in ("/FlateDecode", "/LZWDecode", "/RunLengthDecode", ""):
            pixels = found.get_data()
            if plain == b"P4":  # in which a one is black
                pixels = bytes(byte ^ 0xFF for byte in pixels)
            size = b"%d %d" % (found["/Width"], found["/Height"])
            yield (
                b" ".join((plain, size, b"" if plain == b"P4" else b"255")).strip() + b"\n" + pixels
            )


def _entry(holder: Any, key: str) -> Any:
    found = holder.get(key)
    return {} if found is None else found.get_object()


@cache
def _languages() -> str:
    """All that are installed."""
    done = subprocess.run([PROGRAM, "--list-langs"], capture_output=True, text=True, check=False)
    listed = done.stdout.split("\n")[1:]
    return "+".join(name for name in listed if name and name != _LAYOUT) or "eng"
