"""A loaded bundle: prompts in, streamed text out; or texts in, embeddings out."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, TypeVar, runtime_checkable

from pocketslm.errors import BackendError, BundleError, UsageError
from pocketslm.models.config import Pooling
from pocketslm.runtime.adapters import PREFIX, SUFFIX, read_updates
from pocketslm.runtime.answer import Finish, Limiting, Step
from pocketslm.runtime.arrays import np
from pocketslm.runtime.backends import (
    AdapterSession,
    PackedSession,
    SavingSession,
    Session,
    SlotSession,
    open_session,
)
from pocketslm.runtime.batching import Batch
from pocketslm.runtime.bundle import Bundle, open_bundle
from pocketslm.runtime.config import GenerationConfig, generation_defaults
from pocketslm.runtime.embedding import Vector, embed, tokens_of
from pocketslm.runtime.generation import Engine
from pocketslm.runtime.prefixes import ANYONE, Keeping, Prefixes
from pocketslm.runtime.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from pocketslm.runtime.tokenizer.vocabulary import any_of
from pocketslm.runtime.tool_formats import Call

if TYPE_CHECKING:  # it loads the native library
    from pocketslm.runtime.constraint import TokenTexts

Message = TypeVar("Message", bound=Mapping[str, Any])
# Options that ask for drawing.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed")


class Record(NamedTuple):
    """One generated token and the text that became certain with it (see Step for the rest)."""

    token: int
    text: str
    logprob: float | None
    time_ns: int
    finish: Finish | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer.

    finish: None where it was cancelled. prompt_tokens: how many it answers. calls: of tools, where
    there were any; the text is then what stands beside them.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Finish | None
    prompt_tokens: int
    calls: tuple[Call, ...] = ()

    def __str__(self) -> str:
        return self.text


Prompt = str | Sequence[Mapping[str, Any]]
"""A text, which is one message of a user where the model has a chat template, or messages."""

_MARK = re.compile("[\udc00-\udfff]")


class TextModel(Protocol):
    """What generates text, as the document assistant needs it.

    `Model` is one, in this process; a client of ``pocketslm-run`` in a child process is another.
    Closing the generator that ``generate`` returns stops the generation.
    """

    @property
    def name(self) -> str:
        """The model's name, by which prompts are chosen."""
        ...

    @property
    def backend(self) -> str:
        """What runs it, for people to read."""
        ...

    @property
    def context(self) -> int:
        """The longest sequence in tokens: prompt and new ones."""
        ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    def generate(
        self, prompt: str | Sequence[int], config: GenerationConfig | None = None
    ) -> Iterator[Record]:
        """See `Model.generate`."""
        ...


@runtime_checkable
class ScoringModel(TextModel, Protocol):
    """A model that also says how probable a text is, to rank by it."""

    def logprobs(self, ids: Sequence[int], following: Sequence[int]) -> Vector:
        """See `Model.logprobs`."""
        ...


class Model:
    """A bundle ready to generate or to embed: session, cache and tokenizer.

    Any thread may call it: generations and changes of the adapter come after each other, as
    :class:`pocketslm.runtime.generation.Engine` says, or ``parallel`` generations are made at once,
    as :class:`pocketslm.runtime.batching.Batch` says.

    defaults: the model's own sampling settings, from its ``generation_config.json``.
    """

    def __init__(self, bundle: Bundle, engine: Engine | Batch, tokenizer: Tokenizer) -> None:
        self.bundle = bundle
        self.engine = engine
        self.tokenizer = tokenizer
        self.defaults = generation_defaults(bundle.path)
        self._token_texts: TokenTexts | None = None
        self._numbers: dict[str, int] = {}  # of adapters that the session knows
        self._fresh = count(1)  # numbers for others
        self._prefixes: Prefixes | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        backend: str = "auto",
        threads: int | None = None,
        context: int | None = None,
        *,
        adapter: str | None = None,
        prefixes: Prefixes | str | Path | None = None,
        verify: bool = True,
        parallel: int = 1,
    ) -> Model:
        """Load a bundle folder.

        threads: None takes every core. context: a smaller KV cache than the graph allows.
        adapter: see :meth:`use_adapter`. prefixes: see :meth:`use_prefixes`. verify: compare every
        file with its SHA-256. parallel: how many generations are made at once, each with a KV cache
        of its own, where the backend can; ``model.parallel`` says how many. Raises BundleError,
        BackendError, TokenizerError, UsageError.
        """
        bundle = open_bundle(path, verify=verify)
        session = open_session(bundle, backend, threads, context, parallel)
        packed = session.tokenizer() if isinstance(session, PackedSession) else None
        tokenizer = load_tokenizer(bundle.path, packed=packed)
        engine: Engine | Batch = Engine(session)
        if isinstance(session, SlotSession) and len(session.slots) > 1:
            engine = Batch(session)
        model = cls(bundle, engine, tokenizer)
        if adapter is not None:
            model.use_adapter(adapter)
        if prefixes is not None:
            model.use_prefixes(prefixes)
        return model

    @property
    def adapters(self) -> Collection[str]:
        """The names of the LoRA adapters that it can answer with."""
        known = isinstance(self.engine.session, AdapterSession)
        return list(self.bundle.adapters) if known else ()

    def use_adapter(self, name: str | None) -> None:
        """Answer with one of the bundle's LoRA adapters from now on, unless an answer asks for
        another (`GenerationConfig.adapter`); None: as the base does.

        The base's weights stay as they are: without an adapter its numbers are the same bits as
        before. Raises BundleError for a name that the bundle does not have, BackendError where the
        backend cannot add adapters.
        """
        self.engine.use_adapter(self._number(name or ""))

    def _number(self, name: str) -> int:
        """The session's number of an adapter, which is read when it is first asked for; of "" 0."""
        session, adapters = self.engine.session, self.bundle.adapters
        if not name:
            return 0
        if name not in adapters:
            known = ", ".join(adapters) or "none"
            raise BundleError(f"{self.bundle.path} has no adapter {name!r}, it has: {known}")
        if not isinstance(session, AdapterSession):
            raise BackendError(f"{session.backend} cannot add adapters; use --backend native")
        if name not in self._numbers:
            updates, number = (
                read_updates(adapters[name], self.bundle.layer_runs),
                next(self._fresh),
            )
            session.set_adapter(number, updates)
            if self._numbers.setdefault(name, number) != number:  # another thread was faster
                session.set_adapter(number, [])
        return self._numbers[name]

    @property
    def keeps_prefixes(self) -> bool:
        """Whether :meth:`use_prefixes` works with its backend."""
        return isinstance(self.engine.session, SavingSession) and self.bundle.manifest is not None

    def use_prefixes(self, prefixes: Prefixes | str | Path | None) -> None:
        """Take up what earlier prompts, also of other processes, have in common with a new one.

        prefixes: where their states are kept: a folder, or a store with limits of its own, which
        models may share. None: only the last sequence counts. Raises BackendError where the backend
        cannot save states, UsageError for a folder that cannot be made.
        """
        if not self.keeps_prefixes:
            raise BackendError(f"{self.backend} cannot keep prefixes; use --backend native")
        store = Prefixes(prefixes) if isinstance(prefixes, str | Path) else prefixes
        with self.engine.exclusive():
            self._keep_in(store)

    def _keep_in(self, store: Prefixes | None) -> None:
        self._prefixes, bundle = store, self.bundle
        self.engine.keep_with(None)
        if store is None or not isinstance(self.engine.session, SavingSession):
            return
        assert bundle.manifest is not None
        assert bundle.config is not None
        sums = {name: entry.sha256 for name, entry in bundle.manifest.files.items()}
        model, forgets = sums[bundle.graph("native").file], bundle.config.forgets

        def keeping(session: Session, adapter: int) -> Keeping:
            assert isinstance(session, SavingSession)
            files = {number: f"{PREFIX}{name}{SUFFIX}" for name, number in self._numbers.items()}
            return Keeping(store, session, model, sums[files[adapter]] if adapter else "", forgets)

        self.engine.keep_with(keeping)

    def keep_prefix(self, tokens: Sequence[int], name: str = ANYONE) -> bool:
        """Read the beginning of prompts to come, and keep its state where ``use_prefixes`` says.

        name: of what it belongs to, for `Prefixes.forget`. False where there is no room for it.
        Raises UsageError without a place for prefixes, ContextOverflowError.
        """
        self.need_head("keep a prefix")
        return self.engine.keep_prefix(tokens, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give memory and threads back; later calls raise UsageError."""
        self.engine.close()

    def cancel(self) -> None:
        """End what is made now, after the token that is being made; from any thread."""
        self.engine.cancel()

    @property
    def name(self) -> str:
        return self.bundle.name

    @property
    def backend(self) -> str:
        return self.engine.session.backend

    @property
    def context(self) -> int:
        return self.engine.session.context

    @property
    def parallel(self) -> int:
        """How many generations are made at once; others come after them."""
        return self.engine.parallel

    def embed(
        self, texts: Sequence[str], *, prompt: str | None = None, truncate: bool = False
    ) -> Vector:
        """The embeddings [texts, size] of a model of embeddings, as its pooling says.

        Each text is read for itself, and no text of a special token in it is special. ``prompt``:
        the name of the bundle's prompt that is put before each text, such as ``query`` or
        ``passage``; :attr:`embedding_prompts` lists them. ``truncate``: of a text longer than the
        model reads, the first tokens count, as in sentence-transformers. Raises UsageError where
        the model generates text, has no such prompt or a text has no tokens, and
        ContextOverflowError, before anything runs, where a text is too long.
        """
        return self.embed_tokens(self.tokens_to_embed(texts, prompt=prompt, truncate=truncate))

    @property
    def embedding_prompts(self) -> Mapping[str, str]:
        """What :meth:`embed` can put before a text, by name. Raises as it does."""
        return self._pooling().prompts

    def embed_tokens(self, ids: Sequence[Sequence[int]]) -> Vector:
        """The embeddings [texts, size] of what :meth:`tokens_to_embed` gives."""
        pooling = self._pooling()
        assert self.bundle.config is not None
        size = self.bundle.config.hidden_size
        vectors = np.empty((len(ids), size), np.float32)
        session = self.engine.session
        with self.engine.exclusive():
            for row, tokens in zip(vectors, ids, strict=True):
                session.truncate(0)
                row[:] = embed(session, tokens, pooling, size)
        return vectors

    def tokens_to_embed(
        self, texts: Sequence[str], *, prompt: str | None = None, truncate: bool = False
    ) -> list[list[int]]:
        """The ids that :meth:`embed` reads of each text. Raises as it does."""
        pooling = self._pooling()
        if isinstance(texts, str):
            raise UsageError("embed takes a list of texts, not one text")
        before = "" if prompt is None else pooling.prompt(prompt)
        return [
            tokens_of(
                before + text, number, self.tokenizer, pooling, self.context, truncate=truncate
            )
            for number, text in enumerate(texts, 1)
        ]

    def _pooling(self) -> Pooling:
        config = self.bundle.config
        if config is None or config.pooling is None:
            raise UsageError(
                f"{self.name} generates text, it has no embeddings; use a model such as "
                "all-minilm-l6-v2"
            )
        return config.pooling

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text; names of special tokens in it stay ordinary text."""
        return self.tokenizer.encode(text)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of ids, to which special tokens add nothing."""
        return self.tokenizer.decode(tokens)

    def options(
        self,
        config: GenerationConfig | None = None,
        *,
        stop: str | Sequence[str] | None = None,
        **changes: Any,
    ) -> GenerationConfig:
        """The model's own settings, or ``config``, with changes.

        stop: text that ends an answer, or several. Of the others, names and meanings are those of
        :class:`pocketslm.runtime.config.GenerationConfig`; a temperature other than 0, or another
        option of sampling, draws tokens unless ``do_sample`` says otherwise. Raises UsageError.
        """
        if stop is not None:
            changes["stop_strings"] = (stop,) if isinstance(stop, str) else tuple(stop)
        if changes.get("temperature") == 0:
            changes.setdefault("do_sample", False)
        elif any(changes.get(name) is not None for name in SAMPLING):
            changes.setdefault("do_sample", True)
        return (config or self.defaults).but(**changes)

    def reply(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str = "auto",
        **options: Any,
    ) -> Reply:
        """The whole answer to a text or messages.

        tools: functions that the answer may call, as in transformers and OpenAI's interface; the
        model's template shows them. tool_choice: "auto", "none", "required", or the name of the
        tool to call. options: as in :meth:`options`. Raises UsageError, ContextOverflowError,
        TokenizerError.
        """
        if tools and tool_choice != "none":
            from pocketslm.runtime.tools import reply_with_tools

            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            return reply_with_tools(
                self, messages, tools, tool_choice, self.options(config, **options)
            )
        ids = self.prompt_ids(prompt)
        records = list(self.generate(ids, self.options(config, **options)))
        return Reply(
            "".join(record.text for record in records),
            tuple(record.token for record in records),
            records[-1].finish if records else None,
            len(ids),
        )

    def stream(
        self, prompt: Prompt, config: GenerationConfig | None = None, **options: Any
    ) -> Iterator[str]:
        """The same answer as pieces of text, as they become certain; closing it ends it."""
        records = self.generate(self.prompt_ids(prompt), self.options(config, **options))
        return (record.text for record in records if record.text)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The ids of what :meth:`reply` answers."""
        self.need_head("reply")
        if not isinstance(prompt, str):
            return self.tokenizer.apply_chat_template(list(prompt))
        if self.tokenizer.chat_template is None:
            return self.tokenizer.encode(prompt, add_special_tokens=True)
        return self.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])

    def fitting(
        self, messages: Sequence[Message], config: GenerationConfig | None = None
    ) -> list[Message]:
        """The messages without the oldest turns, as far as they leave no room for an answer of
        ``max_new_tokens``, or an eighth of the context.

        A turn is a user's message and what follows it; system messages before them and the last
        turn stay.
        """
        room = (config or self.defaults).max_new_tokens or max(1, self.context // 8)
        kept = list(messages)
        turns = [at for at, message in enumerate(kept) if message["role"] == "user"]
        while len(turns) > 1 and len(self.prompt_ids(kept)) + room > self.context:
            size = turns[1] - turns[0]
            del kept[turns[0] : turns[1]]
            turns = [at - size for at in turns[1:]]
        return kept

    def generate(
        self, prompt: str | Sequence[int], config: GenerationConfig | None = None
    ) -> Iterator[Record]:
        """Continue a text or token ids; yields a record for each token as it is made.

        A record's logprob is None unless ``config.logprobs`` asks for it.
        The records' texts joined are the generated text: no character is ever split, and a stop
        string is held back until it is certain that it does not come. Text of a special token
        inside ``prompt`` stays ordinary text; give ids to use special tokens. A stop string may
        hold special tokens, though they are no text of the answer. Raises UsageError where the
        model gives embeddings, and where ``config`` holds the answer to a schema, an expression or
        a grammar that is wrong or not supported.
        """
        return _made(self.records(prompt, config))

    def records(
        self, prompt: str | Sequence[int], config: GenerationConfig | None = None
    ) -> Iterator[Record | None]:
        """What :meth:`generate` yields, and, of a model of several answers at once, None where what
        comes next is still to be made, so that a thread which makes several can take turns."""
        self.need_head("generate")
        config = config or self.defaults
        ids = (
            self.tokenizer.encode(prompt, add_special_tokens=True)
            if isinstance(prompt, str)
            else list(prompt)
        )
        eos = self.tokenizer.eos_token_ids
        adapter = None if config.adapter is None else self._number(config.adapter)
        steps = self.engine.generate(ids, config, eos, self._limiting(config), adapter)
        stops, marks = _marked_stops(config.stop_strings, self.tokenizer)
        return _with_text(steps, StreamDecoder(self.tokenizer), stops, marks)

    def logprobs(self, ids: Sequence[int], following: Sequence[int]) -> Vector:
        """How probable each of the tokens ``following`` is after ``ids``, as natural logarithms.

        What a text shares with the one before it is not read again. Raises UsageError of a model of
        embeddings, of one of several answers at once, and where either text is empty, and
        ContextOverflowError.
        """
        self.need_head("logprobs")
        if not isinstance(self.engine, Engine):
            raise UsageError("a model of several answers at once scores no texts; load another")
        return self.engine.logprobs(ids, following)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], config: GenerationConfig | None = None
    ) -> Iterator[Record]:
        """Answer a conversation ({"role", "content"} messages) through the chat template."""
        self.need_head("chat")
        return self.generate(self.tokenizer.apply_chat_template(list(messages)), config)

    def _limiting(self, config: GenerationConfig) -> Callable[[], Limiting] | None:
        """What makes the constraint that the configuration asks for; its grammar is read now."""
        if config.constraint is None or self.engine.follows_by_itself:
            return None
        from pocketslm.runtime.constraint import Constraint, TokenTexts, read_grammar

        grammar = read_grammar(*config.constraint)
        if self._token_texts is None:
            self._token_texts = TokenTexts.of(self.tokenizer, self.engine.session.vocab_size)
        texts = self._token_texts
        return lambda: Constraint(grammar, texts)

    def need_head(self, what: str) -> None:
        """UsageError where ``what`` needs a model that generates text and this one does not."""
        if self.bundle.config is not None:
            self.bundle.config.need_head(what)


def _made(records: Iterator[Record | None]) -> Iterator[Record]:
    with closing(records):  # type: ignore[type-var]
        for record in records:
            if record is not None:
                yield record


def _with_text(
    steps: Generator[Step | None, None, None],
    decoder: StreamDecoder,
    stop_strings: tuple[str, ...],
    marks: Mapping[int, str] | None = None,
) -> Iterator[Record | None]:
    held, marks = "", marks or {}
    for step in steps:
        if step is None:
            yield None
            continue
        mark = "" if step.finish == "eos" else marks.get(step.token, "")
        if step.finish != "eos" and not mark:
            held += decoder.push(step.token)
        if step.finish or mark in stop_strings:  # what ends the text lets its last character out
            held += decoder.flush()
        held += mark
        finish = step.finish
        if not stop_strings:
            text, held = held, ""
        elif (end := _stop_at(held, stop_strings)) is not None:
            text, finish = held[:end], "stop"
        elif finish:
            text = held
        else:
            certain = len(held) - _possible_stop(held, stop_strings)
            text, held = held[:certain], held[certain:]
        if finish:
            steps.close()  # whoever waits for the session need not wait for the caller
        if marks:
            text = _MARK.sub("", text)
        yield Record(step.token, text, step.logprob, step.time_ns, finish)
        if finish:
            return


def _marked_stops(
    stop_strings: tuple[str, ...], tokenizer: Tokenizer
) -> tuple[tuple[str, ...], dict[int, str]]:
    """The stop strings, also with marks for their special tokens, and those marks by token.

    A mark is a lone surrogate, which no decoded text has. So a special token is found and never
    shown, and neither it nor its text is taken for the other.
    """
    texts = {
        text: id_
        for id_ in tokenizer.special_ids
        if (text := tokenizer.text_of(id_)) and any(text in stop for stop in stop_strings)
    }
    special = any_of(texts)
    if special is None:
        return stop_strings, {}
    marks = {id_: chr(0xDC00 + number) for number, id_ in enumerate(texts.values())}
    marked = [special.sub(lambda match: marks[texts[match.group()]], stop) for stop in stop_strings]
    return (*stop_strings, *marked), marks


def _stop_at(text: str, stop_strings: tuple[str, ...]) -> int | None:
    """Where the first stop string in ``text`` begins."""
    found = [at for stop in stop_strings if (at := text.find(stop)) >= 0]
    return min(found, default=None)


def _possible_stop(text: str, stop_strings: tuple[str, ...]) -> int:
    """How many characters at the end of ``text`` could be the beginning of a stop string."""
    longest = 0
    for stop in stop_strings:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest
