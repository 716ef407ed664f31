"""The chapter on probes other than the sharpness: their values along the runs, what they cost, and their share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from landscape_ray import text
from landscape_ray.analysis.runs import Run
from landscape_ray.reports.charts import BEST_COLORS, STEP
from landscape_ray.reports.figures import Axis, Figure, Panel, Series, series, thin
from landscape_ray.reports.insight import Measured, highlighted, legend_entry, measured, sharpness_runs
from landscape_ray.reports.markup import table
from landscape_ray.reports.stability import CURVATURES
from landscape_ray.reports.views import Sweep, best_overall, cost, label

MAX_PANELS = 6

WIDE = 20
"""A panel whose values differ by more than this factor has a logarithmic axis."""


def probes(sweeps: Sequence[Sweep]) -> Figure | str:
    """Return the main values of up to six probes against step, one panel each, for the highlighted runs.

    These are the runs of the sharpness figure, in its colours, where sharpness was measured.
    """
    shown = _highlighted(sweeps)
    if not shown:
        return _nothing(sweeps)
    names = _others([run for _, run in shown])
    panels: list[Panel] = []
    last = 0.0
    for name in names[:MAX_PANELS]:
        drawn: list[Series] = []
        seen: list[Measured] = []
        for index, (sweep, run) in enumerate(shown):
            found = measured(run, name)
            if not len(found.step):
                continue
            seen.append(found)
            last = max(last, float(found.step[-1]))
            called = label(sweeps, sweep, run.run_id)
            color = BEST_COLORS[index % len(BEST_COLORS)]
            style = {"color": color, "name": legend_entry(run, called)}
            step, value = thin(found.step, found.value)
            error = found.error[np.searchsorted(found.step, step)]
            if error.any():
                drawn.append(series("band", step, value, low=value - error, high=value + error, **style))
            drawn.append(series("line", step, value, hover=f"{called}, {name}", **style))
            if len(step) == 1:
                drawn.append(series("points", step, value, size=6, **style))
        panels.append(_panel(name, drawn, seen))
    left = names[MAX_PANELS:]
    also = f" Not drawn, but in the table: {text.listing(left)}." if left else ""
    sweep, run = _first(shown)
    known = [(name, found) for name in names[:MAX_PANELS] if len((found := measured(run, name)).step)]
    told = ", ".join(f"{name} {_change(found)}" for name, found in known)
    return Figure(
        key="probes",
        title="What the probes measured",
        takeaway=f"From first to last in {label(sweeps, sweep, run.run_id)}: {told}.",
        # from the first update on, also where a budget put the first measurement off
        x=dataclasses.replace(STEP, limits=(0.0, 1.02 * (last or 1.0))),
        panels=tuple(panels),
        note="Bands are one standard error, or the error bound of a probe that does not sample; where they are wide, a "
        f"panel cuts them off.{also}",
    )


def probe_tables(sweeps: Sequence[Sweep]) -> str:
    """Return what the probes of the best run measured and cost, as HTML; empty without another one than sharpness."""
    shown = _highlighted(sweeps)
    if not shown:
        return ""
    best = best_overall(sweeps)
    known = best is not None and bool(_others([best[1]]))
    sweep, run = best if best is not None and known else _first(shown)
    which = f"{label(sweeps, sweep, run.run_id)}{', the best run' if known else ''}"
    names = list(dict.fromkeys(run.probes["probe"].astype(str).tolist()))
    mains = list(dict.fromkeys(name.partition("/")[0] for name in names))
    rows = []
    for name in mains:
        found = measured(run, name)
        price, seconds = (_total(run, name, column) for column in ("price_gradients", "cost_seconds"))
        paid = [text.number(price, 3) if price > 0 else "–", text.duration(seconds)]
        rows.append([name, *_ends(found), str(len(found.step)), *paid])
    columns = ["probe", "first", "last", "measurements", "price (gradients)", "time"]
    out = f"<h3>Probes of {escape(which)}</h3><p>{escape(_share(sweeps))}</p>{table(columns, rows, texts=(0,))}"
    parts = [[name, *_ends(measured(run, name))] for name in names if "/" in name]
    if parts:
        inner = table(["part", "first", "last"], parts, texts=(0,))
        out += f"<details><summary>Parts of these measurements ({len(parts)})</summary>{inner}</details>"
    return out


def _highlighted(sweeps: Sequence[Sweep]) -> list[tuple[Sweep, Run]]:
    """Return the runs to draw with their sweeps: those of the sharpness figure if they have other probes as well."""
    owners = {id(run): sweep for sweep in sweeps for run in sweep.runs}
    others = [run for sweep in sweeps for run in sweep.runs if _others([run])]
    if not others:
        return []
    sharp = [run for _, run in sharpness_runs(sweeps)]
    picked = highlighted(sharp) if sharp else []
    if not any(_others([run]) for run in picked):
        picked = highlighted(others)
    return [(owners[id(run)], run) for run in picked]


def _first(shown: Sequence[tuple[Sweep, Run]]) -> tuple[Sweep, Run]:
    """Return the first run that has other probes: the best, where it does."""
    return next(pair for pair in shown if _others([pair[1]]))


def _others(runs: Sequence[Run]) -> list[str]:
    """Return the probes with a finite value that the sharpness figure does not show."""
    names = dict.fromkeys(name for run in runs for name in run.probes["probe"].astype(str).tolist())
    mains = [name for name in names if "/" not in name and name not in CURVATURES]
    return [name for name in mains if any(len(measured(run, name).step) for run in runs)]


def _panel(name: str, drawn: Sequence[Series], seen: Sequence[Measured]) -> Panel:
    """Return a panel in which the values fill the height, and bands at most half as much again."""
    values = np.concatenate([one.value for one in seen])
    low, high = float(values.min()), float(values.max())
    ends = np.concatenate([one.value + sign * one.error for one in seen for sign in (-1, 1)])
    if low > 0 and high > WIDE * low:
        reach = math.sqrt(high / low)
        limits = (max(low / reach, float(ends.min())) / 1.2, min(high * reach, float(ends.max())) * 1.2)
        return Panel(y=Axis(label=name, scale="log", limits=limits), series=_above(drawn, limits[0]))
    span = high - low or abs(high) or 1.0
    bottom, top = max(low - span / 2, float(ends.min())), min(high + span / 2, float(ends.max()))
    pad = 0.06 * ((top - bottom) or span)
    # an axis that nothing lies below zero on does not go there either
    limits = (bottom - pad if low < 0 or bottom > pad else 0.0, top + pad)
    return Panel(y=Axis(label=name, limits=limits), series=tuple(drawn))


def _above(drawn: Sequence[Series], floor: float) -> tuple[Series, ...]:
    """Return the series with bands that end below the floor of a logarithmic axis, which has no place for zero."""
    return tuple(
        dataclasses.replace(item, low=np.maximum(item.low, floor / 10)) if item.low is not None else item
        for item in drawn
    )


def _change(found: Measured) -> str:
    first, last = text.number(float(found.value[0]), 3), text.number(float(found.value[-1]), 3)
    return f"{first} → {last}" if len(found.step) > 1 else last


def _ends(found: Measured) -> list[str]:
    """Return the first value, and the last one with its error, as cells."""
    if not len(found.step):
        return ["–", "–"]
    error = float(found.error[-1])
    after = f" ± {text.number(error, 2)}" if error > 0 else ""
    return [text.number(float(found.value[0])), text.number(float(found.value[-1])) + after]


def _total(run: Run, name: str, column: str) -> float:
    """Return the sum of a column over the rows of a probe and its parts."""
    rows = run.probes["probe"].astype(str)
    own = np.array([each.partition("/")[0] == name for each in rows.tolist()], dtype=bool)
    return float(np.nansum(np.asarray(run.probes[column], dtype=np.float64)[own])) if own.any() else 0.0


def _share(sweeps: Sequence[Sweep]) -> str:
    """Return the share of the time that probes took, with the budget that was set."""
    spent = cost(sweeps)
    if not math.isfinite(spent.probe_share):
        return "No running time has been recorded."
    of_training = spent.probe_seconds / spent.training_seconds if spent.training_seconds > 0 else math.nan
    said = f"In all runs together probes took {text.percent(spent.probe_share)} of the time"
    budgets = sorted({budget for sweep in sweeps for run in sweep.runs if (budget := _budget(run)) is not None})
    if not budgets:
        return f"{said}."
    allowed = text.listing([text.percent(budget) for budget in budgets])
    return f"{said}, which is {text.percent(of_training)} of the training time; probes.budget allows {allowed} of that."


def _budget(run: Run) -> float | None:
    asked = run.summary.config.get("probes")
    budget = asked.get("budget") if isinstance(asked, Mapping) else None
    return float(budget) if isinstance(budget, int | float) else None


def _nothing(sweeps: Sequence[Sweep]) -> str:
    share = cost(sweeps).probe_share
    beside = f" beside sharpness, which took {text.percent(share)} of the time" if sharpness_runs(sweeps) else ""
    return f"No probe ran{beside}; a table such as [train.probes.gradient_noise_scale] in the sweep file adds one."
