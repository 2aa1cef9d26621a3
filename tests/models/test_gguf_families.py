"""Families through GGUF: the files are those of llama.cpp, which also runs them as an oracle."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from architectures import LLAMA3_ROPE, ROWS, YARN_ROPE, write_folder

import support
from pocketslm.errors import CheckpointError, TokenizerError
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.recipe import Recipe
from pocketslm.models import architectures
from pocketslm.models.checkpoint import Checkpoint, open_checkpoint
from pocketslm.models.config import ModelConfig, Pooling, ShortConv
from pocketslm.models.reference import load_reference
from pocketslm.models.tensors import floats
from pocketslm.models.tokenizer_files import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    tokenizer_files_from_gguf,
)
from pocketslm.profiling.shape import add_metadata, metadata
from pocketslm.runtime.model import Model
from pocketslm.runtime.tokenizer import load_tokenizer_files
from tokenizer_support import charsmap, word_piece

# A GGUF in F32 is the same model; llama.cpp computes attention by other kernels, in fp32 here.
MAX_FOLDER_ERROR = 1e-4
MAX_LLAMA_CPP_ERROR = 2e-3
IDS = np.random.default_rng(4).integers(0, 250, 90)
# Keys below the architecture's name, beside those that follow from the configuration.
KEYS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama untied": {},
    "llama 3": {},
    "llama yarn": {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": YARN_ROPE["factor"],
        "rope.scaling.original_context_length": YARN_ROPE["original_max_position_embeddings"],
    },
    "ministral 3": {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": YARN_ROPE["factor"],
        "rope.scaling.original_context_length": YARN_ROPE["original_max_position_embeddings"],
        "rope.scaling.yarn_log_multiplier": 1.0,
        "attention.temperature_scale": 0.3,
    },
    "minicpm": {"embedding_scale": 6.0, "residual_scale": 0.7, "logit_scale": 4.0},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {
        "attention.sliding_window": 32,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": {"attention.sliding_window": 32},
    "smollm3": {},
    "granite": {
        "attention.scale": 0.2,
        "embedding_scale": 6.0,
        "residual_scale": 0.5,
        "logit_scale": 4.0,
    },
    "olmo2": {},
    "exaone4": {},
    "hunyuan": {},
    "ernie 4.5": {},
    "phi3": {
        "rope.scaling.original_context_length": 64,
        "rope.scaling.attn_factor": math.sqrt(1 + math.log(256 / 64) / math.log(64)),
    },
    "phi4 mini": {},
    "phi2": {},
    "phi2 whole heads": {},
    "gpt2": {},
    "gpt_neox": {"use_parallel_residual": True},
    "gpt_neox whole heads": {"use_parallel_residual": True},
    "gpt_neox in turn": {"use_parallel_residual": False},
    "lfm2": {"shortconv.l_cache": 3},
    "bert": {"attention.causal": False, "pooling_type": 1},
}
# What llama.cpp's own rules for a family do not allow at this size.
NOT_IN_LLAMA_CPP = {
    "phi4 mini": "it reads the factors of LongRoPE for this family always",
    "bert": "it gives embeddings, see below",
}


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = [*support.byte_alphabet(), *support.SPECIAL, *support.MERGED]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * len(support.SPECIAL) + [1] * len(support.MERGED))
    writer.add_token_merges([" ".join(pair) for pair in support.MERGED])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_chat_template(support.CHATML)


WORDS = 1500


def words_of_a_gguf() -> str:
    """A tokenizer.json of BERT's kind whose words do not hold the mark of GGUF."""
    document = json.loads(word_piece())
    vocabulary = document["model"]["vocab"]
    words = {id_: word for word, id_ in vocabulary.items() if "▁" not in word}
    document["model"]["vocab"] = {words.get(i, f"[unused{i}]"): i for i in range(WORDS)}
    return json.dumps(document)


def add_word_pieces(writer: gguf.GGUFWriter) -> None:
    """As llama.cpp's converter does: what begins a word is marked, not what goes on."""
    vocabulary = json.loads(words_of_a_gguf())["model"]["vocab"]
    words = sorted(vocabulary, key=lambda word: vocabulary[word])
    special = [word.startswith("[") and word.endswith("]") and len(word) > 2 for word in words]
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(
        [
            word if kept else word[2:] if word.startswith("##") else f"▁{word}"
            for word, kept in zip(words, special, strict=True)
        ]
    )
    writer.add_token_types([3 if kept else 1 for kept in special])
    writer.add_token_type_count(2)
    for add, token in (
        (writer.add_unk_token_id, "[UNK]"),
        (writer.add_bos_token_id, "[CLS]"),
        (writer.add_sep_token_id, "[SEP]"),
    ):
        add(vocabulary[token])


def write(
    path: Path,
    name: str,
    checkpoint: Checkpoint,
    tokenizer: Callable[[gguf.GGUFWriter], None] = add_tokenizer,
) -> Path:
    """The checkpoint as a GGUF in F32."""
    config = checkpoint.config
    architecture = architectures.by_name(config.architecture)
    writer = gguf.GGUFWriter(str(path), architecture.gguf_types[0])
    writer.add_name("tiny")
    add_metadata(writer, architecture.gguf_types[0], keys_of(config) | KEYS[name])
    tokenizer(writer)
    shapes = {n: tuple(p.shape) for n, p in load_reference(checkpoint, 8).named_parameters()}
    state = {parameter: floats(checkpoint.weight(parameter)) for parameter in shapes}
    for stored, array in architecture.gguf.write(config, state).items():
        writer.add_tensor(stored, array.astype(np.float32))
    rotary = config.rotaries[0] if config.rotaries else None
    if name == "llama 3":
        assert rotary is not None
        writer.add_tensor("rope_freqs.weight", np.array(rotary.divisors, np.float32))
    if name == "phi3":
        assert rotary is not None
        writer.add_tensor("rope_factors_short.weight", np.array(rotary.divisors, np.float32))
        writer.add_tensor("rope_factors_long.weight", np.array(rotary.long_divisors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def keys_of(c: ModelConfig) -> dict[str, Any]:
    keys = metadata(c)
    rotary = c.rotaries[0] if c.rotaries else None
    if rotary is not None and rotary.divisors is not None and "alpha" in (rotary.declared or ""):
        # llama.cpp's converter stretches the base.
        keys["rope.freq_base"] *= rotary.divisors[-1] ** (rotary.dim / (rotary.dim - 2))
    return keys


def logits(checkpoint: Checkpoint) -> np.ndarray:
    model = load_reference(checkpoint, 256)
    out, _ = model(torch.from_numpy(IDS)[None], model.empty_cache())
    array: np.ndarray = out[0].numpy()
    return array


@pytest.mark.parametrize("name", KEYS)
def test_a_gguf_is_the_model_that_it_was_made_from(name: str, tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path / "hf", ROWS[name])
    whole = open_checkpoint(folder)
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", name, whole))
    assert checkpoint.notes == []
    layers = zip(checkpoint.config.stored_layers, whole.config.stored_layers, strict=True)
    for ours, theirs in layers:
        assert ours.size == theirs.size
        assert isinstance(ours.mixer, ShortConv) == isinstance(theirs.mixer, ShortConv)
    error = np.abs(logits(checkpoint) - logits(whole)).max()
    assert error <= MAX_FOLDER_ERROR


@pytest.mark.parametrize("name", [name for name in KEYS if name not in NOT_IN_LLAMA_CPP])
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    folder, _ = write_folder(tmp_path / "hf", ROWS[name])
    path = write(tmp_path / "m.gguf", name, open_checkpoint(folder))
    f32 = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(
        str(path), n_ctx=128, logits_all=True, verbose=False, n_threads=1, type_k=f32, type_v=f32
    )
    model.eval(IDS.tolist())
    expected = model.scores[: len(IDS)]
    error = np.abs(logits(open_checkpoint(path)) - expected).max()
    assert error <= MAX_LLAMA_CPP_ERROR * np.abs(expected).max()


@pytest.mark.parametrize("caps", [(50.0, 30.0), (5.0, 3.0)])
def test_the_first_files_of_gemma_2_name_no_caps(
    caps: tuple[float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = write_folder(tmp_path / "hf", ROWS["gemma2"])
    named = dict(zip(("attn_logit_softcapping", "final_logit_softcapping"), caps, strict=True))
    monkeypatch.setitem(KEYS, "gemma2", named if caps[0] == 5 else {})
    config = open_checkpoint(write(tmp_path / "m.gguf", "gemma2", open_checkpoint(folder))).config
    assert (config.attentions[0].softcap, config.logit_softcap) == caps


def test_a_granite_without_positions_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = write_folder(tmp_path / "hf", ROWS["granite"])
    monkeypatch.setitem(KEYS, "granite", KEYS["granite"] | {"rope.scaling.finetuned": False})
    path = write(tmp_path / "m.gguf", "granite", open_checkpoint(folder))
    with pytest.raises(CheckpointError, match=r"rope\.scaling\.finetuned is false"):
        open_checkpoint(path)


TEXTS = ["The cat sat on the mat.", "A DOG", "and then [SEP] it rained, all day long"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An encoder with words of its own: a folder, and the same as a GGUF."""
    root = tmp_path_factory.mktemp("bert")
    row = ROWS["bert"]
    pooling = Pooling("mean", normalize=True)
    row = replace(row, fields=row.fields | {"vocab_size": WORDS}, pooling=pooling)
    folder, _ = write_folder(root / "hf", row)
    (folder / "tokenizer.json").write_text(words_of_a_gguf())
    (folder / "tokenizer_config.json").write_text("{}")
    path = write(root / "m.gguf", "bert", open_checkpoint(folder), add_word_pieces)
    return folder, path


def embeddings(source: Path, out: Path) -> np.ndarray:
    floats_ = Recipe(weights="float", head="float", targets=("native",))
    export_bundle(open_checkpoint(source), out, floats_)
    return Model.load(out, threads=1).embed(TEXTS)


@pytest.mark.parametrize("fixture", ["encoder", "unigram"])
def test_an_encoder_of_a_gguf_embeds_as_its_folder(
    fixture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder, path = request.getfixturevalue(fixture)
    expected = embeddings(folder, tmp_path / "folder")
    assert np.abs(embeddings(path, tmp_path / "gguf") - expected).max() <= MAX_FOLDER_ERROR


def test_llama_cpp_gives_the_same_embeddings(encoder: tuple[Path, Path], tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = llama_cpp.Llama(str(encoder[1]), embedding=True, n_ctx=128, verbose=False, n_threads=1)
    expected = np.array([model.embed(text, normalize=True) for text in TEXTS])
    ours = embeddings(encoder[1], tmp_path / "bundle")
    # Its GELU is the approximation by tanh, from a table of halves.
    assert (ours * expected).sum(1).min() >= 0.9999


def test_a_way_of_pooling_that_is_not_known_is_refused(tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path / "hf", ROWS["bert"])
    keys = KEYS["bert"]
    KEYS["bert"] = keys | {"pooling_type": 4}
    try:
        path = write(tmp_path / "m.gguf", "bert", open_checkpoint(folder))
    finally:
        KEYS["bert"] = keys
    with pytest.raises(CheckpointError, match=r"pooling_type is 4, expected 1 \(mean\)"):
        open_checkpoint(path)


def test_the_table_names_llama_3_as_its_row_does() -> None:
    declared = ROWS["llama 3"].fields["rope_parameters"]
    assert declared == LLAMA3_ROPE | {"rope_theta": 500000.0}


# A Unigram, as llama.cpp converts that of XLM-RoBERTa.

ROW_COUNT = 300
PIECES = [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    "▁",
    *"abcdefghijklmnopqrstuvwxyzAD.,[]EP",
    "▁the",
    "▁cat",
]
PIECES += ["▁sat", "at", "on", "ing", "▁rain", "é", "<mask>"]
SCORES = [0.0] * 4 + [-1.0 - 0.1 * at for at in range(len(PIECES) - 4)]
TYPES = [CONTROL, CONTROL, CONTROL, UNKNOWN, *[NORMAL] * (len(PIECES) - 5), CONTROL]
UNIGRAM_TEXTS = ["the cat  sat\ton the ﬁne mat.", "cafe\u0301 ☃☃ the", "  A <s> cat ", "①ａ"]


def unigram_metadata() -> dict[str, object]:
    spare = ROW_COUNT - len(PIECES)
    return {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": PIECES + [f"[PAD{at}]" for at in range(spare)],
        "tokenizer.ggml.scores": SCORES + [-10000.0] * spare,
        "tokenizer.ggml.token_type": TYPES + [UNUSED] * spare,
        "tokenizer.ggml.precompiled_charsmap": list(charsmap("nmt_nfkc")),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.remove_extra_whitespaces": True,
    }


def add_unigram(writer: gguf.GGUFWriter) -> None:
    data = unigram_metadata()
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(data["tokenizer.ggml.tokens"])
    writer.add_token_scores(data["tokenizer.ggml.scores"])
    writer.add_token_types(data["tokenizer.ggml.token_type"])
    writer.add_precompiled_charsmap(charsmap("nmt_nfkc"))
    writer.add_token_type_count(1)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)
    writer.add_pad_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(True)


@pytest.fixture(scope="module")
def unigram(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An encoder as a folder, and the same as a GGUF."""
    root = tmp_path_factory.mktemp("unigram")
    row = ROWS["bert"]
    fields = row.fields | {"vocab_size": ROW_COUNT}
    row = replace(row, fields=fields, pooling=Pooling("mean", normalize=True))
    folder, _ = write_folder(root / "hf", row)
    path = write(root / "m.gguf", "bert", open_checkpoint(folder), add_unigram)
    for name, content in open_checkpoint(path).tokenizer_files().items():
        (folder / name).write_bytes(content)
    return folder, path


def test_its_words_are_those_of_the_file() -> None:
    tokenizer = load_tokenizer_files(tokenizer_files_from_gguf(unigram_metadata()), "python")
    ids = tokenizer.encode("the cat  sat\tﬁé ☃☃", add_special_tokens=True)
    assert [PIECES[id_] for id_ in ids] == [
        *("<s>", "▁the", "▁cat", "▁sat", "▁", "f", "i", "é", "▁", "<unk>", "</s>")
    ]
    assert tokenizer.encode("[PAD0]") != [len(PIECES)]  # a row that only fills up is no piece


def test_llama_cpp_reads_the_same_tokens(unigram: tuple[Path, Path]) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    theirs = llama_cpp.Llama(str(unigram[1]), vocab_only=True, verbose=False)
    ours = load_tokenizer_files(open_checkpoint(unigram[1]).tokenizer_files(), "python")
    for text in UNIGRAM_TEXTS:
        expected = theirs.tokenize(text.encode(), add_bos=True, special=False)
        assert ours.encode(text, add_special_tokens=True) == expected, text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unknown_token_id": 290}, "unknown_token_id names no token"),
        ({"unknown_token_id": None}, "unknown_token_id names no token"),
        ({"scores": [0.0]}, "scores has 1 entries"),
        ({"add_space_prefix": False}, "add_space_prefix is false with remove_extra_whitespaces"),
        ({"precompiled_charsmap": "text"}, "precompiled_charsmap is not such a list"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    changed = unigram_metadata() | {
        f"tokenizer.ggml.{name}": value for name, value in change.items()
    }
    with pytest.raises(TokenizerError, match=message):
        tokenizer_files_from_gguf({k: v for k, v in changed.items() if v is not None})
