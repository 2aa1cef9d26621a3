"""Texts that models are measured on: plain files, and the prose of a Wikipedia dump."""

from __future__ import annotations

import bz2
from pathlib import Path

import pytest

from pocketslm.errors import UsageError
from pocketslm.export.text import read_text

LONG = "The {{cite|x}}''sea'' is [[Salt|salty]] &amp; wide. " * 12
DUMP = f"""<mediawiki><page><title>Sea</title><revision><text xml:space="preserve">
== Waters ==
{LONG}
* a list item that is no prose
</text></revision></page>
<page><title>Moved</title><text>#REDIRECT [[Sea]]</text></page></mediawiki>"""


def test_a_dump_is_read_as_its_prose(tmp_path: Path) -> None:
    path = tmp_path / "wiki.xml.bz2"
    path.write_bytes(bz2.compress(DUMP.encode()))
    assert read_text(path).strip() == ("The sea is salty & wide. " * 12).strip()


@pytest.mark.parametrize("content", [b"no bz2", bz2.compress(b"<mediawiki/>"), b""])
def test_what_is_no_dump_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "wiki.xml.bz2"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="cannot read"):
        read_text(path)
