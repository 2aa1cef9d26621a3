"""The engine that comes as an AAR, with stand-ins for its Java classes: what crosses the border.

The stand-ins take and give what an exported graph's own inputs and outputs say, and refuse all
else, as the real classes do. No phone is in this test.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import java_stand_in
import numpy as np
import onnxruntime as ort
import pytest

from pocketslm.android.engine import onnx_aar
from pocketslm.errors import BackendError
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.prune import adaptive, width
from pocketslm.export.recipe import Recipe
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.runtime.backends import open_session
from pocketslm.runtime.bundle import open_bundle
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model

HERE = Path(__file__).resolve().parent


@pytest.fixture(params=["tiny", "fp16", "pruned"])
def bundle(
    request: pytest.FixtureRequest, tiny_bundle: Path, tiny_hf: Path, tmp_path: Path
) -> Path:
    """The tiny model; with an fp16 cache; with layers of different KV heads."""
    if request.param == "tiny":
        return tiny_bundle
    source = open_checkpoint(tiny_hf)
    recipe = Recipe(weights="float", head="float", targets=("onnx",))
    if request.param == "fp16":
        recipe = Recipe(weights="float", head="float", targets=("onnx",), dtype="fp16")
    else:
        kept = adaptive.everything(source.config)
        kept.groups[0][1:] = False
        source = width.Narrowed(source, kept)
    export_bundle(source, tmp_path / "bundle", recipe)
    return tmp_path / "bundle"


def test_the_exported_graph_gives_what_our_own_session_does(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jnius", java_stand_in)  # type: ignore[arg-type]
    model = onnx_aar.load(bundle, threads=1)
    session = model.engine.session
    ours = open_session(open_bundle(bundle), "onnx", 1)
    assert session.vocab_size == ours.vocab_size
    tokens = np.random.default_rng(0).integers(0, ours.vocab_size, 150)
    for part, every in ((tokens[:130], False), (tokens[130:], True), (tokens[:1], False)):
        theirs = ours.forward(part, all_logits=every)
        np.testing.assert_allclose(session.forward(part, all_logits=every), theirs, atol=2e-3)
    for one in (session, ours):
        one.truncate(40)
    theirs = ours.forward(tokens[:3], all_logits=True)
    np.testing.assert_allclose(session.forward(tokens[:3], all_logits=True), theirs, atol=2e-3)
    config = GenerationConfig(max_new_tokens=12)
    text = "".join(record.text for record in model.generate("Hello there", config))
    plain = Model.load(bundle, "onnx")
    assert text == "".join(record.text for record in plain.generate("Hello there", config))
    session.close()
    assert java_stand_in.OnnxTensor.open == 0


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ({"position_ids": ("INT64", [1, -1])}, {}, "an input position_ids"),
        ({"past_key_values.0.key": ("FLOAT", [1, 1, -1, 8])}, {}, "no present.0.key"),
        ({}, {"logits": ("FLOAT16", [1, 1, 9])}, "logits are FLOAT16"),
        ({}, {"logits": ("FLOAT", [1, 1, -1])}, "logits are FLOAT"),
        ({"past_key_values.0.key": ("INT8", [1])}, {"present.0.key": ("INT8", [1])}, "four sizes"),
    ],
)
def test_a_graph_of_another_kind_is_refused(
    inputs: dict[str, tuple[str, list[int]]],
    outputs: dict[str, tuple[str, list[int]]],
    message: str,
) -> None:
    plain = {"input_ids": ("INT64", [1, -1]), "attention_mask": ("INT64", [1, -1])}
    logits = {"logits": ("FLOAT", [1, 1, 9])}
    assert onnx_aar.JavaOnnxSession._check(plain, logits) == 9
    with pytest.raises(BackendError, match=message):
        onnx_aar.JavaOnnxSession._check(plain | inputs, logits | outputs)


def test_the_engine_over_java(tiny_bundle: Path, tmp_path: Path) -> None:
    if shutil.which("javac") is None or importlib.util.find_spec("jnius") is None:
        pytest.skip("needs a JDK (apt-get install default-jdk-headless) and pyjnius")
    graph = ort.InferenceSession(str(tiny_bundle / "model.onnx"))
    lines = []
    for side, values in (("in", graph.get_inputs()), ("out", graph.get_outputs())):
        for one in values:
            kind = {"tensor(int64)": "INT64", "tensor(float)": "FLOAT"}[one.type]
            shape = [str(size if isinstance(size, int) else -1) for size in one.shape]
            lines.append(" ".join([side, one.name, kind, *shape]))
    contract = tmp_path / "contract"
    contract.write_text("\n".join(lines))
    sources = [str(path) for path in (HERE / "java").rglob("*.java")]
    classes = tmp_path / "classes"
    subprocess.run(["javac", "-Xlint:all", "-d", str(classes), *sources], check=True)
    vocabulary = graph.get_outputs()[0].shape[2]
    script = [sys.executable, str(HERE / "java_engines.py")]
    done = subprocess.run(
        [*script, str(classes), str(contract), str(vocabulary)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "done"
