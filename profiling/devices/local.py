"""This machine, through the same runner that a phone executes."""

from __future__ import annotations

from pocketslm.profiling.devices.device import Device
from pocketslm.runtime.ops.built import cache_directory


class LocalDevice(Device):
    """``local``."""

    kind, name, pause_s = "local", "local", 0.0

    def __init__(self) -> None:
        self.folder = str(cache_directory() / "device")

    def command(self, script: str) -> list[str]:
        return ["sh", "-c", script]
