"""LoRA adapters merged into a checkpoint; what is more than A and B is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_support import ALPHA, RANK, factors, write_adapter
from architectures import ROWS, write_folder
from safetensors.torch import load_file, save_file

from pocketslm.cli import main
from pocketslm.errors import CheckpointError, UsageError
from pocketslm.export.source import open_source
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.models.reference import load_reference
from pocketslm.models.tensors import QuantTensor, floats
from pocketslm.models.updated import ADAPTER_CONFIG, ADAPTER_WEIGHTS, WithAdapter
from pocketslm.runtime.bundle import read_manifest

MAX_ERROR = 1e-5  # of logits: fp32 products in another order


class Beside(torch.nn.Module):
    """What PEFT runs: the product of the base, and that of the factors beside it."""

    def __init__(self, linear: Any, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.linear, self.a, self.b, self.scale = linear, a, b, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x) + self.scale * (x @ self.a.T) @ self.b.T
        return out


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(0, 240, 7)[None]
    out: torch.Tensor = model(ids, model.empty_cache())[0]
    return out


@pytest.mark.parametrize(("rslora", "scale"), [(False, ALPHA / RANK), (True, ALPHA / RANK**0.5)])
def test_merged_equals_factors_beside_the_base(
    rslora: bool, scale: float, tiny_hf: Path, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "adapter", use_rslora=rslora)
    base = open_checkpoint(tiny_hf)
    merged = load_reference(WithAdapter(base, folder))
    expected = load_reference(base)
    plain = logits(expected)
    for name, a in factors().items():
        if name.endswith("lora_A.weight"):
            at = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = factors()[name.replace("lora_A", "lora_B")]
            parent, _, child = at.rpartition(".")
            beside = Beside(expected.get_submodule(at), a, b, scale)
            setattr(expected.get_submodule(parent), child, beside)
    assert float((logits(merged) - logits(expected)).abs().max()) < MAX_ERROR
    assert float((logits(merged) - plain).abs().max()) > 0.1


def test_matrices_without_factors_stay_as_they_are(tiny_gguf: Path, tmp_path: Path) -> None:
    base = open_checkpoint(tiny_gguf)
    merged = WithAdapter(base, write_adapter(tmp_path))
    kept, changed = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    assert isinstance(merged.weight(kept), QuantTensor)
    np.testing.assert_array_equal(floats(merged.weight(kept)), floats(base.weight(kept)))
    assert not np.array_equal(floats(merged.weight(changed)), floats(base.weight(changed)))


TUNED = (
    "q_proj",
    "k_proj",
    "down_proj",
    "qkv_proj",
    "gate_up_proj",
    "query_key_value",
    "input_linear",
)


@pytest.mark.parametrize("family", ["ernie 4.5", "phi3", "gpt_neox", "granite 4 dense"])
def test_factors_lie_as_the_familys_matrices_do(family: str, tmp_path: Path) -> None:
    """Rows of a factor B are those of the file's matrix: rotary pairs, or several matrices in one.

    The expected model has the product added to the file's own matrices.
    """
    folder, _ = write_folder(tmp_path / "base", ROWS[family])
    state = load_file(folder / "model.safetensors")
    tensors, merged = {}, dict(state)
    for number, (name, weight) in enumerate(state.items()):
        if weight.dim() < 2 or name.split(".")[-2] not in TUNED:
            continue
        generator = torch.Generator().manual_seed(number)
        a = torch.randn(RANK, weight.shape[1], generator=generator) / 8
        b = torch.randn(weight.shape[0], RANK, generator=generator) / 8
        at = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}
        merged[name] = weight + ALPHA / RANK * b @ a
    base = open_checkpoint(folder)
    adapted = WithAdapter(base, write_adapter(tmp_path / "adapter", tensors))
    whole = shutil.copytree(folder, tmp_path / "merged")
    save_file(merged, whole / "model.safetensors")
    expected = logits(load_reference(open_checkpoint(whole)))
    assert float((logits(load_reference(adapted)) - expected).abs().max()) < MAX_ERROR
    assert float((logits(load_reference(base)) - expected).abs().max()) > 0.1
    # Beside the base, under our names.
    carried = adapted.factors()
    for name in (n for n in carried if n.endswith("lora_A.weight")):
        ours = f"{name.removeprefix('base_model.model.').removesuffix('.lora_A.weight')}.weight"
        product = carried[name.replace("lora_A", "lora_B")] @ carried[name]
        difference = floats(adapted.weight(ours)) - floats(base.weight(ours))
        np.testing.assert_allclose(product, difference, atol=1e-5)


def test_a_template_beside_an_adapter_is_named(tiny_hf: Path, tmp_path: Path) -> None:
    base, folder = open_checkpoint(tiny_hf), write_adapter(tmp_path / "polite")
    for name, content in base.tokenizer_files().items():
        (folder / name).write_bytes(content)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"padding_side": "left"}))
    assert len(WithAdapter(base, folder).notes) == len(base.notes) + 1
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert "polite has a chat template of its own" in WithAdapter(base, folder).notes[-1]


def test_export_and_eval_take_a_base_and_its_adapter(tiny_hf: Path, tmp_path: Path) -> None:
    name = f"{tiny_hf}+{write_adapter(tmp_path / 'polite')}"
    out, text = tmp_path / "out", tmp_path / "text"
    text.write_text("etaoin shrdlu " * 20)
    options = ["--weights", "float", "--head", "float", "--target", "native"]
    assert main(["export", name, str(out), *options]) == 0
    manifest = read_manifest(out)
    assert manifest.source["name"] == "hf+polite"
    assert "the adapter polite was merged into hf" in manifest.notes
    measure = ["eval", str(out), "--text", str(text), "--window", "32", "--windows", "2"]
    assert main([*measure, "--source", name]) == 0
    quality = read_manifest(out).quality
    assert quality is not None
    assert quality["kl"] < 1e-3
    assert main([*measure, "--source", str(tiny_hf)]) == 2  # not what it was made from
    with pytest.raises(UsageError, match="nowhere does not exist"):
        open_source(f"{tiny_hf}+nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is True, expected a plain LoRA adapter"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "'pissa'"),
        ({"r": 0}, "r is 0, expected a number"),
        ({"r": True}, "r is True, expected a number"),
        ({"r": 10**400}, "r is 1000"),
        ({"lora_alpha": None}, "lora_alpha is None, expected a number"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"r": 8}, r"has shape \[4, 96\], expected \[8, 96\]"),
    ],
)
def test_other_adapters_are_refused(
    change: dict[str, Any], message: str, tiny_hf: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        WithAdapter(open_checkpoint(tiny_hf), write_adapter(tmp_path, **change))
    assert "\n" not in str(caught.value)


def test_factors_that_do_not_fit_are_refused(tiny_hf: Path, tmp_path: Path) -> None:
    base = open_checkpoint(tiny_hf)
    _, *rest = factors()
    alone = {name: factors()[name] for name in rest}
    foreign = {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(4, 64)}
    extra = {"base_model.model.lm_head.weight": torch.zeros(264, 64)}
    for tensors, message in (
        (alone, "a factor beside it"),
        (foreign, "is not a factor of"),
        (factors() | extra, "is not a factor of"),
        ({}, "has no tensors"),
    ):
        with pytest.raises(CheckpointError, match=message):
            WithAdapter(base, write_adapter(tmp_path, tensors))
    whole = (tmp_path / ADAPTER_WEIGHTS).read_bytes()
    (tmp_path / ADAPTER_WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot read"):
        WithAdapter(base, tmp_path)
    with pytest.raises(CheckpointError, match=ADAPTER_CONFIG):
        WithAdapter(base, tiny_hf)
