"""Whatever follows from a fitted law, with the interval that the bootstrap samples give it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.laws.core.predict import samples_of
from landscape_ray.laws.core.result import FitResult

Array: TypeAlias = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Interval:
    """Values with their uncertainty.

    Attributes:
        value: (k,) at the optimum of the fit.
        low: (k,) lower end; nan where there are no samples.
        high: (k,) upper end.
        confidence: level, in (0, 1).
        samples: (num_samples, k) the values of the bootstrap samples.
    """

    value: Array
    low: Array
    high: Array
    confidence: float
    samples: Array

    def __str__(self) -> str:
        ends = zip(self.value, self.low, self.high, strict=True)
        return ", ".join(f"{value:.6g} [{low:.6g}, {high:.6g}]" for value, low, high in ends)


def interval(value: Any, samples: Any, confidence: float) -> Interval:
    """Return values (k,) with the quantiles of their samples (num_samples, k); samples that are nan do not count.

    >>> print(interval([2.0], np.linspace(0, 4, 101)[:, None], 0.9))
    2 [0.2, 3.8]
    """
    value = np.atleast_1d(np.asarray(value, dtype=np.float64))
    samples = np.asarray(samples, dtype=np.float64).reshape(-1, len(value))
    tail = (1 - confidence) / 2
    low, high = np.full(len(value), np.nan), np.full(len(value), np.nan)
    for i in range(len(value)):
        finite = samples[~np.isnan(samples[:, i]), i]
        if len(finite):
            low[i], high[i] = np.quantile(finite, [tail, 1 - tail])
    return Interval(value=value, low=low, high=high, confidence=confidence, samples=samples)


def propagate(fit: FitResult, function: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> dict[str, Interval]:
    """Return functions of the parameters with their intervals.

    Args:
        fit: a fit; without bootstrap samples the intervals are nan.
        function: maps the parameters by name, arrays (batch, 1), to arrays (batch, k) by name.

    >>> from landscape_ray.laws.core.fit import fit
    >>> from landscape_ray.laws.core.points import Points
    >>> from landscape_ray.laws.scaling.power import power_law
    >>> size = np.geomspace(1e6, 1e9, 12)
    >>> found = fit(power_law(), Points({"x": size}, 4 * size**-0.1), num_bootstrap=20)
    >>> print(propagate(found, lambda p: {"halved": 2 ** (1 / p["alpha"])})["halved"])
    1024 [1024, 1024]
    """
    best = {name: np.array([[value]]) for name, value in fit.parameters.items()}
    values = {name: np.atleast_2d(value)[0] for name, value in function(best).items()}
    drawn = (
        function(samples_of(fit)) if len(fit.samples) else {name: np.empty((0, len(v))) for name, v in values.items()}
    )
    count = len(fit.samples)
    return {
        name: interval(value, np.broadcast_to(drawn[name], (count, len(value))), fit.confidence)
        for name, value in values.items()
    }
