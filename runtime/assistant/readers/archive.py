"""Read zip archives and the XML in them, which may be hostile."""

from __future__ import annotations

import io
import lzma
import posixpath
import struct
import zipfile
import zlib
from collections.abc import Callable
from xml.parsers import expat

from pocketslm.errors import DocumentError
from pocketslm.runtime.assistant.readers.limits import ElementCount

MAX_MEMBERS = 10_000
# The most that a large and a small archive may unpack to. Office programs pack to a tenth.
MAX_UNPACKED_BYTES, MAX_UNPACKED_OF_SMALL = 128 << 20, 48 << 20
MAX_DEPTH = 256
MAX_NAMESPACE_CHARACTERS = 1000  # every tag carries its namespace

# What zipfile raises for a damaged member, depending on its compression; OSError beside it.
DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, ValueError, OverflowError, NotImplementedError),
)
_DAMAGE = (*DAMAGE, OSError)  # bzip2's; none of the system's, where all is in memory


class Archive:
    """A zip file that unpacks only so many bytes, whatever it declares.

    ``elements`` counts the elements of all XML and pages in the archive together.
    """

    def __init__(self, data: bytes) -> None:
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except _DAMAGE:
            raise DocumentError("is not a whole zip archive") from None
        if len(self._zip.infolist()) > MAX_MEMBERS:
            raise DocumentError(f"holds more than {MAX_MEMBERS} files")
        self._most = min(MAX_UNPACKED_BYTES, max(MAX_UNPACKED_OF_SMALL, 16 * len(data)))
        self._left = self._most
        self.elements = ElementCount(len(data))

    def names(self) -> list[str]:
        return self._zip.namelist()

    def read(self, name: str) -> bytes:
        """Read a member. Raises DocumentError if it is missing, damaged, locked or a bomb."""
        try:
            with self._zip.open(name) as member:
                data = member.read(self._left + 1)
        except KeyError:
            raise DocumentError(f"lacks {name}") from None
        except _DAMAGE:
            raise DocumentError(f"has a damaged {name}") from None
        except RuntimeError:  # zipfile's for an encrypted member
            raise DocumentError("needs a password; save it without one") from None
        self._left -= len(data)
        if self._left < 0:
            raise DocumentError(f"unpacks to more than {self._most >> 20} MiB")
        return data


def parse_xml(
    data: bytes,
    start: Callable[[str, dict[str, str]], None],
    end: Callable[[str], None] = lambda tag: None,
    text: Callable[[str], None] = lambda text: None,
    *,
    count: ElementCount | None = None,
) -> None:
    """Stream XML to callbacks, with tags and attributes as "namespace name" (no tree is built).

    ``count`` counts the elements of a file with several XML parts. Raises DocumentError for XML
    that is not well-formed, nests deeper than MAX_DEPTH, has too many elements, or makes much out
    of little, as "billion laughs" does and no office program: by entities, attributes with
    defaults, or long namespaces.
    """
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    depth, count = 0, count or ElementCount(len(data))

    def opened(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        count.add()
        depth += 1
        if depth > MAX_DEPTH:
            raise DocumentError(f"nests XML deeper than {MAX_DEPTH}")
        start(tag, attributes)

    def closed(tag: str) -> None:
        nonlocal depth
        depth -= 1
        end(tag)

    def declared(*_: object) -> None:
        raise DocumentError("declares XML entities or attributes, which no honest document needs")

    def namespace(prefix: str | None, name: str | None) -> None:
        if len(name or "") > MAX_NAMESPACE_CHARACTERS:
            raise DocumentError(f"has a namespace of more than {MAX_NAMESPACE_CHARACTERS} letters")

    parser.StartElementHandler, parser.EndElementHandler = opened, closed
    parser.CharacterDataHandler, parser.StartNamespaceDeclHandler = text, namespace
    parser.EntityDeclHandler = parser.AttlistDeclHandler = declared
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise DocumentError(f"holds damaged XML: {error}") from None
    except (LookupError, ValueError):  # of the encoding that it declares
        raise DocumentError("is XML in an unknown encoding; save it as UTF-8") from None


def relation_of(attributes: dict[str, str]) -> str:
    """The id by which an element names a part."""
    return next((value for key, value in attributes.items() if key.endswith(" id")), "")


def relations(archive: Archive, part: str) -> dict[str, str]:
    """The parts of an office file that another part names: id -> path."""
    folder, name = posixpath.split(part)
    found: dict[str, str] = {}

    def start(tag: str, attributes: dict[str, str]) -> None:
        if tag.endswith("Relationship") and attributes.get("TargetMode") != "External":
            target = attributes.get("Target", "")
            path = posixpath.join("/", folder, target).lstrip("/")
            found[attributes.get("Id", "")] = posixpath.normpath(path)

    parse_xml(archive.read(f"{folder}/_rels/{name}.rels"), start, count=archive.elements)
    return found
