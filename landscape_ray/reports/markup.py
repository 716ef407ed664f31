"""The small pieces of HTML that the sections are made of. Every text is escaped here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape


def tile(term: str, value: str, unit: str = "", more: str = "") -> str:
    """Return one result as a tile: what it is, its value with a unit, and a line of context."""
    after = f' <span class="unit">{escape(unit)}</span>' if unit else ""
    return (
        f'<div class="tile"><div class="term">{escape(term)}</div><div class="value">{escape(value)}{after}</div>'
        f'<div class="more">{escape(more)}</div></div>'
    )


def head(title: str, facts: Sequence[str], anchors: Iterable[tuple[str, str]], said: str = "") -> str:
    """Return the head of a page with the button that switches light and dark, and its table of contents.

    Args:
        title: of the page.
        facts: what stands below it.
        anchors: identifier and name of every section.
        said: HTML between head and contents.
    """
    links = "".join(f'<a href="#{key}">{escape(name)}</a>' for key, name in anchors)
    return (
        f"<header><div><h1>{escape(title)}</h1>"
        f'<div class="faint">{escape(" · ".join(facts))}</div></div>'
        f'<button type="button" id="theme">light / dark</button></header>{said}'
        f'<nav aria-label="Sections">{links}</nav>'
    )


def prose(said: str) -> str:
    """Return sentences with what stands between backquotes as code.

    >>> prose("fits by `landscape-ray fit` & more")
    'fits by <code>landscape-ray fit</code> &amp; more'
    """
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(said))


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """Return terms with their texts."""
    return "<dl>" + "".join(f"<dt>{escape(term)}</dt><dd>{escape(said)}</dd>" for term, said in pairs) + "</dl>"


def warnings(head: str, warnings: Sequence[str]) -> str:
    """Return a box of warnings under a headline; nothing without any."""
    if not warnings:
        return ""
    items = "".join(f"<li>{escape(one)}</li>" for one in warnings)
    return f'<div class="warnings"><strong>{escape(head)}</strong><ul>{items}</ul></div>'


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], texts: Sequence[int], wrapped: Sequence[int] = ()
) -> str:
    """Return a table; the columns numbered in `texts` are aligned as text, the others as numbers.

    Texts in the columns numbered in `wrapped` may take several lines.
    """

    def row(cells: Sequence[str], tag: str) -> str:
        wraps = [" wrap" if index in wrapped and tag == "td" else "" for index in range(len(cells))]
        kinds = [f' class="text{wrap}"' if index in texts else "" for index, wrap in enumerate(wraps)]
        return "<tr>" + "".join(f"<{tag}{k}>{escape(c)}</{tag}>" for k, c in zip(kinds, cells, strict=True)) + "</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="scroll"><table><thead>{row(columns, "th")}</thead><tbody>{body}</tbody></table></div>'
