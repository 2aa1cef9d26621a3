"""What the targets begin with: small whole files of every kind, made once for a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np


def make(home: Path) -> None:
    """Fill a folder for every target below ``home``."""
    shutil.rmtree(home, ignore_errors=True)
    for name, one in MAKERS.items():
        (home / name / "seeds").mkdir(parents=True)
        one(home / name)


def _seed(home: Path, name: str, content: bytes | str) -> None:
    data = content.encode() if isinstance(content, str) else content
    count = len(list((home / "seeds").iterdir()))
    (home / "seeds" / f"{count:03}").write_bytes(name.encode() + b"\0" + data)


def _documents(home: Path) -> None:
    import support_documents as made

    page = (
        "<!DOCTYPE html><html><head><meta charset=utf-8><title>T</title></head><body><h1>One</h1>"
        "<p>Text &amp; more<br>of it</p><ul><li>a<li>b</ul><table><tr><td>c</td><td>d</td></tr>"
        "</table><pre>x  y</pre><script>no()</script><!-- no --></body></html>"
    )
    mark = (
        "# One\n\nText **bold** _it_ `code` [link](http://a.b 'c') ![i](x.png)\n\n- a\n- b\n\n"
        "```py\ncode\n```\n\n|a|b|\n|-|-|\n|1|2|\n\n> quote\n\nTitle\n=====\n<b>html</b> &lt;\n"
    )
    _seed(home, "a.txt", "A line of text.\nAnd another.\n\n1. One\n2. Two\n" * 3)
    _seed(home, "a.txt", "x,y\n1,2\n".encode("utf-16"))
    _seed(home, "a.log", "\n".join(f"12:00:{n:02} service[{n}]: ready" for n in range(30)))
    _seed(home, "a.md", mark)
    _seed(home, "a.html", page)
    _seed(home, "a.docx", made.docx())
    _seed(home, "a.epub", made.epub())
    _seed(home, "a.pdf", made.pdf_file(["One page.\nTwo lines.", "Another."]))
    _seed(home, "b.pdf", made.pdf_file([b"789c0300"], "[/ASCIIHexDecode /FlateDecode]"))
    from pocketslm.profiling.render import render

    for kind in ("odt", "rtf", "pptx", "xlsx", "csv", "eml", "docx", "pdf"):
        _seed(
            home, f"a.{kind}", render(f"{mark}\n\n| Tool | Price |\n|---|---|\n| Saw | 780 |", kind)
        )
    _seed(home, "noname", made.pdf_file(["x"]))


def _tokenizers(home: Path) -> None:
    import support
    import tokenizer_support as made

    (home / "whole").mkdir()
    files = support.tokenizer_files() | {
        "special_tokens_map.json": json.dumps({"eos_token": {"content": "<|im_end|>"}}),
        "chat_template.jinja": support.CHATML,
    }
    for name, text in files.items():
        (home / "whole" / name).write_text(text)
    for style in (
        "llama3",
        "qwen2",
        "gpt4o",
        "deepseek3",
        "gemma",
        "llama2",
        "lowercase",
        "xlm-r",
        "t5",
    ):
        _seed(home, "style.json", _small(made.document(style)))
    _seed(home, "style.json", _small(made.word_piece()))


def _small(text: str) -> str:
    """A tokenizer.json with a few hundred of its words."""
    data = json.loads(text)
    model = data["model"]
    if model["type"] == "Unigram":
        model["vocab"] = model["vocab"][:420]
        names = {piece: at for at, (piece, _) in enumerate(model["vocab"])}
        for token in data["added_tokens"]:
            token["id"] = names.setdefault(token["content"], len(names))
        return json.dumps(data)
    kept = {word: at for word, at in model["vocab"].items() if at < 420}
    added = {token["content"] for token in data["added_tokens"]}
    kept |= {word: at for word, at in model["vocab"].items() if word in added}
    names = {word: at for at, word in enumerate(kept)}
    model["vocab"] = names
    for token in data["added_tokens"]:
        token["id"] = names[token["content"]]
    if "merges" in model:
        pairs = [one if isinstance(one, list) else one.split(" ") for one in model["merges"]]
        model["merges"] = [
            pair for pair in pairs if all(word in names for word in (*pair, "".join(pair)))
        ]
    return json.dumps(data)


def _templates(home: Path) -> None:
    import support

    (home / "tokenizer.json").write_text(support.tokenizer_files()["tokenizer.json"])
    _seed(home, "t", support.CHATML)
    for path in sorted((Path(__file__).parent / "templates").glob("*.jinja")):
        _seed(home, "t", path.read_text("utf-8"))


def make_row(**changes: Any) -> Any:
    """A pp512 row of two repetitions at 1000 and 500 tokens/s, with fields changed."""
    from pocketslm.profiling.machine import Machine
    from pocketslm.profiling.records import Measurement

    fields: dict[str, Any] = {
        "run": "r1",
        "started": "2030-01-02T03:04:05+00:00",
        "pocketslm": "0.1.0",
        "machine": Machine("Some CPU", 2, "x86_64", 8 << 30, "Linux-6"),
        "software": {"python": "3.11.7"},
        "model": "Tiny",
        "artefact": "tiny",
        "artefact_sha256": "ab" * 32,
        "size_bytes": 98_400_000,
        "runtime": "pocketslm",
        "runtime_version": "0.1.0",
        "backend": "onnxruntime 1.0",
        "threads": 2,
        "n_prompt": 512,
        "n_gen": 0,
        "n_depth": 0,
        "context": 512,
        "samples_ns": (512_000_000, 1_024_000_000),
        "step_ns": (),
        "load_ns": 120_400_000,
        "base_rss_bytes": 60_000_000,
        "peak_rss_bytes": 205_600_000,
        "rss_anon_bytes": 100_000_000,
        "rss_file_bytes": 90_000_000,
        "quality": {"perplexity": 29.07},
    }
    return Measurement(**(fields | changes))


def make_rows() -> list[Any]:
    """Measurements with every field: of a prompt, of decoding, of a phone, of another runtime."""
    from pocketslm.profiling.machine import Cluster, Limits, Machine
    from pocketslm.profiling.records import Energy, TracePoint

    plain = make_row()
    decode = replace(
        plain,
        **{"n_prompt": 0, "n_gen": 2, "n_depth": 9, "step_ns": (3000, 4000, 5000, 6000)},
        samples_ns=(7000, 11000),
        limits=Limits(30e9, 330e9),
        operator_ns={"attention": 5},
        pinning=(0, 1),
    )
    phone = Machine(
        *("Cortex-X1", 8, "aarch64", 12 << 30, "Android 14", "adb", "Pixel", "GS201"),
        clusters=(Cluster((6, 7), 1024, 2_850_000), Cluster((0, 1, 2, 3), 200)),
        governor="sched_pixel",
    )
    hot = replace(
        plain,
        run="r2",
        machine=phone,
        energy=Energy(1.5, "battery", "whole device"),
        trace=(TracePoint(0, {"cpu": 41.5}, (2_000_000,), 7), TracePoint(9)),
        throttled=True,
    )
    other = replace(plain, artefact="other", runtime="llama.cpp", run="r3")
    return [plain, decode, hot, other]


def _records(home: Path) -> None:
    plain, decode, hot, other = make_rows()
    _seed(home, "r", "\n".join(row.to_json() for row in (plain, decode, other)))
    _seed(home, "r", "\n".join(row.to_json() for row in (hot, plain)))
    bench = {
        "build_commit": "abc",
        "build_number": 1,
        "cpu_info": "CPU",
        "model_filename": "a/b.gguf",
        "model_type": "llama",
        "model_size": 100,
        "backends": "CPU",
        "n_threads": 2,
        "n_prompt": 4,
        "n_gen": 0,
        "n_depth": 0,
        "test_time": "2030-01-02T03:04:05Z",
        "samples_ns": [5, 6],
    }
    _seed(home, "r", json.dumps([bench, bench | {"n_prompt": 0, "n_gen": 2}]))
    _seed(home, "r", json.dumps(bench))


def _checkpoints(home: Path) -> None:
    import support

    folder = support.write_hf(home / "whole")
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(support.random_state(support.TINY), "model.safetensors"),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _configs(home: Path) -> None:
    from architectures import BASE, ROWS
    from transformers import AutoConfig

    for row in ROWS.values():
        config = AutoConfig.for_model(row.model_type, **BASE | row.fields)
        _seed(home, "config.json", config.to_json_string())


def _gguf(home: Path) -> None:
    import support

    for kind in ("Q4_1", "Q8_0", "F16"):
        path = support.write_gguf(home / f"{kind}.gguf", kind=kind)
        _seed(home, "m.gguf", path.read_bytes())
        path.unlink()


def _bundles(home: Path) -> None:
    import support
    from pocketslm.export.pipeline import export_bundle
    from pocketslm.export.recipe import Recipe
    from pocketslm.models.checkpoint import open_checkpoint

    hf = support.write_hf(home / "hf")
    recipe = Recipe(weights="float", head="float", targets=("native",))
    export_bundle(open_checkpoint(hf), home / "whole", recipe)
    model = {"context_length": 64, "decoder": {"filename": "model.onnx", "head_size": 16}}
    (home / "whole" / "genai").mkdir()
    (home / "whole" / "genai" / "model.onnx").write_bytes(b"")
    listed = home / "whole" / "genai_config.json"
    listed.write_text(json.dumps({"model": model}))
    manifest = home / "whole" / "pocketslm.json"
    data = json.loads(manifest.read_text())
    data["files"]["genai_config.json"] = data["files"]["tokenizer.json"] | {
        "bytes": listed.stat().st_size
    }
    manifest.write_text(json.dumps(data))
    shutil.rmtree(hf)


def _recipes(home: Path) -> None:
    from pocketslm.export.recipe import Recipe

    _seed(home, "recipe.toml", Recipe().to_toml())
    _seed(
        home,
        "recipe.toml",
        Recipe(weights="int4", method="hqq+gptq", calibration="lee", grid="min").to_toml(),
    )


def _updates(home: Path) -> None:
    import adapter_support
    import torch
    from safetensors.torch import load_file, save_file

    import support
    from pocketslm.export.delta import Band, make_delta
    from pocketslm.models.checkpoint import open_checkpoint

    base = support.write_hf(home / "base")
    adapter_support.write_adapter(home / "whole")
    tuned = support.write_hf(home / "tuned")
    state = load_file(tuned / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for value in state.values():
        value += 0.02 * torch.randn(value.shape, generator=generator)
    save_file(state, tuned / "model.safetensors", metadata={"format": "pt"})
    first, second = open_checkpoint(base), open_checkpoint(tuned)
    make_delta(first, second, home / "whole" / "x.delta", [Band(2, 8), Band(4, 3), Band(2, 2)])
    save_file(adapter_support.factors(), home / "whole" / "adapter-x.safetensors")
    shutil.rmtree(tuned)


def _libraries(home: Path) -> None:
    from pocketslm.android.settings import DEFAULTS

    path = home / "library"
    _library(path)
    _seed(home, "library", path.read_bytes())
    path.unlink()
    changed = DEFAULTS | {"drafts": {"1": "x"}, "pending": {"document": 1, "task": "ask"}}
    _seed(home, "settings.json", json.dumps(changed))


def _library(path: Path) -> None:
    from pocketslm.runtime.assistant.answer import Answer, Citation
    from pocketslm.runtime.assistant.document import Block, make_source
    from pocketslm.runtime.assistant.library import Library

    with Library(path) as library:
        blocks = [
            Block("Report", 1),
            Block("The quick fox of Rome. It jumps."),
            Block("More.", 0, 2),
        ]
        document = library.add(make_source("a", "txt", blocks))
        answer = Answer("ask", "who?", "It.", "eos", citations=(Citation(0, 1, 5),), items=("a",))
        library.remember(document.id, answer)


def _imports(home: Path) -> None:
    _adapted(home)
    packed = shutil.make_archive(str(home / "packed"), "zip", home / "bundle")
    _seed(home, "x.zip", Path(packed).read_bytes())


def _tasks(home: Path) -> None:
    from pocketslm.export.tasks import Item, save_margins

    items = [
        {"query": "q", "choices": ["a", "b"], "gold": 0},
        {"question": "r", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
        {"ctx": "s", "choices": ["x", "y", "z"], "label": "2"},
    ]
    _seed(home, "items", "\n".join(map(json.dumps, items)))
    path = home / "margins"
    save_margins(path, [Item("q", ("a", "b"), 0), Item("r", ("a", "b"), 1)], [0.5, -1.0])
    _seed(home, "margins", path.read_bytes())


def _boards(home: Path) -> None:
    recordings = Path(__file__).parents[1] / "devices" / "recordings"
    for path in sorted(recordings.glob("*.txt")):
        _seed(home, "board", path.read_bytes()[:60_000])


def _models(home: Path) -> None:
    import earlier_model_file
    import program_cases
    from native_support import quantize, tiny_config, tiny_weights

    from pocketslm.models.config import LayerSize

    path = home / "m.slm"
    shape = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    sizes = (LayerSize(2, 2, 32), LayerSize(4, 2, 64))
    for changes in ({}, {"layer_sizes": sizes}):  # versions 1 and 2
        for bits, kind in ((4, "zp"), (8, "sym"), (4, "min")):
            config = tiny_config(**shape, **changes)
            weights = tiny_weights(config, lambda _, v, b=bits, k=kind: quantize(v, b, k))  # type: ignore[misc]
            earlier_model_file.write(path, config, weights)
            _seed(home, "m.slm", path.read_bytes())
    for name in program_cases.CASES:
        _seed(home, "m.slm", program_cases.program(name, context=64).content())
        quantized = program_cases.program(name, lambda v: quantize(v, 8, "zp"), context=64)
        _seed(home, "m.slm", quantized.content())
    path.unlink()


def _packed(home: Path) -> None:
    from native_support import tiny_config, tiny_weights

    import tokenizer_support as made
    from pocketslm.export.lower.native import lower
    from pocketslm.export.lower.native_tokenizer import pack_tokenizer
    from pocketslm.export.lower.trace import trace

    texts = [text for text in made.HARD if len(text) < 2000]
    (home / "texts").write_text("\x1e".join(texts), "utf-8")
    styles = ("smollm", "qwen2", "gpt4o", "deepseek3", "llama2", "gemma", "tekken", "xlm-r", "t5")
    for text in (*(made.document(style) for style in styles), made.word_piece()):
        small = _small(text)
        packed, reason = pack_tokenizer(small)
        assert packed is not None, reason
        count = int.from_bytes(packed[4:8], "little")
        config = tiny_config(
            vocab_size=count,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=64,
        )
        weights = tiny_weights(config, lambda _, w: w.astype(np.float16))
        lower(trace(config, 64), weights, home / "m.slm", tokenizer=packed)
        _seed(home, "m.slm", (home / "m.slm").read_bytes())


def _states(home: Path) -> None:
    import program_cases

    (home / "models").mkdir()
    for name in ("llama", "gemma3", "lfm", "gemma4"):
        program_cases.program(name, context=64).write(home / "models" / f"{name}.slm")


def _adapters(home: Path) -> None:
    from native_support import tiny_config, write_tiny

    write_tiny(home / "m.slm", tiny_config())


def chat_model(path: Path) -> None:
    """A tiny model with every kind of weight, the byte tokenizer and a chat template."""
    import native_support

    import support
    from pocketslm.export.lower.native import lower
    from pocketslm.export.lower.native_chat import chat_parts
    from pocketslm.export.lower.native_tokenizer import pack_tokenizer
    from pocketslm.export.lower.trace import trace
    from pocketslm.runtime.tokenizer import load_tokenizer_files

    config = native_support.tiny_config(vocab_size=support.TINY.vocab_size)
    tokenizer, reason = pack_tokenizer(support.tokenizer_files()["tokenizer.json"])
    assert tokenizer is not None, reason
    chat, reason = chat_parts(load_tokenizer_files(support.tokenizer_files()))
    assert not reason
    weights = native_support.tiny_weights(config, native_support.mixed_kinds)
    traced = trace(config, config.max_position_embeddings)
    lower(traced, weights, path, tokenizer=tokenizer, chat=chat)


def _protocol(home: Path) -> None:
    chat_model(home / "m.slm")
    lines = (Path(__file__).parents[1] / "corpus" / "protocol.jsonl").read_text("utf-8")
    for number, line in enumerate(lines.splitlines()):
        (home / "seeds" / f"{number:03}").write_bytes(line.encode())


def _runner_models(home: Path) -> None:
    chat_model(home / "m.slm")
    _seed(home, "m.slm", (home / "m.slm").read_bytes())


def _adapted(home: Path) -> None:
    """A bundle with two adapters, whose template shows tools."""
    from adapter_support import factors, write_adapter
    from server_support import TEMPLATE

    import support
    from pocketslm.export.pipeline import export_bundle
    from pocketslm.export.recipe import Recipe
    from pocketslm.models.checkpoint import open_checkpoint

    hf = support.write_hf(home / "hf")
    (hf / "chat_template.jinja").write_text(TEMPLATE)
    other = factors(seed=4, targets=("gate_proj", "down_proj"))
    adapters = [write_adapter(home / "polite"), write_adapter(home / "terse", other)]
    recipe = Recipe(targets=("native",))
    export_bundle(open_checkpoint(hf), home / "bundle", recipe, adapters=adapters)


def _commands(home: Path) -> None:
    """Its inputs are those of other targets; what else a line needs is whole."""
    _adapted(home)
    (home / "text.txt").write_text("The quick fox of Rome jumps over 12 lazy dogs. " * 30)
    (home / "items").write_text('{"query": "q", "choices": ["a", "b"], "gold": 0}\n' * 2)
    _library(home / "library")


def _prefixes(home: Path) -> None:
    from pocketslm.runtime.prefixes import Prefixes

    from .kept import prefix_state

    for adapter in ("", "polite"):
        store = Prefixes(home / "made")
        assert store.keep(prefix_state(adapter))
        for path in (home / "made").iterdir():
            _seed(home, path.name, path.read_bytes())
            path.unlink()


def _kept(home: Path) -> None:
    import torch

    import support
    from pocketslm.export import bits, heal, methods
    from pocketslm.export.quantize.sensitivity import Sizes
    from pocketslm.export.recipe import Recipe
    from pocketslm.models.checkpoint import open_checkpoint
    from pocketslm.runtime.cores import CHOICES, keep_choice, this_machine

    model = open_checkpoint(support.write_hf(home / "hf"))
    identity = {"model": "x", "text": "y", "windows": 1}
    costs = Sizes(model, Recipe(method="search+gptq", calibration="lee")).costs
    losses = {site: {b: 1.0 / b for b in by_bits} for site, by_bits in costs.items()}
    work = home / "work"
    work.mkdir()
    bits._write(work / "losses", identity, losses)
    row = methods.Row("bits", "gptq", "4 bits a weight", 9.0, 0.1, 0.2, 0.9, 1.5, 3.0)
    rows = [identity, asdict(row), asdict(replace(row, table="depth", detail="6.0"))]
    (work / "results").write_text("\n".join(map(json.dumps, rows)))
    keep_choice(work, this_machine(), {"threads": 2, "cpus": [0, 1], "why": "x"})
    (work / CHOICES).rename(work / "threads.json")
    defaults = {"do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1}
    (work / "generation_config.json").write_text(json.dumps(defaults))
    config = heal.HealConfig(steps=2, batch=1, sequence=16)
    heal.heal(model, model, np.arange(64) % 90, home / "heal", config)
    state = home / "heal" / heal.STATE
    run = torch.load(state, weights_only=True)["identity"]
    state.rename(work / "state")
    known = {"identity": identity, "costs": list(costs.items()), "run": run}
    (home / "known.json").write_text(json.dumps(known))
    for path in sorted(work.iterdir()):
        _seed(home, path.name, path.read_bytes())


def _grammars(home: Path) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 9, "pattern": "^a.b$"},
            "day": {"enum": ["today", "tomorrow", 3, None]},
            "when": {"type": "string", "format": "date"},
            "all": {"type": "array", "items": {"$ref": "#/$defs/n"}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "all"],
        "additionalProperties": False,
        "$defs": {
            "n": {"anyOf": [{"type": "integer", "minimum": -5, "maximum": 120}, {"const": 1.5}]}
        },
    }
    _seed(home, "json_schema", json.dumps(schema))
    _seed(home, "json_schema", '{"type": ["number", "boolean"]}')
    for one in (
        {"type": "number", "minimum": -2.5, "exclusiveMaximum": 1.25e2},
        {"type": "number", "exclusiveMinimum": 0.05, "maximum": 17},
        {"type": "integer", "minimum": -12, "maximum": 305},
        {"type": "integer", "exclusiveMinimum": 7},
        {"allOf": [{"type": "number", "minimum": 1}, {"maximum": 9, "multipleOf": 1}]},
        {
            "allOf": [
                {"type": "object", "properties": {"a": {"enum": [1, "b"]}}},
                {"required": ["a"]},
            ]
        },
        {"type": "array", "prefixItems": [{"const": 1}, {"type": "null"}], "items": False},
        {"oneOf": [{"type": "string", "minLength": 2, "maxLength": 3}, {"const": {"a": [1]}}]},
        *(
            {"type": "string", "format": one}
            for one in ("date", "date-time", "time", "email", "uuid")
        ),
    ):
        _seed(home, "json_schema", json.dumps(one))
    _seed(home, "regex", r"(ab|c)*[^x-z\d]{2,5}(?:\u00e9|\.)+?$")
    _seed(home, "grammar", 'root ::= item ("," item){0,3}\nitem ::= [a-z]+ | "\\"" [^"]* "\\""\n')


MAKERS: dict[str, Callable[[Path], None]] = {
    "documents": _documents,
    "tokenizer": _tokenizers,
    "template": _templates,
    "records": _records,
    "checkpoint": _checkpoints,
    "config": _configs,
    "gguf": _gguf,
    "bundle": _bundles,
    "recipe": _recipes,
    "update": _updates,
    "library": _libraries,
    "import": _imports,
    "task": _tasks,
    "board": _boards,
    "model": _models,
    "packed": _packed,
    "state": _states,
    "adapter": _adapters,
    "grammar": _grammars,
    "protocol": _protocol,
    "runner_model": _runner_models,
    "prefix": _prefixes,
    "kept": _kept,
    "request": _adapted,
    "command": _commands,
}
