"""``pocketslm run`` and ``chat``, and what every command that generates shares."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pocketslm.terminal import (
    Commands,
    add_backend,
    add_json,
    add_threads,
    print_json,
    read_input,
    refuse,
    say,
    show,
)

if TYPE_CHECKING:
    from pocketslm.runtime.config import GenerationConfig
    from pocketslm.runtime.model import Model, Record


def add_commands(commands: Commands) -> None:
    parser = commands.add(
        "run",
        _run,
        "answer one prompt",
        'pocketslm run out/smollm2 "Why is the sky blue?" --max-new-tokens 64',
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("prompt", help='the prompt; "-" reads it from standard input')
    parser.add_argument(
        "--text",
        metavar="FILE",
        help='a text that the prompt is about, which follows it; "-" reads it from standard input',
    )
    parser.add_argument("--raw", action="store_true", help="continue the text, no chat template")
    add_prefixes(parser)
    add_system(parser)
    add_generation(parser)
    add_constraint(parser)
    add_json(parser)

    parser = commands.add("chat", _chat, "talk with a model", "pocketslm chat out/smollm2")
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--log",
        type=Path,
        metavar="FILE.jsonl",
        help="append each message to this file, as a line of JSON with its role and content",
    )
    add_prefixes(parser)
    add_system(parser)
    add_generation(parser)
    add_constraint(parser)

    parser = commands.add(
        "embed",
        _embed,
        "print the embedding of each text, as a JSON array on a line of its own",
        'pocketslm embed out/minilm "a cat sleeps" "a kitten naps" --compare',
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "texts", nargs="+", metavar="TEXT", help='"-" alone reads lines from standard input'
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="print the cosine between the first text and each other one instead",
    )
    parser.add_argument(
        "--prompt",
        metavar="NAME",
        help="put this prompt of the bundle's before each text, such as query or passage",
    )
    parser.add_argument(
        "--truncate",
        action="store_true",
        help="cut a text that is too long to its first tokens",
    )
    add_threads(parser)
    add_no_verify(parser)
    parser.set_defaults(backend="auto", adapter=None)


def add_no_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-verify", action="store_true", help="do not check SHA-256 at load")


def add_prefixes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prefixes",
        metavar="FOLDER",
        help="keep what was read of prompts there, and take up what an earlier one that begins "
        "alike left (native)",
    )


def add_system(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", help="a system message")


def add_generation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation (names and meanings as in transformers)")
    group.add_argument("-n", "--max-new-tokens", type=int)
    group.add_argument("--temperature", type=float, help="0 is greedy")
    group.add_argument("--top-k", type=int)
    group.add_argument("--top-p", type=float)
    group.add_argument("--min-p", type=float)
    group.add_argument("--typical-p", type=float)
    group.add_argument("--repetition-penalty", type=float)
    group.add_argument("--seed", type=int)
    group.add_argument(
        "--prompt-lookup",
        type=int,
        metavar="N",
        help="guess at most N tokens at a time, from where the last ones stood before (native and "
        "greedy only; the answer is the same); 0 turns it off (default: as many as pay off)",
    )
    group.add_argument("--stop", action="append", default=[], help="text that ends generation")
    add_backend(parser)
    add_threads(parser)
    parser.add_argument("--adapter", metavar="NAME", help="one of the bundle's LoRA adapters")
    add_no_verify(parser)


def add_constraint(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what the answer must be (docs/how-to/schema.md)")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--json-schema", metavar="FILE", type=Path, help="JSON of this schema")
    one.add_argument(
        "--regex", metavar="TEXT", help="a text that this expression matches as a whole"
    )
    one.add_argument("--grammar", metavar="FILE", type=Path, help="a text of this grammar in GBNF")


def _constraint(arguments: argparse.Namespace) -> dict[str, str | None]:
    """The options of :func:`add_constraint` as those of a GenerationConfig."""
    return {
        "json_schema": _text_of(arguments.json_schema),
        "regex": arguments.regex,
        "grammar": _text_of(arguments.grammar),
    }


def _text_of(path: Path | None) -> str | None:
    from pocketslm.errors import UsageError

    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None


def _run(arguments: argparse.Namespace) -> None:
    if arguments.raw:
        refuse(arguments, "with --raw, which has no messages", "system")
    prompt = _prompt(arguments)
    model = _load_with_prefixes(arguments)
    config = generation_config(arguments, model)
    config = config.but(logprobs=arguments.json, **_constraint(arguments))
    records = (
        model.generate(prompt, config)
        if arguments.raw
        else model.chat([*_system(arguments), {"role": "user", "content": prompt}], config)
    )
    finish(model, stream(records, quiet=arguments.json), arguments.json)


def _prompt(arguments: argparse.Namespace) -> str:
    """The prompt, and the text that it is about."""
    from pocketslm.errors import UsageError

    if arguments.prompt == "-" == arguments.text:
        raise UsageError("standard input is the prompt or the text, not both; name a file")
    prompt: str = read_input("a prompt") if arguments.prompt == "-" else arguments.prompt
    if arguments.text is None:
        return prompt
    file = None if arguments.text == "-" else Path(arguments.text)
    return f"{prompt}\n\n{read_input('a text') if file is None else _text_of(file)}"


def _chat(arguments: argparse.Namespace) -> None:
    from pocketslm.errors import ContextOverflowError, TokenizerError, UsageError

    model = _load_with_prefixes(arguments)
    config = generation_config(arguments, model).but(**_constraint(arguments))
    messages = _system(arguments)
    _log(arguments.log, messages)  # now, so that a file that cannot be written is said at once
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a byte that is no UTF-8 must not end the chat
    say(f"{model.name}, context {model.context}. Ctrl-D ends, Ctrl-C stops.")
    while (question := _question()) is not None:
        if not question.strip():
            continue
        messages.append({"role": "user", "content": question})
        try:
            messages = _fitting(model, messages, config)
            answer = stream(model.chat(messages, config))
        except (ContextOverflowError, TokenizerError, UsageError) as error:
            say(f"not answered: {error}")
            messages.pop()
            continue
        if not answer.records:  # stopped before the first token
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer.text})
        _log(arguments.log, messages[-2:])
        finish(model, answer)


def _log(file: Path | None, messages: Sequence[dict[str, str]]) -> None:
    """Append messages to a log, if there is one."""
    from pocketslm.errors import UsageError

    if file is None:
        return
    lines = [json.dumps(message, ensure_ascii=False) + "\n" for message in messages]
    try:
        with file.open("a", encoding="utf-8") as log:
            log.writelines(lines)
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}; choose another") from None


def _embed(arguments: argparse.Namespace) -> None:
    from pocketslm.errors import UsageError
    from pocketslm.runtime.embedding import cosines

    texts = arguments.texts
    if texts == ["-"]:
        texts = read_input("texts").splitlines()
    if len(texts) < 2 and arguments.compare:
        raise UsageError(f"--compare needs at least two texts, not {len(texts)}")
    vectors = load(arguments).embed(texts, prompt=arguments.prompt, truncate=arguments.truncate)
    if arguments.compare:
        for text, cosine in zip(texts[1:], cosines(vectors), strict=True):
            show(f"{cosine:.4f}  {text}")
        return
    for vector in vectors:  # the shortest digits that give the same float again
        show(json.dumps([float(str(value)) for value in vector]))


def _question() -> str | None:
    """The next line, None at the end of the input."""
    if sys.stdin is None:
        return None
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _fitting(
    model: Model, messages: list[dict[str, str]], config: GenerationConfig
) -> list[dict[str, str]]:
    """See `Model.fitting`; what is forgotten is said."""
    kept = model.fitting(messages, config)
    if dropped := (len(messages) - len(kept)) // 2:
        turns = "turn" if dropped == 1 else f"{dropped} turns"
        say(f"[the context of {model.context} is full: the oldest {turns} forgotten]")
    return kept


def load(arguments: argparse.Namespace) -> Model:
    from pocketslm.runtime.bundle import open_bundle
    from pocketslm.runtime.model import Model
    from pocketslm.runtime.ops.built import built_library

    if arguments.backend in ("auto", "native") and built_library() is None:
        graph = open_bundle(arguments.bundle, verify=False).graph(arguments.backend)
        if graph.backend == "native":
            say("compiling the native operators, once ...")
    return Model.load(
        arguments.bundle,
        arguments.backend,
        arguments.threads,
        adapter=arguments.adapter,
        verify=not arguments.no_verify,
    )


def _load_with_prefixes(arguments: argparse.Namespace) -> Model:
    model = load(arguments)
    if arguments.prefixes is not None:
        model.use_prefixes(arguments.prefixes)
    return model


def _system(arguments: argparse.Namespace) -> list[dict[str, str]]:
    return [{"role": "system", "content": arguments.system}] if arguments.system else []


def generation_config(
    arguments: argparse.Namespace, model: Model, base: GenerationConfig | None = None
) -> GenerationConfig:
    """The model's own settings, changed by options; a sampling option switches sampling on."""
    from pocketslm.runtime.model import SAMPLING

    sampling = {name: getattr(arguments, name) for name in SAMPLING}
    if arguments.temperature == 0:
        others = [name for name in SAMPLING if name != "temperature"]
        refuse(arguments, "with --temperature 0, which draws nothing", *others)
        sampling = {"do_sample": False}
    elif any(value is not None for value in sampling.values()):
        sampling["do_sample"] = True
    return (base or model.defaults).but(
        max_new_tokens=arguments.max_new_tokens,
        repetition_penalty=arguments.repetition_penalty,
        prompt_lookup_num_tokens=arguments.prompt_lookup,
        stop_strings=tuple(arguments.stop) or None,  # given ones replace the defaults
        **sampling,
    )


class Answer:
    """What came of a generation: its text so far, records and whether Ctrl-C cut it short."""

    def __init__(self) -> None:
        self.text = ""
        self.records: list[Record] = []
        self.interrupted = False


def stream(records: Iterator[Record], *, quiet: bool = False) -> Answer:
    """Print text as it comes; Ctrl-C ends the generation and keeps what there is."""
    answer = Answer()
    try:
        for record in records:
            answer.records.append(record)
            answer.text += record.text
            if not quiet:
                show(record.text, end="")
    except KeyboardInterrupt:
        answer.interrupted = True
    if not quiet:
        show("")
    return answer


def finish(model: Model, answer: Answer, as_json: bool = False) -> None:
    """Report what an answer took, and on which backend."""
    count = len(answer.records)
    if not count and answer.interrupted:
        raise KeyboardInterrupt
    assert count, "a generation ends with a record"
    first, last = answer.records[0], answer.records[-1]
    ttft_ms = first.time_ns / 1e6
    decode_s = (last.time_ns - first.time_ns) / 1e9
    decode_tps = (count - 1) / decode_s if decode_s else None
    finish = "interrupted" if answer.interrupted else last.finish
    if as_json:
        print_json(
            {
                "text": answer.text,
                "tokens": [record.token for record in answer.records],
                "logprobs": [record.logprob for record in answer.records],
                "finish": finish,
                "backend": model.backend,
                "ttft_ms": ttft_ms,
                "decode_tps": decode_tps,
            }
        )
        return
    speed = f", {decode_tps:.1f} tok/s" if decode_tps else ""
    say(f"[{model.backend}: {count} tokens, TTFT {ttft_ms:.0f} ms{speed}, finish: {finish}]")
