"""A recipe makes its bundle again, byte for byte, and says what is wrong with one that cannot."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from pocketslm.cli import main
from pocketslm.errors import ExportError
from pocketslm.export.cli import _recipe, add_export_options
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.recipe import RECIPE_FILE, Recipe, read_recipe
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.runtime.bundle import open_bundle

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "calibration.txt"
    path.write_text("All happy families are alike; each unhappy family is unhappy alone. " * 40)
    return path


def test_a_bundle_s_recipe_makes_it_again(tiny_gguf: Path, text: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    recipe = Recipe(
        weights="int4",
        grid="min",
        method="awq+search+gptq",
        calibration=str(text),
        calibration_tokens=1024,
        calibration_window=64,
        overrides={name: "int8"},
        kv_cache="int8",
    )
    source = open_checkpoint(tiny_gguf)
    first = export_bundle(source, tmp_path / "a", recipe)
    assert first.recipe["calibration_sha256"]
    assert first.weights["int8 g32 min"] > 0
    again = export_bundle(source, tmp_path / "b", read_recipe(tmp_path / "a" / RECIPE_FILE))
    assert again.files == first.files
    assert again.recipe == first.recipe == Recipe.from_dict(first.recipe).to_dict()
    assert open_bundle(tmp_path / "b").graph("native").kv_cache == "int8"
    plain = export_bundle(source, tmp_path / "c", Recipe(weights="int4", grid="min"))
    assert plain.files["model.slm"] != first.files["model.slm"]
    text.write_text(text.read_text() + "changed")
    with pytest.raises(ExportError, match="SHA-256 differs"):
        export_bundle(source, tmp_path / "d", read_recipe(tmp_path / "a" / RECIPE_FILE))
    assert not (tmp_path / "d").exists()


def test_options_and_a_recipe_say_the_same(
    tiny_hf: Path, text: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = [str(tmp_path / name) for name in "ab"]
    options = ["--method", "hqq", "--group-size", "64", "--calibration", str(text)]
    wanted = Recipe(weights="int4", grid="min", method="hqq", group_size=64, context=256)
    assert main(["export", str(tiny_hf), out[0], *options[:4], "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["recipe"]
    assert made == wanted.to_dict() | {"targets": made["targets"]}
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(wanted.to_toml())
    assert main(["export", str(tiny_hf), out[1], "--recipe", str(recipe), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == made


@pytest.mark.parametrize("part", ["gptq", "awq", "tune"])
def test_what_needs_a_text_gets_one(part: str) -> None:
    parser = argparse.ArgumentParser()
    add_export_options(parser)
    assert _recipe(parser.parse_args(["out", "--method", part])).calibration == "mix"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('method = "magic"', "'magic'"),
        ('method = "rtn+hqq"', "'rtn\\+hqq'"),
        ('method = "gptq"', "needs a calibration text"),
        ("neurons = 64", "leaving neurons out needs a calibration text"),
        ('grid = "round"', "grid is 'round', expected one of sym, zp, min"),
        ('kv_cache = "int2"', "'int2'"),
        ('[overrides]\n"a" = "int7"', "overrides"),
        ('grid = "min8"\ngroup_size = 64', "groups of 32"),
        ('grid = "zp"\nweights = "int3"', "zp is for 4 and 8 bits"),
        ("bits = 4", "bits is unknown"),
        ("context = 64.5", "context is 64.5, expected an integer"),
        ("context = true", "context is True, expected an integer"),
        ("group_size = 32.0", "group_size is 32.0"),
        ('calibration_tokens = "x"', "calibration_tokens is 'x'"),
        ("calibration_window = 0", "calibration_window is 0, expected at least 1"),
        ("vocabulary = 3", "vocabulary is 3, expected a text"),
        ("removed_layers = 3", "removed_layers is 3, expected a text"),
        ('neurons = "x"', "neurons is 'x'"),
        ("method = 3", "method is 3"),
        ("targets = 3", "targets is 3, expected a list"),
        ("overrides = 3", "overrides is 3, expected an object"),
        ("calibration = " + "[" * 9999, "cannot read"),
        ("group_size = ", "cannot read"),
        ('targets = ["tpu"]', "tpu"),
    ],
)
def test_recipes_that_make_no_sense(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(content)
    with pytest.raises(ExportError, match=message) as caught:
        read_recipe(path)
    assert "\n" not in str(caught.value)


def test_an_override_of_no_matrix_is_refused(tiny_hf: Path, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_hf)
    for name in ("model.layers.9.mlp.up_proj.weight", "model.norm.weight", "up_proj"):
        with pytest.raises(ExportError, match=f"overrides name '{name}'"):
            export_bundle(source, tmp_path / "out", Recipe(overrides={name: "int8"}))
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_text_is_a_file(tiny_hf: Path, tmp_path: Path, capsys: Captured) -> None:
    options = ["--method", "gptq", "--calibration", "/dev/zero"]
    assert main(["export", str(tiny_hf), str(tmp_path / "out"), *options]) == 2
    assert "cannot read /dev/zero as UTF-8 text: expected a file" in capsys.readouterr().err
