"""Figures of the step law: its optimum over size and tokens, how flat that is, what it costs where it is unseen."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.analysis.scaling import ScalingFit
from landscape_ray.laws import StepLaw, flat_region
from landscape_ray.laws.core.predict import samples_of
from landscape_ray.laws.optima.flatness import WITHIN
from landscape_ray.laws.optima.surface import best_point, centre, offsets, rise, valley
from landscape_ray.reports.figures import NUM_SEQUENTIAL, Axis, ColorBar, Figure, Panel, Series, sequential, series
from landscape_ray.text import number, percent

Floats: TypeAlias = NDArray[np.float64]

LEVELS = (0.001, 0.0025, 0.005)
"""Excess losses whose contours are drawn."""

BEYOND = 3.0
"""The optimum is drawn up to this many times the fitted range."""

_NUM_POINTS = 60
_COLORS = ("c0", "c1", "c2", "c3", "c4", "c5")


def figures(found: ScalingFit) -> list[Figure]:
    """Return the figures of the law; the first has the key "law"."""
    law = StepLaw(found.fit)
    drawn = [_optimum(found, law)] if len(law.groups) > 1 else []
    drawn.append(_bowl(found, law, "law" if not drawn else "bowl"))
    if law.batch is not None:
        drawn.append(_map(found, law))
    if found.fit.data["regret"]["left_out"]:
        drawn.append(_regret(found))
    return drawn


def _optimum(found: ScalingFit, law: StepLaw) -> Figure:
    """Return the best learning rate and batch over the tokens (or the size), with the best run of every group."""
    sizes, horizons = (sorted(set(axis)) for axis in zip(*law.groups, strict=True))
    over_tokens = len(horizons) > 1 and found.fit.data["line"] is None
    values = horizons if over_tokens else sizes
    others = sizes if over_tokens else [float("nan")]
    line = np.geomspace(values[0] / 1.3, BEYOND * values[-1], _NUM_POINTS)
    n0, d0 = centre(law.groups)
    slope = found.fit.data["line"] or 0.0
    names = ["lr"] + (["batch"] if law.batch is not None else [])
    drawn: dict[str, list[Series]] = {name: [] for name in names}
    columns = {name: np.array(found.points[name]) for name in ("N", "D", "loss", *names)}
    for i, other in enumerate(others):
        color = _COLORS[i % len(_COLORS)]
        n = np.full(_NUM_POINTS, other) if over_tokens else line
        d = line if over_tokens else d0 * (line / n0) ** slope
        at = np.log(n / n0), np.log(d / d0)
        best = best_point(found.fit.parameters, *at)
        samples = best_point(samples_of(found.fit), at[0][None], at[1][None])
        tail = (1 - found.fit.confidence) / 2
        name = f"N = {number(other, 3)}" if over_tokens else "best"
        members = [g for g in law.groups if not over_tokens or g[0] == other]
        for key, value, each in zip(names, best, samples, strict=False):
            low, high = np.exp(np.quantile(np.broadcast_to(each, (len(each), _NUM_POINTS)), [tail, 1 - tail], axis=0))
            middle = np.exp(np.broadcast_to(value, _NUM_POINTS))
            rows = [
                int(np.flatnonzero(here)[np.argmin(columns["loss"][here])])
                for g in members
                if (here := (columns["N"] == g[0]) & (columns["D"] == g[1])).any()
            ]
            if len(found.fit.samples):
                drawn[key].append(series("band", line, middle, low=low, high=high, name=name, color=color))
            drawn[key].append(series("line", line, middle, name=name, color=color, weight="main"))
            hover = tuple(f"best run of N = {number(g[0], 3)}, D = {number(g[1], 3)}" for g in members)
            x = columns["D" if over_tokens else "N"][rows]
            drawn[key].append(series("points", x, columns[key][rows], color=color, size=7.0, hover=hover))
    largest, longest = max(law.groups, key=lambda g: g[0] * g[1])
    batch = "" if law.batch is None else f", batch {number(law.batch(largest, longest), 3)} tokens"
    axes = {"lr": Axis(label="best learning rate", scale="log")}
    axes["batch"] = Axis(label="best batch", unit="tokens", scale="log")
    return Figure(
        key="law",
        title="The best learning rate and batch" if law.batch is not None else "The best learning rate",
        takeaway=f"The largest run (N = {number(largest, 3)}, D = {number(longest, 3)}) is best at lr "
        f"{number(law.lr(largest, longest), 3)}{batch}.",
        note="Points: the best run of every pair of N and D, as coarse as the grid of the sweep. Lines: the law, with "
        f"its {found.fit.confidence:.0%} interval, up to {BEYOND:g} times the fitted range.".replace("%", " %"),
        x=Axis(
            label="training tokens" if over_tokens else "model size",
            unit="" if over_tokens else "parameters",
            scale="log",
        ),
        panels=tuple(Panel(y=axes[name], series=tuple(drawn[name])) for name in names),
    )


def _bowl(found: ScalingFit, law: StepLaw, key: str) -> Figure:
    """Return the loss over the learning rate relative to the best one: runs, and the law at the best batch."""
    u, _, loss = _around(found, law)
    n, d = law.groups[-1] if len(law.groups) == 1 else centre(law.groups)
    alone = len(law.groups) == 1
    best = law.lr(n, d) if alone else 1.0
    low, high = found.fit.data["offsets"]["u"]
    line = np.linspace(low, high, 201)
    height = 100 * np.expm1(np.asarray(rise(found.fit.parameters, line, 0.0)))
    region = flat_region(law, n, d, min(WITHIN, float(found.fit.data["window"])))
    ends = [number(end / law.lr(n, d), 2) for end in region.lr]
    ends = [
        end + (" or beyond" if f"lr {side}" in region.open_ends else "")
        for end, side in zip(ends, ("low", "high"), strict=True)
    ]
    top = max(float(loss.max()), 1.0)
    return Figure(
        key=key,
        title="How flat the optimum is in the learning rate",
        takeaway=f"From {ends[0]} to {ends[1]} times the best learning rate the loss stays within "
        f"{percent(region.within)} of its lowest.",
        note="Every run near the optimum, relative to the lowest loss that the law gives its group"
        + ("; those above the line were run at another batch than the best." if law.batch is not None else "."),
        x=Axis(label="learning rate" if alone else "learning rate over the best one", scale="log"),
        panels=(
            Panel(
                y=Axis(
                    label="above the lowest loss", unit="%", limits=(min(float(loss.min()), 0.0) - 0.05, 1.05 * top)
                ),
                series=(
                    series("hline", [0.0], [100 * region.within], color="muted", weight="muted"),
                    series("points", best * np.exp(u), loss, name="runs", color="c0", size=6.0, hover=_hover(found)),
                    series(
                        "line",
                        best * np.exp(line),
                        height,
                        name="the law at the best batch" if law.batch is not None else "the law",
                        color="c1",
                        weight="main",
                    ),
                ),
            ),
        ),
    )


def _map(found: ScalingFit, law: StepLaw) -> Figure:
    """Return all runs near the optimum in the plane of learning rate and batch, with contours of the excess loss."""
    u, v, loss = _around(found, law)
    worst = 100 * float(found.fit.data["window"])
    drawn: list[Series] = []
    for shade in reversed(range(NUM_SEQUENTIAL)):
        here = np.array([sequential(float(x), 0.0, worst) == f"seq:{shade}" for x in loss])
        if here.any():
            hover = tuple(np.array(_hover(found))[here].tolist())
            drawn.append(
                series("points", np.exp(u[here]), np.exp(v[here]), color=f"seq:{shade}", size=7.0, hover=hover)
            )
    window = float(found.fit.data["window"])
    for i, level in enumerate(one for one in LEVELS if one <= window):
        x, y = _contour(law, level)
        drawn.append(
            series(
                "line",
                np.exp(x),
                np.exp(y),
                name=f"{percent(level)} above",
                color="text",
                weight="normal",
                dash=("solid", "dash", "dot")[i],
            )
        )
    ends = found.fit.data["offsets"]["v"]
    away = np.linspace(ends[0], ends[1], 161)
    near, height = valley({k: np.full(161, w) for k, w in found.fit.parameters.items()}, away)
    # only as far as the runs shape it: beyond the window the third order goes astray
    rates = found.fit.data["offsets"]["u"]
    far = np.flatnonzero((height > np.log1p(window)) | (near < rates[0]) | (near > rates[1]))
    first = far[away[far] < 0].max(initial=-1) + 1
    last = far[away[far] > 0].min(initial=len(away))
    near, away = near[first:last], away[first:last]
    drawn.append(
        series("line", np.exp(near), np.exp(away), name="best learning rate of a batch", color="c1", weight="main")
    )
    drawn.append(series("points", [1.0], [1.0], name="best", color="c1", symbol="star", size=14.0))
    n, d = centre(law.groups)
    region = flat_region(law, n, d, min(WITHIN, window))
    assert region.batch is not None
    assert law.batch is not None
    low, high = (number(end / law.batch(n, d), 2) for end in region.batch)
    return Figure(
        key="map",
        title="What learning rate and batch cost",
        takeaway=f"With its best learning rate, a batch from {low} to {high} times the best one costs less than "
        f"{percent(region.within)} of the loss.",
        note="Runs near the optimum of all groups, each relative to the optimum of its own N and D.",
        x=Axis(label="learning rate over the best one", scale="log"),
        panels=(Panel(y=Axis(label="batch over the best one", scale="log"), series=tuple(drawn)),),
        colorbar=ColorBar(label="above the lowest loss (%)", best=0.0, worst=worst),
    )


def _regret(found: ScalingFit) -> Figure:
    """Return by group what the law costs where the group was left out of its fit, beside other rules."""
    data = found.fit.data["regret"]
    places = np.arange(len(data["groups"]), dtype=float)
    names = tuple(f"N {number(n, 3)}, D {number(d, 3)}" for n, d in data["groups"])
    drawn = []
    for key, name, color, symbol in (
        ("middle", "one learning rate and batch for all", "muted", "diamond"),
        ("published", "published constants", "c1", "square"),
        ("left_out", "this law, fitted without the group", "c0", "circle"),
    ):
        if data[key]:
            values = 100 * np.array(data[key])
            drawn.append(series("points", values, places, name=name, color=color, symbol=symbol, size=9.0, hover=names))
    mine = np.array(data["left_out"])
    worst = int(mine.argmax())
    return Figure(
        key="regret",
        title="What following the law would have cost",
        takeaway="In groups that it was not fitted to, the run nearest to the law's choice is "
        f"{percent(float(mine.mean()))} above the best run on average, {percent(float(mine[worst]))} at worst "
        f"({names[worst]}).",
        x=Axis(label="loss of the run nearest to the choice, above the best of its group", unit="%"),
        panels=(Panel(y=Axis(label="", categories=names), series=tuple(drawn)),),
    )


def _around(found: ScalingFit, law: StepLaw) -> tuple[Floats, Floats, Floats]:
    """Return log lr and log batch from their optima (0 without batch), and per cent above the group's floor."""
    x = {name: np.array(values) for name, values in found.points.items()}
    u, v = offsets(x, found.fit.parameters, *centre(law.groups))
    floor = np.zeros(len(u))
    for i, (n, d) in enumerate(law.groups):
        floor[(x["N"] == n) & (x["D"] == d)] = found.fit.parameters[f"floor{i}"]
    return np.asarray(u), np.asarray(v + np.zeros(len(u))), 100 * np.expm1(np.log(x["loss"]) - floor)


def _contour(law: StepLaw, level: float) -> tuple[Floats, Floats]:
    """Return the closed line (log lr, log batch) around the optimum on which the loss is higher by a share."""
    angle = np.linspace(0, 2 * np.pi, 181)
    reach = 1.2 * max(abs(end) for ends in law.fit.data["offsets"].values() for end in ends)
    radius = np.linspace(0, reach, 801)
    heights = rise(law.fit.parameters, np.cos(angle)[:, None] * radius, np.sin(angle)[:, None] * radius)
    above = heights >= np.log1p(level)
    first = np.where(above.any(axis=1), above.argmax(axis=1), len(radius) - 1)
    far = np.where(above.any(axis=1), radius[first], np.nan)
    return far * np.cos(angle), far * np.sin(angle)


def _hover(found: ScalingFit) -> tuple[str, ...]:
    names = [name for name in ("N", "D", "lr", "batch") if name in found.points]
    return tuple(
        f"{run}: " + ", ".join(f"{name} = {number(found.points[name][i], 3)}" for name in names)
        for i, run in enumerate(found.run_ids)
    )
