"""SmolLM2-135M as shipped: quality, agreement of paths, memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from native_runner import running

from pocketslm.export.lower.native import lower
from pocketslm.export.lower.native_chat import chat_parts
from pocketslm.export.lower.native_tokenizer import pack_tokenizer
from pocketslm.export.lower.trace import trace
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.models.reference import load_reference
from pocketslm.runtime.backends.native import NativeModel
from pocketslm.runtime.backends.native_library import isa_names
from pocketslm.runtime.tokenizer import load_tokenizer_files

pytestmark = pytest.mark.real

MAX_KL = 0.005  # nats, against the source's weights in fp32
MAX_EXTRA_BYTES = 45_000_000  # resident beyond the weights, with 512 tokens of context
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time",
    "Water boils at",
    "Der schnelle braune Fuchs",
    "1, 2, 3, 4,",
    "Dear Sir or Madam,",
    "The three primary colours are",
]


@pytest.fixture(scope="module")
def model_path(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("real") / "model.slm"
    checkpoint = open_checkpoint(smollm2_gguf)
    files = checkpoint.tokenizer_files()
    tokenizer, reason = pack_tokenizer(files["tokenizer.json"])
    assert tokenizer is not None, reason
    chat, reason = chat_parts(load_tokenizer_files(files))
    assert not reason
    weights = lambda name, shape: checkpoint.weight(name)  # noqa: E731
    report = lower(trace(checkpoint.config, 2048), weights, path, tokenizer=tokenizer, chat=chat)
    assert not report.rounded_scales
    assert report.kinds == {"int4 g32 min": 210, "int8 g32 sym": 1}
    return path


@pytest.fixture(scope="module")
def prompts(model_path: Path, runner_path: Path) -> list[list[int]]:
    with running([str(runner_path)]) as runner:
        runner.ask(op="load", path=str(model_path), threads=1, context=64)
        return [runner.ask(op="encode", prompt=text)["tokens"] for text in PROMPTS]


@pytest.fixture(scope="module")
def expected(
    model_path: Path, smollm2_gguf: Path, lee_text: Path, runner_path: Path
) -> tuple[np.ndarray, torch.Tensor]:
    """512 tokens of news, and their log-probabilities in fp32."""
    text = lee_text.read_text(encoding="utf-8")[:4000]
    with running([str(runner_path)]) as runner:
        runner.ask(op="load", path=str(model_path), threads=1, context=64)
        tokens = np.array(runner.ask(op="encode", prompt=text)["tokens"][:512])
    with torch.no_grad():
        reference = load_reference(open_checkpoint(smollm2_gguf), 512)
        logits, _ = reference(torch.tensor(tokens[None]), reference.empty_cache())
    return tokens, torch.log_softmax(logits[0], -1)


@pytest.mark.parametrize("kv_type", ["fp16", "int8"])
def test_divergence_from_fp32(
    kv_type: str, model_path: Path, expected: tuple[np.ndarray, torch.Tensor]
) -> None:
    tokens, right = expected
    session = NativeModel(model_path).session(threads=2, kv_type=kv_type, context=512)
    actual = torch.log_softmax(torch.tensor(session.forward(tokens, all_logits=True)), -1)
    divergence = (right.exp() * (right - actual)).sum(-1).mean().item()
    assert divergence <= MAX_KL


def test_paths_and_threads_give_the_same_tokens(model_path: Path, prompts: list[list[int]]) -> None:
    model = NativeModel(model_path)

    def generate(isa: str, threads: int) -> list[list[int]]:
        session = model.session(isa=isa, threads=threads, context=64)
        answers = []
        for prompt in prompts:
            session.truncate(0)
            tokens = [int(session.forward(np.array(prompt))[0].argmax())]
            for _ in range(11):
                tokens.append(session.step_greedy(tokens[-1]))
            answers.append(tokens)
        return answers

    best = generate(isa_names()[0], 1)
    assert generate(isa_names()[0], 2) == best
    for isa in isa_names()[1:]:
        if isa != "scalar":  # too slow here for the whole model; tiny models cover it
            assert generate(isa, 2) == best


def test_arm_gives_the_same_tokens(
    model_path: Path, prompts: list[list[int]], arm_runner_path: Path, runner_path: Path
) -> None:
    arm = ["qemu-aarch64-static", "-cpu", "max", str(arm_runner_path)]
    answers = []
    for command in ([str(runner_path)], arm):
        with running(command) as runner:
            runner.ask(op="load", path=str(model_path), threads=2, context=64)
            answers.append([runner.generate(tokens=p, max_tokens=3)[0] for p in prompts])
    assert answers[0] == answers[1]


def test_peak_memory(model_path: Path, runner_path: Path) -> None:
    with running([str(runner_path)]) as runner:
        loaded = runner.ask(op="load", path=str(model_path), threads=2, context=512)
        runner.ask(op="bench", prompt_tokens=448, new_tokens=64, repeats=1)
        peak = runner.ask(op="stats")["peak_rss_bytes"]
    assert peak <= loaded["file_bytes"] + MAX_EXTRA_BYTES
