"""Eigenvalues at the ends of a symmetric operator's spectrum, by Lanczos with full reorthogonalisation.

There is one iteration. It keeps an orthonormal basis Q, whose first m vectors have been multiplied by A, and T with

    A Q_m = Q T,    T[i, j] = q_i' A q_j

A step multiplies the next waiting vector, orthogonalises the product against all of Q, twice, and appends what is left
of it. With one start vector that is the Lanczos iteration and T is tridiagonal; with several it is band Lanczos, the
block version that can stop after any product. A full basis is compressed to the Ritz vectors that matter, of which T
becomes the diagonal (thick restart), and goes on growing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from landscape_ray.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LanczosResult:
    """The pair of the largest eigenvalue and the state of the iteration; see :class:`ExtremalPairs`.

    Attributes:
        value: largest Ritz value theta, a lower bound of the largest eigenvalue up to rounding; nan if the operator
            returned something that is not finite.
        vector: its Ritz vector, unit length, shape (size,).
        residual: `||A v - theta v||`: an eigenvalue of A lies in [theta - residual, theta + residual].
        asymmetry, ritz_values, num_matvecs, converged: as there.
    """

    value: float
    vector: Tensor
    residual: float
    asymmetry: float
    ritz_values: Tensor
    num_matvecs: int
    converged: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExtremalPairs:
    """The wanted Ritz pairs and the state of the iteration.

    Attributes:
        values: the k largest Ritz values, descending, and then the smallest ones, ascending; float64, (k + num_smallest,).
            nan if the operator returned something that is not finite.
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
        asymmetry=found.asymmetry,
        ritz_values=found.ritz_values,
        num_matvecs=found.num_matvecs,
        converged=found.converged,
    )


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

    With T of the multiplied vectors and `T s = theta s`, the pair theta, `v = Q s` has the residual `||T_w s||`, T_w the
    rows of the waiting vectors, at no further product. The iteration stops once for *every* wanted pair

        residual < tol max(|theta|, floor max_i |theta_i|)

    Multiplicity: a Krylov space of one vector holds one vector of each eigenspace, so a repeated eigenvalue is found
    once, and no residual tells. `block` start vectors find up to `block` copies, at more products. Where the Krylov
    space is exhausted, as it is for small or low-rank operators, the iteration goes on with a random vector until a
    further space changes none of the wanted values; copies then show by themselves.

    Memory: the basis, `max_basis` x size numbers. Each new vector is orthogonalised against all of it twice; without
    that float32 returns copies of converged values instead of new ones.

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
    random = _directions(size, seed, dtype, device)
    eps = torch.finfo(dtype).eps
    floor = math.sqrt(eps) if floor is None else floor
    capacity = min(size, max_matvecs + block, max_matvecs + block if max_basis is None else max_basis)
    krylov = _Krylov(capacity, size, dtype, device)
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
        if krylov.done < num_wanted or (tol == 0 and not exhausted and not last and max_asymmetry == math.inf):
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


class _Krylov:
    """The basis and T.

    Attributes:
        basis: rows orthonormal up to `count`; those up to `done` have been multiplied, the others wait.
        projected: T, float64, on the CPU. Below the diagonal it is what products left over, which defines it; above,
            nothing is kept: what is measured there differs by the asymmetry of A.
        asymmetry: largest difference between the two so far.
    """

    def __init__(self, capacity: int, size: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.basis = torch.empty(capacity, size, dtype=dtype, device=device)
        self.projected = torch.zeros(capacity, capacity, dtype=torch.float64)
        self.done = self.count = 0
        self.asymmetry = 0.0
        self._norm = 0.0  # largest ||A q|| so far

    def append(self, vector: Tensor) -> None:
        """Add the direction of a unit vector beside the basis to those that wait, unless it lies in the basis."""
        *_, rest = self._orthogonalise(vector)
        length = float(torch.linalg.vector_norm(rest))
        if length > 10 * torch.finfo(rest.dtype).eps:
            torch.div(rest, length, out=self.basis[self.count])
            self.count += 1

    def multiply(self, matvec: Callable[[Tensor], Tensor]) -> bool:
        """Multiply the next waiting vector, and append what the product adds; False if it is not finite."""
        first, second, rest = self._orthogonalise(matvec(self.basis[self.done]))
        overlaps, length = (first + second).double().cpu(), float(torch.linalg.vector_norm(rest))
        if not (math.isfinite(length) and bool(overlaps.isfinite().all())):
            return False
        j = self.done
        if j > 0:
            difference = first[:j].double().cpu() - self.projected[j, :j]
            self.asymmetry = max(self.asymmetry, float(difference.abs().max()))
        self.projected[j : self.count, j] = overlaps[j:]
        self._norm = max(self._norm, math.hypot(float(torch.linalg.vector_norm(overlaps)), length))
        self.done += 1
        if self.count < len(self.basis) and length > torch.finfo(self.basis.dtype).eps * self._norm:
            torch.div(rest, length, out=self.basis[self.count])
            self.projected[self.count, j] = length
            self.count += 1
        return True

    def _orthogonalise(self, vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the parts of a vector along the basis, as two passes find them, and a new tensor with the rest."""
        known = self.basis[: self.count]
        first = known @ vector
        rest = vector - first @ known
        second = known @ rest
        return first, second, rest.sub_(second @ known)

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return Ritz values, ascending, the coefficients of their vectors in columns, and their residuals."""
        values, vectors = torch.linalg.eigh(self.projected[: self.done, : self.done])  # reads below the diagonal
        return values, vectors, torch.linalg.vector_norm(self._border @ vectors, dim=0)

    @property
    def _border(self) -> Tensor:
        return self.projected[self.done : self.count, : self.done]

    def restart(self, num_largest: int, num_smallest: int) -> None:
        """Put Ritz vectors in place of the multiplied vectors: those of the largest and of the smallest values."""
        values, vectors, _ = self.ritz()
        kept = [*range(num_smallest), *range(self.done - num_largest, self.done)]
        border = self._border @ vectors[:, kept]
        turn = vectors[:, kept].T.to(self.basis)
        for part in self.basis.split(2**20, dim=1):  # in place, but for a million columns at a time
            part[: self.count - self.done + len(kept)] = torch.cat(
                [turn @ part[: self.done], part[self.done : self.count]]
            )
        waiting = self.count - self.done
        self.done, self.count = len(kept), len(kept) + waiting
        self.projected.zero_()
        self.projected[: self.done, : self.done] = torch.diag(values[kept])
        self.projected[self.done : self.count, : self.done] = border


def _directions(size: int, seed: int, dtype: torch.dtype, device: torch.device | str) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield unit_vector(size, torch.randn(size, generator=generator, dtype=dtype), dtype=dtype, device=device)


def _share(capacity: int, waiting: int, k: int, num_smallest: int) -> tuple[int, int]:
    """Return how many Ritz vectors of each end survive a restart: the wanted ones and half of the room beside them."""
    extra = (capacity - waiting - k - num_smallest) // 2
    above = extra * k // (k + num_smallest)
    return k + above, num_smallest + extra - above


def _unknown(krylov: _Krylov, num_wanted: int, num_matvecs: int, num_restarts: int) -> ExtremalPairs:
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
