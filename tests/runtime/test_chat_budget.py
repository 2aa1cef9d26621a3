"""Chat templates that ask for too much, and those that only seem to."""

from __future__ import annotations

from typing import Any

import jinja2.sandbox
import pytest

from pocketslm.errors import TokenizerError
from pocketslm.runtime.tokenizer import metering
from pocketslm.runtime.tokenizer.chat import MAX_TEMPLATE, ChatTemplate

NESTED = "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}"
DOUBLED = NESTED + "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}"
TUPLES = "{% set ns = namespace(x=(1,)) %}{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}"  # noqa: E501
LONG = "{% set s = 'a' * 900000 %}{% for i in range(99999) %}"
MANY = "{% for i in range(99999) %}"
TOO_MUCH = {
    # loops, and what else comes back to itself
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loops": MANY + "{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "long bodies": MANY + "{% if 1 %}{% endif %}" * 1000 + "{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "arguments": "{% macro f() %}{{ varargs | length }}{% endmacro %}"
    + MANY
    + "{{ f(*range(99999)) }}{% endfor %}",
    "copies": "{% set d = dict.fromkeys(range(99999)) %}" + MANY + "{% if d.copy() %}{% endif %}"
    "{% endfor %}",
    "generators": MANY + "{{ range(99999) | select('lt', 0) | first }}{% endfor %}",
    "finding in a range": MANY + "{% if 'b' in range(99999) %}{% endif %}{% endfor %}",
    "sorting": MANY + "{% set x = range(99999) | sort %}{% endfor %}",
    "slices of lists": "{{ [1] | slice(1000000000) | list | length }}",
    # texts and lists that are made
    "times": "{{ 'a' * 3000000000 }}",
    "times of a list": "{{ ([0] * 400000000) | length }}",
    "times, reversed": "{% set n = 10 ** 9 %}{{ (n * (0, 1)) | length }}",
    "doubling": "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}",
    "doubling with ~": "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}",
    "doubling in blocks": "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}"
    "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}{{ ns.x | length }}",
    "doubling a list": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}",
    "output": MANY + "{% for j in range(99) %}" + "x" * 99 + "{% endfor %}{% endfor %}",
    "percent": "{{ '%2000000000d' % 1 }}",
    "percent, precision": "{{ '%.2000000000f' % 1 }}",
    "percent, long values": "{{ ('%(a)s' * 100) | format(a='x' * 900000) }}",
    "format": "{{ '{:>2000000000}'.format(1) }}",
    "format_map": "{{ '{a:>2000000000}'.format_map({'a': 1}) }}",
    "filter format": "{{ '%2000000000d' | format(1) }}",
    "batch": "{{ [1] | batch(1000000000, 0) | list | length }}",
    "center": "{{ 'a' | center(2000000000) | length }}",
    "method center": "{{ 'a'.center(2000000000) | length }}",
    "zfill": "{{ 'a'.zfill(2000000000) | length }}",
    "expandtabs": "{{ '\\t'.expandtabs(tabsize=2000000000) | length }}",
    "indent": "{{ 'a\\nb' | indent(2000000000) | length }}",
    "tojson": "{{ [1] | tojson(indent=2000000000) }}",
    "separators": "{{ [1, 2] | tojson(separators=('a' * 100000, '')) }}",
    "replace": "{{ ('a' * 100000) | replace('a', 'b' * 100000) | length }}",
    "method replace": "{{ ('a' * 100000).replace('', 'b' * 100000) | length }}",
    "join": "{{ range(99999) | join('a' * 100000) | length }}",
    "method join": "{{ ('a' * 100000).join('a' * 100000) | length }}",
    "translate": "{{ ('a' * 100000).translate({97: 'b' * 100000}) | length }}",
    "urlencode": "{{ ('\U0001f600' * 300000) | urlencode | length }}",
    "a block in a filter": "{% filter center(2000000000) %}a{% endfilter %}",
    # numbers
    "power": "{{ 10 ** (10 ** 9) }}",
    "squares": "{% set ns = namespace(x=10) %}{% for i in range(60) %}"
    "{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "round": "{{ 1.5 | round(1000000000, 'ceil') }}",
    # lists that hold themselves twice, over and over: short in memory, endless to go through
    "printing": DOUBLED + "{{ ns.x }}",
    "as JSON": DOUBLED + "{{ ns.x | tojson }}",
    "comparing": DOUBLED + "{{ ns.x == ns.y }}",
    "finding": DOUBLED + "{{ ns.x in [ns.y] }}",
    "index": DOUBLED + "{{ [ns.x].index([ns.y]) }}",
    "changed": NESTED + "{% set ns.x = [ns.x, ns.x] %}{{ loop.changed(ns.x) }}{% endfor %}",
    "hashing": TUPLES + "{{ {ns.x: 1} | length }}",
    "looking up": TUPLES + "{{ {1: 1}[ns.x] }}",
    "getting": TUPLES + "{{ {1: 1}.get(ns.x) }}",
    "depth": "{% set ns = namespace(x=(1,)) %}{% for i in range(99999) %}"
    "{% set ns.x = (ns.x,) %}{% endfor %}{{ {ns.x: 1} | length }}",
    # long texts, again and again
    "cutting": LONG + "{% if s[1:] %}{% endif %}{% endfor %}",
    "comparing texts": LONG + "{% if s == s ~ '' %}{% endif %}{% endfor %}",
    "finding texts": LONG + "{% if 'ab' in s %}{% endif %}{% endfor %}",
    "upper": LONG + "{% set x = s | upper %}{% endfor %}",
    "split": LONG + "{% set x = s.split('a') %}{% endfor %}",
}
REFUSED = {
    "{{ '%*d' % (2000000000, 1) }}": "a width is written out",
    "{{ '{:>{}}'.format(1, 2000000000) }}": "a width is written out",
    "{{ (5).to_bytes(2000000000, 'big') }}": "to_bytes",
    "{{ lipsum(n=10000000) }}": "'lipsum' is undefined",
    "{{ ('a' * 1000000) | wordwrap(1) }}": "No filter named 'wordwrap'",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}": "RecursionError",
    "{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}": "RecursionError",
    "{{ raise_exception('two\nlines') }}": "two lines",
    "{{ raise_exception('x' * 100000) }}": "x{400}",
}


def rendered(template: str, content: str = "hi", **more: Any) -> str:
    messages = [{"role": "user", "content": content}]
    return "".join(map(str, ChatTemplate(template, {}, {}).render(messages, **more)))


class CountingMeter(metering.Meter):
    """Also remembers the longest text and the most steps that were ever taken."""

    def fits(self, characters: int) -> None:
        super().fits(characters)
        CountingMeter.made = max(CountingMeter.made, characters)

    made = 0


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_asks_for_too_much_is_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "Meter", CountingMeter)
    with pytest.raises(TokenizerError, match="asks for too many|OverflowError") as caught:
        rendered(TOO_MUCH[name])
    assert "\n" not in str(caught.value)
    assert CountingMeter.made <= metering.LENGTH + 100 * metering.LENGTH_PER_CHARACTER


@pytest.mark.parametrize("template", REFUSED)
def test_what_cannot_be_priced_is_refused(template: str) -> None:
    with pytest.raises(TokenizerError, match=REFUSED[template]) as caught:
        rendered(template)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800


def test_a_template_has_a_size() -> None:
    assert rendered("x" * MAX_TEMPLATE)
    with pytest.raises(TokenizerError, match="characters; expected at most"):
        rendered("x" * (MAX_TEMPLATE + 1))


def test_messages_that_nest_too_deeply_are_an_error() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(TokenizerError, match="nest too deeply"):
        ChatTemplate("x", {}, {}).render([{"role": "user", "content": deep}])


WORK = (  # goes through each message several times, as templates do that look for the last question
    "{% set ns = namespace(last=-1, text='') %}{% for m in messages[::-1] %}"
    "{% if m.role == 'user' and not m.content.startswith('<x>') and ns.last < 0 %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set c = m.content | trim %}{% if '</think>' in c %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{{ m.role + ': ' + (c | replace('a', 'b')) ~ '\\n' }}{% endfor %}"
)


@pytest.mark.parametrize(("count", "length"), [(1, 4_000_000), (1000, 1000), (20_000, 10)])
def test_long_conversations_stay_within_the_budget(count: int, length: int) -> None:
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": "a" * length} for i in range(count)
    ]
    (text,) = ChatTemplate(WORK, {}, {}).render(messages)
    assert isinstance(text, str)
    assert text.count("b") == count * length


def test_the_budget_grows_with_the_messages_and_no_faster() -> None:
    """A template that does its work for each message once takes a share of the budget that does
    not grow with their number."""
    left = []
    for count in (100, 10_000):
        messages = [{"role": "user", "content": "a" * 100}] * count
        meter = metering.Meter(metering.size_of(messages))
        whole = meter.steps
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(metering, "Meter", lambda _, meter=meter: meter)
            ChatTemplate(WORK, {}, {}).render(messages)
        left.append((whole - meter.steps) / count)
    assert left[1] < 1.5 * left[0]


ORDINARY = (
    "{{ 2 ** 10 }} {{ 2 ** -1 }} {{ 7 * 6 }} {{ '%5.2f|%-4s|%d%%' % (1.5, 'ab', 3) }}"
    " {{ '{:>6}'.format(1) }} {{ '{0[a]}'.format({'a': 2}) }} {{ 'ab' * 3 }} {{ [1, 2] * 2 }}"
    " {{ 'a-b'.split('-') | join('+') }} {{ '+'.join(['a', 'b']) }} {{ 1.25 | round(1) }}"
    " {{ [[1], [2]] | sum(start=[]) }} {{ 'x' | center(5) }}| {{ 'a\nb' | indent(2) }}"
    " {{ range(3) | list }} {{ [3, 1, 2] | sort | map('string') | join }} {{ 'a' ~ 1 ~ none ~ no }}"
    " {{ (1, 2)[::-1] }} {{ messages[0].content[1:] }} {{ [1, 2, 3] | batch(2) | list }}"
    " {{ '<' | e }} {{ {'b': 1}.items() | list }} {{ 'a' in 'ab' }} {{ [1] == [1] }} {{ loop }}"
    "{% for i in range(4) if i % 2 %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}"
    "{% endfor %} {% for i in [1, [2]] recursive %}{{ loop(i) if i is iterable else i }}"
    "{% endfor %}"
    "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{% endmacro %}{{ f(1) }}{{ f(1, 2, 3) }}"
    "{% macro g() %}{{ caller() }}{% endmacro %}{% call g() %}w{% endcall %}"
    "{% filter upper %}x{% endfilter %}{% set y %}q{% endset %}{{ y }}"
)


def test_ordinary_operations_are_jinjas_own() -> None:
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": "user", "content": "hi"}]
    assert rendered(ORDINARY) == sandbox.from_string(ORDINARY).render(messages=messages)
