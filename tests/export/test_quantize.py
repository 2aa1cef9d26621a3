"""Groupwise quantization: each method held against its invariant, plain definitions, and gguf."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor

import support
from pocketslm.errors import ExportError, UsageError
from pocketslm.export.calibration_text import last_tokens
from pocketslm.export.heal import forward_kl
from pocketslm.export.quantize import awq, gptq, hqq, rtn, search
from pocketslm.export.quantize.calibration import quantize_layers
from pocketslm.export.quantize.grid import KINDS, Fit, Kind, Spec, round_to_grid
from pocketslm.export.quantize.tune import CONFIG, tune
from pocketslm.models.checkpoint import EMBEDDING, HEAD, open_checkpoint
from pocketslm.models.reference import load_reference
from pocketslm.models.sites import sites
from pocketslm.models.tensors import QuantTensor, concat_rows, pack_codes

RNG = np.random.default_rng(0)
WEIGHT = (RNG.standard_normal((24, 256)) * np.exp(RNG.standard_normal((24, 1)))).astype(np.float32)
TENSOR = torch.from_numpy(WEIGHT)
# Inputs in which some channels are far larger than others and neighbours are alike.
MIX = torch.from_numpy(RNG.standard_normal((256, 256)).astype(np.float32))
INPUTS = torch.from_numpy(RNG.standard_normal((2000, 256)).astype(np.float32)) @ MIX
INPUTS *= torch.from_numpy(np.exp(RNG.standard_normal(256)).astype(np.float32))
HESSIAN = INPUTS.T @ INPUTS / len(INPUTS)
FP32_ERROR = 1e-4  # of logits, after factors were moved between fp32 weights
IDS = torch.from_numpy(RNG.integers(0, support.TINY.vocab_size, (8, 64)))


MIN8_8 = ("min8", 8)  # a recipe never asks for it: scales of 8 bits are too coarse for its codes
# A row's grids must be known before its factors are, so min8 has no other order.
ORDERS = [(kind, order) for kind in KINDS for order in (False, True) if order or kind != "min8"]


def rounded(weight: np.ndarray, bits: int, group: int, kind: Kind = "sym") -> QuantTensor:
    return round_to_grid(torch.from_numpy(weight), Spec(bits, group, kind), rtn.fit)


def output_error(got: QuantTensor) -> float:
    """Mean squared error of the layer's output on INPUTS."""
    difference = torch.from_numpy(got.dequantize()) - TENSOR
    return float((INPUTS @ difference.T).square().mean())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_every_value_is_within_half_a_step(bits: int, group: int, kind: Kind) -> None:
    quantized = rounded(WEIGHT, bits, group, kind)
    assert (quantized.bits, quantized.group_size) == (bits, group)
    error = np.abs(quantized.dequantize() - WEIGHT).reshape(24, -1, group)
    step = np.abs(quantized.scales)[..., None]
    # Symmetric below 8 bits has no code for the positive extreme: it may be a whole step away. A
    # zero point is rounded too; a minimum and its scale are rounded to fp16, or to a 255th of the
    # row's largest.
    allowed = step * {"sym": 1.0 if bits < 8 else 0.5, "zp": 1.0, "min": 0.5, "min8": 0.5}[kind]
    slack = 2e-3 * np.abs(WEIGHT).reshape(24, -1, group).max(2, keepdims=True)
    if kind == "min8":
        slack = 1.5 / 255 * np.abs(WEIGHT).max(1)[:, None, None]
    assert (error <= allowed * (1 + 1e-5) + (slack if "min" in kind else 0)).all()
    assert not (error <= allowed * 0.4).all()  # the bound is not idle


def test_symmetric_int4_is_q4_0() -> None:
    """Scales are llama.cpp's Q4_0; codes are at least as near, being chosen for those scales."""
    kind = gguf.GGMLQuantizationType.Q4_0
    blocks = quantize(WEIGHT, kind)
    ours = rounded(WEIGHT, 4, 32)
    scales = blocks.reshape(24, -1, 18)[..., :2].copy().view(np.float16)[..., 0]
    np.testing.assert_array_equal(ours.scales, scales)
    error = np.mean((ours.dequantize() - WEIGHT) ** 2)
    assert error <= np.mean((dequantize(blocks, kind) - WEIGHT) ** 2) * (1 + 1e-6)


@pytest.mark.parametrize("fit", [rtn.fit, search.fit, hqq.fit])
def test_a_matrix_that_was_q4_1_is_found_again(fit: Fit) -> None:
    """Minimums in the source's groups lose nothing: its extremes are codes 0 and 15."""
    source = dequantize(
        quantize(WEIGHT, gguf.GGMLQuantizationType.Q4_1), gguf.GGMLQuantizationType.Q4_1
    )
    again = round_to_grid(torch.from_numpy(source), Spec(4, 32, "min"), fit).dequantize()
    np.testing.assert_allclose(again, source, atol=1e-6 * np.abs(source).max())


@pytest.mark.parametrize("fit", [rtn.fit, search.fit, hqq.fit])
@pytest.mark.parametrize("kind", KINDS)
def test_zero_groups_stay_zero(fit: Fit, kind: Kind) -> None:
    weight = TENSOR.clone()
    weight[3, 32:64] = 0
    for bits in (4, 8):
        if fit is hqq.fit and kind != "min":
            continue
        out = round_to_grid(weight, Spec(bits, 32, kind), fit).dequantize()
        assert np.isfinite(out).all()
        assert (out[3, 32:64] == 0).all()


def test_an_odd_k_takes_the_largest_group_that_divides() -> None:
    assert rounded(np.ones((2, 576), np.float32), 4, 128).group_size == 64
    with pytest.raises(ExportError, match="rows of 24"):
        rounded(np.ones((2, 24), np.float32), 4, 32)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damaged_weights_are_refused(bad: float) -> None:
    weight = WEIGHT.copy()
    weight[1, 2] = bad
    with pytest.raises(ExportError, match="NaN or infinite"):
        rounded(weight, 4, 32)
    with pytest.raises(ExportError, match="too large"):
        rounded(np.full((1, 32), 1e9, np.float32), 4, 32)


@pytest.mark.parametrize(
    ("kind", "bits"), [(kind, bits) for kind in KINDS for bits in (4, 8) if (kind, bits) != MIN8_8]
)
def test_search_is_never_worse_than_its_start(kind: Kind, bits: int) -> None:
    importance = HESSIAN.diagonal()
    for weights in (torch.ones(256), importance):
        squared = [
            ((torch.from_numpy(q.dequantize()) - TENSOR).square() * weights)
            .reshape(24, 8, 32)
            .sum(2)
            for q in (
                round_to_grid(TENSOR, Spec(bits, 32, kind), search.fit, weights),
                round_to_grid(TENSOR, Spec(bits, 32, kind), rtn.fit),
            )
        ]
        # A row's factor is not the search's: of single groups it may take a little back.
        slack = 0.1 if kind == "min8" else 1e-5
        assert (squared[0] <= squared[1] * (1 + slack)).all()
        assert squared[0].sum() < 0.97 * squared[1].sum()


def test_hqq_lowers_its_norm_and_needs_minimums() -> None:
    spec = Spec(4, 64, "min")
    norms = [
        (torch.from_numpy(round_to_grid(TENSOR, spec, fit).dequantize()) - TENSOR)
        .abs()
        .pow(0.7)
        .sum()
        for fit in (hqq.fit, rtn.fit)
    ]
    assert norms[0] < norms[1]
    with pytest.raises(ExportError, match="use min"):
        round_to_grid(TENSOR, Spec(4, 64, "sym"), hqq.fit)


@pytest.mark.parametrize(("kind", "act_order"), ORDERS)
def test_gptq_with_identity_hessian_is_rtn(kind: Kind, act_order: bool) -> None:
    spec = Spec(4, 32, kind)
    got = gptq.quantize(TENSOR, torch.eye(256), spec, act_order=act_order)
    expected = round_to_grid(TENSOR, spec, rtn.fit)
    for part in ("codes", "scales", "zero_points", "minimums"):
        np.testing.assert_array_equal(getattr(got, part), getattr(expected, part))


@pytest.mark.parametrize(("kind", "act_order"), ORDERS)
def test_gptq_lowers_the_output_error(kind: Kind, act_order: bool) -> None:
    spec = Spec(4, 64, kind)
    plain = output_error(round_to_grid(TENSOR, spec, search.fit))
    got = gptq.quantize(TENSOR, HESSIAN, spec, search.fit, act_order=act_order)
    assert output_error(got) < (0.4 if act_order else 0.7) * plain


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_gptq_refuses_inputs_that_are_not_finite(value: float) -> None:
    hessian = HESSIAN.clone()
    hessian[3, 4] = hessian[4, 3] = value
    with pytest.raises(ExportError, match="gptq: what a layer computes of the calibration text"):
        gptq.quantize(TENSOR, hessian, Spec())


def test_gptq_passes_over_inputs_that_never_come() -> None:
    hessian = HESSIAN.clone()
    hessian[7], hessian[:, 7] = 0, 0
    assert np.isfinite(gptq.quantize(TENSOR, hessian, Spec()).dequantize()).all()


def test_awq_changes_nothing_in_fp32(tmp_path: Path) -> None:
    config = support.tiny(architecture="qwen2", attention_bias=True)
    model = load_reference(open_checkpoint(support.write_hf(tmp_path, config)))
    expected, _ = model(IDS, model.empty_cache(8))
    before = {name: value.clone() for name, value in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    for layer, described in zip(model.model.layers, model.config.stored_layers, strict=True):
        names = [site.name for site in sites(described)]
        widths = {name: layer.get_submodule(name).weight.shape[1] for name in names}
        inputs = {s: torch.randn(300, k, generator=generator) for s, k in widths.items()}
        skewed = {s: x * torch.arange(1, x.shape[1] + 1) ** 2 for s, x in inputs.items()}
        hessians = {s: x.T @ x / 300 for s, x in skewed.items()}
        awq.rescale(layer, described, hessians, Spec(4, 32, "sym"))
    changed = [n for n, value in model.named_parameters() if not torch.equal(value, before[n])]
    assert len(changed) == 2 * (2 + 7 + 1)  # the norms, every matrix, the values' bias
    got, _ = model(IDS, model.empty_cache(8))
    error = float((got - expected).abs().max())
    assert error < FP32_ERROR, error


@pytest.mark.parametrize("method", ["", "gptq", "awq", "awq gptq"])
def test_layers_are_rounded_on_the_inputs_that_they_will_get(method: str, tiny_hf: Path) -> None:
    """The model left behind computes with exactly the weights that are stored."""
    model = load_reference(open_checkpoint(tiny_hf))
    exact, _ = model(IDS, model.empty_cache(8))
    seen: list[float] = []
    stored = dict(
        quantize_layers(
            model,
            IDS,
            lambda name: None if "layers.1.mlp.up" in name else Spec(4, 32, "min"),
            search.fit,
            use_awq="awq" in method,
            use_gptq="gptq" in method,
            progress=seen.append,
        )
    )
    assert seen == [0.5, 1.0]
    assert "model.layers.1.mlp.up_proj.weight" not in stored
    matrices = [name for name, weight in stored.items() if isinstance(weight, QuantTensor)]
    assert len(matrices) == 14  # the head, which is the embedding here, too
    assert (len(stored) > 14) == ("awq" in method)
    for name, weight in stored.items():
        values = weight.dequantize() if isinstance(weight, QuantTensor) else weight
        np.testing.assert_array_equal(model.get_parameter(name).numpy(), values)
    got, _ = model(IDS, model.empty_cache(8))
    assert 0 < float((got - exact).std() / exact.std()) < 0.4


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_is_rounded_for_what_it_reads(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its outputs err less than those of the nearest values, also where the caller gives it."""
    support.write_hf(tmp_path / "model", support.tiny(tie_word_embeddings=tied))
    model = load_reference(open_checkpoint(tmp_path / "model"))
    name = EMBEDDING if tied else HEAD
    own = model.get_parameter(name).clone()
    spec, seen = Spec(4, 32, "min"), list[Tensor]()
    handle = model.model.norm.register_forward_hook(lambda module, x, y: seen.append(y))

    def head_as(use_gptq: bool, head: Tensor | None = None) -> QuantTensor:
        options: dict[str, Any] = {} if head is None else {"head": {name: head}.__getitem__}
        only = {name: spec}
        found = dict(
            quantize_layers(model, IDS, only.get, search.fit, use_gptq=use_gptq, **options)
        )
        assert found.keys() == {name}
        weight = found[name]
        assert isinstance(weight, QuantTensor)
        return weight

    def error(weight: QuantTensor) -> float:
        lost = torch.from_numpy(weight.dequantize()) - own
        return float((seen[0] @ lost.T).square().mean())

    given = head_as(use_gptq=True, head=own[:100])
    assert given.shape == (100, own.shape[1])
    torch.testing.assert_close(model.get_parameter(name), own, rtol=0, atol=0)
    weighed, adapted = head_as(False, own), head_as(True, own)
    monkeypatch.setattr(gptq, "PIECE", 40 * own.shape[1])
    in_pieces = head_as(True, own)  # sums of other shapes may round a value elsewhere
    for other in (given, in_pieces.rows(slice(0, 100))):
        assert np.mean(other.codes == adapted.codes[:100]) > 0.99
    nearest = round_to_grid(own, spec, rtn.fit)
    assert error(adapted) < 0.9 * error(weighed) < 0.9 * error(nearest)
    assert head_as(True).shape == own.shape
    assert not torch.equal(model.get_parameter(name), own)
    handle.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_tuning_brings_the_logits_nearer_and_keeps_the_codes(kind: Kind, tiny_hf: Path) -> None:
    """On tokens that it did not see; what is stored is what is in the model."""
    checkpoint = open_checkpoint(tiny_hf)
    teacher, model = load_reference(checkpoint), load_reference(checkpoint)
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (48, 32)))

    def spec(name: str) -> Spec | None:
        return None if "layers.1.mlp.up" in name else Spec(4, 32, kind)

    def kl() -> float:
        with torch.no_grad():
            p, q = (m(IDS, m.empty_cache(len(IDS)))[0] for m in (teacher, model))
        return float(forward_kl(p, q))

    before = dict(quantize_layers(model, ids, spec, rtn.fit))
    rounded = kl()
    after = tune(model, teacher, ids, before, spec)
    assert kl() < 0.95 * rounded, (kl(), rounded)
    norms = {name for name, _ in model.named_parameters() if name.endswith("norm.weight")}
    assert after.keys() == before.keys() | norms
    for name, weight in after.items():
        values = weight.dequantize() if isinstance(weight, QuantTensor) else weight
        np.testing.assert_array_equal(model.get_parameter(name).numpy(), values)
        if isinstance(weight, QuantTensor):
            source = before[name]
            assert isinstance(source, QuantTensor)
            np.testing.assert_array_equal(weight.codes, source.codes)
            assert weight.nbytes == source.nbytes
            assert not np.array_equal(weight.scales, source.scales)


def test_tuning_that_only_does_harm_is_undone(tiny_hf: Path) -> None:
    checkpoint = open_checkpoint(tiny_hf)
    model, spec = load_reference(checkpoint), Spec(8, 32, "min")
    before = dict(quantize_layers(model, IDS, lambda _: spec, rtn.fit))
    wild = replace(CONFIG, steps=8, learning_rate=0.5)
    after = tune(model, load_reference(checkpoint), IDS, before, lambda _: spec, config=wild)
    for name, weight in after.items():
        if isinstance(weight, QuantTensor):
            np.testing.assert_array_equal(weight.dequantize(), before[name].dequantize())
        else:
            np.testing.assert_array_equal(weight, checkpoint.weight(name))


def test_calibration_takes_the_end_of_the_text(tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("x" * 10_000 + "abcdefgh" * 4)
    ids = last_tokens(text, lambda part: [ord(c) for c in part], 32, 8)
    assert ids.tolist() == [[ord(c) for c in "abcdefgh"]] * 4
    with pytest.raises(UsageError, match="expected 20000"):
        last_tokens(text, lambda part: [0] * len(part), 20_000, 100)
    with pytest.raises(UsageError, match="cannot read"):
        last_tokens(tmp_path / "none", list, 8, 8)


def test_dequantize_is_the_definition() -> None:
    """The docstring's formula, one value at a time."""
    codes = RNG.integers(0, 16, (3, 64)).astype(np.uint8)
    scales = RNG.standard_normal((3, 2)).astype(np.float32)
    zero_points = RNG.integers(0, 16, (3, 2)).astype(np.uint8)
    minimums = RNG.standard_normal((3, 2)).astype(np.float32)
    packed = pack_codes(codes, 4)
    cases = [({}, 8.0, 0.0), ({"zero_points": zero_points}, None, 0.0)]
    cases.append(({"minimums": minimums}, 0.0, None))
    for extra, zero, offset in cases:
        tensor = QuantTensor(packed, scales, 4, 32, **extra)
        out = tensor.dequantize()
        for n in range(3):
            for k in range(64):
                z = zero_points[n, k // 32] if zero is None else zero
                m = minimums[n, k // 32] if offset is None else offset
                expected = scales[n, k // 32] * (float(codes[n, k]) - float(z)) + m
                assert out[n, k] == pytest.approx(expected, rel=1e-6)


def test_concatenated_rows_are_the_parts() -> None:
    parts = [rounded(WEIGHT, 4, 32), rounded(WEIGHT * 3, 4, 32)]
    whole = concat_rows(parts, sum(len(part.codes) for part in parts)).dequantize()
    np.testing.assert_array_equal(whole, np.concatenate([p.dequantize() for p in parts]))
