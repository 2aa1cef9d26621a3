"""Shapes of as many parameters, and bundles of random weights, run and count what they say."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest

import support
from pocketslm import cli
from pocketslm.errors import UsageError
from pocketslm.models.catalog import catalog
from pocketslm.models.config import ModelConfig
from pocketslm.models.reference import parameter_shapes
from pocketslm.profiling import shape, shapes
from pocketslm.profiling.shapes import Measured, Shape, family, parse_parameters, sweep
from pocketslm.runtime.bundle import open_bundle

TINY = support.tiny(vocab_size=300, num_hidden_layers=3)


def counted(config: ModelConfig) -> int:
    return sum(prod(shape) for shape in parameter_shapes(config).values() if len(shape) == 2)


def test_every_shape_has_as_many_parameters() -> None:
    base, count = family("smollm2-135m-instruct"), 135
    found = sweep(base, count * 1_000_000)
    assert len(found) == 11
    assert found[0].config.num_hidden_layers == base.num_hidden_layers
    for one in found:
        assert counted(one.config) == one.parameters
        assert one.parameters == pytest.approx(count * 1e6, rel=0.03)
        assert one.config.hidden_size % 32 == one.config.stored_layers[0].mlp.width % 32 == 0
    facts = [tuple(list(one.facts.values())[1:-1]) for one in found]
    assert len(set(facts)) == len(facts)
    assert {one.config.tie_word_embeddings for one in found} == {True, False}


def test_what_is_no_family_or_number_is_refused() -> None:
    for name in ("gemma3-270m", "all-minilm-l6-v2", "lee"):
        with pytest.raises(UsageError, match="choose another|is no model"):
            family(name)
    for text in ("135", "M", "-1M", "0M", "1e9M"):
        with pytest.raises(UsageError, match="expected such as 135M"):
            parse_parameters(text)
    assert parse_parameters("1.1B") == 1_100_000_000
    with pytest.raises(UsageError, match="no shape has 1M parameters"):
        sweep(family("qwen3-0.6b"), 1_000_000)


def test_a_random_bundle_is_as_an_export_of_floats_and_goes(tmp_path: Path) -> None:
    with shape.random_bundles([("made", TINY)]) as (folder,):
        bundle = open_bundle(folder)
        assert bundle.config == TINY
        assert bundle.manifest is not None
        assert bundle.manifest.weights.keys() == {"int8 g32 sym", "int4 g32 sym", "fp32"}
        assert "random" in bundle.manifest.notes[0]
    assert not folder.parent.exists()


def test_shapes_are_measured_printed_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shapes, "family", lambda name: TINY)
    monkeypatch.setattr(shapes, "sweep", lambda base, count: [Shape("as it is", base)])
    chart = tmp_path / "shapes.svg"
    command = ["shapes", "--parameters", "135M", "-p", "8", "-n", "2", "-r", "1", "-t", "1"]
    assert cli.main([*command, "--json", "--chart", str(chart)]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["parameters"] == counted(TINY)
    assert min(row["prefill_tps"], row["decode_tps"], row["ram_bytes"]) > 0
    assert "as it is" in chart.read_text()


def test_the_table_has_the_fastest_first() -> None:
    rows = [Measured(Shape(name, TINY), 10.0, speed, 5_000_000) for name, speed in (("b", 2.5),)]
    assert shapes.table(rows).splitlines()[-1] == (
        f"| b | 3 | 64 | 96 | 4/2 | {counted(TINY) / 1e6:.1f}M | 10.0 | 2.50 | 5 |"
    )


def test_bench_takes_a_catalog_model_before_it_is_fetched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shape, "catalog_config", lambda name: TINY)
    monkeypatch.setattr("pocketslm.models.catalog.fetch", lambda *_: pytest.fail("fetched"))
    name = next(iter(catalog()))
    command = ["bench", "--random", name, "-p", "8", "-n", "2", "-r", "1", "-t", "1", "-o", "json"]
    assert cli.main(command) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in rows] == [name, name]
    assert cli.main(["bench"]) == 2
    assert "give a bundle, or --random" in capsys.readouterr().err
