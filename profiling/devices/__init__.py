"""The places where a measurement runs: this machine, a board over ssh, a phone over adb."""

from __future__ import annotations

from pocketslm.errors import UsageError
from pocketslm.profiling.devices.device import Device


def open_device(spec: str) -> Device:
    """The device that ``local``, ``ssh:[user@]host[:port]`` or ``adb[:serial]`` names.

    Raises UsageError if it names no device, DeviceError if the device cannot be reached.
    """
    from pocketslm.profiling.devices.adb import AdbDevice
    from pocketslm.profiling.devices.local import LocalDevice
    from pocketslm.profiling.devices.ssh import SshDevice

    kind, _, address = spec.partition(":")
    if spec == "local":
        return LocalDevice()
    if kind == "ssh" and address:
        return SshDevice(address)
    if kind == "adb":
        return AdbDevice(address)
    raise UsageError(
        f"device is {spec!r}, expected local, ssh:[user@]host[:port], adb or adb:SERIAL"
    )
