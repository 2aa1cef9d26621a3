"""onnxruntime-genai's model builder, as it reads the configurations of transformers 5.

    python -m pocketslm.profiling.peers.genai_builder -m FOLDER -o OUT -p int4 -e cpu -c CACHE

Gemma 3 has a rotary table for each kind of layer. transformers 5 keeps the parameters of each in
``rope_parameters``; the builder (0.18) reads one table there and the other's base from
``rope_local_base_freq``, and fails on the nested form. This module gives it the form that it reads.
"""

from __future__ import annotations

import runpy
from typing import Any

BUILDER = "onnxruntime_genai.models.builder"


def flatten(config: Any) -> Any:
    """Move the parameters of two tables to the places where the builder looks for them."""
    kinds = getattr(config, "rope_parameters", None)
    if isinstance(kinds, dict) and kinds.keys() == {"full_attention", "sliding_attention"}:
        config.rope_parameters = dict(kinds["full_attention"])
        config.rope_theta = kinds["full_attention"]["rope_theta"]
        config.rope_local_base_freq = kinds["sliding_attention"]["rope_theta"]
    return config


def main() -> None:
    from transformers import AutoConfig

    load = AutoConfig.from_pretrained
    AutoConfig.from_pretrained = lambda *args, **options: flatten(load(*args, **options))
    runpy.run_module(BUILDER, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
