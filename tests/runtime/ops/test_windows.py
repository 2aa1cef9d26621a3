"""The engine that zig builds for Windows, run by wine. Files for macOS are only compiled."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pocketslm.runtime.backends.native_library import isa_names
from pocketslm.runtime.ops import build, built

Told = Callable[..., bytes]
ASKED = "POCKETSLM_TEST_WINDOWS"
PROMPT = [5, 200, 31, 77, 140, 9, 9, 250, 3, 18, 64]


def need_target(target: str) -> None:
    try:
        build.find_toolchain(target)
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def wine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """Runs a program for Windows with a Windows of its own. Returns what it wrote."""
    program = shutil.which("wine") or shutil.which("wine64")
    if program is None:
        pytest.skip("needs wine: apt-get install wine")
    need_target("x86_64-windows")
    if not os.environ.get(ASKED):
        pytest.skip(f"needs {ASKED}=1: compiling for Windows takes four minutes of CPU at first")
    folder = tmp_path_factory.mktemp("wine") / "prefix"
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {"WINEPREFIX": str(folder), "WINEDEBUG": "-all", "LC_ALL": "C.UTF-8"}
    environment |= {"WINEDLLOVERRIDES": "mscoree,mshtml="}  # it would fetch what they need

    def run(*command: str | Path, text: bytes = b"", status: int = 0) -> bytes:
        done = subprocess.run(
            [program, *command], input=text, env=environment, capture_output=True, check=False
        )
        assert done.returncode == status, done.stderr.decode(errors="replace")[-2000:]
        return done.stdout + (done.stderr if status else b"")

    run("wineboot", "--init")
    yield run
    run("wineboot", "--kill")


@pytest.fixture(scope="module")
def windows_runner(wine: Told) -> Path:
    return build.runner("x86_64-windows")


def lines_of(output: bytes) -> list[dict[str, object]]:
    """The events of a runner, but for what is measured."""
    assert b"\r" not in output
    told = [json.loads(line) for line in output.splitlines()]
    measured = ("load_ms", "prefill_ms", "decode_ms", "compiler")
    return [{k: v for k, v in event.items() if k not in measured} for event in told]


@pytest.mark.parametrize("isa", isa_names())
def test_windows_gives_the_tokens_of_linux(
    isa: str, wine: Told, windows_runner: Path, runner_path: Path, chat_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "März" / "model.slm"  # paths are UTF-8 in the protocol
    path.parent.mkdir()
    shutil.copy(chat_model, path)
    load = {"op": "load", "path": str(path), "threads": 2, "context": 300, "isa": isa}
    sampled = {"temperature": 2.0, "top_p": 0.9, "seed": 3}
    requests = [
        load,
        {"op": "logits", "tokens": PROMPT, "base64": True},
        {"op": "generate", "tokens": PROMPT, "max_tokens": 30, "ignore_eos": True},
        {"op": "generate", "prompt": "the inner é", "max_tokens": 30, **sampled},
        load | {"kv": "int8", "cpus": [0], "pin": True},
        {"op": "generate", "tokens": PROMPT, "max_tokens": 30, "ignore_eos": True},
        load | {"path": "nothing"},
        {"op": "quit"},
    ]
    text = "".join(json.dumps(request) + "\n" for request in requests).encode()
    there = lines_of(wine(windows_runner, "--json", text=text))
    done = subprocess.run([runner_path, "--json"], input=text, capture_output=True, check=True)
    here = lines_of(done.stdout)
    bits, expected = (
        np.frombuffer(base64.b64decode(str(events[1].pop("base64"))), "<f4")
        for events in (there, here)
    )
    if isa == "scalar":  # its exponential is the system's
        np.testing.assert_allclose(bits, expected, rtol=1e-4, atol=1e-5)
    else:
        np.testing.assert_array_equal(bits, expected)
    assert there == here
    assert sum(event["event"] == "token" for event in there) > 60


def test_windows_tells_its_memory_and_refuses_what_it_cannot(
    wine: Told, windows_runner: Path, chat_model: Path
) -> None:
    requests = [{"op": "load", "path": str(chat_model), "cold": True}, {"op": "stats"}]
    text = "".join(json.dumps(request) + "\n" for request in requests).encode()
    refused, stats = lines_of(wine(windows_runner, "--json", text=text))
    assert "cannot drop a file from its page cache" in str(refused["message"])
    assert stats["rss_bytes"]
    assert stats["cpu_ns"]


def test_arguments_and_files_have_any_character(
    wine: Told, windows_runner: Path, runner_path: Path, chat_model: Path, tmp_path: Path
) -> None:
    grammar = tmp_path / "Größe.gbnf"
    grammar.write_text('root ::= "é" [a-z]+', encoding="utf-8")
    options = (chat_model, "-p", "the é", "-n", "9", "-t", "1", "--grammar", grammar)
    here = subprocess.run([runner_path, *options], capture_output=True, check=True).stdout
    assert wine(windows_runner, *options) == here
    assert here.startswith("é".encode())


def test_a_program_in_c_uses_the_library_for_windows(
    wine: Told, runner_path: Path, chat_model: Path, tmp_path: Path
) -> None:
    """The program of the docs, which the linker joins to the DLL."""
    library = build.build_library(tmp_path, "x86_64-windows")
    source = built.SOURCES.parents[1] / "docs" / "reference" / "generate.c"
    program = tmp_path / "generate.exe"
    command = list(build.find_toolchain("x86_64-windows").command)
    command[command.index("c++")] = "cc"
    build.run([*command, str(source), "-I", str(built.SOURCES), str(library), "-o", str(program)])
    options = (chat_model, "-p", "the inner", "-n", "40", "-t", "2")
    here = subprocess.run([runner_path, *options], capture_output=True, check=True).stdout
    assert wine(program, chat_model, "the inner").split() == here.split() != []


@pytest.mark.parametrize("machine", ["aarch64", "x86_64"])
def test_the_files_for_macos_compile(machine: str, tmp_path: Path) -> None:
    need_target(f"{machine}-macos")
    command = build.find_toolchain(f"{machine}-macos").command
    for name in (*build.PLATFORM["macos"], "cpu"):
        output = tmp_path / f"{name}.o"
        flags = (*build.FLAGS, "-Werror", "-I", str(built.SOURCES))
        build.run([*command, *flags, "-c", str(built.SOURCES / f"{name}.cpp"), "-o", str(output)])
        # Mach-O of 64 bits, little-endian.
        assert output.read_bytes()[:4] == bytes.fromhex("cffaedfe")
