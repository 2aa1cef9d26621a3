"""The checks of the packaging: they pass, and each sees what it is there for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pocketslm.android import check
from pocketslm.android.stage import stage


@pytest.mark.parametrize("one", check.CHECKS, ids=lambda one: one.__name__)
def test_check(one: Callable[[], str]) -> None:
    try:
        assert one()
    except check.Skipped as reason:
        pytest.skip(str(reason))


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the packaging files, to break."""
    folder = tmp_path / "android"
    for name in ("java", "stubs", "manifest", "recipes"):
        shutil.copytree(check.HERE / name, folder / name)
    shutil.copy(check.HERE / "buildozer.spec", folder)
    monkeypatch.setattr(check, "HERE", folder)
    return folder


@pytest.mark.parametrize(
    ("one", "file", "old", "new", "message"),
    [
        (check.check_spec, "buildozer.spec", "arm64-v8a,", "", "android.archs"),
        (check.check_spec, "buildozer.spec", "permissions =", "permissions = INTERNET", "empty"),
        (check.check_spec, "buildozer.spec", "android.add_src = java", "android.add_src = x", "x"),
        (check.check_spec, "buildozer.spec", "android.api", "android.appi", "does not know"),
        (check.check_requirements, "buildozer.spec", "kivy==2.3.1", "kivy==2.0.0", "builds 2.3.1"),
        (check.check_requirements, "buildozer.spec", "pypdf==7.1.0", "pypdf", "not pinned"),
        (check.check_requirements, "buildozer.spec", "six==", "tokenizers==1,six==", "no recipe"),
        (check.check_manifest, "manifest/extra.xml", 'tools:node="remove"', "", "asks for"),
        (check.check_manifest, "manifest/intent_filters.xml", ".SEND", ".X", "no SEND"),
        (check.check_java, "java/org/pocketslm/ScreenReader.java", "return true;", "", "missing"),
        (check.check_imports, "buildozer.spec", ",pypdf==7.1.0", "", "pypdf is not required"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fault_is_seen(
    broken: Path, one: Callable[[], str], file: str, old: str, new: str, message: str
) -> None:
    text = (broken / file).read_text()
    assert old in text
    (broken / file).write_text(text.replace(old, new))
    try:
        with pytest.raises(AssertionError, match=message):
            one()
    except check.Skipped as reason:
        pytest.skip(str(reason))


def test_the_staged_app_needs_nothing_that_a_phone_lacks(tmp_path: Path) -> None:
    """It is imported from its folder alone, where what has no recipe cannot be imported."""
    folder = stage(tmp_path / "app")
    names = ("torch", "transformers", "onnxruntime", "tokenizers", "psutil", "gguf", "safetensors")
    code = f"""
import sys
sys.path[:0] = [{str(folder)!r}]
# An editable install would fill in what the folder lacks.
sys.meta_path = [one for one in sys.meta_path if "editable" not in repr(one).lower()]
for name in {names!r}:
    sys.modules[name] = None
import pocketslm
assert pocketslm.__file__.startswith({str(folder)!r})
from pocketslm.android.intents import propose
from pocketslm.android.engine import models, meter, worker, open_model
from pocketslm.android import settings, strings
from pocketslm.runtime.assistant import assistant, library, readers
from pocketslm.runtime.assistant.readers import docx, epub, html, markdown, pdf, text
from pocketslm.runtime.backends import runner
from pocketslm.runtime.tokenizer import load_tokenizer
assert assistant.sample_document().exists()
assert strings.translate("ar", "library")
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
