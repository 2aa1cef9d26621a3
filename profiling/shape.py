"""Write a catalog model with random weights, to time runtimes on its shape.

    python -m pocketslm.profiling.shape qwen3-0.6b out/qwen3.gguf

writes a GGUF whose matrices are Q4_0. Speed and memory do not depend on the weights' values.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from pocketslm.errors import UsageError
from pocketslm.models import architectures, catalog
from pocketslm.models.config import ModelConfig
from pocketslm.models.reference import parameter_shapes
from pocketslm.runtime.tokenizer.pretokenizers import byte_alphabet

BLOCK = 32  # values in a block of Q4_0: a scale in fp16, then two codes a byte
_DEVIATION = 4.61  # the deviation of codes that are uniform on 0 to 15


def metadata(c: ModelConfig) -> dict[str, Any]:
    """The keys of a GGUF below its architecture's name that follow from any configuration."""
    a = c.attentions[0]
    kv_heads = [layer.size.num_key_value_heads for layer in c.stored_layers]
    keys: dict[str, Any] = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": a.heads,
        "attention.head_count_kv": kv_heads if 0 in kv_heads else a.kv_heads,
        "attention.key_length": a.head_dim,
        "attention.value_length": a.head_dim,
        f"attention.layer_norm_{'rms_' if c.norm == 'rms' else ''}epsilon": c.norm_eps,
        "vocab_size": c.vocab_size,
    }
    if c.rotaries:
        keys |= {"rope.freq_base": c.rotaries[0].theta, "rope.dimension_count": c.rotaries[0].dim}
    return keys


def add_metadata(writer: Any, prefix: str, keys: dict[str, Any]) -> None:
    """Add ``keys`` below ``prefix`` to a GGUFWriter, each with the type of its value."""
    for name, value in keys.items():
        key = f"{prefix}.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def write_random(config: ModelConfig, path: Path, seed: int = 0) -> None:
    """A GGUF of ``config`` with random weights and a vocabulary of bytes and words of no meaning.

    Raises UsageError where GGUF has no name for the architecture, or needs more keys for it than
    this writes: windows, factors, stretched rotary tables.
    """
    import gguf

    architecture = architectures.by_name(config.architecture)
    plain = {a.window is None and a.softcap is None for a in config.attentions} == {True}
    table = next(iter(config.rotaries), None)
    plain = plain and (table is None or not table.divisors) and config.vocab_size > 257
    if not architecture.gguf_types or not plain:
        raise UsageError(f"no GGUF of random weights for {config.architecture} with this config")
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), architecture.gguf_types[0])
    writer.add_name(path.stem)
    add_metadata(writer, architecture.gguf_types[0], metadata(config))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    letters = [chr(code) for code in byte_alphabet().values()]
    words = (f"word{number}" for number in range(257, config.vocab_size))
    writer.add_token_list([*letters, "th", *words])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(config.vocab_size - 1)
    for name, shape in parameter_shapes(config).items():
        stored = architecture.gguf.stored(name)
        if len(shape) == 1:
            values = np.zeros(shape, np.float32) if name.endswith("bias") else np.ones(shape, "f4")
            writer.add_tensor(stored, values)
            continue
        rows, columns = shape
        blocks = np.empty((rows, columns // BLOCK, 2 + BLOCK // 2), np.uint8)
        scale = np.float16(columns**-0.5 / _DEVIATION)
        blocks[..., :2] = np.frombuffer(scale.tobytes(), np.uint8)
        blocks[..., 2:] = rng.integers(0, 256, blocks[..., 2:].shape, np.uint8)
        kind = gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor(stored, blocks.reshape(rows, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the catalog, see `pocketslm fetch --list`")
    parser.add_argument("out", type=Path, help="the .gguf file to write")
    arguments = parser.parse_args()
    config = catalog.entry(arguments.name).config
    if config is None:
        parser.error(f"{arguments.name} is no model")
    write_random(config, arguments.out)


if __name__ == "__main__":
    main()
