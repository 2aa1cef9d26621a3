"""EPUB: its chapters in reading order."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from urllib.parse import unquote

from pocketslm.errors import DocumentError
from pocketslm.runtime.assistant.document import Block
from pocketslm.runtime.assistant.readers import html
from pocketslm.runtime.assistant.readers.archive import Archive, parse_xml


def read(data: bytes) -> Iterator[Block]:
    archive = Archive(data)
    package = _package(archive)
    files: dict[str, str] = {}
    spine: list[str] = []

    def start(tag: str, attributes: dict[str, str]) -> None:
        match tag.rpartition(" ")[2]:
            case "item":
                if "html" in attributes.get("media-type", ""):
                    files[attributes.get("id", "")] = attributes.get("href", "")
            case "itemref":
                spine.append(attributes.get("idref", ""))

    parse_xml(archive.read(package), start, count=archive.elements)
    folder = posixpath.dirname(package)
    for reference in dict.fromkeys(spine):
        if href := files.get(reference):
            chapter = posixpath.normpath(posixpath.join(folder, unquote(href)))
            yield from html.read(archive.read(chapter), archive.elements)


def _package(archive: Archive) -> str:
    """The path of the list of contents, as META-INF/container.xml gives it."""
    found: list[str] = []

    def start(tag: str, attributes: dict[str, str]) -> None:
        if tag.endswith("rootfile") and "full-path" in attributes:
            found.append(attributes["full-path"])

    parse_xml(archive.read("META-INF/container.xml"), start, count=archive.elements)
    if not found:
        raise DocumentError("names no package in META-INF/container.xml")
    return found[0]
