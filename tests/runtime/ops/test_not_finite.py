"""What is NaN or infinite is an error on every path, and never an answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from native_support import mixed_kinds, quantize, tiny_config, tiny_weights

from pocketslm.errors import BackendError, UsageError
from pocketslm.export.lower.native import lower
from pocketslm.export.lower.trace import trace
from pocketslm.models.tensors import Weight
from pocketslm.runtime.adapters import Update
from pocketslm.runtime.backends.native import NativeModel, NativeSession
from pocketslm.runtime.backends.native_library import isa_names
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.generation import Engine

VOCABULARY = 2000
# Finite weights, so that no check of a file refuses them, whose products are not.
LARGE_NORM, LARGE_ROW = np.float32(1e33), np.float32(3e6)
SCHEMES: dict[str, Callable[[str, np.ndarray], Weight]] = {
    "float": lambda name, values: values,
    "mixed": mixed_kinds,
    "split head": lambda name, values: quantize(values, 8, "sym"),
}


def write_overflowing(path: Path, scheme: str, share: float) -> NativeModel:
    """A model in which this share of the logits is infinite."""
    config = tiny_config(vocab_size=VOCABULARY, tie_word_embeddings=False)
    rows = np.random.default_rng(1).random(VOCABULARY) < share

    def weights_of(name: str, values: np.ndarray) -> Weight:
        if name == "lm_head.weight":
            values = np.where(rows[:, None], LARGE_ROW * np.sign(values), values)
        return SCHEMES[scheme](name, values.astype(np.float32))

    given = tiny_weights(config, weights_of)

    def weights(name: str, shape: tuple[int, ...]) -> Weight:
        if name == "model.norm.weight":
            return np.full(shape, LARGE_NORM)
        return given(name, shape)

    lower(trace(config, config.max_position_embeddings), weights, path)
    return NativeModel(path)


CALLS: dict[str, Callable[[NativeSession, np.ndarray], object]] = {
    "last": lambda session, ids: session.forward(ids),
    "all": lambda session, ids: session.forward(ids, all_logits=True),
    "top": lambda session, ids: session.forward_top(ids, 5),
    "the whole vocabulary": lambda session, ids: session.forward_top(ids, VOCABULARY),
    "one token": lambda session, ids: session.forward(ids[:1]),
    "greedy": lambda session, ids: session.step_greedy(int(ids[0])),
}


@pytest.mark.parametrize("isa", isa_names())
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("share", [0.02, 1.0])
def test_infinite_logits_are_an_error_that_changes_nothing(
    share: float, scheme: str, isa: str, tmp_path: Path
) -> None:
    model = write_overflowing(tmp_path / "model.slm", scheme, share)
    ids = np.arange(300)
    for threads in (1, 2):
        session = model.session(threads=threads, isa=isa)
        for name, call in CALLS.items():
            with pytest.raises(BackendError, match="logits are not finite"):
                call(session, ids)
            assert session.length == 0, name
    engine = Engine(model.session(threads=1, isa=isa))
    for options in ({}, {"logprobs": True}, {"do_sample": True}, {"repetition_penalty": 1.1}):
        config = GenerationConfig(max_new_tokens=3).but(**options)
        with pytest.raises(BackendError, match="logits are not finite"):
            next(engine.generate([1, 2, 3], config, ()))


def test_a_model_without_them_answers(tmp_path: Path) -> None:
    """Else the test above could not fail."""
    session = write_overflowing(tmp_path / "model.slm", "mixed", 0.0).session(threads=2)
    for call in CALLS.values():
        call(session, np.arange(30))


def test_an_adapter_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = write_overflowing(tmp_path / "model.slm", "float", 0.0)
    session = model.session(threads=1)
    for value in (np.nan, np.inf):
        b = np.ones((64, 2), np.float32)
        b[5, 1] = value
        a = np.ones((2, 64), np.float32)
        with pytest.raises(UsageError, match="not within fp16"):
            session.set_adapter(1, [Update(0, "q_proj", a, b)])
    session.forward(np.arange(5))
