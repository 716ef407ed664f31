"""The one Lanczos iteration, with full reorthogonalisation: an orthonormal basis and the operator seen in it.

It keeps an orthonormal basis Q, whose first m vectors have been multiplied by A, and T with

    A Q_m = Q T,    T[i, j] = q_i' A q_j

A step multiplies the next waiting vector, orthogonalises the product against those of Q that it has a large part along,
then against all of Q, and appends what is left of it. With one start vector that is the Lanczos iteration and T is
tridiagonal; with several it is band Lanczos, the block version that can stop after any product. A full basis is
compressed to the Ritz vectors that matter, of which T becomes the diagonal (thick restart), and goes on growing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from landscape_ray.errors import UserError


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
        start = next(_draws(size, seed, dtype, device))
    if start.shape != (size,):
        raise UserError(f"start must have shape ({size},), got {tuple(start.shape)}; it belongs to another module")
    start = start.detach().to(dtype=dtype, device=device)
    length = float(torch.linalg.vector_norm(start))
    if not (math.isfinite(length) and length > 0):
        raise UserError(f"start must be finite and not zero, got a vector of length {length}; None draws one")
    return start / length


def random_directions(size: int, seed: int, dtype: torch.dtype, device: torch.device | str) -> Iterator[Tensor]:
    """Return random directions, each another one; the first is that of `unit_vector`."""
    for start in _draws(size, seed, dtype, device):
        yield unit_vector(size, start, dtype=dtype, device=device)


def _draws(size: int, seed: int, dtype: torch.dtype, device: torch.device | str) -> Iterator[Tensor]:
    """Yield vectors of normal numbers, the same on every device; for large networks of 256 different ones.

    It takes a host seconds to draw as many normal numbers as GPT-2 has weights, longer than a GPU takes for the
    products of a probe. Random bytes take a sixteenth of that, and a quarter of the way to the device.
    """
    if size < LARGE:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(size, generator=generator, dtype=dtype)
    numbers = np.random.default_rng(seed)
    levels = torch.special.ndtri((torch.arange(256, dtype=torch.float64) + 0.5) / 256).to(device, dtype)
    while True:
        words = numbers.integers(2**64, size=-(-size // 8), dtype=np.uint64)
        octets = torch.from_numpy(words.view(np.uint8)[:size]).to(device)
        yield levels.index_select(0, octets.int())


LARGE = 2**22
"""Numbers of weights from which start vectors are of bytes."""


FIRST_ROWS = 8
"""Vectors that there is room for at first."""

ROUNDING = 10
"""What a step leaves over is nothing below so many machine epsilons of the operator's norm. Products with dense
matrices of 5 to 400 rows in float64 leave one to six in an exhausted space, by the machine's order of sums."""


class Krylov:
    """Q and T.

    Room is taken as the iteration goes, twice as much each time: most stop far below their limit, and a device pays for
    all that is taken. The vectors stay beside each other, so that sums come out the same to the bit.

    Attributes:
        capacity: most vectors.
        basis: rows orthonormal up to `count`; those up to `done` have been multiplied, the others wait.
        projected: T, float64, on the CPU. Below the diagonal it is what products left over, which defines it; above,
            nothing is kept: what is measured there differs by the asymmetry of A.
        asymmetry: largest difference between the two so far.
    """

    def __init__(
        self,
        capacity: int,
        size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        num_rows: int = FIRST_ROWS,
    ) -> None:
        self.capacity = capacity
        self.basis = torch.empty(min(capacity, num_rows), size, dtype=dtype, device=device)
        self.projected = torch.zeros(capacity, capacity, dtype=torch.float64)
        self.done = self.count = 0
        self.asymmetry = 0.0
        self._norm = 0.0  # largest ||A q|| so far

    def append(self, vector: Tensor) -> None:
        """Add the direction of a unit vector beside the basis to those that wait, unless it lies in the basis."""
        _, rest = self._orthogonalise(vector, 0)
        length = float(torch.linalg.vector_norm(rest))
        if length > ROUNDING * torch.finfo(rest.dtype).eps:
            self._add(rest, length)

    def multiply(self, matvec: Callable[[Tensor], Tensor]) -> bool:
        """Multiply the next waiting vector, and append what the product adds; False if it is not finite."""
        j = self.done
        coupled = self.projected[j, :j].nonzero()  # by symmetry the product has no part along the others
        parts, rest = self._orthogonalise(matvec(self.basis[j]), int(coupled[0]) if len(coupled) else j)
        overlaps, length = parts.double().cpu(), float(torch.linalg.vector_norm(rest))
        if not (math.isfinite(length) and bool(overlaps.isfinite().all())):
            return False
        if j > 0:
            difference = overlaps[:j] - self.projected[j, :j]
            self.asymmetry = max(self.asymmetry, float(difference.abs().max()))
        self.projected[j : self.count, j] = overlaps[j:]
        self._norm = max(self._norm, math.hypot(float(torch.linalg.vector_norm(overlaps)), length))
        self.done += 1
        if self.count < self.capacity and length > ROUNDING * torch.finfo(self.basis.dtype).eps * self._norm:
            self.projected[self.count, j] = length
            self._add(rest, length)
        return True

    def _add(self, rest: Tensor, length: float) -> None:
        if self.count == len(self.basis):
            larger = self.basis.new_empty(min(self.capacity, 2 * self.count), len(rest))
            larger[: self.count] = self.basis
            self.basis = larger
        torch.div(rest, length, out=self.basis[self.count])
        self.count += 1

    def _orthogonalise(self, vector: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Return the parts of a vector along the basis, and a new tensor with the rest.

        Two passes, since one leaves rounding of the size of what it takes off. The first takes off what is large, along
        the vectors from place `first` on, so that the second, along all, takes off next to nothing.
        """
        known = self.basis[: self.count]
        large = known[first:] @ vector
        rest = vector - large @ known[first:]
        parts = known @ rest
        rest.sub_(parts @ known)
        parts[first:] += large
        return parts, rest

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
        for part in torch.split(self.basis, 2**20, dim=1):  # in place, but for a million columns at a time
            part[: self.count - self.done + len(kept)] = torch.cat(
                [turn @ part[: self.done], part[self.done : self.count]]
            )
        waiting = self.count - self.done
        self.done, self.count = len(kept), len(kept) + waiting
        self.projected.zero_()
        self.projected[: self.done, : self.done] = torch.diag(values[kept])
        self.projected[self.done : self.count, : self.done] = border
