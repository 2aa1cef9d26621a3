"""The numbers of model.slm, read from ``ids.def``, which C++ reads too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

_ENTRY = re.compile(r"^ID\((\w+), (\w+), (\d+)\)", re.M)
_TEXT = Path(__file__).with_name("ids.def").read_text(encoding="utf-8")


def _read(list_name: str) -> Mapping[str, int]:
    return {name: int(number) for of, name, number in _ENTRY.findall(_TEXT) if of == list_name}


ROLE = _read("ROLE")
KIND = _read("KIND")
CODE = _read("CODE")
NORM = _read("NORM")
ACTIVATION = _read("ACTIVATION")
BUFFER = _read("BUFFER")
STATE = _read("STATE")
ATTEND = _read("ATTEND")
NONE = 0xFFFFFFFF  # no such section, or outside the layers; kNone of program.h
