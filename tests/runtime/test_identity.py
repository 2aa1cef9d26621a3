"""Who a model is, by whichever of its files says it, held against transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from pocketslm.errors import TokenizerError
from pocketslm.runtime.tokenizer import load_tokenizer, load_tokenizer_files
from pocketslm.runtime.tokenizer.identity import Identity, read_identity
from tokenizer_support import AWKWARD, CONFIG, IMPLEMENTATIONS, ORDINARY_ADDED, SPECIAL, document

SEED = 17
CONTENTS = [*SPECIAL, *ORDINARY_ADDED, "<|new|>", "<x>", "the", "Ġthe"]
TURN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"


@pytest.mark.parametrize(
    ("generation", "model", "named", "expected"),
    [
        ({}, {}, {}, Identity()),
        ({"eos_token_id": 3}, {"eos_token_id": 4}, {"eos_token": 5}, Identity(None, (3,))),
        ({"eos_token_id": None}, {"eos_token_id": [4, 2]}, {}, Identity(None, (4, 2))),
        ({"eos_token_id": []}, {"eos_token_id": None}, {"eos_token": 5}, Identity(None, (5,))),
        ({"eos_token_id": [7, 1, 7]}, {}, {}, Identity(None, (7, 1))),
        ({}, {"text_config": {"eos_token_id": 8}}, {}, Identity(None, (8,))),
        ({"pad_token_id": -1}, {"pad_token_id": 6}, {"bos_token": 1}, Identity(1, (), 6)),
        ({"bos_token_id": 0}, {"bos_token_id": 1}, {"bos_token": 2}, Identity(0)),
    ],
)
def test_the_first_file_that_names_an_id_counts(
    generation: dict[str, Any], model: dict[str, Any], named: dict[str, int], expected: Identity
) -> None:
    assert read_identity(generation, model, named) == expected


@pytest.mark.parametrize("wrong", ["2", 1.5, True, [1, "2"], [[1]], {"id": 2}, -1, [-1]])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_ids_that_are_none_are_errors(name: str, wrong: object) -> None:
    files = {"tokenizer.json": document("llama3"), name: json.dumps({"eos_token_id": wrong})}
    with pytest.raises(TokenizerError, match=rf"^{name}: eos_token_id is .*; expected") as caught:
        load_tokenizer_files(files, "python")
    assert "\n" not in str(caught.value)


def random_token(rng: random.Random, content: str) -> dict[str, Any]:
    chances = {"lstrip": 0.3, "rstrip": 0.3, "single_word": 0.15, "normalized": 0.2, "special": 0.7}
    return {"content": content, **{name: rng.random() < p for name, p in chances.items()}}


def random_folder(rng: random.Random, folder: Path) -> None:
    """Tokenizer files that disagree about their special tokens."""
    whole = json.loads(document(rng.choice(["llama3", "smollm", "qwen2"])))
    for token in whole["added_tokens"]:
        if rng.random() < 0.3:
            token.update(random_token(rng, token["content"]))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    special_map = {}
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        content = rng.choice(CONTENTS)
        described = {"__type": "AddedToken", **random_token(rng, content)}
        if rng.random() < 0.5:
            config[role] = rng.choice([content, described])
        content = rng.choice(CONTENTS)
        described = random_token(rng, content)
        del described["special"]
        if rng.random() < 0.5 and role != "unk_token":
            special_map[role] = rng.choice([content, described])
    if rng.random() < 0.5:
        contents = rng.sample(CONTENTS, rng.randint(0, 5))
        config["added_tokens_decoder"] = {
            str(rng.choice([at, at * 7 + 3])): random_token(rng, content)
            for at, content in enumerate(contents)
        }
    if rng.random() < 0.3:
        lists = ("extra_special_tokens", "additional_special_tokens")
        config[rng.choice(lists)] = rng.sample(CONTENTS, 2)
    (folder / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if rng.random() < 0.5:
        (folder / "special_tokens_map.json").write_text(json.dumps(special_map), encoding="utf-8")


def test_files_that_disagree_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    import transformers

    rng = random.Random(SEED)
    pieces = [*CONTENTS, *AWKWARD[:20], " ", "a", "b", "the quick "]
    changed = 0
    for number in range(60):
        folder = tmp_path / str(number)
        folder.mkdir()
        random_folder(rng, folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        alone = load_tokenizer_files({"tokenizer.json": (folder / "tokenizer.json").read_bytes()})
        texts = ["".join(rng.choices(pieces, k=8)) for _ in range(12)]
        expected = [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]
        for implementation in IMPLEMENTATIONS:
            ours = load_tokenizer(folder, implementation)  # type: ignore[arg-type]
            assert [ours.encode(text, parse_special=True) for text in texts] == expected
            assert next(iter(ours.identity.eos), None) == theirs.eos_token_id
            assert ours.identity.bos == theirs.bos_token_id
            assert ours.identity.pad == theirs.pad_token_id
        changed += [alone.encode(text, parse_special=True) for text in texts] != expected
    assert changed > 20  # the other files matter, so the comparison can fail


def test_an_unchanged_tokenizer_json_goes_to_the_wheel_as_it_is() -> None:
    config = CONFIG | {
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in json.loads(document("llama3"))["added_tokens"]
        }
    }
    files = {"tokenizer.json": document("llama3"), "tokenizer_config.json": json.dumps(config)}
    tokenizer = load_tokenizer_files(files)
    assert tokenizer.identity == Identity(1, (2,))
    assert tokenizer.encode("a<|im_end|>b", parse_special=True)[1] == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"added_tokens_decoder": []}, None),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder is '.1.'; expected an object"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "key is 'x'; expected an id"),
        ({"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}, "expected an id"),
        ({"added_tokens_decoder": {"1": None}}, "entry 1 is 'None'; expected a token"),
        ({"added_tokens_decoder": {"1": {"content": 3}}}, "expected a token with its content"),
        (
            {"added_tokens_decoder": {"1": {"content": "a", "rstrip": "no"}}},
            "rstrip of a token is 'no'; expected true or false",
        ),
        ({"eos_token": 3}, "a special token is '3'; expected a text or a token"),
        ({"eos_token": {"content": []}}, "expected a text or a token"),
        ({"extra_special_tokens": [None, 5]}, "expected a text or a token"),
        ({"extra_special_tokens": "x"}, None),
        ({"bos_token": None, "model_max_length": 1e30}, None),
    ],
)
def test_malformed_special_tokens_are_errors(config: dict[str, Any], message: str | None) -> None:
    files = {"tokenizer.json": document("llama3"), "tokenizer_config.json": json.dumps(config)}
    if message is None:
        assert load_tokenizer_files(files, "python").encode("a")
        return
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer_files(files, "python")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("template", "token"),
    [
        (TURN + "<|im_end|>\n{% endfor %}", "<|im_end|>"),
        (TURN + "{{ eos_token }}{% endfor %}", "</s>"),
        (TURN + " \n</s> and more{% endfor %}", "</s>"),
        (TURN + "<tool_call>{% endfor %}", "<tool_call>"),  # added, though not special
        (TURN + "{% endfor %}", None),
        (TURN + " end</s>{% endfor %}", None),
        ("{{ messages | length }}</s>", None),
        ("{{ raise_exception('no answers') }}", None),
        # What stands between two messages does not always close the last one.
        (TURN + "{{ '</s>' if loop.last else '<|im_end|>' }}{% endfor %}", "</s>"),
        (TURN + "<|im_end|>{% endfor %}<|assistant|>", "<|im_end|>"),
    ],
)
def test_the_token_that_closes_the_assistants_turn(template: str, token: str | None) -> None:
    files = {
        "tokenizer.json": document("llama3"),
        "tokenizer_config.json": json.dumps(CONFIG),
        "chat_template.jinja": template,
    }
    tokenizer = load_tokenizer_files(files, "python")
    assert tokenizer.turn_end() == (None if token is None else tokenizer.token_id(token))
    assert load_tokenizer_files({"tokenizer.json": document("llama3")}).turn_end() is None
