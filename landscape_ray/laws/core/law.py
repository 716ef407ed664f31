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
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws.core.parameters import LOSS, Parameter, Scale, Variable, grid, linear, nonlinear

Array: TypeAlias = NDArray[np.float64]

Space: TypeAlias = Literal["log", "raw"]

__all__ = ["LOSS", "Columns", "Law", "Parameter", "Review", "Scale", "Space", "Variable", "grid", "linear", "nonlinear"]

Columns: TypeAlias = Callable[[Any, Mapping[str, Any]], Sequence[Any]]
"""From what `prepare` made and the non-linear parameters, each (batch, 1), to one array a linear parameter, each of a
shape that broadcasts to (batch, n). Written with analytic numpy functions (no abs, min or max of something that depends
on a parameter), so that complex parameters pass through."""


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
        of: what it is fitted to: a table of points, or whole loss curves (a `CurveSet`).
        title: in a few words.
        reference: authors, year, arXiv id.
        prepare: makes from the data (see :class:`landscape_ray.laws.core.points.Data`) and the values of the grid
            parameters what `columns` gets as its first argument; None passes the variables, arrays (n,) by name.
        slopes: d columns / d parameter as a function like `columns`, returning for each linear parameter a mapping from
            names of non-linear parameters to arrays; None takes the complex step.
        link: of laws whose response is a function of the sum, increasing: the sum of a response; the fit is then made
            to it. None for the response itself.
        unlink: the inverse of `link`.
        derived: other numbers of interest as functions of the parameters, which come as numbers or arrays by name.
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
    of: Literal["points", "curves"] = "points"
    title: str = ""
    reference: str = ""
    prepare: Callable[[Any, Mapping[str, float]], Any] | None = None
    slopes: Callable[[Any, Mapping[str, Any]], Sequence[Mapping[str, Any]]] | None = None
    link: Callable[[Any], Any] | None = None
    unlink: Callable[[Any], Any] | None = None
    derived: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
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
        if self.slopes is not None and any(parameter.scale is not None for parameter in self.parameters):
            raise UserError(
                f"law '{self.name}' must not have slopes together with a parameter with a scale, got both; leave the "
                "slopes to the complex step"
            )

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
