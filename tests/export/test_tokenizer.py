"""Checkpoints whose files disagree about tokens, and the bundles that are made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import support
from pocketslm.cli import main
from pocketslm.errors import TokenizerError, UsageError
from pocketslm.export.lower.genai import genai_config
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.prune.vocabulary import TrimmedVocabulary, tokens_of
from pocketslm.export.recipe import Recipe
from pocketslm.export.tokenizer import settled
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.models.hf_writer import save_hf
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model
from pocketslm.runtime.tokenizer import load_tokenizer
from tokenizer_support import document

ROWS = support.TINY.vocab_size
START, END, TEXT_END, PAD = range(256, 260)
Edit = Callable[[dict[str, Any]], None]


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def edit(folder: Path, name: str, change: Edit) -> None:
    value = json.loads((folder / name).read_text())
    change(value)
    write(folder, name, value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return support.write_hf(tmp_path / "source")


def files_of(folder: Path) -> tuple[dict[str, bytes], list[str]]:
    checkpoint = open_checkpoint(folder)
    return settled(checkpoint.tokenizer_files(), checkpoint.config.vocab_size)


def generation_of(files: dict[str, bytes]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(files["generation_config.json"])
    return found


def test_files_that_agree_stay_as_they_are(folder: Path) -> None:
    files, notes = files_of(folder)
    assert notes == []
    assert files == {name: text.encode() for name, text in support.tokenizer_files().items()}


def test_ids_of_config_json_stand_in(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    edit(folder, "tokenizer_config.json", lambda config: config.pop("eos_token"))
    edit(folder, "config.json", lambda config: config.update(eos_token_id=[END, TEXT_END]))
    files, notes = files_of(folder)
    assert generation_of(files) == {"eos_token_id": [END, TEXT_END], "bos_token_id": START}
    assert notes == []
    assert "config.json" not in files


def test_null_ids_are_none(folder: Path) -> None:
    write(folder, "generation_config.json", {"eos_token_id": None, "bos_token_id": None})
    edit(folder, "config.json", lambda config: config.update(eos_token_id=None, bos_token_id=None))
    files, _ = files_of(folder)
    assert generation_of(files) == {"eos_token_id": END, "bos_token_id": START}


def test_names_of_special_tokens_map_are_read(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    write(folder, "tokenizer_config.json", {"chat_template": "{{ bos_token }}{{ eos_token }}"})
    edit(folder, "config.json", lambda config: config.update(eos_token_id=None, bos_token_id=None))
    names = {"bos_token": support.SPECIAL[0], "eos_token": {"content": support.SPECIAL[1]}}
    write(folder, "special_tokens_map.json", names)
    files, _ = files_of(folder)
    assert generation_of(files) == {"eos_token_id": END, "bos_token_id": START}
    assert "special_tokens_map.json" not in files
    config = json.loads(files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"]) == support.SPECIAL[:2]


def test_what_closes_a_turn_ends_an_answer(folder: Path) -> None:
    write(folder, "generation_config.json", {"eos_token_id": TEXT_END})
    files, notes = files_of(folder)
    assert generation_of(files)["eos_token_id"] == [TEXT_END, END]
    (note,) = notes
    assert "also ends with '<|im_end|>'" in note


def test_without_any_end_there_is_a_note(folder: Path) -> None:
    write(folder, "generation_config.json", {})
    write(folder, "tokenizer_config.json", {})
    edit(folder, "config.json", lambda config: config.update(eos_token_id=None, bos_token_id=None))
    files, notes = files_of(folder)
    assert generation_of(files) == {}
    assert notes == ["no file says which token ends an answer; only a limit or a stop text does"]


def added(content: str, id_: int, **flags: bool) -> dict[str, Any]:
    names = ("special", "single_word", "lstrip", "rstrip", "normalized")
    return {"id": id_, "content": content, **dict.fromkeys(names, False), **flags}


def test_tokens_without_a_row_are_left_out_and_named(folder: Path, tmp_path: Path) -> None:
    extra = [added(f"<x{n}>", ROWS + n, special=n < 3) for n in range(7)]
    edit(folder, "tokenizer.json", lambda whole: whole["added_tokens"].extend(extra))
    edit(folder, "tokenizer_config.json", lambda config: config.update(pad_token="<x2>"))
    write(folder, "generation_config.json", {"eos_token_id": [END, ROWS + 9], "pad_token_id": ROWS})
    files, notes = files_of(folder)
    left_out = json.loads(support.tokenizer_files()["tokenizer.json"])
    assert json.loads(files["tokenizer.json"]) == left_out
    assert generation_of(files)["eos_token_id"] == END
    assert "pad_token_id" not in generation_of(files)
    assert "pad_token" not in json.loads(files["tokenizer_config.json"])
    assert f"'<x0>' ({ROWS}), '<x1>' ({ROWS + 1})" in notes[0]
    assert notes[0].endswith("and 2 more")
    assert str(ROWS + 9) in notes[1]

    manifest = export_bundle(open_checkpoint(folder), tmp_path / "b", Recipe(targets=("native",)))
    assert set(notes) <= set(manifest.notes)
    assert not any("pocketslm-run" in note for note in manifest.notes)
    text = tmp_path / "text.txt"
    text.write_text("the inner er")
    checkpoint = open_checkpoint(folder)
    trimmed = TrimmedVocabulary(checkpoint, tokens_of(checkpoint, text))
    assert generation_of(trimmed.tokenizer_files())["eos_token_id"] == END


def test_a_vocabulary_that_is_longer_than_the_model_is_cut(folder: Path) -> None:
    def longer(whole: dict[str, Any]) -> None:
        whole["model"]["vocab"] |= {"the": ROWS, "ther": ROWS + 1}
        whole["model"]["merges"] += [["th", "e"], ["the", "r"]]

    edit(folder, "tokenizer.json", longer)
    files, notes = files_of(folder)
    assert json.loads(files["tokenizer.json"]) == json.loads(
        support.tokenizer_files()["tokenizer.json"]
    )
    assert f"'the' ({ROWS})" in notes[0]


def test_a_list_of_pieces_that_is_longer_than_the_model_is_cut(folder: Path) -> None:
    whole = json.loads(document("xlm-r"))
    pieces = whole["model"]["vocab"]
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    files, notes = files_of(folder)
    assert json.loads(files["tokenizer.json"])["model"]["vocab"] == pieces[:ROWS]
    assert f"{pieces[ROWS][0]!r} ({ROWS})" in notes[0]


def test_a_text_cannot_begin_with_a_token_without_a_row(folder: Path) -> None:
    def begins(whole: dict[str, Any]) -> None:
        whole["added_tokens"].append(added("<x>", ROWS, special=True))
        whole["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<x>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [],
            "special_tokens": {"<x>": {"id": "<x>", "ids": [ROWS], "tokens": ["<x>"]}},
        }

    edit(folder, "tokenizer.json", begins)
    with pytest.raises(TokenizerError, match=f"no row for \\({ROWS} rows\\)"):
        files_of(folder)


def test_added_tokens_of_the_configuration_reach_tokenizer_json(folder: Path) -> None:
    decoder = {
        str(END): {k: v for k, v in added("<|im_end|>", 0, rstrip=True).items() if k != "id"}
    }
    edit(
        folder,
        "tokenizer_config.json",
        lambda config: config.update(added_tokens_decoder=decoder),
    )
    files, _ = files_of(folder)
    tokens = json.loads(files["tokenizer.json"])["added_tokens"]
    (end,) = (token for token in tokens if token["id"] == END)
    assert (end["rstrip"], end["special"]) == (True, True)  # special, as it is named
    assert "added_tokens_decoder" not in json.loads(files["tokenizer_config.json"])


@pytest.mark.parametrize("target", ["native", "onnx"])
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("generation_config.json", '{"eos_token_id": 2,}', "generation_config.json is not valid"),
        ("generation_config.json", "[]", "holds a JSON list"),
        ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id is '2'"),
        ("generation_config.json", '{"top_p": "much"}', "top_p is 'much'"),
        ("generation_config.json", '{"top_k": 1.5}', "top_k is 1.5"),
        ("generation_config.json", '{"temperature": 1e-320}', "temperature is"),
        ("special_tokens_map.json", "{", "special_tokens_map.json is not valid"),
        ("tokenizer_config.json", "\udcff", "tokenizer_config.json is not UTF-8"),
    ],
)
def test_broken_files_are_one_line_and_leave_nothing(
    folder: Path,
    name: str,
    text: str,
    message: str,
    target: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    out = folder.parent / "b"
    assert main(["export", str(folder), str(out), "--target", target]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert "Traceback" not in "".join(lines)
    assert [path.name for path in folder.parent.iterdir()] == ["source"]


def test_a_temperature_of_zero_is_greedy_unless_an_option_says_otherwise(
    folder: Path, tmp_path: Path
) -> None:
    greedy = {"eos_token_id": END, "do_sample": False, "temperature": 0.0}
    write(folder, "generation_config.json", greedy)
    export_bundle(open_checkpoint(folder), tmp_path / "b", Recipe(targets=("native",)))
    model = Model.load(tmp_path / "b", threads=1)
    assert model.defaults.temperature == 0
    assert [r.token for r in model.generate("a", model.defaults.but(max_new_tokens=4))]
    sampled = model.defaults.but(do_sample=True, temperature=0.7, max_new_tokens=4, seed=1)
    assert [r.token for r in model.generate("a", sampled)]
    with pytest.raises(UsageError):
        GenerationConfig(temperature=-1)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3"), ("something", "decoder")],
)
def test_genai_gets_the_ids_that_the_tokenizer_has(
    folder: Path, tmp_path: Path, architecture: str, kind: str
) -> None:
    from dataclasses import replace

    config = replace(support.TINY, architecture=architecture)
    write(folder, "generation_config.json", {"eos_token_id": [END, TEXT_END], "temperature": 0})
    write(folder, "tokenizer_config.json", {})
    (folder / "config.json").unlink()
    described = genai_config(config, 64, folder, load_tokenizer(folder).identity)
    model = described["model"]
    assert model["type"] == kind
    assert "bos_token_id" not in model
    assert model["eos_token_id"] == [END, TEXT_END]
    assert model["pad_token_id"] == END
    assert described["search"]["temperature"] == 1.0
    assert described["search"]["do_sample"] is False
    write(folder, "generation_config.json", {})
    described = genai_config(config, 64, folder, load_tokenizer(folder).identity)
    assert "eos_token_id" not in described["model"]


def test_a_folder_that_is_written_back_keeps_its_ids(folder: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").unlink()
    edit(folder, "config.json", lambda config: config.update(eos_token_id=[END, TEXT_END]))
    save_hf(open_checkpoint(folder), tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.identity == load_tokenizer(folder).identity
    assert again.identity.eos == (END, TEXT_END)


def test_a_stop_string_may_be_a_special_token(folder: Path, tmp_path: Path) -> None:
    """Special tokens are no text of an answer, and end it all the same where one is asked for."""
    export_bundle(open_checkpoint(folder), tmp_path / "b", Recipe(targets=("native",)))
    model = Model.load(tmp_path / "b", threads=1)
    endless = GenerationConfig(max_new_tokens=60, ignore_eos=True, do_sample=True, temperature=9.0)
    for seed in range(200):
        config = endless.but(seed=seed)
        tokens = [record.token for record in model.generate("the", config)]
        at = next((n for n, token in enumerate(tokens) if token == TEXT_END), None)
        if at:
            break
    assert at is not None
    special = support.SPECIAL[2]
    records = list(model.generate("the", config.but(stop_strings=(special,))))
    assert [record.token for record in records] == tokens[: at + 1]
    assert records[-1].finish == "stop"
    text = "".join(record.text for record in records)
    assert text == model.tokenizer.decode(tokens[:at])
    assert special not in text
    # Text around the token belongs to the stop string, and its text alone is not the token.
    follows = model.tokenizer.decode(tokens[at : at + 2], skip_special_tokens=False)
    records = list(model.generate("the", config.but(stop_strings=(follows,))))
    assert [record.token for record in records] == tokens[: at + 2]
    absent = GenerationConfig(max_new_tokens=len(tokens), stop_strings=(special + "\0\0",))
    records = list(model.generate("the", config.but(stop_strings=absent.stop_strings)))
    assert "".join(record.text for record in records) == model.tokenizer.decode(tokens)
