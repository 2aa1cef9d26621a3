"""The command line as a person types it."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pocketslm.cli import main, make_parser
from pocketslm.export.heal import HealConfig
from pocketslm.export.prune.folder import PruneConfig
from pocketslm.profiling.devices.bench import Conditions
from pocketslm.runtime.bundle import MANIFEST
from pocketslm.runtime.cli import add_generation, generation_config
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model, Record
from pocketslm.terminal import record_given, without_warnings


def _commands(
    parser: argparse.ArgumentParser, name: str = ""
) -> dict[str, argparse.ArgumentParser]:
    """Every command of a parser by its full name."""
    groups = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
    if not groups:
        return {name.strip(): parser}
    found: dict[str, argparse.ArgumentParser] = {}
    for word, below in groups[0].choices.items():
        found |= _commands(below, f"{name} {word}")
    return found


COMMANDS = _commands(make_parser())
Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code == 0
    assert f"example: pocketslm {command} " in capsys.readouterr().out


def test_every_option_of_generation_arrives() -> None:
    """An option that is parsed and then dropped would do nothing."""
    parser = argparse.ArgumentParser()
    record_given(parser)
    add_generation(parser)
    (group,) = (g for g in parser._action_groups if (g.title or "").startswith("generation"))
    model = SimpleNamespace(defaults=GenerationConfig())
    for action in group._group_actions:
        arguments = parser.parse_args(
            [action.option_strings[-1], "3" if action.type is int else "0.5"]
        )
        assert generation_config(arguments, cast(Model, model)) != model.defaults, action.dest


def test_help_and_version_are_quick_and_light() -> None:
    code = (
        "import sys\nfrom pocketslm.cli import make_parser, main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


USER_ERRORS = {
    "no such records": (["compare", "nowhere", "nowhere"], "cannot read the records nowhere"),
    "bad bandwidth": (["fit", "--ram", "4GB", "--bandwidth", "30GB", "--int8", "1TMAC/s"], "30GB"),
    "no report kind": (["report", "nowhere", "-o", "a.pdf"], "'.pdf', expected one of: .html"),
    "no such checkpoint": (["inspect", "nowhere/model"], "does not exist"),
    "a name that is too long": (["inspect", "x" * 300], ": File name too long"),
    "a document's name that is too long": (["doc", "add", "x" * 300], "ile name too long"),
    "a bundle's name that is too long": (["run", "x" * 300, "hi"], ": File name too long"),
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
    "text and prompt": (["run", "BUNDLE", "-", "--text", "-"], "the prompt or the text, not both"),
    "no text": (["run", "BUNDLE", "hi", "--text", "nowhere"], "nowhere cannot be read"),
    "no log": (["chat", "BUNDLE", "--log", "nowhere/log"], "nowhere/log cannot be written"),
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


# What the options after "|" do nothing beside.
WITHOUT_EFFECT = [
    "fetch --list | NAME",
    "export HF OUT --fit ram=1MB | --weights int4",
    "export HF OUT --fit ram=1MB | --head int8",
    "export HF OUT --fit ram=1MB | --group-size 64",
    "export HF OUT --fit ram=1MB | --grid sym",
    "export HF OUT --fit ram=1MB | --method rtn",
    "export HF OUT --fit ram=1MB | --size-budget 9",
    "export HF OUT --fit ram=1MB | --adapter FOLDER",
    "export HF OUT --fit ram=1MB | --recipe FILE",
    "export HF OUT --fit ram=1MB | --dtype fp16",
    "export HF OUT --fit ram=1MB | --vocabulary-size 9",
    "export HF OUT --fit ram=1MB | --calibration-tokens 9",
    "export HF OUT | --prune",
    "export HF OUT | --trials 16",
    "export HF OUT | --text lee",
    "export HF OUT | --storage URL",
    "export HF OUT | --vocabulary-size 9",
    "export HF OUT | --calibration TEXT",
    "export HF OUT --method hqq | --calibration-tokens 9",
    "export HF OUT --recipe FILE | --weights keep",
    "export HF OUT --recipe FILE | --context 64",
    "export HF OUT --recipe FILE | --target native",
    "export HF OUT --weights float --head float | --group-size 32",
    "export HF OUT --target native | --dtype fp32",
    "export HF OUT --target onnx | --kv-cache int8",
    "prune HF OUT --kv-heads 1 | --by sleb",
    "prune HF OUT --kv-heads 1 | --uniform",
    "prune HF OUT --layers 1 --by last | --tokens 9",
    "prune HF OUT --layers 1 --by last | --text TEXT",
    "heal HF OUT --teacher HF | --stages 2",
    "eval BUNDLE | --seed 0",
    "eval BUNDLE | --sample 9",
    "eval BUNDLE | --save FILE",
    "eval BUNDLE --task FILE | --source HF",
    "eval BUNDLE --task FILE | --window 9",
    "eval BUNDLE --task FILE | --earlier FILE",
    "run BUNDLE hi --raw | --system x",
    "run BUNDLE hi --temperature 0 | --seed 1",
    "doc add a b | --title x",
    "doc ask BUNDLE What? --document - | --library FILE",
    "doc ask BUNDLE What? --document 1 | --password-file FILE",
    "bench BUNDLE | --pin big",
    "bench BUNDLE | --sustained 1",
    "bench BUNDLE | --pause 1",
    "bench BUNDLE | --idle 1",
    "bench BUNDLE | --interval 1",
    "bench BUNDLE | --source HF",
    "bench BUNDLE --device local | --source HF",
    "bench BUNDLE --device local | --peer all",
    "bench BUNDLE --device local | --backend onnx",
    "bench BUNDLE --device local --sustained 1 | -r 5",
    "bench BUNDLE --slimlm | -p 9",
    "bench BUNDLE --documents | -pg 9,9",
    "bench BUNDLE --documents | --slimlm",
    "bench --random qwen3-0.6b | --documents",
    "bench --random qwen3-0.6b | --peer all",
    "fit --ram 4GB --bandwidth 1GB/s --int8 1TMAC/s | -t 2",
    "fit --ram 4GB | --bandwidth 1GB/s",
    "device info local --raw | --json",
]


@pytest.mark.parametrize("line", WITHOUT_EFFECT)
def test_an_option_without_effect_is_refused(
    line: str, tiny_bundle: Path, tiny_hf: Path, tmp_path: Path, capsys: Captured
) -> None:
    places = {"BUNDLE": tiny_bundle, "HF": tiny_hf, "OUT": tmp_path / "out"}
    command, idle = line.split(" | ")
    words = [str(places.get(word, word)) for word in (*command.split(), *idle.split())]
    assert main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "does nothing" in error or "leave out" in error
    assert idle.split()[0] in error


@pytest.mark.parametrize("count", ["0", "-1", "4294967297", "two"])
def test_threads_that_make_no_sense(count: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as end:
        main(["run", "BUNDLE", "hi", "--threads", count])
    assert end.value.code == 2
    assert "expected from 1 to 1024" in capsys.readouterr().err


def test_the_help_states_the_defaults_that_the_library_has() -> None:
    """Options whose default is that of a dataclass have none of their own, but say it."""
    configs = {"prune": PruneConfig(layers=1), "heal": HealConfig(), "bench": Conditions()}
    stated = 0
    for command, config in configs.items():
        for action in COMMANDS[command]._actions:
            told = re.search(r"\(default: ([\d.]+|sleb)\)", action.help or "")
            if told and action.default is None and hasattr(config, action.dest):
                value = getattr(config, action.dest) if action.dest != "layers" else 0
                assert str(value).removesuffix(".0") == told[1], (command, action.dest)
                stated += 1
    assert stated >= 9


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
    document.write_text("A short note about what is due.")
    questions = ["What is the short note about?", "What is due?"]
    ask = ["doc", "ask", bundle, *questions, "--document", str(document), "-n", "4"]
    assert main(ask) == 0
    captured = capsys.readouterr()
    assert captured.out.count("“A short note about what is due.”") == 2
    assert captured.err.count("TTFT") == 2


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
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nagain\n"))
    assert main(["chat", str(tiny_bundle), "-n", "5"]) == 0
    assert capsys.readouterr().err.count("TTFT") == 2


def test_a_chat_is_logged_and_the_log_grows(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log.jsonl"
    for said in ("hello", "ça va?"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(said))
        assert main(["chat", str(tiny_bundle), "-n", "5", "--log", str(log)]) == 0
    messages = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert [message["content"] for message in messages][::2] == ["hello", "ça va?"]


def test_a_text_follows_the_prompt(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def scores(*options: str) -> list[float]:
        assert main(["run", str(tiny_bundle), *options, "-n", "4", "--json"]) == 0
        found: list[float] = json.loads(capsys.readouterr().out)["logprobs"]
        return found

    whole = pytest.approx(scores("Sum up:\n\nA cat sat."), rel=1e-5)
    assert scores("Sum up:") != whole
    (tmp_path / "cat.txt").write_text("A cat sat.")
    assert scores("Sum up:", "--text", str(tmp_path / "cat.txt")) == whole
    monkeypatch.setattr(sys, "stdin", io.StringIO("A cat sat."))
    assert scores("Sum up:", "--text", "-") == whole


def test_a_chat_goes_on_when_its_context_is_full(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """The oldest turns go, a question that is too long is refused, a byte that is no text is none:
    every other question is answered."""
    lines = [b"one " * 20] * 6 + [b"long " * 300, b"not \xff UTF-8", b"last"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(lines))))
    prompts: list[list[dict[str, str]]] = []
    chat = Model.chat

    def seen(self: Model, messages: list[dict[str, str]], config: Any) -> Iterator[Record]:
        prompts.append(list(messages))
        return chat(self, messages, config)

    monkeypatch.setattr(Model, "chat", seen)
    assert main(["chat", str(tiny_bundle), "-n", "5", "--system", "Be brief."]) == 0
    told = capsys.readouterr().err
    assert told.count("TTFT") == 8
    assert "of 256 is full: the oldest" in told
    assert told.count("not answered: ") == 1
    for messages in prompts:
        roles = [message["role"] for message in messages]
        assert roles == ["system", *["user", "assistant"] * (len(roles) // 2 - 1), "user"]
    assert prompts[-1][-1]["content"] == "last"
    assert "long" not in prompts[-1][-3]["content"]


def _shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        f"{sys.executable} -m pocketslm {command}",
        shell=True,
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("inspect BUNDLE > /dev/full", "cannot write the output: No space left on device"),
        ("run BUNDLE - <&-", "standard input is closed, expected a prompt"),
        ("doc rewrite BUNDLE - <&-", "standard input is closed, expected a passage"),
        ("doc summarize BUNDLE --document - <&-", "standard input is closed, expected a document"),
        (r"run BUNDLE - < <(printf 'a\xffb')", "a prompt on standard input is not UTF-8"),
    ],
)
def test_streams_that_fail_are_one_line(command: str, message: str, tiny_bundle: Path) -> None:
    line = command.replace("BUNDLE", str(tiny_bundle)).replace("'", "'\\''")
    done = _shell(f"--version > /dev/null; bash -c '{sys.executable} -m pocketslm {line}'")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"pocketslm: error: {message}")
    assert "Traceback" not in done.stderr


def test_a_chat_without_input_ends(tiny_bundle: Path) -> None:
    assert _shell(f"chat {tiny_bundle} <&-").returncode == 0


def test_a_locale_without_a_character_shows_its_code(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Text.")
    library = f"--library {tmp_path / 'library'}"
    assert _shell(f"doc add {tmp_path / 'a.txt'} --title Grüße {library}").returncode == 0
    done = _shell(f"doc list {library}", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0
    assert r"Gr\xfc\xdfe" in done.stdout


def test_a_file_s_names_cannot_write_on_the_terminal(
    tiny_bundle: Path, tmp_path: Path, capsys: Captured
) -> None:
    evil = "\x1b[2J\nred\u202e\x9b"
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    manifest = json.loads((bundle / MANIFEST).read_text())
    changed = {"name": evil, "notes": [evil], "weights": {evil: 1}}
    (bundle / MANIFEST).write_text(json.dumps(manifest | changed))
    assert main(["inspect", str(bundle)]) == 0
    assert main(["inspect", f"nowhere{evil}"]) == 2
    (tmp_path / "a.txt").write_text("Text.")
    library = ["--library", str(tmp_path / "library")]
    assert main(["doc", "add", str(tmp_path / "a.txt"), "--title", evil, *library]) == 0
    assert main(["doc", "list", *library]) == 0
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert set(text) & set(evil) <= {"\n", *"[2Jred"}
        assert r"\x1b[2J\nred\u202e\x9b" in text
    assert len(shown.err.splitlines()) == 2


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


def test_logging_is_left_as_it_was() -> None:
    logger = logging.getLogger("pocketslm-test")
    try:
        for before in (logging.NOTSET, logging.DEBUG, logging.CRITICAL):
            logging.disable(before)
            with suppress(KeyError), without_warnings():
                assert not logger.isEnabledFor(logging.WARNING)
                raise KeyError
            assert logging.root.manager.disable == before
    finally:
        logging.disable(logging.NOTSET)
