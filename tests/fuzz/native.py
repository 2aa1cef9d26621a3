"""Targets in C++, under AddressSanitizer and UBSan: the library in this process, and the runner."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, ClassVar, NoReturn

import numpy as np
from native_runner import Runner

from pocketslm.errors import PocketSlmError
from pocketslm.runtime.backends import Part, Penalty, Wanted
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.ops.ids import ROLE

from . import mutate
from .target import Mutators, Target

ENGINE = ("runtime/ops/*.cpp", "runtime/ops/*.h", "runtime/ops/*.inl")
CONTEXT = 48
SLOTS = 3
PROTOCOL = (
    *('{}[]",:\\ueE-+.019ax', "\0", "\u00e9", "null", "true", "1e999", "-1", "4294967296", "[[[["),
    *('"op":', '"tokens":[]', '"prompt":""', '"messages":[{}]', '"eos":[', '"id":"a"', "\\ud83d"),
)
REQUESTS: list[dict[str, Any]] = [
    {"op": "logits", "tokens": [1, 2, 3], "first": 0, "base64": True},
    {"op": "generate", "tokens": [1, 2], "max_tokens": 3, "ignore_eos": True, "logprobs": True},
    {"op": "generate", "prompt": "the", "max_tokens": 2, "temperature": 1.0, "top_k": 3},
    {"op": "encode", "messages": [{"role": "user", "content": "hi there 12"}]},
]


def generate(session: Any, config: GenerationConfig) -> None:
    """Two steps of texts in all slots."""
    for slot in session.slots:
        slot.truncate(0)
    makers = [slot.maker([1, 2, 1, 2], config, (), 9, None) for slot in session.slots]
    for _ in range(2):
        for made in session.make(makers):
            if isinstance(made, PocketSlmError):
                raise made


def sections(data: bytes) -> list[tuple[int, int, int]]:
    """(role, offset, bytes) of a model file, as far as its table says."""
    count = min(struct.unpack_from("<I", data, 12)[0], (len(data) - 128) // 32, 1000)
    found = [struct.unpack_from("<HHIIIQQ", data, 128 + 32 * at) for at in range(count)]
    return [(role, offset, size) for role, _, _, _, _, offset, size in found]


def within(data: bytes, rng: Random, spans: list[tuple[int, int]]) -> bytes:
    """Up to four changes of numbers and bytes, each in one of the spans (start, size)."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        start, size = rng.choice(spans)
        if size < 8 or start + size > len(changed):
            continue
        at = start + rng.randrange(size - 7)
        if rng.random() < 0.7:
            at &= ~3
            word = mutate.number(rng)
        else:
            word = bytes([rng.choice((0, 1, 255, changed[at] ^ 1 << rng.randrange(8)))])
        changed[at : at + len(word)] = word
    return bytes(changed)


class OfModels(Target):
    """A target whose inputs are model files."""

    sanitized = True

    def mutate(self, data: bytes, rng: Random) -> bytes:
        name, _, content = data.partition(b"\0")
        found = sections(content)
        table = (8, 120 + 32 * len(found))
        parts = [(at, size) for role, at, size in found if self.wants(role)]
        spans = [table, *parts] if parts else [table]
        # As often in the program and its states as in all the rest.
        first = [
            (at, size) for role, at, size in found if role in (ROLE["program"], ROLE["states"])
        ]
        return name + b"\0" + within(content, rng, first if first and rng.random() < 0.5 else spans)

    def wants(self, role: int) -> bool:
        return True

    def model(self, content: bytes) -> Any:
        from pocketslm.runtime.backends.native import NativeModel

        path = self.scratch / "m.slm"
        path.unlink(missing_ok=True)  # the one before may still be mapped
        path.write_bytes(content)
        return NativeModel(path)


class ModelFiles(OfModels):
    """Files of all versions: opened, run in every way, their state saved and put back."""

    name = "model"
    covers = ENGINE

    def feed(self, name: str, content: bytes) -> None:
        model = self.model(content)
        if model.info.max_context > 1 << 16 or model.info.vocab_size > 1 << 20:
            return
        rng = Random(len(content) ^ content[-1])
        kv = rng.choice(("fp16", "int8"))
        from pocketslm.runtime.backends.native_library import isa_names

        session = model.session(
            threads=1,
            context=min(CONTEXT, model.info.max_context),
            kv_type=kv,
            isa=rng.choice(isa_names()),
            slots=SLOTS if model.info.output_size == model.info.vocab_size else 1,
        )
        tokens = np.arange(5) % model.info.vocab_size
        parts = [
            Part(slot, tokens[: rng.randint(2, 5)], rng.choice(list(Wanted)), 3, following=slot + 1)
            for slot in range(len(session.slots))
        ]
        steps: list[Callable[[], Any]] = [
            lambda: session.forward(tokens, all_logits=True),
            lambda: session.step_greedy(1),
            lambda: session.forward_greedy(tokens, 4, Penalty(1.5, tokens)),
            lambda: session.forward_top(tokens[:2], 7),
            lambda: session.restore(session.length, session.save()),
            lambda: session.truncate(max(session.rewind_limit, session.length - 2)),
            lambda: session.forward(tokens[:1]),
            lambda: session.forward_slots(parts),
            lambda: session.forward_slots(parts[1:]),
            lambda: generate(session, GenerationConfig(repetition_penalty=1.2)),
            lambda: generate(session, GenerationConfig(do_sample=True, seed=1, logprobs=True)),
            lambda: session.slots[-1].restore(session.length, session.save()),
        ]
        for step in steps:  # numbers may not be finite
            with suppress(PocketSlmError):
                step()


class TokenizerSections(OfModels):
    """The tokenizer that is packed into a model file."""

    name = "packed"
    covers = (
        "runtime/ops/runner/tokenizer.cpp",
        "runtime/ops/runner/words.cpp",
        "runtime/ops/runner/bert.cpp",
        "runtime/ops/runner/unicode.cpp",
    )

    def __init__(self, home: Path, scratch: Path) -> None:
        super().__init__(home, scratch)
        self.texts = (home / "texts").read_text("utf-8").split("\x1e")

    def wants(self, role: int) -> bool:
        return role == ROLE["tokenizer"]

    def mutate(self, data: bytes, rng: Random) -> bytes:
        name, _, content = data.partition(b"\0")
        spans = [(at, size) for role, at, size in sections(content) if self.wants(role)]
        # Its own header and tables first.
        spans += [(at, min(size, 256)) for at, size in spans] * 2
        return name + b"\0" + within(content, rng, spans)

    def feed(self, name: str, content: bytes) -> None:
        from pocketslm.runtime.backends.native_tokenizer import NativeTokenizer

        tokenizer = NativeTokenizer(self.model(content))
        rng = Random(len(content) ^ content[-200])
        for special in (False, True):
            text = "".join(rng.choice(self.texts) for _ in range(3))
            normalized = tokenizer.takes_normalized
            whole = special and not normalized
            ids = tokenizer.encode(
                text, parse_special=special, add_special_tokens=whole, normalized=normalized
            )
            with suppress(PocketSlmError):
                tokenizer.decode(ids, goes_on=special)
        with suppress(PocketSlmError):
            tokenizer.decode([rng.randrange(4000) for _ in range(8)])


class States(Target):
    """A saved state that was changed, cut or belongs to another model."""

    name = "state"
    covers = ("runtime/ops/state.cpp", "runtime/ops/session.cpp", "runtime/ops/api.cpp")
    sanitized = True

    def __init__(self, home: Path, scratch: Path) -> None:
        from pocketslm.runtime.backends.native import NativeModel

        super().__init__(home, scratch)
        self.sessions = {
            f"{path.stem}-{kv}": NativeModel(path).session(threads=1, context=CONTEXT, kv_type=kv)
            for path in sorted((home / "models").glob("*.slm"))
            for kv in ("fp16", "int8")
        }

    def seeds(self) -> list[bytes]:
        made = []
        for name, session in self.sessions.items():
            for length in (1, 9, 40):
                session.truncate(0)
                session.forward(np.arange(length) % 90)
                made.append(f"{name} {length}".encode() + b"\0" + session.save())
        return made + super().seeds()

    def mutate(self, data: bytes, rng: Random) -> bytes:
        name, _, content = data.partition(b"\0")
        if rng.random() < 0.2:
            words = name.split()
            words[rng.randrange(2)] = rng.choice(
                (b"1", b"0", b"48", b"49", b"9999", b"40", *(one.encode() for one in self.sessions))
            )
            name = b" ".join(words)
        return name + b"\0" + mutate.binary(content, rng, 512)

    def feed(self, name: str, content: bytes) -> None:
        key, _, length = name.partition(" ")
        session = self.sessions.get(key) or next(iter(self.sessions.values()))
        count = int(length) if length.isdecimal() else 1
        session.restore(count, content)
        with suppress(PocketSlmError):  # of numbers that are not finite, of a context that is full
            session.step_greedy(3)
            session.truncate(max(session.rewind_limit, session.length - 1))
            session.forward_top(np.array([1, 2]), 3)


class Adapters(Target):
    """Low-rank updates of any shape and place, of several adapters, which slots take and give up
    between the steps of their texts."""

    name = "adapter"
    covers = (
        *("runtime/ops/api.cpp", "runtime/ops/border_slots.cpp", "runtime/ops/session.cpp"),
        "runtime/ops/low_rank.h",
    )
    sanitized = True
    numbers: ClassVar[tuple[int, ...]] = (0, 1, 1, 2, 2, 3, 63, 64, 65, 2**31, 2**32 - 1)

    def __init__(self, home: Path, scratch: Path) -> None:
        from pocketslm.runtime.backends.native import NativeModel

        super().__init__(home, scratch)
        self.session = NativeModel(home / "m.slm").session(threads=1, context=CONTEXT, slots=SLOTS)

    def seeds(self) -> list[bytes]:
        first = [[0, "q_proj", 64, 64, 4, 1.0], [1, "down_proj", 64, 96, 2, 0.5]]
        second = [[1, "gate_proj", 96, 64, 33, 0.1]]
        steps = [
            *(["set", 1, first], ["use", 0, 1], ["step", 0], ["set", 2, second], ["use", 1, 2]),
            *(["together"], ["set", 1, []], ["use", 0, 0], ["together"], ["set", 2, first]),
        ]
        return [json.dumps(steps).encode()]

    def mutate(self, data: bytes, rng: Random) -> bytes:
        steps = json.loads(data)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(steps))
            match rng.randrange(6):
                case 0:
                    steps[at:at] = [rng.choice(steps)]
                case 1 if len(steps) > 1:
                    del steps[at]
                case 2:
                    steps[at:at] = [["use", rng.randrange(SLOTS), rng.choice(self.numbers)]]
                case 3:
                    steps[at:at] = [rng.choice((["step", rng.randrange(SLOTS)], ["together"]))]
                case _:
                    sets = [step for step in steps if step[0] == "set"]
                    if sets:
                        self._change(rng.choice(sets), rng)
        return json.dumps(steps[:24]).encode()

    def _change(self, step: list[Any], rng: Random) -> None:
        parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "x")
        sizes = (0, 1, 2, 4, 31, 32, 33, 64, 96, 128, 1000)
        if rng.random() < 0.2 or not step[2]:
            step[1] = rng.choice(self.numbers)
            return
        one = list(rng.choice(step[2]))
        at = rng.randrange(6)
        values: dict[int, Any] = {0: (0, 1, 2, 2**31), 1: parts, 5: mutate.FLOATS}
        one[at] = rng.choice(values.get(at, sizes))
        where = rng.randrange(len(step[2]))
        step[2] = [*step[2][:where], one, *step[2][where + (rng.random() < 0.8) :]][:8]

    def run(self, data: bytes) -> None:
        refused = []
        for slot in self.session.slots:
            slot.use_adapter(0)
            slot.truncate(0)
        for step in json.loads(data):
            try:
                getattr(self, f"_{step[0]}")(*step[1:])
            except PocketSlmError as error:
                refused.append(error)
        if refused:
            raise refused[0]

    def _set(self, number: int, updates: list[Any]) -> None:
        from pocketslm.runtime.adapters import Update

        made = []
        for layer, part, rows, columns, rank, value in updates:
            a = np.full((rank, columns), value, np.float32)
            made.append(Update(layer, part, a, np.full((rows, rank), 0.01, np.float32)))
        self.session.set_adapter(number, made)

    def _use(self, slot: int, number: int) -> None:
        self.session.slots[slot].use_adapter(number)

    def _step(self, slot: int) -> None:
        self.session.slots[slot].forward(np.arange(3))

    def _together(self) -> None:
        self.session.forward_slots(
            [Part(slot, np.arange(2), Wanted.TOP, 3) for slot in range(SLOTS)]
        )


class OfRunner(Target):
    """A target that is fed through ``pocketslm-run --json``."""

    sanitized = True
    cpu_seconds = 60

    def __init__(self, home: Path, scratch: Path) -> None:
        super().__init__(home, scratch)
        self.runner: Runner | None = None

    def answer(self, request: dict[str, Any], before: str = "") -> None:
        """Send a request, after another line; read events until its last."""
        if self.runner is None:
            self.runner = Runner([str(self.home.parent / "pocketslm-run")])
            self.begin()
        process = self.runner.process
        assert process.stdin is not None
        assert process.stdout is not None
        lines = [*([before] if before.strip() else []), json.dumps({**request, "id": "fuzz"})]
        try:
            process.stdin.write("\n".join(lines) + "\n")
            process.stdin.flush()
            while line := process.stdout.readline():
                event = json.loads(line, parse_constant=_no_json)
                if event["id"] == "fuzz" and event["event"] != "token":
                    return
            reason = "the program ended"
        except (OSError, ValueError) as error:
            reason = str(error)
        process.kill()
        report = process.communicate()[1][-4000:]
        self.runner = None
        raise AssertionError(f"{reason}\n{report}")

    def begin(self) -> None:
        """The first requests of a new program."""

    def close(self) -> None:
        if self.runner is not None:
            self.runner.process.stdin.close()  # type: ignore[union-attr]
            self.runner.process.wait(60)
            self.runner.process.stdout.close()  # type: ignore[union-attr]
            self.runner.process.stderr.close()  # type: ignore[union-attr]
            self.runner = None


class Protocol(OfRunner):
    """Lines that are no requests, or strange ones."""

    name = "protocol"
    covers = ("runtime/ops/runner/*.cpp",)

    def begin(self) -> None:
        self.answer(self.load())

    def load(self) -> dict[str, Any]:
        return {"op": "load", "path": str(self.home / "m.slm"), "threads": 1, "context": 64}

    def mutate(self, data: bytes, rng: Random) -> bytes:
        line = list(data.decode("utf-8", "replace"))
        for _ in range(rng.randint(0, 3)):
            at = rng.randrange(len(line) + 1)
            line[at : at + rng.randint(0, 3)] = rng.choice(PROTOCOL)
        return "".join(line).replace("\n", " ").replace("quit", "q").encode("utf-8", "replace")

    def run(self, data: bytes) -> None:
        # What follows is answered whatever came of the line, which may have loaded nothing.
        self.answer(self.load(), before=data.decode("utf-8", "replace"))


class RunnerFiles(OfRunner, OfModels):
    """Model files with a tokenizer and a chat in the runner."""

    name = "runner_model"
    covers = ("runtime/ops/runner/*.cpp",)

    def feed(self, name: str, content: bytes) -> None:
        path = self.scratch / "m.slm"
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        kv = "int8" if content[-1] % 2 else "fp16"
        load = {"op": "load", "path": str(path), "threads": 2, "kv": kv, "context": CONTEXT}
        for request in (load, *REQUESTS):
            self.answer(request)


def _no_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


class Grammars(Target):
    """Schemas, expressions and grammars: what one allows is walked, and a mask must agree with
    what a single token is told."""

    name = "grammar"
    covers = ("runtime/ops/grammar/*.cpp", "runtime/ops/grammar/*.h")
    sanitized = True
    mutators: ClassVar[Mutators] = {"json_schema": mutate.json_tree, "": mutate.text}

    def __init__(self, home: Path, scratch: Path) -> None:
        from pocketslm.runtime.constraint import TokenTexts

        super().__init__(home, scratch)
        whole = [b"", b'": "', b'"}', b'",', b"true", b" a", b"12", b"\xc3\xa9", b"aaaa"]
        self.texts = [
            TokenTexts([*(bytes([n]) for n in range(256)), *whole], (256,), strip=strip)
            for strip in (False, True)
        ]

    def feed(self, name: str, content: bytes) -> None:
        from pocketslm.runtime.constraint import KINDS, Constraint, Grammar

        kind = next((one for one in KINDS if one == name), "regex")
        rng = Random(content)
        grammar = Grammar(kind, content.decode("utf-8", "surrogateescape"))
        constraint = Constraint(grammar, rng.choice(self.texts))
        for _ in range(24):
            allowed = constraint.allowed()
            tokens = np.flatnonzero(allowed)
            if constraint.must_end or not tokens.size:
                return
            token = int(rng.choice(tokens))
            if (other := rng.randrange(allowed.size)) and not allowed[other]:
                with suppress(PocketSlmError):
                    constraint.advance(other)
                    raise AssertionError(f"{other} is taken, and was not allowed")
            try:
                constraint.advance(token)
            except PocketSlmError as error:
                raise AssertionError(f"{token} was allowed: {error}") from None


TARGETS = (ModelFiles, TokenizerSections, States, Adapters, Grammars, Protocol, RunnerFiles)
