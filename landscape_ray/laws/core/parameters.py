"""Variables and parameters of a law, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class Variable:
    """What a law depends on, or what it predicts.

    Attributes:
        name: as in the formula and in tables of runs.
        unit: of its values.
        meaning: in a few words.
        positive: whether values must be > 0.
        min_distinct: fewest different values that tell anything about the law.
        below: values must be < this; 1 for a share.
    """

    name: str
    unit: str = ""
    meaning: str = ""
    positive: bool = True
    min_distinct: int = 2
    below: float = np.inf


Scale: TypeAlias = Callable[[Any, Mapping[str, Any]], Any]
"""From what `prepare` made and the non-linear parameters without a scale, each (batch, 1), to a multiplier of a shape
that broadcasts to (batch, 1). Analytic, as :data:`Columns`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Parameter:
    """A number that is fitted; made by :func:`linear`, :func:`nonlinear` and :func:`grid`.

    Attributes:
        name: as in the formula.
        meaning: in a few words.
        role: linear: the coefficient of a column; nonlinear: inside the columns; grid: chosen among `values`.
        lower: smallest value; for a linear one 0, or -inf if it may be negative.
        upper: largest value.
        log: whether a non-linear one is searched by its logarithm.
        starts: of a non-linear one, where the search begins.
        values: of a grid one, what is tried.
        normalised: of a linear one, whether the fitter divides its column by its geometric mean.
        scale: of a non-linear one whose size hangs on the units of the data (a size at which something breaks): what
            bounds and starts are multiples of, see :func:`nonlinear`.
    """

    name: str
    meaning: str
    role: Literal["linear", "nonlinear", "grid"]
    lower: float
    upper: float
    log: bool = False
    starts: tuple[float, ...] = ()
    values: tuple[float, ...] = ()
    normalised: bool = True
    scale: Scale | None = None

    def allows(self, value: float) -> bool:
        """Return whether a value is within the bounds; where they are multiples of a scale, whether its sign is."""
        if self.scale is not None:
            return (self.lower < 0 or value > 0) and bool(np.isfinite(value))
        return self.lower <= value <= self.upper

    def inward(self, value: Any) -> Any:
        """Return the coordinate in which a non-linear parameter is searched."""
        return np.log(value) if self.log else value

    def outward(self, coordinate: Any) -> Any:
        """Return the parameter of a coordinate."""
        return np.exp(coordinate) if self.log else coordinate


def linear(name: str, meaning: str = "", *, free: bool = False, normalised: bool = True) -> Parameter:
    """Return the coefficient of a column.

    Args:
        name: as in the formula.
        meaning: in a few words.
        free: whether it may be negative.
        normalised: whether the fitter divides the column by its geometric mean. That decouples a factor from its
            exponent; a column that vanishes between the points, like a square around an optimum, is no power: False.
    """
    return Parameter(name, meaning, "linear", -np.inf if free else 0.0, np.inf, normalised=normalised)


def nonlinear(
    name: str,
    meaning: str,
    lower: float,
    upper: float,
    *,
    log: bool = False,
    starts: Sequence[float] | int = 4,
    scale: Scale | None = None,
) -> Parameter:
    """Return a parameter inside the columns, within [lower, upper].

    Args:
        name: as in the formula.
        meaning: in a few words.
        lower: smallest value.
        upper: largest value.
        log: search its logarithm, for one whose order of magnitude is open.
        starts: where the search begins, or how many: then evenly inside the bounds, geometrically for `log` ones and
            others that are positive throughout.
        scale: where the size of the parameter hangs on the units of the data, what `lower`, `upper` and `starts` are
            multiples of, from the variables and the other non-linear parameters. The search is then the same in all
            units, and a parameter that trades off with an exponent over orders of magnitude is decoupled from it.

    >>> middle = lambda x, p: np.exp(np.log(x["N"]).mean())
    >>> nonlinear("N0", "size of the break", 1e-3, 1e3, log=True, starts=(0.1, 10), scale=middle).starts
    (0.1, 10)
    """
    if isinstance(starts, int):
        geometric = lower > 0
        a, b = (np.log(lower), np.log(upper)) if geometric else (lower, upper)
        points = a + (b - a) * (np.arange(starts) + 0.5) / starts
        starts = tuple(float(v) for v in (np.exp(points) if geometric else points))
    return Parameter(name, meaning, "nonlinear", lower, upper, log=log, starts=tuple(starts), scale=scale)


def grid(name: str, meaning: str, values: Sequence[float]) -> Parameter:
    """Return a parameter that is chosen among values by the objective; it counts as fitted if there are several."""
    return Parameter(name, meaning, "grid", min(values), max(values), values=tuple(values))


LOSS = Variable("loss", "nats/token", "loss")
