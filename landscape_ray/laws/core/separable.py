"""A law as the fitter takes it, and the exact solution for its linear parameters: variable projection.

References:
    Golub and Pereyra 1973.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SeparableLaw:
    """A law at the points of one data set: its columns as a function of the exponents.

    Attributes:
        columns: maps exponents (batch, k) to the columns (batch, n, m) and their slopes
            d columns / d exponents (batch, n, m, k). Scale the columns to be of order one.
        num_linear: m.
        lower: (k,) smallest exponents.
        upper: (k,) largest exponents.
        starts: (s, k) where the searches begin.
        offset: maps exponents (batch, k) to what is added without a coefficient (batch, n) and its slopes
            (batch, n, k); None for nothing.
        space: whether residuals are those of the logarithm, which needs a positive law, or raw.
        free: (m,) linear parameters that may be negative; None for none.
        centre: (k,) where the penalty pulls the exponents to; None for no penalty.
        stiffness: (k,) how strongly, in units of the objective; None for no penalty.
    """

    columns: Callable[[Array], tuple[Array, Array]]
    num_linear: int
    lower: Array
    upper: Array
    starts: Array
    offset: Callable[[Array], tuple[Array, Array]] | None = None
    space: Literal["log", "raw"] = "log"
    free: NDArray[np.bool_] | None = None
    centre: Array | None = None
    stiffness: Array | None = None

    @property
    def linear_lower(self) -> Array:
        """Smallest linear parameters (m,): 0, or -inf for free ones."""
        free = np.zeros(self.num_linear, dtype=bool) if self.free is None else self.free
        return np.where(free, -np.inf, 0.0)

    def project(self, exponents: Array, y: Array, weights: Array) -> Array:
        """Return the linear parameters (batch, m) that fit best at given exponents, by weighted least squares.

        In log space of the relative residuals 1 - prediction / y.
        """
        columns, _ = self.columns(exponents)
        target = y if self.offset is None else y - self.offset(exponents)[0]
        if self.space == "log":
            columns, target = columns / y[..., None], target / y
        return _least_squares(columns, target, weights, self.linear_lower == 0)

    def predict(self, parameters: Array) -> Array:
        """Return the prediction (batch, n) for parameters (batch, m + k)."""
        linear, exponents = parameters[:, : self.num_linear], parameters[:, self.num_linear :]
        prediction = np.einsum("bnm,bm->bn", self.columns(exponents)[0], linear)
        return np.asarray(prediction if self.offset is None else prediction + self.offset(exponents)[0])


def solve_linear(columns: Array, y: Array, weights: Array) -> Array:
    """Return the non-negative linear parameters that minimise sum_i weights_i (1 - prediction_i / y_i)^2.

    See :func:`_least_squares`.

    Args:
        columns: (batch, n, m).
        y: (batch, n), positive.
        weights: (batch, n), non-negative.

    Returns:
        (batch, m).
    """
    return _least_squares(columns / y[..., None], np.ones_like(y), weights, np.ones(columns.shape[-1], dtype=bool))


def _least_squares(matrix: Array, target: Array, weights: Array, positive: NDArray[np.bool_]) -> Array:
    """Return x (batch, m) that minimises sum_i weights_i (target_i - (matrix x)_i)^2, x_j >= 0 where positive (m,).

    Exact: every subset of non-zero parameters is solved, and the best one without a forbidden sign kept. That is
    2^m small systems, which for the m <= 6 of these laws is cheaper in a batch than an active-set iteration.
    """
    weighted = (weights[..., None] * matrix).swapaxes(1, 2)
    gram = weighted @ matrix
    moment = (weighted @ target[..., None])[..., 0]
    scale = np.sqrt(np.einsum("bii->bi", gram))
    usable = scale > 0
    scale = np.where(usable, scale, 1.0)
    gram /= scale[:, :, None] * scale[:, None, :]
    moment /= scale
    best = np.zeros_like(moment)
    best_gain = np.full(len(moment), -np.inf)
    for subset in itertools.product(*(((False, True) if one else (True,)) for one in positive)):
        candidate = solve_free(gram, moment, usable & np.array(subset, dtype=bool))
        gain = np.einsum("bi,bi->b", candidate, moment)
        better = ((candidate >= 0) | ~positive).all(axis=1) & (gain > best_gain)
        best[better], best_gain[better] = candidate[better], gain[better]
    return np.asarray(best / scale)


def solve_free(matrix: Array, right: Array, free: NDArray[np.bool_]) -> Array:
    """Return the solutions (batch, p) of the symmetric systems restricted to the free entries; zero elsewhere."""
    both = free[:, :, None] & free[:, None, :]
    index = np.arange(matrix.shape[-1])
    restricted = np.where(both, matrix, 0.0)
    # A ridge at rounding level keeps exactly collinear columns solvable; held entries get a one.
    restricted[:, index, index] = np.where(free, restricted[:, index, index] + 1e-14, 1.0)
    return np.asarray(np.linalg.solve(restricted, np.where(free, right, 0.0)[..., None])[..., 0])
