"""Eigenvalues at the ends of a symmetric operator's spectrum, by Lanczos with full reorthogonalisation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from landscape_ray.errors import UserError
from landscape_ray.probes.spectrum.krylov import FIRST_ROWS, Krylov, random_directions, unit_vector

__all__ = ["ExtremalPairs", "LanczosResult", "expected_gain", "extremal_pairs", "lanczos", "unit_vector"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LanczosResult:
    """The pair of the largest eigenvalue and the state of the iteration; see :class:`ExtremalPairs`.

    Attributes:
        value: largest Ritz value theta, a lower bound of the largest eigenvalue up to rounding; nan if the operator
            returned something that is not finite.
        vector: its Ritz vector, unit length, shape (size,).
        residual: `||A v - theta v||`: an eigenvalue of A lies in [theta - residual, theta + residual].
        expected_gain: by how much a further product is expected to raise the value, see :func:`expected_gain`; never
            more than the residual.
        asymmetry, ritz_values, num_matvecs, converged: as there.
    """

    value: float
    vector: Tensor
    residual: float
    expected_gain: float
    asymmetry: float
    ritz_values: Tensor
    num_matvecs: int
    converged: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExtremalPairs:
    """The wanted Ritz pairs and the state of the iteration.

    Attributes:
        values: the k largest Ritz values, descending, and then the smallest ones, ascending; (k + num_smallest,),
            float64. nan if the operator returned something that is not finite.
        vectors: their Ritz vectors, unit length, (k + num_smallest, size).
        residuals: `||A v - theta v||` of each: an eigenvalue of A lies within that distance of theta.
        asymmetry: largest `|q_i' A q_j - q_j' A q_i|` seen. Rounding for a symmetric A; more means that the operator
            is not what it should be, for example a finite difference across kinks.
        ritz_values: all Ritz values, ascending, float64, (m,); m is the number of products where nothing restarted.
        ritz_residuals: of all of them, (m,).
        weights: squared parts of the first start vector along the Ritz vectors, (m,): the Gauss weights, which sum to
            one, of `v' f(A) v = sum_i weights_i f(ritz_values_i)`, exact for polynomials of degree 2 m - 1 in a run
            from one vector. None after a restart, which forgets them.
        projected: T, float64, (m + waiting, m). Its singular values bound those of A in the Krylov space.
        num_matvecs: products spent.
        num_restarts: how often the basis was compressed.
        exhausted: the Krylov space was: the Ritz pairs are eigenpairs up to rounding.
        converged: all residuals met the tolerance, or the Krylov space was exhausted.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    asymmetry: float
    ritz_values: Tensor
    ritz_residuals: Tensor
    weights: Tensor | None
    projected: Tensor
    num_matvecs: int
    num_restarts: int
    exhausted: bool
    converged: bool


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
    """Return the largest algebraic eigenvalue of a symmetric operator: :func:`extremal_pairs` for one pair.

    The iteration stops once the residual is below `tol max(|theta|, sqrt(machine epsilon) max_i |theta_i|)`. That the
    pair is the largest one, rather than another, rests on the start vector having a part along it: certain for a
    random start, not for a warm one.

    Args:
        matvec: `A v` for v of shape (size,); A symmetric.
        size: number of rows of A, >= 1.
        start: first vector, finite and not zero. None draws a random direction.
        tol: requested residual relative to |theta|, >= 0; 0 never stops before max_matvecs.
        max_matvecs: most products, >= 1; more than `size` are never made.
        max_asymmetry: relative to the largest |theta_i|; an operator less symmetric than that is given up.
        seed: of the random start.
        dtype: of the vectors.
        device: of the vectors.

    Returns:
        The pair, its residual, and whether it met the tolerance.

    Raises:
        UserError: an argument out of its range.

    >>> spectrum = torch.tensor([-9.0, 1.0, 2.0, 4.0])
    >>> round(lanczos(lambda v: spectrum * v, 4, tol=1e-6).value, 4)
    4.0
    """
    found = extremal_pairs(
        matvec,
        size,
        start=start,
        tol=tol,
        max_matvecs=max_matvecs,
        max_asymmetry=max_asymmetry,
        seed=seed,
        dtype=dtype,
        device=device,
    )
    return LanczosResult(
        value=float(found.values[0]),
        vector=found.vectors[0],
        residual=float(found.residuals[0]),
        expected_gain=min(expected_gain(found.projected), float(found.residuals[0])),
        asymmetry=found.asymmetry,
        ritz_values=found.ritz_values,
        num_matvecs=found.num_matvecs,
        converged=found.converged,
    )


def expected_gain(projected: Tensor) -> float:
    """Return by how much a further product is expected to raise the largest Ritz value.

    That product adds a row to T of which all is known but its last element, `q' A q` for the vector q that waits. In a
    run from one vector these elements fall from the largest eigenvalue towards the bulk of the spectrum, which lies
    around zero for the Hessian of a network: so the next is taken for half of the last.

    Args:
        projected: T, (m + 1, m), of a run from one vector; (m, m) where nothing waits: no gain.

    >>> T = torch.tensor([[4.0, 1.0], [1.0, 2.0], [0.0, 0.5]], dtype=torch.float64)  # the next is 1
    >>> round(expected_gain(T), 4)
    0.0109
    """
    rows, steps = projected.shape
    if rows != steps + 1 or not bool(projected.isfinite().all()):
        return 0.0
    whole = torch.zeros(rows, rows, dtype=projected.dtype)
    whole[:, :steps] = projected
    whole[-1, -1] = 0.5 * projected[-2, -1]
    # eigvalsh reads below the diagonal
    return max(0.0, float(torch.linalg.eigvalsh(whole)[-1] - torch.linalg.eigvalsh(projected[:steps])[-1]))


def extremal_pairs(
    matvec: Callable[[Tensor], Tensor],
    size: int,
    *,
    k: int = 1,
    num_smallest: int = 0,
    start: Tensor | None = None,
    tol: float = 0.03,
    floor: float | None = None,
    max_matvecs: int = 30,
    max_basis: int | None = None,
    block: int = 1,
    max_asymmetry: float = math.inf,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ExtremalPairs:
    """Return the algebraically largest and smallest eigenvalues of a symmetric operator, with vectors and error bounds.

    In an orthonormal basis Q, whose first m vectors have been multiplied, `A Q_m = Q T` (`krylov.py`). With
    `T_m s = theta s`, T_m the rows of the multiplied vectors and T_w those of the waiting ones, the pair theta and
    `v = Q_m s` has the residual `||T_w s||`, at no further product. The iteration stops once for *every* wanted pair

        residual < tol max(|theta|, floor max_i |theta_i|)

    Multiplicity: a Krylov space of one vector holds one vector of each eigenspace, so a repeated eigenvalue is found
    once, and no residual tells. `block` start vectors find up to `block` copies, at more products. Where the Krylov
    space is exhausted, as it is for small or low-rank operators, the iteration goes on with a random vector until a
    further space changes none of the wanted values; copies then show by themselves.

    Memory: the basis, `max_basis` x size numbers at most; it grows with the iteration unless tol is 0. Each new vector
    is orthogonalised against all of it; without that float32 returns copies of converged values instead of new ones.

    Args:
        matvec: `A v` for v of shape (size,); A symmetric.
        size: number of rows of A, >= 1.
        k: how many of the largest, >= 0.
        num_smallest: how many of the smallest, >= 0; at least one value in all, and at most `size`.
        start: first vector, (size,), or several, (rows, size); finite and not zero. None draws random directions.
        tol: requested residual relative to |theta|, >= 0; 0 never stops before max_matvecs.
        floor: eigenvalues smaller than this share of the largest |theta_i| are known well enough at `tol` of that
            share. None: sqrt(machine epsilon), for eigenvalues at zero.
        max_matvecs: most products, >= k + num_smallest.
        max_basis: most vectors kept, >= k + num_smallest + block + 2; the basis is restarted where it would not
            suffice. None never restarts: max_matvecs + block.
        block: number of start vectors, >= 1; random ones are added to those in `start`.
        max_asymmetry: relative to the largest |theta_i|; an operator less symmetric than that is given up.
        seed: of the random directions.
        dtype: of the vectors.
        device: of the vectors.

    Returns:
        The pairs, their residuals, and whether they met the tolerance.

    Raises:
        UserError: an argument out of its range.

    References:
        Parlett, The Symmetric Eigenvalue Problem, SIAM 1998, chapters 4 and 13. Ruhe, Implementation aspects of band
        Lanczos algorithms, Mathematics of Computation 33, 1979. Wu and Simon, Thick-restart Lanczos method for large
        symmetric eigenvalue problems, SIAM J. Matrix Anal. Appl. 22, 2000.

    >>> spectrum = torch.tensor([-9.0, 1.0, 2.0, 4.0])
    >>> pairs = extremal_pairs(lambda v: spectrum * v, 4, k=2, num_smallest=1, tol=1e-6)
    >>> [round(value, 4) for value in pairs.values.tolist()]
    [4.0, 2.0, -9.0]
    """
    num_wanted = k + num_smallest
    starts = [] if start is None else list(start) if start.dim() == 2 else [start]
    block = min(max(block, len(starts)), size)
    _check(size, k, num_smallest, tol, max_matvecs, max_basis, block)
    random = random_directions(size, seed, dtype, device)
    eps = torch.finfo(dtype).eps
    floor = math.sqrt(eps) if floor is None else floor
    capacity = min(size, max_matvecs + block, max_matvecs + block if max_basis is None else max_basis)
    whole = tol == 0 and max_asymmetry == math.inf  # where all is used, room for it at once saves moving it
    krylov = Krylov(capacity, size, dtype, device, num_rows=capacity if whole else FIRST_ROWS)
    for vector in starts:
        krylov.append(unit_vector(size, vector, dtype=dtype, device=device))
    while krylov.count < block:  # also in place of a start vector that is a sum of others
        krylov.append(next(random))

    num_matvecs = num_restarts = 0
    known: Tensor | None = None  # the wanted values when the Krylov space was exhausted last
    exhausted = converged = False
    while True:
        if krylov.count == capacity < size:
            krylov.restart(*_share(capacity, krylov.count - krylov.done, k, num_smallest))
            num_restarts += 1
        if krylov.count == krylov.done:
            krylov.append(next(random))
        num_matvecs += 1
        if not krylov.multiply(matvec):
            return _unknown(krylov, num_wanted, num_matvecs, num_restarts)
        exhausted = krylov.count == krylov.done
        last = num_matvecs == max_matvecs
        if krylov.done < num_wanted or (whole and not exhausted and not last):
            continue
        values, vectors, residuals = krylov.ritz()
        wanted = [*range(krylov.done - 1, krylov.done - 1 - k, -1), *range(num_smallest)]
        norm = float(values.abs().max())
        bounds = tol * values[wanted].abs().clamp(min=floor * norm)
        if exhausted:
            unchanged = known is not None and float((values[wanted] - known).abs().max()) <= 100 * eps * norm
            converged = num_wanted == 1 or krylov.done == size or unchanged
            known = values[wanted]
        else:
            converged = known is None and bool((residuals[wanted] < bounds).all())
        if converged or last or krylov.asymmetry > max_asymmetry * norm:
            break

    found = vectors[:, wanted].T.to(krylov.basis) @ krylov.basis[: krylov.done]
    lower = krylov.projected[: krylov.count, : krylov.done].tril()
    lower[: krylov.done] += lower[: krylov.done].tril(-1).T.clone()
    return ExtremalPairs(
        values=values[wanted],
        vectors=found / torch.linalg.vector_norm(found, dim=1, keepdim=True),
        residuals=residuals[wanted],
        asymmetry=krylov.asymmetry,
        ritz_values=values,
        ritz_residuals=residuals,
        weights=None if num_restarts else vectors[0].square(),
        projected=lower,
        num_matvecs=num_matvecs,
        num_restarts=num_restarts,
        exhausted=exhausted,
        converged=converged,
    )


def _share(capacity: int, waiting: int, k: int, num_smallest: int) -> tuple[int, int]:
    """Return how many Ritz vectors of each end survive a restart: the wanted ones and half of the room beside them."""
    extra = (capacity - waiting - k - num_smallest) // 2
    above = extra * k // (k + num_smallest)
    return k + above, num_smallest + extra - above


def _unknown(krylov: Krylov, num_wanted: int, num_matvecs: int, num_restarts: int) -> ExtremalPairs:
    nothing = torch.full((num_wanted,), math.nan, dtype=torch.float64)
    return ExtremalPairs(
        values=nothing,
        vectors=krylov.basis[:1].expand(num_wanted, -1),
        residuals=nothing,
        asymmetry=math.nan,
        ritz_values=nothing[:0],
        ritz_residuals=nothing[:0],
        weights=None,
        projected=krylov.projected[:0, :0],
        num_matvecs=num_matvecs,
        num_restarts=num_restarts,
        exhausted=False,
        converged=False,
    )


def _check(
    size: int, k: int, num_smallest: int, tol: float, max_matvecs: int, max_basis: int | None, block: int
) -> None:
    if size < 1:
        raise UserError(f"size must be at least 1, got {size}")
    if min(k, num_smallest) < 0 or not 1 <= k + num_smallest <= size:
        raise UserError(
            f"k and num_smallest must not be negative and sum to 1 ... {size}, got {k} and {num_smallest}; "
            "there are no more eigenvalues than parameters"
        )
    if not (math.isfinite(tol) and tol >= 0):
        raise UserError(
            f"tol must be finite and at least 0, got {tol}; 0.03 tells eigenvalues apart that differ by 6 percent"
        )
    if max_matvecs < k + num_smallest:
        raise UserError(
            f"max_matvecs must be at least {k + num_smallest}, got {max_matvecs}; "
            "30 suffices for the largest eigenvalue of most networks, and 3 more for each further one"
        )
    if block < 1:
        raise UserError(f"block must be at least 1, got {block}; it is the number of start vectors")
    if max_basis is not None and max_basis < k + num_smallest + block + 2:
        raise UserError(
            f"max_basis must be at least {k + num_smallest + block + 2}, got {max_basis}; "
            "twice the number of wanted eigenvalues is a good size"
        )
