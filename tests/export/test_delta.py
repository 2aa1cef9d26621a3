"""Delta-CoMe: nothing is lost at full rank, and mixed precision is worth its bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import support
from pocketslm.errors import CheckpointError, ExportError
from pocketslm.export.delta import (
    Band,
    DeltaCheckpoint,
    _joined,
    _split,
    make_delta,
    pack_bits,
    unpack_bits,
)
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


def test_an_empty_delta_is_exactly_the_base(base: Checkpoint, tmp_path: Path) -> None:
    assert make_delta(base, base, tmp_path / "d") < 1000
    again = DeltaCheckpoint(base, tmp_path / "d")
    for name in parameter_shapes(base.config):
        np.testing.assert_array_equal(again.weight(name), base.weight(name))


def test_mixed_precision_beats_one_precision_and_low_rank_at_equal_bytes() -> None:
    """On a long-tailed spectrum, as those of fine-tunes are."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((256, 256)))[0] for _ in range(2))
    delta = ((u * (np.arange(1, 257) ** -0.7)) @ v.T).astype(np.float32)

    def measured(*bands: Band) -> tuple[int, float]:
        parts = _split(delta, bands)
        size = sum(value.nbytes for value in parts.values())
        return size, float(np.linalg.norm(_joined(parts, bands) - delta))

    size, error = measured(Band(2, 8), Band(32, 3), Band(116, 2))
    for other in (Band(44, 8), Band(175, 2), Band(11, 32)):
        other_size, other_error = measured(other)
        assert abs(other_size / size - 1) < 0.03
        assert error < other_error, other


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
