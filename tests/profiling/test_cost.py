"""What a token costs, against PyTorch's own count and the bytes of a real cache."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

import support
from pocketslm.models.catalog import catalog
from pocketslm.models.config import LayerSize, ModelConfig
from pocketslm.models.transformer import Model
from pocketslm.profiling.cost import Cost


def test_multiplications_are_those_that_pytorch_counts() -> None:
    sizes = [LayerSize(4, 2, 96), LayerSize(2, 1, 64)]
    for config in (support.TINY, support.TINY.with_sizes(sizes)):
        check(config)


def check(config: ModelConfig) -> None:
    model = Model(config).eval()
    cost = Cost.of(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, dtype=torch.long), model.empty_cache())
    # It counts two operations a multiply-accumulate, and not attention on a CPU.
    assert counter.get_total_flops() == 2 * (cost.layer_macs + cost.head_macs)


def test_caches_and_shares() -> None:
    config = catalog()["smollm2-135m-instruct"].config
    assert config is not None
    cost = Cost.of(config)
    assert cost.kv_bytes(100, 2) == 2 * 30 * 3 * 64 * 100 * 2
    assert cost.layer_macs == 30 * (576 * 64 * (9 + 3) * 2 + 3 * 576 * 1536)
    assert cost.read_share == 1  # the head is the embedding
    untied = Cost.of(replace(config, tie_word_embeddings=False))
    assert 0.5 < untied.read_share < 1
    steps = sum(cost.token_macs(position) - cost.head_macs for position in range(50))
    assert cost.prompt_macs(50) == steps + cost.head_macs
