"""Turn files into text. Each format has one reader, which yields blocks and refuses hostile files.

Limits apply before time and memory are spent: on the size of the file, on what an archive unpacks
to, and on the number of tags, paragraphs, pages and characters. A reader's time is linear in the
bytes that it reads. If it cannot read a file, it raises a DocumentError of one sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import IO

from pocketslm.errors import DocumentError
from pocketslm.runtime.assistant.document import Block, Source, make_source
from pocketslm.runtime.assistant.readers.limits import MAX_FILE_BYTES, limited

# Takes the bytes of a file; that of PDFs takes a password too.
Reader = Callable[..., Iterable[Block]]

# Kind -> (module of its reader and the reader's name, file name endings).
KINDS = {
    "txt": ("text", (".txt", ".text", ".cor")),
    "log": ("text:read_lines", (".log",)),
    "code": (
        "text:read_lines",
        (
            *(".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".kt", ".js", ".ts", ".go", ".rs"),
            *(".rb", ".sh", ".sql", ".json", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".conf"),
        ),
    ),
    "md": ("markdown", (".md", ".markdown")),
    "html": ("html", (".html", ".htm", ".xhtml")),
    "pdf": ("pdf", (".pdf",)),
    "docx": ("docx", (".docx",)),
    "odt": ("odt", (".odt", ".ott")),
    "rtf": ("rtf", (".rtf",)),
    "pptx": ("pptx", (".pptx",)),
    "xlsx": ("xlsx", (".xlsx", ".xlsm")),
    "csv": ("tables", (".csv", ".tsv")),
    "eml": ("mail", (".eml",)),
    "mbox": ("mail:read_box", (".mbox",)),
    "epub": ("epub", (".epub",)),
    "picture": ("ocr", (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp")),
}


def read_file(path: Path, password: str = "") -> Source:
    """Read the document in a file, whose name tells its kind.

    ``password`` opens a PDF that needs one. Raises DocumentError, of which LockedError asks for a
    password or another one.
    """
    try:
        with path.open("rb") as file:
            return read_stream(file, path.name, password)
    except OSError as error:
        raise DocumentError(f"cannot read {path}: {error.strerror}") from None


def read_stream(file: IO[bytes], name: str, password: str = "") -> Source:
    """Read the document in an open file, which may be a pipe."""
    return read_bytes(file.read(MAX_FILE_BYTES + 1), name, password)


def read_bytes(data: bytes, name: str, password: str = "") -> Source:
    """Read the document in ``data``. ``name`` is its file name, which tells its kind."""
    if len(data) > MAX_FILE_BYTES:
        raise DocumentError(f"{name} is larger than {MAX_FILE_BYTES >> 20} MiB")
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    kind = _kind(data, name)
    module, _, function = KINDS[kind][0].partition(":")
    reader: Reader = getattr(import_module(f"{__name__}.{module}"), function or "read")
    if kind == "pdf":
        reader = partial(reader, password=password)
    try:
        source = make_source(Path(name).stem, kind, limited(reader(data)))
    except DocumentError as error:
        raise type(error)(" ".join(f"{name} {error}".split())) from None
    if not source.chunks:
        raise DocumentError(f"{name} holds no text{_hint(kind)}")
    return source


def _hint(kind: str) -> str:
    """What may be the matter with a file without text."""
    from pocketslm.runtime.assistant.readers import ocr

    if kind != "pdf":
        return ""
    if ocr.available():
        return f"; {ocr.PROGRAM} found none in its pictures either"
    return f"; if it is scanned, install {ocr.PROGRAM}"


def _kind(data: bytes, name: str) -> str:
    """The kind, by the name's ending, or by the first bytes of a PDF or archive."""
    ending = Path(name).suffix.lower()
    kind = next((kind for kind, (_, endings) in KINDS.items() if ending in endings), "")
    begins = "pdf" if data[:1024].lstrip().startswith(b"%PDF-") else ""
    if begins or kind:
        return begins or kind
    if ending and b"\0" in data[:4096]:
        known = " ".join(ending for _, endings in KINDS.values() for ending in endings)
        raise DocumentError(f"{name} is of an unknown kind; known: {known}")
    return "txt"
