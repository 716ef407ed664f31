"""The spectral density of a symmetric operator by stochastic Lanczos quadrature, and what else the products tell.

For a vector v of random signs, m Lanczos steps give nodes theta_i and weights w_i that sum to one, with

    v' f(A) v / n = sum_i w_i f(theta_i)

exactly for polynomials f of degree below 2 m, and E[v' f(A) v] = tr f(A). So each run is an unbiased sample of the
trace, of the squared Frobenius norm, and of the density `1/n sum_j delta(lambda - lambda_j)`, as far as 2 m moments
tell.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from landscape_ray.errors import UserError
from landscape_ray.probes.estimate import UNKNOWN, Estimate
from landscape_ray.probes.spectrum.eigenpairs import FLOOR
from landscape_ray.probes.spectrum.lanczos import extremal_pairs
from landscape_ray.probes.spectrum.sign_samples import error_of_mean, random_signs, student

MAX_RESIDUAL = 0.05
"""Of a Ritz value that is given for an eigenvalue or an edge, relative to it, or to `FLOOR` of the largest in
magnitude; with a larger one it is not `converged`."""

MAX_OUTLIER_SHARE = 0.25
"""Of the eigenvalues; what lies further inside the spectrum is bulk."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SpectralDensity:
    """A density and what comes with it. Errors are over probe vectors; see :func:`spectral_density` for one vector.

    Attributes:
        nodes: Ritz values of each run, ascending, float64.
        weights: of the nodes, sum one in each run.
        grid: eigenvalues, ascending, a quarter of sigma apart; left out is where there are none.
        density: on the grid, per unit of eigenvalue; the mean over runs.
        density_error: standard error of the density; None for one vector.
        sigma: standard deviation of the Gaussian around each node.
        trace: sum of the eigenvalues, unbiased.
        frobenius_norm: root of the sum of their squares; the square is unbiased.
        largest: the largest Ritz value; `standard_error` is the residual, and `vector` the Ritz vector, where a matrix
            was given by its products. Not `converged` where that is above 5 % of
            its value, as it is after a few steps, which mostly underestimate; likewise the following three.
        smallest: the smallest one, likewise.
        bulk_upper: upper edge of the bulk: its largest Ritz value.
        bulk_lower: lower edge of the bulk.
        num_above: number of outliers above the bulk.
        num_below: number of outliers below it.
        outliers: those of the first run, descending.
        num_matvecs, price_gradients, cost_seconds: what was spent.
        by_differences: whether products were differences of gradients.
    """

    nodes: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    grid: Tensor
    density: Tensor
    density_error: Tensor | None
    sigma: float
    trace: Estimate
    frobenius_norm: Estimate
    largest: Estimate
    smallest: Estimate
    bulk_upper: Estimate
    bulk_lower: Estimate
    num_above: Estimate
    num_below: Estimate
    outliers: Tensor
    num_matvecs: int
    by_differences: bool = False
    price_gradients: float = 0.0
    cost_seconds: float = 0.0

    def at(self, grid: Tensor, sigma: float | None = None) -> tuple[Tensor, Tensor | None]:
        """Return density and standard error on another grid, and with another width.

        Args:
            grid: eigenvalues, any shape.
            sigma: > 0; None keeps the width.

        Raises:
            UserError: sigma is not positive and finite.
        """
        sigma = self.sigma if sigma is None else _checked_width(sigma)
        return _blur(self.nodes, self.weights, grid, sigma)


class _Run(NamedTuple):
    """One quadrature: nodes, ascending, their weights, and the residuals of the Ritz pairs."""

    nodes: Tensor
    weights: Tensor
    residuals: Tensor


def lanczos_quadrature(
    matvec: Callable[[Tensor], Tensor],
    size: int,
    *,
    num_steps: int = 80,
    num_vectors: int = 2,
    sigma: float | None = None,
    min_gap: float = 0.25,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> SpectralDensity:
    """Return the spectral density of a symmetric operator; :func:`spectral_density` for one that is at hand.

    Args:
        matvec: `A v` for v of shape (size,); A symmetric.
        size: number of rows of A, >= 1.
        num_steps: as there.
        num_vectors: as there.
        sigma: as there.
        min_gap: as there.
        seed: as there.
        dtype: of the vectors.
        device: of the vectors.

    Raises:
        UserError: an argument out of its range.

    >>> spectrum = torch.tensor([1.0, 2.0, 3.0, 10.0])
    >>> found = lanczos_quadrature(lambda v: spectrum * v, 4)
    >>> round(found.trace.value, 3), round(found.frobenius_norm.value, 3)  # signs and a diagonal: exact
    (16.0, 10.677)
    """
    check_quadrature(num_steps, num_vectors, sigma, min_gap)
    generator = torch.Generator().manual_seed(seed)
    runs: list[_Run] = []
    tops: list[Tensor] = []
    num_matvecs = 0
    for _ in range(num_vectors):
        pairs = extremal_pairs(
            matvec,
            size,
            start=random_signs(size, generator, dtype, torch.device(device)),
            tol=0.0,
            max_matvecs=num_steps,
            seed=seed,
            dtype=dtype,
            device=device,
        )
        num_matvecs += pairs.num_matvecs
        if pairs.weights is None or not math.isfinite(float(pairs.values[0])):
            return unknown_density(num_matvecs)
        runs.append(_Run(pairs.ritz_values, pairs.weights, pairs.ritz_residuals))
        tops.append(pairs.vectors[0])

    trace, frobenius_norm = _moments(runs, size)
    above, below = (
        [_num_outliers(run, min_gap) for run in runs],
        [_num_outliers(_mirrored(run), min_gap) for run in runs],
    )
    bulk_upper = _edge(runs, above)
    bulk_lower = _edge([_mirrored(run) for run in runs], below)
    bulk_lower = dataclasses.replace(bulk_lower, value=-bulk_lower.value)
    if sigma is None:
        num_inside = sum(len(run.nodes) for run in runs) - sum(above) - sum(below)
        width = (bulk_upper.value - bulk_lower.value) * len(runs) / num_inside
        scale = max(abs(trace.value) / size, float(torch.cat([run.nodes for run in runs]).abs().max()))
        sigma = max(width, 1e-3 * scale) or 1e-3  # a spectrum of one point, or of zeros
    nodes, weights = tuple(run.nodes for run in runs), tuple(run.weights for run in runs)
    grid = _grid(runs, above, below, bulk_lower.value, bulk_upper.value, sigma)
    density, density_error = _blur(nodes, weights, grid, sigma)
    first, largest = runs[0].nodes, _extreme(runs, -1)
    return SpectralDensity(
        nodes=nodes,
        weights=weights,
        grid=grid,
        density=density,
        density_error=density_error,
        sigma=sigma,
        trace=dataclasses.replace(trace, num_matvecs=num_matvecs),
        frobenius_norm=frobenius_norm,
        largest=dataclasses.replace(largest, vector=tops[[float(run.nodes[-1]) for run in runs].index(largest.value)]),
        smallest=_extreme(runs, 0),
        bulk_upper=bulk_upper,
        bulk_lower=bulk_lower,
        num_above=_mean([float(count) for count in above]),
        num_below=_mean([float(count) for count in below]),
        outliers=torch.cat([first[: below[0]], first[len(first) - above[0] :]]).flip(0),
        num_matvecs=num_matvecs,
    )


def _blur(
    nodes: Sequence[Tensor], weights: Sequence[Tensor], grid: Tensor, sigma: float
) -> tuple[Tensor, Tensor | None]:
    places = grid.to(torch.float64)[..., None]
    normal = 1.0 / (sigma * math.sqrt(2.0 * math.pi))
    each = torch.stack(
        [
            (own * torch.exp(-0.5 * ((places - near) / sigma).square())).sum(-1) * normal
            for near, own in zip(nodes, weights, strict=True)
        ]
    )
    error = student(len(each) - 1) * each.std(0) / math.sqrt(len(each)) if len(each) > 1 else None
    return each.mean(0), error


def _grid(
    runs: Sequence[_Run], above: Sequence[int], below: Sequence[int], lower: float, upper: float, sigma: float
) -> Tensor:
    """Return multiples of a quarter sigma, seven sigma around bulk and outliers: what is between them is zero."""
    step = 0.25 * sigma
    places = set(range(math.floor(lower / step) - 28, math.ceil(upper / step) + 29))
    for run, many, few in zip(runs, above, below, strict=True):
        for node in [*run.nodes[len(run.nodes) - many :].tolist(), *run.nodes[:few].tolist()]:
            places.update(range(math.floor(node / step) - 28, math.ceil(node / step) + 29))
    return torch.tensor(sorted(places), dtype=torch.float64) * step


def _mirrored(run: _Run) -> _Run:
    return _Run(-run.nodes.flip(0), run.weights.flip(0), run.residuals.flip(0))


def _num_outliers(run: _Run, min_gap: float) -> int:
    """Return how many nodes lie above the bulk; see :func:`spectral_density` for the rule."""
    nodes, weights, residuals = (part.flip(0) for part in run)  # descending
    median = nodes[int(torch.searchsorted(weights.cumsum(0), 0.5).clamp(max=len(nodes) - 1))]
    gaps = nodes[:-1] - nodes[1:]
    inside = (residuals[:-1] > 0.5 * gaps) | (weights.cumsum(0)[:-1] > MAX_OUTLIER_SHARE) | (nodes[:-1] <= median)
    candidates = int(inside.long().argmax()) if bool(inside.any()) else len(gaps)
    wide = (gaps >= min_gap * (nodes[:-1] - median))[:candidates].nonzero()
    return int(wide[-1]) + 1 if len(wide) else 0


def _edge(runs: Sequence[_Run], counts: Sequence[int]) -> Estimate:
    """Return the largest node of the bulk, given how many are above it."""
    places = [len(run.nodes) - 1 - count for run, count in zip(runs, counts, strict=True)]
    residuals = [float(run.residuals[place]) for run, place in zip(runs, places, strict=True)]
    edge = _mean([float(run.nodes[place]) for run, place in zip(runs, places, strict=True)])
    converged = all(_resolved(run, place) for run, place in zip(runs, places, strict=True))
    error = edge.standard_error if len(runs) > 1 else residuals[0]
    return dataclasses.replace(edge, standard_error=error, converged=converged)


def _extreme(runs: Sequence[_Run], place: int) -> Estimate:
    """Return the first (0) or last (-1) node of all, with its residual."""
    values = [float(run.nodes[place]) for run in runs]
    best = values.index(max(values) if place else min(values))
    return Estimate(
        value=values[best],
        standard_error=float(runs[best].residuals[place]),
        converged=_resolved(runs[best], place),
    )


def _resolved(run: _Run, place: int) -> bool:
    scale = max(abs(float(run.nodes[place])), FLOOR * float(run.nodes.abs().max()))
    return float(run.residuals[place]) <= MAX_RESIDUAL * scale


def _mean(samples: Sequence[float]) -> Estimate:
    error = error_of_mean(samples) if len(samples) > 1 else 0.0
    return Estimate(value=math.fsum(samples) / len(samples), standard_error=error)


def _moments(runs: Sequence[_Run], size: int) -> tuple[Estimate, Estimate]:
    """Return trace and Frobenius norm."""
    first, second, fourth = (
        [size * float((run.weights * run.nodes**power).sum()) for run in runs] for power in (1, 2, 4)
    )
    trace, square = _mean(first), _mean(second)
    if len(runs) == 1:
        trace = dataclasses.replace(trace, standard_error=math.sqrt(2.0 * second[0]))
        square = dataclasses.replace(square, standard_error=math.sqrt(2.0 * fourth[0]))
    norm = math.sqrt(square.value)
    return trace, Estimate(value=norm, standard_error=0.5 * square.standard_error / norm if norm else 0.0)


def unknown_density(num_matvecs: int) -> SpectralDensity:
    """Return what is known where weights or loss are not finite."""
    nothing = torch.empty(0, dtype=torch.float64)
    return SpectralDensity(
        nodes=(),
        weights=(),
        grid=nothing,
        density=nothing,
        density_error=None,
        sigma=math.nan,
        trace=dataclasses.replace(UNKNOWN, num_matvecs=num_matvecs),
        frobenius_norm=UNKNOWN,
        largest=UNKNOWN,
        smallest=UNKNOWN,
        bulk_upper=UNKNOWN,
        bulk_lower=UNKNOWN,
        num_above=UNKNOWN,
        num_below=UNKNOWN,
        outliers=nothing,
        num_matvecs=num_matvecs,
    )


def _checked_width(sigma: float) -> float:
    if not (math.isfinite(sigma) and sigma > 0):
        raise UserError(f"sigma must be positive and finite, got {sigma}; None takes the distance between nodes")
    return sigma


def check_quadrature(num_steps: int, num_vectors: int, sigma: float | None, min_gap: float) -> None:
    """Check what the caller of a quadrature chooses.

    Raises:
        UserError: something is out of its range.
    """
    if num_steps < 3:  # the error of the norm takes the fourth moment
        raise UserError(f"num_steps must be at least 3, got {num_steps}; 80 resolve the bulk into as many pieces")
    if num_vectors < 1:
        raise UserError(f"num_vectors must be at least 1, got {num_vectors}; the error falls with its root")
    if sigma is not None:
        _checked_width(sigma)
    if not 0 < min_gap < 1:
        raise UserError(f"min_gap must be between 0 and 1, got {min_gap}; 0.25 tells outliers of classes from the bulk")
