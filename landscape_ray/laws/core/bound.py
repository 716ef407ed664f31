"""A law at the points of one data set: what the fitter searches, made from the declaration.

References:
    Squire and Trapp 1998 (derivatives by a complex step, exact to rounding).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws.core.law import Law
from landscape_ray.laws.core.separable import SeparableLaw

Array: TypeAlias = NDArray[np.float64]

_STEP = 1e-100
"""Imaginary step of the derivatives: so small that its square is no number, which makes them exact."""

_SIZED_BY = 64
"""Points whose geometric mean a column is divided by: any fixed ones decouple a factor from its exponent."""

MAX_STARTS = 256
"""Of a grid of starts with more points than this, a Halton sequence takes the place."""


class Bound:
    """A law at the points of one data set, in the coordinates of the fitter.

    The columns are divided by their geometric mean over points spread over the data (where they are not 0), whatever
    the non-linear parameters: a coefficient is then the size of its term in the middle of the data. A factor and its
    exponent, which trade off over ten orders of magnitude, are decoupled by that, for any formula. Columns of
    parameters that are not `normalised` stay as they are.

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
        self._normalised = np.array([law.parameter(name).normalised for name in self.names], dtype=bool)
        self._some = np.unique(np.linspace(0, num_points - 1, min(num_points, _SIZED_BY)).astype(int))

    def raw(self, coordinates: Array) -> tuple[Array, Array]:
        """Return all columns (batch, n, m) and their slopes (batch, n, m, k) by the coordinates (batch, k)."""
        law, shape = self.law, (len(coordinates), self.num_points)
        axes = [coordinates[:, i, None] for i in range(len(self.inner))]
        values = self.values(axes)
        columns = np.stack([np.broadcast_to(c, shape) for c in law.columns(self.x, values)], axis=2)
        columns = columns.astype(np.float64, copy=False)
        slopes = np.zeros((*columns.shape, len(self.inner)))
        if law.slopes is not None:
            for j, by_name in enumerate(law.slopes(self.x, values)):
                for i, p in enumerate(self.inner):
                    if p.name in by_name:
                        factor = values[p.name] if p.log else 1.0
                        slopes[:, :, j, i] = by_name[p.name] * factor
            return columns, slopes
        for i, p in enumerate(self.inner):
            if p.name in self.fixed:
                continue
            moved = self.values([axis + 1j * _STEP if k == i else axis for k, axis in enumerate(axes)])
            for j, column in enumerate(law.columns(self.x, moved)):
                if np.iscomplexobj(column):
                    slopes[:, :, j, i] = np.broadcast_to(np.imag(column), shape) / _STEP
        return columns, slopes

    def values(self, axes: Sequence[Any]) -> dict[str, Any]:
        """Return the non-linear parameters by name for their coordinates, each (batch, 1), real or complex."""
        values = {
            p.name: np.full(axis.shape, self.fixed[p.name]) if p.name in self.fixed else p.outward(axis)
            for p, axis in zip(self.inner, axes, strict=True)
        }
        scaled = {p.name: p.scale for p in self.inner if p.scale is not None and p.name not in self.fixed}
        known = {name: value for name, value in values.items() if name not in scaled}
        return values | {name: values[name] * scale(self.x, known) for name, scale in scaled.items()}

    def coordinates(self, values: Mapping[str, Array]) -> Array:
        """Return the coordinates (batch, k) of non-linear parameters (batch,) by name: the inverse of `values`."""
        given = {name: np.asarray(value)[:, None] for name, value in values.items()}
        known = {p.name: given[p.name] for p in self.inner if p.scale is None}
        columns = []
        for p in self.inner:
            if p.name in self.fixed:
                held = 1.0 if p.scale is not None else self.fixed[p.name]
                columns.append(np.full_like(given[p.name], p.inward(held)))
            else:
                scale = 1.0 if p.scale is None else p.scale(self.x, known)
                columns.append(np.asarray(p.inward(given[p.name] / scale)))
        batch = len(next(iter(given.values())))
        return np.concatenate([np.empty((batch, 0)), *columns], axis=1)

    def columns(self, coordinates: Array) -> tuple[Array, Array]:
        """Return the columns of the free coefficients and their slopes, divided by their size."""
        columns, slopes = self.raw(coordinates)
        if self.held:
            columns, slopes = columns[:, :, self._kept], slopes[:, :, self._kept]
        size, relative = _size(columns[:, self._some], slopes[:, self._some], self._normalised)
        columns /= size[:, None]  # in place: these are the large arrays of a fit
        slopes /= size[:, None, :, None]
        for j, i in zip(*np.nonzero(relative.any(axis=0)), strict=True):
            slopes[:, :, j, i] -= columns[:, :, j] * relative[:, None, j, i]
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
        held = {p.name: 1.0 if p.scale is not None else self.fixed[p.name] for p in self.inner if p.name in self.fixed}
        lower = np.array([p.inward(held.get(p.name, p.lower)) for p in self.inner], dtype=np.float64)
        upper = np.array([p.inward(held.get(p.name, p.upper)) for p in self.inner], dtype=np.float64)
        free = np.array([self.law.parameter(name).lower < 0 for name in self.names], dtype=bool)
        centre = stiffness = None
        if penalty:
            for name in penalty:
                if name not in self.law.nonlinear_names or self.law.parameter(name).scale is not None:
                    raise UserError(
                        f"penalty must be on a non-linear parameter without a scale, got '{name}'; fix it instead"
                    )
            centre = np.array([p.inward(penalty[p.name][0]) if p.name in penalty else 0.0 for p in self.inner])
            stiffness = np.array([penalty[p.name][1] if p.name in penalty else 0.0 for p in self.inner])
        return SeparableLaw(
            columns=self.columns,
            num_linear=len(self.names),
            lower=lower,
            upper=upper,
            starts=self._starts(held),
            offset=self.offset if self.held else None,
            space=self.law.space,
            free=free,
            centre=centre,
            stiffness=stiffness,
        )

    def _starts(self, held: Mapping[str, float]) -> Array:
        """Return where searches begin (s, k): the grid of the parameters' starts, or a Halton sequence in its box."""
        axes = [(held[p.name],) if p.name in held else p.starts for p in self.inner]
        axes = [tuple(float(p.inward(v)) for v in axis) for p, axis in zip(self.inner, axes, strict=True)]
        if np.prod([len(axis) for axis in axes], dtype=float) <= MAX_STARTS:
            every = list(itertools.product(*axes))
            return np.array(every, dtype=np.float64).reshape(len(every), len(axes))
        low, high = (np.array([f(axis) for axis in axes]) for f in (min, max))
        return np.asarray(low + (high - low) * halton(MAX_STARTS, len(axes)))

    def natural(self, parameters: Array) -> dict[str, Array]:
        """Return the fitter's parameters (batch, m + k) as arrays (batch,) by name, all in natural units."""
        count = len(self.names)
        coordinates = parameters[:, count:]
        inner_values = self.values([coordinates[:, i, None] for i in range(len(self.inner))])
        values = {name: np.broadcast_to(v, (len(parameters), 1))[:, 0] for name, v in inner_values.items()}
        chunk = max(1, 2_000_000 // max(self.num_points * len(self._kept), 1))
        sizes = []
        for i in range(0, len(parameters), chunk):
            inner = {name: value[i : i + chunk, None] for name, value in values.items()}
            shape = (len(parameters[i : i + chunk]), self.num_points)
            columns = [np.broadcast_to(c, shape) for c in self.law.columns(self.x, inner)]
            kept = np.stack(columns, axis=2)[:, :, self._kept]
            sizes.append(_size(kept[:, self._some].astype(np.float64), None, self._normalised)[0])
        scale = np.concatenate(sizes)
        values |= {name: parameters[:, j] / scale[:, j] for j, name in enumerate(self.names)}
        values |= {name: np.full(len(parameters), value) for name, value in self.held.items()}
        return {name: np.asarray(values[name]) for name in self.law.fitted_names}


def _size(columns: Array, slopes: Array | None, normalised: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Return the geometric mean (batch, m) of the entries that are not 0, and its relative slopes (batch, m, k).

    Of columns that are not `normalised` (m,): 1 and 0.
    """
    present = (columns != 0) & normalised
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
