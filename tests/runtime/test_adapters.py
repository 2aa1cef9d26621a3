"""Adapters beside a base's weights: the numbers of merged ones, and nothing left without them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_support import TARGETS, factors, write_adapter
from safetensors.torch import save_file

import support
from pocketslm.cli import main
from pocketslm.errors import BackendError, BundleError, ExportError, UsageError
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.prune.depth import Shared
from pocketslm.export.recipe import Recipe
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.models.updated import WithAdapter
from pocketslm.runtime.adapters import Update, read_updates
from pocketslm.runtime.backends import Part, Wanted
from pocketslm.runtime.backends.native import NativeModel, NativeSession
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model

# Of the logits' standard deviation: the base's products are rounded to int8 activations, the
# adapter's are not; merged, both are.
MAX_MERGED_ERROR = {"float": 1e-3, "int8": 0.05}
IDS = np.random.default_rng(5).integers(0, support.TINY.vocab_size, 140)
ALL = (*TARGETS, "k_proj", "o_proj", "gate_proj", "up_proj")
NATIVE = ("native",)


def logits(session: Any) -> np.ndarray[Any, Any]:
    """A prompt of several tiles, then tokens one by one."""
    session.truncate(0)
    pieces = [IDS[:130], *IDS[130:, None]]
    return np.concatenate([session.forward(piece, all_logits=True) for piece in pieces])


def error(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> float:
    return float(np.sqrt(np.mean((ours - theirs) ** 2)) / theirs.std())


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(root / "polite", factors(targets=ALL)),
        write_adapter(root / "terse", factors(seed=2), use_rslora=True),
    ]


@pytest.fixture(scope="module")
def carried(tiny_hf: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("carried") / "bundle"
    recipe = Recipe(weights="int8", head="int8", targets=("native", "onnx"))
    export_bundle(open_checkpoint(tiny_hf), out, recipe, adapters=adapters)
    return out


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("weights", ["float", "int8"])
def test_carried_equals_merged_and_leaves_nothing_behind(
    weights: str, threads: int, tiny_hf: Path, adapters: list[Path], tmp_path: Path
) -> None:
    recipe = Recipe(weights=weights, head="float", targets=NATIVE)  # type: ignore[arg-type]
    base = open_checkpoint(tiny_hf)
    plain = export_bundle(base, tmp_path / "plain", recipe)
    both = export_bundle(base, tmp_path / "both", recipe, adapters=adapters)
    assert both.files["model.slm"] == plain.files["model.slm"]
    model = Model.load(tmp_path / "both", threads=threads)
    session = model.engine.session
    before = logits(session)
    for adapter in adapters:
        export_bundle(WithAdapter(base, adapter), tmp_path / adapter.name, recipe)
        merged = logits(Model.load(tmp_path / adapter.name, threads=threads).engine.session)
        model.use_adapter(adapter.name)
        assert session.length == 0
        assert error(logits(session), merged) < MAX_MERGED_ERROR[weights]
        assert error(before, merged) > 0.3
    model.use_adapter(None)
    np.testing.assert_array_equal(logits(session), before)


def test_both_runs_of_a_shared_layer_are_updated(tmp_path: Path) -> None:
    four = support.tiny(num_hidden_layers=4)
    base = Shared(open_checkpoint(support.write_hf(tmp_path / "hf", four)))
    adapter = write_adapter(tmp_path / "polite", factors(base.config))
    recipe = Recipe(weights="float", head="float", targets=NATIVE)
    export_bundle(base, tmp_path / "carried", recipe, adapters=[adapter])
    export_bundle(WithAdapter(base, adapter), tmp_path / "merged", recipe)
    ours = Model.load(tmp_path / "carried", adapter="polite").engine.session
    theirs = Model.load(tmp_path / "merged").engine.session
    assert error(logits(ours), logits(theirs)) < MAX_MERGED_ERROR["float"]


def test_what_no_run_could_load_is_refused_at_export(tmp_path: Path) -> None:
    untied = support.tiny(tie_word_embeddings=False)
    base = open_checkpoint(support.write_hf(tmp_path / "hf", untied))
    adapter = write_adapter(tmp_path / "loud", factors(untied, targets=("lm_head",)))
    recipe = Recipe(weights="float", head="float", targets=NATIVE)
    with pytest.raises(ExportError, match=r"is not a factor of a layer's matrix; merge it"):
        export_bundle(base, tmp_path / "carried", recipe, adapters=[adapter])
    export_bundle(WithAdapter(base, adapter), tmp_path / "merged", recipe)


def test_the_command_line_chooses(carried: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(*options: str) -> str:
        assert main(["run", str(carried), "Hello", "-n", "12", "--json", *options]) == 0
        return capsys.readouterr().out.split('"decode_tps"')[0].split('"ttft_ms"')[0]

    assert len({answer(), answer("--adapter", "polite"), answer("--adapter", "terse")}) == 3


def test_a_changed_adapter_reads_the_prompt_again(carried: Path) -> None:
    model = Model.load(carried, "native")
    config = GenerationConfig(max_new_tokens=8)

    def tokens() -> list[int]:
        return [record.token for record in model.generate("Hello there", config)]

    plain = tokens()
    model.use_adapter("polite")
    polite = tokens()
    assert polite == [
        record.token
        for record in Model.load(carried, "native", adapter="polite").generate(
            "Hello there", config
        )
    ]
    model.use_adapter(None)
    assert tokens() == plain != polite


def generated(model: Model, number: int, name: str | None) -> list[int]:
    """An answer of its own length to a prompt that shares its beginning with others."""
    prompt = [*range(40), number % 4, *range(number % 7)]
    config = GenerationConfig(
        max_new_tokens=6 + number % 5, ignore_eos=True, adapter=name, logprobs=number % 2 > 0
    )
    return [record.token for record in model.generate(prompt, config)]


@pytest.mark.parametrize("threads", [1, 2])
def test_each_answer_may_take_another_at_once(carried: Path, threads: int) -> None:
    """With more answers than slots, so that slots change hands; each is the one alone."""
    names = ("", "polite", "terse", "polite", None)
    cases = [(number, names[number % len(names)]) for number in range(20)]
    alone = {name: Model.load(carried, "native", adapter=name or None) for name in set(names)}
    expected = [generated(alone[name], number, None) for number, name in cases]
    assert expected[0] != expected[4] or expected[1] != expected[2]
    several = Model.load(carried, "native", threads=threads, parallel=3)
    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(lambda case: generated(several, *case), cases)) == expected
    one = Model.load(carried, "native", threads=threads)
    assert [generated(one, *case) for case in cases] == expected
    # What the model takes otherwise is another thing.
    one.use_adapter("terse")
    assert generated(one, 1, None) == generated(alone["terse"], 1, None)
    assert generated(one, 1, "") == generated(alone[""], 1, None)
    np.testing.assert_array_equal(
        one.logprobs(IDS[:30].tolist(), [1, 2]), alone["terse"].logprobs(IDS[:30].tolist(), [1, 2])
    )


def test_slots_take_adapters_of_different_shapes(carried: Path) -> None:
    """Ranks and matrices differ; each slot's logits are the bits that it gets alone."""
    model = NativeModel(carried / "model.slm")
    rng = np.random.default_rng(3)

    def update(part: str, rank: int, rows: int, columns: int) -> Update:
        a, b = rng.standard_normal((rank, columns)), rng.standard_normal((rows, rank))
        return Update(1, part, a.astype(np.float32) / 8, b.astype(np.float32) / 8)

    sets = [
        [update("q_proj", 3, 64, 64), update("down_proj", 20, 64, 96)],
        [update("up_proj", 17, 96, 64), update("gate_proj", 1, 96, 64)],
        [update("v_proj", 40, 32, 64), update("o_proj", 2, 64, 64)],
    ]
    together = model.session(threads=2, slots=4)
    singles = [model.session(threads=1) for _ in range(4)]
    for number, updates in enumerate(sets, 1):
        together.set_adapter(number, updates)
        together.slots[number].use_adapter(number)
        singles[number].set_adapter(7, updates)
        singles[number].use_adapter(7)
    seen = []
    for size in (1, 30, 1, 5):
        ids = IDS[:size]
        found = together.forward_slots([Part(slot, ids, Wanted.LOGITS) for slot in range(4)])
        for single, one in zip(singles, found, strict=True):
            np.testing.assert_array_equal(one.logits, single.forward(ids)[0])
        seen.append([one.logits for one in found])
    for one in seen[-1][1:]:
        assert error(one, seen[-1][0]) > 0.01
    # Another meaning of a number empties who uses it, and nobody else.
    together.set_adapter(2, [])
    assert [slot.length > 0 for slot in together.slots] == [True, True, False, True]
    np.testing.assert_array_equal(together.slots[2].forward(ids), model.session().forward(ids))
    for number in (2, 5, 64, 65, 2**32 - 1):
        with pytest.raises(UsageError, match=f"adapter {number} is empty"):
            together.use_adapter(number)
    for number in (0, 65):
        with pytest.raises(UsageError, match=f"adapter {number}, expected 1 to 64"):
            together.set_adapter(number, [])


def test_what_cannot_be_is_an_error(
    carried: Path, tiny_hf: Path, adapters: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="no adapter 'rude', it has: polite, terse"):
        Model.load(carried, adapter="rude")
    with pytest.raises(BackendError, match="onnxruntime.*cannot add adapters"):
        Model.load(carried, "onnx", adapter="polite")
    for backend, name in (("onnx", "polite"), ("runner", "polite"), ("native", "rude")):
        with pytest.raises((BackendError, BundleError), match="adapter"):
            Model.load(carried, backend).reply("Hello", adapter=name)
    base = open_checkpoint(tiny_hf)
    for recipe, message in (
        (Recipe(targets=("onnx",)), "needs the native target"),
        (Recipe(targets=NATIVE, removed_layers="0"), "pruning and awq change"),
    ):
        with pytest.raises(ExportError, match=message):
            export_bundle(base, tmp_path / "out", recipe, adapters=adapters[:1])
    session = NativeSession(NativeModel(carried / "model.slm"))
    before = logits(session)
    a, b = np.ones((2, 64), np.float32), np.ones((64, 2), np.float32)
    for updates, message in (
        ([Update(2, "q_proj", a, b)], "update of layer 2, the model has 2"),
        ([Update(0, "lm_head", a, b)], "update of role 0"),
        ([Update(0, "up_proj", a, b)], "is for 64 x 64, the matrix is 96 x 64"),
        ([Update(0, "q_proj", a, b)] * 2, "there twice"),
        ([Update(0, "q_proj", a[:0], b[:, :0])], "rank 0"),
    ):
        with pytest.raises(UsageError, match=message):
            session.set_adapter(1, updates)
    np.testing.assert_array_equal(logits(session), before)


def test_damaged_files_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "adapter-x.safetensors"
    good = factors()
    save_file(good, path)
    assert len(read_updates(path, runs=2)) == len(good)
    whole = path.read_bytes()
    for content in (
        whole[: len(whole) // 2],
        whole[:100],
        b"\xff" * 64,
        b"",
        whole[:8] + b"[" * 999,
    ):
        path.write_bytes(content)
        with pytest.raises(BundleError, match="cannot read"):
            read_updates(path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for tensors, message in (
        ({"x": good[name]}, "is not a factor"),
        ({name: good[name]}, "do not fit together"),
        (good | {name: good[name][:2].clone()}, "do not fit together"),
        ({name: good[name].half()}, "is not float32"),
        *(
            (good | {name: good[name].clone().fill_(value)}, "not within")
            for value in (float("nan"), float("inf"), -float("inf"), 1e38)
        ),
    ):
        save_file(tensors, path)
        with pytest.raises(BundleError, match=message):
            read_updates(path)
    save_file(good, path)
    content = path.read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")].rstrip()
    twice = header[:-1] + b',"x":{},"x":{}}'
    path.write_bytes(len(twice).to_bytes(8, "little") + twice + content[8 + len(header) :])
    with pytest.raises(BundleError, match="'x' stands twice"):
        read_updates(path)
