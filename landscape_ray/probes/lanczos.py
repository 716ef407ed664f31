"""The largest eigenvalue of a symmetric operator, by Lanczos with full reorthogonalisation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from landscape_ray.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LanczosResult:
    """The wanted Ritz pair and the state of the iteration.

    Attributes:
        value: largest Ritz value theta, a lower bound of the largest eigenvalue up to rounding; nan if the operator
            returned something that is not finite.
        vector: its Ritz vector, unit length, shape (size,).
        residual: `||A v - theta v||`: an eigenvalue of A lies in [theta - residual, theta + residual].
        asymmetry: largest `|q_i' A q_j - q_j' A q_i|` seen. Rounding for a symmetric A; more means that the operator
            is not what it should be, for example a finite difference across kinks.
        ritz_values: all Ritz values, ascending, float64, shape (num_matvecs,).
        num_matvecs: products spent.
        converged: the residual met the tolerance, or the Krylov space was exhausted.
    """

    value: float
    vector: Tensor
    residual: float
    asymmetry: float
    ritz_values: Tensor
    num_matvecs: int
    converged: bool


def unit_vector(
    size: int,
    start: Tensor | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return a start vector at unit length: `start` itself, or a random direction.

    Args:
        size: number of entries.
        start: finite and not zero; None draws from a generator of its own, the same numbers on every device.
        seed: of that generator.
        dtype: of the result.
        device: of the result.

    Raises:
        UserError: start has another shape, is zero, or is not finite.
    """
    if start is None:
        start = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    if start.shape != (size,):
        raise UserError(f"start must have shape ({size},), got {tuple(start.shape)}; it belongs to another module")
    start = start.detach().to(dtype=dtype, device=device)
    length = float(torch.linalg.vector_norm(start))
    if not (math.isfinite(length) and length > 0):
        raise UserError(f"start must be finite and not zero, got a vector of length {length}; None draws one")
    return start / length


def lanczos(
    matvec: Callable[[Tensor], Tensor],
    size: int,
    *,
    start: Tensor | None = None,
    tol: float = 0.03,
    max_matvecs: int = 30,
    max_asymmetry: float = math.inf,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LanczosResult:
    """Return the largest algebraic eigenvalue of a symmetric operator, with its vector and an error bound.

    In the orthonormal Krylov basis Q of A and the start vector, `A Q = Q T + beta_m q_{m+1} e_m'` with T tridiagonal.
    The pair `T s = theta s` gives theta and `v = Q s`, whose residual is `|beta_m s_m|` at no further product. The
    iteration stops once

        |beta_m s_m| < tol max(|theta|, sqrt(machine epsilon) ||T||)

    where the second term is for a largest eigenvalue at zero. That the pair is the largest one, rather than another,
    rests on the start vector having a part along it: certain for a random start, not for a warm one.

    The basis is kept, (max_matvecs + 1) x size numbers, and each new vector is orthogonalised against all of it twice;
    without that float32 returns copies of converged values instead of new ones.

    Args:
        matvec: `A v` for v of shape (size,); A symmetric.
        size: number of rows of A, >= 1.
        start: first vector, finite and not zero. None draws a random direction.
        tol: requested residual relative to |theta|, >= 0; 0 never stops before max_matvecs.
        max_matvecs: most products, >= 1; more than `size` are never made.
        max_asymmetry: relative to ||T||; an operator less symmetric than that is given up.
        seed: of the random start.
        dtype: of the vectors.
        device: of the vectors.

    Returns:
        The pair, its residual, and whether it met the tolerance.

    Raises:
        UserError: an argument out of its range.

    References:
        Parlett, The Symmetric Eigenvalue Problem, SIAM 1998, chapters 4 and 13.

    >>> spectrum = torch.tensor([-9.0, 1.0, 2.0, 4.0])
    >>> round(lanczos(lambda v: spectrum * v, 4, tol=1e-6).value, 4)
    4.0
    """
    _check(size, tol, max_matvecs)
    first = unit_vector(size, start, seed=seed, dtype=dtype, device=device)
    eps = torch.finfo(first.dtype).eps
    basis = first.new_empty(min(max_matvecs, size) + 1, size)
    basis[0] = first
    alphas: list[float] = []
    betas: list[float] = []
    asymmetry = 0.0
    ritz_values, weights = torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.float64)
    residual, converged = math.nan, False

    for m in range(1, len(basis)):
        known = basis[:m]
        new = matvec(basis[m - 1])
        overlap = known @ new
        new = new - overlap @ known
        correction = known @ new
        new.sub_(correction @ known)
        alpha, beta = float(overlap[-1] + correction[-1]), float(torch.linalg.vector_norm(new))
        if not (math.isfinite(alpha) and math.isfinite(beta)):
            return LanczosResult(
                value=math.nan,
                vector=first,
                residual=math.nan,
                asymmetry=math.nan,
                ritz_values=ritz_values,
                num_matvecs=m,
                converged=False,
            )
        if betas:
            overlap[-2] -= betas[-1]
            asymmetry = max(asymmetry, float(overlap[:-1].abs().max()))
        alphas.append(alpha)
        betas.append(beta)

        ritz_values, ritz_vectors = torch.linalg.eigh(_tridiagonal(alphas, betas[:-1]))
        weights = ritz_vectors[:, -1]
        theta, norm = float(ritz_values[-1]), float(ritz_values.abs().max())
        residual = beta * abs(float(weights[-1]))
        exhausted = beta <= eps * norm or m == size
        converged = exhausted or residual < tol * max(abs(theta), math.sqrt(eps) * norm)
        if converged or asymmetry > max_asymmetry * norm:
            break
        torch.div(new, beta, out=basis[m])

    vector = weights.to(basis) @ basis[: len(alphas)]
    return LanczosResult(
        value=float(ritz_values[-1]),
        vector=vector / torch.linalg.vector_norm(vector),
        residual=residual,
        asymmetry=asymmetry,
        ritz_values=ritz_values,
        num_matvecs=len(alphas),
        converged=converged,
    )


def _check(size: int, tol: float, max_matvecs: int) -> None:
    if size < 1:
        raise UserError(f"size must be at least 1, got {size}")
    if not (math.isfinite(tol) and tol >= 0):
        raise UserError(
            f"tol must be finite and at least 0, got {tol}; 0.03 tells eigenvalues apart that differ by 6 percent"
        )
    if max_matvecs < 1:
        raise UserError(f"max_matvecs must be at least 1, got {max_matvecs}; 30 suffices for most networks")


def _tridiagonal(diagonal: list[float], off_diagonal: list[float]) -> Tensor:
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if off_diagonal:
        off = torch.tensor(off_diagonal, dtype=torch.float64)
        matrix += torch.diag(off, 1) + torch.diag(off, -1)
    return matrix
