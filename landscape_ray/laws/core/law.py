"""A law as data: a formula, its variables and its parameters. Everything else is derived from them.

A law predicts a response as a sum of terms, each a coefficient times a column,

    response = sum_j c_j * column_j(variables; p),

where the coefficients c are the linear parameters and p the others. To declare one takes the parameters and one
function that returns the columns, written with numpy as on paper:

>>> surface = Law(
...     name="surface",
...     formula="L = E + A N^-alpha",
...     variables=(Variable("N", "parameters", "size of the model"),),
...     parameters=(
...         linear("E", "loss of the largest model"),
...         linear("A", "factor of the size"),
...         nonlinear("alpha", "exponent of the size", 0.01, 3.0),
...     ),
...     columns=lambda x, p: (1.0, x["N"] ** -p["alpha"]),
... )
>>> surface.linear_names, surface.nonlinear_names
(('E', 'A'), ('alpha',))

From that follow variable projection, exact derivatives (by complex step, or as given), a search from many starts, a
certificate, bootstrap, profiles, checks and the record of the fit: see :func:`landscape_ray.laws.core.fit.fit`.

References:
    Squire and Trapp 1998 (derivatives by a complex step, exact to rounding).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws.core.fitting import SeparableLaw

Array: TypeAlias = NDArray[np.float64]

Space: TypeAlias = Literal["log", "raw"]

_STEP = 1e-100
"""Imaginary step of the derivatives: so small that its square is no number, which makes them exact."""

MAX_STARTS = 256
"""Of a grid of starts with more points than this, a Halton sequence takes the place."""


@dataclasses.dataclass(frozen=True, slots=True)
class Variable:
    """What a law depends on, or what it predicts.

    Attributes:
        name: as in the formula and in tables of runs.
        unit: of its values.
        meaning: in a few words.
        positive: whether values must be > 0.
        min_distinct: fewest different values that tell anything about the law.
    """

    name: str
    unit: str = ""
    meaning: str = ""
    positive: bool = True
    min_distinct: int = 2


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
    """

    name: str
    meaning: str
    role: Literal["linear", "nonlinear", "grid"]
    lower: float
    upper: float
    log: bool = False
    starts: tuple[float, ...] = ()
    values: tuple[float, ...] = ()

    def inward(self, value: Any) -> Any:
        """Return the coordinate in which a non-linear parameter is searched."""
        return np.log(value) if self.log else value

    def outward(self, coordinate: Any) -> Any:
        """Return the parameter of a coordinate."""
        return np.exp(coordinate) if self.log else coordinate


def linear(name: str, meaning: str = "", *, free: bool = False) -> Parameter:
    """Return the coefficient of a column: >= 0, or of either sign if `free`."""
    return Parameter(name, meaning, "linear", -np.inf if free else 0.0, np.inf)


def nonlinear(
    name: str,
    meaning: str,
    lower: float,
    upper: float,
    *,
    log: bool = False,
    starts: Sequence[float] | int = 4,
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
    """
    if isinstance(starts, int):
        geometric = lower > 0
        a, b = (np.log(lower), np.log(upper)) if geometric else (lower, upper)
        points = a + (b - a) * (np.arange(starts) + 0.5) / starts
        starts = tuple(float(v) for v in (np.exp(points) if geometric else points))
    return Parameter(name, meaning, "nonlinear", lower, upper, log=log, starts=tuple(starts))


def grid(name: str, meaning: str, values: Sequence[float]) -> Parameter:
    """Return a parameter that is chosen among values by the objective; it counts as fitted if there are several."""
    return Parameter(name, meaning, "grid", min(values), max(values), values=tuple(values))


Columns: TypeAlias = Callable[[Any, Mapping[str, Any]], Sequence[Any]]
"""From what `prepare` made and the non-linear parameters, each (batch, 1), to one array a linear parameter, each of a
shape that broadcasts to (batch, n). Written with analytic numpy functions (no abs, min or max of something that depends
on a parameter), so that complex parameters pass through."""

LOSS = Variable("loss", "nats/token", "loss")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Law:
    """A law as data. A user's own is one of these, named by its dotted path.

    Attributes:
        name: its key.
        formula: as text, in the names of variables and parameters.
        variables: what it depends on.
        parameters: what is fitted, in the order in which they are shown.
        columns: see :data:`Columns`; one entry a linear parameter, in order.
        response: what it predicts.
        space: whether residuals are those of the logarithm (a positive response whose noise is relative) or raw.
        title: in a few words.
        reference: authors, year, arXiv id.
        prepare: makes from the data (see :class:`landscape_ray.laws.core.points.Data`) and the values of the grid
            parameters what `columns` gets as its first argument; None passes the variables, arrays (n,) by name.
        slopes: d columns / d parameter as a function like `columns`, returning for each linear parameter a mapping from
            names of non-linear parameters to arrays; None takes the complex step.
        link: of laws whose response is a function of the sum, increasing: the sum of a response; the fit is then made
            to it. None for the response itself.
        unlink: the inverse of `link`.
        review: looks at a finished fit: (data, what `prepare` made, parameters) -> :class:`Review`.
        guard: (fit, query, allow_extrapolation) -> warnings of a prediction; raises where the law is known to mislead.
        assumptions: what must hold for the law to be applied, sentences for the record.
    """

    name: str
    formula: str
    variables: tuple[Variable, ...]
    parameters: tuple[Parameter, ...]
    columns: Columns
    response: Variable = LOSS
    space: Space = "log"
    title: str = ""
    reference: str = ""
    prepare: Callable[[Any, Mapping[str, float]], Any] | None = None
    slopes: Callable[[Any, Mapping[str, Any]], Sequence[Mapping[str, Any]]] | None = None
    link: Callable[[Any], Any] | None = None
    unlink: Callable[[Any], Any] | None = None
    review: Callable[[Any, Any, Mapping[str, float]], Review] | None = None
    guard: Callable[[Any, Any, bool], tuple[str, ...]] | None = None
    assumptions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [parameter.name for parameter in self.parameters]
        if len(set(names)) < len(names):
            raise UserError(
                f"law '{self.name}': parameters must have distinct names, got {', '.join(names)}; rename one"
            )
        if not self.linear_names:
            raise UserError(
                f"law '{self.name}' must have a linear parameter, got none; declare the factor of its scale"
            )
        if (self.link is None) != (self.unlink is None):
            raise UserError(f"law '{self.name}' must have both link and unlink or neither, got one; give the other")

    def _names(self, role: str) -> tuple[str, ...]:
        return tuple(parameter.name for parameter in self.parameters if parameter.role == role)

    @property
    def linear_names(self) -> tuple[str, ...]:
        """Names of the coefficients, in the order of the columns."""
        return self._names("linear")

    @property
    def nonlinear_names(self) -> tuple[str, ...]:
        """Names of the parameters inside the columns."""
        return self._names("nonlinear")

    @property
    def grid_names(self) -> tuple[str, ...]:
        """Names of the parameters that are chosen among values."""
        return self._names("grid")

    @property
    def fitted_names(self) -> tuple[str, ...]:
        """Names of linear and non-linear parameters, as shown."""
        return tuple(parameter.name for parameter in self.parameters if parameter.role != "grid")

    def parameter(self, name: str) -> Parameter:
        """Return the parameter of a name.

        Raises:
            UserError: there is none.
        """
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        valid = ", ".join(parameter.name for parameter in self.parameters)
        raise UserError(f"law '{self.name}' has no parameter '{name}'; it has {valid}")

    def term(self, x: Any, parameters: Mapping[str, Any]) -> Array:
        """Return the sum of the terms for parameters of any shapes that broadcast against the columns."""
        columns = self.columns(x, parameters)
        total = sum(parameters[name] * column for name, column in zip(self.linear_names, columns, strict=True))
        return np.asarray(total)

    def predict(self, x: Any, parameters: Mapping[str, Any]) -> Array:
        """Return the response.

        Args:
            x: what `prepare` made, or the variables by name.
            parameters: all of them by name; arrays (batch, 1) give (batch, n).
        """
        total = self.term(x, parameters)
        return np.asarray(self.unlink(total)) if self.unlink is not None else total

    def num_fitted(self, fix: Mapping[str, float] | None = None) -> int:
        """Return how many numbers a fit has to find; a grid parameter counts where there is a choice."""
        chosen = sum(len(self.parameter(name).values) > 1 for name in self.grid_names)
        return len([name for name in self.fitted_names if name not in (fix or {})]) + chosen

    def with_grid(self, values: Mapping[str, float | Sequence[float]]) -> Law:
        """Return the law with other values of its grid parameters."""
        changed = tuple(
            grid(p.name, p.meaning, tuple(float(v) for v in np.atleast_1d(np.asarray(values[p.name], dtype=float))))
            if p.name in values
            else p
            for p in self.parameters
        )
        return dataclasses.replace(self, parameters=changed)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """What a law's own look at a fit found.

    Attributes:
        warnings: what to know before use, each "name: sentence".
        reasons: why it is not certified.
        unidentified: parameters that the data say nothing about; they get no interval.
        data: what else was fitted, for the record.
    """

    warnings: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    unidentified: tuple[str, ...] = ()
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Bound:
    """A law at the points of one data set, in the coordinates of the fitter.

    The columns are divided by their geometric mean over the points (where they are not 0), whatever the non-linear
    parameters: a coefficient is then the size of its term in the middle of the data. A factor and its exponent, which
    trade off over ten orders of magnitude, are decoupled by that, for any formula.

    Args:
        law: the law.
        x: what its `prepare` made.
        num_points: n.
        fixed: parameters that are not fitted, by name.
    """

    def __init__(self, law: Law, x: Any, num_points: int, fixed: Mapping[str, float]) -> None:
        self.law, self.x, self.num_points = law, x, num_points
        self.held = {name: value for name, value in fixed.items() if name in law.linear_names}
        self.names = tuple(name for name in law.linear_names if name not in self.held)
        self.inner = tuple(p for p in law.parameters if p.role == "nonlinear")
        self.fixed = {name: value for name, value in fixed.items() if name not in self.held}
        self._kept = np.array([name not in self.held for name in law.linear_names], dtype=bool)

    def raw(self, coordinates: Array) -> tuple[Array, Array]:
        """Return all columns (batch, n, m) and their slopes (batch, n, m, k) by the coordinates (batch, k)."""
        law, shape = self.law, (len(coordinates), self.num_points)
        values = {p.name: p.outward(coordinates[:, i, None]) for i, p in enumerate(self.inner)}
        columns = np.stack([np.broadcast_to(c, shape) for c in law.columns(self.x, values)], axis=2).astype(np.float64)
        slopes = np.zeros((*columns.shape, len(self.inner)))
        if law.slopes is not None:
            for j, by_name in enumerate(law.slopes(self.x, values)):
                for i, p in enumerate(self.inner):
                    if p.name in by_name:
                        factor = values[p.name] if p.log else 1.0
                        slopes[:, :, j, i] = by_name[p.name] * factor
            return columns, slopes
        for i, p in enumerate(self.inner):
            moved = values | {p.name: p.outward(coordinates[:, i, None] + 1j * _STEP)}
            for j, column in enumerate(law.columns(self.x, moved)):
                if np.iscomplexobj(column):
                    slopes[:, :, j, i] = np.broadcast_to(np.imag(column), shape) / _STEP
        return columns, slopes

    def columns(self, coordinates: Array) -> tuple[Array, Array]:
        """Return the columns of the free coefficients and their slopes, divided by their size."""
        columns, slopes = self.raw(coordinates)
        columns, slopes = columns[:, :, self._kept], slopes[:, :, self._kept]
        size, relative = _size(columns, slopes)
        columns = columns / size[:, None]
        slopes = slopes / size[:, None, :, None] - columns[..., None] * relative[:, None]
        return columns, slopes

    def offset(self, coordinates: Array) -> tuple[Array, Array]:
        """Return the terms of the coefficients that are held (batch, n), and their slopes (batch, n, k)."""
        columns, slopes = self.raw(coordinates)
        held = np.array([self.held.get(name, 0.0) for name in self.law.linear_names])
        return np.asarray(columns @ held), np.einsum("bnmk,m->bnk", slopes, held)

    def separable(self, penalty: Mapping[str, tuple[float, float]] | None = None) -> SeparableLaw:
        """Return the law as the fitter takes it.

        Args:
            penalty: (centre, stiffness) by name of a non-linear parameter; the stiffness is per squared unit of its
                coordinate, the logarithm for `log` ones.
        """
        lower = np.array([p.inward(self.fixed.get(p.name, p.lower)) for p in self.inner], dtype=np.float64)
        upper = np.array([p.inward(self.fixed.get(p.name, p.upper)) for p in self.inner], dtype=np.float64)
        free = np.array([self.law.parameter(name).lower < 0 for name in self.names], dtype=bool)
        centre = stiffness = None
        if penalty:
            for name in penalty:
                if name not in self.law.nonlinear_names:
                    raise UserError(f"penalty must be on a non-linear parameter, got '{name}'; fix it instead")
            centre = np.array([p.inward(penalty[p.name][0]) if p.name in penalty else 0.0 for p in self.inner])
            stiffness = np.array([penalty[p.name][1] if p.name in penalty else 0.0 for p in self.inner])
        return SeparableLaw(
            columns=self.columns,
            num_linear=len(self.names),
            lower=lower,
            upper=upper,
            starts=self._starts(),
            offset=self.offset if self.held else None,
            space=self.law.space,
            free=free,
            centre=centre,
            stiffness=stiffness,
        )

    def _starts(self) -> Array:
        """Return where searches begin (s, k): the grid of the parameters' starts, or a Halton sequence in its box."""
        axes = [(self.fixed[p.name],) if p.name in self.fixed else p.starts for p in self.inner]
        axes = [tuple(float(p.inward(v)) for v in axis) for p, axis in zip(self.inner, axes, strict=True)]
        if np.prod([len(axis) for axis in axes], dtype=float) <= MAX_STARTS:
            points = list(itertools.product(*axes))  # one empty point for a law without such parameters
            return np.array(points, dtype=np.float64).reshape(len(points), len(axes))
        low, high = (np.array([f(axis) for axis in axes]) for f in (min, max))
        return np.asarray(low + (high - low) * halton(MAX_STARTS, len(axes)))

    def natural(self, parameters: Array) -> dict[str, Array]:
        """Return the fitter's parameters (batch, m + k) as arrays (batch,) by name, all in natural units."""
        count = len(self.names)
        coordinates = parameters[:, count:]
        values = {p.name: p.outward(coordinates[:, i]) for i, p in enumerate(self.inner)}
        chunk = max(1, 2_000_000 // max(self.num_points * len(self._kept), 1))
        sizes = []
        for i in range(0, len(parameters), chunk):
            inner = {name: value[i : i + chunk, None] for name, value in values.items()}
            shape = (len(parameters[i : i + chunk]), self.num_points)
            columns = [np.broadcast_to(c, shape) for c in self.law.columns(self.x, inner)]
            kept = np.stack(columns, axis=2)[:, :, self._kept]
            sizes.append(_size(kept.astype(np.float64), None)[0])
        scale = np.concatenate(sizes)
        values |= {name: parameters[:, j] / scale[:, j] for j, name in enumerate(self.names)}
        values |= {name: np.full(len(parameters), value) for name, value in self.held.items()}
        return {name: np.asarray(values[name]) for name in self.law.fitted_names}


def _size(columns: Array, slopes: Array | None) -> tuple[Array, Array]:
    """Return the geometric mean (batch, m) of the entries that are not 0, and its relative slopes (batch, m, k)."""
    present = columns != 0
    count = np.maximum(present.sum(axis=1), 1)
    safe = np.where(present, columns, 1.0)
    size = np.exp(np.log(np.abs(safe)).sum(axis=1) / count)
    if slopes is None:
        return size, np.empty(0)
    relative = np.where(present[..., None], slopes / safe[..., None], 0.0).sum(axis=1) / count[..., None]
    return size, relative


def halton(num_points: int, num_dimensions: int) -> Array:
    """Return the first points (num_points, num_dimensions) of the Halton sequence in the unit cube.

    >>> halton(3, 2).round(3).tolist()
    [[0.5, 0.333], [0.25, 0.667], [0.75, 0.111]]

    References:
        Halton 1960.
    """
    primes = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)[:num_dimensions]
    points = np.zeros((num_points, num_dimensions))
    for axis, base in enumerate(primes):
        index, factor = np.arange(1, num_points + 1), 1.0
        while index.any():
            factor /= base
            points[:, axis] += factor * (index % base)
            index = index // base
    return points
