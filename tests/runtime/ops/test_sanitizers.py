"""The runner under sanitizers: memory, undefined behaviour, data races."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from native_runner import Runner, running
from native_support import (
    mixed_kinds,
    need_sanitizers,
    running_with,
    tiny_config,
    tiny_weights,
)
from program_cases import CASES, ENCODERS, program

import tokenizer_support
from pocketslm.export.lower.native import lower
from pocketslm.export.lower.trace import trace
from pocketslm.runtime.backends.native_library import isa_names
from pocketslm.runtime.ops import build

TOKENS = [i * 37 % 264 for i in range(290)]  # more than one batch, with a tail of every size


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def sanitized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    probe = tmp_path_factory.mktemp(request.param.partition(",")[0])
    need_sanitizers(request.param, probe)
    return build.build_runner(probe / "pocketslm-run", sanitize=request.param)


@pytest.mark.parametrize(
    "style", ["smollm", "qwen35", "gpt4o", "minicpm5", "deepseek3", "gemma", "bert"]
)
def test_no_findings_in_tokenizers(sanitized: Path, style: str, tmp_path: Path) -> None:
    text = tokenizer_support.word_piece() if style == "bert" else tokenizer_support.document(style)
    with running_with(sanitized, text, tmp_path) as runner:
        for text in tokenizer_support.hard_texts(200):
            assert runner.ask(op="encode", prompt=text)["event"] == "encoded"
        assert_no_findings(runner)


def assert_no_findings(runner: Runner) -> None:
    runner.send(op="quit")
    assert runner.process.wait(60) == 0
    assert runner.process.stderr is not None
    assert runner.process.stderr.read() == ""


def test_no_findings(sanitized: Path, chat_model: Path) -> None:
    with running([str(sanitized)]) as runner:
        for isa in isa_names():
            for kv, threads in (("fp16", 3), ("int8", 2)):
                path = str(chat_model)
                loaded = runner.ask(op="load", path=path, threads=threads, isa=isa, kv=kv)
                assert loaded["event"] == "loaded"
                assert runner.ask(op="logits", tokens=TOKENS)["event"] == "logits"
                assert len(runner.generate(tokens=TOKENS[:31], max_tokens=9)[0]) <= 9
        runner.generate(prompt="the \u00e9 <|im_end|>", max_tokens=9, temperature=1.0, top_k=5)
        runner.generate(messages=[{"role": "user", "content": "hi"}], max_tokens=3)
        schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 5}}}
        runner.generate(prompt="a", max_tokens=40, temperature=1.0, json_schema=schema)
        assert runner.ask(op="generate", prompt="a", regex="(?=a)")["event"] == "error"
        assert_no_findings(runner)


def test_slots(sanitized: Path, chat_model: Path, tmp_path: Path) -> None:
    probe = str(Path(__file__).with_name("slots_probe"))
    names = [*build.COMMON, *build.TEXT, probe]
    flags = build.sanitizer_flags("thread" if "thread" in str(sanitized) else "address,undefined")
    built = build.compile_and_link(tmp_path / "probe", build.find_toolchain(None), names, flags, [])
    windows = program("gemma3").write(tmp_path / "windows.slm")
    for model in (chat_model, windows):
        done = subprocess.run([built, model], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_programs(sanitized: Path, tmp_path: Path) -> None:
    """Every feature of a program: batches, single tokens and a ring that is passed."""
    with running([str(sanitized)]) as runner:
        for name in CASES:
            path = str(program(name).write(tmp_path / f"{name}.slm"))
            for kv, isa in (("fp16", isa_names()[0]), ("int8", isa_names()[-1])):
                loaded = runner.ask(op="load", path=path, threads=3, isa=isa, kv=kv)
                assert loaded["event"] == "loaded", loaded
                pieces = [290] if name in ENCODERS else [290, 310, 311, 20]
                for count in pieces:
                    tokens = [i * 37 % 100 for i in range(count)]
                    assert runner.ask(op="logits", tokens=tokens)["event"] == "logits"
        assert_no_findings(runner)


def test_numbers_that_are_not_finite_are_no_finding(sanitized: Path, tmp_path: Path) -> None:
    """Codes of int8 are made of them, which no conversion of theirs may be."""
    config = tiny_config()
    given = tiny_weights(config, mixed_kinds)
    for part, value in (("model.norm", 3e38), ("0.input_layernorm", 1e38), ("model.norm", 1e-38)):
        path = tmp_path / f"{part}-{value}.slm"
        lower(
            trace(config, 640),
            lambda name, shape, part=part, value=value: (
                np.full(shape, value, np.float32) if part in name else given(name, shape)
            ),
            path,
        )
        with running([str(sanitized)]) as runner:
            for isa in isa_names():
                runner.ask(op="load", path=str(path), threads=2, isa=isa, kv="int8")
                answer = runner.ask(op="logits", tokens=list(range(20)), first=0)
                assert ("not finite" in answer.get("message", "")) == (value > 1)
                *_, last = runner.generate(tokens=[1], max_tokens=2)
                assert ("not finite" in last.get("message", "")) == (value > 1)
            assert_no_findings(runner)
