"""The post-processors of `tokenizer.json`: the special tokens put around an encoded text."""

from __future__ import annotations

from dataclasses import dataclass

from pocketslm.errors import TokenizerError
from pocketslm.runtime.tokenizer import fields

KNOWN = ("BertProcessing", "ByteLevel", "RobertaProcessing", "Sequence", "TemplateProcessing")


@dataclass(frozen=True)
class Affixes:
    """Ids put before and after a text."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


def build(node: object) -> Affixes:
    """The affixes that `tokenizer.json`'s `post_processor` describes; none for null."""
    affixes = Affixes()
    for part in fields.components(node, "post_processor", "processors"):
        step = _step(part)
        affixes = Affixes((*step.before, *affixes.before), (*affixes.after, *step.after))
    return affixes


def _step(node: dict[str, object]) -> Affixes:
    where = "post_processor"
    kind = node["type"]
    if kind == "ByteLevel":  # it only trims offsets
        return Affixes()
    if kind in ("BertProcessing", "RobertaProcessing"):
        first, last = (fields.field(node, key, list, where) for key in ("cls", "sep"))
        return Affixes(_ids(first[1:], where), _ids(last[1:], where))
    if kind == "TemplateProcessing":
        return _template(node, where)
    raise fields.unsupported("post_processor type", kind, KNOWN)


def _template(node: dict[str, object], where: str) -> Affixes:
    """`single`, the template for one text, is a list of special tokens and one `Sequence`."""
    tokens = fields.field(node, "special_tokens", dict, where)
    sides: list[tuple[int, ...]] = [()]
    for item in fields.field(node, "single", list, where):
        entry = fields.mapping(item, f"{where}.single")
        if "Sequence" in entry:
            sides.append(())
            continue
        special = fields.field(entry, "SpecialToken", dict, f"{where}.single")
        name = fields.field(special, "id", str, f"{where}.single")
        token = fields.mapping(tokens.get(name), f"{where}.special_tokens[{name!r}]")
        sides[-1] += _ids(fields.field(token, "ids", list, where), where)
    if len(sides) != 2:
        raise TokenizerError(
            f"tokenizer.json: {where}.single names the text {len(sides) - 1} times; expected "
            "once; fetch or export the file again"
        )
    return Affixes(sides[0], sides[1])


def _ids(values: list[object], where: str) -> tuple[int, ...]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise TokenizerError(
            f"tokenizer.json: {where} has ids {str(values)[:80]}; expected integers from 0; "
            "fetch or export the file again"
        )
    return tuple(value for value in values if isinstance(value, int))
