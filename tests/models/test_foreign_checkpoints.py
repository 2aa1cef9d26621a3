"""Folders and files as other tools leave them: read as they are meant, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from architectures import ROWS, write_folder
from safetensors.torch import load_file, save_file

import support
from pocketslm.errors import CheckpointError
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.recipe import Recipe
from pocketslm.models import architectures
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.models.gguf_reader import GGUFFile
from pocketslm.models.reference import load_reference
from pocketslm.models.tensors import QuantTensor, floats

State = dict[str, torch.Tensor]
IDS = torch.arange(40)[None] * 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return support.write_hf(tmp_path / "model")


def logits(path: Path) -> torch.Tensor:
    model = load_reference(open_checkpoint(path), 64)
    out: torch.Tensor = model(IDS, model.empty_cache())[0]
    return out


def restate(folder: Path, change: Callable[[State], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_one_file_of_several_is_read_as_transformers_does(folder: Path) -> None:
    expected = logits(folder)
    state = {name: value * 2 for name, value in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "zz.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "gone.safetensors"}}'
    )
    assert torch.equal(logits(folder), expected)
    assert "zz.safetensors" in open_checkpoint(folder).notes[0]


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"is in a\.safetensors and in b\.safetensors"):
        open_checkpoint(folder)


def test_a_head_of_its_own_is_used_though_it_is_declared_tied(folder: Path) -> None:
    shared = logits(folder)
    head = torch.randn(264, 64)
    restate(folder, lambda state: state.update({"lm_head.weight": head}))
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.config.tie_word_embeddings
    assert "differs from the embedding" in checkpoint.notes[0]
    assert not torch.allclose(logits(folder), shared)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    restate(folder, lambda state: state.update({"lm_head.weight": embedding.clone()}))
    assert torch.equal(logits(folder), shared)


@pytest.mark.parametrize("old_to_new", [("model.", ""), ("model.", "language_model.model.")])
def test_names_with_another_prefix(old_to_new: tuple[str, str], folder: Path) -> None:
    expected, (old, new) = logits(folder), old_to_new

    def rename(state: State) -> None:
        for name in list(state):
            if name.startswith(old):
                state[new + name.removeprefix(old)] = state.pop(name)
        state["lm_head.weight"] = state[f"{new}embed_tokens.weight"].clone()

    restate(folder, rename)
    assert torch.equal(logits(folder), expected)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bias that nobody declared": (
        lambda f: restate(
            f, lambda s: s.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})
        ),
        r"does not account for: model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    "scales of 8-bit weights": (
        lambda f: configure(f, quantization_config={"quant_method": "fp8"}),
        "quantization_config names the method 'fp8'",
    ),
    "a Git LFS pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/x"),
        "Git LFS pointer",
    ),
    "a part that is not there": (
        lambda f: (
            (f / "model.safetensors").rename(f / "x.safetensors"),
            (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "y.safetensors"}}'
            ),
        ),
        "names y.safetensors, which is not there",
    ),
    "an index that is none": (
        lambda f: (
            (f / "model.safetensors").unlink(),
            (f / "model.safetensors.index.json").write_text('{"weight_map": [1]}'),
        ),
        "weight_map is not an object",
    ),
    "experts": (lambda f: configure(f, num_local_experts=8), "num_local_experts is 8"),
    "absurd sizes": (lambda f: configure(f, num_hidden_layers=10**7), "at most 1024"),
    "a size beyond 32 bits": (
        lambda f: configure(f, head_dim=2**32),
        "head_dim is 4294967296, expected an integer from 1 to 2147483647",
    ),
    "a width that no model has": (
        lambda f: configure(f, head_dim=2**30),
        "head_dim is 1073741824, expected an integer, 1 to 16777216",
    ),
    "null for a number": (
        lambda f: configure(f, rms_norm_eps=None),
        "rms_norm_eps is None, expected a number",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name: str, folder: Path) -> None:
    change, message = REFUSED[name]
    change(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_numbers_that_are_not_finite_are_refused(name: str, value: float, folder: Path) -> None:
    """Whatever it is exported to: int8 products of onnxruntime would hide them."""
    restate(folder, lambda state: state[name].view(-1)[-1].fill_(value))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=f"{name} holds numbers that are NaN or infinite"):
        load_reference(checkpoint, 64)
    for target in ("native", "onnx", "executorch"):
        with pytest.raises(CheckpointError, match=f"{name} holds numbers that are NaN"):
            export_bundle(checkpoint, folder.parent / "out", Recipe(targets=(target,)))
        assert not (folder.parent / "out").exists()


def test_scales_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = support.write_gguf(tmp_path / "m.gguf", kind="Q8_0")
    stored = GGUFFile(path).read("blk.0.attn_q.weight")
    assert isinstance(stored, QuantTensor)
    scale = stored.scales.reshape(-1)[:1].astype("<f2").tobytes()
    block = scale + (stored.codes.reshape(-1)[:32].astype(int) - 128).astype("i1").tobytes()
    content = path.read_bytes()
    assert content.count(block) == 1
    path.write_bytes(content.replace(block, np.float16("nan").tobytes() + block[2:]))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight holds numbers that are NaN"):
        load_reference(open_checkpoint(path), 64)


def test_an_unknown_field_is_named(folder: Path) -> None:
    configure(folder, colour_of_the_model="blue")
    assert "colour_of_the_model" in open_checkpoint(folder).notes[0]


# GGUF.


def rewrite(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a GGUF with other metadata; None leaves a key out."""
    reader = GGUFFile(source)
    return write_gguf(target, reader, reader.metadata | changes, list(reader.tensors))


def write_gguf(
    target: Path,
    reader: GGUFFile,
    metadata: Mapping[str, Any],
    names: Sequence[str],
    more: Mapping[str, Any] | None = None,
) -> Path:
    """These metadata and these tensors of a file as another, and more tensors."""
    writer = gguf.GGUFWriter(str(target), str(reader.metadata["general.architecture"]))
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    kinds |= {str: writer.add_string, list: writer.add_array}
    for key, value in metadata.items():
        if key != "general.architecture" and value is not None:
            kinds[type(value)](key, value)
    for name in names:
        writer.add_tensor(name, floats(reader.read(name)))
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return support.write_gguf(tmp_path / "tiny.gguf", kind="F32")


def test_a_rope_factor_without_a_type_is_linear(tiny: Path, tmp_path: Path) -> None:
    path = rewrite(tiny, tmp_path / "m.gguf", **{"llama.rope.scaling.factor": 4.0})
    assert open_checkpoint(path).config.rotaries[0].divisors == (4.0,) * 8


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (np.ones(3, np.float32), "3 factors of RoPE in its tensors, expected 8"),
        (np.ones((2, 8), np.float32), "rope_freqs.weight is not a vector"),
        (np.full(8, np.nan, np.float32), "positive numbers"),
        (np.zeros(8, np.float32), "positive numbers"),
    ],
    ids=["too few", "a matrix", "nan", "zero"],
)
def test_factors_of_rope_that_are_refused(
    factors: np.ndarray[Any, Any], message: str, tiny: Path, tmp_path: Path
) -> None:
    reader = GGUFFile(tiny)
    path = write_gguf(
        tmp_path / "m.gguf",
        reader,
        reader.metadata,
        list(reader.tensors),
        {"rope_freqs.weight": factors},
    )
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_sizes_may_be_lists_with_an_entry_a_layer(tiny: Path, tmp_path: Path) -> None:
    expected = logits(tiny)
    lists = {"llama.attention.head_count_kv": [2, 2], "llama.feed_forward_length": [96, 96]}
    assert torch.equal(logits(rewrite(tiny, tmp_path / "m.gguf", **lists)), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.expert_count": 8}, "expert_count is 8"),
        ({"llama.attention.sliding_window": 64}, "sliding_window is 64"),
        ({"llama.attention.head_count": 0}, "head_count is 0, expected an integer from 1"),
        ({"llama.embedding_length": "x"}, "embedding_length is 'x'"),
        ({"llama.block_count": 2**31 - 1}, "at most 1024"),
        ({"llama.rope.freq_base": 0.0}, "rope_theta"),
        ({"llama.attention.causal": False}, "attention.causal is false"),
        ({"llama.rope.scaling.attn_factor": 1.5}, "attn_factor is 1.5 without factors"),
    ],
)
def test_metadata_that_is_refused(
    changes: dict[str, Any], message: str, tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(rewrite(tiny, tmp_path / "m.gguf", **changes))
    assert "\n" not in str(error.value)


def test_a_tensor_that_nothing_reads_is_refused(tiny: Path, tmp_path: Path) -> None:
    """Norms of Q and K make a Qwen3, whatever the file calls itself."""
    folder, _ = write_folder(tmp_path / "qwen3", ROWS["qwen3"])
    state = {n: v.numpy() for n, v in load_file(folder / "model.safetensors").items()}
    names = architectures.by_name("qwen3").gguf
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    for key, value in GGUFFile(tiny).metadata.items():
        if key.startswith("llama."):
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for name, array in state.items():
        writer.add_tensor(names.stored(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"account for: blk\.0\.attn_k_norm\.weight"):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_split_file_is_read_from_its_first_part(tiny: Path, tmp_path: Path) -> None:
    expected, reader = logits(tiny), GGUFFile(tiny)
    names = list(reader.tensors)
    parts = [tmp_path / f"m-{number:05d}-of-00002.gguf" for number in (1, 2)]
    write_gguf(parts[0], reader, reader.metadata | {"split.no": 0}, names[:7])
    write_gguf(parts[1], reader, {"split.no": 1}, names[7:])
    assert torch.equal(logits(parts[0]), expected)
    assert open_checkpoint(parts[0]).files() == parts
    with pytest.raises(CheckpointError, match="is part 2 of 2; give m-00001-of-00002.gguf"):
        open_checkpoint(parts[1])
    parts[1].unlink()
    with pytest.raises(CheckpointError, match="m-00002-of-00002.gguf is not beside it"):
        open_checkpoint(parts[0])


@pytest.mark.parametrize(
    ("name", "model_type"), [("gemma3", "gemma3"), ("ministral 3", "mistral3")]
)
def test_of_a_model_that_sees_the_text_is_read(name: str, model_type: str, tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path, ROWS[name])
    expected = logits(folder)
    config = json.loads((folder / "config.json").read_text())
    whole = {"model_type": model_type, "text_config": config, "vision_config": {"hidden_size": 9}}
    (folder / "config.json").write_text(json.dumps(whole))

    def with_vision(state: State) -> None:
        for name in list(state):
            state[f"language_model.{name}"] = state.pop(name)
        state["vision_tower.vision_model.embeddings.weight"] = torch.ones(3)

    restate(folder, with_vision)
    assert torch.equal(logits(folder), expected)
    assert "vision tower is left out" in open_checkpoint(folder).notes[0]


def test_a_mistral_that_sees_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path, ROWS["mistral"])
    config = json.loads((folder / "config.json").read_text())
    whole = {"model_type": "mistral3", "text_config": config}
    (folder / "config.json").write_text(json.dumps(whole))
    with pytest.raises(CheckpointError, match="model_type 'mistral', expected 'ministral3'"):
        open_checkpoint(folder)


def test_copies_of_a_shared_mlp_are_refused(tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path, ROWS["mobillama"])
    assert not any(".1.mlp." in name for name in open_checkpoint(folder)._where)  # type: ignore[attr-defined]

    def with_a_copy(state: State) -> None:
        state["model.layers.1.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"] + 1

    restate(folder, with_a_copy)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("family", "tensor"),
    [
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight"),
        ("phi3", "model.layers.0.mlp.gate_up_proj.weight"),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.bias"),
    ],
)
@pytest.mark.parametrize("more", [-2, 2])
def test_a_fused_tensor_of_other_rows_is_refused(
    family: str, tensor: str, more: int, tmp_path: Path
) -> None:
    """Of more rows than the configuration says, the first would be read as if they were all."""
    folder, _ = write_folder(tmp_path / "model", ROWS[family])

    def change(state: State) -> None:
        whole = state[tensor]
        state[tensor] = whole[:more] if more < 0 else torch.cat([whole, whole[:more]])

    restate(folder, change)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=rf"{tensor} has shape .* rows from the config"):
        load_reference(checkpoint, 8)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("qwen2 windows", {"layer_types": "sssss"}),
        ("gemma3", {"layer_types": [["full_attention"]] * 6}),
        ("gemma3", {"sliding_window_pattern": "x", "layer_types": None}),
        ("olmo3", {"layer_types": ["full_attentionx"] * 4}),
        ("lfm2", {"layer_types": None, "full_attn_idxs": 1.5}),
        ("smollm3", {"no_rope_layers": [[]] * 4}),
        ("granite", {"logits_scaling": 0}),
        ("granite 4 dense", {"layer_types": 3}),
        ("gpt2", {"n_embd": {}}),
        ("gpt_neo", {"attention_layers": None, "attention_types": [[1, 2, 3]]}),
    ],
)
def test_fields_of_another_kind_are_refused(
    family: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    folder, _ = write_folder(tmp_path / "model", ROWS[family])
    configure(folder, **fields)
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)
