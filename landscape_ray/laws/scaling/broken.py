"""The broken power law, and which points lie in the power-law region: looked at before anything is extrapolated.

    y = E + A [1 + (x / x0)^(1 / f)]^(-alpha f)

Legend: x data (or size, or compute), y loss or error, x0 where the plateau of small data ends, f how gradual the break
is, E what no x removes.

Three regions of a learning curve: small data, where the model does little better than guessing and y stays at E + A;
the power-law region, where y - E falls as x^-alpha; and the irreducible one, where y - E has sunk into the noise. The
local exponent of y - E is

    -d log(y - E) / d log x = alpha u / (1 + u),    u = (x / x0)^(1 / f),

so it has reached a share s of alpha where u >= s / (1 - s).

References:
    Hestness et al. 2017, arXiv 1712.00409 (the regions); Caballero et al. 2022, arXiv 2210.14891 (smooth breaks);
    Burnham and Anderson 2002 (AICc).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import numpy as np

from landscape_ray.laws.core.analytic import softplus
from landscape_ray.laws.core.fit import fit
from landscape_ray.laws.core.law import LOSS, Law, Variable, linear, nonlinear
from landscape_ray.laws.core.objective import Objective
from landscape_ray.laws.core.points import Points
from landscape_ray.laws.core.result import FitResult
from landscape_ray.laws.scaling.power import X, power_law

Region: TypeAlias = Literal["small_data", "power_law", "irreducible"]

REACHED = 0.9
"""A point is in the power-law region where the local exponent has reached this share of alpha ..."""

NOISE_FACTOR = 2.0
"""... and where what is left to remove is more than this many times the noise."""

MIN_GAIN = 2.0
"""By so much AICc has to fall for a break to be believed."""


def broken_power_law(
    variable: Variable = X, *, name: str = "broken_power", response: Variable = LOSS, floor: bool = True
) -> Law:
    """Return the broken power law of one's own variable.

    Args:
        variable: what it depends on.
        name: key of the law.
        response: what it predicts, > 0.
        floor: with the constant E.
    """

    def columns(x: Any, p: Mapping[str, Any]) -> tuple[Any, ...]:
        bend = softplus((np.log(x[variable.name]) - np.log(p["x0"])) / p["f"])
        return (*((1.0,) if floor else ()), np.exp(-p["alpha"] * p["f"] * bend))

    return Law(
        name=name,
        title=f"{response.meaning or response.name} over {variable.meaning or variable.name}, with a plateau before",
        formula=f"{response.name} = {'E + ' if floor else ''}A [1 + ({variable.name} / x0)^(1 / f)]^(-alpha f)",
        reference="Hestness et al. 2017, arXiv 1712.00409; Caballero et al. 2022, arXiv 2210.14891",
        variables=(dataclasses.replace(variable, min_distinct=4),),
        parameters=(
            *((linear("E", "what no growth removes"),) if floor else ()),
            linear("A", "height of the plateau over E"),
            nonlinear("alpha", "exponent after the break", 0.01, 5.0, starts=4),
            nonlinear(
                "x0",
                "where the plateau ends",
                1e-6,
                1e6,
                log=True,
                starts=(0.01, 0.1, 0.5, 2.0, 10.0),
                scale=lambda x, p: np.exp(np.log(x[variable.name]).mean()),
            ),
            nonlinear("f", "how gradual the break is", 0.05, 2.0, log=True, starts=(0.2, 0.8)),
        ),
        columns=columns,
        response=response,
    )


BROKEN_POWER = broken_power_law()


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Regions:
    """Which points lie where on a learning curve.

    Attributes:
        region: (n,) of every point.
        broken: whether a break was found: AICc of the broken law is lower by more than 2.
        gain: by how much it is lower.
        start: from this x on the local exponent has reached 90 % of alpha; 0 without a break.
        end: up to this x more than twice the noise is left to remove; inf if there is no such end.
        fit: the fit that was believed.
        warnings: each "name: sentence".
    """

    region: tuple[Region, ...]
    broken: bool
    gain: float
    start: float
    end: float
    fit: FitResult
    warnings: tuple[str, ...]

    @property
    def usable(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """(n,) whether a point may carry an extrapolation: it is in the power-law region."""
        return np.array([region == "power_law" for region in self.region])


def power_law_regions(points: Points, variable: str = "x", *, objective: Objective | None = None) -> Regions:
    """Return which points of a learning curve lie in the power-law region.

    A power law with constant and the broken one are fitted to all points. The break is believed if it lowers AICc by
    more than 2. Points before `start` belong to the small-data region, points after `end` to the irreducible one: fit a
    law to the others, `points.take(regions.usable)`, before extrapolating.

    Args:
        points: a learning curve.
        variable: name of its x.
        objective: what is minimised.

    Raises:
        UserError: too few points for the broken law (more than 5 are needed).

    >>> x = np.geomspace(1e2, 1e7, 21)
    >>> y = 0.2 + 2.0 * (1 + (x / 1e4) ** 2) ** -0.25
    >>> found = power_law_regions(Points({"x": x}, y))
    >>> found.broken, round(found.start), found.region.count("small_data")
    (True, 30000, 10)
    """
    axis = Variable(variable)
    laws = (power_law(axis, name="power_floor", floor="E"), broken_power_law(axis))
    fits = [fit(law, points, objective=objective, num_bootstrap=0) for law in laws]
    scores = [_aicc(law, found, points) for law, found in zip(laws, fits, strict=True)]
    gain = scores[0] - scores[1]
    p = fits[1].parameters
    broken = gain > MIN_GAIN and fits[1].status != "failed" and p["A"] > 0
    law, chosen = (laws[1], fits[1]) if broken else (laws[0], fits[0])
    x = np.asarray(points.variables[variable], dtype=np.float64)
    start = p["x0"] * (REACHED / (1 - REACHED)) ** p["f"] if broken else 0.0
    floor = chosen.parameters["E"]
    fitted = law.predict({variable: x}, chosen.parameters)
    spread = np.asarray(chosen.residuals["quantiles"])
    noise = float((spread[34] - spread[6]) / 2)  # half the central 70 %: about a standard deviation, without the tails
    left = (fitted - floor) / fitted
    sunk = left < NOISE_FACTOR * noise
    region: list[Region] = [
        "small_data" if value < start else "irreducible" if lost else "power_law"
        for value, lost in zip(x, sunk, strict=True)
    ]
    warnings = []
    count = region.count("power_law")
    if count < 4:
        warnings.append(f"power_law_region: {count} points lie in it, too few to extrapolate from; add larger runs")
    if broken and start > x.max():
        warnings.append("small_data: all points lie before the end of the plateau; the exponent is not measured yet")
    return Regions(
        region=tuple(region),
        broken=bool(broken),
        gain=float(gain),
        start=float(start),
        end=float(x[sunk].min()) if sunk.any() else math.inf,
        fit=chosen,
        warnings=tuple(warnings),
    )


def _aicc(law: Law, found: FitResult, points: Points) -> float:
    """Return n log(mean squared log residual) + 2 k n / (n - k - 1), k parameters and the variance."""
    n, k = len(points), law.num_fitted() + 1
    x = {name: np.asarray(values) for name, values in points.variables.items()}
    residual = np.log(np.asarray(points.response)) - np.log(law.predict(x, found.parameters))
    floor = np.finfo(float).eps ** 2
    return n * math.log(max(float((residual**2).mean()), floor)) + (2 * k * n / (n - k - 1) if n > k + 1 else math.inf)
