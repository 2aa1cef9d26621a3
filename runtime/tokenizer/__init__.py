"""Text to token ids and back, from the tokenizer files that Hugging Face writes.

`load_tokenizer(folder)` gives a `Tokenizer`. It encodes with what export packed into a model file,
where a caller has that open; else with the `tokenizers` wheel, where that is installed; else with
the pure Python reader in `bpe`. All give the same ids. Decoding, streaming and chat templates are
one code for all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args

from pocketslm.collector import no_collection
from pocketslm.errors import TokenizerError
from pocketslm.runtime.tokenizer import decoders, fields, normalizers, postprocessors, wheel
from pocketslm.runtime.tokenizer.bpe import PythonEncoder
from pocketslm.runtime.tokenizer.chat import ChatTemplate, Fragment, Message
from pocketslm.runtime.tokenizer.identity import (
    Identity,
    read_identity,
    special_names,
    with_added_tokens,
)
from pocketslm.runtime.tokenizer.packed import (
    NormalizingEncoder,
    PackedTokenizer,
    PackedVocabulary,
    read_head,
)
from pocketslm.runtime.tokenizer.stream import StreamDecoder
from pocketslm.runtime.tokenizer.unicode_classes import WHITE_SPACE, characters
from pocketslm.runtime.tokenizer.vocabulary import Cutter, Vocabulary, any_of

__all__ = ["StreamDecoder", "Tokenizer", "load_tokenizer", "load_tokenizer_files"]

Implementation = Literal["auto", "tokenizers", "python"]

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "config.json",
)
MAX_FILE_BYTES = 256 << 20
_SPACES = characters(WHITE_SPACE)


class Encoder(Protocol):
    """Text to ids; the implementations differ only here."""

    name: str

    def encode(self, text: str, *, parse_special: bool, at_start: bool = True) -> list[int]:
        """The ids of `text`; `at_start` says that nothing stands before it."""


class Tokenizer:
    """The tokenizer of one model; made by `load_tokenizer`.

    Safe to use from several threads.
    """

    def __init__(
        self,
        encoder: Encoder,
        vocabulary: Vocabulary | PackedVocabulary,
        decoder: decoders.Decoder,
        affixes: postprocessors.Affixes,
        variables: Mapping[str, str],
        chat_template: str | None,
        identity: Identity,
    ) -> None:
        self._encoder = encoder
        self._vocabulary = vocabulary
        self._decoder = decoder
        self._affixes = affixes
        self._bytes: dict[tuple[int, bool], bytes] = {}
        self._stripping = {t.id: t for t in vocabulary.added if t.lstrip or t.rstrip}
        self._chat = (
            None
            if not chat_template
            else ChatTemplate(
                chat_template,
                {token.content: token.id for token in vocabulary.added if token.special},
                variables,
            )
        )
        self.identity = identity

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return frozenset(self.identity.eos)

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text; None if there is none."""
        return self.identity.bos

    @property
    def name(self) -> str:
        """The implementation in use: `native`, `tokenizers` or `python`."""
        return self._encoder.name

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._vocabulary.size

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens, which decoding skips by default."""
        return self._vocabulary.special_ids

    @property
    def leading_strip(self) -> tuple[str, int]:
        """A character, and how often it is taken off the start of a decoded text."""
        return self._decoder.strip, self._decoder.strip_count

    @property
    def chat_template(self) -> str | None:
        """The source of the chat template; None if there is none."""
        return self._chat.source if self._chat else None

    @property
    def texts(self) -> Mapping[int, str]:
        """The text of every token, as the vocabulary writes it."""
        return self._vocabulary.texts

    def text_of(self, token_id: int) -> str | None:
        """The text of one token, as the vocabulary writes it; None for an id that is not used."""
        return self._vocabulary.text_of(token_id)

    @property
    def affixes(self) -> tuple[int, ...]:
        """The tokens that `encode` adds before and after a text, where asked to."""
        return (*self._affixes.before, *self._affixes.after)

    def token_id(self, text: str) -> int | None:
        """The id of the token with exactly this text in the vocabulary; None if there is none."""
        return self._vocabulary.id_of(text)

    def encode(
        self, text: str, *, parse_special: bool = False, add_special_tokens: bool = False
    ) -> list[int]:
        """The ids of `text`.

        With `parse_special=False` the text of a special token, such as `<|im_end|>`, is ordinary
        text; use True only for prompts that you wrote. `add_special_tokens` adds what the
        tokenizer's post-processor adds, commonly the beginning-of-sequence token.
        Raises `TokenizerError` for text with lone surrogates, which has no UTF-8 form.
        """
        ids = self._encode(text, parse_special=parse_special, at_start=True)
        return self.with_affixes(ids) if add_special_tokens else ids

    def with_affixes(self, ids: Sequence[int]) -> list[int]:
        """The ids of a text with the tokens that the post-processor adds before and after it."""
        return [*self._affixes.before, *ids, *self._affixes.after]

    def _encode(self, text: str, *, parse_special: bool, at_start: bool) -> list[int]:
        if not isinstance(text, str):
            raise TokenizerError(
                f"cannot encode {type(text).__name__}; expected str; decode the bytes first"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"cannot encode text with the lone surrogate {error.object[error.start]!r}; "
                "expected Unicode text; decode its source with errors='replace'"
            ) from None
        return self._encoder.encode(text, parse_special=parse_special, at_start=at_start)

    def token_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        """The exact bytes that a token stands for inside a text, or with `first` at its start.

        Empty for an id that the vocabulary leaves unused. Raises `TokenizerError` for a
        negative id.
        """
        key = (token_id, first)
        known = self._bytes.get(key)
        if known is None:
            if token_id < 0:
                raise TokenizerError(
                    f"token id {token_id} is negative; expected 0 to {self.vocab_size - 1}; "
                    "check where the ids come from"
                )
            known = self._vocabulary.bytes_of(token_id, self._decoder, first=first)
            if known is None:
                return b""
            self._bytes[key] = known
        return known

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`, with U+FFFD for bytes that are not UTF-8.

        Where byte-fallback tokens do not form UTF-8, Hugging Face's decoder replaces the whole
        run of them, one U+FFFD per byte; this one keeps the characters that are whole.
        """
        skipped = self.special_ids if skip_special_tokens else frozenset()
        kept = [id_ for id_ in ids if id_ not in skipped]
        if not kept:
            return ""
        data = [self.token_bytes(kept[0], first=True), *map(self.token_bytes, kept[1:])]
        text = b"".join(data).decode("utf-8", "replace")
        strip, count = self.leading_strip
        lead = len(text) - len(text.lstrip(strip))
        return text[min(lead, count) :]

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of the prompt that the model's chat template makes of `messages`.

        Special tokens that the template writes are special; special-token text inside messages,
        tools and documents stays ordinary text (see `chat` for how). `tools` are JSON schemas;
        `variables` are further names for the template, such as `enable_thinking`.
        Raises `TokenizerError` where there is no template or it rejects the messages.
        """
        fragments = self._render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=documents,
            variables=variables,
        )
        return self._encode_fragments(fragments)

    def render_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        strftime_now: Callable[[str], str] | None = None,
    ) -> str:
        """The same prompt as text, special tokens written out; for showing, not for encoding.

        `strftime_now` writes dates in it, by default today's.
        """
        fragments = self._render(
            messages, add_generation_prompt=add_generation_prompt, strftime_now=strftime_now
        )
        return "".join(
            part if isinstance(part, str) else self.text_of(part) or "" for part in fragments
        )

    def turn_end(self) -> int | None:
        """The token with which the chat template closes the assistant's turn; None if there is
        none, or no template that takes a question and an answer."""
        if not self._chat:
            return None
        answer = "ANSWER"
        turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": answer})
        try:
            fragments = self._render(turns, add_generation_prompt=False)
        except TokenizerError:
            return None
        for part, following in pairwise([*fragments, ""]):
            if not isinstance(part, str) or answer not in part:
                continue
            rest = part.partition(answer)[2].strip()
            if not rest:
                return following if isinstance(following, int) else None
            written = any_of(token.content for token in self._vocabulary.added)
            match = written.match(rest) if written else None
            return self.token_id(match.group()) if match else None
        return None

    def _render(self, messages: Sequence[Message], **options: Any) -> list[Fragment]:
        if not self._chat:
            raise TokenizerError(
                "the tokenizer has no chat template; expected chat_template.jinja or "
                "'chat_template' in tokenizer_config.json; use an instruction-tuned checkpoint"
            )
        return self._chat.render(messages, **options)

    def _encode_fragments(self, fragments: Sequence[Fragment]) -> list[int]:
        ids: list[int] = []
        for at, part in enumerate(fragments):
            if isinstance(part, int):
                ids.append(part)
                continue
            before = self._stripping.get(cast("int", fragments[at - 1])) if at else None
            after = (
                self._stripping.get(cast("int", fragments[at + 1])) if fragments[at + 1 :] else None
            )
            text = part.lstrip(_SPACES) if before and before.rstrip else part
            text = text.rstrip(_SPACES) if after and after.lstrip else text
            ids += self._encode(text, parse_special=False, at_start=at == 0)
        return ids


def load_tokenizer(
    folder: str | Path,
    implementation: Implementation = "auto",
    packed: PackedTokenizer | None = None,
) -> Tokenizer:
    """The tokenizer in `folder`, from `tokenizer.json` and those of the other `FILES` that it has.

    `implementation` is `tokenizers` (the wheel), `python` (no wheel needed) or `auto`, the wheel
    where it is installed. Both give the same ids. `packed` is what export made of `tokenizer.json`;
    it takes the place of either, which costs neither the time nor the memory of a large file.
    Raises `TokenizerError` for missing or malformed files and unsupported components.
    """
    found: dict[str, bytes] = {}
    for name in FILES:
        path = Path(folder) / name
        try:
            if path.is_file():
                if path.stat().st_size > MAX_FILE_BYTES:
                    raise TokenizerError(
                        f"{path} is larger than {MAX_FILE_BYTES} bytes; expected a tokenizer "
                        "file; fetch or export it again"
                    )
                found[name] = path.read_bytes()
        except OSError as error:
            raise TokenizerError(
                f"{path} cannot be read ({error.strerror}); expected a readable file; "
                "check its permissions"
            ) from None
    if "tokenizer.json" not in found:
        raise TokenizerError(
            f"{Path(folder) / 'tokenizer.json'} does not exist; expected the tokenizer file that "
            "Hugging Face writes; fetch or export the model again"
        )
    if packed is None:
        return _load(found, implementation)
    return _load(found, implementation, (packed, lambda: load_tokenizer(folder, "python").texts))


def load_tokenizer_files(
    files: Mapping[str, bytes | str], implementation: Implementation = "auto"
) -> Tokenizer:
    """Like `load_tokenizer`, from the contents of the files by name."""
    return _load(files, implementation)


@no_collection()
def _load(
    files: Mapping[str, bytes | str],
    implementation: Implementation,
    packed: tuple[PackedTokenizer, Callable[[], Mapping[int, str]]] | None = None,
) -> Tokenizer:
    """`packed` comes with what reads the text of every token."""
    if implementation not in get_args(Implementation):
        raise TokenizerError(
            f"tokenizer implementation {implementation!r} is unknown; expected one of "
            f"{', '.join(get_args(Implementation))}; use 'auto'"
        )
    text = {name: _text(files[name], name) for name in FILES if name in files}
    if "tokenizer.json" not in text:
        raise TokenizerError(
            "tokenizer.json is missing; expected the tokenizer file that Hugging Face writes; "
            "fetch or export the model again"
        )
    config, generation, special_map, model = (
        fields.parse_object(text[name], name) if name in text else {}
        for name in (
            "tokenizer_config.json",
            "generation_config.json",
            "special_tokens_map.json",
            "config.json",
        )
    )
    encoder: Encoder
    vocabulary: Vocabulary | PackedVocabulary
    merged = read_head(text["tokenizer.json"], config, special_map) if packed else None
    if packed and merged is not None:
        encoder, vocabulary = packed[0], PackedVocabulary(merged, *packed)
        if packed[0].takes_normalized:
            normalizer = normalizers.build(merged["normalizer"])
            encoder = NormalizingEncoder(packed[0], Cutter(vocabulary.added, normalizer))
    else:
        document = fields.parse_object(text["tokenizer.json"], "tokenizer.json")
        merged = with_added_tokens(document, config, special_map)
        normalizer = normalizers.build(merged.get("normalizer"))
        vocabulary = Vocabulary(merged, normalizer)
        if _use_wheel(implementation):
            whole = text["tokenizer.json"] if merged == document else json.dumps(merged)
            encoder = wheel.WheelEncoder(whole, merged, vocabulary)
        else:
            encoder = PythonEncoder(merged, vocabulary, normalizer)
    variables = special_names(config, special_map)
    named = {
        name: id_
        for name, token in variables.items()
        if (id_ := vocabulary.id_of(token)) is not None
    }
    return Tokenizer(
        encoder,
        vocabulary,
        decoders.build(merged.get("decoder")),
        postprocessors.build(merged.get("post_processor")),
        variables,
        text.get("chat_template.jinja") or _template_in(config),
        read_identity(generation, model, named),
    )


def _use_wheel(implementation: Implementation) -> bool:
    if implementation == "python":
        return False
    installed = wheel.is_installed()
    if implementation == "tokenizers" and not installed:
        raise TokenizerError(
            "the tokenizers wheel is not installed; expected it for implementation='tokenizers'; "
            "run 'pip install tokenizers' or use implementation='python'"
        )
    return installed


def _text(content: bytes | str, name: str) -> str:
    if isinstance(content, str):
        return content
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"{name} is not UTF-8 (byte {error.start}); expected text; "
            "fetch or export the file again"
        ) from None


def _template_in(config: Mapping[str, object]) -> str | None:
    """The `chat_template` of tokenizer_config.json: one, or the `default` of several."""
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {
            entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)
        }
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise TokenizerError(
            f"tokenizer_config.json: chat_template is {type(value).__name__}; expected a string "
            "or a list with one named 'default'; fetch or export the file again"
        )
    return value
