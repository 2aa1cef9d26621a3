"""Time and memory of the readers on the worst files of 1 MB that we know, and on a log of 16 MB.

    python -m tests.worst

Each case runs in a process of its own; CPU seconds and resident memory are those of reading alone.
What takes more than 2 s or 300 MB (10 s for the log) is marked, and the status is 1. A case that is
refused counts as read.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import support
import support_documents
from pocketslm.errors import PocketSlmError
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.profiling.llama_bench import read_rows
from pocketslm.profiling.memory import parse_status
from pocketslm.profiling.report import write_report
from pocketslm.runtime.adapters import read_updates
from pocketslm.runtime.assistant.library import Library
from pocketslm.runtime.assistant.readers import docx, epub, html, markdown, pdf, read_bytes, text
from pocketslm.runtime.bundle import open_bundle
from pocketslm.runtime.tokenizer import load_tokenizer_files
from support_documents import WORD, zipped

MB = 1 << 20
MOST_SECONDS, MOST_BYTES, LOG_SECONDS = 2.0, 300 * MB, 10.0
Case = tuple[str, Callable[[], object]]
READERS = (docx, epub, html, markdown, pdf, text)  # imported before the clock starts


def full(piece: str, before: str = "", after: str = "", size: int = MB) -> bytes:
    """A piece repeated up to ``size`` bytes."""
    data = piece.encode()
    room = size - len(before.encode()) - len(after.encode())
    return before.encode() + data * (room // len(data)) + after.encode()


TEXTS = {
    "one line": "word ",
    "short lines": "a\n",
    "lines of 80": "x" * 39 + " " + "y" * 39 + "\n",
    "spaces": " ",
    "one word": "x",
    "sentences": "A. ",
    "no sentence": "a b, ",
    "empty lines": "\n",
    "paragraphs": "a\n\n",
    "pages": "a\f",
    "numbered": "1. a\n",
    "dashes": "-\n",
    "tabs": "\t",
    "dots": ".",
    "quotes": '"\u201c',
    "hyphens": "a-\n",
    "capitals": "Ab ",
}
MARKS = {
    "brackets": "[",
    "images": "![",
    "links": "[a](",
    "link ends": "](",
    "comments": "<!--",
    "heading": "# a" + " " * 2000 + "b\n",
    "bold": "**a ",
    "underscores": "_a",
    "stars": "*",
    "ticks": "`a",
    "tick runs": "``` `` ",
    "fences": "```\n",
    "quotes": "> ",
    "quoted lines": "> a\n",
    "lists": "- a\n",
    "nested lists": "  - a\n    - b\n",
    "tables": "|a|b|\n|-|-|\n",
    "pipes": "|",
    "rules": "---\n",
    "titles": "a\n===\n",
    "tags": "<b>",
    "open tags": "<a ",
    "entities": "&amp;",
    "open entities": "&",
    "escapes": "\\*",
    "addresses": "http://a.b/c ",
    "notes": "[^1]: a\n",
    "html": "<div>\n",
    "lines": "a\n",
    "spaces": " ",
    "definitions": "[a]: <b\n",
    "autolinks": "<http://a",
}
TAGS = {
    "comments": "<!--",
    "open tags": "<a ",
    "paragraphs": "<p>",
    "paragraphs of text": "<p>a",
    "ends": "</p",
    "headings": "<h1>a</h1>",
    "nested": "<div>",
    "scripts": "<script>",
    "open quotes": "<a b='",
    "attributes": "<a b=c d=e>",
    "less": "<",
    "entities": "&#x41;",
    "long entities": "&#" + "9" * 50 + ";",
    "ampersands": "&",
    "sections": "<![CDATA[",
    "declarations": "<!x>",
    "instructions": "<?x ",
    "tables": "<tr><td>a",
    "breaks": "<br>",
    "selects": "<select><option>",
    "white space": " \n",
    "equals": "<a =",
    "text": "word ",
    "charsets": "charset=",
    "titles": "<title>",
}
PARTS = {
    "paragraphs": "<w:p/>",
    "paragraphs of text": "<w:p><w:r><w:t>a</w:t></w:r></w:p>",
    "runs": "<w:t>a</w:t>",
    "tabs": "<w:tab/>",
    "cells": "<w:tc/>",
    "rows": "<w:tr><w:tc><w:p><w:t>a</w:t></w:p></w:tc></w:tr>",
    "pages": '<w:br w:type="page"/>',
    "styles": '<w:pStyle w:val="Heading1"/>',
    "attributes": "<w:t " + " ".join(f'w:a{n}="1"' for n in range(200)) + "/>",
    "namespaces": '<w:t xmlns:a="b"/>',
    "spaces": "<w:t> </w:t>",
    "boxes": "<w:txbxContent><w:p><w:t>a</w:t></w:p></w:txbxContent>",
    "text": "word ",
}


def _documents() -> Iterator[Case]:
    for kind, pieces in (("txt", TEXTS), ("md", MARKS | TEXTS), ("html", TAGS)):
        for name, piece in pieces.items():
            yield f"{kind} {name}", lambda k=kind, p=piece: read_bytes(full(p), f"a.{k}")
    before, after = (
        f'<w:document xmlns:w="{WORD}"><w:body>',
        "</w:body></w:document>",
    )
    for name, piece in PARTS.items():
        # MB, of which the file is a thousandth or so.
        for size in (8, 120):
            yield (
                f"docx {name}, {size} MB",
                lambda p=piece, s=size: _docx(full(p, before, after, s * MB), zipfile.ZIP_DEFLATED),
            )
    yield (
        "docx paragraphs by bzip2",
        lambda: _docx(full("<w:p/>", before, after, 60 * MB), zipfile.ZIP_BZIP2),
    )
    yield (
        "docx of 9,999 members",
        lambda: read_bytes(
            zipped({"word/document.xml": b"<a/>"} | {f"{n}": b"" for n in range(9998)}),
            "a.docx",
        ),
    )
    for name, piece in TAGS.items():
        yield f"epub {name}, 60 MB", lambda p=piece: _epub([full(p, size=60 * MB)])
    yield "epub of 4,000 chapters", lambda: _epub([b"<p>a</p>"] * 4000)
    yield "epub of 200 chapters of 1 MB", lambda: _epub([full("<p>", size=MB)] * 200)
    yield (
        "epub with a long list",
        lambda: _epub([b"<p>a"], full('<itemref idref="c0"/>', size=60 * MB)),
    )
    yield from _pdfs()
    log = "".join(
        f"2030-01-02 03:{n % 60:02}:04 host service[{n}]: request {n} took {n % 97} ms\n"
        for n in range(250_000)
    ).encode()[: 16 * MB]
    yield "log of 16 MB", lambda: read_bytes(log, "a.log")
    yield "log of 16 MB, indexed", lambda: Library(":memory:").add(read_bytes(log, "a.log"))


def _docx(xml: bytes, method: int) -> object:
    return read_small(zipped({"word/document.xml": xml}, method), "a.docx")


def _epub(chapters: list[bytes], more: bytes = b"") -> object:
    files = {
        "META-INF/container.xml": b'<a><rootfile full-path="c.opf"/></a>',
        "c.opf": b"<package><manifest>%b</manifest><spine>%b%b</spine></package>"
        % (
            b"".join(
                b'<item id="c%d" href="c%d" media-type="text/html"/>' % (n, n)
                for n in range(len(chapters))
            ),
            b"".join(b'<itemref idref="c%d"/>' % n for n in range(len(chapters))),
            more,
        ),
    }
    files |= {f"c{n}": chapter for n, chapter in enumerate(chapters)}
    return read_small(zipped(files), "a.epub")


def read_small(data: bytes, name: str) -> object:
    """Only files of at most 1 MB count; the clock starts here."""
    if len(data) > MB:
        raise AssertionError(f"{len(data)} bytes")
    _begin()
    return read_bytes(data, name)


def _pdfs() -> Iterator[Case]:
    make = support_documents.pdf_file
    for name, content in {
        "operators": b"q Q ",
        "text": b"(a) Tj ",
        "moves": b"1 0 0 1 5 5 cm ",
        "open strings": b"(",
        "arrays": b"[(a) 1] TJ ",
        "numbers": b"1 ",
        "names": b"/a ",
        "dictionaries": b"<<",
        "fonts": b"/F1 1 Tf (a) Tj ",
    }.items():
        for size in (1, 64):
            stream = b"BT " + content * (size * MB // len(content))
            yield (
                f"pdf {name}, {size} MB packed",
                lambda s=stream: read_small(make([zlib.compress(s, 9)], "/FlateDecode"), "a.pdf"),
            )
    twice = zlib.compress(zlib.compress(b"a" * (400 * MB), 9), 9)
    yield (
        "pdf packed twice",
        lambda: read_small(make([twice], "[/FlateDecode /FlateDecode]"), "a.pdf"),
    )
    shared = zlib.compress(b"BT " + b"(a) Tj " * 100_000, 9)
    yield (
        "pdf of 200 pages of much",
        lambda: read_small(make([shared] * 200, "/FlateDecode"), "a.pdf"),
    )
    strings = (f"<{n * 2654435761 % 2**32:08x}> Tj T*" for n in range(150_000))
    book = b"BT /F1 10 Tf 12 TL " + " ".join(strings).encode()
    yield (
        "pdf of many strings",
        lambda: read_small(make([zlib.compress(book, 9)], "/FlateDecode"), "a.pdf"),
    )
    for name, form in {
        "text": b"BT " + b"(a) Tj " * 10_000,
        "numbers": b"1 " * 100_000,
        "images": b"BI /W 1 ID a EI " + b"1 " * 100_000,
        "nothing": b"q",
    }.items():
        yield (
            f"pdf form of {name}",
            lambda f=form: read_small(support_documents.pdf_of_forms(f), "a.pdf"),
        )
    yield "pdf of 3,000 pages", lambda: read_small(make(["a"] * 3000), "a.pdf")
    runs = bytes([129, 65]) * (MB // 2 - 1000)
    yield "pdf run lengths", lambda: read_small(make([runs], "/RunLengthDecode"), "a.pdf")
    hexes = b"28" * (MB // 2 - 1000)
    yield "pdf hexadecimal", lambda: read_small(make([hexes], "/ASCIIHexDecode"), "a.pdf")
    yield (
        "pdf objects",
        lambda: read_small(b"%PDF-1.4\n" + full("1 0 obj<<>>endobj\n", size=MB - 100), "a.pdf"),
    )
    yield "pdf nothing", lambda: read_small(b"%PDF-1.4\n" + full("xref\n", size=MB - 100), "a.pdf")
    deep = b"%PDF-1.4\n1 0 obj" + b"[" * 500_000
    yield "pdf deep", lambda: read_small(deep + b"startxref\n9\n%%EOF", "a.pdf")


def _models() -> Iterator[Case]:
    folder = Path(tempfile.mkdtemp(prefix="worst"))
    files = support.tokenizer_files()
    base = json.loads(files["tokenizer.json"])

    def tokenizer(**changes: object) -> Callable[[], object]:
        data = json.dumps(base | changes)

        def run() -> None:
            for kind in ("python", "tokenizers"):
                loaded = load_tokenizer_files({"tokenizer.json": data}, kind)  # type: ignore[arg-type]
                loaded.encode("The quick fox (12) " * 100)

        return run

    token = base["added_tokens"][0]
    added = [token | {"id": 5000 + n, "content": f"<{n}>"} for n in range(6000)]
    vocab = base["model"]["vocab"] | {f"x{n}": 300 + n for n in range(50_000)}
    merges = [["x", "y"]] * 60_000
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    yield "tokenizer words", tokenizer(model=base["model"] | {"vocab": vocab})
    yield "tokenizer merges", tokenizer(model=base["model"] | {"merges": merges})
    yield "tokenizer added tokens", tokenizer(added_tokens=base["added_tokens"] + added)
    for name, pattern in {
        "(a+)+": "(a+)+$",
        "nested": "(?:" * 500 + "a" + ")" * 500,
        "classes": "[a-z]" * 800,
        "backtracking": r"\s*\s*\s*\s*\s*\s*x",
        "choices": "|".join("abcdefgh" * 50),
    }.items():
        yield (
            f"tokenizer pattern {name}",
            tokenizer(pre_tokenizer=split | {"pattern": {"Regex": pattern}}),
        )
    level = base["pre_tokenizer"]
    yield (
        "tokenizer steps",
        tokenizer(pre_tokenizer={"type": "Sequence", "pretokenizers": [level] * 8000}),
    )
    yield (
        "tokenizer depth",
        lambda: load_tokenizer_files(
            {"tokenizer.json": '{"a":' + "[" * 500_000 + "]" * 500_000 + "}"}
        ),
    )
    for name, template in {
        "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "product": "{{ 'a' * 3000000000 }}",
        "list": "{{ [0] * 400000000 }}",
        "format": "{{ '%2000000000d' % 1 }}",
        "power": "{{ 9 ** 9 ** 9 }}",
        "doubling": "{% set n = namespace(a='aa') %}{% for i in range(64) %}"
        "{% set n.a = n.a + n.a %}{% endfor %}",
        "words": "{{ lipsum(n=10000000) }}",
        "slices": "{{ [1]|slice(1000000000)|list }}",
        "long": "a" * MB,
        "ifs": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
        "sums": "{{ " + "1 + " * 10_000 + "1 }}",
        "brackets": f"{{{{ {'(' * 5000}{')' * 5000} }}}}",
        "replaces": "{{ ('a' * 60000)|replace('a', 'b' * 60000) }}",
        "macros": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    }.items():
        yield (
            f"template {name}",
            lambda t=template: load_tokenizer_files(
                files | {"chat_template.jinja": t}
            ).apply_chat_template([{"role": "user", "content": "a" * 1000}]),
        )

    def configured(**changes: object) -> Callable[[], object]:
        home = support.write_hf(folder / f"hf{len(list(folder.iterdir()))}")
        data = json.loads((home / "config.json").read_text()) | changes
        (home / "config.json").write_text(json.dumps(data))
        return lambda: open_checkpoint(home)

    yield "config layers", configured(num_hidden_layers=10**7)
    yield "config sizes", configured(head_dim=2**30, hidden_size=2**30)
    yield "config fields", configured(**{f"x{n}": [n] for n in range(60_000)})
    yield "config layer types", configured(layer_types=["full_attention"] * 50_000)
    yield "config depth", configured(rope_scaling={"a": [[[]] * 10_000] * 10})
    for name, gguf in _ggufs().items():
        path = folder / f"{name}.gguf"
        path.write_bytes(gguf)
        yield f"gguf {name}", lambda p=path: open_checkpoint(p)
    tensors = {
        f"model.layers.{n}.x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        for n in range(11_000)
    }
    head = json.dumps(tensors).encode()
    adapter = folder / "a.safetensors"
    adapter.write_bytes(struct.pack("<Q", len(head)) + head + b"\0" * 4)
    yield "adapter tensors", lambda: read_updates(adapter)
    bundle = folder / "bundle"
    bundle.mkdir()
    many = {f"f{n}": {"sha256": "a", "bytes": 1} for n in range(20_000)}
    (bundle / "pocketslm.json").write_text(json.dumps({"schema": 1, "files": many}))
    yield "manifest files", lambda: open_bundle(bundle)
    from fuzz.seeds import make_rows

    rows = folder / "rows.jsonl"
    rows.write_text("".join(row.to_json() + "\n" for row in make_rows() * 150)[:MB])
    yield "records", lambda: read_rows(rows)
    yield "report", lambda: write_report([rows], folder / "report.html")


def _ggufs() -> dict[str, bytes]:
    def string(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def file(metadata: list[bytes], tensors: list[bytes]) -> bytes:
        head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
        return (head + b"".join(metadata) + b"".join(tensors))[:MB]

    def array(kind: int, count: int, data: bytes) -> bytes:
        return string("x") + struct.pack("<IIQ", 9, kind, count) + data

    name = string("general.architecture") + struct.pack("<I", 8) + string("llama")
    return {
        "strings": file([name, array(8, 120_000, string("") * 120_000)], []),
        "bytes": file([name, array(0, 900_000, b"\0" * 900_000)], []),
        "count": file([name, array(0, 2**60, b"")], []),
        "arrays": file([name, array(9, 80_000, struct.pack("<IQ", 0, 0) * 80_000)], []),
        "depth": file([name, array(9, 1, struct.pack("<IQ", 9, 1) * 80_000)], []),
        "keys": file(
            [name, *(string(f"k{n}") + struct.pack("<IB", 0, 0) for n in range(50_000))], []
        ),
        "tensors": file(
            [name], [string(f"t{n}") + struct.pack("<IQIQ", 1, 32, 0, 0) for n in range(25_000)]
        ),
    }


_started: tuple[float, int] = (0.0, 0)


def _begin() -> None:
    """Begin to count: what made the file does not."""
    global _started
    with Path("/proc/self/clear_refs").open("w") as file:
        file.write("5")  # the greatest resident size is that of now
    _started = time.process_time(), _peak()


def _peak() -> int:
    return parse_status(Path("/proc/self/status").read_text()).peak_rss_bytes


def measure(run: Callable[[], object]) -> tuple[float, int, str]:
    """CPU seconds, bytes and what came of it, in a process of its own."""
    counted, told = os.pipe()
    if os.fork() == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (40, 40))
        _begin()
        try:
            run()
            what = "read"
        except PocketSlmError as error:
            what = f"refused: {error}"
        except BaseException as error:
            what = f"FAILED: {error!r}"
        seconds, size = time.process_time() - _started[0], _peak() - _started[1]
        os.write(told, json.dumps([seconds, size, what[:150]]).encode())
        os._exit(0)
    os.close(told)
    with os.fdopen(counted, "rb") as file:
        answer = file.read()
    os.wait()
    if not answer:
        return 40.0, 0, "FAILED: more than 40 s, or it ended"
    seconds, size, what = json.loads(answer)
    return seconds, size, what


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.worst", description=__doc__)
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--all", action="store_true", help="print every case, not the bad alone")
    arguments = parser.parse_args()
    count, bad, slowest, largest = 0, 0, (0.0, ""), (0, "")
    for cases in (_documents, _models):
        for name, run in cases():
            if arguments.only not in name:
                continue
            seconds, size, what = measure(run)
            is_log = "16 MB" in name
            over = seconds > (LOG_SECONDS if is_log else MOST_SECONDS)
            over |= (size > MOST_BYTES and not is_log) or what.startswith("FAILED")
            count, bad = count + 1, bad + over
            if over or arguments.all:
                line = (
                    f"{'!' if over else ' '} {seconds:6.2f} s {size / MB:6.0f} MB  {name}: {what}"
                )
                print(line[:150], flush=True)
            if not is_log:
                slowest, largest = max(slowest, (seconds, name)), max(largest, (size, name))
    print(
        f"{count} cases, {bad} beyond the limits; the slowest {slowest[0]:.2f} s ({slowest[1]}), "
        f"the largest {largest[0] / MB:.0f} MB ({largest[1]})"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
