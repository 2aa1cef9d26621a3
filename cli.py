"""The command line: parses, calls the library, prints. Heavy imports wait for their command."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketslm import __version__
from pocketslm.errors import PocketSlmError, UsageError

if TYPE_CHECKING:
    from pocketslm.runtime.assistant import DocumentAssistant
    from pocketslm.runtime.config import GenerationConfig
    from pocketslm.runtime.model import Model, Record

USER_ERROR, INTERRUPTED = 2, 130
Command = Callable[[argparse.Namespace], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status (0, 2 for a user's error, 130 for Ctrl-C)."""
    arguments = _parser().parse_args(argv)
    return guarded(arguments.run, arguments)


def guarded(run: Command, arguments: argparse.Namespace) -> int:
    """Run a command; a user's error becomes one line and a status, never a traceback."""
    try:
        run(arguments)
    except PocketSlmError as error:
        print(f"pocketslm: error: {error}", file=sys.stderr)
        return USER_ERROR
    except ImportError as error:
        if (error.name or "").startswith("pocketslm"):
            raise
        print(
            f"pocketslm: error: {error.name} is not installed; `pip install pocketslm[all]`",
            file=sys.stderr,
        )
        return USER_ERROR
    except KeyboardInterrupt:
        print("\npocketslm: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        sys.stderr.close()
        return 0
    return 0


# Commands.


def _fetch(arguments: argparse.Namespace) -> None:
    from pocketslm.models.catalog import catalog, fetch

    if arguments.list:
        entries = catalog().values()
        if arguments.json:
            _print_json([asdict(entry) for entry in entries])
        else:
            _print_columns([(e.name, e.licence, e.source, e.title) for e in entries])
        return
    if arguments.name is None:
        raise UsageError("give a catalog name, or --list for all of them")
    path = fetch(arguments.name, _say)
    _print_json({"name": arguments.name, "path": str(path)}) if arguments.json else print(path)


def _inspect(arguments: argparse.Namespace) -> None:
    from pocketslm.inspection import describe

    facts = describe(arguments.model, _say)
    if arguments.json:
        _print_json(facts)
    else:
        _print_columns([(name, _shown(value)) for name, value in facts.items()])


def export(arguments: argparse.Namespace) -> None:
    from pocketslm.export.pipeline import export_bundle
    from pocketslm.export.recipe import Recipe
    from pocketslm.models.catalog import resolve
    from pocketslm.models.checkpoint import open_checkpoint

    recipe = Recipe(
        weights=arguments.weights,
        head=arguments.head,
        group_size=arguments.group_size,
        symmetric=not arguments.asymmetric,
        dtype=arguments.dtype,
        context=arguments.context,
        targets=tuple(arguments.target.split(",")) if arguments.target else None,
    )
    start = time.perf_counter()
    source = resolve(arguments.model, _say)
    with _Progress() as progress:
        manifest = export_bundle(
            open_checkpoint(source),
            arguments.out,
            recipe,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    seconds = time.perf_counter() - start
    if arguments.json:
        _print_json(json.loads(manifest.to_json()) | {"seconds": seconds})
        return
    weights = ", ".join(f"{size / 1e6:.1f} MB {name}" for name, size in manifest.weights.items())
    print(f"{arguments.out}: {manifest.size_bytes / 1e6:.1f} MB in {seconds:.1f} s ({weights})")
    for note in manifest.notes:
        print(f"note: {note}")


def _eval(arguments: argparse.Namespace) -> None:
    from pocketslm.export.evaluate import evaluate_bundle
    from pocketslm.models.catalog import resolve

    with _Progress() as progress:
        quality = evaluate_bundle(
            arguments.bundle,
            source=resolve(arguments.source, _say) if arguments.source else None,
            text=resolve(arguments.text, _say),
            window=arguments.window,
            windows=arguments.windows,
            backend=arguments.backend,
            threads=arguments.threads,
            progress=lambda done, total: progress("evaluate", done / total),
        )
    if arguments.json:
        _print_json(quality.to_dict())
        return
    change = quality.perplexity / quality.source_perplexity - 1
    print(
        f"perplexity {quality.perplexity:.3f} (source {quality.source_perplexity:.3f}, "
        f"{change:+.2%})\nmean KL    {quality.kl:.5f} nats\ntop-1      {quality.top1:.2%} agree\n"
        f"over {quality.tokens} tokens of {quality.corpus} in windows of {quality.window}"
    )


def _run(arguments: argparse.Namespace) -> None:
    model = _load(arguments)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    config = _generation_config(arguments, model)
    records = (
        model.generate(prompt, config)
        if arguments.raw
        else model.chat([*_system(arguments), {"role": "user", "content": prompt}], config)
    )
    _finish(model, _stream(records, quiet=arguments.json), arguments.json)


def _chat(arguments: argparse.Namespace) -> None:
    model = _load(arguments)
    config = _generation_config(arguments, model)
    messages = _system(arguments)
    _say(f"{model.bundle.name}, context {model.engine.session.context}. Ctrl-D ends, Ctrl-C stops.")
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not question.strip():
            continue
        messages.append({"role": "user", "content": question})
        answer = _stream(model.chat(messages, config))
        messages.append({"role": "assistant", "content": answer.text})
        _finish(model, answer)


def _bench(arguments: argparse.Namespace) -> None:
    from pocketslm.models.catalog import resolve
    from pocketslm.profiling.bench import bench
    from pocketslm.profiling.tables import format_rows

    with _Progress() as progress:
        rows = bench(
            arguments.bundle,
            n_prompt=arguments.n_prompt,
            n_gen=arguments.n_gen,
            n_depth=arguments.n_depth,
            repetitions=arguments.repetitions,
            threads=arguments.threads,
            backend=arguments.backend,
            context=arguments.context,
            timeout_s=arguments.timeout,
            peers=arguments.peer,
            source=resolve(arguments.source, _say) if arguments.source else None,
            progress=progress,
        )
    print(format_rows(rows, arguments.output), end="")


def _doc_summarize(arguments: argparse.Namespace) -> None:
    assistant, config = _assistant(arguments)
    answer = _stream(assistant.summarize(config), quiet=arguments.json)
    _finish(assistant.model, answer, arguments.json)


def _doc_ask(arguments: argparse.Namespace) -> None:
    assistant, config = _assistant(arguments)
    for question in arguments.question:
        _say(f"> {question}")
        answer = _stream(assistant.ask(question, config), quiet=arguments.json)
        _finish(assistant.model, answer, arguments.json)


def _assistant(arguments: argparse.Namespace) -> tuple[DocumentAssistant, GenerationConfig]:
    from pocketslm.runtime.assistant import DocumentAssistant, read_document, sample_document

    path = arguments.document
    document = sys.stdin.read() if path == Path("-") else read_document(path or sample_document())
    assistant = DocumentAssistant(_load(arguments), document)
    return assistant, _generation_config(arguments, assistant.model, assistant.DEFAULTS)


# Loading and streaming, shared by commands.


def _load(arguments: argparse.Namespace) -> Model:
    from pocketslm.runtime.bundle import open_bundle
    from pocketslm.runtime.model import Model
    from pocketslm.runtime.ops import build

    if arguments.backend in ("auto", "native") and build.built_library() is None:
        graph = open_bundle(arguments.bundle, verify=False).graph(arguments.backend)
        if graph.backend == "native":
            _say("compiling the native operators, once ...")
    return Model.load(
        arguments.bundle, arguments.backend, arguments.threads, verify=not arguments.no_verify
    )


def _system(arguments: argparse.Namespace) -> list[dict[str, str]]:
    return [{"role": "system", "content": arguments.system}] if arguments.system else []


def _generation_config(
    arguments: argparse.Namespace, model: Model, base: GenerationConfig | None = None
) -> GenerationConfig:
    """The model's own settings, changed by options; a sampling option switches sampling on."""
    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    sampling = {name: getattr(arguments, name) for name in names}
    if arguments.temperature == 0:
        sampling = {"do_sample": False}
    elif any(value is not None for value in sampling.values()):
        sampling["do_sample"] = True
    return (base or model.defaults).but(
        max_new_tokens=arguments.max_new_tokens,
        repetition_penalty=arguments.repetition_penalty,
        stop_strings=tuple(arguments.stop) or None,  # given ones replace the defaults
        **sampling,
    )


class _Answer:
    """What came of a generation: its text so far, records and whether Ctrl-C cut it short."""

    def __init__(self) -> None:
        self.text = ""
        self.records: list[Record] = []
        self.interrupted = False


def _stream(records: Iterator[Record], *, quiet: bool = False) -> _Answer:
    """Print text as it comes; Ctrl-C ends the generation and keeps what there is."""
    answer = _Answer()
    try:
        for record in records:
            answer.records.append(record)
            answer.text += record.text
            if not quiet:
                print(record.text, end="", flush=True)
    except KeyboardInterrupt:
        answer.interrupted = True
    if not quiet:
        print(flush=True)
    return answer


def _finish(model: Model, answer: _Answer, as_json: bool = False) -> None:
    """Report what an answer took, and on which backend."""
    backend = model.engine.session.backend
    count = len(answer.records)
    if not count:
        raise KeyboardInterrupt
    first, last = answer.records[0], answer.records[-1]
    ttft_ms = first.time_ns / 1e6
    decode_s = (last.time_ns - first.time_ns) / 1e9
    decode_tps = (count - 1) / decode_s if decode_s else None
    finish = "interrupted" if answer.interrupted else last.finish
    if as_json:
        _print_json(
            {
                "text": answer.text,
                "tokens": [record.token for record in answer.records],
                "logprobs": [record.logprob for record in answer.records],
                "finish": finish,
                "backend": backend,
                "ttft_ms": ttft_ms,
                "decode_tps": decode_tps,
            }
        )
        return
    speed = f", {decode_tps:.1f} tok/s" if decode_tps else ""
    _say(f"[{backend}: {count} tokens, TTFT {ttft_ms:.0f} ms{speed}, finish: {finish}]")


class _Progress:
    """One line on stderr that is rewritten on a terminal, or one line a step elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._step = ""

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal and self._step:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def __call__(self, step: str, fraction: float) -> None:
        if self._terminal:
            bar = "#" * round(fraction * 24)
            print(f"\r\033[K{step} [{bar:24}] {fraction:4.0%}", end="", file=sys.stderr, flush=True)
        elif step != self._step:
            print(f"{step} ...", file=sys.stderr)
        self._step = step


def _say(message: str) -> None:
    """To the person, not into a pipe."""
    print(message, file=sys.stderr, flush=True)


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


def _print_columns(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[-1]]))


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(part)}" for name, part in value.items())
    if isinstance(value, list):
        return "; ".join(map(_shown, value)) or "-"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# The parser.


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pocketslm",
        description="Put small language models on phones and edge boards.",
        epilog="`pocketslm COMMAND --help` shows the options of a command, with an example.",
    )
    parser.add_argument("--version", action="version", version=f"pocketslm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str,
        run: Command,
        summary: str,
        example: str,
        parent: Any = commands,
    ) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = parent.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    sub = command(
        "fetch",
        _fetch,
        "download a checkpoint or text of the catalog, checked by SHA-256 and cached",
        "pocketslm fetch smollm2-135m-instruct",
    )
    sub.add_argument("name", nargs="?", help="a catalog name")
    sub.add_argument("--list", action="store_true", help="list the catalog")
    _add_json(sub)

    sub = command(
        "inspect",
        _inspect,
        "describe a checkpoint or bundle: dimensions, storage, memory, quality",
        "pocketslm inspect smollm2-135m-instruct",
    )
    sub.add_argument("model", help="a Hugging Face folder, .gguf file, bundle or catalog name")
    _add_json(sub)

    sub = command(
        "export",
        export,
        "make a bundle of a checkpoint",
        "pocketslm export smollm2-135m-instruct out/smollm2",
    )
    sub.add_argument("model", help="a Hugging Face folder, .gguf file or catalog name")
    add_export_options(sub)

    sub = command(
        "eval",
        _eval,
        "measure a bundle's quality against its source, and write it into the bundle",
        "pocketslm eval out/smollm2",
    )
    sub.add_argument("bundle", type=Path)
    sub.add_argument("--source", help="the checkpoint it was made from (default: by SHA-256)")
    sub.add_argument("--text", default="lee", help="a UTF-8 file or catalog text (default: lee)")
    sub.add_argument("--window", type=int, default=512, help="tokens a window (default: 512)")
    sub.add_argument("--windows", type=int, default=16, help="how many windows (default: 16)")
    _add_backend(sub)
    sub.add_argument("-t", "--threads", type=int, help="threads (default: every core)")
    _add_json(sub)

    sub = command(
        "run",
        _run,
        "answer one prompt",
        'pocketslm run out/smollm2 "Why is the sky blue?" --max-new-tokens 64',
    )
    sub.add_argument("bundle", type=Path)
    sub.add_argument("prompt", help='the prompt; "-" reads it from standard input')
    sub.add_argument("--raw", action="store_true", help="continue the text, no chat template")
    _add_generation(sub)
    _add_json(sub)

    sub = command("chat", _chat, "talk with a model", "pocketslm chat out/smollm2")
    sub.add_argument("bundle", type=Path)
    _add_generation(sub)

    documents = commands.add_parser(
        "doc", help="summarise a document, or answer questions about it"
    ).add_subparsers(required=True, metavar="TASK")
    sub = command(
        "summarize",
        _doc_summarize,
        "summarise a document",
        "pocketslm doc summarize out/smollm2 --document report.txt",
        documents,
    )
    _add_document(sub)
    sub = command(
        "ask",
        _doc_ask,
        "answer questions about a document, the second without reading it again",
        'pocketslm doc ask out/smollm2 "Who wrote it?" "When?" --document report.txt',
        documents,
    )
    _add_document(sub)
    sub.add_argument("question", nargs="+")

    sub = command(
        "bench",
        _bench,
        "measure speed, memory and load time, perhaps beside other runtimes",
        "pocketslm bench out/smollm2 -p 512 -n 128 -r 5 -t 2 --peer ort-genai",
    )
    sub.add_argument("bundle", type=Path)
    sub.add_argument("-p", "--n-prompt", type=_numbers, default=[512], help="prompt lengths")
    sub.add_argument("-n", "--n-gen", type=_numbers, default=[128], help="generation lengths")
    sub.add_argument("-d", "--n-depth", type=int, help="tokens cached before generation")
    sub.add_argument("-r", "--repetitions", type=int, default=5)
    sub.add_argument("-t", "--threads", type=_numbers, default=[], help="numbers of threads")
    sub.add_argument("-o", "--output", choices=("md", "json", "jsonl", "csv"), default="md")
    sub.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME[=ARTEFACT]",
        help="also run ort-genai, llama.cpp or executorch, and print the ratio",
    )
    sub.add_argument("--source", help="the checkpoint from which peers make their artefact")
    sub.add_argument("--context", type=int, help="a KV cache larger than the tests need")
    sub.add_argument("--timeout", type=float, default=600.0, help="seconds a repetition may take")
    _add_backend(sub)
    return parser


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """What export takes beside the model; optimum's command takes the same."""
    parser.add_argument("out", type=Path, help="the bundle folder to write")
    schemes = ("keep", "int4", "int8", "float")
    parser.add_argument(
        "--weights",
        choices=schemes,
        default="keep",
        help="keep carries quantized source blocks exactly and rounds float weights to int4",
    )
    parser.add_argument(
        "--head",
        choices=schemes,
        default="keep",
        help="embedding and output head; keep rounds a float one to int8",
    )
    parser.add_argument("--group-size", type=int, choices=(32, 64, 128), default=32)
    parser.add_argument("--asymmetric", action="store_true", help="round with a zero point")
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16"), default="fp32", help="of the ONNX graph"
    )
    parser.add_argument("--context", type=int, help="longest sequence (default: up to 4096)")
    parser.add_argument("--target", help="native, onnx or both (default: what covers the model)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
    _add_json(parser)


def _add_generation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation (names and meanings as in transformers)")
    group.add_argument("-n", "--max-new-tokens", type=int)
    group.add_argument("--temperature", type=float, help="0 is greedy")
    group.add_argument("--top-k", type=int)
    group.add_argument("--top-p", type=float)
    group.add_argument("--min-p", type=float)
    group.add_argument("--repetition-penalty", type=float)
    group.add_argument("--seed", type=int)
    group.add_argument("--stop", action="append", default=[], help="text that ends generation")
    group.add_argument("--system", help="a system message")
    _add_backend(parser)
    parser.add_argument("-t", "--threads", type=int, help="threads (default: every core)")
    parser.add_argument("--no-verify", action="store_true", help="do not check SHA-256 at load")


def _add_document(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--document", type=Path, help='UTF-8 text, "-" for standard input (default: a sample)'
    )
    _add_generation(parser)
    _add_json(parser)


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", default="auto", help="native or onnx (default: the bundle's first)"
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _numbers(text: str) -> list[int]:
    """``128,512`` as llama-bench takes it; 0 alone means none."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 128,512") from None
    return [] if numbers == [0] else numbers


if __name__ == "__main__":
    sys.exit(main())
