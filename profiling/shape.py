"""Write a catalog model with random weights, to time runtimes on its shape.

    python -m pocketslm.profiling.shape qwen3-0.6b out/qwen3.gguf

writes a GGUF whose matrices are Q4_0. Speed and memory do not depend on the weights' values.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from pocketslm.errors import UsageError
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.recipe import Recipe
from pocketslm.models import architectures, catalog
from pocketslm.models.checkpoint import EMBEDDING, HEAD
from pocketslm.models.config import ModelConfig
from pocketslm.models.reference import parameter_shapes
from pocketslm.models.sites import is_rounded
from pocketslm.models.tensors import QuantTensor, Weight
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


class RandomCheckpoint:
    """A checkpoint that is nowhere: matrices of int4, embedding and head of int8, all drawn.

    That is what `export` makes of float weights, so a bundle of it is as fast and as large as the
    model's own.
    """

    format = "random"

    def __init__(self, name: str, config: ModelConfig) -> None:
        self.name, self.config, self.path = name, config, Path(name)
        self.notes = ["the weights are random: only speed and memory are those of the model"]
        self.made_from: list[str] = []
        self.licence: str | None = None
        self.sparse: str | None = None
        self._shapes = parameter_shapes(config)

    def files(self) -> list[Path]:
        return []

    def stored_bytes(self) -> dict[str, int]:
        return {"random": sum(map(prod, self._shapes.values()))}

    def weight(self, name: str) -> Weight:
        shape = self._shapes.get(name) or self._shapes[EMBEDDING]  # of a tied head
        if len(shape) == 1:
            return np.full(shape, 0 if name.endswith("bias") else 1, np.float32)
        rows, columns = shape
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if not is_rounded(name) or columns % BLOCK:
            return rng.normal(0, columns**-0.5, shape).astype(np.float32)
        bits = 8 if name in (EMBEDDING, HEAD) else 4
        codes = rng.integers(0, 256, (rows, columns * bits // 8), np.uint8)
        scale = columns**-0.5 / (_DEVIATION * (1 << bits) / 16)
        return QuantTensor(codes, np.full((rows, columns // BLOCK), scale, "f2"), bits, BLOCK)

    def tokenizer_files(self) -> dict[str, bytes]:
        """A vocabulary of bytes and words of no meaning."""
        letters = [chr(code) for code in byte_alphabet().values()]
        words = (f"word{number}" for number in range(len(letters), self.config.vocab_size))
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        tokenizer: dict[str, Any] = {
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": level | {"use_regex": True},
            "post_processor": None,
            "decoder": level | {"use_regex": True},
            "model": {
                "type": "BPE",
                "vocab": {text: number for number, text in enumerate([*letters, *words])},
                "merges": [],
            },
        }
        end = {"eos_token_id": self.config.vocab_size - 1}
        return {
            "tokenizer.json": json.dumps(tokenizer).encode(),
            "generation_config.json": json.dumps(end).encode(),
        }


@contextmanager
def random_bundles(models: Sequence[tuple[str, ModelConfig]]) -> Iterator[list[Path]]:
    """Bundles of random weights by name, native alone, which are gone when the block ends.

    Raises UsageError for a vocabulary without room for the bytes, ExportError where the native
    operators cannot run a model.
    """
    with tempfile.TemporaryDirectory(prefix="pocketslm-") as work:
        made = []
        for name, config in models:
            if config.vocab_size <= 256:
                raise UsageError(f"{name} has {config.vocab_size} tokens, expected more than bytes")
            made.append(Path(work) / name)
            export_bundle(RandomCheckpoint(name, config), made[-1], Recipe(targets=("native",)))
        yield made


def catalog_config(name: str) -> ModelConfig:
    """The configuration of a catalog model; UsageError for what is none, FetchError for no name."""
    config = catalog.entry(name).config
    if config is None:
        raise UsageError(f"{name} is no model; `pocketslm fetch --list` names the catalog's")
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the catalog, see `pocketslm fetch --list`")
    parser.add_argument("out", type=Path, help="the .gguf file to write")
    arguments = parser.parse_args()
    write_random(catalog_config(arguments.name), arguments.out)


if __name__ == "__main__":
    main()
