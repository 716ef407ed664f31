"""Whether the curves of another laboratory say how the multi-power law is to be regularised: forecasts of both.

`bench_multi_power.py` chooses on three training schedules a size, none of which is three times as long as another, as
test schedules are. The cooldown runs (Haegele et al. 2024, 124M) hold the same task over again, with answers that may
be looked at: fit a cosine to 10 % of the peak, the constant run and one cooldown, all up to T updates; forecast the
constant run and the cosine of 50,000 updates, and cooldowns that were not fitted. Fifteen tasks: peaks 1e-3 and 2e-3
with T = 15,000, peaks 5e-4, 1e-3 and 2e-3 with T = 25,000, times three cooldowns (.2, .4, .6 of T). Points below a
tenth of the peak are left out, so that rates range as in the published curves, and so is the first 9 % of T, the share
of their warm-up.

Candidates:
    joint   the fit of `landscape_ray.laws.memory.regularised`: alpha and the shape (C, beta, gamma) near a centre.
    apart   L0, A, alpha by points at the peak alone (after .15 T, weights step^2), so that what the law gets wrong of
            decays cannot bend them; then B and the shape, near a centre, with these held.
    gain    as apart, and B held at its value under instant annealing (G = 1); the shape is free, nothing is tuned.

Two scores, mean relative errors in 1e-4: `other` over the forecasts of the fifteen tasks; `own` that of
`bench_multi_power.py` on the published training curves. Five candidates were looked at, in this order; each was fixed
before its errors on the test schedules were printed. alpha of the centre is 1/2. While they were settled on, the scores
were made on one cooldown of three; those here are of all.

    look  candidate                                             other    own   test: 25M, 100M, 400M in 1e-4
          (the centre of the package, 1e-6)                     17.45   9.97   12.1  13.2  21.0
    3     apart, C .04 tuned on `other`, beta = gamma = 1/2     12.27  11.03   13.0  14.0  20.8
    4     joint, C .04, by both scores                          13.95  10.17   11.6  14.0  22.0
    5     apart, C .02, gamma .8, 3e-6: least sum of scores     12.10  10.44   13.6  14.6  22.1
    6     apart, four constants tuned on `other` alone          11.33  13.74   14.4  15.5  24.4
    7     gain                                                  11.71  17.98   12.0  12.5  16.8
          (published)                                                          11.0  14.2  16.8

So other curves do ask for a faster memory than the package's centre (C .04 and more), and for the forward term to be
fitted apart, which halves the error of the long constant run. But what is best there is not best here, and the law
itself errs there: every candidate misses the long cosine by .003 or more on average, too low in its middle. `gain`
comes nearest to the published errors and has nothing to tune, but neither score chooses it, `own` least of all, where a
decay that has not ended gives too small a B; and it misses at 25M. Tried without a look: generalised least squares,
with noise and the law's own smooth error as Gaussian processes, whose scales maximise the evidence of the published
training curves. It finds C .02 to .11 and gamma .7 to 1.0, `own` 10.3, `other` (of five tasks) 19.5: curves at one
horizon determine a shape, and it is a bad one at three times the horizon.

Usage:
    python scripts/bench_multi_power_transfer.py [--scan] [--test] [--data FOLDER]
"""

from __future__ import annotations

import argparse
import collections
import csv
import dataclasses
import functools
import gzip
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bench_multi_power import SIZES, TRAINED_ON, Parameters, Runs, score, test_errors

from landscape_ray.laws import MULTI_POWER, Curve, CurveSet, Points
from landscape_ray.laws.core.fit import solve
from landscape_ray.laws.core.law import Law, Variable, linear, nonlinear
from landscape_ray.laws.memory.multi_power import prepare_changes
from landscape_ray.laws.memory.regularised import WIDTH

PEAK = 3e-4
"""Rates of all tasks are counted in the unit in which their peak is this one."""

NUM_POINTS = {"fitted": 40, "forecast": 60}
"""Of a curve."""

INSTANT = {"C": 10.0, "beta": 5.0, "gamma": 0.0}
"""Under this shape a change of the rate is felt at once: G = 1 to four digits after an update."""

FORWARD = Law(
    name="forward",
    formula="L = L0 + A S^-alpha",
    variables=(Variable("S"),),
    parameters=(linear("L0"), linear("A"), nonlinear("alpha", "exponent", 0.01, 5.0, starts=(0.5,))),
    columns=lambda x, p: (1.0, x["S"] ** -p["alpha"]),
)


class Candidate(NamedTuple):
    """A way to fit: which of the three, the centre, and the strength per point."""

    kind: str
    C: float = 0.04
    beta: float = 0.5
    gamma: float = 0.5
    strength: float = 0.0


LOOKED_AT = (
    Candidate("apart", 0.04, 0.5, 0.5, 1e-6),
    Candidate("joint", 0.04, 0.5, 0.5, 1e-6),
    Candidate("apart", 0.02, 0.5, 0.8, 3e-6),
    Candidate("apart", 0.0124, 0.68, 1.476, 4.5e-6),
    Candidate("gain"),
)
PRESENT = Candidate("joint", 0.01, 0.5, 0.5, 1e-6)
"""The centre of the package."""


def fit(candidate: Candidate, data: CurveSet, x: Mapping[str, Any]) -> Parameters:
    """Return the law fitted to points as the candidate fits it."""
    centre = {"alpha": 0.5, "C": candidate.C, "beta": candidate.beta, "gamma": candidate.gamma}
    held = {} if candidate.kind == "joint" else forward(data, x)
    if candidate.kind == "gain":
        held["B"] = _solved(centre, data, x, held | INSTANT, {})["B"]
    stiffness = {
        name: candidate.strength * len(data.response) / WIDTH[name] ** 2 for name in centre if name not in held
    }
    penalty = {name: (centre[name], value) for name, value in stiffness.items() if value}
    return _solved(centre, data, x, held, penalty)


def _solved(
    centre: Mapping[str, float],
    data: CurveSet,
    x: Mapping[str, Any],
    held: Mapping[str, float],
    penalty: Mapping[str, tuple[float, float]],
) -> Parameters:
    law = dataclasses.replace(
        MULTI_POWER,
        prepare=lambda *_: x,
        parameters=tuple(
            dataclasses.replace(p, starts=(centre[p.name],)) if p.name in centre else p for p in MULTI_POWER.parameters
        ),
    )
    solution, _ = solve(law, data, fix=held, penalty=penalty)
    return {name: float(value[0]) for name, value in solution.natural(solution.best).items()}


def forward(data: CurveSet, x: Mapping[str, Any]) -> Parameters:
    """Return (L0, A, alpha) by the points at the peak rate."""
    at_peak = data.at_points([(curve.lr >= curve.peak_lr * (1 - 1e-9)).astype(float) for curve, _ in data.fitted]) > 0
    step = np.concatenate([step for _, step in data.fitted])
    kept = at_peak & (step > 0.15 * step.max())
    weights = step[kept].astype(float) ** 2
    points = Points({"S": np.exp(x["log_S"][kept])}, np.asarray(data.response)[kept], weights=weights / weights.mean())
    solution, _ = solve(FORWARD, points)
    return {name: float(value[0]) for name, value in solution.natural(solution.best).items()}


# ------------------------------------------------------------------------------------------------- the other laboratory


class Task(NamedTuple):
    """Points to fit, and points to forecast by curve."""

    fitted: tuple[CurveSet, dict[str, Any]]
    forecast: list[tuple[CurveSet, dict[str, Any]]]


class Cooldowns:
    """The cooldown runs of 124M."""

    def __init__(self, folder: Path) -> None:
        with open(folder / "runs.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["dataset"] == "slimpajama"]
        self.rows = [row for row in rows if row["params"] == "123587328" and row["scheduler"] != "wsd_twostage"]
        self.losses: dict[str, dict[int, float]] = collections.defaultdict(dict)
        with gzip.open(folder / "curves.csv.gz", "rt") as file:
            for row in csv.DictReader(file):
                if row["split"] == "val":
                    self.losses[row["run_id"]][int(row["iter"])] = float(row["loss"])

    def tasks(self) -> list[Task]:
        """Return the fifteen tasks."""
        return [
            self._task(peak, length, fraction)
            for peak, length in (("0.001", 15), ("0.002", 15), ("0.0005", 25), ("0.001", 25), ("0.002", 25))
            for fraction in ("0.2", "0.4", "0.6")
        ]

    def _task(self, peak: str, thousands: int, fraction: str) -> Task:
        length = 1000 * thousands
        take = functools.partial(self._curve, peak, first=0.09 * length)
        tests = [take("wsd", 50_000, "0.0"), take("cos", 50_000, "0.0")]
        tests += [take("wsd", length, share) for share in ("0.1", "0.2", "0.4", "0.8") if share != fraction]
        tests.append(take("wsd", 25_000, "0.2", decay="sqrt"))
        if length < 25_000:
            tests.append(take("wsd", 25_000, "0.2"))
        seen = [take("cos", length, "0.0"), take("wsd", 50_000, "0.0", last=length), take("wsd", length, fraction)]
        return Task(_points(seen, NUM_POINTS["fitted"]), [_points([curve], NUM_POINTS["forecast"]) for curve in tests])

    def _curve(
        self,
        peak: str,
        kind: str,
        length: int,
        fraction: str,
        *,
        first: float,
        last: int = 10**9,
        decay: str = "linear",
    ) -> Curve:
        """Return the run of this kind, preceded by the constant run where only its cooldown was recorded."""
        asked = {"lr": peak, "scheduler": kind, "iterations": str(length), "fract_decay": fraction}
        found = [row for row in self.rows if all(row[key] == value for key, value in asked.items())]
        if kind == "cos":  # to a tenth of the peak
            found = [row for row in found if row["cos_final_lr"] in ("", "-1.0")]
        elif fraction != "0.0":
            found = [row for row in found if row["decay_type"] == decay]
        row = found[-1] if fraction == "0.0" and kind == "wsd" else found[0]
        table = sorted(self.losses[row["run_id"]].items())
        if table[0][0] > first + 300:
            table = [pair for pair in self._constant(peak) if pair[0] < table[0][0]] + table
        lr = _rates(row)[:last] * (PEAK / float(peak))
        step, loss = (np.array(column) for column in zip(*table, strict=True))
        kept = (step > first) & (step <= len(lr))
        kept[kept] &= lr[step[kept] - 1] >= 0.095 * PEAK
        step, loss = step[kept], loss[kept]
        return Curve(f"{row['run_id']} to {step[-1]}", lr[: step[-1]], step, loss, int(row["warmup_steps"]))

    def _constant(self, peak: str) -> list[tuple[int, float]]:
        asked = {"lr": peak, "iterations": "50000", "scheduler": "wsd", "fract_decay": "0.0"}
        rows = [row for row in self.rows if all(row[key] == value for key, value in asked.items())]
        return sorted(self.losses[rows[-1]["run_id"]].items())


def _rates(row: Mapping[str, str]) -> np.ndarray:
    total, warmup, peak = int(row["iterations"]), int(row["warmup_steps"]), float(row["lr"])
    k = np.arange(total)
    if row["scheduler"] == "cos":
        body = 0.1 * peak + 0.9 * peak * 0.5 * (1 + np.cos(np.pi * (k - warmup) / (total - warmup)))
    else:
        length = int(float(row["fract_decay"] or 0) * total)
        progress = np.clip((k - (total - length)) / max(length, 1), 0, 1)
        body = peak * (1 - (np.sqrt(progress) if row["decay_type"] == "sqrt" else progress))
    return np.where(k < warmup, peak * (0.01 + 0.99 * k / warmup), body)


def _points(curves: list[Curve], most: int) -> tuple[CurveSet, dict[str, Any]]:
    parts = []
    for curve in curves:
        kept = np.unique(np.linspace(0, len(curve.step) - 1, min(most, len(curve.step))).astype(int))
        parts.append(dataclasses.replace(curve, step=curve.step[kept], loss_nats=curve.loss_nats[kept]))
    data = CurveSet(parts, equal_runs=True)
    return data, prepare_changes(data, {})


def other_score(tasks: list[Task], candidate: Candidate) -> float:
    """Return the mean relative error over the forecasts of a task, averaged over tasks."""
    errors = []
    for task in tasks:
        found = fit(candidate, *task.fitted)
        errors.append(
            np.mean([np.abs(MULTI_POWER.predict(x, found) / data.response - 1).mean() for data, x in task.forecast])
        )
    return float(np.mean(errors))


# ------------------------------------------------------------------------------------------------- the published curves


def own_fitter(runs: Runs, candidate: Candidate) -> Any:
    """Return what fits the published curves: (schedules, last update) -> parameters by size."""

    def fitter(names: tuple[str, ...], last: float) -> dict[str, Parameters]:
        points = {size: runs.points(size, names, False, 0.0, last, 0.0, NUM_POINTS["fitted"]) for size in SIZES}
        return {size: fit(candidate, *points[size]) for size in SIZES}

    return fitter


def report(runs: Runs, tasks: list[Task], candidate: Candidate, test: bool) -> None:
    fitter = own_fitter(runs, candidate)
    line = f"other {1e4 * other_score(tasks, candidate):5.2f}  own {1e4 * score(runs, False, fitter):5.2f}  {candidate}"
    if test:
        line += f"  test: {test_errors(runs, fitter(TRAINED_ON, math.inf), False)}"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", action="store_true", help="also a grid of centres and strengths, two minutes more")
    parser.add_argument("--test", action="store_true", help="also the errors on test schedules of what was looked at")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the published curves")
    options = parser.parse_args()
    runs = Runs(options.data / "multi_power_law")
    tasks = Cooldowns(options.data / "cooldown_runs").tasks()
    for candidate in (PRESENT, *LOOKED_AT):
        report(runs, tasks, candidate, options.test)
    if options.scan:
        for values in itertools.product(
            ("joint", "apart"), (0.02, 0.04, 0.08), (0.5,), (0.5, 0.8, 1.1), (3e-7, 1e-6, 3e-6)
        ):
            report(runs, tasks, Candidate(*values), test=False)


if __name__ == "__main__":
    main()
