"""Targets in Python: files that users are given, and what the package keeps."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from pocketslm.errors import PocketSlmError, TokenizerError

from . import mutate, words
from .target import InFolder, Mutators, Target

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is <|im_end|> 12?"},
    {"role": "assistant", "content": "<think>\na\n</think>\n\nNothing."},
    {"role": "user", "content": "é"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
TEXT = "The quick (brown) fox's 12 jumps.\n\n  naïve <s>é\U0001f642 <|im_end|>"


class Documents(Target):
    name = "documents"
    covers = ("runtime/assistant/readers/*.py", "runtime/assistant/document.py")
    mutators: ClassVar[Mutators] = {
        ".pdf": lambda data, rng: (
            mutate.binary(data, rng) if rng.random() < 0.5 else _latin(data, rng, words.PDF)
        ),
        ".docx": partial(mutate.zipped, words=words.MARKUP),
        ".epub": partial(mutate.zipped, words=words.MARKUP),
        ".odt": partial(mutate.zipped, words=words.MARKUP),
        ".pptx": partial(mutate.zipped, words=words.MARKUP),
        ".xlsx": partial(mutate.zipped, words=words.MARKUP),
        ".rtf": lambda data, rng: _latin(data, rng, words.RTF),
        ".eml": lambda data, rng: _latin(data, rng, words.MAIL),
        ".csv": partial(mutate.text, words=(",", ";", '"', "\n", "\t", "1,", "2030-01-02")),
        ".html": lambda data, rng: (
            mutate.binary(data, rng) if rng.random() < 0.2 else mutate.text(data, rng, words.MARKUP)
        ),
        ".md": partial(mutate.text, words=words.MARKS),
        ".txt": lambda data, rng: (
            mutate.binary(data, rng) if rng.random() < 0.5 else mutate.text(data, rng, words.MARKS)
        ),
    }

    def feed(self, name: str, content: bytes) -> None:
        from pocketslm.runtime.assistant.readers import read_bytes

        read_bytes(content, name)


def _latin(data: bytes, rng: Any, words: tuple[str, ...]) -> bytes:
    """Changes of text in which any byte stands for a character."""
    changed = mutate.text(data.decode("latin-1").encode(), rng, words)
    return changed.decode("utf-8", "replace").encode("latin-1", "replace")


class Tokenizers(InFolder):
    """Both implementations give the same ids, or refuse."""

    name = "tokenizer"
    covers = (
        *("runtime/tokenizer/*.py", "export/lower/native_tokenizer.py"),
        *("models/tokenizer_files.py",),
    )
    mutators: ClassVar[Mutators] = {
        ".json": mutate.json_tree,
        ".jinja": partial(mutate.text, words=words.JINJA),
    }

    def feed(self, name: str, content: bytes) -> None:
        if name in self.whole:
            super().feed(name, content)
        else:  # a tokenizer.json of another style
            self._load({"tokenizer.json": content})

    def read(self, folder: Path) -> None:
        self._load({path.name: path.read_bytes() for path in folder.iterdir()})

    def _load(self, files: dict[str, bytes]) -> None:
        from pocketslm.export.lower.native_tokenizer import pack_tokenizer
        from pocketslm.runtime.tokenizer import load_tokenizer_files

        refused = None
        for implementation in ("python", "tokenizers"):
            try:
                tokenizer = load_tokenizer_files(files, implementation)  # type: ignore[arg-type]
                ids = tokenizer.encode(TEXT, add_special_tokens=True)
                ids += tokenizer.encode(TEXT, parse_special=True)
                tokenizer.decode(ids)
                tokenizer.turn_end()
            except TokenizerError as error:
                refused = error
        if refused:
            raise refused
        pack_tokenizer(files["tokenizer.json"])


class Templates(Target):
    name = "template"
    covers = (
        *(
            "runtime/tokenizer/chat.py",
            "runtime/tokenizer/jinja.py",
            "runtime/tokenizer/metering.py",
        ),
        "export/lower/native_chat.py",
    )
    mutators: ClassVar[Mutators] = {"": partial(mutate.text, words=words.JINJA)}
    cpu_seconds = 30

    def feed(self, name: str, content: bytes) -> None:
        from pocketslm.export.lower.native_chat import chat_parts
        from pocketslm.runtime.tokenizer import load_tokenizer_files

        files = {"tokenizer.json": (self.home / "tokenizer.json").read_bytes()}
        tokenizer = load_tokenizer_files(files | {"chat_template.jinja": content}, "python")
        tokenizer.apply_chat_template(MESSAGES)
        tokenizer.apply_chat_template(MESSAGES, False, tools=TOOLS)
        tokenizer.turn_end()
        if name.endswith("0"):  # one in ten, since it renders many conversations
            chat_parts(tokenizer)

    def mutate(self, data: bytes, rng: Any) -> bytes:
        _, _, content = super().mutate(data, rng).partition(b"\0")
        return b"t%d\0%b" % (rng.randrange(10), content)


class Records(Target):
    name = "records"
    covers = (
        *("profiling/records.py", "profiling/llama_bench.py", "profiling/report.py", "schema.py"),
        *(
            "profiling/compare.py",
            "profiling/charts.py",
            "profiling/machine.py",
            "profiling/fit.py",
        ),
    )
    mutators: ClassVar[Mutators] = {"": mutate.json_lines}

    def feed(self, name: str, content: bytes) -> None:
        from pocketslm.profiling.compare import compare_table, compare_two
        from pocketslm.profiling.fit import check, device, fit_dict, format_fit, predict
        from pocketslm.profiling.llama_bench import read_rows
        from pocketslm.profiling.report import write_report
        from pocketslm.profiling.tables import format_rows

        path = self.scratch / "records.jsonl"
        path.write_bytes(content)
        rows = read_rows(path)
        for output in ("md", "csv", "json"):
            format_rows(rows, output)  # type: ignore[arg-type]
        with suppress(PocketSlmError):  # of one artefact, perhaps
            compare_table(compare_two(rows))
        with suppress(PocketSlmError):
            target = device("4GB", "30GB/s", "300GMAC/s", rows, None)
            found = target, predict(target, 512, 128), check(rows)
            format_fit(*found)
            fit_dict(*found)
        write_report([path], self.scratch / "report.html")


class Checkpoints(InFolder):
    """A Hugging Face folder: configuration, weights, index, tokenizer, pooling."""

    name = "checkpoint"
    covers = (
        *("models/checkpoint.py", "models/config.py", "models/pooling.py", "models/reference.py"),
        *(
            "models/architectures/*.py",
            "runtime/tokenizer/identity.py",
            "runtime/tokenizer/fields.py",
        ),
        *("inspection.py", "export/tokenizer.py"),
    )
    mutators: ClassVar[Mutators] = {
        ".safetensors": mutate.safetensors,
        ".json": mutate.json_tree,
        ".md": partial(mutate.text, words=("license: ", "---\n", "{", "null", "- ")),
    }

    def read(self, folder: Path) -> None:
        from pocketslm.inspection import describe
        from pocketslm.models.checkpoint import open_checkpoint, read_weight
        from pocketslm.models.reference import parameter_shapes
        from pocketslm.runtime.tokenizer import load_tokenizer_files

        checkpoint = open_checkpoint(folder)
        shapes = parameter_shapes(checkpoint.config)
        for name, shape in list(shapes.items())[:40]:
            read_weight(checkpoint, name, shape)
        load_tokenizer_files(checkpoint.tokenizer_files(), "python")
        describe(str(folder))


class Configs(Target):
    """The configuration of every family."""

    name = "config"
    covers = (
        "models/config.py",
        "models/architectures/*.py",
        "models/pooling.py",
        "models/sites.py",
    )
    mutators: ClassVar[Mutators] = {"": mutate.json_tree}

    def feed(self, name: str, content: bytes) -> None:
        from pocketslm.models import architectures
        from pocketslm.models.architectures.base import Fields
        from pocketslm.models.checkpoint import read_json
        from pocketslm.models.config import ModelConfig
        from pocketslm.models.reference import parameter_shapes

        path = self.scratch / "config.json"
        path.write_bytes(content)
        data = read_json(path)
        architecture = architectures.of_hf(str(data.get("model_type")))
        fields = Fields(data, "config.json")
        config = architecture.read_hf(fields)
        fields.settle()
        parameter_shapes(config)
        config.state_bytes(4096, 2, batch=8)
        assert ModelConfig.from_dict(config.to_dict()) == config


class GGUF(Target):
    name = "gguf"
    covers = ("models/gguf_reader.py", "models/tokenizer_files.py", "models/checkpoint.py")

    def mutate(self, data: bytes, rng: Any) -> bytes:
        name, _, content = data.partition(b"\0")
        return name + b"\0" + mutate.binary(content, rng, 12_000)

    def feed(self, name: str, content: bytes) -> None:
        from pocketslm.models.checkpoint import open_checkpoint, read_weight
        from pocketslm.models.reference import parameter_shapes
        from pocketslm.runtime.tokenizer import load_tokenizer_files

        path = self.scratch / "m.gguf"
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        checkpoint = open_checkpoint(path)
        for one, shape in list(parameter_shapes(checkpoint.config).items())[:40]:
            read_weight(checkpoint, one, shape)
        checkpoint.stored_bytes()
        load_tokenizer_files(checkpoint.tokenizer_files(), "python")


class Bundles(InFolder):
    """The manifest of a bundle and what lies beside it; a folder of onnxruntime-genai."""

    name = "bundle"
    covers = (
        "runtime/bundle.py",
        "schema.py",
        "runtime/config.py",
        "inspection.py",
        "models/config.py",
    )
    mutators: ClassVar[Mutators] = {".json": mutate.json_tree}

    def read(self, folder: Path) -> None:
        from pocketslm.inspection import describe
        from pocketslm.runtime.bundle import GENAI_CONFIG, MANIFEST, open_bundle
        from pocketslm.runtime.config import generation_defaults

        bundle = open_bundle(folder, verify=False)
        generation_defaults(folder)
        bundle.graph()
        genai = folder / "genai"
        (genai / GENAI_CONFIG).write_bytes((folder / GENAI_CONFIG).read_bytes())
        open_bundle(genai)
        assert (folder / MANIFEST).exists()
        with suppress(PocketSlmError):  # hashes differ
            describe(str(folder))


class Recipes(Target):
    name = "recipe"
    covers = ("export/recipe.py", "schema.py", "export/quantize/*.py")
    mutators: ClassVar[Mutators] = {"": partial(mutate.text, words=words.TOML)}

    def feed(self, name: str, content: bytes) -> None:
        import support
        from pocketslm.export.recipe import Recipe, read_recipe

        path = self.scratch / "recipe.toml"
        path.write_bytes(content)
        recipe = read_recipe(path)
        recipe.resolved(support.TINY)
        recipe.to_toml()
        assert Recipe.from_dict(recipe.to_dict()) == recipe


class Updates(InFolder):
    """A LoRA adapter as PEFT saves it, one that a bundle carries, and a delta."""

    name = "update"
    covers = ("models/updated.py", "runtime/adapters.py", "export/delta.py", "export/source.py")
    mutators: ClassVar[Mutators] = {
        ".safetensors": mutate.safetensors,
        ".delta": mutate.safetensors,
        ".json": mutate.json_tree,
    }

    def __init__(self, home: Path, scratch: Path) -> None:
        from pocketslm.models.checkpoint import open_checkpoint

        super().__init__(home, scratch)
        self.base = open_checkpoint(home / "base")

    def read(self, folder: Path) -> None:
        from pocketslm.export.delta import DeltaCheckpoint
        from pocketslm.models.reference import parameter_shapes
        from pocketslm.models.updated import WithAdapter
        from pocketslm.runtime.adapters import read_updates

        read_updates(folder / "adapter-x.safetensors")
        for make in (
            lambda: WithAdapter(self.base, folder),
            lambda: DeltaCheckpoint(self.base, folder / "x.delta"),
        ):
            checkpoint = make()
            for name in list(parameter_shapes(checkpoint.config))[:4]:
                checkpoint.weight(name)


class Libraries(Target):
    """The assistant's database, and what the app remembers."""

    name = "library"
    covers = ("runtime/assistant/library.py", "android/settings.py", "android/engine/models.py")
    mutators: ClassVar[Mutators] = {".json": mutate.json_tree}

    def feed(self, name: str, content: bytes) -> None:
        from pocketslm.android.settings import DEFAULTS, Settings
        from pocketslm.runtime.assistant.document import Block, make_source
        from pocketslm.runtime.assistant.library import Library

        for path in self.scratch.glob("f*"):
            path.unlink()
        path = self.scratch / "f"
        path.write_bytes(content)
        if name.endswith(".json"):
            settings = Settings(path)
            for one in DEFAULTS:
                assert settings[one] is not None or DEFAULTS[one] is None
            return
        with Library(path) as library:
            for entry in library.entries():
                library.open(entry.id)
                library.history(entry.id)
                library.postings([entry.id], ["fox"])
                library.words([entry.id])
                library.names(entry.id, [0, 1])
                library.meanings(entry.id)
            library.add(make_source("b", "txt", [Block("Another text.")]))


class Imports(Target):
    """A zip of a bundle that the app is given."""

    name = "import"
    covers = ("android/engine/models.py",)
    mutators: ClassVar[Mutators] = {"": partial(mutate.zipped, words=('"', "../", "{", "0", "[]"))}

    def feed(self, name: str, content: bytes) -> None:
        from pocketslm.android.engine.models import Models

        path = self.scratch / "f.zip"
        path.write_bytes(content)
        models = Models(self.scratch / "models")
        try:
            list(models.import_bundle(path))
        finally:
            for card in models.list():
                models.embeds(card.name)
                models.remove(card.name)
            assert not list((self.scratch / "models").iterdir())


class Tasks(Target):
    """Items of a multiple-choice task, and runs that were saved of them."""

    name = "task"
    covers = ("export/tasks.py",)
    mutators: ClassVar[Mutators] = {"": mutate.json_lines}

    def feed(self, name: str, content: bytes) -> None:
        from pocketslm.export.tasks import Item, read_items, read_margins

        path = self.scratch / "task.jsonl"
        path.write_bytes(content)
        if name.startswith("margins"):
            read_margins(path, [Item("q", ("a", "b"), 0), Item("r", ("a", "b"), 1)])
        else:
            read_items(path)


class Boards(Target):
    """What a phone or board answers."""

    name = "board"
    covers = ("profiling/devices/info.py", "profiling/sensors/*.py")
    mutators: ClassVar[Mutators] = {
        "": partial(mutate.text, words=("\n", ": ", "0", "-1", "nan", "processor", "9" * 30, ","))
    }

    def feed(self, name: str, content: bytes) -> None:
        from pocketslm.profiling.devices import info
        from pocketslm.profiling.sensors import power, thermal
        from pocketslm.profiling.sensors.tree import parse

        tree = parse(content.decode("utf-8", "replace"))
        info.machine(tree, "adb")
        thermal.celsius(tree)
        thermal.throttle_reasons(tree)
        power.find_source(tree)


TARGETS = (
    *(Documents, Tokenizers, Templates, Records, Checkpoints, Configs, GGUF, Bundles, Recipes),
    *(Updates, Libraries, Imports, Tasks, Boards),
)
