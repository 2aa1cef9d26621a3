"""The engine end to end: against a plain float64 forward pass, across paths, threads and caches."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native_support import (
    assert_penalized,
    every_kind,
    every_kind_config,
    mixed_kinds,
    quantize,
    reference_logits,
    tiny_config,
    write_tiny,
)

from pocketslm.errors import BackendError, ContextOverflowError, UsageError
from pocketslm.export.lower.native import lower
from pocketslm.export.lower.trace import trace
from pocketslm.models.config import LayerSize
from pocketslm.models.tensors import QuantTensor, Weight
from pocketslm.runtime.backends import Penalty
from pocketslm.runtime.backends.native import NativeModel, NativeSession
from pocketslm.runtime.backends.native_library import isa_names

# Root-mean-square error over the spread of the logits. Float weights leave the fp16 cache as the
# largest error; quantized ones add int8 activations, an int8 cache about as much again.
FLOAT_TOLERANCE = 2e-3
INT8_TOLERANCE = 0.05
LOG_TOTAL_TOLERANCE = 1e-5  # of a sum of at most a few thousand fp32 exponentials

TOKENS = np.random.default_rng(1).integers(0, 100, 600)


def q4_min(name: str, values: np.ndarray) -> Weight:
    return quantize(values, 8, "sym") if "embed" in name else quantize(values, 4, "min")


def q4_min_8_head(name: str, values: np.ndarray) -> Weight:
    is_head = "lm_head" in name or "embed" in name
    return quantize(values, 8, "sym") if is_head else quantize(values, 4, "min")


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((actual - expected) ** 2)) / expected.std())


@pytest.fixture(scope="module")
def q4_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[NativeModel, np.ndarray]:
    path = tmp_path_factory.mktemp("native") / "q4.slm"
    config = tiny_config()
    _, weights = write_tiny(path, config, q4_min)
    return NativeModel(path), reference_logits(config, weights, TOKENS)


@pytest.mark.parametrize("isa", isa_names())
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "attention_bias": True, "vocab_size": 97},
        {"num_key_value_heads": 4, "rope_divisors": tuple(np.linspace(1, 4, 8))},
        {"num_attention_heads": 14, "num_key_value_heads": 1, "head_dim": 48},
        {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
        {
            "num_hidden_layers": 3,
            "attention_bias": True,
            "layer_sizes": (LayerSize(2, 1, 64), LayerSize(4, 2, 96), LayerSize(2, 2, 32)),
        },
    ],
    ids=[
        "plain",
        "untied biased",
        "no grouping, scaled rope",
        "wide group",
        "one layer",
        "layers of other sizes",
    ],
)
def test_float_weights_match_reference(isa: str, changes: dict, tmp_path: Path) -> None:
    config = tiny_config(**changes)
    _, weights = write_tiny(tmp_path / "m.slm", config)
    tokens = TOKENS[:70] % config.vocab_size
    expected = reference_logits(config, weights, tokens)
    session = NativeModel(tmp_path / "m.slm").session(isa=isa, threads=2)
    assert session.isa == isa
    assert relative_error(session.forward(tokens, all_logits=True), expected) <= FLOAT_TOLERANCE
    session.truncate(0)
    steps = np.concatenate([session.forward(tokens[i : i + 1]) for i in range(40)])
    assert relative_error(steps, expected[:40]) <= FLOAT_TOLERANCE


@pytest.mark.parametrize("isa", isa_names())
@pytest.mark.parametrize(
    ("scheme", "kv_type"),
    [
        *itertools.product([q4_min, mixed_kinds], ["fp16", "int8"]),
        (every_kind, "fp16"),  # random codes need not be near zero, which int8 keys would feel
    ],
)
def test_quantized_weights_match_reference(
    isa: str, scheme: object, kv_type: str, tmp_path: Path
) -> None:
    config = every_kind_config() if scheme is every_kind else tiny_config()
    report, weights = write_tiny(tmp_path / "m.slm", config, scheme)
    assert not report.rounded_scales
    expected = reference_logits(config, weights, TOKENS[:90])
    session = NativeModel(tmp_path / "m.slm").session(isa=isa, threads=2, kv_type=kv_type)
    actual = session.forward(TOKENS[:90], all_logits=True)
    assert relative_error(actual, expected) <= INT8_TOLERANCE


def test_long_prompt_in_pieces_and_in_one(q4_model: tuple[NativeModel, np.ndarray]) -> None:
    """More than one batch, and every way of cutting it, gives the same last logits."""
    model, expected = q4_model
    whole = model.session(threads=2).forward(TOKENS, all_logits=True)
    assert relative_error(whole, expected) <= INT8_TOLERANCE
    session = model.session(threads=3)
    for piece in np.split(TOKENS, [1, 2, 4, 7, 15, 30, 61, 317]):
        last = session.forward(piece)
    assert session.length == len(TOKENS)
    assert relative_error(last[0], whole[-1]) <= 1e-3


def greedy(session: NativeSession, prompt: np.ndarray, count: int) -> list[int]:
    token = int(session.forward(prompt)[0].argmax())
    tokens = [token]
    for _ in range(count - 1):
        token = session.step_greedy(token)
        tokens.append(token)
    return tokens


def test_greedy_tokens_are_the_same_on_every_path_and_thread_count(
    q4_model: tuple[NativeModel, np.ndarray],
) -> None:
    model, _ = q4_model
    runs = {
        (isa, threads): greedy(model.session(isa=isa, threads=threads), TOKENS[:20], 60)
        for isa in isa_names()
        for threads in (1, 2, 3, 4, 8)
    }
    first = next(iter(runs.values()))
    assert all(tokens == first for tokens in runs.values()), runs


def test_greedy_step_agrees_with_logits(q4_model: tuple[NativeModel, np.ndarray]) -> None:
    model, _ = q4_model
    session, other = model.session(threads=2), model.session(threads=2)
    for token in TOKENS[:50]:
        assert session.step_greedy(int(token)) == int(other.forward([int(token)])[0].argmax())


@pytest.mark.parametrize("isa", isa_names())
@pytest.mark.parametrize("tied", [True, False])
def test_screened_head_gives_the_greedy_token(isa: str, tied: bool, tmp_path: Path) -> None:
    """Random 8-bit heads of several thousand rows: only part of their low nibbles is read."""
    config = tiny_config(vocab_size=4003, tie_word_embeddings=tied)
    write_tiny(tmp_path / "m.slm", config, q4_min_8_head)
    model = NativeModel(tmp_path / "m.slm")
    screened = model.session(isa=isa, threads=2)
    whole = model.session(isa=isa, threads=1)
    for token in range(0, 4000, 40):
        assert screened.step_greedy(token) == int(whole.forward([token])[0].argmax())
    prompt = TOKENS[:300]  # more than a batch
    assert screened.forward_greedy(prompt)[0] == int(whole.forward(prompt)[0].argmax())
    for count in (1, 2, 3, 8, 15, 16, 23, 40):
        tokens = np.arange(count) * 97 % 4003
        found = screened.forward_greedy(tokens, count)
        np.testing.assert_array_equal(found, whole.forward(tokens, all_logits=True).argmax(axis=1))
    with pytest.raises(UsageError, match="what follows 3 tokens of 2"):
        screened.forward_greedy(TOKENS[:2], 3)


@pytest.mark.parametrize("tied", [True, False])
def test_greedy_tokens_are_penalized_by_what_came_before(tied: bool, tmp_path: Path) -> None:
    config = tiny_config(vocab_size=4003, tie_word_embeddings=tied)
    write_tiny(tmp_path / "m.slm", config, q4_min_8_head)
    assert_penalized(NativeModel(tmp_path / "m.slm"))


def test_a_penalty_is_checked(q4_model: Any) -> None:
    session = q4_model[0].session()
    for factor in (0.99, 100.5, math.nan):
        with pytest.raises(UsageError, match="factor is 1 to 100"):
            session.forward_greedy(TOKENS[:2], 1, Penalty(factor, TOKENS[:2]))
    with pytest.raises(UsageError, match="outside the vocabulary"):
        session.forward_greedy(TOKENS[:2], 1, Penalty(1.1, np.array([1, -1])))
    assert session.length == 0


def test_screening_test_can_fail(tmp_path: Path) -> None:
    """Without the low nibbles the greedy token of such a head is often another one."""
    config = tiny_config(vocab_size=4003, tie_word_embeddings=False)
    _, weights = write_tiny(tmp_path / "m.slm", config, q4_min_8_head)

    def high_nibbles(name: str, shape: tuple[int, ...]) -> Weight:
        weight = weights(name, shape)
        if name != "lm_head.weight":
            return weight
        assert isinstance(weight, QuantTensor)
        return QuantTensor(weight.codes & 240 | 7, weight.scales, 8, 32)

    lower(trace(config, 640), high_nibbles, tmp_path / "low.slm")
    sessions = [NativeModel(tmp_path / name).session(threads=1) for name in ("m.slm", "low.slm")]
    found = [[s.step_greedy(token) for token in range(0, 4000, 40)] for s in sessions]
    assert found[0] != found[1]


def test_forward_top_agrees_with_logits(q4_model: tuple[NativeModel, np.ndarray]) -> None:
    model, _ = q4_model
    for isa, count in itertools.product(isa_names(), (1, 7, 100, 1000)):
        session, other = model.session(threads=3, isa=isa), model.session(threads=1, isa=isa)
        for piece in np.split(TOKENS[:300], [280, 281, 290]):
            logits = other.forward(piece)[0]
            tokens, values, log_total = session.forward_top(piece, count)
            order = np.lexsort((np.arange(logits.size), -logits))[:count]
            np.testing.assert_array_equal(tokens, order)
            np.testing.assert_array_equal(values, logits[order])
            exact = np.log(np.exp(logits.astype(np.float64)).sum())
            assert abs(log_total - exact) <= LOG_TOTAL_TOLERANCE
    with pytest.raises(UsageError, match="most probable"):
        model.session().forward_top(TOKENS[:1], 0)


def test_simd_paths_give_the_same_bits(q4_model: tuple[NativeModel, np.ndarray]) -> None:
    model, _ = q4_model
    paths = [isa for isa in isa_names() if isa != "scalar"]
    outputs = [model.session(isa=isa, threads=2).forward(TOKENS[:50]) for isa in paths]
    for other in outputs[1:]:
        np.testing.assert_array_equal(outputs[0], other)


def test_truncate_save_and_restore(
    q4_model: tuple[NativeModel, np.ndarray], tmp_path: Path
) -> None:
    unequal = tiny_config(layer_sizes=(LayerSize(2, 1, 64), LayerSize(4, 2, 96)))
    write_tiny(tmp_path / "m.slm", unequal, q4_min)
    models = q4_model[0], NativeModel(tmp_path / "m.slm")
    for model, kv_type in itertools.product(models, ("fp16", "int8")):
        session = model.session(threads=2, kv_type=kv_type)
        session.forward(TOKENS[:37])
        saved = session.save()
        expected = session.forward(TOKENS[37:39])
        session.truncate(37)
        np.testing.assert_array_equal(session.forward(TOKENS[37:39]), expected)
        other = model.session(threads=1, kv_type=kv_type)
        other.forward(TOKENS[50:150])  # what was there before must not matter
        other.restore(37, saved)
        assert other.length == 37
        np.testing.assert_array_equal(other.forward(TOKENS[37:39]), expected)
        with pytest.raises(UsageError):
            other.restore(38, saved)
        with pytest.raises(UsageError):
            other.restore(10_000, saved)


def test_profile_counts_each_operator_and_changes_no_number(
    q4_model: tuple[NativeModel, np.ndarray],
) -> None:
    model, _ = q4_model
    session = model.session(threads=2)
    plain = session.forward(TOKENS[:20])
    assert not any(vars(session.times()).values())  # off
    session.truncate(0)
    session.profile()
    began = time.perf_counter_ns()
    np.testing.assert_array_equal(session.forward(TOKENS[:20]), plain)
    session.step_greedy(3)
    elapsed = time.perf_counter_ns() - began
    times = session.times()
    assert (times.calls, times.tokens) == (2, 21)
    spent = [value for name, value in vars(times).items() if name.endswith("_ns")]
    assert len(spent) == 7
    assert min(spent) > 0
    assert sum(spent) <= elapsed
    session.profile(False)
    session.step_greedy(3)
    assert session.times() == times
    session.profile()
    assert not any(vars(session.times()).values())


def test_context_overflow_changes_nothing(q4_model: tuple[NativeModel, np.ndarray]) -> None:
    model, _ = q4_model
    session = model.session(threads=1, context=20)
    session.forward(TOKENS[:18])
    for run in (
        lambda: session.forward(TOKENS[:3]),
        lambda: session.forward(TOKENS, all_logits=True),
    ):
        with pytest.raises(ContextOverflowError, match="context of 20"):
            run()
    assert session.length == 18
    session.forward(TOKENS[:2])
    with pytest.raises(ContextOverflowError):
        session.step_greedy(0)


def test_bad_arguments_are_typed_errors(
    q4_model: tuple[NativeModel, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = q4_model
    session = model.session(threads=1)
    for tokens in ([], [-1], [100], [[1, 2]]):
        with pytest.raises(UsageError):
            session.forward(tokens)
    with pytest.raises(UsageError, match="outside the vocabulary"):
        session.step_greedy(-5)
    with pytest.raises(UsageError, match="truncate"):
        session.truncate(1)
    with pytest.raises(UsageError, match="threads"):
        model.session(threads=0)
    with pytest.raises(UsageError, match="threads is 65"):
        model.session(threads=65)
    with pytest.raises(UsageError, match="threads is 4294967297"):
        model.session(threads=2**32 + 1)
    with pytest.raises(UsageError, match="outside the vocabulary"):
        session.step_greedy(2**32 + 5)
    with pytest.raises(UsageError, match="context is 10000, expected 1 to 640"):
        model.session(context=10_000)
    with pytest.raises(UsageError, match="KV type"):
        model.session(kv_type="fp8")
    with pytest.raises(BackendError, match="this CPU has"):
        model.session(isa="altivec")
    monkeypatch.setenv("POCKETSLM_ISA", "scalar")
    assert model.session().isa == "scalar"
    monkeypatch.setenv("POCKETSLM_ISA", "none such")
    with pytest.raises(BackendError, match="none such"):
        model.session()


def test_lowering_reports_what_it_rounds(tmp_path: Path) -> None:
    def scheme(name: str, values: np.ndarray) -> Weight:
        quantized = quantize(values, 4, "sym")
        if "up_proj" not in name:
            return quantized
        return QuantTensor(quantized.codes, quantized.scales.astype(np.float32) * 1.00001, 4, 32)

    report, _ = write_tiny(tmp_path / "m.slm", tiny_config(), scheme)
    assert report.rounded_scales == [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    assert report.bytes == (tmp_path / "m.slm").stat().st_size
