"""Instructions per token on aarch64, counted by qemu: the work of a phone's CPU.

``python -m pocketslm.runtime.ops.instructions Q4_0=MODEL.slm`` builds ``pocketslm-run`` for aarch64
and runs it on each kernel path. It prints a table with the recorded counts of that name beside the
new ones. Needs ``qemu-aarch64`` with plugins (Debian: ``qemu-user``).
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketslm.errors import BackendError, PocketSlmError
from pocketslm.runtime.ops import build
from pocketslm.runtime.ops.built import SOURCES
from pocketslm.runtime.ops.ids import KIND

PATHS = ("neon_i8mm", "neon_dotprod", "scalar")
PROMPT = "Once upon a time"  # four tokens of most vocabularies
RECORDED = Path(__file__).with_name("instruction_counts.json")
# A count may exceed the recorded one by this fraction, since compilers of other versions differ.
TOLERANCE = 0.01

# The rows of the table. All but the prompts count one further token.
DECODE_4, DECODE_512 = "decode at 4", "decode at 512"
PROMPT_16, PROMPT_128 = "prompt of 16", "prompt of 128"
WHOLE_HEAD, SAMPLING = "greedy, whole head", "sampling"
CASES = (DECODE_4, DECODE_512, PROMPT_16, PROMPT_128, WHOLE_HEAD, SAMPLING)

# Kinds of quantized weights; q8_apart runs as q8_split does.
KINDS = tuple(kind for kind in KIND if kind[0] in "qif" and kind not in ("f32", "f16", "q8_apart"))

Request = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Generation:
    """A prompt of `prompt` tokens and `new` ones after it."""

    prompt: int
    new: int
    options: tuple[tuple[str, float], ...] = ()

    def request(self, number: int) -> Request:
        # Prompts that differ in their first token share nothing in the cache.
        tokens = [(911 * number + 101 * i) % 250 + 2 for i in range(self.prompt)]
        prompt: Request = {"tokens": tokens} if self.prompt != 4 else {"prompt": PROMPT}
        end = {"max_tokens": self.new, "ignore_eos": True}
        # Guesses would count as tokens what is checked together with others.
        plain = {"prompt_lookup": 0}
        return {"op": "generate", **prompt, **end, **plain, **dict(self.options)}


_ONE = Generation(1, 1)
_FEW = 8  # a decoding count is the mean over so many new tokens
_SAMPLED = (("temperature", 0.8), ("top_p", 0.95), ("seed", 1))
# A penalty below 1 needs all logits, and otherwise costs few instructions.
_PENALIZED = (("repetition_penalty", 0.9999),)
_GENERATIONS: Mapping[str, tuple[Generation, ...]] = {
    DECODE_4: (Generation(4, 2 + _FEW),),
    DECODE_512: (Generation(512, 6),),
    PROMPT_16: (_ONE, Generation(17, 1)),
    PROMPT_128: (_ONE, Generation(129, 1)),
    WHOLE_HEAD: (_ONE, Generation(4, 2 + _FEW, _PENALIZED)),
    SAMPLING: (_ONE, Generation(4, 2 + _FEW, _SAMPLED)),
}


def build_plugin(output: Path) -> Path:
    """The counting plugin, for the machine that qemu runs on."""
    command = (*build.find_toolchain().command, "-x", "c", "-O2", "-shared", "-fPIC")
    build.run([*command, str(SOURCES / "qemu_count.c"), "-o", str(output)])
    return output


def _counted(plugin: Path, command: Sequence[str], text: str = "") -> tuple[str, str]:
    """Run a program for aarch64. Returns its standard output and standard error."""
    qemu = shutil.which("qemu-aarch64")
    if qemu is None:
        raise BackendError("qemu-aarch64 is not installed; `apt-get install qemu-user`")
    done = subprocess.run(
        [qemu, "-cpu", "max", "-plugin", str(plugin), *command],
        input=text.encode(),
        capture_output=True,
        check=False,
    )
    said, output = (part.decode(errors="replace") for part in (done.stderr, done.stdout))
    if done.returncode != 0 or "instructions: " not in said:
        raise BackendError(f"{command[0]} under qemu failed: {(said or output).strip()[-300:]}")
    return output, said


def count_cases(
    runner: Path,
    plugin: Path,
    model: Path,
    isa: str,
    cases: Sequence[str] = CASES,
    kv_cache: str = "fp16",
) -> dict[str, float]:
    """Instructions a token of each case, from one run of the program.

    It writes a line for each token, and the plugin says how many instructions came before that.
    """
    asked = [generation for case in cases for generation in _GENERATIONS[case]]
    context = max(64, *(generation.prompt + generation.new for generation in asked))
    load = {"op": "load", "path": str(model), "isa": isa, "threads": 1, "context": context}
    requests: list[Request] = [load | {"kv": kv_cache}]
    for generation in asked:
        requests += [{"op": "reset"}, generation.request(len(requests))]
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    output, said = _counted(plugin, [str(runner), "--json"], lines)
    events = [json.loads(line) for line in output.splitlines()]
    if wrong := [event["message"] for event in events if event["event"] == "error"]:
        raise BackendError(f"{isa} under qemu failed: {wrong[0]}")
    marks = [int(found) for found in re.findall(r"^written at: (\d+)$", said, re.MULTILINE)]
    if len(marks) != len(events):
        raise BackendError(f"{len(events)} events in {len(marks)} writes; is this an old runner?")
    # For each generation: the count at its beginning (the answer to reset) and at each token.
    starts = [mark for mark, event in zip(marks, events, strict=True) if event["event"] == "reset"]
    tokens: list[list[int]] = []
    for mark, event in zip(marks, events, strict=True):
        if event["event"] == "reset":
            tokens.append([])
        elif event["event"] == "token":
            tokens[-1].append(mark)
    counts, at = {}, 0
    for case in cases:
        last = at + len(_GENERATIONS[case]) - 1
        if _GENERATIONS[case][-1].new > 1:
            counts[case] = (tokens[last][-1] - tokens[last][1]) / (len(tokens[last]) - 2)
        else:
            one, many = (tokens[i][0] - starts[i] for i in (at, last))
            counts[case] = (many - one) / (asked[last].prompt - asked[at].prompt)
        at = last + 1
    return counts


def build_kind_counts(output: Path) -> Path:
    """The program that :func:`count_kinds` counts."""
    toolchain = build.find_toolchain("aarch64-linux")
    return build.build_program(output, toolchain, ["kind_counts", "cpu"])


def count_kinds(
    program: Path, plugin: Path, isa: str, kinds: Sequence[str] = KINDS
) -> dict[str, tuple[float, float]]:
    """Instructions for 32 weights of a row and a token, by kind: of one token, and of sixteen."""
    numbers = [str(KIND[kind]) for kind in kinds]
    rows, cols = 256, 2048
    command = [str(program), isa, str(rows), str(cols), *numbers]
    _, said = _counted(plugin, command)
    marks = [int(found) for found in re.findall(r"^written at: (\d+)$", said, re.MULTILINE)]
    spent = [after - before for before, after in zip(marks[::2], marks[1::2], strict=True)]
    groups = rows * cols // 32
    return {
        kind: (one / groups, many / (16 * groups))
        for kind, one, many in zip(kinds, spent[::2], spent[1::2], strict=True)
    }


def count_peer(plugin: Path, command: str, cases: Sequence[str] = CASES) -> dict[str, float]:
    """Count any program for aarch64, from the difference between two runs.

    ``command`` holds ``{prompt}`` and ``{new}`` in place of the numbers of tokens. Cases that the
    program cannot run are left out.
    """
    if "{prompt}" not in command or "{new}" not in command:
        raise BackendError(f"{command!r} must say {{prompt}} and {{new}}, the numbers of tokens")

    def count(prompt: int, new: int) -> int:
        words = shlex.split(command.replace("{prompt}", str(prompt)).replace("{new}", str(new)))
        found = re.search(r"^instructions: (\d+)$", _counted(plugin, words)[1], re.MULTILINE)
        assert found is not None
        return int(found[1])

    counts = {}
    for case in cases:
        last = _GENERATIONS[case][-1]
        if last.options:
            continue
        few = (last.prompt, 2) if last.new > 1 else (_ONE.prompt, 1)
        more = last.new - 2 if last.new > 1 else last.prompt - _ONE.prompt
        counts[case] = (count(last.prompt, last.new) - count(*few)) / more
    return counts


def recorded() -> dict[str, dict[str, dict[str, float]]]:
    """The recorded counts: millions of instructions a token by model, path and case."""
    if not RECORDED.exists():
        return {}
    table: dict[str, dict[str, dict[str, float]]] = json.loads(RECORDED.read_text())
    return table


def over_budget(name: str, isa: str, counts: Mapping[str, float]) -> list[str]:
    """A line for each count that exceeds the recorded one by more than the tolerance."""
    budgets = recorded().get(name, {}).get(isa, {})
    return [
        f"{name} {isa} {case}: {count / 1e6:.2f} M, recorded {budgets[case]:.2f} M"
        for case, count in counts.items()
        if case in budgets and count / 1e6 > budgets[case] * (1 + TOLERANCE)
    ]


def _print(label: str, counts: Mapping[str, float], before: Mapping[str, float]) -> None:
    for case, count in counts.items():
        change = f"   recorded {before[case]:8.2f}" if case in before else ""
        if before.get(case):
            change += f"   {count / 1e6 / before[case] - 1:+.1%}"
        print(f"{label:<24}{case:<20}{count / 1e6:10.2f}{change}", flush=True)


def _print_kinds(counts: Mapping[str, Mapping[str, tuple[float, float]]]) -> None:
    print(f"{'':<12}" + "".join(f"{isa:>20}" for isa in counts))
    for kind in KINDS:
        found = "".join(
            f"{one:12.2f}{many:8.2f}" for one, many in (c[kind] for c in counts.values())
        )
        print(f"{kind:<12}{found}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"{__doc__.splitlines()[0]} In millions.",
        epilog="example: instructions Q4_0=q40/model.slm --peer "
        "'llama.cpp=./llama-bench -m q40.gguf -t 1 -r 1 --no-warmup -p 0 -n 0 -pg {prompt},{new}'",
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="[NAME=]MODEL.slm",
        help="the name, such as Q4_0, is that of recorded counts",
    )
    parser.add_argument(
        "--kinds",
        action="store_true",
        help="count every kind of weights: instructions for 32 weights of a row and a token, for "
        "one token and for 16",
    )
    parser.add_argument("--isa", choices=PATHS, action="append", help="only these paths")
    parser.add_argument("--case", choices=CASES, action="append", help="only these cases")
    parser.add_argument("--kv-cache", choices=("fp16", "int8"), default="fp16")
    parser.add_argument("--runner", type=Path, help="count this pocketslm-run; default: build it")
    parser.add_argument(
        "--peer",
        metavar="NAME=COMMAND",
        action="append",
        default=[],
        help="also count a program for aarch64, given {prompt} and {new} as numbers of tokens",
    )
    parser.add_argument("--record", action="store_true", help="keep the counts as those to compare")
    args = parser.parse_args()
    if not (args.models or args.kinds or args.peer):
        parser.error("nothing to count; give a model, --kinds or --peer")
    if any("=" not in peer for peer in args.peer):
        parser.error("--peer needs NAME=COMMAND")
    return args


def main() -> int:
    args = _arguments()
    table, over = recorded(), []
    cases = args.case or CASES
    paths = args.isa or PATHS[:2]
    try:
        with tempfile.TemporaryDirectory() as folder:
            plugin = build_plugin(Path(folder) / "qemu_count.so")
            if args.kinds:
                program = build_kind_counts(Path(folder) / "kind_counts")
                _print_kinds({isa: count_kinds(program, plugin, isa) for isa in paths})
            for model in args.models:
                runner = args.runner or build.runner("aarch64-linux")
                name, _, path = model.rpartition("=")
                for isa in paths:
                    counts = count_cases(runner, plugin, Path(path), isa, cases, args.kv_cache)
                    _print(f"{name} {isa}", counts, table.get(name, {}).get(isa, {}))
                    over += over_budget(name, isa, counts)
                    kept = table.setdefault(name, {}).setdefault(isa, {})
                    kept.update({case: round(count / 1e6, 3) for case, count in counts.items()})
            for peer in args.peer:
                name, _, command = peer.partition("=")
                _print(name, count_peer(plugin, command, cases), {})
        if args.record:
            RECORDED.write_text(json.dumps(table, indent=1) + "\n")
            return 0
    except (PocketSlmError, build.BuildError) as error:
        print(error, file=sys.stderr)
        return 2
    for line in over:
        print(f"over budget: {line}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
