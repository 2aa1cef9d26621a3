"""Compile the native operators. Any C++17 compiler will do, and nothing else is needed.

``python -m pocketslm.runtime.ops.build`` builds the shared library; ``--runner`` builds the static
program ``pocketslm-run``, with ``--target aarch64-linux`` for phones and boards. The package's
``setup.py`` calls :func:`build_library`; the backend calls :func:`library`, which compiles on first
use if neither the package nor the cache holds a library for these sources.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from pocketslm.cache import cache_dir
from pocketslm.folders import aside

SOURCES = Path(__file__).resolve().parent
HEADERS = (".def", ".h", ".inl")

COMMON = (
    *("api", "attention", "border_slots", "cpu", "generator", "head", "lookup", "model_file"),
    *("probes", "program", "program_llama", "read_plan", "sampler", "session", "slots", "state"),
    "thread_pool",
    *(f"grammar/{name}" for name in ("border_grammar", "characters", "constraint", "formats")),
    *(f"grammar/{name}" for name in ("gbnf", "grammar", "json_assertions", "json_schema")),
    *(f"grammar/{name}" for name in ("machine", "numbers", "regex", "token_trie")),
)
# For frameworks that load the library: onnxruntime looks for RegisterCustomOps.
BINDINGS = ("bindings/decoder", "bindings/onnxruntime")
RUNNER = ("chat", "engine", "main", "protocol")
# Text to tokens and back, for both.
TEXT = tuple(f"runner/{name}" for name in ("bert", "json", "tokenizer", "unicode", "words"))
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"),
    # Rounding is part of the contract: every path adds and multiplies in the same order.
    *("-ffp-contract=off", "-fno-math-errno"),
)

# One instruction set per file; everything else is compiled for the baseline of the architecture.
KERNELS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "kernels_scalar": (),
        "kernels_avx2": ("-mavx2", "-mfma", "-mf16c"),
        "kernels_avx_vnni": ("-mavx2", "-mfma", "-mf16c", "-mavxvnni"),
        "kernels_avx512_vnni": (
            *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw"),
            *("-mavx512vl", "-mavx512dq", "-mavx512vnni"),
        ),
    },
    "aarch64": {
        "kernels_scalar": (),
        "kernels_neon_dotprod": ("-march=armv8.2-a+fp16+dotprod",),
        "kernels_neon_i8mm": ("-march=armv8.2-a+fp16+dotprod+i8mm",),
    },
}
MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}


class BuildError(RuntimeError):
    """The compiler is missing or failed; the text holds its output."""


@dataclass(frozen=True)
class Toolchain:
    """How to call a compiler for one architecture."""

    command: tuple[str, ...]
    machine: str
    is_zig: bool = False

    @property
    def is_clang(self) -> bool:
        return self.is_zig or "clang" in Path(self.command[0]).name

    def kernel_flags(self, name: str) -> tuple[str, ...]:
        flags = KERNELS[self.machine][name]
        if self.machine == "aarch64" and not self.is_clang:
            # GCC's first scheduling moves loads so early that registers run out: by 5 to 30 %
            # more instructions in the hot loops.
            flags = (*flags, "-fno-schedule-insns")
        if not (self.is_zig and self.machine == "aarch64"):
            return flags
        # zig names CPU features in its own way.
        return tuple(
            f.replace("-march=armv8.2-a", "-mcpu=generic+v8_2a").replace("+fp16", "+fullfp16")
            for f in flags
        )


def host_machine() -> str:
    machine = MACHINES.get(platform.machine().lower())
    if machine is None:
        raise BuildError(f"no native kernels for {platform.machine()}; covered: x86_64, aarch64")
    return machine


def find_toolchain(target: str | None = None) -> Toolchain:
    """A compiler for ``target`` (``x86_64-linux``, ``aarch64-linux``; None: this machine)."""
    machine = host_machine() if target is None else target.partition("-")[0]
    if machine not in KERNELS:
        raise BuildError(f"unknown target {target}; known: x86_64-linux, aarch64-linux")
    native = machine == MACHINES.get(platform.machine().lower())
    names = [f"{machine}-linux-gnu-g++"]
    if native:
        names = [*os.environ.get("CXX", "").split()[:1], "c++", "g++", "clang++", *names]
    zig = importlib.util.find_spec("ziglang") is not None
    if zig and target is not None:
        # Preferred for a named target: its musl makes small programs that run on old kernels and
        # keep to system calls that an app on Android may make.
        command = (sys.executable, "-m", "ziglang", "c++", "-target", f"{machine}-linux-musl")
        return Toolchain(command, machine, is_zig=True)
    for name in names:
        if path := shutil.which(name):
            return Toolchain((path,), machine)
    if zig:
        return Toolchain((sys.executable, "-m", "ziglang", "c++"), machine, is_zig=True)
    raise BuildError(f"no C++ compiler found (tried {', '.join(names)}); `pip install ziglang`")


def run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        reason = next(iter(lines or done.stderr.splitlines()[-1:]), "it said nothing")
        raise BuildError(f"{command[0]} failed: {reason.strip()}; run `{' '.join(command)}`")


def source_hash() -> str:
    return _digest(*HEADERS, ".cpp", ".py")[:16]


@functools.cache
def _digest(*suffixes: str) -> str:
    """The hash of all sources whose names end with one of these."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*")):
        if path.suffix in suffixes and path.name != "__init__.py":
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def compile_and_link(
    output: Path,
    toolchain: Toolchain,
    names: Sequence[str],
    flags: Sequence[str],
    link_flags: Sequence[str],
    *,
    kernels: bool = True,
    keep: Path | None = None,
) -> Path:
    """Compile ``names`` and the kernels side by side, link them, and move the result into place.

    Compiled objects stay in the cache, for other programs with the same sources and flags. With
    ``keep`` they stay in that folder, beside which gcov writes.
    """
    defaults = () if toolchain.is_clang else ("-Wno-maybe-uninitialized",)  # in GCC 12's intrinsics
    if toolchain.is_zig:
        defaults = ("-g0",)  # it writes debug information unless told otherwise
    units: list[tuple[str, tuple[str, ...]]] = [(name, ()) for name in names]
    if kernels:
        units += [(name, toolchain.kernel_flags(name)) for name in KERNELS[toolchain.machine]]
    with aside(output.parent) if keep is None else nullcontext(keep) as scratch:
        Path(scratch).mkdir(parents=True, exist_ok=True)
        objects_folder = None if keep or "-isystem" in flags else _objects()

        def compile_unit(unit: tuple[str, tuple[str, ...]]) -> str:
            name, extra = unit
            source = SOURCES / f"{name}.cpp"
            options = (*FLAGS, *defaults, *flags, *extra)
            compiler = [*toolchain.command, *options, "-I", str(SOURCES), "-c", str(source), "-o"]
            if objects_folder is None:
                target = Path(scratch) / f"{Path(name).name}.o"
                run([*compiler, str(target)])
                return str(target)
            kept = objects_folder / f"{_key(source, toolchain, options)}.o"
            with _locked(kept):  # another process may be compiling it
                if kept.exists():
                    os.utime(kept)
                else:
                    part = kept.with_suffix(".part")
                    run([*compiler, str(part)])
                    part.replace(kept)
            return str(kept)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_unit, units))
        linked = Path(scratch) / output.name
        run([*toolchain.command, *flags, *objects, *link_flags, "-pthread", "-o", str(linked)])
        seal(linked)
        linked.replace(output)
    return output


OBJECT_DAYS = 14  # an object that nothing used for so long is removed


def _objects() -> Path | None:
    """The folder of compiled objects, without those that nothing used for long.

    None where nothing can be kept: a wheel may be built without a home folder.
    """
    folder = cache_directory() / "objects"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    for path in filter(_unused, folder.glob("*.o")):
        with _locked(path):
            if _unused(path):
                path.unlink()
    return folder


def _unused(path: Path) -> bool:
    try:
        return path.stat().st_mtime < time.time() - OBJECT_DAYS * 86400
    except FileNotFoundError:  # another process removed it
        return False


@contextmanager
def _locked(kept: Path) -> Iterator[None]:
    """Hold the lock of an object. A lock serves the objects whose names begin alike, so that there
    are few such files, and they stay."""
    handle = os.open(kept.with_name(f"{kept.name[:2]}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _key(source: Path, toolchain: Toolchain, options: Sequence[str]) -> str:
    """What an object depends on: its source, every header, the compiler and its options."""
    name = os.path.relpath(source, SOURCES)
    said = json.dumps([name, _version(toolchain.command), toolchain.command[1:], options])
    text = said + _digest(*HEADERS)
    return hashlib.sha256(text.encode() + source.read_bytes()).hexdigest()[:32]


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return done.stdout


# Every program or library ends with this and the SHA-256 of all bytes before it. Loaders do not
# read it. Without it a file that was cut, as by a loss of power, would crash the process that loads
# it.
SEAL = b"\npocketslm "


def seal(path: Path) -> None:
    """Append the file's SHA-256 and write it to the disk."""
    with path.open("r+b") as file:
        digest = hashlib.sha256(file.read()).digest()
        file.write(SEAL + digest)
        file.flush()
        os.fsync(file.fileno())


def is_whole(path: Path) -> bool:
    """Whether a program or library exists and is as it was built."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    size = len(data) - len(SEAL) - hashlib.sha256().digest_size
    return size > 0 and data[size:] == SEAL + hashlib.sha256(data[:size]).digest()


def sanitizer_flags(names: str) -> list[str]:
    """For ``-fsanitize=names``; a finding ends the program with a report."""
    return [f"-fsanitize={names}", "-fno-sanitize-recover=all", "-g1", "-O1"]


def build_library(directory: Path, sanitize: str | None = None) -> Path:
    """Build the shared library into ``directory``; its name carries the hash of the sources."""
    toolchain = find_toolchain()
    suffix = "" if sanitize is None else "-" + sanitize.replace(",", "-")
    output = directory / f"libpocketslm-{source_hash()}{suffix}.so"
    flags = [] if sanitize is None else sanitizer_flags(sanitize)
    return compile_and_link(output, toolchain, (*COMMON, *TEXT, *BINDINGS), flags, ["-shared"])


def executorch_library() -> Path:
    """Our operators as kernels of the installed ExecuTorch: from the cache, or compiled now.

    It is linked against :func:`library` and ExecuTorch's own Python module, which must be loaded
    before it.
    """
    spec = importlib.util.find_spec("executorch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("executorch is not installed; `pip install executorch`")
    root = Path(next(iter(spec.submodule_search_locations)))
    module = next(root.glob("extension/pybindings/_portable_lib.*.so"), None)
    if module is None:
        raise BuildError(f"{root} has no extension/pybindings/_portable_lib")
    release = importlib.metadata.version("executorch")
    output = cache_directory() / f"libpocketslm-executorch-{release}-{source_hash()}.so"
    if is_whole(output):
        return output
    include = root / "include"
    flags = [
        *("-isystem", str(include)),
        *("-isystem", str(include / "executorch/runtime/core/portable_type/c10")),
        "-DC10_USING_CUSTOM_GENERATED_MACROS",
    ]
    names = ("bindings/decoder", "bindings/executorch", "bindings/executorch_program")
    link = ["-shared", str(library()), str(module)]
    return compile_and_link(output, find_toolchain(), names, flags, link, kernels=False)


def build_runner(output: Path, target: str | None = None, sanitize: str | None = None) -> Path:
    """Build ``pocketslm-run``, static unless a sanitizer is asked for."""
    toolchain = find_toolchain(target)
    names = [*COMMON, *TEXT, *(f"runner/{name}" for name in RUNNER)]
    flags, link = [], ["-static", "-s"]
    if toolchain.machine == "aarch64":
        link += ["-Wl,-z,max-page-size=16384"]  # phones with 16 KB pages
    if sanitize is not None:
        flags, link = sanitizer_flags(sanitize), []
    return compile_and_link(output, toolchain, names, flags, link)


def cache_directory() -> Path:
    return cache_dir() / "native"


def built_library() -> Path | None:
    """The library for these sources where it lies in the package or the cache."""
    name = f"libpocketslm-{source_hash()}.so"
    places = (SOURCES / "lib" / name, cache_directory() / name)
    return next((path for path in places if is_whole(path)), None)


def library() -> Path:
    """The library for these sources: from the package, from the cache, or compiled now."""
    return built_library() or build_library(cache_directory())


def runner(target: str | None = None) -> Path:
    """``pocketslm-run`` for a target (see :func:`find_toolchain`) and these sources.

    From the cache, or compiled now.
    """
    path = cache_directory() / "-".join(filter(None, ("pocketslm-run", target, source_hash())))
    return path if is_whole(path) else build_runner(path, target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="file (runner) or directory (library)")
    parser.add_argument("--runner", action="store_true", help="build the static pocketslm-run")
    parser.add_argument("--target", help="x86_64-linux or aarch64-linux; default: this machine")
    parser.add_argument("--sanitize", help="address,undefined or thread")
    args = parser.parse_args()
    if args.target and not args.runner:
        parser.error("--target needs --runner")
    try:
        if args.runner:
            path = args.output or Path("pocketslm-run")
            built = build_runner(path, args.target, args.sanitize)
        else:
            built = build_library(args.output or cache_directory(), args.sanitize)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    print(built)
    return 0


if __name__ == "__main__":
    sys.exit(main())
