"""Counting the instructions of the aarch64 build under qemu, and their budgets."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pocketslm.cli import main
from pocketslm.errors import BackendError
from pocketslm.runtime.ops import instructions

# Prompts of 128 and 512 take minutes under qemu.
COUNTED = [
    case
    for case in instructions.CASES
    if case not in (instructions.PROMPT_128, instructions.DECODE_512)
]


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("needs qemu-user")
    return instructions.build_plugin(tmp_path_factory.mktemp("plugin") / "qemu_count.so")


def test_paths_cost_fewer_instructions_the_more_the_cpu_has(
    arm_runner_path: Path, chat_model: Path, plugin: Path
) -> None:
    cases = (instructions.DECODE_4, instructions.PROMPT_16)
    counts = {
        isa: instructions.count_cases(arm_runner_path, plugin, chat_model, isa, cases)
        for isa in instructions.PATHS
    }
    decode, prompt = ({isa: counts[isa][case] for isa in counts} for case in cases)
    assert decode["neon_i8mm"] == pytest.approx(decode["neon_dotprod"], rel=0.02)  # one row
    assert 0 < 2 * decode["neon_dotprod"] < decode["scalar"]
    assert 0 < prompt["neon_i8mm"] < prompt["neon_dotprod"] < prompt["scalar"]
    with pytest.raises(BackendError, match="kernel path"):
        instructions.count_cases(arm_runner_path, plugin, chat_model, "avx2", cases)


def test_a_program_that_is_given_as_a_peer_counts_the_same(
    arm_runner_path: Path, chat_model: Path, plugin: Path
) -> None:
    cases = (instructions.DECODE_4,)
    own = instructions.count_cases(arm_runner_path, plugin, chat_model, "neon_dotprod", cases)
    # One token is left to draw, so that the seed does nothing.
    options = f"-p '{instructions.PROMPT}' -n {{new}} -t 1 --isa neon_dotprod"
    options += " --temperature 1 --top-k 1 --seed {prompt}"
    peer = instructions.count_peer(plugin, f"{arm_runner_path} {chat_model} {options}", cases)
    # One ends at the end of an answer, the other writes JSON.
    assert peer[instructions.DECODE_4] == pytest.approx(own[instructions.DECODE_4], rel=0.5)
    with pytest.raises(BackendError, match="must say"):
        instructions.count_peer(plugin, "program", cases)
    with pytest.raises(BackendError, match="failed"):
        instructions.count_peer(plugin, "/nonexistent {prompt} {new}", cases)


def test_kinds_of_weights_are_counted(arm_runner_path: Path, plugin: Path, tmp_path: Path) -> None:
    """The runner has what the program links; other kinds take longer than 4 bits."""
    program = instructions.build_kind_counts(tmp_path / "kind_counts")
    kinds = ("q4_sym", "q3_sym", "q8_split")
    for isa in instructions.PATHS[:2]:
        found = instructions.count_kinds(program, plugin, isa, kinds)
        assert tuple(found) == kinds
        plain = found.pop("q4_sym")
        assert plain[0] <= 6.85 * (1 + instructions.TOLERANCE)
        assert plain[1] < plain[0]  # unpacked once for several tokens
        assert all(one > plain[0] and many > plain[1] for one, many in found.values())


def test_a_count_above_the_recorded_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"Q4_0": {"neon_i8mm": {"sampling": 10.0}}}
    monkeypatch.setattr(instructions, "recorded", lambda: table)
    limit = 10e6 * (1 + instructions.TOLERANCE)
    counts = {"sampling": limit - 1, "decode at 4": 1e12}
    assert instructions.over_budget("Q4_0", "neon_i8mm", counts) == []
    counts["sampling"] = limit + 1
    assert instructions.over_budget("Q4_0", "neon_i8mm", counts) == [
        "Q4_0 neon_i8mm sampling: 10.10 M, recorded 10.00 M"
    ]


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "options", "cases"),
    [
        (
            "Q4_0",
            ["--weights", "int4", "--grid", "sym"],
            # The second path differs in prompts alone.
            {instructions.PATHS[0]: COUNTED, instructions.PATHS[1]: [instructions.PROMPT_16]},
        ),
        # Its kernels are others; what stands around them is the same.
        ("Q4_1", [], {instructions.PATHS[0]: [instructions.DECODE_4, instructions.PROMPT_16]}),
    ],
    ids=["Q4_0", "Q4_1"],
)
def test_counts_are_within_their_budgets(
    name: str,
    options: list[str],
    cases: dict[str, list[str]],
    arm_runner_path: Path,
    smollm2_gguf: Path,
    plugin: Path,
    tmp_path: Path,
) -> None:
    """Exact for one compiler, so a change that costs shows; recorded by `instructions --record`.

    `python -m pocketslm.runtime.ops.instructions` counts every case on every path.
    """
    assert (
        main(["export", str(smollm2_gguf), str(tmp_path / "out"), "--target", "native", *options])
        == 0
    )
    model = tmp_path / "out" / "model.slm"
    over = []
    for isa, asked in cases.items():
        counts = instructions.count_cases(arm_runner_path, plugin, model, isa, asked)
        assert set(counts) == set(asked) <= set(instructions.recorded()[name][isa])
        over += instructions.over_budget(name, isa, counts)
    assert over == []
