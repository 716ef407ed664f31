"""The schedule that a law considers best under a fixed peak and horizon, as corners that training can run.

The laws are trusted here only where they have been looked at: the peak is the fitted one, the warm-up is given, the
rate never rises after it and never falls below the lowest fitted share of the peak, the horizon stays inside three
times the fitted one, and a schedule whose prediction carries a warning is not a candidate. What is left to choose is
when and how the rate falls.

The result comes as a `table` of progress and height, straight lines in between, because its losses were computed on
exactly these lines: :func:`table_rates` gives the rates of such a table, as `landscape_ray.schedules` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize

from landscape_ray.errors import UserError
from landscape_ray.laws.core.law import Law
from landscape_ray.laws.core.result import FitResult, Prediction
from landscape_ray.laws.curves.curve import Curve
from landscape_ray.laws.curves.prediction import HORIZON_FACTOR, final_losses, law_of, predict_curve

Array: TypeAlias = NDArray[np.float64]
Points: TypeAlias = tuple[tuple[float, float], ...]
Family: TypeAlias = Literal["wsd", "free"]

SHAPES: dict[str, Callable[[Array], Array]] = {
    "linear": lambda progress: 1 - progress,
    "sqrt": lambda progress: 1 - np.sqrt(progress),
    "cosine": lambda progress: np.asarray(0.5 * (1 + np.cos(np.pi * progress))),
}
"""Height of a cooldown by its progress, both in [0, 1]."""

_CORNERS = 16
"""Corners of a curved cooldown, and of a free schedule."""

_RULED_OUT = 100.0
"""Added to the loss, in nats, of a schedule outside the fitted range."""

_BLOCKING = ("annealing_area", "zero_lr", "horizon")
"""Warnings of a prediction that rule a schedule out."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class BestSchedule:
    """A schedule chosen by a law.

    Attributes:
        points: corners: pairs of progress and height.
        peak_lr: its peak.
        num_steps: its updates.
        description: family and choices in words.
        prediction: of the loss at its end.
        gain_nats: by how much its predicted final loss is lower than that of the best fitted schedule.
        gain_low: lower end of the interval of the gain, from the bootstrap samples of the law.
        gain_high: upper end.
        compared_with: the fitted run whose schedule, stretched to this horizon, the law considers best.
        warnings: what to know before use, each "name: sentence".
    """

    points: Points
    peak_lr: float
    num_steps: int
    description: str
    prediction: Prediction
    gain_nats: float
    gain_low: float
    gain_high: float
    compared_with: str
    warnings: tuple[str, ...]

    def rates(self) -> Array:
        """Return the learning rate of every update (num_steps,)."""
        return table_rates(self.points, self.peak_lr, self.num_steps)

    def toml(self) -> str:
        """Return the schedule as lines of a sweep file, with every digit."""
        corners = ", ".join(f"[{progress!r}, {height!r}]" for progress, height in self.points)
        return f'[train.schedule]\nname = "table"\npeak_lr = {self.peak_lr!r}\nwarmup_steps = 0\npoints = [{corners}]\n'


def table_rates(points: Points, peak_lr: float, num_steps: int) -> Array:
    """Return the learning rate (num_steps,) of a table: straight lines between its corners, at step / num_steps."""
    progress, heights = np.array(points, dtype=np.float64).T
    return np.asarray(peak_lr * np.clip(np.interp(np.arange(num_steps) / num_steps, progress, heights), 0.0, 1.0))


def best_schedule(
    fit: FitResult,
    curves: Sequence[Curve],
    num_steps: int,
    *,
    warmup_steps: int = 0,
    family: Family = "wsd",
    final_ratio: float | None = None,
    law: Law | None = None,
) -> BestSchedule:
    """Return the schedule whose final loss a fitted law considers lowest.

    Args:
        fit: of a law of loss curves.
        curves: the runs that were fitted: their schedules, stretched to `num_steps`, are what it is compared with.
        num_steps: updates of the run, > warmup_steps, at most three times the fitted horizon.
        warmup_steps: updates of linear warm-up.
        family: wsd: a stable part and a cooldown, linear, sqrt or cosine; free: 16 corners that never rise.
        final_ratio: smallest share of the peak at the end; None for the lowest that was fitted, and not less.
        law: the one that was fitted; None for the listed one.

    Raises:
        UserError: out of the fitted range, or a fit that knows of no decay.
    """
    if not curves:
        raise UserError("curves must hold the fitted runs, got none; pass them to compare with")
    law = law or law_of(fit)
    lowest = float(fit.data["lowest_ratio"])
    if not 0 <= warmup_steps < num_steps - 1:
        raise UserError(f"warmup_steps must be in [0, {num_steps - 2}], got {warmup_steps}; something must be left")
    if num_steps > HORIZON_FACTOR * fit.data["horizon"]:
        raise UserError(
            f"num_steps must be at most {HORIZON_FACTOR:g} times the fitted {fit.data['horizon']}, got {num_steps}; "
            "fit longer runs"
        )
    if not fit.data.get("decay_identified", True):
        raise UserError("fit must have seen a decay, got runs without one; fit a run with a decay")
    if family not in ("wsd", "free"):
        raise UserError(f"family must be wsd or free, got '{family}'; choose one")
    floor = lowest if final_ratio is None else final_ratio
    if not lowest <= floor <= 1:
        raise UserError(
            f"final_ratio must be in [{lowest:g}, 1], the lowest that was fitted, got {floor:g}; fit a run that goes "
            "lower"
        )
    search = _Search(law, fit, curves[0], num_steps, warmup_steps)
    points, words = (_best_wsd if family == "wsd" else _best_free)(search, floor)
    names, known = _fitted_schedules(curves, num_steps, warmup_steps)
    value, draws = search.losses([*known, points])
    rival = int(np.argmin(value[:-1]))
    tail = (1 - fit.confidence) / 2
    low, high = np.quantile(draws[:, rival] - draws[:, -1], [tail, 1 - tail])
    rates = table_rates(points, fit.data["peak_lr"], num_steps)
    prediction = predict_curve(
        fit, rates, [num_steps], warmup_steps, batch_size=search.batch, num_params=curves[0].num_params, law=law
    )
    gain = float(value[rival] - value[-1])
    warnings = list(prediction.warnings)
    if low <= 0:
        warnings.append("no_clear_gain: the interval of the gain holds 0, so the best fitted schedule is as good")
    return BestSchedule(
        points=points,
        peak_lr=float(fit.data["peak_lr"]),
        num_steps=num_steps,
        description=words,
        prediction=prediction,
        gain_nats=gain,
        gain_low=float(low),
        gain_high=float(high),
        compared_with=names[rival],
        warnings=tuple(warnings),
    )


class _Search:
    """Final losses of tables under one fit."""

    def __init__(self, law: Law, fit: FitResult, like: Curve, num_steps: int, warmup_steps: int) -> None:
        self.law, self.fit, self.num_steps, self.warmup = law, fit, num_steps, warmup_steps
        self.peak = float(fit.data["peak_lr"])
        self.batch = None if like.batch_size is None else float(like.batch_size[-1])
        self.num_params = like.num_params
        self.bare = dataclasses.replace(fit, samples=fit.samples[:0], misfit=None)

    def curve(self, points: Points) -> Curve:
        rates = table_rates(points, self.peak, self.num_steps)
        batch: ArrayLike | None = self.batch
        return Curve("candidate", rates, [self.num_steps], [1.0], self.warmup, batch, self.num_params)  # type: ignore[arg-type]

    def losses(self, tables: Sequence[Points]) -> tuple[Array, Array]:
        return final_losses(self.law, self.fit, [self.curve(points) for points in tables])

    def score(self, points: Points) -> float:
        """Return the final loss; more by a penalty where the law would warn in a way that rules the schedule out."""
        curve = self.curve(points)
        found = predict_curve(
            self.bare,
            curve.lr,
            curve.step,
            self.warmup,
            batch_size=self.batch,
            num_params=self.num_params,
            law=self.law,
        )
        blocked = any(warning.partition(":")[0] in _BLOCKING for warning in found.warnings)
        return float(found.loss_nats[0]) + (_RULED_OUT if blocked else 0.0)

    def corners(self, progress: Array, heights: Array) -> Points:
        """Return the table of heights at progress after the warm-up, both (m,), with the warm-up before it."""
        start = self.warmup / self.num_steps
        body = [(float(start + (1 - start) * p), float(h)) for p, h in zip(progress, heights, strict=True)]
        if not self.warmup:
            return tuple(body)
        # Update k of a warm-up is at (k + 1) / W: a straight line from 1 / W at progress 0 to 1 at (W - 1) / S.
        rise = [(0.0, 1 / self.warmup)] if self.warmup > 1 else []
        return (*rise, ((self.warmup - 1) / self.num_steps, 1.0), *body)


def _best_wsd(search: _Search, floor: float) -> tuple[Points, str]:
    def table(shape: str, fraction: float, final: float) -> Points:
        number = 2 if shape == "linear" else _CORNERS
        inner = np.linspace(0, 1, number)
        if shape == "sqrt":
            inner = inner**2  # steep at first
        heights = final + (1 - final) * SHAPES[shape](inner)
        progress = 1 - fraction + fraction * inner
        if fraction < 1:
            progress, heights = np.append(0.0, progress), np.append(1.0, heights)
        return search.corners(progress, heights)

    finals = sorted({floor, min(1.0, max(2 * floor, floor + 0.05)), min(1.0, floor + 0.2)})
    best: tuple[float, Points, str] | None = None
    for shape in SHAPES:
        grid = np.linspace(0.05, 1.0, 20)
        for final in finals:
            loss, fraction = min((search.score(table(shape, f, final)), float(f)) for f in grid)
            if best is None or loss < best[0]:
                share = f"the last {fraction:.0%} after the warm-up"
                words = f"wsd, {shape} cooldown over {share}, to {final:.3g} of the peak"
                best = (loss, table(shape, fraction, final), words)
    if best is None or best[0] >= _RULED_OUT:
        raise UserError("num_steps must leave a schedule inside the fitted range, got none; fit runs of this horizon")
    return best[1], best[2]


def _best_free(search: _Search, floor: float) -> tuple[Points, str]:
    progress = np.linspace(0, 1, _CORNERS)
    start_points, _ = _best_wsd(search, floor)

    def table(z: Array) -> Points:
        # Shares of the whole fall, one an interval and one that is not used: positive, and at most 1 in sum.
        share = np.exp(z - z.max())
        share /= share.sum()
        heights = np.append(1.0, 1 - (1 - floor) * np.cumsum(share[:-1]))
        return search.corners(progress, np.clip(heights, floor, 1.0))

    from_progress, from_height = np.array(start_points).T
    offset = search.warmup / search.num_steps
    heights = np.interp(offset + (1 - offset) * progress, from_progress, from_height)
    fall = np.append(-np.diff(heights), heights[-1] - floor) / max(1 - floor, 1e-12)
    z0 = np.log(np.maximum(fall, 1e-3))

    def objective(z: Array) -> float:
        return search.score(table(z))

    found = minimize(objective, z0, method="L-BFGS-B", options={"maxiter": 30, "maxfun": 1200, "eps": 1e-4})
    points = table(found.x)
    if search.score(points) > search.score(start_points):
        return start_points, "free corners did no better than the best wsd schedule, which is this one"
    return points, f"{_CORNERS} corners that never rise, to {points[-1][1]:.3g} of the peak"


def _fitted_schedules(curves: Sequence[Curve], num_steps: int, warmup_steps: int) -> tuple[list[str], list[Points]]:
    """Return names and tables of the fitted schedules after their warm-up, stretched to the horizon asked for."""
    names, tables = [], []
    for curve in curves:
        body = curve.lr[curve.warmup_steps : curve.step[-1]] / curve.peak_lr
        place = np.unique(np.linspace(0, len(body) - 1, min(len(body), 400)).astype(int))
        start = warmup_steps / num_steps
        inner = [(start + (1 - start) * float(i / len(body)), float(body[i])) for i in place]
        inner.append((1.0, float(body[-1])))
        rise = [(0.0, 1 / warmup_steps)] if warmup_steps > 1 else []
        edge = [((warmup_steps - 1) / num_steps, 1.0)] if warmup_steps else []
        names.append(curve.run_id)
        tables.append((*rise, *edge, *inner))
    return names, tables
