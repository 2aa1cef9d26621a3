"""The checks of the house find what they are for."""

from __future__ import annotations

import house

LINES = [f"value_{number} = {number}" for number in range(house.SAME_LINES)]


def test_a_file_that_is_too_long() -> None:
    assert not [*house.too_long({"a.py": "x\n" * house.MOST_LINES})]
    (finding,) = house.too_long({"a.py": "x\n" * (house.MOST_LINES + 1)})
    assert finding.startswith("a.py: 601 lines, at most 600")


def test_an_import_of_what_stands_behind() -> None:
    assert not [*house.wrong_imports({"export/a.py": "from pocketslm.runtime import model\n"})]
    for code in ("import pocketslm.profiling.bench", "def f():\n  from pocketslm import android"):
        (finding,) = house.wrong_imports({"runtime/a.py": code})
        assert "stands behind it" in finding
    (finding,) = house.wrong_imports({"runtime/a.py": "\nimport torch.nn\n"})
    assert finding.startswith("runtime/a.py:2: imports torch")
    assert not [*house.wrong_imports({"export/a.py": "import torch\n"})]


def test_a_run_of_lines_in_two_places() -> None:
    one = "\n".join(["# a comment", *LINES, "one = 1"])
    other = "\n".join(
        ["other = 1", *(f"    {line}  # no blank\n".split("  #")[0] for line in LINES)]
    )
    assert [*house.copies({"a.py": one, "b.py": other})] == [
        f"a.py:2 and b.py:2 hold the same {house.SAME_LINES} lines"
    ]
    assert [*house.copies({"a.py": "\n".join([*LINES, "between = 1", *LINES])})]
    shorter = "\n".join(LINES[1:])
    assert not [*house.copies({"a.py": one, "b.py": shorter})]
    assert not [*house.copies({"a.py": "x = 1\n" * house.SAME_LINES})]
