"""A random LoRA adapter of the tiny model, in a folder as PEFT saves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import support
from pocketslm.models.config import ModelConfig
from pocketslm.models.reference import parameter_shapes
from pocketslm.models.updated import ADAPTER_CONFIG, ADAPTER_WEIGHTS

RANK, ALPHA = 4, 6
TARGETS = ("q_proj", "v_proj", "down_proj")
# As PEFT 0.18 writes it, but for the fields that only training reads.
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "somewhere/tiny",
    "r": RANK,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.05,
    "target_modules": list(TARGETS),
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "lora_bias": False,
}


def factors(
    config: ModelConfig = support.TINY, targets: tuple[str, ...] = TARGETS, seed: int = 1
) -> dict[str, torch.Tensor]:
    """A and B of every target, by PEFT's names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in parameter_shapes(config).items():
        if name.split(".")[-2] in targets:
            at = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(RANK, shape[1], generator=generator) / 8
            tensors[f"{at}.lora_B.weight"] = torch.randn(shape[0], RANK, generator=generator) / 8
    return tensors


def write_adapter(
    folder: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(CONFIG | changes))
    save_file(factors() if tensors is None else tensors, folder / ADAPTER_WEIGHTS)
    return folder
