"""What is on the screen, as a screen reader is to say it.

Kivy draws its own widgets, of which Android sees one surface. So a delegate of that surface
(java/org/pocketslm/ScreenReader.java) tells Android of virtual views: those listed here.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Node(NamedTuple):
    """A thing on the screen: text to say, role, and its place in pixels from the top left."""

    label: str
    role: str
    left: int
    top: int
    right: int
    bottom: int


def nodes(window: Any) -> list[Node]:
    """What can be seen or tapped now, in reading order; of an open sheet, only the sheet."""
    from kivy.uix.modalview import ModalView

    roots = list(window.children)
    sheets = [child for child in roots if isinstance(child, ModalView)]
    found: list[Node] = []
    for root in sheets[:1] or roots:
        _collect(root, window, found)
    return sorted(found, key=lambda node: (node.top, node.left))


def _collect(widget: Any, window: Any, found: list[Node]) -> None:
    if widget.opacity == 0 or (widget.disabled and not getattr(widget, "label", "")):
        return
    label = getattr(widget, "label", "")
    if label:
        _add(widget, label, getattr(widget, "role", "field"), window, found)
        return  # what lies inside a button is said by the button
    if content := getattr(widget, "content", ""):
        _add(widget, content, "text", window, found)
    for child in reversed(widget.children):
        _collect(child, window, found)


def _add(widget: Any, label: str, role: str, window: Any, found: list[Node]) -> None:
    left, bottom = widget.to_window(widget.x, widget.y)
    right, top = left + widget.width, bottom + widget.height
    height = window.height
    if right <= 0 or left >= window.width or top <= 0 or bottom >= height or widget.width < 1:
        return
    found.append(Node(label, role, int(left), int(height - top), int(right), int(height - bottom)))
