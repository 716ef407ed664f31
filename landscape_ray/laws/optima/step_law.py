"""The best learning rate and batch as power products of model size and horizon, fitted to all runs of a sweep at once.

    lr*(N, D) = c N^-p D^q,    B*(N, D) = k N^-r D^s

Legend: N parameters, D training tokens, lr peak learning rate, B batch in tokens. The fit is that of the surface of
:mod:`landscape_ray.laws.optima.surface` around the optimum: runs within `window` of the best of their group, each group
with a loss level of its own.

References:
    Li et al. 2025 ("Step Law"), arXiv 2503.04715: lr* = 1.79 N^-0.713 D^0.307, B* = 0.58 D^0.571.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws.core.fit import fit
from landscape_ray.laws.core.law import Law
from landscape_ray.laws.core.objective import Objective
from landscape_ray.laws.core.points import Points
from landscape_ray.laws.core.predict import FLAG_FACTOR, REFUSE_FACTOR, samples_of
from landscape_ray.laws.core.result import FitResult
from landscape_ray.laws.optima.regret import Regret, Rule, regret
from landscape_ray.laws.optima.surface import best_point, centre, offsets, rise, surface, valley
from landscape_ray.laws.optima.sweep import Sweep

Array: TypeAlias = NDArray[np.float64]

WINDOW = 0.01
"""Runs that are worse than the best of their group by more than this are left out."""

MIN_GROUPS = 5
"""From this many groups on they are what the bootstrap resamples: a group is off the power product as a whole."""

ON_LINE = 0.05
"""Scatter of log D around a line over log N below which horizon and size cannot be told apart."""

OFF_LINE = 1.5
"""Factor in D off that line from which on a recommendation says so."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PowerProduct:
    """factor N^-by_size D^by_horizon, with intervals; none without a bootstrap."""

    factor: float
    by_size: float
    by_horizon: float
    intervals: dict[str, tuple[float, float]]

    def __call__(self, N: float, D: float) -> float:
        """Return its value."""
        return float(self.factor * N**-self.by_size * D**self.by_horizon)

    def __str__(self) -> str:
        return f"{self.factor:.4g} N^{-self.by_size:.3f} D^{self.by_horizon:.3f}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recommendation:
    """Learning rate and batch for a run, with intervals and what their uncertainty costs.

    Attributes:
        lr: peak learning rate.
        lr_interval: (low, high).
        batch: in the unit of D; None where it was not swept.
        batch_interval: (low, high), or None; None too where the batch was given.
        expected_regret: how much higher the loss is expected to be than at the unknown optimum, relative: mean over the
            bootstrap.
        warnings: "name: sentence".
    """

    lr: float
    lr_interval: tuple[float, float]
    batch: float | None
    batch_interval: tuple[float, float] | None
    expected_regret: float
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class StepLaw:
    """A fitted surface, seen as a rule for the learning rate and the batch.

    Attributes:
        fit: the surface's fit, which is all there is to keep: `StepLaw(FitResult.from_json(text))`.
    """

    fit: FitResult

    def __post_init__(self) -> None:
        if "surface" not in self.fit.data:
            raise UserError(f"fit must be one of fit_step_law, got a fit of '{self.fit.law}'; fit the sweep")

    @property
    def groups(self) -> tuple[tuple[float, float], ...]:
        """The pairs (N, D) that were fitted."""
        return tuple((float(n), float(d)) for n, d in self.fit.data["groups"])

    @property
    def law(self) -> Law:
        """The surface that was fitted."""
        return surface(self.groups, **self.fit.data["surface"])

    @property
    def lr(self) -> PowerProduct:
        """The best learning rate."""
        return self._product("lr0", "p", "q")

    @property
    def batch(self) -> PowerProduct | None:
        """The best batch; None where it was not swept."""
        return self._product("B0", "r", "s") if "B0" in self.fit.parameters else None

    def _product(self, at: str, size: str, horizon: str) -> PowerProduct:
        n0, d0 = centre(self.groups)
        drawn = {name: values[:, 0] for name, values in samples_of(self.fit).items()}

        def of(p: dict[str, Array]) -> dict[str, Array]:
            zero = np.zeros_like(p[at])
            by_size, by_horizon = p.get(size, zero), p.get(horizon, zero)
            factor = np.exp(np.log(p[at]) + by_size * np.log(n0) - by_horizon * np.log(d0))
            return {"factor": factor, "by_size": by_size, "by_horizon": by_horizon}

        best = of({name: np.array([value]) for name, value in self.fit.parameters.items()})
        tail = (1 - self.fit.confidence) / 2
        known = bool(len(self.fit.samples))
        ends = {name: np.quantile(values, [tail, 1 - tail]) for name, values in of(drawn).items() if known}
        return PowerProduct(
            **{name: float(values[0]) for name, values in best.items()},
            intervals={name: (float(low), float(high)) for name, (low, high) in ends.items()},
        )

    @property
    def rule(self) -> Rule:
        """The law as a rule whose regret can be counted."""
        lr, batch = self.lr, self.batch
        return lambda N, D: (lr(N, D), None if batch is None else batch(N, D))

    def regret(self, sweep: Sweep) -> Regret:
        """Return what following the law would have cost on the runs of a sweep."""
        return regret(sweep, self.rule)

    def recommend(
        self, N: float = 1.0, D: float = 1.0, *, batch: float | None = None, allow_extrapolation: bool = False
    ) -> Recommendation:
        """Return learning rate and batch for a run of N parameters on D tokens.

        Args:
            N: parameters, counted as in the sweep.
            D: training tokens.
            batch: where it is given, by memory or otherwise: the learning rate is then the best one for it.
            allow_extrapolation: also at more than 100 times outside the fitted sizes and horizons, with a warning.

        Raises:
            UserError: far outside what was fitted, or a batch where none was swept.
        """
        warnings = self.range_warnings(N, D, allow_extrapolation)
        n0, d0 = centre(self.groups)
        size, horizon = np.log(N / n0), np.log(D / d0)
        best = {name: np.array([value]) for name, value in self.fit.parameters.items()}
        drawn = {name: values[:, 0] for name, values in samples_of(self.fit).items()}
        chosen_lr, chosen_batch, _ = _choice(best, size, horizon, batch)
        drawn_lr, drawn_batch, lowest = _choice(drawn, size, horizon, batch)
        top_lr, top_batch = best_point(drawn, size, horizon)
        cost = rise(drawn, chosen_lr - top_lr, 0.0 if top_batch is None else chosen_batch - top_batch) - lowest
        tail = (1 - self.fit.confidence) / 2

        def interval(drawn: Array) -> tuple[float, float]:
            low, high = np.exp(np.quantile(drawn, [tail, 1 - tail]))
            return float(low), float(high)

        return Recommendation(
            lr=float(np.exp(chosen_lr[0])),
            lr_interval=interval(drawn_lr),
            batch=None if chosen_batch is None else float(np.exp(chosen_batch[0])),
            batch_interval=None if chosen_batch is None or batch is not None else interval(drawn_batch),
            expected_regret=float(np.mean(np.expm1(cost))),
            warnings=tuple(warnings),
        )

    def range_warnings(self, N: float, D: float, allow_extrapolation: bool = False) -> list[str]:
        """Return in what respect a run lies outside what was fitted.

        Raises:
            UserError: far outside: 100 times, or 10 times where all runs had one value, or D off the line of the runs.
        """
        warnings = [f"weak_fit: {'; '.join(self.fit.reasons)}"] if self.fit.status == "weak" else []
        for name, value, fitted in zip(("N", "D"), (N, D), zip(*self.groups, strict=True), strict=True):
            if not (np.isfinite(value) and value > 0):
                raise UserError(f"{name} must be finite and > 0, got {value}; give the run's own")
            factor = max(value / max(fitted), min(fitted) / value)
            one = len(set(fitted)) == 1
            limit = FLAG_FACTOR if one else REFUSE_FACTOR
            if factor > limit and not allow_extrapolation:
                raise UserError(
                    f"{name} must lie within {limit:g} times the fitted range [{min(fitted):.4g}, {max(fitted):.4g}], "
                    f"got {value:.4g}; "
                    + (f"sweep a second {name}, so that an exponent is known" if one else "sweep larger runs")
                    + ", or allow the extrapolation"
                )
            if factor > FLAG_FACTOR:
                warnings.append(f"extrapolation: {name} is {factor:.0f} times outside what was fitted")
            elif factor > 1 and one:
                warnings.append(f"one_{name}: all runs had {name} {fitted[0]:g}; the optimum is taken to be the same")
        if (slope := self.fit.data["line"]) is not None:
            n0, d0 = centre(self.groups)
            usual = d0 * (N / n0) ** slope
            off = max(D / usual, usual / D)
            if off > FLAG_FACTOR and not allow_extrapolation:
                raise UserError(
                    f"D must lie within {FLAG_FACTOR:g} times the {usual:.4g} that go with N {N:.4g} in the fitted "
                    f"runs, got {D:.4g}; sweep a second D at one N, or allow the extrapolation"
                )
            if off > OFF_LINE:
                warnings.append(
                    f"one_line: the fitted runs have D {usual:.3g} at N {N:.3g}; the optimum of D {D:.3g} is taken to "
                    "be the same"
                )
        return warnings

    def __str__(self) -> str:
        lines = [f"step law: {self.fit.status}, {self.fit.data['num_points']} runs of {len(self.groups)} groups"]
        for name, product in (("lr*", self.lr), ("batch*", self.batch)):
            if product is not None:
                lines.append(f"  {name:<7}= {product}")
                for part, (low, high) in product.intervals.items():
                    lines.append(f"    {part:<11}[{low:.4g}, {high:.4g}] at {self.fit.confidence:.0%}")
        lines += [f"  not certified: {reason}" for reason in self.fit.reasons]
        return "\n".join(lines + [f"  warning: {warning}" for warning in self.fit.warnings])


def fit_step_law(
    sweep: Sweep,
    *,
    window: float = WINDOW,
    order: Literal[2, 3] = 3,
    batch_by_size: bool = True,
    resample: Literal["auto", "groups", "runs"] = "auto",
    num_bootstrap: int = 200,
    confidence: float = 0.9,
    seed: int = 0,
) -> StepLaw:
    """Return the best learning rate and batch over model size and horizon, from all runs of a sweep.

    Args:
        sweep: the runs, over learning rates, and over batches, sizes and horizons where these differ.
        window: runs worse than the best of their group by more than this, relative, are left out.
        order: 2: a parabola in the logarithms; 3: with what is lopsided about it.
        batch_by_size: whether the best batch may depend on N; False holds r at 0 as in the Step Law.
        resample: what the bootstrap draws: whole groups (N, D), or runs; auto: groups where there are 5.
        num_bootstrap: number of bootstrap samples, 0 for none.
        confidence: level of the intervals, in (0, 1).
        seed: of the bootstrap.

    Raises:
        UserError: an option out of range, too few learning rates or runs, batches that differ between N and D only, or
            a surface without a lowest point.

    >>> lr, n = (a.ravel() for a in np.meshgrid(np.geomspace(1e-4, 1e-1, 9), [1e6, 1e7, 1e8]))
    >>> best = 2.0 * n**-0.5
    >>> law = fit_step_law(Sweep(lr, 3 * np.exp(0.004 * np.log(lr / best) ** 2), N=n), num_bootstrap=0)
    >>> round(law.lr.factor, 5), round(law.lr.by_size, 5)
    (2.0, 0.5)
    """
    if not window > 0:
        raise UserError(f"window must be > 0, got {window}; {WINDOW} is usual")
    if order not in (2, 3):
        raise UserError(f"order must be 2 or 3, got {order}; 3 also fits that too high a rate costs more")
    if resample not in ("auto", "groups", "runs"):
        raise UserError(f"resample must be auto, groups or runs, got '{resample}'; auto is usual")
    kept = sweep.take(sweep.excess <= window)
    two = sweep.batch is not None and len(np.unique(np.asarray(sweep.batch))) > 1
    groups = list(sweep.groups)
    lr, batch = np.asarray(kept.lr), np.asarray(kept.batch) if two else None
    if len(np.unique(lr)) < 3:
        raise UserError(
            f"lr must have three different values among the runs within {window:.1%} of the best, got "
            f"{len(np.unique(lr))}; sweep more finely, or widen the window"
        )
    if batch is not None and not batch_varies(kept):
        raise UserError(
            "batch must have three different values at one N and D among the runs within "
            f"{window:.1%} of the best, got fewer in all groups; sweep it at an equal number of tokens, or leave it out"
        )
    best = np.asarray(sweep.excess)[sweep.excess <= window] == 0
    line = _line(groups)
    shape: dict[str, Any] = {
        "lr": _search_range(lr, best),
        "batch": None if batch is None else _search_range(batch, best),
        "order": order,
        "batch_by_size": batch_by_size,
        "by_horizon": line is None,
    }
    by_group = resample == "groups" or (resample == "auto" and len(groups) >= MIN_GROUPS)
    names = [f"N {n:g} D {d:g}" for n, d in zip(kept.sizes, kept.horizons, strict=True)] if by_group else kept.run_ids
    columns = {"N": kept.sizes, "D": kept.horizons, "lr": lr} | ({} if batch is None else {"batch": batch})
    result = fit(
        surface(groups, **shape),
        Points(columns, kept.loss, names),
        objective=Objective("least_squares"),
        num_bootstrap=num_bootstrap,
        resampling="runs",
        confidence=confidence,
        seed=seed,
    )
    p = result.parameters
    if not (p["a"] > 0 and (batch is None or p["a"] * p["b"] > p["c"] ** 2)):
        raise UserError(
            "the loss must have a lowest point over learning rate and batch, got a surface without one; sweep wider, "
            "so that the loss rises on all sides"
        )
    away = offsets(columns, p, *centre(groups))
    record = {
        "groups": [list(pair) for pair in groups],
        "surface": shape,
        "line": line,
        "window": window,
        "num_left_out": len(sweep) - len(kept),
        "offsets": {name: [float(np.min(v)), float(np.max(v))] for name, v in zip("uv", away, strict=True)},
    }
    law = StepLaw(dataclasses.replace(result, data=result.data | record))
    warnings = (*result.warnings, *sweep.warnings(), *_outside(sweep, law), *_unidentified(groups, line))
    return StepLaw(dataclasses.replace(law.fit, warnings=warnings))


def batch_varies(sweep: Sweep) -> bool:
    """Return whether runs of one N and D have three different batches somewhere, which the best batch needs."""
    if sweep.batch is None:
        return False
    batch = np.asarray(sweep.batch)
    return any(len(np.unique(batch[rows])) >= 3 for rows in sweep.groups.values())


def _line(groups: list[tuple[float, float]]) -> float | None:
    """Return k where D goes as N^k in all groups, so that the exponents of size and horizon cannot be told apart."""
    size, horizon = np.log(np.array(groups)).T
    size, horizon = size - size.mean(), horizon - horizon.mean()
    if not (size.any() and horizon.any()):
        return None
    slope = float(size @ horizon / (size @ size))
    return slope if float(np.std(horizon - slope * size)) < ON_LINE else None


def _unidentified(groups: list[tuple[float, float]], line: float | None) -> list[str]:
    """Return what the groups cannot tell about the exponents."""
    sizes, horizons = (sorted(set(axis)) for axis in zip(*groups, strict=True))
    found = [
        f"one_{name}: all runs have {name} {values[0]:g}; how the optimum changes with {name} is not known"
        for name, values in (("N", sizes), ("D", horizons))
        if len(values) == 1 and values[0] != 1
    ]
    if line is not None:
        found.append(
            f"one_line: D goes as N^{line:.2g} in all groups, so that the exponents of N and D cannot be told apart; "
            "those of N stand for both, along that line only"
        )
    if 1 < len(groups) < MIN_GROUPS:
        found.append(
            f"few_groups: the exponents come from {len(groups)} pairs of N and D; their intervals hold the noise of "
            "the runs, not what the power law misses"
        )
    return found


def _search_range(values: Array, best: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Return smallest value, geometric mean of the best runs, and largest value."""
    return float(values.min()), float(np.exp(np.log(values[best]).mean())), float(values.max())


def _choice(p: dict[str, Array], size: float, horizon: float, batch: float | None) -> tuple[Array, Any, Any]:
    """Return log lr and log batch to take (s,), and the rise of log L there, for parameters (s,).

    Without a batch these are the optimum; with one, the learning rate at which the loss is lowest for it.
    """
    log_lr, log_batch = best_point(p, size, horizon)
    if batch is None:
        return log_lr, log_batch, 0.0
    if log_batch is None:
        raise UserError(f"batch must have been swept to give one, got {batch:g} for a sweep of lr; leave it out")
    if not (np.isfinite(batch) and batch > 0):
        raise UserError(f"batch must be finite and > 0, got {batch}; give it in the unit of D")
    away = np.log(batch) - log_batch
    u, cost = valley(p, away)
    return log_lr + u, np.full_like(log_lr, np.log(batch)), cost


def _outside(sweep: Sweep, law: StepLaw) -> list[str]:
    """Return a warning for every group whose optimum is outside what was tried in it."""
    found = []
    for (n, d), rows in sweep.groups.items():
        pairs = [("lr", np.asarray(sweep.lr)[rows], law.lr)]
        if law.batch is not None:
            pairs.append(("batch", np.asarray(sweep.batch)[rows], law.batch))
        for name, tried, product in pairs:
            if not tried.min() <= product(n, d) <= tried.max():
                found.append(
                    f"outside_sweep: the best {name} of N {n:g}, D {d:g} would be {product(n, d):.3g}, outside what "
                    f"was tried, [{tried.min():.3g}, {tried.max():.3g}]"
                )
    return found
