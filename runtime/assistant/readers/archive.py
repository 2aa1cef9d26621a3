"""Zip archives and the XML in them, from people who may mean harm."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable
from xml.parsers import expat

from pocketslm.errors import DocumentError

MAX_MEMBERS = 10_000
MAX_UNPACKED_BYTES = 128 << 20
MAX_DEPTH = 256


class Archive:
    """A zip file of which at most MAX_UNPACKED_BYTES are ever unpacked, whatever it declares."""

    def __init__(self, data: bytes) -> None:
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, ValueError, EOFError, OverflowError, NotImplementedError):
            raise DocumentError("is not a whole zip archive") from None
        if len(self._zip.infolist()) > MAX_MEMBERS:
            raise DocumentError(f"holds more than {MAX_MEMBERS} files")
        self._left = MAX_UNPACKED_BYTES

    def names(self) -> list[str]:
        return self._zip.namelist()

    def read(self, name: str) -> bytes:
        """A member; DocumentError where there is none, it is damaged, locked or a bomb."""
        try:
            with self._zip.open(name) as member:
                data = member.read(self._left + 1)
        except KeyError:
            raise DocumentError(f"lacks {name}") from None
        except RuntimeError:  # zipfile's for an encrypted member
            raise DocumentError("is locked by a password; save it without one") from None
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, ValueError):
            raise DocumentError(f"has a damaged {name}") from None
        self._left -= len(data)
        if self._left < 0:
            raise DocumentError(f"unpacks to more than {MAX_UNPACKED_BYTES >> 20} MiB")
        return data


def parse_xml(
    data: bytes,
    start: Callable[[str, dict[str, str]], None],
    end: Callable[[str], None] = lambda tag: None,
    text: Callable[[str], None] = lambda text: None,
) -> None:
    """Stream XML to callbacks, with tags and attributes as "namespace name" (no tree is built).

    Raises DocumentError for what is not well-formed, declares entities (as a billion laughs does,
    and no document of an office program) or nests deeper than MAX_DEPTH.
    """
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    depth = 0

    def opened(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_DEPTH:
            raise DocumentError(f"nests XML deeper than {MAX_DEPTH}")
        start(tag, attributes)

    def closed(tag: str) -> None:
        nonlocal depth
        depth -= 1
        end(tag)

    def declared(*_: object) -> None:
        raise DocumentError("declares XML entities, which no honest document needs")

    parser.StartElementHandler, parser.EndElementHandler = opened, closed
    parser.CharacterDataHandler, parser.EntityDeclHandler = text, declared
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise DocumentError(f"holds damaged XML: {error}") from None
