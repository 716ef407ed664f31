"""The figure of what mattered: how much of the ranking of a search each searched value explains."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from landscape_ray import text
from landscape_ray.analysis.importance import MIN_RUNS, Importance, importances
from landscape_ray.reports.figures import Axis, Figure, Panel, series
from landscape_ray.reports.views import Sweep

NOTE = (
    "A share is how much better the rank of a left-out run is forecast from this value alone than from nothing, runs "
    "that diverged ranked last. Marks: what 95 of 100 shuffled rankings stay below. What matters only in combination "
    "does not show here."
)


def importance(sweep: Sweep, key: str) -> Figure | str:
    """Return how much of the ranking by final loss each searched value explains, beside what chance would."""
    found = importances(sweep.runs)
    if not found:
        return (
            f"What mattered in {sweep.name} is told from {MIN_RUNS} runs on that ended and differ in a searched value."
        )
    rows = np.arange(len(found), dtype=np.float64)
    parts = []
    for name, color, chosen in (
        ("explained", "c0", [one.found for one in found]),
        ("no more than chance", "muted", [not one.found for one in found]),
    ):
        if any(chosen):
            said = tuple(_told(one) for one, own in zip(found, chosen, strict=True) if own)
            shares = [one.share for one, own in zip(found, chosen, strict=True) if own]
            parts.append(series("bar", shares, rows[chosen], name=name, color=color, hover=said))
    said = tuple(f"chance: {text.percent(one.chance)}" for one in found)
    style = {"name": "95 of 100 shuffled rankings", "color": "text", "symbol": "diamond", "size": 9}
    parts.append(series("points", [one.chance for one in found], rows, hover=said, **style))
    return Figure(
        key=key,
        title="Which searched values mattered",
        takeaway=takeaway(found),
        x=Axis(label="share of the ranking explained", limits=(0.0, 1.0)),
        panels=(Panel(y=Axis(label="", categories=tuple(one.name for one in found)), series=tuple(parts)),),
        note=NOTE,
    )


def takeaway(found: Sequence[Importance]) -> str:
    """Return what mattered in one sentence."""
    shown = [f"{one.name} explains {text.percent(one.share)} of the ranking" for one in found if one.found]
    silent = [one.name for one in found if not one.found]
    if not shown:
        return (
            f"None of {text.listing(silent)} explains more than chance: there are too few runs, or it does not matter."
        )
    rest = f"; of {text.listing(silent)} these runs show nothing" if silent else ""
    return f"{text.listing(shown)}{rest}."


def _told(one: Importance) -> str:
    return f"{one.name}, {text.plural(one.num_runs, 'run')}"
