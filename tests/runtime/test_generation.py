"""Sampling against transformers, the generation loop, streamed text and stop strings."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pocketslm.errors import ContextOverflowError, UsageError
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.recipe import Recipe
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.models.reference import load_reference
from pocketslm.profiling.engine import SessionEngine
from pocketslm.runtime import generation, sampling
from pocketslm.runtime.answer import Step
from pocketslm.runtime.backends.native import NativeSession
from pocketslm.runtime.config import GenerationConfig, generation_defaults
from pocketslm.runtime.model import Model, _with_text
from pocketslm.runtime.tokenizer import StreamDecoder

RNG = np.random.default_rng(0)
PROMPT = [10, 20, 30, 20, 40]


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Model:
    return Model.load(tiny_bundle, threads=2)


# Processors do what transformers' do.


def through_transformers(
    config: GenerationConfig, ids: Sequence[int], logits: np.ndarray[Any, Any]
) -> Any:
    from transformers.generation import logits_process as hf

    chain = []
    if config.repetition_penalty != 1:
        chain.append(hf.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.temperature != 1:
        chain.append(hf.TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        chain.append(hf.TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        chain.append(hf.TopPLogitsWarper(config.top_p))
    if config.min_p:
        chain.append(hf.MinPLogitsWarper(config.min_p))
    if config.typical_p < 1:
        chain.append(hf.TypicalLogitsWarper(config.typical_p))
    scores = torch.from_numpy(logits.copy())[None]
    for process in chain:
        scores = process(torch.tensor([list(ids)]), scores)
    return scores[0].numpy()


@pytest.mark.parametrize(
    "config",
    [
        GenerationConfig(do_sample=True, temperature=0.3, top_k=0),
        GenerationConfig(do_sample=True, top_k=7),
        GenerationConfig(do_sample=True, top_k=1000),
        GenerationConfig(do_sample=True, top_k=0, top_p=0.4),
        GenerationConfig(do_sample=True, top_k=0, top_p=0.001),
        GenerationConfig(do_sample=True, top_k=0, min_p=0.2),
        GenerationConfig(do_sample=True, top_k=0, typical_p=0.3),
        GenerationConfig(do_sample=True, top_k=0, typical_p=0.95),
        GenerationConfig(do_sample=True, top_k=0, typical_p=0.001),
        GenerationConfig(do_sample=True, top_k=0, repetition_penalty=1.7),
        GenerationConfig(
            do_sample=True,
            temperature=0.7,
            top_k=40,
            top_p=0.8,
            min_p=0.05,
            typical_p=0.9,
            repetition_penalty=1.2,
        ),
    ],
)
def test_processors_equal_transformers(config: GenerationConfig) -> None:
    for _ in range(50):
        logits = (RNG.standard_normal(300) * 3).astype(np.float32)
        ids = RNG.integers(0, 300, 20).tolist()
        ours = logits.copy()
        for process in sampling.processors_for(config, len(ids)):
            ours = process(ids, ours)
        theirs = through_transformers(config, ids, logits)
        assert (np.isfinite(ours) == np.isfinite(theirs)).all()
        assert np.isfinite(ours).any()
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_repetition_penalty_may_spare_the_prompt() -> None:
    config = GenerationConfig(repetition_penalty=2.0, penalize_prompt=False)
    (process,) = sampling.processors_for(config, prompt_length=2)
    assert process([0, 1, 2], np.ones(4, np.float32)).tolist() == [1, 1, 0.5, 1]


def test_samples_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.2, 0.3, 1e-30], np.float32))
    logits[3] = -np.inf
    sample = sampling.multinomial(seed=1)
    counts = np.bincount([sample(logits) for _ in range(20_000)], minlength=4) / 20_000
    # Five standard deviations of a share of 0.5 among 20,000 draws.
    assert np.abs(counts - [0.5, 0.2, 0.3, 0]).max() < 5 * (0.25 / 20_000) ** 0.5
    assert counts[3] == 0


def test_a_seed_draws_the_same_and_another_does_not(model: Model) -> None:
    def text(seed: int) -> list[int]:
        config = GenerationConfig(
            max_new_tokens=20, do_sample=True, top_k=0, seed=seed, ignore_eos=True
        )
        return [record.token for record in model.generate(PROMPT, config)]

    assert text(3) == text(3)
    assert text(3) != text(4)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.5},
        {"temperature": 1e-320},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"temperature": True},
        {"temperature": 1e10},
        {"temperature": 10**400},
        {"do_sample": "false"},
        {"logprobs": None},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_k": True},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": 0.5},
        {"min_p": 2.0},
        {"typical_p": 0.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.5},
        {"stop_strings": ("",)},
        {"stop_strings": ""},
        {"stop_strings": (5,)},
        {"stop_strings": 5},
    ],
)
def test_options_that_make_no_sense(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        GenerationConfig(**bad)


def test_one_stop_string_is_a_text_of_its_own() -> None:
    """And not as many as it has characters."""
    assert GenerationConfig(stop_strings="END").stop_strings == ("END",)  # type: ignore[arg-type]
    assert GenerationConfig(stop_strings=["a", "b"]).stop_strings == ("a", "b")  # type: ignore[arg-type]


def test_no_temperature_is_greedy(model: Model) -> None:
    config = GenerationConfig(max_new_tokens=8, do_sample=True, temperature=0.0, ignore_eos=True)
    greedy = GenerationConfig(max_new_tokens=8, ignore_eos=True)
    assert not config.samples
    assert [r.token for r in model.generate(PROMPT, config)] == [
        r.token for r in model.generate(PROMPT, greedy)
    ]


def test_no_option_is_silently_dropped() -> None:
    with pytest.raises(UsageError, match="temprature"):
        GenerationConfig().but(temprature=0.5)


def test_defaults_come_from_the_model(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.2, "top_p": 0.9, "eos_token_id": 2}'
    )
    defaults = generation_defaults(tmp_path)
    assert (defaults.do_sample, defaults.temperature, defaults.top_p) == (True, 0.2, 0.9)
    for broken in ('{"top_p": "much"}', "[" * 100_000, "[]", "{"):
        (tmp_path / "generation_config.json").write_text(broken)
        with pytest.raises(UsageError, match=r"^generation_config\.json cannot be read"):
            generation_defaults(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").mkdir()
    with pytest.raises(UsageError, match=r"^generation_config\.json cannot be read"):
        generation_defaults(tmp_path)


# The loop.


def test_greedy_equals_the_pytorch_model(model: Model, tiny_hf: Path) -> None:
    reference = load_reference(open_checkpoint(tiny_hf))
    ids, expected, logprobs = list(PROMPT), [], []
    with torch.no_grad():
        for _ in range(30):
            logits, _ = reference(torch.tensor([ids]), reference.empty_cache())
            ids.append(int(logits[0, -1].argmax()))
            expected.append(ids[-1])
            logprobs.append(float(torch.log_softmax(logits[0, -1], -1)[ids[-1]]))
    config = GenerationConfig(max_new_tokens=30, ignore_eos=True)
    steps = list(model.engine.generate(PROMPT, config, ()))
    assert [(step.token, step.logprob) for step in steps] == [(token, None) for token in expected]
    steps = list(model.engine.generate(PROMPT, config.but(logprobs=True), ()))
    assert [step.token for step in steps] == expected
    assert [step.logprob for step in steps] == pytest.approx(logprobs, abs=1e-3)
    assert [step.finish for step in steps] == [None] * 29 + ["length"]
    for _ in range(2):  # what is shared is not read again
        assert model.logprobs(PROMPT, expected).tolist() == pytest.approx(logprobs, abs=1e-3)
    later = model.logprobs([*PROMPT, *expected[:9]], expected[9:])
    assert later.tolist() == pytest.approx(logprobs[9:], abs=1e-3)
    for ids, following in (([], [1]), (PROMPT, [])):
        with pytest.raises(UsageError, match="at least one token"):
            model.logprobs(ids, following)
    times = [step.time_ns for step in steps]
    assert times == sorted(times)


def test_the_end_of_sequence_ends(model: Model) -> None:
    config = GenerationConfig(max_new_tokens=30)
    free = [s.token for s in model.engine.generate(PROMPT, config.but(ignore_eos=True), ())]
    steps = list(model.engine.generate(PROMPT, config, {free[4]}))
    assert [step.token for step in steps] == free[: free.index(free[4]) + 1]
    assert steps[-1].finish == "eos"


def test_a_shared_prefix_is_not_prefilled_again(tiny_bundle: Path) -> None:
    engine = Model.load(tiny_bundle, threads=1).engine
    session = engine.session
    assert isinstance(session, NativeSession)

    def ran() -> int:
        """The tokens that ran since the last call."""
        tokens = session.times().tokens
        session.profile()
        return tokens

    session.profile()
    config = GenerationConfig(max_new_tokens=3, ignore_eos=True, prompt_lookup_num_tokens=0)
    document = list(range(50))
    first = list(engine.generate([*document, 7], config, ()))
    assert ran() == 51 + 2
    again = list(engine.generate([*document, 9, 9], config, ()))
    assert ran() == 2 + 2
    repeated = list(engine.generate([*document, 7], config, ()))
    assert ran() == 1 + 2
    assert [s.token for s in repeated] == [s.token for s in first]
    fresh = Model.load(tiny_bundle, threads=1).engine
    expected = list(fresh.generate([*document, 9, 9], config, ()))
    assert [s.token for s in again] == [s.token for s in expected]


def test_generate_runs_what_bench_times(tiny_hf: Path, tmp_path: Path) -> None:
    """As many calls of the engine, with the same tokens: of a head that is screened."""
    recipe = Recipe(weights="int4", head="int8", targets=("native",))
    export_bundle(open_checkpoint(tiny_hf), tmp_path / "bundle", recipe)
    session = Model.load(tmp_path / "bundle", "native", threads=1).engine.session
    assert isinstance(session, NativeSession)
    count = 40
    timed = SessionEngine(session)
    timed.reset()
    session.profile()
    expected = [timed.prefill(PROMPT), *(timed.step() for _ in range(count - 1))]
    of_bench = session.times()
    session.profile()
    config = GenerationConfig(max_new_tokens=count, ignore_eos=True, prompt_lookup_num_tokens=0)
    steps = generation.Engine(session).generate(PROMPT, config, ())
    assert [step.token for step in steps] == expected
    assert session.times().calls == of_bench.calls == count
    assert session.times().tokens == of_bench.tokens


@pytest.mark.parametrize(
    "options",
    [{}, {"repetition_penalty": 1.1}, {"repetition_penalty": 1.3, "penalize_prompt": False}],
    ids=str,
)
def test_guesses_change_no_token(options: dict[str, Any], tiny_bundle: Path) -> None:
    engine = Model.load(tiny_bundle, threads=2).engine
    session = engine.session
    assert isinstance(session, NativeSession)
    config = GenerationConfig(ignore_eos=True, **options)
    off = config.but(prompt_lookup_num_tokens=0)
    alone = list(engine.generate(PROMPT, off, ()))
    answer = [step.token for step in alone]
    assert alone[-1].finish == "context"
    scored = engine.generate(PROMPT, off.but(logprobs=True), ())  # by all logits
    assert [step.token for step in scored] == answer

    def tokens(config: GenerationConfig, eos: Sequence[int] = ()) -> list[int]:
        session.profile()
        steps = list(engine.generate(PROMPT, config, eos))
        made = [step.token for step in steps]
        assert [*PROMPT, *answer][: session.length] == engine.cache.tokens[: session.length]
        finish = "eos" if eos else "length" if config.max_new_tokens else "context"
        assert [step.finish for step in steps] == [None] * (len(made) - 1) + [finish]
        assert [step.time_ns for step in steps] == sorted(step.time_ns for step in steps)
        return made

    assert tokens(config) == answer
    if not options:  # the tiny model repeats itself
        assert session.times().calls < len(answer)
    for count in (1, 2, 9, 50, 51, 52, 53):
        assert tokens(config.but(max_new_tokens=count)) == answer[:count]
    for guesses in (1, 3, 100):
        assert tokens(config.but(prompt_lookup_num_tokens=guesses)) == answer
    end = answer[60]  # in the middle of what came together
    assert tokens(config.but(ignore_eos=False), [end]) == answer[: answer.index(end) + 1]
    for more in ({}, {"do_sample": True, "seed": 1}, {"logprobs": True}):
        tried = (off if not more else config).but(**more)
        session.profile()
        made = len(list(engine.generate(PROMPT, tried, ())))
        assert session.times().calls == made


def test_an_abandoned_generation_leaves_a_usable_engine(model: Model) -> None:
    config = GenerationConfig(max_new_tokens=10, ignore_eos=True)
    expected = [s.token for s in model.engine.generate(PROMPT, config, ())]
    stopped = model.engine.generate(PROMPT, config, ())
    next(stopped)
    next(stopped)
    stopped.close()
    assert [s.token for s in model.engine.generate(PROMPT, config, ())] == expected


def test_the_context_is_never_overrun(model: Model) -> None:
    config = GenerationConfig(ignore_eos=True)
    steps = list(model.engine.generate([1] * 250, config, ()))
    assert len(steps) == 6
    assert steps[-1].finish == "context"
    for prompt, limit in (([1] * 256, None), ([1] * 250, 7)):
        with pytest.raises(ContextOverflowError, match="do not fit the context of 256"):
            model.engine.generate(prompt, config.but(max_new_tokens=limit), ())
    with pytest.raises(UsageError, match="empty"):
        model.engine.generate([], config, ())
    for ids in ([1.5], [1, "2"], np.array([0.5])):
        with pytest.raises(UsageError, match="token ids must be whole numbers"):
            model.engine.generate(ids, config, ())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="token ids are whole numbers, not float64"):
        model.engine.session.forward(np.array([1.0]))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="264 are not within"):
        list(model.engine.generate([264], config, ()))


# Text.


class Bytes:
    """A tokenizer whose ids are bytes."""

    special_ids: frozenset[int] = frozenset()
    leading_strip = ("", 0)

    def token_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        return bytes([token_id])


def texts(
    data: bytes, stops: tuple[str, ...] = (), finish: Any = "length"
) -> list[tuple[str, Any]]:
    steps = (
        Step(byte, 0.0, at, finish if at == len(data) - 1 else None) for at, byte in enumerate(data)
    )
    return [(r.text, r.finish) for r in _with_text(steps, StreamDecoder(Bytes()), stops)]


def test_no_character_is_split() -> None:
    pieces = texts("aé€😀".encode())
    assert [text for text, _ in pieces] == ["a", "", "é", "", "", "€", "", "", "", "😀"]
    assert texts("😀".encode()[:2])[-1] == ("�", "length")


def test_stop_strings_are_held_back_and_cut() -> None:
    pieces = texts(b"one stop two", (" stop",))
    assert "".join(text for text, _ in pieces) == "one"
    assert pieces[-1][1] == "stop"
    # What only looked like a stop comes out as soon as that is clear.
    assert "".join(text for text, _ in texts(b"one sto two", (" stop",))) == "one sto two"
    assert "".join(text for text, _ in texts(b"one sto", (" stop",))) == "one sto"
    assert texts(b"aab", ("ab", "b"))[-1] == ("", "stop")
    assert "".join(text for text, _ in texts(b"aab", ("ab", "b"))) == "a"


def test_a_chat_is_the_template_s_prompt(model: Model) -> None:
    messages = [{"role": "user", "content": "hi"}]
    config = GenerationConfig(max_new_tokens=5, ignore_eos=True)
    ids = model.tokenizer.apply_chat_template(messages)
    assert ids[0] == 256
    chat = [record.token for record in model.chat(messages, config)]
    assert chat == [record.token for record in model.generate(ids, config)]


def test_the_runtime_imports_nothing_heavy() -> None:
    code = (
        "import sys, pocketslm.runtime, pocketslm.runtime.model;"
        "import pocketslm.runtime.assistant.assistant;"
        "heavy = {'torch', 'transformers', 'kivy', 'onnx', 'onnxruntime', 'jinja2', 'tokenizers'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
