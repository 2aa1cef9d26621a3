"""Mails: sender, recipients, date, subject and text. Attachments are named, not read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from email import message_from_bytes
from email.errors import MessageError
from email.header import decode_header
from email.message import Message

from pocketslm.errors import DocumentError
from pocketslm.runtime.assistant.document import Block
from pocketslm.runtime.assistant.readers import html, text
from pocketslm.runtime.assistant.readers.limits import MAX_ENCODED_BYTES, ElementCount

MAX_PARTS = 30  # how many parts of a mail may hold parts, and how deep they may nest
MAX_LINES = 1 << 20  # each is compared with the end of every part around it
MAX_HEADER_BYTES = 16 << 10  # the standard library's time is not linear in one
SHOWN = ("From", "To", "Cc", "Date")
_SHOWN_CHARACTERS = 500
_FROM_LINE = re.compile(rb"^From .*\n", re.MULTILINE)
_BOUNDARY = re.compile(rb"boundary=", re.IGNORECASE)
# A header that is parsed, with the lines that continue it.
_FIELD = re.compile(
    rb"^(?:content-[a-z-]{1,40}|subject|from|to|cc|date):[^\n]*+(?:\n[ \t][^\n]*+)*+",
    re.MULTILINE | re.IGNORECASE,
)


def read(data: bytes) -> Iterator[Block]:
    """Read one mail."""
    if len(data) > MAX_ENCODED_BYTES:
        raise DocumentError(f"is a mail of more than {MAX_ENCODED_BYTES >> 20} MiB")
    return _mail(data.replace(b"\r\n", b"\n"))


def read_box(data: bytes) -> Iterator[Block]:
    """Read a file of mails, each after a line that begins with "From "."""
    data = data.replace(b"\r\n", b"\n")
    places = [match.span() for match in _FROM_LINE.finditer(data)]
    if not places or data[: places[0][0]].strip():
        raise DocumentError('is no file of mails: it does not begin with "From "')
    ends = [start for start, _ in places[1:]] + [len(data)]
    for (_, begin), end in zip(places, ends, strict=True):
        if data[begin:end].strip():
            yield from _mail(data[begin:end])


def _mail(data: bytes) -> Iterator[Block]:
    _check(data)
    try:
        mail = message_from_bytes(data)
        parts = list(mail.walk())
    except (MessageError, RecursionError, ValueError, LookupError):
        raise DocumentError("is a damaged mail") from None
    yield Block(_header(mail, "Subject") or "(no subject)", 1)
    lines = [f"{name}: {value}" for name in SHOWN if (value := _header(mail, name))]
    if lines:
        yield Block("\n".join(lines))
    for part in _read(mail):
        content = part.get_payload(decode=True)
        if isinstance(content, bytes):
            yield from _body(content, _charset(part), marked=_kind(part) == "text/html")
    for part in parts:
        if name := _file(part):
            yield Block(f"Attachment: {name}")


def _check(data: bytes) -> None:
    """Raise DocumentError if a mail has too many lines or parts, or too long headers, to read in
    time.
    """
    if data.count(b"\n") > MAX_LINES:
        raise DocumentError(f"is a mail of more than {MAX_LINES} lines")
    if len(_BOUNDARY.findall(data)) > MAX_PARTS:
        raise DocumentError(f"is a mail of more than {MAX_PARTS} parts within each other")
    if any(match.end() - match.start() > MAX_HEADER_BYTES for match in _FIELD.finditer(data)):
        raise DocumentError(f"is a mail with a header of more than {MAX_HEADER_BYTES} bytes")


def _read(part: Message) -> Iterator[Message]:
    """The parts to read, in order; of alternatives, the plainest that holds text."""
    if not part.is_multipart():
        if _kind(part) in ("text/plain", "text/html"):
            yield part
        return
    inner = [list(_read(one)) for one in part.get_payload() if isinstance(one, Message)]
    if part.get_content_type() == "multipart/alternative":
        filled = [one for one in inner if any(map(_holds_text, one))]
        filled.sort(key=lambda one: _kind(one[0]) != "text/plain")
        inner = filled[:1]
    for one in inner:
        yield from one


def _holds_text(part: Message) -> bool:
    content = part.get_payload(decode=True)
    return isinstance(content, bytes) and bool(content.strip())


def _body(content: bytes, charset: str, *, marked: bool) -> Iterator[Block]:
    if marked:
        yield from html.parse(text.decode(content, charset), ElementCount(len(content)))
        return
    for paragraph in text.split(text.BLANK_LINE, text.decode(content, charset)):
        yield Block(text.unwrap(paragraph))


def _kind(part: Message) -> str:
    """The kind of a part, if it is text to read."""
    if part.is_multipart() or part.get_content_disposition() == "attachment":
        return ""
    return part.get_content_type()


def _file(part: Message) -> str:
    """The name of an attachment."""
    try:
        name = part.get_filename() or ""
    except (ValueError, LookupError):
        name = ""
    return _decoded(name)


def _charset(part: Message) -> str:
    try:
        return str(part.get_content_charset() or "")
    except (ValueError, LookupError):
        return ""


def _header(mail: Message, name: str) -> str:
    return _decoded(str(mail.get(name, "")))


def _decoded(value: str) -> str:
    """Encoded words of a header as text, on one line."""
    try:
        parts = [
            part.decode(charset or "utf-8", "replace") if isinstance(part, bytes) else part
            for part, charset in decode_header(value)
        ]
    except (ValueError, LookupError, MessageError):
        parts = [value]
    joined = "".join(parts).encode("utf-8", "replace").decode("utf-8")
    return " ".join(joined.split())[:_SHOWN_CHARACTERS]
