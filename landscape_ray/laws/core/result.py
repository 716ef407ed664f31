"""What a fit, a prediction and a forecast are: values with their uncertainty, their status and how they were made."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.errors import UserError

Array: TypeAlias = NDArray[np.float64]

Status: TypeAlias = Literal["certified", "weak", "failed"]
"""certified: the optimum was found and the data determine it; weak: see the reasons; failed: not an optimum."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FitResult:
    """A fitted law.

    Attributes:
        law: its name in `LAWS`.
        parameters: value of every parameter.
        intervals: (low, high) of every parameter that the data identify, at the level `confidence`; empty without a
            bootstrap.
        confidence: level of the intervals, in (0, 1).
        objective: what was minimised, and its value.
        status: certified, weak or failed.
        reasons: why it is not certified; empty if it is.
        warnings: what to know before use, each "name: sentence".
        certificate: how the optimum was checked: starts and their agreement, gradient, conditioning, bounds hit.
        residuals: rmse, max_abs (in the unit of the response), r2, and quantiles of the residuals that were fitted.
        data: what was fitted: runs, points, ranges, SHA-256.
        sample_names: columns of `samples`.
        samples: (num_bootstrap, p) parameters of every bootstrap sample.
        misfit: how wrong the law was on schedules that it had not seen, beyond what its fits expected: root of the mean
            square of the relative error of their final losses, that of noise and parameters taken off; None if that was
            not measured.
        num_misfits: number of errors behind it.
        fixed: parameters that were given, not fitted.
        penalty: (centre, stiffness) by name of a penalised parameter.
        derived: other numbers that the law gives from its parameters.
        derived_intervals: (low, high) of these, where there is a bootstrap.
        checklist: the record of how the fit was made and checked, see :mod:`landscape_ray.laws.trust.checklist`.
    """

    law: str
    parameters: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    confidence: float
    objective: dict[str, Any]
    status: Status
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    certificate: dict[str, Any]
    residuals: dict[str, Any]
    data: dict[str, Any]
    sample_names: tuple[str, ...]
    samples: Array
    misfit: float | None = None
    num_misfits: int = 0
    fixed: dict[str, float] = dataclasses.field(default_factory=dict)
    penalty: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    derived: dict[str, float] = dataclasses.field(default_factory=dict)
    derived_intervals: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    checklist: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """Return the fit as JSON text with every digit; :meth:`from_json` gives back an equal fit."""
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        content["samples"] = self.samples.tolist()
        return json.dumps(content, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> FitResult:
        """Return the fit that :meth:`to_json` wrote.

        Raises:
            UserError: the text is not a fit.
        """
        try:
            content = json.loads(text)
            for name in ("intervals", "derived_intervals"):
                content[name] = {key: (low, high) for key, (low, high) in content.get(name, {}).items()}
            content["penalty"] = {name: (c, s) for name, (c, s) in content.get("penalty", {}).items()}
            for name in ("reasons", "warnings", "sample_names"):
                content[name] = tuple(content[name])
            shape = (-1, len(content["sample_names"]))
            content["samples"] = np.array(content["samples"], dtype=np.float64).reshape(shape)
            return cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"fit must be the JSON text of a FitResult ({error}); write it with to_json()") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FitResult) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]  # holds an array and dictionaries

    def __str__(self) -> str:
        lines = [f"{self.law} law: {self.status}, {self.data['num_points']} points of {len(self.data['runs'])} runs"]
        for name, value in self.parameters.items():
            between = self.intervals.get(name)
            text = f"  [{between[0]:.6g}, {between[1]:.6g}] at {self.confidence:.0%}" if between else ""
            text = "  given" if name in self.fixed else text
            lines.append(f"  {name:<6} {value:.6g}{text}")
        for name, value in self.derived.items():
            between = self.derived_intervals.get(name)
            text = f"  [{between[0]:.6g}, {between[1]:.6g}]" if between else ""
            lines.append(f"  {name:<6} {value:.6g}{text}  derived")
        lines.append(
            f"  rmse {self.residuals['rmse']:.2e} {self.objective['unit']}, largest {self.residuals['max_abs']:.2e}, "
            f"R2 {self.residuals['r2']:.5f}, {self.objective['name']} {self.objective['value']:.6g}"
        )
        lines += [f"  {'not certified: '}{reason}" for reason in self.reasons]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PointPrediction:
    """What a fitted law expects at points.

    Attributes:
        value: (k,) the fitted law.
        low: (k,) lower end of the interval of the law's value: the parameters' uncertainty.
        high: (k,) upper end.
        measured_low: (k,) lower end of the interval in which a measurement is expected: residual noise on top.
        measured_high: (k,) upper end.
        confidence: level of both.
        warnings: in what respect the points lie outside what was fitted, each "name: sentence".
    """

    value: Array
    low: Array
    high: Array
    measured_low: Array
    measured_high: Array
    confidence: float
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Prediction:
    """Losses that a fit expects of a schedule.

    Attributes:
        step: (k,) completed updates.
        loss_nats: (k,) the fitted law.
        low: (k,) lower end of the interval in which a measured loss is expected: parameters and residual noise.
        high: (k,) upper end.
        confidence: level of the interval.
        warnings: in what respect the schedule lies outside what was fitted, each "name: sentence".
    """

    step: NDArray[np.int64]
    loss_nats: Array
    low: Array
    high: Array
    confidence: float
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Forecast:
    """A run as predicted by a fit that has not seen its schedule.

    Attributes:
        run_id: the run.
        observed_final: its last loss.
        predicted_final: what was predicted for it.
        low: lower end of the interval of the prediction.
        high: upper end.
        relative_error: (predicted - observed) / observed.
        curve_mae: mean absolute error over the fitted part of the curve, nats per token.
        fitted_on: the runs that the fit has seen.
        status: of that fit.
        prediction: the whole predicted curve.
        expected_error: standard deviation of the relative error that the fit itself expects: residual noise, and the
            parameters' uncertainty where there is a bootstrap.
    """

    run_id: str
    observed_final: float
    predicted_final: float
    low: float
    high: float
    relative_error: float
    curve_mae: float
    fitted_on: tuple[str, ...]
    status: Status
    prediction: Prediction
    expected_error: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.run_id}: observed {self.observed_final:.4f}, predicted {self.predicted_final:.4f} "
            f"[{self.low:.4f}, {self.high:.4f}] ({self.relative_error:+.2%}), curve MAE {self.curve_mae:.4f} nats"
        )


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Return rows of numbers as aligned text, one line a row under a line of column names.

    >>> print(table({"huber": {"L0": 2.5, "A": 0.5}}))
                    L0            A
    huber          2.5          0.5
    """
    columns = list(next(iter(rows.values())))
    width = max(len(name) for name in rows)
    lines = [" " * width + "".join(f" {name:>12}" for name in columns)]
    for name, row in rows.items():
        lines.append(f"{name:<{width}}" + "".join(f" {row[column]:>12.6g}" for column in columns))
    return "\n".join(lines)
