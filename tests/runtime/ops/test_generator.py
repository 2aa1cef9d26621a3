"""pslm_generator: the loop of the C API against the one of Python."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native_support import Plain, quantize, tiny_config, write_tiny

from pocketslm.errors import ContextOverflowError, UsageError
from pocketslm.models.tensors import Weight
from pocketslm.runtime.backends.native import NativeModel, NativeSession
from pocketslm.runtime.backends.native_generator import options_of
from pocketslm.runtime.backends.native_library import ErrorText, MadeEntry, Turn, load_library
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.constraint import Constraint, Grammar, TokenTexts
from pocketslm.runtime.generation import Engine
from pocketslm.runtime.ops import build, built

TEXT = np.random.default_rng(3).integers(0, 100, 300).tolist()  # more than is read at a time
FINISHES = [None, "eos", "stop", "length", "context"]
LOGPROB_TOLERANCE = 1e-4  # of sums of a hundred fp32 exponentials


def q4(name: str, values: np.ndarray) -> Weight:
    return quantize(values, 8, "sym") if "embed" in name else quantize(values, 4, "min")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> NativeModel:
    path = tmp_path_factory.mktemp("generator") / "m.slm"
    write_tiny(path, tiny_config(), q4)
    return NativeModel(path)


@contextmanager
def opened(
    session: NativeSession,
    text: Sequence[int],
    config: GenerationConfig,
    ends: Sequence[int] = (),
    constraint: Constraint | None = None,
    **options: Any,
) -> Iterator[ctypes.c_void_p]:
    library, error, handle = session._library, ErrorText(), ctypes.c_void_p()
    asked = options_of(config)
    asked.max_tokens = config.max_new_tokens or 0
    last = np.asarray(ends, np.int32)
    asked.ends, asked.end_count = last.ctypes.data, last.size
    asked.constraint = constraint._handle if constraint else None
    for name, value in options.items():
        setattr(asked, name, value)
    ids = np.asarray(text, np.int32)
    status = library.pslm_generator_open(
        session._open(),
        ids.ctypes.data,
        ids.size,
        ctypes.byref(asked),
        ctypes.byref(handle),
        error.argument,
    )
    error.check(status)
    try:
        yield handle
    finally:
        library.pslm_generator_close(handle)


def made_by(session: NativeSession, generator: ctypes.c_void_p) -> Iterator[MadeEntry]:
    error = ErrorText()
    while True:
        made = MadeEntry()
        status = session._library.pslm_generator_next(generator, ctypes.byref(made), error.argument)
        error.check(status)
        yield made
        if made.finish:
            return


def constraint() -> Constraint:
    texts = [bytes([32 + id_]) if id_ < 95 else b"" for id_ in range(100)]
    return Constraint(Grammar("regex", "[a-f ]{6,30}"), TokenTexts(texts, [99]))


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 0},
        {},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 1.3, "penalize_prompt": False},
        {"repetition_penalty": 0.8},
        {"logprobs": True},
        {"do_sample": True, "seed": 7},
        {"do_sample": True, "seed": 8, "top_k": 9, "logprobs": True},
        {"do_sample": True, "seed": 8, "top_k": 5, "top_p": 0.8, "temperature": 1.7},
        {"do_sample": True, "seed": 6, "top_k": 10_000, "min_p": 0.01, "logprobs": True},
        {"do_sample": True, "seed": 6, "top_k": 2**32 + 1},
        {"do_sample": True, "seed": 9, "temperature": 2.5, "top_p": 0.8, "min_p": 0.01},
        {"do_sample": True, "seed": 3, "top_k": 0, "typical_p": 0.2},
        {"do_sample": True, "seed": 3, "temperature": 2.5, "top_k": 9, "typical_p": 0.7},
        {"do_sample": True, "seed": 1, "repetition_penalty": 1.5, "top_p": 0.9},
    ],
    ids=str,
)
def test_tokens_are_those_of_python(options: dict[str, Any], model: NativeModel) -> None:
    config = GenerationConfig(**options)
    session = model.session(threads=2, context=400)
    engine = Engine(Plain(model.session(threads=1, context=400)))
    expected = list(engine.generate(TEXT, config, ()))
    with opened(session, TEXT, config) as generator:
        made = list(made_by(session, generator))
        assert made.pop(0).token == -1  # the first part of the text
        # The context's last place needs no token behind it.
        assert [one.token for one in made[:-1]] == [step.token for step in expected]
        assert [one.finish for one in made] == [0] * 100 + [FINISHES.index("context")]
        if config.logprobs:
            for one, step in zip(made, expected, strict=False):
                assert abs(one.logprob - step.logprob) <= LOGPROB_TOLERANCE
        with pytest.raises(UsageError, match="the text has ended"):
            next(made_by(session, generator))
    assert session.length == 400


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_what_equals_the_last_of_top_k_stays(temperature: float, tmp_path: Path) -> None:
    """As in transformers, and as where all logits are looked at."""

    def twins(name: str, values: np.ndarray) -> np.ndarray:
        return np.repeat(values[::2], 2, axis=0) if "lm_head" in name else values

    write_tiny(tmp_path / "m.slm", tiny_config(tie_word_embeddings=False), twins)
    model = NativeModel(tmp_path / "m.slm")
    session, plain = model.session(threads=1), Engine(Plain(model.session(threads=1)))
    config = GenerationConfig(do_sample=True, seed=4, temperature=temperature, max_new_tokens=40)
    for top_k in (3, 5, 99):
        session.truncate(0)
        drawn = config.but(top_k=top_k)
        with opened(session, TEXT[:9], drawn) as generator:
            made = [one.token for one in made_by(session, generator)]
        assert made == [step.token for step in plain.generate(TEXT[:9], drawn, ())]


def test_it_goes_on_from_what_the_session_holds(model: NativeModel) -> None:
    session = model.session(threads=1)
    config = GenerationConfig(max_new_tokens=20)
    with opened(session, TEXT, config) as generator:
        answer = [one.token for one in made_by(session, generator) if one.token >= 0]
    assert session.length == len(TEXT) + 19
    session.truncate(len(TEXT) - 1)
    with opened(session, TEXT, config) as generator:
        again = made_by(session, generator)
        assert [next(again).token for _ in range(5)] == answer[:5]
    assert session.length == len(TEXT) + 4
    end = answer[7]
    with opened(session, [*TEXT, *answer[:5]], config, [end]) as generator:
        rest = list(made_by(session, generator))
    assert [one.token for one in rest] == answer[5 : answer.index(end, 5) + 1]
    assert FINISHES[rest[-1].finish] == "eos"


def test_it_is_held_to_a_constraint(model: NativeModel) -> None:
    session, config = model.session(threads=1), GenerationConfig(max_new_tokens=60)
    engine = Engine(Plain(model.session(threads=1)))
    limited = config.but(regex="x")  # what it is, the function says
    steps = list(engine.generate(TEXT[:20], limited, [99], constraint))
    with opened(session, TEXT[:20], config, [99], constraint()) as generator:
        made = list(made_by(session, generator))
    assert [one.token for one in made] == [step.token for step in steps]
    assert FINISHES[made[-1].finish] == steps[-1].finish
    assert steps[-1].finish in ("eos", "stop")


def test_guesses_behind_the_end_are_not_held(tmp_path: Path) -> None:
    """What follows the end of an answer in a text before is not read, however likely it is."""
    embedding = np.random.default_rng(1).standard_normal((100, 64)).astype(np.float32)

    def counting(name: str, values: np.ndarray) -> np.ndarray:
        """The model says of each token the next one."""
        if "embed" in name or "lm_head" in name:
            return np.roll(embedding, 1, axis=0) if "lm_head" in name else embedding
        return np.zeros_like(values) if "o_proj" in name or "down_proj" in name else values

    write_tiny(tmp_path / "m.slm", tiny_config(tie_word_embeddings=False), counting)
    session = NativeModel(tmp_path / "m.slm").session(threads=1)
    text = [*range(20), 0, 1, 2]
    maker = session.maker(text, GenerationConfig(), [7], 50, None)
    made = [one for _ in range(2) for one in maker.make()]
    assert [one.token for one in made] == [3, 4, 5, 6, 7]
    assert made[-1].finish == "eos"
    assert session.length == len(text) + 4
    session.truncate(session.length)


def test_what_cannot_be_is_refused(model: NativeModel) -> None:
    session, config = model.session(threads=1, context=32), GenerationConfig()
    for options, what in (
        ({"temperature": float("nan")}, "temperature is 0, or 1e-6"),
        ({"temperature": 1e-30}, "temperature is 0, or 1e-6"),
        ({"top_p": 1.5}, "top_p and min_p"),
        ({"typical_p": 1.5}, "typical_p is 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition penalty is 0.01 to 100"),
    ):
        with pytest.raises(UsageError, match=what), opened(session, [1], config, **options):
            pass
    with pytest.raises(ContextOverflowError), opened(session, TEXT, config):
        pass
    session.forward(np.array([1, 2]))
    with pytest.raises(UsageError, match="does not hold"), opened(session, [1, 2], config):
        pass
    for token in (-1, 100, 2**30):  # a penalty would be for it
        text = [1, token, 3]
        with (
            pytest.raises(UsageError, match="outside the vocabulary"),
            opened(session, text, config),
        ):
            pass
    with opened(session, [1, 2, 100], config) as generator:
        for _ in range(2):
            with pytest.raises(UsageError, match="outside the vocabulary|has ended"):
                next(made_by(session, generator))
    assert session.length == 2


def test_the_program_of_the_docs_says_what_the_runner_says(
    chat_model: Path, runner_path: Path, tmp_path: Path
) -> None:
    source = Path(build.__file__).parents[2] / "docs" / "reference" / "generate.c"
    program, library = tmp_path / "generate", build.library()
    compiler = (*build.find_toolchain().command, "-x", "c", "-std=c11", "-Wall", "-Werror")
    paths = (str(source), "-I", str(built.SOURCES), "-x", "none", str(library))
    build.run([*compiler, *paths, "-o", str(program)])
    told = [
        subprocess.run(command, capture_output=True, check=True).stdout
        for command in (
            [program, chat_model, "the inner"],
            [runner_path, chat_model, "-p", "the inner", "-n", "40", "-t", "2"],
        )
    ]
    assert told[0].rstrip(b"\n") == told[1].rstrip(b"\n") != b""


def test_several_texts_make_a_step_together(model: NativeModel) -> None:
    """What is wrong with one of them is not the others' error; two of a slot are refused."""
    session, error = model.session(threads=2, context=40, slots=3), ErrorText()
    config = GenerationConfig(max_new_tokens=3)
    expected = [step.token for step in Engine(model.session()).generate([5, 6], config, ())]
    with ExitStack() as stack:
        handles = [
            stack.enter_context(opened(slot, text, config))
            for slot, text in zip(session.slots, ([5, 6], [1, 100], [5, 6]), strict=True)
        ]

        def step(*which: int) -> list[Turn]:
            turns = (Turn * len(which))(*(Turn(generator=handles[at]) for at in which))
            for turn in turns:
                turn.error = error.argument
            status = session._library.pslm_generate(turns, len(turns), error.argument)
            error.check(status)
            return list(turns)

        turns = step(0, 1, 2)
        assert [turn.status for turn in turns] == [0, 1, 0]
        assert [turn.made[0].token for turn in turns if turn.count] == [expected[0]] * 2
        made = [expected[0]]
        while len(made) < 3:
            (turn,) = step(2)
            made += [one.token for one in turn.made[: turn.count]]
        assert made == expected
        for which, what in (
            ((0, 1), "has ended"),
            ((2,), "has ended"),
            ((0, 0), "two of one slot"),
        ):
            with pytest.raises(UsageError, match=what):
                step(*which)
        session.forward(np.array([9]))  # past the generator
        (turn,) = step(0)
        assert turn.status == 1
        with pytest.raises(UsageError, match="holds other tokens"):
            error.check(turn.status)


def test_a_text_ends_where_its_session_is_used_for_something_else(model: NativeModel) -> None:
    session, config = model.session(threads=1), GenerationConfig()
    for change in (
        lambda: session.forward(np.array([1])),
        lambda: session.truncate(0),
        lambda: session.restore(0, b""),
        lambda: session.maker([3, 4, 5], config, (), 5, None),
        lambda: session.use_adapter(0),
    ):
        session.truncate(0)
        maker = session.maker([3, 4], config, (), 5, None)
        assert len(maker.make()) == 1
        kept = change()
        with pytest.raises(UsageError, match="used for something else"):
            maker.make()
        del kept
    session.truncate(0)
    maker = session.maker([3, 4], config, (), 5, None)
    session.close()
    with pytest.raises(UsageError, match="used for something else"):
        maker.make()


def test_the_session_may_be_closed_first(model: NativeModel) -> None:
    """As a collector of garbage does, which ends what is left in any order."""
    session = model.session(threads=1)
    maker = session.maker([1, 2, 3], GenerationConfig(max_new_tokens=4), (), 4, None)
    library, error, made = load_library(), ErrorText(), MadeEntry()
    handle, maker.handle = maker.handle, ctypes.c_void_p()
    shared, session._shared.handle = session._shared.handle, ctypes.c_void_p()
    assert library.pslm_generator_next(handle, ctypes.byref(made), error.argument) == 0
    library.pslm_session_close(shared)
    status = library.pslm_generator_next(handle, ctypes.byref(made), error.argument)
    with pytest.raises(UsageError, match="the session is closed"):
        error.check(status)
    turn = Turn(generator=handle.value)
    with pytest.raises(UsageError, match="the session is closed"):
        error.check(library.pslm_generate(ctypes.byref(turn), 1, error.argument))
    library.pslm_generator_close(handle)


def test_guesses_are_weighed(tmp_path: Path) -> None:
    """Those that fail become rare, and those of several texts share what is left of a step."""
    probe = str(Path(__file__).with_name("lookup_probe"))
    names = [probe, "lookup"]
    built = build.compile_and_link(tmp_path / "probe", build.find_toolchain(), names, [], [])
    done = subprocess.run([built], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
