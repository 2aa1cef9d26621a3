"""Prefixes that are kept: a later process reads only the rest, and says the same; nothing that was
cut, changed or made by another model is taken up."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_support import write_adapter

import support
from pocketslm import folders
from pocketslm.cli import main
from pocketslm.errors import BackendError, UsageError
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.recipe import Recipe
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.runtime.assistant.answer import Answer
from pocketslm.runtime.assistant.assistant import Assistant
from pocketslm.runtime.assistant.document import Block, make_source
from pocketslm.runtime.assistant.library import Library
from pocketslm.runtime.backends.native import NativeSession
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model
from pocketslm.runtime.prefixes import SUFFIX, Identity, Prefixes, State

FLOATS = Recipe(weights="float", head="float", targets=("native",))
IDS = np.random.default_rng(5).integers(0, 256, 200).tolist()
CONFIG = GenerationConfig(max_new_tokens=8, ignore_eos=True, logprobs=True)
HALF = len(IDS) // 2

Read = list[int]  # how many tokens each call of a session took


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Read:
    """How many tokens each call read that was made of the library."""
    counts: Read = []
    begin, forward = NativeSession.begin, NativeSession.forward

    def begun(self: Any, maker: Any, ids: Any, how: Any) -> None:
        counts.append(len(ids) - self.length)
        begin(self, maker, ids, how)

    def run(self: Any, tokens: Any, **options: Any) -> Any:
        counts.append(len(tokens))
        return forward(self, tokens, **options)

    monkeypatch.setattr(NativeSession, "begin", begun)
    monkeypatch.setattr(NativeSession, "forward", run)
    return counts


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Bundles by what is special of them, each made once."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("prefixes")
            if kind == "window":
                mistral = support.tiny(architecture="mistral")
                source = support.write_hf(folder / "hf", mistral, sliding_window=32)
            else:
                source = support.write_hf(folder / "hf", seed=int(kind == "other"))
            adapters = [write_adapter(folder / "polite")] if kind == "adapter" else []
            recipe = replace(FLOATS, kv_cache="int8") if kind == "int8" else FLOATS
            export_bundle(open_checkpoint(source), folder / "bundle", recipe, adapters=adapters)
            made[kind] = folder / "bundle"
        return made[kind]

    return make


def load(path: Path, prefixes: Prefixes | Path | None = None, **options: Any) -> Model:
    return Model.load(path, "native", threads=1, prefixes=prefixes, verify=False, **options)


def answer(model: Model, ids: list[int] = IDS) -> list[tuple[int, float | None]]:
    return [(record.token, record.logprob) for record in model.generate(ids, CONFIG)]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


@pytest.mark.parametrize("kind", ["fp16", "int8", "window"])
def test_a_later_process_reads_only_the_rest(
    kind: str, bundle: Callable[[str], Path], tmp_path: Path, read: Read
) -> None:
    plain = load(bundle(kind))
    expected = answer(plain)
    answer(load(bundle(kind), tmp_path), IDS[:HALF])
    read.clear()
    assert answer(load(bundle(kind), tmp_path)) == expected
    assert read[0] == len(IDS) - HALF
    # Now all of it is there. A model that forgets cannot go back in it.
    other = [*IDS[:-40], 7, 8, 9]
    expected = answer(plain, other)
    read.clear()
    assert answer(load(bundle(kind), tmp_path), other) == expected
    assert read[0] == (len(other) - HALF if kind == "window" else 3)


def test_a_prefix_is_read_ahead(bundle: Callable[[str], Path], tmp_path: Path, read: Read) -> None:
    for store in (Prefixes(tmp_path / "folder", prompts=False), Prefixes()):
        model = load(bundle("fp16"), store)
        assert model.keep_prefix(IDS[:HALF], "begin")
        assert model.keep_prefix(IDS[:HALF], "begin")
        assert read == [HALF]
        answer(model, IDS[::-1])
        read.clear()
        assert answer(model) == answer(load(bundle("fp16")))
        assert read[0] == len(IDS) - HALF
        read.clear()
    assert len(files(tmp_path / "folder")) == 1
    Prefixes(tmp_path / "folder").forget("beg")
    assert len(files(tmp_path / "folder")) == 1
    Prefixes(tmp_path / "folder").forget("begin")
    assert files(tmp_path / "folder") == []


def change(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:20],
        lambda data: b"",
        lambda data: data + b"x",
        lambda data: change(data, len(data) - 1),
        lambda data: change(data, len(data) // 2),
        lambda data: change(data, data.index(b"\n") + 9),  # of the tokens
        lambda data: data.replace(b'"version": 1', b'"version": 9'),
        lambda data: data.replace(b'"tokens"', b'"tokenz"'),
        lambda data: data.replace(b'"crc32": ', b'"crc32":1'),
        lambda data: b"[" * 5000 + data,
        lambda data: b"[1]\n" + data,
    ],
)
def test_what_is_damaged_is_ignored_and_removed(
    damage: Callable[[bytes], bytes], bundle: Callable[[str], Path], tmp_path: Path, read: Read
) -> None:
    expected = answer(load(bundle("fp16"), tmp_path))
    (path,) = files(tmp_path)
    good = path.read_bytes()
    path.write_bytes(damage(good))
    read.clear()
    assert answer(load(bundle("fp16"), tmp_path)) == expected
    assert read[0] == len(IDS)
    assert path.read_bytes() == good  # made again


def test_a_state_of_the_wrong_size_is_not_taken_up(
    bundle: Callable[[str], Path], tmp_path: Path, read: Read
) -> None:
    """Nor where a file is right about itself."""
    model = load(bundle("fp16"), tmp_path)
    expected = answer(model)
    keeping = model.engine.cache.keeping
    assert keeping is not None
    (path,) = files(tmp_path)
    path.unlink()
    state = keeping._state(model.engine.cache.tokens)
    keeping.store.keep(replace(state, data=state.data[:-64]))
    read.clear()
    assert answer(load(bundle("fp16"), tmp_path)) == expected
    assert read[0] == len(IDS)


def test_what_another_made_is_left_alone(
    bundle: Callable[[str], Path], tmp_path: Path, read: Read
) -> None:
    """Another model, cache, context, adapter or kernel path has prefixes of its own."""
    carried = bundle("adapter")
    models: list[tuple[Path, dict[str, Any]]] = [
        (bundle("fp16"), {}),
        (bundle("int8"), {}),
        (bundle("other"), {}),
        (bundle("fp16"), {"context": 250}),
        (carried, {"adapter": "polite"}),
    ]
    for count, (path, options) in enumerate(models, 1):
        expected = answer(load(path, **options))
        read.clear()
        assert answer(load(path, tmp_path, **options)) == expected
        assert read[0] == len(IDS), path
        assert len(files(tmp_path)) == count
    model = load(carried, tmp_path, adapter="polite")
    model.use_adapter(None)  # its base is the first model
    read.clear()
    assert answer(model) == answer(load(bundle("fp16")))
    assert read[0] == 1
    read.clear()  # one model, each answer with what it asks for
    model = load(carried, tmp_path)
    for adapter in ("polite", "", "polite"):
        config = replace(CONFIG, adapter=adapter)
        assert [r.token for r in model.generate(IDS, config)] == [
            r[0] for r in answer(load(carried, adapter=adapter or None))
        ]


def test_the_kernel_path_counts(
    bundle: Callable[[str], Path], tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(load(bundle("fp16"), tmp_path))
    monkeypatch.setenv("POCKETSLM_ISA", "scalar")
    read.clear()
    answer(load(bundle("fp16"), tmp_path))
    assert read[0] == len(IDS)


def test_chats_that_alternate_are_read_once(bundle: Callable[[str], Path], read: Read) -> None:
    store = Prefixes()
    model = load(bundle("fp16"), store)
    one, other = IDS, IDS[::-1]
    expected = answer(model, one), answer(model, other)
    read.clear()
    assert answer(model, one) == expected[0]
    assert answer(model, other) == expected[1]
    assert max(read) == 1
    bound = store._held[-1].data
    assert sum(len(state.data) for state in store._held) <= 3 * len(bound)
    small = load(bundle("fp16"), Prefixes(memory=1000))
    answer(small, one)
    answer(small, other)
    read.clear()
    assert answer(small, one) == expected[0]
    assert read[0] == len(IDS)


OF = Identity("model", "", "engine", False)


def state(number: int, count: int = 100, of: Identity = OF) -> State:
    return State(of, np.full(count, number, np.int32), bytes([number]) * 10_000)


def found(store: Prefixes, number: int) -> bool:
    state = store.find(OF, np.full(100, number, np.int32), 1)
    assert state is None or set(bytes(state.data)) == {number}
    return state is not None


def test_the_least_recently_used_goes(tmp_path: Path) -> None:
    disk, memory = Prefixes(tmp_path, disk=35_000, memory=0), Prefixes(memory=35_000)
    for store, keep in ((disk, disk.keep), (memory, memory.hold)):
        for number in (1, 2, 3):
            keep(state(number))
        assert found(store, 1)
        keep(state(4))
        assert [found(store, number) for number in (1, 2, 3, 4)] == [True, False, True, True]
        longer = state(4, 200)
        keep(longer)  # in place of what it begins with
        assert [found(store, number) for number in (1, 2, 3, 4)] == [True, False, True, True]
    assert not disk.keep(State(OF, longer.tokens, bytes(40_000)))
    assert len(files(tmp_path)) == 3
    whole = replace(OF, whole=True)
    for count in (50, 60):
        disk.keep(state(9, count, whole))
    assert len(files(tmp_path)) == 3  # both stay: the longer does not serve what the shorter does
    for count, serves in ((55, 50), (70, 60), (40, 0)):
        got = disk.find(whole, np.full(count, 9, np.int32), 1)
        assert (len(got.tokens) if got else 0) == serves


def test_a_full_disk_costs_no_answer(
    bundle: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "put_file", full)
    model = load(bundle("fp16"), tmp_path)
    assert answer(model) == answer(load(bundle("fp16")))
    assert not model.keep_prefix(IDS[:HALF])
    assert list(tmp_path.iterdir()) == []


PROGRAM = """
import sys
import numpy as np
from pathlib import Path
from pocketslm.runtime.prefixes import Identity, Prefixes, State
store, of, found = Prefixes(sys.argv[1], disk=35_000), Identity("model", "", "engine", False), 0
for step in range(60):
    number = (step * int(sys.argv[2])) % 7
    tokens = np.full(100, number, np.int32)
    state = store.find(of, tokens, 1)
    assert state is None or set(bytes(state.data)) == {number}
    found += state is not None
    assert state or store.keep(State(of, tokens, bytes([number]) * 10_000))
print(found)
"""


def test_processes_share_a_folder(tmp_path: Path) -> None:
    """What one reads the other may remove; nobody finds half of it, or what is not asked for."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    running = [
        subprocess.Popen([*command, factor], stdout=subprocess.PIPE, text=True)
        for factor in ("1", "3")
    ]
    told = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert sum(map(int, told)) > 0
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 45_000
    assert len(list(tmp_path.iterdir())) == len(files(tmp_path))


def test_what_cannot_be_is_an_error(
    bundle: Callable[[str], Path], tiny_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(BackendError, match="cannot keep prefixes; use --backend native"):
        Model.load(tiny_bundle, "onnx", prefixes=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot hold prefixes"):
        Prefixes(tmp_path / "file")
    with pytest.raises(UsageError, match="disk is -1"):
        Prefixes(tmp_path, disk=-1)
    with pytest.raises(UsageError, match="no place for prefixes"):
        load(bundle("fp16")).keep_prefix(IDS)
    model = load(bundle("fp16"), tmp_path)
    with pytest.raises(UsageError, match="expected letters"):
        model.keep_prefix(IDS, "../x")
    with pytest.raises(UsageError, match="expected letters"):
        Prefixes(tmp_path).forget("*")
    with pytest.raises(UsageError, match="at least one token"):
        model.keep_prefix([])
    for ids in ([2**40] * 50, [-1] * 50, [10_000] * 50):
        with pytest.raises(UsageError, match=r"token id"):
            answer(model, ids)
        with pytest.raises(UsageError, match=r"token id"):
            model.keep_prefix(ids)


def test_the_command_line_keeps_prefixes(
    bundle: Callable[[str], Path], tmp_path: Path, read: Read, capsys: pytest.CaptureFixture[str]
) -> None:
    # One thread: several add log-probabilities up in the order in which they end.
    command = ["run", str(bundle("fp16")), "the inner " * 8, "-n", "3", "--json", "-t", "1"]
    texts = []
    for options in ([], ["--prefixes", str(tmp_path)], ["--prefixes", str(tmp_path)]):
        assert main([*command, *options]) == 0
        texts.append(capsys.readouterr().out.split('"finish"')[0])
    assert len(set(texts)) == 1
    assert len(files(tmp_path)) == 1
    assert read[-1] == 1


def test_a_chat_takes_up_what_an_earlier_one_read(
    bundle: Callable[[str], Path], tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["chat", str(bundle("fp16")), "-n", "3", "--system", "the inner " * 8]
    command += ["--prefixes", str(tmp_path)]
    for question in ("one\n", "two\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(question))
        assert main(command) == 0
    assert read[1] < read[0] / 2


CAT = "Tom hid the cat in Paris on Friday, and 12 dogs ran away from the white house. "


def test_the_assistant_reads_a_document_once(
    bundle: Callable[[str], Path], tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(question: str, keep: bool) -> Answer:
        model, prefixes = load(bundle("fp16")), library.prefixes()
        config = Assistant.DEFAULTS.but(max_new_tokens=6, ignore_eos=True)
        assistant = Assistant(model, config, prefixes=prefixes if keep else None)
        read.clear()
        *_, last = assistant.ask(document, question)
        assert isinstance(last, Answer)
        assert last.new_tokens == 6
        return replace(last, seconds=0.0, ttft_ms=0.0, decode_tps=None)

    with Library(tmp_path / "library.db") as library:
        document = library.add(make_source("cat", "txt", [Block(CAT)]))
        folder = tmp_path / "library.db.prefixes"
        plain = ask("Where did Tom hide the cat?", keep=False)
        whole = read[0]
        assert ask("When did Tom hide the cat?", keep=True).new_tokens
        beginning = read[0]
        assert len(CAT) < beginning < whole
        assert ask("Where did Tom hide the cat?", keep=True) == plain
        assert read[0] == whole - beginning
        assert len(files(folder)) == 1
        library.remove(document.id)
        assert files(folder) == []
        # Removed while it is read.
        document = library.add(make_source("cat", "txt", [Block(CAT)]))
        put = folders.put_file

        def removed(part: Path, path: Path) -> None:
            with Library(library.path) as other:
                other.remove(document.id)
            part.parent.mkdir(exist_ok=True)
            part.write_bytes(b"as if it had been written a moment later")
            put(part, path)

        monkeypatch.setattr(folders, "put_file", removed)
        ask("When did Tom hide the cat?", keep=True)
        assert files(folder) == []
    assert Library(":memory:").prefixes() is None


def test_doc_ask_keeps_what_it_may(
    bundle: Callable[[str], Path], tiny_bundle: Path, tmp_path: Path
) -> None:
    library, folder = tmp_path / "l.db", tmp_path / "l.db.prefixes"
    (tmp_path / "cat.txt").write_text(CAT)
    assert main(["doc", "add", str(tmp_path / "cat.txt"), "--library", str(library)]) == 0
    ask = ["doc", "ask", "BUNDLE", "When did Tom hide the cat?", "-n", "6"]

    def asked(path: Path, *options: str) -> int:
        ask[2] = str(path)
        return main([*ask, "--library", str(library), *options])

    assert asked(bundle("fp16"), "--prefix-mb", "0") == 0
    assert asked(tiny_bundle, "--backend", "onnx") == 0
    assert not folder.exists()
    assert asked(tiny_bundle, "--backend", "onnx", "--prefix-mb", "5") == 2
    assert asked(bundle("fp16"), "--prefix-mb", "-1") == 2
    assert asked(bundle("fp16")) == 0
    assert len(files(folder)) == 1
    assert main([*ask, "--document", str(tmp_path / "cat.txt"), "--prefix-mb", "5"]) == 2
