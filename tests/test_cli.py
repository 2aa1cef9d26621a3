"""The command line as a person types it."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pocketslm.cli import main
from pocketslm.runtime.model import Model, Record

COMMANDS = (
    "fetch",
    "inspect",
    "export",
    "prune",
    "methods",
    "heal",
    "delta",
    "eval",
    "run",
    "chat",
    "doc summarize",
    "doc add",
    "doc list",
    "doc remove",
    "doc ask",
    "doc suggest",
    "doc rewrite",
    "bench",
    "bench-doc",
    "compare",
    "fit",
    "report",
    "device list",
    "device info",
    "device clean",
    "app",
)
Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code == 0
    assert f"example: pocketslm {command} " in capsys.readouterr().out


def test_help_and_version_are_quick_and_light() -> None:
    code = (
        "import sys\nfrom pocketslm.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


USER_ERRORS = {
    "no such records": (["compare", "nowhere", "nowhere"], "cannot read the records nowhere"),
    "bad bandwidth": (["fit", "--ram", "4GB", "--bandwidth", "30GB", "--int8", "1TMAC/s"], "30GB"),
    "no report kind": (["report", "nowhere", "-o", "a.pdf"], "'.pdf', expected one of: .html"),
    "no such checkpoint": (["inspect", "nowhere/model"], "does not exist"),
    "no such bundle": (["run", "nowhere", "hi"], "nowhere is not a bundle folder"),
    "unknown name": (["fetch", "gpt-9"], "'gpt-9' is not in the catalog, expected one of"),
    "no name": (["fetch"], "--list"),
    "bad target": (["export", "HF", "OUT", "--target", "tflite"], "tflite"),
    "not a program": (["run", "TEXT.pte", "hi"], "is not an ExecuTorch program"),
    "not a program to inspect": (["inspect", "TEXT.pte"], "is not an ExecuTorch program"),
    "bad context": (["export", "HF", "OUT", "--context", "1"], "context 1"),
    "nothing to prune": (["prune", "HF", "OUT", "--text", "TEXT"], "nothing to prune"),
    "bad share": (["prune", "HF", "OUT", "--text", "TEXT", "--adaptive", "1.5"], "adaptive is 1.5"),
    "bad bands": (["delta", "HF", "HF", "OUT", "--bands", "2x5"], "'2x5', expected RANKxBITS"),
    "no update": (["export", "smollm2-135m-instruct+nowhere", "OUT"], "nowhere does not exist"),
    "bad zeros": (["prune", "HF", "OUT", "--text", "TEXT", "--sparse", "4:2"], "'4:2', expected"),
    "bad method": (["export", "HF", "OUT", "--method", "magic"], "'magic', expected one of rtn"),
    "no recipe": (["export", "HF", "OUT", "--recipe", "nowhere.toml"], "cannot read nowhere.toml"),
    "bad sampling": (["run", "BUNDLE", "hi", "--top-p", "7"], "top_p is 7.0"),
    "bad window": (["app", "--size", "tiny"], "expected one such as 412x860"),
    "bad backend": (["run", "BUNDLE", "hi", "--backend", "tpu"], "'tpu' is unknown"),
    "prompt too long": (["run", "BUNDLE", "x" * 300], "do not fit the context of 256"),
    "no such device": (["device", "info", "usb:1"], "device is 'usb:1', expected local"),
    "bad ssh address": (["device", "info", "ssh:a@b:c"], "expected [user@]host[:port]"),
    "no document": (["doc", "summarize", "BUNDLE", "--document", "nowhere.txt"], "nowhere.txt"),
    "no room": (["doc", "summarize", "BUNDLE", "-n", "200"], "lower --max-new-tokens"),
    "not a text": (["eval", "BUNDLE", "--source", "HF", "--text", "BUNDLE"], "cannot read"),
    "wrong source": (["eval", "BUNDLE", "--source", "GGUF", "--text", "TEXT"], "SHA-256 differs"),
    "short text": (["eval", "BUNDLE", "--source", "HF", "--text", "TEXT"], "at least one window"),
}


@pytest.mark.parametrize("name", USER_ERRORS)
def test_user_errors_are_one_line(
    name: str,
    tiny_bundle: Path,
    tiny_hf: Path,
    tiny_gguf: Path,
    tmp_path: Path,
    capsys: Captured,
) -> None:
    (tmp_path / "text").write_text("short")
    (tmp_path / "text.pte").write_text("short")
    places = {
        "BUNDLE": tiny_bundle,
        "HF": tiny_hf,
        "GGUF": tiny_gguf,
        "OUT": tmp_path / "out",
        "TEXT": tmp_path / "text",
        "TEXT.pte": tmp_path / "text.pte",
    }
    arguments, message = USER_ERRORS[name]
    status = main([str(places.get(argument, argument)) for argument in arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("pocketslm: error: ")]
    assert status == 2
    assert errors == lines[-1:]
    assert message in errors[0]
    assert not (tmp_path / "out").exists()


def test_from_checkpoint_to_measured_bundle(
    tiny_gguf: Path, tmp_path: Path, capsys: Captured
) -> None:
    bundle = str(tmp_path / "bundle")
    assert main(["inspect", str(tiny_gguf), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "gguf checkpoint"
    assert main(["export", str(tiny_gguf), bundle, "--context", "256", "--json"]) == 0
    exported = json.loads(capsys.readouterr().out)
    assert exported["weights"].keys() == {"int4 g32 min", "fp32"}
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike. " * 20)
    evaluate = ["eval", bundle, "--source", str(tiny_gguf), "--text", str(text)]
    assert main([*evaluate, "--window", "64", "--windows", "2"]) == 0
    assert "mean KL" in capsys.readouterr().out
    assert main(["inspect", bundle, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["quality"]["tokens"] == 128
    assert main(["run", bundle, "Hello", "-n", "8", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert 1 <= len(answer["tokens"]) <= 8
    assert len(answer["logprobs"]) == len(answer["tokens"])
    assert answer["ttft_ms"] > 0
    document = tmp_path / "document.txt"
    document.write_text("A short note.")
    ask = ["doc", "ask", bundle, "What?", "Why?", "--document", str(document), "-n", "4"]
    assert main(ask) == 0
    assert capsys.readouterr().err.count("TTFT") == 2


def test_bench_prints_llama_bench_s_rows(tiny_bundle: Path, capsys: Captured) -> None:
    assert main(["bench", str(tiny_bundle), "-p", "16", "-n", "4", "-r", "2", "-t", "1"]) == 0
    table = capsys.readouterr().out
    assert "pp16" in table
    assert "tg4 @ d16" in table
    options = ["-p", "0", "-n", "4", "-d", "0", "-r", "1", "-t", "1", "-o", "jsonl"]
    assert main(["bench", str(tiny_bundle), *options]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["n_gen"] == 4


def test_sampling_options_sample(tiny_bundle: Path, capsys: Captured) -> None:
    def tokens(*options: str) -> list[int]:
        assert main(["run", str(tiny_bundle), "Hi", "-n", "12", "--json", *options]) == 0
        found: list[int] = json.loads(capsys.readouterr().out)["tokens"]
        return found

    greedy = tokens()
    assert tokens("--temperature", "0") == greedy
    assert tokens("--seed", "1", "--temperature", "3") == tokens(
        "--seed", "1", "--temperature", "3"
    )
    assert tokens("--seed", "1", "--temperature", "3") != greedy
    assert tokens("--top-k", "1") == greedy


def test_chat_reads_a_pipe(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nagain\n"))
    assert main(["chat", str(tiny_bundle), "-n", "5"]) == 0
    assert capsys.readouterr().err.count("TTFT") == 2


def test_ctrl_c_keeps_what_there_is(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """An interrupt in the middle of a stream ends it; the text so far and its timing are shown."""
    generate = Model.generate

    def interrupted(self: Model, *arguments: Any) -> Iterator[Record]:
        yield from itertools.islice(generate(self, *arguments), 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(Model, "generate", interrupted)
    assert main(["run", str(tiny_bundle), "Hi", "-n", "50", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["finish"] == "interrupted"
    assert len(answer["tokens"]) == 3
    monkeypatch.setattr(Model, "generate", lambda *_: _interrupted_at_once())
    assert main(["run", str(tiny_bundle), "Hi"]) == 130
    assert capsys.readouterr().err.strip().endswith("pocketslm: interrupted")


def _interrupted_at_once() -> Iterator[Record]:
    raise KeyboardInterrupt
    yield  # a generator


def test_ctrl_c_is_no_traceback(tiny_bundle: Path) -> None:
    """A real signal to a real process that waits for its reader: one line, status 130."""
    command = [sys.executable, "-m", "pocketslm", "chat", str(tiny_bundle)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs start with the signal ignored, and CI may be one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    assert "Ctrl-C" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors.strip() == "pocketslm: interrupted"
    assert process.returncode == 130


def test_a_closed_pipe_is_no_error(tiny_bundle: Path) -> None:
    command = f"{sys.executable} -m pocketslm inspect {tiny_bundle} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("kind")
    assert done.stderr == ""
