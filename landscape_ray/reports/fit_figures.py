"""Figures of a scaling law: the law through its points, measured against fitted, and what is left over."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.analysis.scaling import ScalingFit
from landscape_ray.laws import predict_points
from landscape_ray.laws.core.predict import samples_of
from landscape_ray.laws.optima.surface import LEVELLED
from landscape_ray.laws.optima.surface import NAME as STEP_LAW
from landscape_ray.laws.trust.holdout import sizes_of
from landscape_ray.reports import step_figures
from landscape_ray.reports.figures import Axis, Figure, Panel, Series, sequential, series
from landscape_ray.text import number, percent

Floats: TypeAlias = NDArray[np.float64]

_NUM_POINTS = 120
_MAX_SIZES = 9
"""Curves of this many sizes are drawn at most, evenly chosen."""

BEYOND = 10.0
"""A law is drawn up to this many times the fitted range."""


def figures(found: ScalingFit) -> list[Figure]:
    """Return all figures of a law: through its points, measured against fitted, residuals over every variable."""
    if found.law_path == STEP_LAW:
        return [*step_figures.figures(found), agreement_figure(found), *residual_figures(found, LEVELLED)]
    return [law_figure(found), agreement_figure(found), *residual_figures(found)]


def law_figure(found: ScalingFit) -> Figure:
    """Return the law through its points: by size over compute where there are N and D, else over its first variable."""
    names = [variable.name for variable in found.law.variables]
    return _over_compute(found) if set(names) == {"N", "D"} else _over_variable(found, names[0])


def agreement_figure(found: ScalingFit) -> Figure:
    """Return measured against fitted, with the diagonal."""
    response = found.law.response
    measured, fitted = _measured(found), np.array(found.predicted)
    ends = [min(measured.min(), fitted.min()), max(measured.max(), fitted.max())]
    scale = "log" if found.law.space == "log" and ends[1] > 3 * ends[0] > 0 else "linear"
    off = np.abs(measured / fitted - 1)
    worst = int(np.argmax(off))
    return Figure(
        key="agreement",
        title="Measured against fitted",
        takeaway=f"Half of the points lie within {percent(float(np.median(off)))} of the law; the farthest, "
        f"{found.run_ids[worst]}, is {percent(float(off[worst]))} off.",
        x=Axis(label=f"fitted {response.meaning or response.name}", unit=response.unit, scale=scale),  # type: ignore[arg-type]
        panels=(
            Panel(
                y=Axis(label=f"measured {response.meaning or response.name}", unit=response.unit, scale=scale),  # type: ignore[arg-type]
                series=(
                    series("line", ends, ends, name="equal", color="muted", weight="muted", dash="dash"),
                    series("points", fitted, measured, name="runs", color="c0", size=6.0, hover=_hover(found)),
                ),
            ),
        ),
    )


def residual_figures(found: ScalingFit, without: Collection[str] = ()) -> list[Figure]:
    """Return the residuals over every variable but some: a law of the right form leaves no trend."""
    measured, fitted = _measured(found), np.array(found.predicted)
    off = 100 * (measured / fitted - 1) if found.law.space == "log" else measured - fitted
    unit = "%" if found.law.space == "log" else found.law.response.unit
    drawn = []
    for variable in found.law.variables:
        x = np.array(found.points[variable.name])
        if variable.name in without or len(np.unique(x)) < 3:
            continue
        middle, level = _running(x, off)
        drawn.append(
            Figure(
                key=f"residuals-{variable.name.lower().replace('.', '-').replace('_', '-')}",
                title=f"Residuals over {variable.name}",
                takeaway=_trend(found, variable.name),
                x=Axis(
                    label=variable.meaning or variable.name,
                    unit=variable.unit,
                    scale="log" if (x > 0).all() else "linear",
                ),
                panels=(
                    Panel(
                        y=Axis(label="measured minus fitted", unit=unit),
                        series=(
                            series("hline", [0.0], [0.0], color="muted", weight="muted"),
                            series("points", x, off, name="runs", color="c0", size=6.0, hover=_hover(found)),
                            series("line", middle, level, name="running median", color="c1", weight="main"),
                        ),
                    ),
                ),
            )
        )
    return drawn


def _over_compute(found: ScalingFit) -> Figure:
    law, fit = found.law, found.fit
    size, data, loss = (np.array(found.points[name]) for name in ("N", "D", law.response.name))
    compute = np.array(found.points["C"]) if "C" in found.points else 6 * size * data
    k = float(np.median(compute / (size * data)))
    from landscape_ray.laws import Points

    groups = sizes_of(Points({"N": size, "D": data}, loss))
    assert groups is not None
    distinct = np.unique(groups)
    chosen = distinct[np.unique(np.linspace(0, len(distinct) - 1, min(_MAX_SIZES, len(distinct))).round().astype(int))]
    low, high = np.log(distinct[0]), np.log(distinct[-1])
    drawn: list[Series] = []
    hover = np.array(_hover(found))
    for value in distinct:
        here = groups == value
        color = sequential(float(high - np.log(value)), 0.0, max(float(high - low), 1e-9))
        drawn.append(
            series("points", compute[here], loss[here], color=color, size=6.0, hover=tuple(hover[here].tolist()))
        )
        if value in chosen:
            line = np.geomspace(compute[here].min() / 2, compute[here].max() * 2, 40)
            y = law.predict({"N": np.full(40, value), "D": line / (k * value)}, fit.parameters)
            drawn.append(series("line", line, y, color=color, weight="muted", name=f"N = {number(float(value), 2)}"))
    frontier = np.geomspace(compute.min(), BEYOND * compute.max(), _NUM_POINTS)
    best, low_end, high_end = _frontier(found, frontier, k)
    drawn.append(series("band", frontier, best, low=low_end, high=high_end, name="best for the compute", color="c1"))
    drawn.append(series("line", frontier, best, name="best for the compute", color="c1", weight="main"))
    return Figure(
        key="law",
        title="The law through its runs",
        takeaway=f"At {number(float(frontier[-1]), 2)} FLOPs, ten times the largest run, the best size is expected to "
        f"reach {number(float(best[-1]))} {law.response.unit}.",
        note="Thin: the law at the size of the runs of the same colour. Thick: the best size at every budget "
        f"(C = {k:.3g} N D), with its {fit.confidence:.0%} interval.".replace("%", " %"),
        x=Axis(label="training compute", unit="FLOPs", scale="log"),
        panels=(
            Panel(
                y=Axis(label=law.response.meaning or "loss", unit=law.response.unit, scale="log"), series=tuple(drawn)
            ),
        ),
    )


def _frontier(found: ScalingFit, compute: Floats, k: float) -> tuple[Floats, Floats, Floats]:
    """Return the lowest loss at every budget, with the interval of the law's value."""
    from landscape_ray.laws.decisions.allocation import best_size

    law, fit = found.law, found.fit
    optimum = {name: np.array([[value]]) for name, value in fit.parameters.items()}
    samples = samples_of(fit)
    tail = (1 - fit.confidence) / 2
    rows = []
    for each in compute.tolist():
        size = float(best_size(law, fit, optimum, each, k)[0])
        at = {"N": np.array([size]), "D": np.array([each / (k * size)])}
        losses = np.ravel(law.predict(at, samples))
        rows.append((float(law.predict(at, fit.parameters)[0]), *np.quantile(losses, [tail, 1 - tail])))
    table = np.array(rows)
    return table[:, 0], table[:, 1], table[:, 2]


def _over_variable(found: ScalingFit, name: str) -> Figure:
    law, fit = found.law, found.fit
    x = np.array(found.points[name])
    variable = next(v for v in law.variables if v.name == name)
    positive = bool((x > 0).all())
    line = (
        np.geomspace(x.min(), BEYOND * x.max(), _NUM_POINTS) if positive else np.linspace(x.min(), x.max(), _NUM_POINTS)
    )
    rest = {
        v.name: np.full(_NUM_POINTS, float(np.median(found.points[v.name]))) for v in law.variables if v.name != name
    }
    expected = predict_points(law, fit, {name: line, **rest}, allow_extrapolation=True)
    others = ", ".join(f"{other} = {number(float(values[0]))}" for other, values in rest.items())
    return Figure(
        key="law",
        title=f"The law over {variable.meaning or name}",
        takeaway=f"At {number(float(line[-1]), 3)} {variable.unit} the law expects {number(float(expected.value[-1]))} "
        f"{law.response.unit}.",
        note=(f"Drawn at {others}. " if others else "")
        + f"The band is the {fit.confidence:.0%} interval of the law's value.".replace("%", " %"),
        x=Axis(label=variable.meaning or name, unit=variable.unit, scale="log" if positive else "linear"),
        panels=(
            Panel(
                y=Axis(
                    label=law.response.meaning or law.response.name,
                    unit=law.response.unit,
                    scale="log" if law.space == "log" and law.link is None else "linear",
                ),
                series=(
                    series(
                        "band", line, expected.value, low=expected.low, high=expected.high, name=law.name, color="c1"
                    ),
                    series("line", line, expected.value, name=law.name, color="c1", weight="main"),
                    series("points", x, _measured(found), name="runs", color="c0", size=6.0, hover=_hover(found)),
                ),
            ),
        ),
    )


def _measured(found: ScalingFit) -> Floats:
    return np.array(found.points[found.law.response.name])


def _hover(found: ScalingFit) -> tuple[str, ...]:
    names = [variable.name for variable in found.law.variables]
    return tuple(
        f"{run}: " + ", ".join(f"{name} = {number(found.points[name][i], 3)}" for name in names)
        for i, run in enumerate(found.run_ids)
    )


def _running(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Return medians of about eight parts of equal numbers of points."""
    order = np.argsort(x, kind="stable")
    parts = np.array_split(order, max(2, min(8, len(x) // 4)))
    kept = [part for part in parts if len(part)]
    return np.array([np.median(x[part]) for part in kept]), np.array([np.median(y[part]) for part in kept])


def _trend(found: ScalingFit, name: str) -> str:
    item = next((item for item in found.record if item.name == "trends of the residuals"), None)
    said = next((part for part in item.value.split("; ") if f"log {name}:" in part), "") if item else ""
    return f"Trend {said.replace('over ', 'over ', 1)}; beyond 3 in t, the form of the law is in doubt." if said else ""
