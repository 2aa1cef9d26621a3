"""Gemma 3 270M from its own GGUF (Q4_K_M): windows, two rotary tables, a vocabulary of 262144."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div

from pocketslm.export.pipeline import export_bundle
from pocketslm.export.recipe import Recipe
from pocketslm.models.catalog import fetch
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.models.reference import load_reference
from pocketslm.models.transformer import Model as Reference
from pocketslm.runtime.backends import open_session
from pocketslm.runtime.bundle import open_bundle
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model
from pocketslm.runtime.tokenizer import load_tokenizer

pytestmark = pytest.mark.real

MAX_KL = 0.01  # nats; what int8 activations cost
MAX_EXECUTORCH_KL = 0.05  # where XNNPACK holds 8-bit blocks with one scale a row
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a small robot who",
    "Water boils at",
    "The three largest cities of Germany are",
)
NEW = 32


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gemma") / "bundle"
    recipe = Recipe(targets=("native", "onnx", "executorch"), context=1024)
    manifest = export_bundle(open_checkpoint(fetch("gemma3-270m")), out, recipe)
    assert any("int6 g16 sym s8 weights take 8 bits in ONNX" in note for note in manifest.notes)
    return out


@pytest.fixture(scope="module")
def reference() -> Reference:
    return load_reference(open_checkpoint(fetch("gemma3-270m")), 1024)


@pytest.fixture(scope="module")
def expected(bundle: Path, reference: Reference, lee_text: Path) -> tuple[np.ndarray, torch.Tensor]:
    """640 tokens of news, past the window of 512, and their log-probabilities."""
    text = lee_text.read_text(encoding="utf-8")[:6000]
    ids = np.array(load_tokenizer(bundle).encode(text, add_special_tokens=True)[:640])
    logits, _ = reference(torch.from_numpy(ids)[None], reference.empty_cache())
    return ids, torch.log_softmax(logits[0], -1)


@pytest.mark.parametrize(
    ("target", "bound"), [("native", MAX_KL), ("onnx", MAX_KL), ("executorch", MAX_EXECUTORCH_KL)]
)
def test_divergence_from_its_weights(
    target: str, bound: float, bundle: Path, expected: tuple[np.ndarray, torch.Tensor]
) -> None:
    ids, right = expected
    session = open_session(open_bundle(bundle, verify=False), target, threads=2)
    first = 0
    if target == "executorch":  # which gives every token's logits one token at a time
        first = 512
        session.forward(ids[:first])
    got = torch.from_numpy(session.forward(ids[first:], all_logits=True))
    # Few rows at a time: the memory of all, which is fresh each time, costs eight times as much.
    rows = zip(got.split(16), right[first:].split(16), strict=True)
    kl = sum(
        float(kl_div(few.log_softmax(-1), true, reduction="sum", log_target=True))
        for few, true in rows
    ) / len(got)
    print(f"\n{target}: KL {kl:.4f} over {len(got)} tokens")
    assert kl <= bound


def test_float_graphs_say_what_pytorch_says(
    reference: Reference, bundle: Path, tmp_path: Path
) -> None:
    """Each of 32 greedy tokens is PyTorch's choice after those before it, and onnxruntime's."""
    recipe = Recipe(weights="float", head="float", targets=("native", "onnx"), context=512)
    export_bundle(open_checkpoint(fetch("gemma3-270m")), tmp_path / "float", recipe)
    opened = open_bundle(tmp_path / "float", verify=False)
    native, onnx = (open_session(opened, target, threads=2) for target in recipe.targets or ())
    tokenizer = load_tokenizer(bundle)
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt, add_special_tokens=True)
        native.truncate(0)
        onnx.truncate(0)
        said, more = list(ids), np.array(ids)
        for _ in range(NEW):
            said.append(int(native.forward(more)[-1].argmax()))
            more = np.array(said[-1:])
        logits, _ = reference(torch.tensor([said]), reference.empty_cache())
        for choices in (
            logits[0].argmax(-1),
            onnx.forward(np.array(said), all_logits=True).argmax(-1),
        ):
            assert said[len(ids) :] == choices[len(ids) - 1 : -1].tolist()


def greedy(bundle: Path, backend: str) -> list[list[int]]:
    model = Model.load(bundle, backend, threads=2)
    config = GenerationConfig(max_new_tokens=NEW, ignore_eos=True)
    return [[r.token for r in model.generate(prompt, config)] for prompt in PROMPTS]


def test_the_runner_says_what_the_library_says(bundle: Path) -> None:
    assert greedy(bundle, "runner") == greedy(bundle, "native")


def test_genai_runs_the_folder_and_generates_the_same(bundle: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    tokenizer, model = load_tokenizer(bundle), og.Model(str(bundle))
    for prompt, ours in zip(PROMPTS, greedy(bundle, "onnx"), strict=True):
        ids = tokenizer.encode(prompt, add_special_tokens=True)
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + NEW, min_length=len(ids) + NEW)
        generator = og.Generator(model, params)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        theirs = [int(token) for token in generator.get_sequence(0)][len(ids) :]
        count = min(len(theirs), len(ours))
        assert count >= NEW - 1
        assert theirs[:count] == ours[:count]


_RUNNER = r"""
import json, sys
from pocketslm.runtime.model import Model
folder, *prompts = sys.argv[1:]
Model.load(folder, "executorch")  # brings ExecuTorch's kernels for language models
from executorch.extension.llm import runner as llm
runner = llm.TextLLMRunner(
    model_path=f"{folder}/model.pte", tokenizer_path=f"{folder}/tokenizer.json"
)
options = llm.GenerationConfig(
    echo=False, max_new_tokens=16, temperature=0.0, num_bos=1, num_eos=0
)
said = []
runner.generate(prompts[0], options, said.append)
print("\n=" + json.dumps("".join(said)))
"""


def test_text_llm_runner_takes_the_program(bundle: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _RUNNER, str(bundle), PROMPTS[2]],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (said,) = (json.loads(line[1:]) for line in done.stdout.split("\n") if line[:1] == "=")
    assert "100 degrees" in said
