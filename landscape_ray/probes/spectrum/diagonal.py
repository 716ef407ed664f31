"""The diagonal of a symmetric matrix that is known by its products with vectors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from landscape_ray.errors import UserError
from landscape_ray.probes.spectrum.sign_samples import MIN_SAMPLES, SignSamples, random_signs, student


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DiagonalResult:
    """The diagonal, element by element.

    Attributes:
        values: (size,).
        standard_errors: of the values, (size,), widened for few samples.
        num_matvecs: products spent, one a sample.
        converged: the requested accuracy was reached.
    """

    values: Tensor
    standard_errors: Tensor
    num_matvecs: int
    converged: bool


def diagonal(
    matvec: Callable[[Tensor], Tensor],
    size: int,
    *,
    low_rank: tuple[Tensor, Tensor] | None = None,
    tol: float = 0.1,
    max_matvecs: int = 100,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> DiagonalResult:
    """Return the diagonal of a symmetric matrix A, as the mean of v * (A v) over random signs v.

    The variance of a sample is the sum of the squares of the other entries of the row. Outliers of the spectrum, which
    make most of it, can be handed over: the diagonal of their part is known, and the rest is sampled.

    Args:
        matvec: `A v` for v of shape (size,).
        size: number of rows, >= 1.
        low_rank: values (k,) and orthonormal vectors (k, size) of a known part, such as the top eigenpairs; any part
            leaves the result unbiased.
        tol: root of the summed squared standard errors to reach, relative to the length of the diagonal, > 0.
        max_matvecs: most products, >= 2. Memory: five vectors beside the low-rank part.
        seed: of the random signs.
        dtype: of the vectors.
        device: of the vectors.

    Raises:
        UserError: an argument out of its range.

    References:
        Bekas, Kokiopoulou and Saad, An estimator for the diagonal of a matrix, Applied Numerical Mathematics 57, 2007;
        with a low-rank part: Baston and Nakatsukasa, 2022, arXiv:2201.10684.

    >>> matrix = torch.diag(torch.tensor([3.0, -1.0]))
    >>> diagonal(lambda v: matrix @ v, 2).values
    tensor([ 3., -1.])
    """
    _check(size, low_rank, tol, max_matvecs)
    generator = torch.Generator().manual_seed(seed)
    samples = SignSamples(elementwise=True)
    known = torch.zeros(size, dtype=dtype, device=device)
    if low_rank is not None:
        values, vectors = (part.to(known) for part in low_rank)
        known = values @ vectors.square()
    converged = False
    while len(samples.forms) < max_matvecs and samples.finite and not converged:
        signs = random_signs(size, generator, dtype, known.device)
        product = matvec(signs)
        if low_rank is not None:
            product = product - (values * (vectors @ signs)) @ vectors
        samples.add(signs, product)
        if len(samples.forms) >= MIN_SAMPLES:
            assert samples.mean is not None
            errors = _errors(samples)
            length = float(torch.linalg.vector_norm(known + samples.mean))
            converged = float(torch.linalg.vector_norm(errors)) <= tol * length
    assert samples.mean is not None
    return DiagonalResult(
        values=known + samples.mean,
        standard_errors=_errors(samples),
        num_matvecs=len(samples.forms),
        converged=converged,
    )


def _errors(samples: SignSamples) -> Tensor:
    assert samples.deviations is not None
    n = len(samples.forms)
    return (samples.deviations / (n * max(n - 1, 1))).clamp(min=0.0).sqrt() * student(max(n - 1, 1))


def _check(size: int, low_rank: tuple[Tensor, Tensor] | None, tol: float, max_matvecs: int) -> None:
    if size < 1:
        raise UserError(f"size must be at least 1, got {size}")
    if not (math.isfinite(tol) and tol > 0):
        raise UserError(f"tol must be positive and finite, got {tol}; 0.1 is 10 percent of the length of the diagonal")
    if max_matvecs < 2:
        raise UserError(f"max_matvecs must be at least 2, got {max_matvecs}; 100 is usual")
    if low_rank is not None and low_rank[1].shape != (*low_rank[0].shape, size):
        raise UserError(
            f"low_rank must be values (k,) and vectors (k, {size}), got {tuple(low_rank[0].shape)} and "
            f"{tuple(low_rank[1].shape)}"
        )
