"""The limits of a document. Readers count while they work, so a bomb is refused early."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pocketslm.errors import DocumentError
from pocketslm.runtime.assistant.document import Block

MAX_FILE_BYTES = 128 << 20
MAX_ENCODED_BYTES = 64 << 20  # of a text file, a page or a chapter
MAX_TEXT_CHARACTERS = 16 << 20
MAX_BLOCKS = 1 << 18
# The most tags of a page, or elements of an XML file, in a large and in a small file.
MAX_ELEMENTS, MAX_ELEMENTS_OF_SMALL = 1 << 22, 1 << 20


class BlockCount:
    """Counts blocks and their characters. Raises DocumentError as soon as there are too many."""

    def __init__(self) -> None:
        self._blocks = self._characters = 0

    def add(self, block: Block) -> None:
        self._blocks += 1
        if self._blocks > MAX_BLOCKS:
            raise DocumentError(f"holds more than {MAX_BLOCKS} paragraphs; split it")
        self._characters += len(block.text)
        check_characters(self._characters)


class ElementCount:
    """Counts the tags of a file of ``size`` bytes. Raises DocumentError if there are too many."""

    def __init__(self, size: int) -> None:
        self._count = 0
        self._most = min(MAX_ELEMENTS, max(MAX_ELEMENTS_OF_SMALL, size))

    def add(self) -> None:
        self._count += 1
        if self._count > self._most:
            raise DocumentError(f"holds more than {self._most} tags; split it")


def check_characters(count: int) -> None:
    if count > MAX_TEXT_CHARACTERS:
        raise DocumentError(
            f"holds more than {MAX_TEXT_CHARACTERS >> 20} million characters; split it"
        )


def limited(blocks: Iterable[Block]) -> Iterator[Block]:
    """The blocks that hold text, counted."""
    count = BlockCount()
    for block in blocks:
        if block.text.strip():
            count.add(block)
            yield block
