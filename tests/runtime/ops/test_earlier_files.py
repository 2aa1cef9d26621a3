"""Files of versions 1 and 2 of model.slm give the same bits as the program of version 3."""

from __future__ import annotations

from pathlib import Path

import earlier_model_file
import numpy as np
import pytest
from native_support import mixed_kinds, tiny_config, tiny_weights, write_tiny

from pocketslm.models.config import LayerSize
from pocketslm.runtime.backends.native import NativeModel

VARIANTS = {
    "version 1": {},
    "version 1, biases": {"attention_bias": True},
    "version 1, untied": {"tie_word_embeddings": False},
    "version 2": {"layer_sizes": (LayerSize(2, 1, 64), LayerSize(4, 2, 96))},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_bits(name: str, tmp_path: Path) -> None:
    config = tiny_config(**VARIANTS[name])
    write_tiny(tmp_path / "new.slm", config, mixed_kinds)
    earlier_model_file.write(tmp_path / "old.slm", config, tiny_weights(config, mixed_kinds))
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, 40)
    outputs = []
    for file in ("new.slm", "old.slm"):
        session = NativeModel(tmp_path / file).session(threads=2)
        whole = session.forward(tokens, all_logits=True)
        greedy = [session.step_greedy(3) for _ in range(8)]
        outputs.append((whole, greedy, session.save(len(tokens))))
    (new, new_greedy, new_kv), (old, old_greedy, old_kv) = outputs
    np.testing.assert_array_equal(new, old)
    assert new_greedy == old_greedy
    assert new_kv == old_kv
