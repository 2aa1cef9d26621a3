"""``genai_config.json``: a bundle's ONNX graph as onnxruntime-genai describes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pocketslm.models.config import ModelConfig
from pocketslm.runtime.config import generation_defaults
from pocketslm.runtime.tokenizer.identity import Identity

# onnxruntime-genai's names of decoders that keep a KV cache and nothing else, in
# https://github.com/microsoft/onnxruntime-genai/blob/main/src/models/model_type.h.
# It runs them all alike; "decoder" is its name for any other.
_TYPES = frozenset(
    {
        *("chatglm", "ernie4_5", "gemma", "gemma2", "gemma3_text", "gptoss", "granite"),
        *("internlm2", "llama", "mistral", "nemotron", "olmo", "phi", "phi3", "qwen2", "qwen3"),
        "smollm3",
    }
)


def genai_config(
    config: ModelConfig, context: int, folder: Path, identity: Identity
) -> dict[str, Any]:
    """onnxruntime-genai's description of the graph; ids and sampling as the bundle's files say.

    - ``folder``: holds the tokenizer's files. Raises UsageError for broken ones.
    - ``identity``: which tokens begin and end its texts.
    """
    sampling = generation_defaults(folder)
    ids: dict[str, Any] = {}
    if identity.bos is not None:
        ids["bos_token_id"] = identity.bos
    if identity.eos:
        ids["eos_token_id"] = list(identity.eos) if len(identity.eos) > 1 else identity.eos[0]
    pad = identity.pad if identity.pad is not None else next(iter(identity.eos), None)
    if pad is not None:
        ids["pad_token_id"] = pad
    kind, attentions = config.architecture, config.attentions
    return {
        "model": {
            **ids,
            "context_length": context,
            "type": kind if kind in _TYPES else "decoder",
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": max(a.head_dim for a in attentions),
                "hidden_size": config.hidden_size,
                "num_attention_heads": max(a.heads for a in attentions),
                "num_hidden_layers": len(config.layers),
                "num_key_value_heads": max(a.kv_heads for a in attentions),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": sampling.samples,
            "temperature": sampling.temperature or 1.0,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": sampling.repetition_penalty,
        },
    }
