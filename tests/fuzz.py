"""Feed ``pocketslm-run`` what it should not get, under AddressSanitizer and UBSan.

    python tests/fuzz.py MODEL.slm --minutes 5

mutates the lines of ``corpus/protocol.jsonl`` and the bytes of the model, for which a small one is
best. What ends the program is kept in the folder of ``--keep``. The tests run a bounded part.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from native_runner import Runner, running

from pocketslm.runtime.ops import build

CORPUS = Path(__file__).parent / "corpus"
PIECES = [
    *('{}[]",:\\ueE-+.019ax', "\0", "\u00e9", "null", "true", "1e999", "-1", "4294967296", "[[[["),
    *('"op":', '"tokens":[]', '"prompt":""', '"messages":[{}]', '"eos":[', '"id":"a"', "\\ud83d"),
]
# Of float32, float16 and whole numbers: those that programs forget.
WORDS = [struct.pack("<f", value) for value in (float("nan"), float("inf"), 3e38, 1e-45, -0.0)]
WORDS += [struct.pack("<e", value) for value in (float("nan"), float("inf"), 65504.0)]
WORDS += [bytes([value]) for value in (0, 1, 15, 16, 17, 63, 64, 127, 128, 255)]
REQUESTS: list[dict[str, Any]] = [
    {"op": "logits", "tokens": [1, 2, 3], "first": 0, "base64": True},
    {"op": "generate", "tokens": [1, 2], "max_tokens": 3, "ignore_eos": True, "logprobs": True},
    {"op": "generate", "prompt": "the", "max_tokens": 2, "temperature": 1.0, "top_k": 3},
    {"op": "encode", "messages": [{"role": "user", "content": "hi there 12"}]},
]


class Crash(Exception):
    """The program ended, or its answer is no JSON; ``found`` is what it was given last."""

    def __init__(self, found: bytes, report: str) -> None:
        super().__init__(report)
        self.found = found


def protocol(program: Path, model: Path, rng: random.Random) -> Iterator[int]:
    """Mutated lines, one after the other, for ever; yields how many there were. Raises Crash."""
    seeds = (CORPUS / "protocol.jsonl").read_text(encoding="utf-8").splitlines()
    load = {"op": "load", "path": str(model), "threads": 1, "context": 64}
    with running([str(program)]) as runner:
        _answer(runner, load)
        for count in itertools.count(1):
            line = list(rng.choice(seeds))
            for _ in range(rng.randint(0, 3)):
                at = rng.randrange(len(line) + 1)
                line[at : at + rng.randint(0, 3)] = rng.choice(PIECES)
            text = "".join(line).replace("\n", " ").replace("quit", "q")
            # What follows is answered whatever came of the line, which may have loaded nothing.
            _answer(runner, load, before=text)
            yield count


def models(program: Path, model: Path, folder: Path, rng: random.Random) -> Iterator[int]:
    """Mutated model files, opened and run; yields how many there were. Raises Crash."""
    content = model.read_bytes()
    path = folder / "mutated.slm"
    sections = struct.unpack_from("<I", content, 12)[0]
    with running([str(program)]) as runner:
        for count in itertools.count(1):
            data = bytearray(content)
            for _ in range(rng.randint(1, 3)):
                word = rng.choice(WORDS)
                # Half of them in the header and the section table.
                end = 128 + 32 * sections if rng.random() < 0.5 else len(data)
                at = rng.randrange(8, end - len(word))
                data[at : at + len(word)] = word
            path.unlink(missing_ok=True)  # the one before may still be mapped
            path.write_bytes(data)
            kv = rng.choice(["fp16", "int8"])
            load = {"op": "load", "path": str(path), "threads": 2, "kv": kv}
            try:
                for request in (load, *REQUESTS):
                    _answer(runner, request)
            except Crash as crash:
                raise Crash(bytes(data), str(crash)) from None
            yield count


def _answer(runner: Runner, request: dict[str, Any], before: str = "") -> None:
    """Send a request, after another line; read events until its last."""
    process = runner.process
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
    except (OSError, ValueError) as error:
        raise Crash("\n".join(lines).encode(), str(error)) from None
    process.kill()
    assert process.stderr is not None
    raise Crash("\n".join(lines).encode(), process.stderr.read()[-4000:])


def _no_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a small model.slm with a tokenizer")
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path())
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = build.build_runner(Path(folder) / "run", sanitize="address,undefined")
        rng = random.Random(arguments.seed)
        targets = {
            "protocol": protocol(program, arguments.model, rng),
            "models": models(program, arguments.model, Path(folder), rng),
        }
        for name, rounds in targets.items():
            end, count = time.monotonic() + arguments.minutes * 30, 0
            try:
                while time.monotonic() < end:
                    count = next(rounds)
            except Crash as crash:
                kept = arguments.keep / f"crash-{name}-{arguments.seed}-{count + 1}"
                kept.write_bytes(crash.found)
                print(f"{kept}:\n{crash}", file=sys.stderr)
                return 1
            print(f"{name}: {count} inputs, nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
