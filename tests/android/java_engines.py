"""Run by test_java_engines in a process of its own, which starts a Java machine."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import jnius_config
import numpy as np
import pytest

classes, model, tokenizer_folder = sys.argv[1:]
jnius_config.add_classpath(classes)

from pocketslm.android.engine.executorch_aar import ExecuTorchModel  # noqa: E402
from pocketslm.android.engine.onnx_aar import JavaOnnxSession  # noqa: E402
from pocketslm.errors import BackendError, ContextOverflowError  # noqa: E402
from pocketslm.runtime.bundle import open_bundle  # noqa: E402
from pocketslm.runtime.config import GenerationConfig  # noqa: E402
from pocketslm.runtime.generation import Engine  # noqa: E402
from pocketslm.runtime.tokenizer import load_tokenizer  # noqa: E402

VOCABULARY, CONTEXT = 50, 200
SHAPE = {"layers": 2, "kv_heads": 1, "head_dim": 1, "vocab_size": VOCABULARY}


def expected(tokens: list[int]) -> np.ndarray:
    """The stand-in's formula, for every position."""
    sums = np.cumsum([(i + 1) * token for i, token in enumerate(tokens)])
    return ((sums[:, None] + 7 * np.arange(VOCABULARY)) % 97).astype(np.float32)


def onnx() -> None:
    session = JavaOnnxSession(Path(model), **SHAPE, context=CONTEXT, fp16=False, threads=2)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, 150)
    first = session.forward(tokens[:140], all_logits=True)  # in three parts
    np.testing.assert_array_equal(first, expected(tokens[:140].tolist()))
    rest = session.forward(tokens[140:])
    np.testing.assert_array_equal(rest, expected(tokens.tolist())[-1:])
    session.truncate(30)
    again = session.forward(tokens[:2])
    np.testing.assert_array_equal(again, expected([*tokens[:30], *tokens[:2]])[-1:])
    assert session.length == 32
    config = GenerationConfig(max_new_tokens=12)
    made = [step.token for step in Engine(session).generate([3, 4, 5], config, ())]
    ids = [3, 4, 5]
    for token in made:
        assert token == int(expected(ids)[-1].argmax())
        ids.append(token)
    session.close()
    with pytest.raises(BackendError, match="no file /nowhere"):
        JavaOnnxSession(Path("/nowhere"), **SHAPE, context=9, fp16=False, threads=1)


def executorch() -> None:
    from jnius import autoclass

    bundle = open_bundle(tokenizer_folder)
    tokenizer = load_tokenizer(tokenizer_folder)
    module = autoclass("org.pytorch.executorch.extension.llm.LlmModule")(1, "m", "t", 0.0)
    llm = ExecuTorchModel(bundle, module, tokenizer, 64)
    text = "the inner voice"
    records = list(llm.generate(text))
    assert "".join(record.text for record in records) == text + " "
    assert records[-1].finish == "length"
    stopped = list(llm.generate(text, GenerationConfig(stop_strings=("ner",))))
    assert "".join(record.text for record in stopped) == "the in"
    assert stopped[-1].finish == "stop"
    stream = llm.generate(text)
    assert len(list(islice(stream, 1))) == 1
    stream.close()
    with pytest.raises(ContextOverflowError):
        llm.generate("x" * 200)


onnx()
executorch()
print("both")
