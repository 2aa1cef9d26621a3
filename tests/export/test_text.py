"""Texts that models are measured and calibrated on."""

from __future__ import annotations

import bz2
import shutil
from pathlib import Path

import pytest
import torch

from pocketslm.errors import UsageError
from pocketslm.export import calibration_text
from pocketslm.export.calibration_text import calibration_sha256, calibration_windows
from pocketslm.export.text import read_text
from pocketslm.runtime.tokenizer import load_tokenizer

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


@pytest.mark.parametrize("template", [True, False])
def test_the_mix_has_chats_of_the_model_s_template_and_prose(
    template: bool, tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much of each, in turns."""
    model = tmp_path / "model"
    shutil.copytree(tiny_hf, model)
    if template:
        turns = "{% for m in messages %}{{ m.content }} {{ m.role }}\n{% endfor %}"
        (model / "chat_template.jinja").write_text(turns)
    tokenizer = load_tokenizer(model)
    chat = "conversations:\n- - Why?\n  - {}\n- no list\n"
    texts = {"trivia.yml": chat.format("t" * 200), "coding.yml": chat.format("c" * 30)}
    texts |= {"wiki.txt": "W" * 999, "lee.txt": "L" * 999}
    for name, content in texts.items():
        (tmp_path / name).write_text(content)
    paths = {Path(name).stem: tmp_path / name for name in texts}
    monkeypatch.setattr(calibration_text, "resolve", lambda name, *say: paths[name])

    found = calibration_windows("mix", tokenizer, 16 * 8 + 7, 16)
    assert found.shape == (8, 16)
    lines = [tokenizer.decode(row) for row in found.tolist()]
    assert [line.count("W") for line in lines] == [0, 0, 16, 0] * 2
    assert [line.count("L") for line in lines] == [0, 0, 0, 16] * 2
    assert ("assistant" in "".join(lines)) == template
    longer = calibration_windows("mix", tokenizer, 16 * 80, 16)  # what chats lack the others give
    assert torch.bincount(longer.flatten()).topk(2).values.tolist() > [20 * 16, 20 * 16]
    before = calibration_sha256("mix")
    (tmp_path / "lee.txt").write_text("other")
    assert calibration_sha256("mix") != before
    with pytest.raises(UsageError, match=r"lee.txt has \d tokens for calibration, expected"):
        calibration_windows("mix", tokenizer, 16 * 8, 16)
    with pytest.raises(UsageError, match="windows of 16 tokens, expected more than 15"):
        calibration_windows("mix", tokenizer, 15, 16)
