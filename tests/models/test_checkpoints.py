"""Readers and the PyTorch model, held against transformers, numpy and damaged files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import support
from pocketslm.errors import CheckpointError, UnknownArchitectureError
from pocketslm.models import architectures
from pocketslm.models.architectures.fields import Fields
from pocketslm.models.checkpoint import open_checkpoint, read_weight
from pocketslm.models.config import LayerSize, ModelConfig
from pocketslm.models.gguf_reader import GGUFFile
from pocketslm.models.hf_writer import save_hf
from pocketslm.models.reference import load_reference
from pocketslm.models.tensors import QuantTensor

# Two fp32 implementations of one model differ by rounding alone.
MAX_LOGIT_ERROR = 1e-3


def max_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest absolute difference; NaN if there is one, which no bound accepts."""
    return float((ours - theirs).abs().max())


def test_the_logit_comparison_can_fail(tiny_hf: Path) -> None:
    model = load_reference(open_checkpoint(tiny_hf))
    ids = torch.arange(50)[None]
    good, _ = model(ids, model.empty_cache())
    model.cos_0[9] += 0.01
    wrong, _ = model(ids, model.empty_cache())
    assert not max_error(wrong, good) <= MAX_LOGIT_ERROR
    assert not max_error(wrong * float("nan"), good) <= MAX_LOGIT_ERROR


PROMPTS = (
    "What is the capital of France?",
    "Explain photosynthesis to a child.",
    "Write a short poem about rain.",
    "List three uses of a paper clip.",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "What should I pack for a hike?",
)


@pytest.mark.real
def test_real_model_equals_transformers(smollm2_gguf: Path, tmp_path: Path) -> None:
    """SmolLM2-135M: logits, and 64 greedy tokens on 8 prompts."""
    from transformers import AutoModelForCausalLM

    from pocketslm.runtime.tokenizer import load_tokenizer

    checkpoint = open_checkpoint(smollm2_gguf)
    save_hf(checkpoint, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours = load_reference(checkpoint, 256)
    tokenizer = load_tokenizer(tmp_path)
    worst = 0.0
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.apply_chat_template([{"role": "user", "content": prompt}])])
        with torch.no_grad():
            generated = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False
            )
            expected = theirs(generated).logits
        logits, _ = ours(generated, ours.empty_cache())
        # Each token is our first choice after those before it: greedy text is the same.
        start = ids.shape[1]
        assert logits[0, start - 1 : -1].argmax(-1).tolist() == generated[0, start:].tolist()
        worst = max(worst, max_error(logits, expected))
    print(f"\nmax abs logit difference to transformers over {len(PROMPTS)} prompts: {worst:.2e}")
    assert worst <= MAX_LOGIT_ERROR


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
def test_gguf_blocks_are_kept(kind: str, tmp_path: Path) -> None:
    """Every value of every tensor equals the gguf library's own dequantization, bit for bit."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    path = support.write_gguf(tmp_path / "x.gguf", kind=kind)
    ours, theirs = GGUFFile(path), GGUFReader(path)
    for tensor in theirs.tensors:
        weight = ours.read(tensor.name)
        if kind.startswith("Q") and len(tensor.shape) == 2:
            assert isinstance(weight, QuantTensor)
            weight = weight.dequantize()
        expected = dequantize(tensor.data, tensor.tensor_type).reshape(weight.shape)
        np.testing.assert_array_equal(weight, expected.astype(np.float32), err_msg=tensor.name)
        assert ours.is_kept(tensor.name)


# Blocks that are kept, and the most that rounding others to 8 bits may cost of their largest value.
KEPT = ("Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
MADE = ("MXFP4", "TQ1_0", "TQ2_0")  # kept, too; not all bytes are blocks of theirs
ROUNDED = ("IQ3_S", "IQ2_XXS")
MAX_ROUNDING = 0.5 / 127 + 1e-3


@pytest.mark.parametrize("name", [*KEPT, *MADE, *ROUNDED])
def test_blocks_of_more_kinds_are_kept_or_rounded_to_eight_bits(name: str, tmp_path: Path) -> None:
    import gguf

    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 60, (4, 512 // block * size), dtype=np.uint8)
    if name in MADE:
        raw = gguf.quants.quantize(rng.normal(size=(4, 512)).astype(np.float32), kind)
    writer = gguf.GGUFWriter(str(tmp_path / "k.gguf"), "llama")
    writer.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "k.gguf")
    assert file.is_kept("blk.0.ffn_up.weight") == (name not in ROUNDED)
    weight = file.read("blk.0.ffn_up.weight")
    assert isinstance(weight, QuantTensor)
    ours, theirs = weight.dequantize(), gguf.quants.dequantize(raw, kind)
    if name not in ROUNDED:
        np.testing.assert_array_equal(ours, theirs)
    else:
        peaks = np.abs(theirs.reshape(4, -1, 32)).max(-1).repeat(32, 1)
        # The random blocks reach down to where a half-precision scale is coarse.
        assert (np.abs(ours - theirs) <= MAX_ROUNDING * peaks + 1e-5).all()


def test_a_ternary_tensor_with_a_fourth_code_is_refused(tmp_path: Path) -> None:
    import gguf

    raw = np.full((4, 2 * 66), 0xFF, np.uint8)
    raw.reshape(4, 2, 66)[..., 64:] = np.array([1], np.float16).view(np.uint8)
    writer = gguf.GGUFWriter(str(tmp_path / "t.gguf"), "llama")
    kind = gguf.GGMLQuantizationType.TQ2_0
    writer.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"ffn_up.weight' of TQ2_0: a code is none of"):
        GGUFFile(tmp_path / "t.gguf").read("blk.0.ffn_up.weight")


def test_sharded_safetensors(tiny_hf: Path, tmp_path: Path) -> None:
    state = load_file(tiny_hf / "model.safetensors")
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_bytes((tiny_hf / "config.json").read_bytes())
    checkpoint = open_checkpoint(tmp_path)
    for name in names:
        np.testing.assert_array_equal(checkpoint.weight(name), state[name].numpy())
    index["weight_map"][names[0]] = "../a.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its folder"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("cut", [0, 3, 20, 40, 500, 5000, -1])
def test_truncated_gguf(cut: int, tiny_gguf: Path, tmp_path: Path) -> None:
    data = tiny_gguf.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[:cut])
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


def test_mutated_gguf_headers_never_crash(tiny_gguf: Path, tmp_path: Path) -> None:
    """Random bytes in the header: an error or a readable file, never anything else."""
    data = bytearray(tiny_gguf.read_bytes())
    rng = np.random.default_rng(0)
    path = tmp_path / "mutated.gguf"
    failures = 0
    for _ in range(400):
        changed = bytearray(data)
        for at in rng.integers(0, 6000, 4):
            changed[at] = rng.integers(0, 256)
        path.write_bytes(changed)
        try:
            file = GGUFFile(path)
            for name in file.tensors:
                file.read(name)
        except CheckpointError:
            failures += 1
    assert 0 < failures < 400


def test_gguf_counts_that_lie(tmp_path: Path) -> None:
    """A claimed 2^60 strings must not be allocated or looped over."""
    key = b"a.b"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    for item in (0, 8):  # uint8 and string arrays
        path = tmp_path / f"{item}.gguf"
        path.write_bytes(head + struct.pack("<IIQ", 9, item, 2**60))
        with pytest.raises(CheckpointError, match="truncated or its header lies"):
            GGUFFile(path)


def test_truncated_safetensors(tiny_hf: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_hf / "config.json").read_bytes())
    data = (tiny_hf / "model.safetensors").read_bytes()
    lying = struct.pack("<Q", 2**62) + data[8:]
    for bad in (b"", data[:100], data[:-7], lying):
        (tmp_path / "model.safetensors").write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            open_checkpoint(tmp_path)


def test_layers_of_other_sizes_are_the_masked_model(tmp_path: Path) -> None:
    """Written and read back, with narrower layers: what zeros in the wide one compute."""
    wide = load_reference(open_checkpoint(support.write_hf(tmp_path / "wide")))
    sizes = [LayerSize(2, 1, 96), LayerSize(4, 2, 48)]
    kept = {"self_attn": 2 * 16, "mlp": 48}  # query rows of layer 0, neurons of layer 1
    state = {}
    for name, value in wide.state_dict().items():
        layer = "self_attn" if ".0.self_attn." in name else "mlp" if ".1.mlp." in name else None
        if layer:
            axis = int("o_proj" in name or "down_proj" in name)
            count = 16 if "k_proj" in name or "v_proj" in name else kept[layer]
            state[name] = value.narrow(axis, 0, count).contiguous()
            if axis:  # what the narrow model lacks adds nothing
                value.narrow(1, count, value.shape[1] - count).zero_()
        else:
            state[name] = value.contiguous()
    config = wide.config.with_sizes(sizes)
    folder = support.write_hf(tmp_path / "narrow", config)
    state.pop("lm_head.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    save_hf(open_checkpoint(folder), tmp_path / "again")
    narrow = load_reference(open_checkpoint(tmp_path / "again"))
    assert narrow.config == config
    ids = torch.arange(60)[None]
    expected, _ = wide(ids, wide.empty_cache())
    got, cache = narrow(ids, narrow.empty_cache())
    assert [keys.shape[1] for keys, _ in cache] == [1, 2]
    assert max_error(got, expected) <= MAX_LOGIT_ERROR


def test_unknown_architecture_lists_the_known_ones(tiny_hf: Path, tmp_path: Path) -> None:
    data = json.loads((tiny_hf / "config.json").read_text()) | {"model_type": "mamba"}
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(UnknownArchitectureError, match=r"'mamba'.*llama.*qwen2"):
        open_checkpoint(tmp_path)


def test_a_weight_of_the_wrong_shape(tiny_hf: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \(64,\)"):
        read_weight(open_checkpoint(tiny_hf), "model.norm.weight", (65,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"num_attention_heads": 3}, "3 attention heads"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"hidden_act": "mish"}, "'mish' is not supported"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "'spiral' is not supported"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "x"}}, "factor of RoPE is 'x'"),
        ({"num_hidden_layers": 10**7}, "10000000 layers, at most 1024"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"head_dim": 2**30}, "head_dim is 1073741824"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x'"),
        ({"sliding_window": 64}, "sliding_window is 64"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping is 30.0"),
        ({"residual_multiplier": 0.2}, "residual_multiplier is 0.2"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"layer_sizes": [[4, 2, 96]]}, "not a list of objects"),
        ({"layer_sizes": [LayerSize(4, 2, 96)._asdict()]}, "1 layer sizes"),
        ({"layer_sizes": [LayerSize(4, 2, 9000)._asdict()] * 2}, "is larger than"),
    ],
)
def test_configs_that_make_no_sense(change: dict[str, object], message: str, tiny_hf: Path) -> None:
    data = json.loads((tiny_hf / "config.json").read_text()) | change
    with pytest.raises(CheckpointError, match=message):
        read_llama(data)


@pytest.mark.parametrize("sizes", [None, [LayerSize(2, 1, 96), LayerSize(4, 2, 48)]])
def test_config_round_trip(sizes: list[LayerSize] | None) -> None:
    config = support.tiny(rope_divisors=(2.0,) * 8)
    if sizes is not None:
        config = config.with_sizes(sizes)
        assert [layer.size for layer in config.layers] == sizes
        assert config.state_bytes(1, 4) == 2 * (1 + 2) * 16 * 4
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_stored_bytes_are_the_files(tiny_hf: Path, tiny_gguf: Path) -> None:
    for path in (tiny_hf, tiny_gguf):
        checkpoint = open_checkpoint(path)
        stored = checkpoint.stored_bytes()
        file = sum(file.stat().st_size for file in checkpoint.files())
        assert 0.7 * file < sum(stored.values()) < file
    assert stored.keys() == {"Q4_1", "F32"}


def test_the_flat_form_of_earlier_bundles_is_read() -> None:
    flat = {
        "architecture": "qwen2",
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000.0,
        "rope_divisors": [2.0] * 8,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "output_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "layer_sizes": [[4, 2, 96], [2, 1, 64]],
        "layer_sharing": False,
    }
    config = ModelConfig.from_dict(flat)
    assert [tuple(layer.size) for layer in config.layers] == [(4, 2, 96), (2, 1, 64)]
    assert config.rotaries[0].frequencies(256)[1] == pytest.approx(5000.0 ** (-1 / 8) / 2)
    assert config.attentions[0].bias
    assert not config.attentions[0].output_bias
    with pytest.raises(CheckpointError, match="not an architecture's description"):
        ModelConfig.from_dict(flat | {"surprise": 1})


def read_llama(data: dict[str, object]) -> None:
    fields = Fields(data, "config.json")
    architectures.of_hf("llama").read_hf(fields)
    fields.settle()


def test_gguf_names() -> None:
    stored = architectures.by_name("llama").gguf.stored
    assert stored("model.embed_tokens.weight") == "token_embd.weight"
    assert stored("model.layers.3.self_attn.q_proj.bias") == "blk.3.attn_q.bias"
