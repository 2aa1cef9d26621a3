"""Run by test_java_engines in a process of its own, which starts a Java machine."""

from __future__ import annotations

import sys
from pathlib import Path

import jnius_config
import numpy as np
import pytest

classes, contract, vocabulary = sys.argv[1:]
jnius_config.add_classpath(classes)

from pocketslm.android.engine.onnx_aar import JavaOnnxSession  # noqa: E402
from pocketslm.errors import BackendError  # noqa: E402
from pocketslm.runtime.config import GenerationConfig  # noqa: E402
from pocketslm.runtime.generation import Engine  # noqa: E402

VOCABULARY, CONTEXT = int(vocabulary), 200


def expected(tokens: list[int]) -> np.ndarray:
    """The stand-in's formula, for every position."""
    sums = np.cumsum([(i + 1) * token for i, token in enumerate(tokens)])
    return ((sums[:, None] + 7 * np.arange(VOCABULARY)) % 97).astype(np.float32)


session = JavaOnnxSession(Path(contract), head_dim=0, context=CONTEXT, threads=2)
assert session.vocab_size == VOCABULARY
tokens = np.random.default_rng(0).integers(0, VOCABULARY, 150)
first = session.forward(tokens[:140])  # in three parts
np.testing.assert_array_equal(first, expected(tokens[:140].tolist())[-1:])
rest = session.forward(tokens[140:], all_logits=True)
np.testing.assert_array_equal(rest, expected(tokens.tolist())[-10:])
session.truncate(30)
again = session.forward(tokens[:2])
np.testing.assert_array_equal(again, expected([*tokens[:30], *tokens[:2]])[-1:])
assert session.length == 32
config = GenerationConfig(max_new_tokens=12)
ids = [3, 4, 5]
for step in Engine(session).generate([3, 4, 5], config, ()):
    assert step.token == int(expected(ids)[-1].argmax())
    ids.append(step.token)
session.close()
with pytest.raises(BackendError, match="no file /nowhere"):
    JavaOnnxSession(Path("/nowhere"), head_dim=0, context=9, threads=1)
print("done")
