"""The package as programs use it, and its page of documentation as it is written."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import pocketslm
from pocketslm import GenerationConfig, Model
from pocketslm.errors import UsageError

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "python.md"


@pytest.fixture
def model(tiny_bundle: Path) -> Model:
    return Model.load(tiny_bundle, "native", threads=1)


# Modules that make a process larger, and that text from the native engine can do without.
HEAVY = """
torch transformers kivy onnx onnxruntime tokenizers jinja2 numpy hashlib secrets random tempfile
shutil subprocess socket asyncio argparse logging zipfile platform importlib.metadata
importlib.resources concurrent.futures pocketslm.folders pocketslm.runtime.ops.build
pocketslm.runtime.sampling
"""
MAKES_TEXT = """
import sys
from pocketslm import Model
with Model.load(sys.argv[1], "native", threads=1, verify=False) as model:
    ids = model.tokenize("the inner voice")
    made = list(model.generate(ids, model.options(max_new_tokens=5, %s)))
    assert made and model.detokenize([one.token for one in made])
print(*sys.modules)
"""


@pytest.mark.parametrize(
    "options",
    [
        "ignore_eos=True",
        "temperature=0.8, logprobs=True, repetition_penalty=1.2, stop='x'",
        "regex='[a-z ]+'",
    ],
)
def test_text_is_made_without_heavy_modules(tiny_bundle: Path, options: str) -> None:
    command = [sys.executable, "-c", MAKES_TEXT % options, str(tiny_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "pocketslm.runtime.backends.native" in loaded
    assert not loaded & set(HEAVY.split())


def test_the_package_is_light() -> None:
    light = "import pocketslm, sys; assert not {'numpy', 'jinja2'} & set(sys.modules)"
    whole = "from pocketslm import Model; import sys; assert 'torch' not in sys.modules"
    for program in (light, whole):
        subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        pocketslm.Nothing  # noqa: B018


def test_options_change_the_models_own(model: Model) -> None:
    model.defaults = GenerationConfig(do_sample=True, temperature=0.4, max_new_tokens=7)
    assert model.options(top_p=0.5).temperature == 0.4
    assert not model.options(temperature=0).samples
    assert model.options(stop="a").stop_strings == ("a",)
    assert model.options(GenerationConfig(), stop=["a", "b"]).stop_strings == ("a", "b")
    assert model.options(GenerationConfig(), seed=3).samples
    assert not model.options(GenerationConfig(), seed=3, do_sample=False).samples
    with pytest.raises(UsageError, match="unknown option"):
        model.options(tempature=1)


def test_a_reply_is_its_stream(model: Model) -> None:
    reply = model.reply("the inner voice", max_new_tokens=9, ignore_eos=True)
    assert reply.finish == "length"
    assert len(reply.tokens) == 9
    assert str(reply) == "".join(model.stream("the inner voice", max_new_tokens=9, ignore_eos=True))
    assert reply.prompt_tokens == len(model.prompt_ids("the inner voice"))
    ids = model.tokenize("the inner voice")
    assert model.detokenize(ids) == "the inner voice"


@pytest.mark.parametrize("backend", ["native", "runner", "onnx"])
def test_a_closed_model_says_so(tiny_bundle: Path, backend: str) -> None:
    with Model.load(tiny_bundle, backend, threads=1) as model:
        assert model.reply("a", max_new_tokens=2).tokens
    model.close()
    with pytest.raises(UsageError, match="was closed"):
        model.reply("a", max_new_tokens=2)


@pytest.mark.parametrize("backend", ["native", "runner"])
def test_another_thread_cancels(tiny_bundle: Path, backend: str) -> None:
    model = Model.load(tiny_bundle, backend, threads=1)
    config = GenerationConfig(max_new_tokens=200, ignore_eos=True)
    records = model.generate("the inner", config)
    made = [next(records)]
    canceller = threading.Thread(target=model.cancel)
    canceller.start()
    canceller.join()
    made += records
    assert len(made) < 200
    assert made[-1].finish is None
    assert len(list(model.generate("the inner", config.but(max_new_tokens=3)))) == 3


@pytest.mark.real
def test_the_page_runs_as_it_is_written(
    smollm2_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "smollm2").symlink_to(smollm2_bundle)
    monkeypatch.chdir(tmp_path)
    programs = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(programs) >= 5
    names: dict[str, object] = {}
    for program in programs:
        exec(program, names)
