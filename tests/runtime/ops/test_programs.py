"""Programs of model.slm against an interpreter in float64: every feature, batch, path and state."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import numpy as np
import pytest
from native_runner import running
from native_support import assert_penalized, quantize
from program_cases import CASES, DECODERS, ENCODERS, WINDOW, program
from program_support import HIDDEN, VOCABULARY, Program

from pocketslm.errors import ContextOverflowError, UsageError
from pocketslm.models.tensors import Weight
from pocketslm.runtime.backends.native import NativeModel, NativeSession
from pocketslm.runtime.backends.native_library import ErrorText, Options, isa_names, load_library
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.generation import Engine
from pocketslm.runtime.ops.ids import STATE

# Root-mean-square error over the spread of the output. Float weights leave the fp16 cache as the
# largest error; quantized ones add int8 activations, an int8 cache about as much again.
FLOAT_TOLERANCE = 2e-3
INT8_TOLERANCE = 0.06
SPREAD_TOLERANCE = 1e-2  # with an int8 cache that no channel spoils
ARM_TOLERANCE = 2e-3  # another mathematical library, and other batches
PIECES = [300, 17, 2, 1, 1, 1, 260]  # batches, single tokens, and more than a window's ring
TOKENS = np.random.default_rng(5).integers(0, VOCABULARY, sum(PIECES))
# Models that forget: of windows what is older, of convolutions all but the last columns.
WINDOWED = ["gemma2", "gemma3", "gemma4", "mistral"]


def mixed(values: np.ndarray) -> Weight:
    """Kinds of weights in turn, by the shape."""
    kinds = [(4, "min"), (8, "sym"), (4, "sym"), (8, "zp"), (4, "zp"), (8, "min")]
    return quantize(values, *kinds[sum(values.shape) // 16 % len(kinds)])


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((actual - expected) ** 2)) / expected.std())


def in_pieces(session: NativeSession, tokens: np.ndarray, pieces: list[int]) -> np.ndarray:
    parts = np.split(tokens, np.cumsum(pieces)[:-1])
    return np.concatenate([session.forward(part, all_logits=True) for part in parts])


@pytest.mark.parametrize("isa", isa_names())
@pytest.mark.parametrize("name", CASES)
def test_float_weights_match_the_interpreter(name: str, isa: str, tmp_path: Path) -> None:
    made = program(name)
    expected = made.run(TOKENS)
    session = NativeModel(made.write(tmp_path / "m.slm")).session(isa=isa, threads=2)
    pieces = [len(TOKENS)] if name in ENCODERS else PIECES
    actual = in_pieces(session, TOKENS, pieces)
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) <= FLOAT_TOLERANCE
    # And with single tokens from the beginning.
    if name in DECODERS:
        session.truncate(0)
        few = in_pieces(session, TOKENS[:70], [1] * 40 + [17, 2, 11])
        assert relative_error(few, expected[:70]) <= FLOAT_TOLERANCE


@pytest.mark.parametrize("isa", isa_names())
@pytest.mark.parametrize("name", CASES)
def test_quantized_weights_and_cache(name: str, isa: str, tmp_path: Path) -> None:
    made = program(name, mixed)
    tokens = TOKENS[:320]
    expected = made.run(tokens)
    model = NativeModel(made.write(tmp_path / "m.slm"))
    for kv_type in ("fp16", "int8"):
        session = model.session(isa=isa, threads=3, kv_type=kv_type)
        actual = in_pieces(session, tokens, [320] if name in ENCODERS else [300, 17, 2, 1])
        assert relative_error(actual, expected) <= INT8_TOLERANCE


def test_a_channel_far_above_the_others_costs_int8_keys_little(tmp_path: Path) -> None:
    """Keys and queries are spread over all channels before they are rounded."""
    made = Program()
    made.embed()
    made.layer = 0
    made.attention(dim=64, rope=0, head_norms=True)
    made.head()
    attend = next(op for op in made.operations if op.code == "attend")
    for section, factor in zip(attend.sections[1:3], (1 / 40, 40), strict=True):
        made.tensors[section][5] *= factor  # scores stay as they were
    expected = made.run(TOKENS[:200])
    session = NativeModel(made.write(tmp_path / "m.slm")).session(kv_type="int8")
    actual = session.forward(TOKENS[:200], all_logits=True)
    assert relative_error(actual, expected) <= SPREAD_TOLERANCE


@pytest.mark.parametrize("name", DECODERS)
def test_heads_agree(name: str, tmp_path: Path) -> None:
    """The greedy token and the most probable ones are those of the logits."""
    model = NativeModel(program(name, mixed).write(tmp_path / "m.slm"))
    whole, greedy, top, several = (model.session(threads=2) for _ in range(4))
    logits = whole.forward(TOKENS[:30], all_logits=True)
    found = several.forward_greedy(TOKENS[:30], 21)  # more than a tile
    np.testing.assert_array_equal(logits[-21:][np.arange(21), found], logits[-21:].max(axis=1))
    assert_penalized(model)
    whole.truncate(0)
    for token in TOKENS[:30]:
        logits = whole.forward(np.array([token]))[0]
        assert logits[greedy.step_greedy(int(token))] == logits.max()
        best, values, log_total = top.forward_top(np.array([token]), 5)
        np.testing.assert_array_equal(values, logits[best])
        np.testing.assert_array_equal(values, np.sort(logits)[::-1][:5])
        assert abs(log_total - np.log(np.exp(logits.astype(np.float64)).sum())) <= 1e-5


def test_simd_paths_give_the_same_bits(tmp_path: Path) -> None:
    paths = [isa for isa in isa_names() if isa != "scalar"]
    for name in CASES:
        model = NativeModel(program(name, mixed).write(tmp_path / f"{name}.slm"))
        outputs = [model.session(isa=isa, threads=2).forward(TOKENS[:300]) for isa in paths]
        for other in outputs[1:]:
            np.testing.assert_array_equal(outputs[0], other)


@pytest.mark.parametrize("isa", isa_names())
@pytest.mark.parametrize("name", DECODERS)
def test_tokens_get_the_same_bits_together_as_one_by_one(
    name: str, isa: str, tmp_path: Path
) -> None:
    """Past the borders of all pieces of attention, windows and the ring of their keys."""
    model = NativeModel(program(name, mixed).write(tmp_path / "m.slm"))
    for kv_type in ("fp16", "int8"):
        together = model.session(isa=isa, threads=3, kv_type=kv_type)
        alone = model.session(isa=isa, threads=2, kv_type=kv_type)
        for part in np.split(TOKENS[:620], [50, 53, 61, 66, 300, 303, 311, 505, 520, 523, 531]):
            expected = together.forward(part, all_logits=True)
            if len(part) > 20:  # a prompt
                alone.forward(part)
                continue
            for token, logits in zip(part, expected, strict=True):
                np.testing.assert_array_equal(alone.forward(np.array([token]))[0], logits)


def test_thread_counts_give_the_same_bits(tmp_path: Path) -> None:
    for name in CASES:
        model = NativeModel(program(name, mixed).write(tmp_path / f"{name}.slm"))
        outputs = [model.session(threads=threads).forward(TOKENS[:290]) for threads in (1, 2, 3)]
        for other in outputs[1:]:
            np.testing.assert_array_equal(outputs[0], other)


@pytest.mark.parametrize(("cpu", "isa"), [("max", "neon_i8mm"), ("cortex-a76", "neon_dotprod")])
def test_arm_paths_agree_with_this_machine(
    cpu: str, isa: str, arm_runner_path: Path, tmp_path: Path
) -> None:
    with running(["qemu-aarch64-static", "-cpu", cpu, str(arm_runner_path)]) as runner:
        for name, kv_type in itertools.product(CASES, ("fp16", "int8")):
            path = program(name, mixed).write(tmp_path / f"{name}.slm")
            loaded = runner.ask(op="load", path=str(path), threads=2, kv=kv_type)
            assert loaded["isa"] == isa
            session = NativeModel(path).session(threads=2, kv_type=kv_type)
            # A batch, a single token behind it, and more than a window.
            for count in (27,) if name in ENCODERS else (27, 28, 60):
                tokens = TOKENS[:count]
                asked = runner.ask(op="logits", tokens=tokens.tolist())
                session.truncate(0)
                expected = session.forward(tokens)[0]
                actual = np.array(asked["logits"], np.float32)
                assert relative_error(actual, expected) <= ARM_TOLERANCE


# State.


def test_a_window_takes_a_ring_not_the_context(tmp_path: Path) -> None:
    made = program("mistral", context=8192)
    path = made.write(tmp_path / "m.slm")
    model = NativeModel(path)
    kept = {context: model.session(context=context).kv_bytes for context in (256, 2048, 8192)}
    ring = [-(-(window + 256) // 64) * 64 for window in (5, WINDOW)]
    assert kept[256] == 2 * 256 * 2 * 16 * 2
    assert kept[2048] == kept[8192] == sum(ring) * 2 * 16 * 2


@pytest.mark.parametrize("kv_type", ["fp16", "int8"])
@pytest.mark.parametrize("name", DECODERS)
def test_save_restore_and_truncate(name: str, kv_type: str, tmp_path: Path) -> None:
    model = NativeModel(program(name, mixed).write(tmp_path / "m.slm"))
    options = {"threads": 1, "kv_type": kv_type}
    for length in (3, 37, 300, 400):
        session = model.session(**options)
        session.forward(TOKENS[:length])
        saved = session.save()
        tail = TOKENS[length : length + 40]
        expected = session.forward(tail)
        # What was there before must not matter.
        other = model.session(**options)
        other.forward(TOKENS[::-1][:333])
        other.restore(length, saved)
        assert other.length == length
        assert other.rewind_limit <= length
        np.testing.assert_array_equal(other.forward(tail), expected)
        np.testing.assert_array_equal(other.forward(TOKENS[:5]), session.forward(TOKENS[:5]))
        with pytest.raises(UsageError, match="saved state"):
            other.restore(length, saved[:-1])
        # Back to where this session was, where it can go there.
        limit = session.rewind_limit
        assert 1 <= limit <= session.length
        if length >= limit:
            session.truncate(length)
            np.testing.assert_array_equal(session.forward(tail), expected)
        else:
            with pytest.raises(UsageError, match=f"expected 0 or {limit} to"):
                session.truncate(length)
            with pytest.raises(UsageError, match="save"):
                session.save(length)
        session.truncate(0)
        session.forward(TOKENS[:length])
        np.testing.assert_array_equal(session.forward(tail), expected)


@pytest.mark.parametrize("name", WINDOWED)
def test_every_length_that_a_window_can_be_cut_back_to(name: str, tmp_path: Path) -> None:
    """From the limit on a cut context is as good as a new one; below it, it is refused."""
    model = NativeModel(program(name).write(tmp_path / "m.slm"))
    session = model.session(threads=1)
    session.forward(TOKENS[:500])
    limit = session.rewind_limit
    room = -(-(WINDOW + 256) // 64) * 64
    if name != "mistral":  # its other window is shorter, and so is its ring
        assert limit == -(-(500 - room) // 16) * 16 + WINDOW - 1
    with pytest.raises(UsageError, match="truncate"):
        session.truncate(limit - 1)
    assert session.length == 500
    for length in (480, limit + 7, limit):
        session.truncate(length)
        assert session.rewind_limit == limit
        fresh = model.session(threads=1)
        fresh.forward(TOKENS[:length])
        np.testing.assert_array_equal(
            session.forward(TOKENS[500:510]), fresh.forward(TOKENS[500:510])
        )


@pytest.mark.parametrize("kv_type", ["fp16", "int8"])
@pytest.mark.parametrize("name", ["gemma3", "mistral"])
def test_a_state_that_was_saved_at_the_limit_can_be_cut_back(
    name: str, kv_type: str, tmp_path: Path
) -> None:
    """It holds whole blocks of positions, those of which it lets a session go back to."""
    model = NativeModel(program(name).write(tmp_path / "m.slm"))
    session, other, fresh = (model.session(threads=2, kv_type=kv_type) for _ in range(3))
    session.forward(TOKENS[:500])
    limit = session.rewind_limit
    session.truncate(limit)
    saved = session.save()
    other.restore(limit, saved)
    for length in range(limit, other.rewind_limit - 1, -1):
        other.truncate(length)
        fresh.truncate(0)
        fresh.forward(TOKENS[:length])
        np.testing.assert_array_equal(
            other.forward(TOKENS[500:503]), fresh.forward(TOKENS[500:503])
        )


def test_a_convolution_goes_back_to_nothing_but_the_beginning(tmp_path: Path) -> None:
    session = NativeModel(program("lfm").write(tmp_path / "m.slm")).session(threads=1)
    assert session.rewind_limit == 0
    session.forward(TOKENS[:20])
    assert session.rewind_limit == 20
    session.truncate(20)
    with pytest.raises(UsageError, match="expected 0 or 20 to 20"):
        session.truncate(19)


class CallersCache:
    """A session whose keys and values lie in arrays of ours, which begin as NaN."""

    def __init__(self, path: Path, positions: int) -> None:
        self.library, self.error = load_library(), ErrorText()
        self.model = NativeModel(path)
        self.handle = ctypes.c_void_p()
        options, handle = Options(0, 2, 2, 0, None), ctypes.byref(self.handle)
        self.error.check(
            self.library.pslm_session_open_slots(
                self.model._handle, ctypes.byref(options), 1, handle, self.error.argument
            )
        )
        self.arrays = []
        for index in range(self.model.info.states):
            state = (ctypes.c_uint32 * 4)()
            assert self.library.pslm_model_state(self.model._handle, index, state) == 0
            assert state[0] == STATE["kv"]
            shape = (2, state[1], positions, state[2])
            self.arrays += list(np.full(shape, np.nan, np.float16))
        assert self.library.pslm_model_state(self.model._handle, index + 1, state) != 0
        self.positions = positions

    def forward(self, tokens: np.ndarray, past: int) -> np.ndarray:
        places = (ctypes.c_void_p * len(self.arrays))(*(a.ctypes.data for a in self.arrays))
        sizes = (ctypes.c_size_t(n) for n in (len(places), self.positions, past))
        bind = self.library.pslm_bind_cache
        self.error.check(bind(self.handle, places, *sizes, self.error.argument))
        ids, out = tokens.astype(np.int32), np.empty(VOCABULARY, np.float32)
        arguments = ids.ctypes.data, ids.size, 1, out.ctypes.data, out.size, self.error.argument
        self.error.check(self.library.pslm_forward(self.handle, *arguments))
        return out

    def close(self) -> None:
        self.library.pslm_session_close(self.handle)


@pytest.mark.parametrize("name", WINDOWED)
def test_a_callers_cache_keeps_all_positions(name: str, tmp_path: Path) -> None:
    """So a window can be cut back to any length."""
    path = program(name).write(tmp_path / "m.slm")
    session = CallersCache(path, 500)
    session.forward(TOKENS[:400], 0)
    other = NativeModel(path).session(threads=1)
    for length in (390, 17):
        other.forward(TOKENS[:length])
        expected = other.forward(TOKENS[5:9])
        other.truncate(0)
        actual = session.forward(TOKENS[5:9], length)
        assert relative_error(actual, expected[0]) <= FLOAT_TOLERANCE
    session.close()


@pytest.mark.parametrize(
    ("name", "reason"), [("lfm", "state of a convolution"), ("bert", "bidirectional")]
)
def test_what_a_callers_cache_cannot_hold(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=reason):
        CallersCache(program(name).write(tmp_path / "m.slm"), 100)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_keep_nothing(name: str, tmp_path: Path) -> None:
    made = program(name)
    model = NativeModel(made.write(tmp_path / "m.slm"))
    assert model.info.output_size == HIDDEN
    session = model.session(threads=2)
    for count in (1, 2, 17, 300):
        expected = made.run(TOKENS[:count])
        actual = session.forward(TOKENS[:count], all_logits=True)
        assert session.length == 0
        assert relative_error(actual, expected) <= FLOAT_TOLERANCE
        np.testing.assert_array_equal(session.forward(TOKENS[:count]), actual[-1:])
    with pytest.raises(UsageError, match="no next token"):
        session.step_greedy(1)
    with pytest.raises(UsageError, match="no next token"):
        session.forward_top(TOKENS[:3], 2)
    with pytest.raises(ContextOverflowError):
        session.forward(np.zeros(641, np.int64))


@pytest.mark.parametrize("name", ["llama", "lfm", "mistral"])
def test_a_prompt_is_read_from_where_the_session_can_go_back_to(name: str, tmp_path: Path) -> None:
    """The state after the prompt before serves a session that forgets; never that of others."""
    model = NativeModel(program(name, mixed).write(tmp_path / "m.slm"))
    session = model.session(threads=1)
    engine = Engine(session)
    config = GenerationConfig(max_new_tokens=5, prompt_lookup_num_tokens=0)
    first = [int(token) for token in TOKENS[:360]]

    def answer(engine: Engine, prompt: list[int]) -> list[int]:
        return [step.token for step in engine.generate(prompt, config, [])]

    def ran(prompt: list[int]) -> int:
        """How many tokens this prompt makes the session run, with the right answer."""
        session.profile()
        assert answer(engine, prompt) == answer(Engine(model.session(threads=1)), prompt)
        return session.times().tokens

    after = [(token + 1) % VOCABULARY for token in first[:20]]
    assert ran(first) == 360 + 4
    assert ran(first + after) == 20 + 4  # behind the prompt, but the answer was another
    assert ran(first[:350] + after) == (370 if name == "lfm" else 20) + 4  # within the prompt
    assert ran(first[:30] + after) == (20 if name == "llama" else 50) + 4  # before the window
    engine.cache.tokens.clear()
    assert ran(first + after) == 384


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """A window of one position more, or a factor forgotten, is seen."""
    for name, change in itertools.product(("mistral",), ("window", "factor")):
        made = program(name)
        session = NativeModel(made.write(tmp_path / "m.slm")).session(threads=1)
        actual = session.forward(TOKENS[:200], all_logits=True)
        for op in made.operations:
            if op.code == "attend" and change == "window":
                op.sizes[5] += 1
            if op.code == "attend" and change == "factor":
                op.numbers[0] *= 1.02
        assert relative_error(actual, made.run(TOKENS[:200])) > FLOAT_TOLERANCE
    assert not relative_error(np.full(3, np.nan), np.arange(3.0)) <= FLOAT_TOLERANCE
