"""Spectra of layers, of classes, and of batches of several sizes: tables for a terminal, and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from landscape_ray import text
from landscape_ray.reports.figures import Axis, Figure, Panel, Series, series
from landscape_ray.tables import TextTable

MAX_DRAWN = 20
"""Parts in a figure: those with the largest eigenvalues; the table has all."""

WIDE = 30.0
"""Between the largest eigenvalues of two parts: from here on the axis is logarithmic."""

ROUNDING = 1e-6
"""Of the largest eigenvalue of all: what is below has no place on a logarithmic axis."""

Value = tuple[float, float]
"""An eigenvalue and its error."""


class Part(NamedTuple):
    """A layer, a class, or the whole.

    Attributes:
        name: as it is shown.
        size: a layer's parameters, or a class's share, as it is shown.
        largest: eigenvalues, descending, with their residuals.
        smallest: eigenvalues, ascending, likewise.
        converged: whether they met the tolerance.
        price_gradients: what they cost.
    """

    name: str
    size: str
    largest: Sequence[Value]
    smallest: Sequence[Value]
    converged: bool
    price_gradients: float


def part_table(title: str, what: str, size: str, parts: Sequence[Part]) -> TextTable:
    """Return the eigenvalues of parts as a table.

    Args:
        title: what was measured.
        what: a part is: layer, class.
        size: what the size of a part is: parameters, share.
        parts: the whole first.
    """
    num_largest = max(len(part.largest) for part in parts)
    num_smallest = max(len(part.smallest) for part in parts)
    names = ["largest", *(text.ordinal(place) for place in range(2, num_largest + 1))]
    names += ["smallest"] if num_smallest else []
    numbers = (size, *names, "± error", "gradients")
    table = TextTable((what, *numbers, ""), right=numbers, title=title)
    for part in parts:
        shown = [*_padded(part.largest, num_largest), *(_padded(part.smallest, num_smallest)[:1])]
        errors = [error for _, error in (*part.largest, *part.smallest[:1]) if math.isfinite(error)]
        table.add_row(
            part.name,
            part.size,
            *shown,
            text.number(max(errors), 2) if errors else "",
            f"{part.price_gradients:.0f}",
            "" if part.converged else "rough",
        )
    return table


def _padded(values: Sequence[Value], count: int) -> list[str]:
    shown = [text.number(value) if math.isfinite(value) else "unknown" for value, _ in values]
    return shown + [""] * (count - len(shown))


def parts_figure(key: str, title: str, what: str, parts: Sequence[Part], *, note: str) -> Figure:
    """Return the eigenvalues of parts beside those of the whole: the largest and the smallest of each.

    Args:
        key: of the figure.
        title: of the figure.
        what: a part is: layer, class.
        parts: the whole first.
        note: what must be known to read it.
    """
    whole, own = parts[0], [part for part in parts[1:] if part.largest and math.isfinite(part.largest[0][0])]
    shown = sorted(own, key=lambda part: -part.largest[0][0])[:MAX_DRAWN]
    kept = {part.name for part in shown}
    drawn = [whole, *(part for part in own if part.name in kept)]  # in their own order
    rows = np.arange(len(drawn), dtype=np.float64)
    places = max(len(part.largest) for part in drawn)
    tops = [part.largest[0][0] for part in drawn]
    wide = min(tops) > 0 and max(tops) > WIDE * min(tops)
    least = ROUNDING * max(tops) if wide else -math.inf
    marks = [_marks(drawn, rows, 0, "largest", "c0", "circle", 9.0, least)]
    if places > 1:
        name = "2nd largest" if places == 2 else f"2nd {'and' if places == 3 else 'to'} {text.ordinal(places)} largest"
        further = [_marks(drawn, rows, place, name, "c5", "circle", 6.0, least) for place in range(1, places)]
        marks = [*further, *marks]
    if any(part.smallest for part in drawn):
        name = "size of the smallest, where negative" if wide else "smallest"
        marks.insert(0, _marks(drawn, rows, -1, name, "c1", "square", 8.0, least))
    left_out = len(own) - len(shown)
    labels = tuple(f"{part.name}, {part.size}" if part.size else part.name for part in drawn)
    return Figure(
        key=key,
        title=title,
        takeaway=_takeaway(what, whole, own),
        x=Axis(label="eigenvalue of the Hessian", scale="log" if wide else "linear"),
        panels=(Panel(y=Axis(label="", categories=labels), series=tuple(marks)),),
        note=note + (f" Not drawn: {text.plural(left_out, what)} with smaller eigenvalues." if left_out else ""),
    )


def _marks(
    parts: Sequence[Part],
    rows: np.ndarray,
    place: int,
    name: str,
    color: str,
    symbol: str,
    size: float,
    least: float,
) -> Series:
    """Return one mark a part: its largest eigenvalue of this place, or its smallest one for -1.

    `least` is the least that can be drawn; where that is positive, on a logarithmic axis, the smallest eigenvalues are
    drawn without their sign.
    """
    sign = -1.0 if place < 0 and least > 0 else 1.0
    x, y, said = [], [], []
    for part, row in zip(parts, rows.tolist(), strict=True):
        values = part.smallest[:1] if place < 0 else part.largest[place : place + 1]
        for value, _ in values:
            if math.isfinite(value) and sign * value > least:
                x.append(sign * value)
                y.append(row)
                said.append(part.name)
    return series("points", x, y, name=name, color=color, symbol=symbol, size=size, hover=tuple(said))


def _takeaway(what: str, whole: Part, parts: Sequence[Part]) -> str:
    if not parts:
        return f"No {what} has eigenvalues that are finite."
    ranked = sorted(parts, key=lambda part: -part.largest[0][0])
    first, last, top = ranked[0], ranked[-1], whole.largest[0][0]
    named = f"{what} {first.name}"
    if what == "layer":
        share = first.largest[0][0] / top if top > 0 else math.nan
        return (
            f"The sharpest block is that of {named}: its largest eigenvalue {text.number(first.largest[0][0])} is "
            f"{text.percent(share)} of the {text.number(top)} of the whole network."
        )
    return (
        f"The loss is sharpest on {named}, {text.number(first.largest[0][0])}, and flattest on {what} {last.name}, "
        f"{text.number(last.largest[0][0])}; on all targets the largest eigenvalue is {text.number(top)}."
    )


class SizeRow(NamedTuple):
    """Extremal eigenvalues on batches of one size: mean, error, and what the law says."""

    batch_size: int
    largest: Value
    smallest: Value
    expected: tuple[float, float]


def batch_size_table(title: str, rows: Sequence[SizeRow]) -> TextTable:
    """Return the extremal eigenvalues by batch size as a table; the last row is the whole.

    Args:
        title: what was measured.
        rows: ascending.
    """
    headings = ("batch size", "largest", "± error", "law", "smallest", "± error", "law")
    table = TextTable(headings, right=headings, title=title)
    for place, row in enumerate(rows):
        whole = place == len(rows) - 1
        cells: list[str] = []
        for (value, error), law in zip((row.largest, row.smallest), row.expected, strict=True):
            cells += [text.number(value), text.number(error, 2), "" if whole else text.number(law)]
        table.add_row(f"{row.batch_size:,}" + (" (all)" if whole else ""), *cells)
    return table


def batch_size_figure(
    run: str, rows: Sequence[SizeRow], sizes: ArrayLike, law: tuple[ArrayLike, ArrayLike], misfit: tuple[float, float]
) -> Figure:
    """Return the extremal eigenvalues against the batch size, with the law of random matrices that was fitted.

    Args:
        run: whose.
        rows: ascending; the last is the whole.
        sizes: at which the law is drawn.
        law: largest and smallest eigenvalue at these sizes.
        misfit: root mean square of the relative differences from the law, at both ends.
    """
    panels = []
    for end, (name, color, symbol) in enumerate((("largest", "c0", "circle"), ("smallest", "c1", "square"))):
        values = [(row.largest, row.smallest)[end] for row in rows]
        x = [row.batch_size for row in rows]
        y, errors = [value for value, _ in values], [error for _, error in values]
        marks = [series("line", sizes, law[end], name="law", color="muted", dash="dash")]
        marks.append(
            series(
                "points",
                x[:-1],
                y[:-1],
                low=[value - error for value, error in zip(y[:-1], errors[:-1], strict=True)],
                high=[value + error for value, error in zip(y[:-1], errors[:-1], strict=True)],
                name=f"{name} on batches, ± standard error",
                color=color,
                symbol=symbol,
                hover=name,
            )
        )
        marks.append(
            series("points", x[-1:], y[-1:], name="on all examples", color="text", symbol="diamond", hover="all")
        )
        panels.append(Panel(y=Axis(label=f"{name} eigenvalue"), series=tuple(marks)))
    first, last = rows[0], rows[-1]
    times = first.largest[0] / last.largest[0] if last.largest[0] > 0 else math.nan
    return Figure(
        key=f"spectrum-batch-sizes-{run}",
        title=f"Curvature on batches and on all examples: {run}",
        takeaway=(
            f"On batches of {first.batch_size} the largest eigenvalue is {text.number(times, 3)} times that on all "
            f"{last.batch_size:,} examples; the law is off by {text.percent(misfit[0])} at the largest and "
            f"{text.percent(misfit[1])} at the smallest."
        ),
        x=Axis(label="batch size", unit="examples", scale="log"),
        panels=tuple(panels),
        note=(
            "Law: curvature of low rank plus noise with independent elements (Granziol et al. 2022, arXiv 2006.09092), "
            "its variance fitted at each end. The noise of a network is not of that kind."
        ),
    )
