"""What was built of these sources: found and checked without the modules that build it, which are
in :mod:`pocketslm.runtime.ops.build`."""

from __future__ import annotations

import functools
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pocketslm.cache import cache_dir

SOURCES = Path(__file__).resolve().parent
HEADERS = (".def", ".h", ".inl")
LIBRARY_ENDS = {"linux": ".so", "macos": ".dylib", "windows": ".dll"}
SYSTEMS = {"darwin": "macos", "win32": "windows"}

# Every program or library ends with this and the CRC-32 of all bytes before it. Loaders do not
# read it. Without it a file that was cut, as by a loss of power, would crash the process that loads
# it.
SEAL = b"\npocketslm "
_SUM_BYTES = 4


def host_system() -> str:
    return SYSTEMS.get(sys.platform, "linux")


def sources(*suffixes: str) -> Iterator[Path]:
    """All sources whose names end with one of these, in a fixed order."""
    for path in sorted(SOURCES.rglob("*")):
        if path.suffix in suffixes and path.name != "__init__.py":
            yield path


@functools.cache
def source_hash() -> str:
    """Changes with the sources: two checksums, 16 hexadecimal digits."""
    crc, adler = 0, 1
    for path in sources(*HEADERS, ".cpp", ".py"):
        data = path.name.encode() + path.read_bytes()
        crc, adler = zlib.crc32(data, crc), zlib.adler32(data, adler)
    return f"{crc:08x}{adler:08x}"


def seal(path: Path) -> None:
    """Append the file's checksum and write it to the disk."""
    with path.open("r+b") as file:
        checksum = _checksum(file, path.stat().st_size)
        file.write(SEAL + checksum)
        file.flush()
        os.fsync(file.fileno())


def is_whole(path: Path) -> bool:
    """Whether a program or library exists and is as it was built."""
    try:
        size = path.stat().st_size - len(SEAL) - _SUM_BYTES
        with path.open("rb") as file:
            return size > 0 and SEAL + _checksum(file, size) == file.read()
    except OSError:
        return False


def _checksum(file: BinaryIO, size: int) -> bytes:
    """Of the next ``size`` bytes."""
    checksum = 0
    while size > 0 and (data := file.read(min(size, 1 << 16))):
        checksum, size = zlib.crc32(data, checksum), size - len(data)
    return checksum.to_bytes(_SUM_BYTES, "big")


def library_name(system: str | None = None, suffix: str = "") -> str:
    """Of the library for these sources, by default on this system."""
    return f"libpocketslm-{source_hash()}{suffix}{LIBRARY_ENDS[system or host_system()]}"


def cache_directory() -> Path:
    return cache_dir() / "native"


def built_library() -> Path | None:
    """The library for these sources where it lies in the package or the cache."""
    name = library_name()
    places = (SOURCES / "lib" / name, cache_directory() / name)
    return next((path for path in places if is_whole(path)), None)
