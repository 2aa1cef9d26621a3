"""Folders that GPTQ and AWQ made, packed here from the definition of their layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pocketslm.errors import CheckpointError
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.recipe import Recipe
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.models.reference import load_reference
from pocketslm.models.tensors import QuantTensor
from pocketslm.runtime.backends import open_session
from pocketslm.runtime.bundle import open_bundle

GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which column of eight the i-th nibble of a word holds
NATIVE_TOLERANCE = 0.05  # of the logits' spread: int8 activations


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [A, B] as int32 words [A, B * bits / 32], the first in the lowest bits."""
    count = 32 // bits
    words = np.zeros((len(codes), codes.shape[1] // count), np.uint32)
    for i in range(count):
        words |= codes[:, i::count].astype(np.uint32) << np.uint32(bits * i)
    return words.view(np.int32)


def gptq(weight: np.ndarray, bits: int, *, shift: int, order: np.ndarray | None, sym: bool) -> Any:
    """The four tensors of a matrix [N, K], and the values that they stand for."""
    rows, columns = weight.shape
    of = np.arange(columns) // GROUP if order is None else order
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    groups = columns // GROUP
    scales, zeros = np.empty((rows, groups), np.float16), np.full((rows, groups), middle)
    for g in range(groups):
        part = weight[:, of == g]
        low, high = part.min(1).clip(max=0), part.max(1).clip(min=0)
        scales[:, g] = np.maximum(-low, high) / (middle - 1) if sym else (high - low) / top
        if not sym:
            zeros[:, g] = np.rint(-low / scales[:, g]).clip(1, top)
    wide = scales.astype(np.float32)[:, of]
    codes = (np.rint(weight / wide) + zeros[:, of]).clip(0, top).astype(np.uint8)
    values = (codes - zeros[:, of]).astype(np.float32) * wide
    tensors = {
        "qweight": packed(np.ascontiguousarray(codes.T).T, bits).T.copy(),
        "qzeros": packed((zeros - shift).T.astype(np.uint8), bits),
        "scales": scales.T.copy(),
        "g_idx": of.astype(np.int32),
    }
    return tensors, values


def awq(weight: np.ndarray) -> Any:
    tensors, values = gptq(weight, 4, shift=0, order=None, sym=False)
    rows = len(weight)

    def repacked(words: np.ndarray) -> np.ndarray:
        """[A, B] codes with B in the order of AWQ's words."""
        codes = words.reshape(len(words), -1, 8)[..., list(AWQ_ORDER)].reshape(len(words), -1)
        return packed(codes, 4)

    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    codes = (tensors["qweight"].T.copy().view(np.uint32)[..., None] >> shifts & 15).reshape(
        rows, -1
    )
    zeros = (tensors["qzeros"].view(np.uint32)[..., None] >> shifts & 15).reshape(-1, rows)
    made = {"qweight": repacked(codes.T), "qzeros": repacked(zeros), "scales": tensors["scales"]}
    return made, values


def folder(
    tiny_hf: Path, out: Path, make: Callable[[np.ndarray], Any], **config: Any
) -> dict[str, np.ndarray]:
    """Write a folder whose layers' matrices are packed; their values by name."""
    out.mkdir()
    for file in tiny_hf.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    about = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(about | {"quantization_config": config}))
    state, values = {}, {}
    for name, tensor in load_file(tiny_hf / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            state[name] = tensor
            continue
        parts, values[name] = make(tensor.float().numpy())
        stem = name.removesuffix(".weight")
        state |= {f"{stem}.{part}": torch.from_numpy(array.copy()) for part, array in parts.items()}
    save_file(state, out / "model.safetensors")
    return values


FORMS: dict[str, tuple[Callable[[np.ndarray], Any], dict[str, Any], str]] = {
    "gptq": (
        lambda w: gptq(w, 4, shift=1, order=None, sym=False),
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False},
        "int4 g32 zp",
    ),
    "gptq, symmetric, 8 bits": (
        lambda w: gptq(w, 8, shift=1, order=None, sym=True),
        {"quant_method": "gptq", "bits": 8, "group_size": GROUP, "sym": True},
        "int8 g32 sym",
    ),
    "gptq of the second format": (
        lambda w: gptq(w, 4, shift=0, order=None, sym=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
        "int4 g32 sym",
    ),
    "gptq, 2 bits": (
        lambda w: gptq(w, 2, shift=1, order=None, sym=False),
        {"quant_method": "gptq", "bits": 2, "group_size": GROUP},
        "int2 g32 min",
    ),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
        "int4 g32 zp",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_codes_are_carried(form: str, tiny_hf: Path, tmp_path: Path) -> None:
    make, config, scheme = FORMS[form]
    values = folder(tiny_hf, tmp_path / "q", make, **config)
    checkpoint = open_checkpoint(tmp_path / "q")
    for name, expected in values.items():
        weight = checkpoint.weight(name)
        assert isinstance(weight, QuantTensor)
        assert weight.scheme == scheme
        np.testing.assert_allclose(weight.dequantize(), expected, rtol=1e-6, atol=1e-7)
    manifest = export_bundle(checkpoint, tmp_path / "bundle", Recipe(targets=("native",)))
    assert scheme in manifest.weights
    ids = np.arange(2, 40)
    session = open_session(open_bundle(tmp_path / "bundle"), "native", 1, 64)
    model = load_reference(checkpoint)
    expected, _ = model(torch.from_numpy(ids)[None], model.empty_cache())
    difference = session.forward(ids, all_logits=True) - expected[0].numpy()
    assert np.sqrt(np.mean(difference**2)) <= NATIVE_TOLERANCE * float(expected.std())


def test_columns_in_another_order_become_floats(tiny_hf: Path, tmp_path: Path) -> None:
    def make(weight: np.ndarray) -> Any:
        order = np.random.default_rng(0).permutation(np.arange(weight.shape[1]) // GROUP)
        return gptq(weight, 4, shift=1, order=order, sym=False)

    config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}
    values = folder(tiny_hf, tmp_path / "q", make, **config)
    checkpoint = open_checkpoint(tmp_path / "q")
    for name, expected in values.items():
        weight = checkpoint.weight(name)
        assert isinstance(weight, np.ndarray)
        np.testing.assert_allclose(weight, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
@pytest.mark.parametrize("damaged", [torch.zeros(3), torch.zeros(4, 4, dtype=torch.int64)])
def test_parts_of_another_kind_are_refused(
    part: str, damaged: torch.Tensor, tiny_hf: Path, tmp_path: Path
) -> None:
    make, config, _ = FORMS["gptq"]
    name = next(iter(folder(tiny_hf, tmp_path / "q", make, **config)))
    state = load_file(tmp_path / "q" / "model.safetensors")
    state[name.replace("weight", part)] = damaged
    save_file(state, tmp_path / "q" / "model.safetensors")
    with pytest.raises(CheckpointError, match="expected matrices|do not belong together"):
        open_checkpoint(tmp_path / "q").weight(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "bits 3"),
        ({"group_size": 24}, "group_size 24"),
        ({"checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes', which is not supported"),
        ({"group_size": 64}, "do not belong together in groups of 64"),
    ],
)
def test_what_is_not_read_is_refused(
    changes: dict[str, Any], message: str, tiny_hf: Path, tmp_path: Path
) -> None:
    make, config, _ = FORMS["gptq"]
    values = folder(tiny_hf, tmp_path / "q", make, **{**config, **changes})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "q").weight(next(iter(values)))
