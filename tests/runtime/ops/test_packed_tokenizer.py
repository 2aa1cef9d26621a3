"""A `Tokenizer` over what export packed is the `Tokenizer` over all of tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path

import native_support
import pytest

from pocketslm.errors import TokenizerError
from pocketslm.export.lower.native_tokenizer import pack_tokenizer
from pocketslm.runtime.backends.native_tokenizer import NativeTokenizer
from pocketslm.runtime.model import Model
from pocketslm.runtime.tokenizer import Tokenizer, load_tokenizer
from tokenizer_support import document, hard_texts, word_piece

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STYLES = [
    *("smollm", "llama3", "qwen2", "gpt4o", "llama2", "gemma", "metaspace-first"),
    *("xlm-r", "xlm-r-nfkc", "deberta", "t5"),
]


def written(folder: Path, text: str, config: dict[str, object] | None = None) -> NativeTokenizer:
    """The files of a bundle, and its native tokenizer."""
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer_config.json").write_text(json.dumps(config or {}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    packed, reason = pack_tokenizer(text)
    assert packed is not None, reason
    return NativeTokenizer(native_support.model_with_tokenizer(folder, packed))


def model_first(text: str) -> str:
    fields = json.loads(text)
    return json.dumps({"model": fields.pop("model"), **fields})


@pytest.fixture(params=STYLES)
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Tokenizer, Tokenizer]:
    packed = written(tmp_path, document(request.param), {"bos_token": "<s>"})
    return load_tokenizer(tmp_path, packed=packed), load_tokenizer(tmp_path, "python")


def test_ids_and_texts_are_equal(both: tuple[Tokenizer, Tokenizer]) -> None:
    packed, python = both
    assert packed.name == "native"
    for text in hard_texts(100):
        for special in (False, True):
            ids = python.encode(text, parse_special=special, add_special_tokens=special)
            assert packed.encode(text, parse_special=special, add_special_tokens=special) == ids
            assert packed.decode(ids) == python.decode(ids)
            assert packed.decode(ids, False) == python.decode(ids, False)
        chat = [{"role": "user", "content": text}, {"role": "assistant", "content": " " + text}]
        ids = python.apply_chat_template(chat)
        assert packed.apply_chat_template(chat) == ids
        assert packed.render_chat(chat) == python.render_chat(chat)


def test_every_token_is_equal(both: tuple[Tokenizer, Tokenizer]) -> None:
    packed, python = both
    assert packed.vocab_size == python.vocab_size
    assert packed.special_ids == python.special_ids
    assert packed.identity == python.identity
    assert packed.turn_end() == python.turn_end()
    for id_ in range(python.vocab_size + 3):
        for first in (False, True):
            assert packed.token_bytes(id_, first=first) == python.token_bytes(id_, first=first)
        assert packed.text_of(id_) == python.text_of(id_)
    assert packed.texts == python.texts
    for text in ("<s>", "<tool_call>", "e", "no such token"):
        assert packed.token_id(text) == python.token_id(text)


@pytest.mark.parametrize("style", ["gemma", "xlm-r"])
def test_the_words_are_read_when_they_are_asked_for(style: str, tmp_path: Path) -> None:
    whole = document(style)
    packed = written(tmp_path, whole)
    at = whole.index('"vocab"')
    (tmp_path / "tokenizer.json").write_text(whole[:at] + "cut")
    tokenizer = load_tokenizer(tmp_path, packed=packed)
    ids = tokenizer.encode("The quick brown fox")
    assert tokenizer.decode(ids) == "The quick brown fox"
    assert tokenizer.token_id("<tool_call>") is not None
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not valid JSON"):
        tokenizer.texts  # noqa: B018 - reading is what is tested


@pytest.mark.parametrize(
    ("text", "config"),
    [
        (model_first(document("llama3")), {}),
        (document("llama3"), {"additional_special_tokens": ["<new>"]}),
        (word_piece(), {}),  # its first token has no space before it
    ],
    ids=["model first", "more tokens", "word pieces"],
)
def test_other_files_are_read_whole(text: str, config: dict[str, object], tmp_path: Path) -> None:
    packed = written(tmp_path, text, config)
    assert load_tokenizer(tmp_path, "python", packed).name == "python"


def test_a_model_uses_what_its_file_holds(smollm2_bundle: Path) -> None:
    with Model.load(smollm2_bundle) as packed, Model.load(smollm2_bundle, "onnx") as other:
        assert (packed.tokenizer.name, other.tokenizer.name) == ("native", "tokenizers")
        for text in hard_texts(100):
            assert packed.tokenizer.encode(text) == other.tokenizer.encode(text)
        size = packed.tokenizer.vocab_size
        assert size == other.tokenizer.vocab_size
        for id_ in range(size):
            assert packed.tokenizer.token_bytes(id_) == other.tokenizer.token_bytes(id_)
