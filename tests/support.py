"""A tiny random model and its byte tokenizer: what most tests run on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pocketslm.models import architectures
from pocketslm.models.config import ModelConfig, uniform
from pocketslm.models.hf_writer import hf_config
from pocketslm.models.transformer import Model
from pocketslm.runtime.tokenizer import pretokenizers

_FIELDS: dict[str, Any] = {
    "architecture": "llama",
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def tiny(**changes: Any) -> ModelConfig:
    """A tiny model of Llama's block, with other fields of :func:`uniform` where asked for."""
    return uniform(**_FIELDS | changes)


TINY = tiny()
MERGED = ("th", "he", "in", "er")
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|pad|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in byte order."""
    return [chr(pretokenizers.byte_alphabet()[byte]) for byte in range(256)]


def tokenizer_files() -> dict[str, str]:
    """One token a byte, then the special tokens, then a few merged pairs."""
    vocabulary = {text: id_ for id_, text in enumerate((*byte_alphabet(), *SPECIAL, *MERGED))}
    added = [
        {
            "id": 256 + index,
            "content": text,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for index, text in enumerate(SPECIAL)
    ]
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [[pair[0], pair[1]] for pair in MERGED],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "chat_template": CHATML,
    }
    generation = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 259}
    return {
        "tokenizer.json": json.dumps(tokenizer),
        "tokenizer_config.json": json.dumps(config),
        "generation_config.json": json.dumps(generation),
    }


def random_state(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights by Hugging Face name, large enough that the logits differ clearly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = Model(config, context=8)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            return 1 + 0.1 * noise
        return noise * (0.5 if name.endswith("bias") else shape[-1] ** -0.5)

    return {name: draw(name, tuple(p.shape)) for name, p in model.named_parameters()}


def write_hf(folder: Path, config: ModelConfig = TINY, seed: int = 0, **extra: Any) -> Path:
    """A Hugging Face folder of a random model; ``extra`` fields go into config.json."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.numpy() for name, tensor in random_state(config, seed).items()}
    names = architectures.by_name(config.architecture).hf
    save_file(names.write(config, state), folder / "model.safetensors", metadata={"format": "pt"})
    data = hf_config(config) | {"bos_token_id": 256, "eos_token_id": 257} | extra
    (folder / "config.json").write_text(json.dumps(data))
    for name, text in tokenizer_files().items():
        (folder / name).write_text(text)
    return folder


def write_gguf(path: Path, config: ModelConfig = TINY, kind: str = "Q4_1", seed: int = 0) -> Path:
    """A GGUF of the same random model as llama.cpp would write it: Q and K rows as pairs."""
    import gguf
    from gguf.quants import quantize

    first = config.stored_layers[0]
    attention = first.attention
    assert attention is not None
    quantized = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(str(path), config.architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(attention.heads)
    writer.add_head_count_kv(attention.kv_heads)
    writer.add_key_length(attention.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rotaries[0].theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*byte_alphabet(), *SPECIAL, *MERGED])
    writer.add_token_types([1] * 256 + [3] * len(SPECIAL) + [1] * len(MERGED))
    writer.add_token_merges([" ".join(pair) for pair in MERGED])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_chat_template(CHATML)
    state = {name: tensor.numpy() for name, tensor in random_state(config, seed).items()}
    for name, array in architectures.by_name(config.architecture).gguf.write(config, state).items():
        if array.ndim == 2:
            writer.add_tensor(name, quantize(array, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
