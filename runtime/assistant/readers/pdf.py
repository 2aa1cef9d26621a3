"""PDF by pypdf, page by page."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator

from pocketslm.errors import DocumentError
from pocketslm.runtime.assistant.document import Block
from pocketslm.runtime.assistant.readers.text import BLANK_LINE, split, unwrap

MAX_PAGES = 5000


def read(data: bytes) -> Iterator[Block]:
    try:
        from pypdf import PdfReader, errors
    except ImportError:
        raise DocumentError(
            "is a PDF, which needs pypdf; `pip install pocketslm[assistant]`"
        ) from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # its warnings are not for our users
    try:
        reader = PdfReader(io.BytesIO(data), strict=False)
        if reader.is_encrypted and not reader.decrypt(""):
            raise DocumentError("needs a password; save it without one")
        if (count := len(reader.pages)) > MAX_PAGES:
            raise DocumentError(f"has {count} pages, at most {MAX_PAGES} are read")
        for number in range(1, count + 1):
            text = reader.pages[number - 1].extract_text()
            for paragraph in split(BLANK_LINE, _tidy(text)):
                yield Block(unwrap(paragraph), page=number)
            reader.resolved_objects.clear()  # or memory grows with every page read
    except DocumentError:
        raise
    except GeneratorExit:
        raise
    except errors.DependencyError:
        raise DocumentError(
            "is encrypted, which needs cryptography; `pip install cryptography`, or save it without"
        ) from None
    # pypdf raises many kinds for files that are damaged on purpose, RecursionError among them.
    except Exception as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise DocumentError(f"is a damaged PDF: {reason}") from None


def _tidy(text: str) -> str:
    """Words that a line end had divided, whole again; no lone surrogates."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return re.sub(r"([^\W\d_])-\n([a-zà-ÿ])", r"\1\2", text)
