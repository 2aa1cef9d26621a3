"""The search under a budget: what fits, what is given up early, what a stopped search keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import support
from pocketslm.errors import ExportError, UsageError
from pocketslm.export import plan
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.plan import Budget, Metrics, Trial, parse_budget
from pocketslm.export.prune.depth import block_influence, least_influence
from pocketslm.export.prune.vocabulary import format_ranges
from pocketslm.export.recipe import RECIPE_FILE, Recipe, read_recipe
from pocketslm.models.checkpoint import Checkpoint, open_checkpoint
from pocketslm.models.config import ModelConfig
from pocketslm.models.reference import load_reference
from pocketslm.runtime.bundle import open_bundle
from pocketslm.runtime.tokenizer import load_tokenizer_files

QUICK = Recipe(targets=("native",), calibration_tokens=512, calibration_window=64)


def test_budgets_are_read() -> None:
    budget = parse_budget("ram=120MB, decode=250tps,ttft=1.5s@800,kl=0.05")
    assert budget == Budget({"ram": 120, "decode": 250, "ttft": 1.5, "kl": 0.05}, prompt=800)
    assert budget.broken({"ram": 120, "decode": 250, "ttft": 1.5, "kl": 0.05}) == []
    broken = budget.broken({"ram": 121, "decode": 249, "ttft": 1.6, "kl": 0.06})
    assert [text.split()[0] for text in broken] == ["ram", "decode", "ttft", "kl"]
    assert budget.broken({"kl": float("nan")})


@pytest.mark.parametrize(
    "text",
    ["", "ram", "ram=MB", "ram=1GB", "speed=3", "kl=0.1nats", "ram=-1MB", "ram=9MB@4", "ttft=1s@0"],
)
def test_budgets_that_say_nothing_are_errors(text: str) -> None:
    with pytest.raises(UsageError, match="^budget: "):
        parse_budget(text)


def trial(number: int, kl: float, ram: float, decode: float, *broken: str) -> Trial:
    return Trial(number, Recipe(), {"kl": kl, "ram": ram, "decode": decode}, broken)


def test_the_front_holds_what_no_other_beats() -> None:
    trials = [
        trial(0, 0.01, 150, 100),
        trial(1, 0.05, 100, 150),
        trial(2, 0.06, 120, 140),  # beaten by 1
        trial(3, 0.50, 90, 90),
        Trial(4, Recipe(), {"size": 80.0}, ("size",)),
    ]
    assert [one.number for one in plan.pareto(trials)] == [0, 1, 3]
    assert "| 2 |" in plan.table(trials)
    assert plan.table(trials).count("| front |") == 3
    drawn = ElementTree.fromstring(plan.picture(trials))
    texts = {text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert {"0: 100 tps", "1: 150 tps", "2: 140 tps", "3: 90 tps"} <= texts


def test_the_best_is_the_nearest_to_the_source_that_fits() -> None:
    trials = [trial(0, 0.01, 150, 100, "ram 150 MB"), trial(1, 0.05, 100, 150), trial(2, 0.2, 1, 9)]
    assert plan.choose(trials).number == 1
    with pytest.raises(ExportError, match="no recipe of 1 fits.*ram 150 MB"):
        plan.choose(trials[:1])


@pytest.fixture(scope="module")
def source(tiny_hf: Path) -> Checkpoint:
    return open_checkpoint(tiny_hf)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 900)
    return path


def measured(folder: Path, budget: Budget) -> Metrics:
    """A device on which smaller is faster."""
    size = (folder / "model.slm").stat().st_size
    return {"ram": size / 1e3, "decode": 1e8 / size, "prefill": 1.0, "ttft": 1.0}


def test_a_stopped_search_goes_on(source: Checkpoint, text: Path, tmp_path: Path) -> None:
    budget = parse_budget("ram=200MB,kl=9")
    said: list[str] = []
    options: dict[str, Any] = {
        "calibration": str(text),
        "base": QUICK,
        "windows": 1,
        "measure": measured,
    }
    options["say"] = said.append
    first = plan.search(source, text, budget, tmp_path, trials=2, **options)
    assert len(first) == len(said) == 2
    both = plan.search(source, text, budget, tmp_path, trials=5, **options)
    assert both[:2] == first
    assert len(both) == 5
    assert not (tmp_path / "trial").exists()
    chosen = plan.choose(both)
    assert chosen.metrics["kl"] == min(one.metrics["kl"] for one in both if not one.broken)
    plan.write_report(both, budget, tmp_path)
    assert plan.describe(chosen.recipe) in (tmp_path / plan.REPORT).read_text()
    assert (tmp_path / plan.PICTURE).read_text().startswith("<svg ")
    assert read_recipe(tmp_path / f"trial-{chosen.number}.toml") == chosen.recipe


def test_what_breaks_the_budget_is_given_up_before_it_is_measured(
    source: Checkpoint, text: Path, tmp_path: Path
) -> None:
    def never(folder: Path, budget: Budget) -> Metrics:
        raise AssertionError("measured although it cannot fit")

    options: dict[str, Any] = {
        "calibration": str(text),
        "base": QUICK,
        "trials": 2,
        "measure": never,
    }
    for index, limit in enumerate(("size=0.001MB", "ram=0.001MB", "kl=0.0")):
        work = tmp_path / str(index)
        trials = plan.search(source, text, parse_budget(limit), work, **options)
        assert all("decode" not in one.metrics for one in trials)
        with pytest.raises(ExportError, match="no recipe of 2 fits"):
            plan.choose(trials)


def test_pruning_is_among_the_choices_and_in_the_recipe(
    tmp_path: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    five = support.tiny(num_hidden_layers=5)
    source = open_checkpoint(support.write_hf(tmp_path_factory.mktemp("five") / "hf", five))
    options: dict[str, Any] = {"calibration": str(text), "base": QUICK, "windows": 1}
    budget = parse_budget("kl=1000")
    trials = plan.search(
        source, text, budget, tmp_path, trials=4, prune=True, measure=measured, **options
    )
    depth, width = (one.recipe for one in trials[2:])
    least = least_influence(block_influence(load_reference(source), calibration_ids(text)), 1)
    assert depth.removed_layers == format_ranges(least)
    assert depth.neurons is None
    assert (width.removed_layers, width.neurons) == (None, 64)
    assert "64 neurons" in plan.describe(width)
    sizes = [one.metrics["size"] for one in trials]
    assert max(sizes[2:]) < sizes[0]
    both = replace(width, removed_layers=depth.removed_layers)
    first = export_bundle(source, tmp_path / "first", both)
    again = export_bundle(source, tmp_path / "again", read_recipe(tmp_path / "first" / RECIPE_FILE))
    assert first.files == again.files
    config = ModelConfig.from_dict(first.architecture)
    assert (config.num_hidden_layers, config.intermediate_size) == (4, 64)


def calibration_ids(text: Path) -> torch.Tensor:
    """The text's last 512 tokens in windows of 64, as in QUICK."""
    ids = load_tokenizer_files(support.tokenizer_files()).encode(text.read_text())[-512:]
    return torch.tensor(ids).view(8, 64)


def test_the_command_ends_in_a_bundle_that_fits(
    tiny_gguf: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pocketslm.cli import main

    out = tmp_path / "out"
    budget = "ram=2000MB,decode=1tps,ttft=60s@32"
    options = ["--fit", budget, "--trials", "2", "--text", str(text)]
    assert main(["export", str(tiny_gguf), str(out), *options]) == 0
    printed = capsys.readouterr().out
    assert "| front |" in printed
    bundle = open_bundle(out)
    assert bundle.manifest is not None
    assert bundle.manifest.quality is not None
    assert bundle.manifest.recipe["targets"] == ["native"]
