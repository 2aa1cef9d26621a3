"""What the app remembers beside its library: one JSON file, replaced whole at every change."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pocketslm.folders import written

DEFAULTS: dict[str, Any] = {
    "theme": "light",
    "language": "en",
    "text_size": "normal",
    "sort": "added",
    "engine": "auto",
    "threads": 0,  # 0: the engine decides
    "model": "",
    "embedders": [],  # the models that find by meaning
    "measured": {},  # model name -> {"prefill", "decode"} in tokens/s
    "screen": "library",
    "document": 0,
    "drafts": {},  # document -> what was typed and not yet sent
    "pending": None,  # a task that runs: {"document", "task", "request", "text"}
}
# How large text is drawn, beside the system's own setting.
TEXT_SIZES = {"small": 0.87, "normal": 1.0, "large": 1.2, "largest": 1.45}
# What the library's documents are sorted by.
SORTS = ("added", "title", "kind")
_CHOICES: dict[str, Collection[str]] = {
    "theme": ("light", "dark"),
    "language": ("en", "de", "ar"),
    "text_size": TEXT_SIZES,
    "sort": SORTS,
    "engine": ("auto", "native", "runner", "onnx", "onnx_aar"),
}


class Settings:
    """Values by name; a file that is missing, cut short or strange gives the defaults.

    ``begins``: what a first start has instead of the defaults, where the app offers it.
    """

    def __init__(self, path: Path, begins: Mapping[str, str] = MappingProxyType({})) -> None:
        self._path = path
        self._values = dict(DEFAULTS)
        self._values |= {name: value for name, value in begins.items() if value in _CHOICES[name]}
        self._watchers: list[Callable[[str], None]] = []
        try:
            data = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            data = {}
        for name, default in list(self._values.items()):
            value = data.get(name, default) if isinstance(data, dict) else default
            same = default is None or type(value) is type(default)
            if same and value in _CHOICES.get(name, (value,)):
                self._values[name] = value
        earlier = data.get("embedder") if isinstance(data, dict) else None
        if isinstance(earlier, str) and earlier and not self._values["embedders"]:
            self._values["embedders"] = [earlier]

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if self._values[name] == value:
            return
        self._values[name] = value
        self.save()
        for watcher in self._watchers:
            watcher(name)

    def watch(self, watcher: Callable[[str], None]) -> None:
        """Call with the name of a value when it has changed."""
        self._watchers.append(watcher)

    def save(self) -> None:
        """Written aside, then renamed: a crash leaves the old file or the new one."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with written(self._path) as part:
            part.write_text(json.dumps(self._values, ensure_ascii=False, indent=1), "utf-8")
