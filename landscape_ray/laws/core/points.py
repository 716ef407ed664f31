"""What laws are fitted to: a table of points, each with its variables, its response and the run that it comes from."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from landscape_ray.errors import UserError

if TYPE_CHECKING:
    from landscape_ray.laws.core.law import Law

Array: TypeAlias = NDArray[np.float64]

MAX_COMPUTE_MISMATCH = 0.02
"""C and 6 N D may differ by this much, relative, before that is worth a warning."""


class Data(Protocol):
    """What a fit needs of its data; :class:`Points` and `CurveSet` are such."""

    @property
    def response(self) -> ArrayLike:
        """Observations (n,)."""

    @property
    def run(self) -> NDArray[np.int64]:
        """Number of the run of every point (n,), from 0; points of one run stand in order."""

    @property
    def run_ids(self) -> tuple[str, ...]:
        """Name of every run."""

    @property
    def weights(self) -> ArrayLike | None:
        """Weight of every point (n,), or None for 1."""

    def check(self, law: Law) -> tuple[str, ...]:
        """Return warnings; raise where the law cannot be fitted to this."""

    def summary(self) -> dict[str, Any]:
        """Return what was fitted, for the record."""

    def thinned(self, most: int) -> Data:
        """Return about `most` of the points, spread over all runs: enough to begin a search with."""


@dataclasses.dataclass(frozen=True, eq=False)
class Points:
    """A table of points.

    Attributes:
        variables: arrays (n,) by the law's names of its variables; others may be there.
        response: (n,) what the law predicts.
        run_of: (n,) name of the run of every point; points of one run are not independent. None: each is a run.
        weights: (n,) weight of every point, >= 0; None for 1.

    Raises:
        UserError: lengths differ, or values are missing or not finite.

    >>> points = Points({"N": [1e6, 1e7, 1e8]}, [3.2, 2.9, 2.7])
    >>> points.run_ids
    ('0', '1', '2')
    """

    variables: Mapping[str, Any]
    response: Any
    run_of: Sequence[str] | None = None
    weights: Any = None

    def __post_init__(self) -> None:
        response = _column("response", self.response, None)
        columns = {name: _column(name, values, len(response)) for name, values in self.variables.items()}
        object.__setattr__(self, "variables", columns)
        object.__setattr__(self, "response", response)
        if self.weights is not None:
            weights = _column("weights", self.weights, len(response))
            if (weights < 0).any() or not (weights > 0).any():
                raise UserError(f"weights must be >= 0 and somewhere > 0, got {weights.min():g}; drop points instead")
            object.__setattr__(self, "weights", weights)
        names = [str(i) for i in range(len(response))] if self.run_of is None else [str(r) for r in self.run_of]
        if len(names) != len(response):
            raise UserError(f"run_of must name a run for each of {len(response)} points, got {len(names)}; add them")
        object.__setattr__(self, "run_of", tuple(names))

    @property
    def run_ids(self) -> tuple[str, ...]:
        """Name of every run, by first appearance."""
        return tuple(dict.fromkeys(self.run_of or ()))

    @property
    def run(self) -> NDArray[np.int64]:
        """Number of the run of every point (n,)."""
        number = {name: i for i, name in enumerate(self.run_ids)}
        return np.array([number[name] for name in self.run_of or ()], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.response)

    def take(self, kept: ArrayLike) -> Points:
        """Return some of the points, by a mask or by their numbers."""
        index = np.arange(len(self))[np.asarray(kept)]
        return Points(
            {name: np.asarray(values)[index] for name, values in self.variables.items()},
            np.asarray(self.response)[index],
            [(self.run_of or ())[i] for i in index],
            None if self.weights is None else np.asarray(self.weights)[index],
        )

    def thinned(self, most: int) -> Points:
        """Return about `most` of the points, of every run in proportion; drawn, so that no grid is seen in steps."""
        kept = np.random.default_rng(0).choice(len(self), size=min(most, len(self)), replace=False)
        return self.take(np.sort(kept))

    def check(self, law: Law) -> tuple[str, ...]:
        """Return warnings about the table.

        Raises:
            UserError: a variable is missing or has too few values, or something that must be positive is not.
        """
        response = np.asarray(self.response)
        missing = [variable.name for variable in law.variables if variable.name not in self.variables]
        if missing:
            raise UserError(
                f"points must have the variables of law '{law.name}', missing: {', '.join(missing)}; "
                f"there: {', '.join(self.variables) or 'none'}"
            )
        if (law.space == "log" or law.response.positive) and not (response > 0).all():
            bad = response[~(response > 0)][0]
            raise UserError(f"{law.response.name} must be > 0, got {bad:g}; drop these points, or runs that diverged")
        warnings = []
        for variable in law.variables:
            values = np.asarray(self.variables[variable.name])
            if variable.positive and not (values > 0).all():
                raise UserError(f"{variable.name} must be > 0, got {values[~(values > 0)][0]:g}; drop these points")
            if not (values < variable.below).all():
                raise UserError(
                    f"{variable.name} must be < {variable.below:g}, got {values.max():g}; drop these points, or give "
                    "shares, not percentages"
                )
            distinct = len(np.unique(values))
            if distinct < variable.min_distinct:
                raise UserError(
                    f"{variable.name} must have at least {variable.min_distinct} different values, got {distinct}; "
                    f"law '{law.name}' cannot be told from points of one {variable.meaning or variable.name}"
                )
            if distinct == 2:
                warnings.append(f"two_values: {variable.name} has two different values, so its exponent is not tested")
        table = np.column_stack([*(np.asarray(self.variables[v.name]) for v in law.variables), response])
        repeated = len(table) - len(np.unique(table, axis=0))
        if repeated:
            warnings.append(
                f"duplicates: {repeated} points repeat another one to the last digit; is a run there twice?"
            )
        return (*warnings, *self._compute_warnings())

    def _compute_warnings(self) -> tuple[str, ...]:
        """Return what size, tokens and compute say about each other, where the table has all three."""
        if not {"N", "D", "C"} <= set(self.variables):
            return ()
        n, d, c = (np.asarray(self.variables[name]) for name in ("N", "D", "C"))
        if not ((n > 0) & (d > 0) & (c > 0)).all():
            return ()
        ratio = c / (6 * n * d)
        middle = float(np.median(ratio))
        off = np.abs(ratio - 1) > MAX_COMPUTE_MISMATCH
        if not off.any():
            return ()
        if (np.abs(ratio / middle - 1) > MAX_COMPUTE_MISMATCH).any():
            return (
                f"mixed_counts: C / (6 N D) varies from {ratio.min():.4g} to {ratio.max():.4g}; are embeddings counted "
                "in some runs and not in others, or are units mixed?",
            )
        return (
            f"compute_mismatch: C is {middle:.4g} times 6 N D throughout; is N, D or C in another unit, or counted "
            "otherwise?",
        )

    def summary(self) -> dict[str, Any]:
        """Return runs, number of points, range of every variable and the SHA-256 of the table."""
        ranges = {name: [float(np.min(v)), float(np.max(v))] for name, v in self.variables.items()}
        digest = hashlib.sha256("\0".join([*self.variables, *(self.run_of or ())]).encode())
        for array in (*self.variables.values(), self.response, *([] if self.weights is None else [self.weights])):
            digest.update(np.ascontiguousarray(array).tobytes())
        return {
            "runs": list(self.run_ids),
            "num_points": len(self),
            "ranges": ranges,
            "response_range": [float(np.min(self.response)), float(np.max(self.response))],
            "sha256": digest.hexdigest(),
        }


def _column(name: str, values: ArrayLike, length: int | None) -> Array:
    try:
        column = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"{name} must hold numbers, got {values!r}; convert the column") from None
    if column.ndim != 1 or (length is not None and len(column) != length) or not len(column):
        wanted = "(num_points,)" if length is None else f"({length},)"
        raise UserError(f"{name} must have shape {wanted} and a point at least, got {column.shape}; one value a point")
    if not np.isfinite(column).all():
        bad = column[~np.isfinite(column)][0]
        raise UserError(f"{name} must be finite, got {bad}; drop these points, and say that you did")
    column.setflags(write=False)
    return column
