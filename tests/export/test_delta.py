"""Delta-CoMe: nothing is lost at full rank, and mixed precision is worth its bytes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import support
from pocketslm.cli import main
from pocketslm.errors import CheckpointError, ExportError
from pocketslm.export.delta import (
    Band,
    DeltaCheckpoint,
    _joined,
    _split,
    make_delta,
    pack_bits,
    paper_bands,
    unpack_bits,
)
from pocketslm.export.source import open_source
from pocketslm.models.checkpoint import Checkpoint, open_checkpoint
from pocketslm.models.reference import parameter_shapes

# Two fp32 factors multiplied again, of weights near 1.
MAX_FULL_RANK_ERROR = 2e-6


@pytest.fixture(scope="module")
def base(tiny_hf: Path) -> Checkpoint:
    return open_checkpoint(tiny_hf)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The base, every weight moved a little."""
    folder = support.write_hf(tmp_path_factory.mktemp("tuned") / "hf")
    state = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for value in state.values():
        value += 0.02 * torch.randn(value.shape, generator=generator)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(folder)


def test_full_rank_in_floats_is_lossless(
    base: Checkpoint, tuned: Checkpoint, tmp_path: Path
) -> None:
    make_delta(base, tuned, tmp_path / "d", [Band(64, 32)])
    again = DeltaCheckpoint(base, tmp_path / "d")
    for name in parameter_shapes(base.config):
        error = np.abs(again.weight(name) - tuned.weight(name)).max()
        assert error < MAX_FULL_RANK_ERROR, name


def test_the_tuned_models_chat_template_comes_with_it(tiny_hf: Path, tmp_path: Path) -> None:
    base, folder = open_checkpoint(tiny_hf), support.write_hf(tmp_path / "hf")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ messages[0]['content'] }}!"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink()
    tuned = open_checkpoint(folder)
    make_delta(base, tuned, tmp_path / "d", [Band(2, 8)])
    assert DeltaCheckpoint(base, tmp_path / "d").tokenizer_files() == tuned.tokenizer_files()
    assert base.tokenizer_files() != tuned.tokenizer_files()


def test_an_empty_delta_is_exactly_the_base(base: Checkpoint, tmp_path: Path) -> None:
    assert make_delta(base, base, tmp_path / "d") < 1000
    again = DeltaCheckpoint(base, tmp_path / "d")
    for name in parameter_shapes(base.config):
        np.testing.assert_array_equal(again.weight(name), base.weight(name))


def long_tailed() -> np.ndarray:
    """A matrix whose spectrum is as those of fine-tunes are."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((256, 256)))[0] for _ in range(2))
    return ((u * (np.arange(1, 257) ** -0.7)) @ v.T).astype(np.float32)


def inputs() -> torch.Tensor:
    """Correlated ones [512, 256] of very different sizes."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(512, 64, generator=generator) @ torch.randn(64, 256, generator=generator)
    sizes = torch.arange(1, 257) ** -0.5
    return (mixed / 8 + torch.randn(512, 256, generator=generator)) * sizes


@pytest.mark.parametrize("calibrated", [False, True])
def test_mixed_precision_beats_one_precision_and_low_rank_at_equal_bytes(calibrated: bool) -> None:
    """Of the matrix itself, and by GPTQ of what the matrix makes of its inputs."""
    delta = long_tailed()
    x = inputs() if calibrated else torch.eye(256)
    hessian = x.T @ x / len(x) if calibrated else None

    def measured(*bands: Band) -> tuple[int, float]:
        parts = _split(delta, bands, hessian)
        size = sum(value.nbytes for value in parts.values())
        return size, float(
            np.linalg.norm(x.numpy() @ (_joined(parts, bands, delta.shape) - delta).T)
        )

    size, error = measured(Band(2, 8), Band(32, 3), Band(116, 2))
    for other in (Band(44, 8), Band(175, 2), Band(11, 32)):
        other_size, other_error = measured(other)
        assert abs(other_size / size - 1) < 0.03
        assert error < other_error, other


def test_gptq_loses_less_of_the_output_than_the_nearest_codes() -> None:
    x, delta = inputs(), long_tailed()
    hessian = x.T @ x / len(x)

    bands = paper_bands(256 + 128)

    def lost(hessian: torch.Tensor | None) -> float:
        made = _joined(_split(delta, bands, hessian), bands, delta.shape)
        return float(np.linalg.norm(x.numpy() @ (made - delta).T))

    assert lost(hessian) < 0.95 * lost(None)
    # Inputs that are alike and unrelated tell the right vectors nothing.
    nearest, same = _split(delta, bands), _split(delta, bands, torch.eye(256))
    for index in range(3):
        np.testing.assert_array_equal(same[f"{index}.v"], nearest[f"{index}.v"])


def test_the_command_s_file_is_a_checkpoint(
    base: Checkpoint, tuned: Checkpoint, tmp_path: Path
) -> None:
    text, out = tmp_path / "text", tmp_path / "tuned.delta"
    text.write_text("All happy families are alike. " * 60)
    command = ["delta", str(base.path), str(tuned.path)]
    options = ["--text", str(text), "--tokens", "1024"]
    assert main([*command, str(out), *options]) == 0
    assert main([*command, str(tmp_path / "exact"), *options, "--bands", "64x32"]) == 0
    coarse, exact = open_source(f"{base.path}+{out}"), open_source(f"{base.path}+{tmp_path}/exact")
    for name, shape in parameter_shapes(base.config).items():
        ours, theirs, before = (each.weight(name) for each in (coarse, tuned, base))
        assert np.abs(exact.weight(name) - theirs).max() < MAX_FULL_RANK_ERROR
        if len(shape) == 2 and name.startswith("model.layers"):
            assert 0 < np.linalg.norm(ours - theirs) < np.linalg.norm(before - theirs), name
        else:
            assert np.abs(ours - theirs).max() < MAX_FULL_RANK_ERROR, name
    bundle = ["export", f"{base.path}+{out}", str(tmp_path / "bundle"), "--target", "native"]
    assert main(bundle) == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_survive_packing(bits: int) -> None:
    limit = 2 ** (bits - 1) - 1
    codes = np.random.default_rng(bits).integers(-limit, limit + 1, (5, 37)).astype(np.int8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (5, -(-37 * bits // 8))
    np.testing.assert_array_equal(unpack_bits(packed, bits, 37), codes)


def test_files_that_do_not_fit_are_errors(
    base: Checkpoint, tuned: Checkpoint, tmp_path: Path
) -> None:
    make_delta(base, tuned, tmp_path / "d", [Band(2, 8)])
    with pytest.raises(CheckpointError, match="another base"):
        DeltaCheckpoint(tuned, tmp_path / "d")
    whole = (tmp_path / "d").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot read"):
        DeltaCheckpoint(base, tmp_path / "cut")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="not a delta"):
        DeltaCheckpoint(base, tmp_path / "foreign")
    for rank, bits in ((0, 8), (4, 5)):
        with pytest.raises(ExportError, match="unknown"):
            Band(rank, bits)


NAME = "model.layers.0.mlp.up_proj.weight"
# What is changed in the tensors (None: taken out) or facts of a file, and what is said of it.
DAMAGE: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "one bit": ({f"{NAME}.0.v": lambda t: t ^ 1}, {}, "do not match its SHA-256"),
    "lost half": ({f"{NAME}.0.u": None}, {}, f"{NAME} lacks 0.u"),
    "lost scales": ({f"{NAME}.0.u.scales": None}, {}, f"{NAME} lacks 0.u.scales"),
    "lost weight": ({"model.norm.weight.whole": None}, {}, "do not match its SHA-256"),
    "wide rows": ({f"{NAME}.0.u": lambda t: torch.zeros(2, 1 << 12).byte()}, {}, "expected"),
    "rank": ({f"{NAME}.0.u": lambda t: t[0]}, {}, "expected"),
    "one scale": ({f"{NAME}.0.u.scales": lambda t: t[:1]}, {}, "expected"),
    "bf16": ({f"{NAME}.0.u.scales": lambda t: t.bfloat16()}, {}, "expected"),
    "floats": ({f"{NAME}.0.u": lambda t: t.float()}, {}, "expected"),
    "whole too": ({f"{NAME}.whole": torch.zeros(96, 64)}, {}, "whole and in bands"),
    "vector's band": ({"model.norm.weight.0.u": torch.zeros(2, 8).byte()}, {}, "no weight"),
    "unknown": ({"model.layers.9.mlp.up_proj.weight.whole": torch.zeros(1)}, {}, "no weight"),
    "stray": ({"x": torch.zeros(1)}, {}, "'x' belongs to no weight"),
    **{
        f"bands {text}": ({}, {"bands": text}, "damaged")
        for text in ("", "[", "[]", "{}", "[[2]]", "[[2, 8.0]]", "[[true, 8]]", "[[2, 5]]", "[8]")
    },
    "other bands": ({}, {"bands": "[[2, 4]]"}, "expected"),
    "more bands": ({}, {"bands": "[[2, 8], [2, 8]]"}, "lacks 1."),
    "no sha256": ({}, {"sha256": ""}, "do not match its SHA-256"),
    "version 1": ({}, {"version": "1"}, "not a delta of version 2"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_delta_is_used_whole_or_refused(
    name: str, base: Checkpoint, tuned: Checkpoint, tmp_path: Path
) -> None:
    make_delta(base, tuned, tmp_path / "d", [Band(2, 8)])
    DeltaCheckpoint(base, tmp_path / "d")
    with safe_open(tmp_path / "d", framework="pt") as file:
        facts = file.metadata()
    tensors, changed, message = DAMAGE[name]
    parts = dict(load_file(tmp_path / "d"))
    for part, change in tensors.items():
        parts[part] = change(parts[part]) if callable(change) else change
    parts = {part: value.contiguous() for part, value in parts.items() if value is not None}
    save_file(parts, tmp_path / "damaged", metadata=facts | changed)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        DeltaCheckpoint(base, tmp_path / "damaged")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("broken", ["base", "tuned"])
@pytest.mark.parametrize("text", [True, False])
def test_a_delta_of_what_is_not_finite_is_refused(
    broken: str, text: bool, tiny_hf: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_hf, tmp_path / broken)
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    pair = [open_checkpoint(folder), open_checkpoint(tiny_hf)]
    pair = pair if broken == "base" else pair[::-1]
    ids = torch.arange(64)[None] if text else None
    with pytest.raises(CheckpointError, match="numbers that are NaN or infinite"):
        make_delta(*pair, tmp_path / "d", [Band(2, 8)], ids)
    assert not (tmp_path / "d").exists()


def test_a_delta_that_cannot_be_written_leaves_nothing(
    base: Checkpoint, tuned: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write"):
        make_delta(base, tuned, tmp_path / "file" / "d", [Band(2, 8)])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
