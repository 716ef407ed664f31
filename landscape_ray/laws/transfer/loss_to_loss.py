"""From one loss to another: other training data, or a test.

    L1 = K (L0 - E0)^kappa + E1

Legend: L0, L1 losses; E0, E1 what no training removes of them; K, kappa how what is left over carries over. Three modes
share the form: train-to-train (the same size and tokens on two training sets, each run's loss on its own set);
train-to-test (one run's training loss and its loss on a test); test-to-test (two runs of the same size and tokens, both
on the test). Runs are paired by what they share, see :func:`match_runs`.

With E0 and E1 given (each from a law of its own loss over size and data) it is a power law of the excess losses, fitted
by ordinary least squares of the logarithms. With E0 alone, E1 is fitted too. Without both, all four are, which needs a
wide range of losses: E0 and kappa trade off, and on published runs E0 ends at the smallest loss measured.

References:
    Brandfonbrener et al. 2024, arXiv 2411.12925.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws.core.fit import fit
from landscape_ray.laws.core.law import Law, Variable, linear, nonlinear
from landscape_ray.laws.core.objective import Objective
from landscape_ray.laws.core.points import Points
from landscape_ray.laws.core.predict import predict_points
from landscape_ray.laws.core.result import FitResult, PointPrediction

Array: TypeAlias = NDArray[np.float64]

_KAPPA = nonlinear("kappa", "exponent of the excess loss", 0.05, 5.0, starts=(0.5, 1.0, 2.0))
_KEEP_BELOW = 0.999
"""E0 is looked for up to this share of the smallest loss."""

_TOO_NEAR = 0.2
"""A fitted E0 nearer to the smallest loss than this share of the range of losses is no limit of training."""

EXCESS_TO_EXCESS = Law(
    name="excess_to_excess",
    title="excess loss over another excess loss",
    formula="L1 - E1 = K (L0 - E0)^kappa",
    reference="Brandfonbrener et al. 2024, arXiv 2411.12925",
    variables=(Variable("excess_0", "nats/token", "loss L0 - E0", min_distinct=2),),
    response=Variable("excess_1", "nats/token", "loss L1 - E1"),
    parameters=(linear("K", "factor"), _KAPPA),
    columns=lambda x, p: (np.exp(p["kappa"] * np.log(x["excess_0"])),),
    slopes=lambda x, p: ({"kappa": np.log(x["excess_0"]) * np.exp(p["kappa"] * np.log(x["excess_0"]))},),
    assumptions=("E0 and E1 are known", "paired runs share size and tokens"),
)


def _excess(x: Mapping[str, Any], p: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return L0 - E0 where it is positive and 1 elsewhere, and where it is."""
    excess = x["loss_0"] - p["E0"]
    above = np.real(excess) > 0
    return np.where(above, excess, 1.0), above


def _columns(x: Mapping[str, Any], p: Mapping[str, Any]) -> tuple[Any, ...]:
    excess, above = _excess(x, p)
    return 1.0, np.where(above, excess ** p["kappa"], 0.0)


LOSS_TO_LOSS = Law(
    name="loss_to_loss",
    title="loss over another loss",
    formula="L1 = K (L0 - E0)^kappa + E1",
    reference="Brandfonbrener et al. 2024, arXiv 2411.12925",
    variables=(Variable("loss_0", "nats/token", "loss L0", min_distinct=4),),
    response=Variable("loss_1", "nats/token", "loss L1"),
    parameters=(
        linear("E1", "what no training removes of L1"),
        linear("K", "factor"),
        _KAPPA,
        nonlinear("E0", "what no training removes of L0", 0.0, 20.0, starts=(0.0, 0.5, 1.0, 1.5)),
    ),
    columns=_columns,
    assumptions=("paired runs share size and tokens",),
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LossToLoss:
    """A fitted relation of two losses.

    Attributes:
        fit: of the excess losses where E0 and E1 were given, else of the losses.
        E0: what no training removes of L0.
        E1: of L1.
    """

    fit: FitResult
    E0: float
    E1: float

    @property
    def factor(self) -> float:
        """K."""
        return self.fit.parameters["K"]

    @property
    def kappa(self) -> float:
        """Exponent."""
        return self.fit.parameters["kappa"]

    def predict(self, loss_0: ArrayLike, *, allow_extrapolation: bool = False) -> PointPrediction:
        """Return L1 where L0 is known, with intervals.

        Args:
            loss_0: (k,) or a number, above E0.
            allow_extrapolation: predict also far outside the fitted losses.

        Raises:
            UserError: a loss that is not above E0, or see :func:`landscape_ray.laws.core.predict.predict_points`.
        """
        values = np.atleast_1d(np.asarray(loss_0, dtype=np.float64))
        if not (values > self.E0).all():
            raise UserError(f"loss_0 must be > E0 {self.E0:.6g}, got {values.min():.6g}; no training gets there")
        if self.fit.law == LOSS_TO_LOSS.name:
            return predict_points(LOSS_TO_LOSS, self.fit, {"loss_0": values}, allow_extrapolation=allow_extrapolation)
        x = {"excess_0": values - self.E0}
        found = predict_points(EXCESS_TO_EXCESS, self.fit, x, allow_extrapolation=allow_extrapolation)
        ends = ("value", "low", "high", "measured_low", "measured_high")
        return dataclasses.replace(found, **{name: getattr(found, name) + self.E1 for name in ends})


def fit_loss_to_loss(
    loss_0: ArrayLike,
    loss_1: ArrayLike,
    *,
    irreducible: tuple[float | None, float | None] = (None, None),
    run_ids: Sequence[str] | None = None,
    num_bootstrap: int = 200,
    confidence: float = 0.9,
    seed: int = 0,
) -> LossToLoss:
    """Return how one loss follows from another.

    Args:
        loss_0: (n,) losses L0.
        loss_1: (n,) losses L1 of the paired runs.
        irreducible: (E0, E1), each below all its losses; None for one that is fitted too.
        run_ids: (n,) names of the pairs; None takes every pair as a run of its own.
        num_bootstrap: number of bootstrap samples, 0 for none.
        confidence: level of the intervals, in (0, 1).
        seed: of the bootstrap.

    Raises:
        UserError: a loss is not above what was given as irreducible, or see :func:`landscape_ray.laws.core.fit.fit`.

    >>> loss_0 = np.linspace(2.5, 4.0, 8)
    >>> found = fit_loss_to_loss(loss_0, 0.9 * (loss_0 - 1.7) ** 1.1 + 1.2, irreducible=(1.7, 1.2), num_bootstrap=0)
    >>> round(found.kappa, 9), round(found.factor, 9), round(float(found.predict(3.0).value[0]), 9)
    (1.1, 0.9, 2.401102849)
    """
    options: dict[str, Any] = {
        "objective": Objective("least_squares"),
        "num_bootstrap": num_bootstrap,
        "confidence": confidence,
        "seed": seed,
    }
    points = Points({"loss_0": loss_0}, loss_1, run_ids)
    x, y = np.asarray(points.variables["loss_0"]), np.asarray(points.response)
    for name, values, end in zip(("loss_0", "loss_1"), (x, y), irreducible, strict=True):
        if end is not None and not (values > end).all():
            raise UserError(
                f"{name} must be > its irreducible {end:.6g}, got {values.min():.6g}; the law that it comes from does "
                "not describe these runs"
            )
    e0, e1 = irreducible
    if e0 is not None and e1 is not None:
        excess = Points({"excess_0": x - e0}, y - e1, points.run_of)
        return LossToLoss(fit=fit(EXCESS_TO_EXCESS, excess, **options), E0=e0, E1=e1)
    top = _KEEP_BELOW * float(x.min())
    bounded = tuple(
        dataclasses.replace(p, upper=top, starts=tuple(top * share for share in (0.0, 0.3, 0.6, 0.8, 0.9)))
        if p.name == "E0"
        else p
        for p in LOSS_TO_LOSS.parameters
    )
    fixed = {name: end for name, end in (("E0", e0), ("E1", e1)) if end is not None}
    result = fit(dataclasses.replace(LOSS_TO_LOSS, parameters=bounded), points, fix=fixed, **options)
    e0 = result.parameters["E0"]
    if "E0" not in fixed and x.min() - e0 < _TOO_NEAR * (x.max() - x.min()):
        reason = "E0 lies next to the smallest loss, where the power law bends without limit: it is not a floor"
        result = dataclasses.replace(result, status="weak", reasons=(*result.reasons, reason))
    return LossToLoss(fit=result, E0=e0, E1=result.parameters["E1"])


def match_runs(
    keys_0: Mapping[str, ArrayLike], keys_1: Mapping[str, ArrayLike]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the numbers of the runs of two tables that agree in all keys: rows of the first, rows of the second.

    Args:
        keys_0: columns (n0,) that identify a run of the first table: size and tokens, say.
        keys_1: the same columns (n1,) of the second.

    Raises:
        UserError: other names, two runs of one table with the same keys, or no pair.

    >>> rows_0, rows_1 = match_runs({"tokens": [1e9, 2e9, 4e9]}, {"tokens": [4e9, 1e9]})
    >>> rows_0.tolist(), rows_1.tolist()
    ([0, 2], [1, 0])
    """
    if set(keys_0) != set(keys_1) or not keys_0:
        raise UserError(f"keys must be the same in both tables, got {sorted(keys_0)} and {sorted(keys_1)}; rename them")
    rows = []
    for table in (keys_0, keys_1):
        named = [tuple(row) for row in zip(*(np.asarray(table[name]).tolist() for name in keys_0), strict=True)]
        numbers = {key: i for i, key in enumerate(named)}
        if len(numbers) < len(named):
            twice = next(key for i, key in enumerate(named) if numbers[key] != i)
            raise UserError(
                f"{', '.join(keys_0)} must identify a run, got two with {twice}; add a key that tells them apart"
            )
        rows.append(numbers)
    shared = [key for key in rows[0] if key in rows[1]]
    if not shared:
        raise UserError(
            f"{', '.join(keys_0)} must agree in some runs of both tables, got none; are the units the same?"
        )
    first, second = (np.array([numbers[key] for key in shared], dtype=np.int64) for numbers in rows)
    return first, second
