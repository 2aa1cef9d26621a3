"""Compile the native operators. Any C++17 compiler will do, and nothing else is needed.

``python -m pocketslm.runtime.ops.build`` builds the shared library; ``--runner`` builds the
program ``pocketslm-run``. ``--target aarch64-linux`` builds it for phones and boards, and other
targets for the computers of developers. The package's
``setup.py`` calls :func:`build_library`; the backend calls :func:`library` on first use, if neither
the package nor the cache holds a library for these sources (:mod:`pocketslm.runtime.ops.built`).
"""

from __future__ import annotations

import argparse
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

from pocketslm.folders import aside
from pocketslm.locks import lock
from pocketslm.runtime.ops.built import (
    HEADERS,
    SOURCES,
    built_library,
    cache_directory,
    host_system,
    is_whole,
    library_name,
    seal,
    source_hash,
    sources,
)

ENGINE = (
    *("api", "attention", "border_slots", "cpu", "generator", "head", "lookup", "model_file"),
    *("places", "probes", "program", "program_llama", "read_plan", "sampler", "session", "slots"),
    *("state", "thread_pool"),
)
GRAMMAR = (
    *(f"grammar/{name}" for name in ("border_grammar", "characters", "constraint", "formats")),
    *(f"grammar/{name}" for name in ("gbnf", "grammar", "json_assertions", "json_schema")),
    *(f"grammar/{name}" for name in ("machine", "numbers", "regex", "token_trie")),
)
COMMON = (*ENGINE, *GRAMMAR)
# For frameworks that load the library: onnxruntime looks for RegisterCustomOps.
BINDINGS = ("bindings/decoder", "bindings/onnxruntime")
RUNNER = ("chat", "engine", "main", "protocol")
# Text to tokens and back, for both.
TEXT = tuple(f"runner/{name}" for name in ("bert", "json", "tokenizer", "unicode", "words"))
# Under sanitizers and by zig, the sources of a group are compiled as one, in half of the time: most
# of it goes into headers. What this machine runs is compiled source by source: each must include
# what it uses, and who changes one waits for that one.
GROUPS = (ENGINE, GRAMMAR, TEXT, tuple(f"runner/{name}" for name in RUNNER))
FLAGS = (
    *("-std=c++17", "-O3", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"),
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
# What implements platform.h.
PLATFORM = {
    "linux": ("platform_posix", "platform_linux"),
    "macos": ("platform_posix", "platform_macos"),
    "windows": ("platform_windows",),
}
# What zig calls each target. On Linux the runner needs no library of the system; the shared library
# is loaded into programs with glibc, of this version or later.
TARGETS = {
    "x86_64-linux": "x86_64-linux-musl",
    "aarch64-linux": "aarch64-linux-musl",
    "x86_64-macos": "x86_64-macos",
    "aarch64-macos": "aarch64-macos",
    "x86_64-windows": "x86_64-windows-gnu",
}
GLIBC = "gnu.2.17"
PROGRAM_ENDS = {"linux": "", "macos": "", "windows": ".exe"}
MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}


class BuildError(RuntimeError):
    """The compiler is missing or failed; the text holds its output."""


@dataclass(frozen=True)
class Toolchain:
    """How to call a compiler for one architecture and system."""

    command: tuple[str, ...]
    machine: str
    system: str = "linux"
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


def find_toolchain(target: str | None = None, *, libc: str = "musl") -> Toolchain:
    """A compiler for ``target``, a name of :data:`TARGETS`; None: this machine.

    ``libc``: the C library of a program for Linux, where zig compiles it.
    """
    if target is not None and target not in TARGETS:
        raise BuildError(f"unknown target {target}; known: {', '.join(TARGETS)}")
    host = f"{MACHINES.get(platform.machine().lower())}-{host_system()}"
    machine, _, system = (target or f"{host_machine()}-{host_system()}").partition("-")
    names = [f"{machine}-linux-gnu-g++"] * (system == "linux")
    # MinGW's g++ keeps AVX registers on a stack that Windows does not align to them.
    if host == f"{machine}-{system}" and system != "windows":
        names = [*os.environ.get("CXX", "").split()[:1], "c++", "g++", "clang++", *names]
    zig = (sys.executable, "-m", "ziglang", "c++")
    has_zig = importlib.util.find_spec("ziglang") is not None
    if has_zig and target is not None:
        # Preferred for a named target: its musl makes small programs that run on old kernels and
        # keep to system calls that an app on Android may make.
        command = (*zig, "-target", TARGETS[target].replace("musl", libc))
        return Toolchain(command, machine, system, is_zig=True)
    for name in names:
        if path := shutil.which(name):
            return Toolchain((path,), machine, system)
    if has_zig:
        return Toolchain(zig, machine, system, is_zig=True)
    tried = f" (tried {', '.join(names)})" if names else ""
    raise BuildError(f"no C++ compiler found{tried}; `pip install ziglang`")


def run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        reason = next(iter(lines or done.stderr.splitlines()[-1:]), "it said nothing")
        raise BuildError(f"{command[0]} failed: {reason.strip()}; run `{' '.join(command)}`")


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
    """Compile and link ``names``, and move the result into place.

    ``kernels``: also the kernels, and what the system gives them. Compiled objects stay in the
    cache, for other programs with the same sources and flags. With ``keep`` they stay in that
    folder, beside which gcov writes.
    """
    # GCC 12 warns in its own intrinsics.
    defaults = [] if toolchain.is_clang else ["-Wno-maybe-uninitialized"]
    if any(flag.startswith("-fsanitize=address") for flag in flags):
        # Checks of addresses as calls: inline ones double the time that kernels take to compile.
        calls = "asan-instrumentation-with-call-threshold=0"
        defaults += ["-mllvm", f"-{calls}"] if toolchain.is_clang else ["--param", calls]
    if toolchain.is_zig:
        defaults += ["-g0"]  # it writes debug information unless told otherwise
    together = toolchain.is_zig or any(flag.startswith("-fsanitize") for flag in flags)
    groups = [group for group in GROUPS if together and set(group) <= set(names)]
    alone = [(name,) for name in names if not any(name in group for group in groups)]
    # Sources that are compiled as one, and their own flags.
    units: list[tuple[tuple[str, ...], tuple[str, ...]]] = [(unit, ()) for unit in groups + alone]
    if kernels:
        units += [((name,), toolchain.kernel_flags(name)) for name in KERNELS[toolchain.machine]]
        units += [((name,), ()) for name in PLATFORM[toolchain.system]]
    # All code of Windows can be loaded anywhere.
    flags = [*flags, *["-fPIC"] * (toolchain.system != "windows")]
    with aside(output.parent) if keep is None else nullcontext(keep) as scratch:
        Path(scratch).mkdir(parents=True, exist_ok=True)
        objects_folder = None if keep or "-isystem" in flags else _objects()

        def compile_unit(unit: tuple[tuple[str, ...], tuple[str, ...]]) -> str:
            names, extra = unit
            paths = [SOURCES / f"{name}.cpp" for name in names]
            options = (*FLAGS, *defaults, *flags, *extra)
            before = [word for path in paths[:-1] for word in ("-include", str(path))]
            compiler = [*toolchain.command, *options, "-I", str(SOURCES), *before]
            compiler += ["-c", str(paths[-1]), "-o"]
            if objects_folder is None:
                target = Path(scratch) / f"{paths[-1].stem}.o"
                run([*compiler, str(target)])
                return str(target)
            key = _key(paths, toolchain, options)
            kept = objects_folder / key[:2] / f"{key}.o"
            kept.parent.mkdir(exist_ok=True)
            with _locked(kept.parent):  # another process may be compiling it
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
        # zig links a reporter of undefined behaviour, too, unless it is told to optimize.
        linker = [*toolchain.command, *flags, *["-O3"] * toolchain.is_zig]
        run([*linker, *objects, *link_flags, "-pthread", "-o", str(linked)])
        seal(linked)
        linked.replace(output)
    return output


OBJECT_DAYS = 14  # an object that nothing used for so long is removed


def _objects() -> Path | None:
    """The folder of compiled objects, without those that nothing used for long.

    They lie in folders by the beginning of their names, which are locked one by one, so that
    processes that compile other things go on. None where nothing can be kept: a wheel may be
    built without a home folder.
    """
    folder = cache_directory() / "objects"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    for path in filter(_unused, folder.rglob("*.o")):
        with _locked(path.parent):
            if _unused(path):
                path.unlink()
    return folder


def _unused(path: Path) -> bool:
    try:
        return path.stat().st_mtime < time.time() - OBJECT_DAYS * 86400
    except FileNotFoundError:  # another process removed it
        return False


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder."""
    held = lock(folder)
    try:
        yield
    finally:
        if held is not None:
            os.close(held)


def _key(paths: Sequence[Path], toolchain: Toolchain, options: Sequence[str]) -> str:
    """What an object depends on: its sources, every header, the compiler and its options."""
    names = [os.path.relpath(path, SOURCES) for path in paths]
    said = json.dumps([names, _version(toolchain.command), toolchain.command[1:], options])
    digest = hashlib.sha256((said + _header_digest()).encode())
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


@functools.cache
def _header_digest() -> str:
    digest = hashlib.sha256()
    for path in sources(*HEADERS):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return done.stdout


def sanitizer_flags(names: str) -> list[str]:
    """For ``-fsanitize=names``; a finding ends the program with a report.

    With -Og they compile in three quarters of the time that -O1 takes, and run no slower.
    """
    return [f"-fsanitize={names}", "-fno-sanitize-recover=all", "-g1", "-Og"]


def build_library(directory: Path, target: str | None = None, sanitize: str | None = None) -> Path:
    """Build the shared library into ``directory``; its name carries the hash of the sources."""
    toolchain = find_toolchain(target, libc=GLIBC)
    suffix = "" if sanitize is None else "-" + sanitize.replace(",", "-")
    output = directory / library_name(toolchain.system, suffix)
    flags = [] if sanitize is None else sanitizer_flags(sanitize)
    link = ["-shared"]
    if sanitize is None and _has_static_libraries(toolchain):
        link += ["-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL"]
    return compile_and_link(output, toolchain, (*COMMON, *TEXT, *BINDINGS), flags, link)


def _has_static_libraries(toolchain: Toolchain) -> bool:
    """Whether the C++ library may become part of ours: 1 MB less in memory than all of it. zig does
    so by itself; some distributions leave out the file."""
    if toolchain.system != "linux" or toolchain.is_zig:
        return False
    ask = [*toolchain.command, "-print-file-name=libstdc++.a"]
    found = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()
    return Path(found).is_absolute()


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
    """Build ``pocketslm-run``, on Linux static unless a sanitizer is asked for."""
    toolchain = find_toolchain(target)
    names = [*COMMON, *TEXT, *(f"runner/{name}" for name in RUNNER)]
    if sanitize is not None:
        return compile_and_link(output, toolchain, names, sanitizer_flags(sanitize), [])
    return build_program(output, toolchain, names)


def build_program(output: Path, toolchain: Toolchain, names: Sequence[str]) -> Path:
    """Build a program of ``names`` and the kernels, on Linux static.

    All programs for Arm are linked alike, because zig compiles the C and C++ libraries again, in
    over a minute, for other flags.
    """
    link = ["-s"]
    if toolchain.system == "linux":
        link += ["-static"]
        if toolchain.machine == "aarch64":
            link += ["-Wl,-z,max-page-size=16384"]  # phones with 16 KB pages
    return compile_and_link(output, toolchain, names, [], link)


def library() -> Path:
    """The library for these sources: from the package, from the cache, or compiled now."""
    return built_library() or build_library(cache_directory())


def runner(target: str | None = None) -> Path:
    """``pocketslm-run`` for a target (see :func:`find_toolchain`) and these sources.

    From the cache, or compiled now.
    """
    name = "-".join(filter(None, ("pocketslm-run", target, source_hash())))
    system = target.partition("-")[2] if target else host_system()
    path = cache_directory() / (name + PROGRAM_ENDS.get(system, ""))
    return path if is_whole(path) else build_runner(path, target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="file (runner) or directory (library)")
    parser.add_argument("--runner", action="store_true", help="build the program pocketslm-run")
    parser.add_argument("--target", help=f"{', '.join(TARGETS)}; default: this machine")
    parser.add_argument("--sanitize", help="address,undefined or thread")
    args = parser.parse_args()
    try:
        if args.runner:
            system = args.target.partition("-")[2] if args.target else host_system()
            path = args.output or Path("pocketslm-run" + PROGRAM_ENDS.get(system, ""))
            built = build_runner(path, args.target, args.sanitize)
        else:
            built = build_library(args.output or cache_directory(), args.target, args.sanitize)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    print(built)
    return 0


if __name__ == "__main__":
    sys.exit(main())
