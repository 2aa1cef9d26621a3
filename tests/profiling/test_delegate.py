"""The operators of an ExecuTorch program that its delegate does not run."""

from __future__ import annotations

from pathlib import Path

import pytest

from pocketslm.errors import UsageError
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.recipe import Recipe
from pocketslm.inspection import describe
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.profiling.bench import bench

pytest.importorskip("executorch", reason="executorch is not installed")
from pocketslm.profiling import delegate


@pytest.fixture(scope="module")
def program(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("delegate") / "bundle"
    export_bundle(open_checkpoint(tiny_hf), out, Recipe(targets=("executorch",), context=64))
    return out / "model.pte"


def test_every_call_outside_is_counted(program: Path) -> None:
    calls = delegate.operators_outside(program)
    assert calls["llama::update_cache.out"] == 4
    assert calls["llama::custom_sdpa.out"] == 2
    assert calls["aten::slice_copy.Tensor_out"] == 3  # two rotary tables, the last position
    assert calls["quantized_decomposed::embedding_byte.dtype_out"] == 1


def test_inspect_lists_them(program: Path) -> None:
    facts = describe(str(program))
    assert facts["context"] == 64
    assert facts["operators outside the delegate"]["llama::custom_sdpa.out"] == 2


def test_a_file_alone_is_a_peer(program: Path) -> None:
    with pytest.raises(UsageError, match=r"--peer executorch=.*model\.pte"):
        bench(program, n_prompt=(4,), n_gen=(2,))
