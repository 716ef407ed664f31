"""Subspaces spanned by products with random vectors: what is inside is known, what is outside is sampled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from landscape_ray.probes.spectrum.sign_samples import student


class Subspace:
    """An orthonormal basis Q, (k, size), and what a symmetric matrix A does on it.

    Attributes:
        basis: Q.
        products: Q A, (k, size).
    """

    def __init__(self, product: Callable[[Tensor], Tensor], like: Tensor) -> None:
        """Begin without directions.

        Args:
            product: `A v`.
            like: a vector (size,), for dtype and device.
        """
        self._product = product
        self.basis = like.new_empty(0, len(like))
        self.products = torch.empty_like(self.basis)

    @property
    def matrix(self) -> Tensor:
        """Q A Q', (k, k), float64 on the CPU."""
        return _gram(self.basis, self.products)

    @property
    def seen(self) -> float:
        """||Q A||_F^2."""
        return float(self.products.square().sum(dtype=torch.float64))

    def extend(self, vectors: Tensor) -> None:
        """Take in the directions of vectors (b, size), as far as they are new; a product with A for each."""
        eps = torch.finfo(vectors.dtype).eps
        lengths = torch.linalg.vector_norm(vectors, dim=1)
        for _ in range(2):
            vectors = vectors - (vectors @ self.basis.T) @ self.basis
        directions, triangle = torch.linalg.qr(vectors.T)
        new = directions.T[triangle.diagonal().abs() > math.sqrt(eps) * lengths[: len(triangle)]]
        self.basis = torch.cat([self.basis, new])
        self.products = torch.cat([self.products, *(self._product(direction)[None] for direction in new)])

    def without(self, vector: Tensor) -> Tensor:
        """Return what of a vector is orthogonal to the subspace."""
        return vector - (self.basis @ vector) @ self.basis

    def leave_one_out(self, vectors: Tensor, products: Tensor) -> tuple[float, float]:
        """Return trace and standard error, each vector sampling what the other products' subspace leaves out.

        The spread of the samples, which the paper takes, is too small where few of them share their outliers: it
        covers the truth in half of the cases. What they sample, B_i = (I - P_i)A(I - P_i), says more: the variance of
        a sample is at most 2 ||B_i||_F^2, of which 2 ||B_i v_i||^2 is an unbiased estimate at no further product.

        Args:
            vectors: random signs, (k, size).
            products: A times them, (k, size); their span is the basis.
        """
        W, R, H = _gram(self.basis, vectors), _gram(self.basis, products), self.matrix
        lengths = torch.linalg.vector_norm(products, dim=1)
        if not bool(lengths.isfinite().all() and R.isfinite().all() and H.isfinite().all()):
            return math.nan, math.nan  # also where lengths overflow: no direction would have been taken in
        forms = (vectors * products).sum(1, dtype=torch.float64).cpu()
        # Column i of S: the direction of the basis that product i alone contributes, none where the others span it.
        inverse = torch.linalg.pinv(R)
        alone = (inverse * R.T).sum(1) > 1 - 1e-8
        S = torch.nn.functional.normalize(inverse, dim=1).T * alone
        X = W - S * (S * W).sum(0)
        estimates = H.trace() - (S * (H @ S)).sum(0) + forms - 2 * (X * R).sum(0) + (X * (H @ X)).sum(0)
        # B_i v_i = (I - P_i)(product_i - A Q'x_i), where product_i = Q'r_i
        inside = R - H @ X
        whole = R.square().sum(0) - 2 * (R * (H @ X)).sum(0) + (X * (_gram(self.products, self.products) @ X)).sum(0)
        squares = (whole - inside.square().sum(0) + (S * inside).sum(0).square()).clamp(min=0.0)
        k = len(forms)
        return float(estimates.mean()), student(k - 1) * math.sqrt(2 * float(squares.mean()) / k)


def residual_square(products: Sequence[Tensor]) -> float:
    """Return the mean square of what a product has outside of the span of the others.

    It bounds what the subspace of all of them leaves of ||A||_F^2, on average.
    """
    stacked = torch.stack(list(products))
    gram = (stacked @ stacked.T).cpu().to(torch.float64)
    scale = float(gram.diagonal().max())
    if scale == 0.0 or not math.isfinite(scale):
        return scale
    values, axes = torch.linalg.eigh(gram)
    values = values.clamp(min=scale * torch.finfo(stacked.dtype).eps)  # below is rounding, or nothing to divide by
    return float((1 / (axes.square() / values).sum(1)).mean())


def _gram(left: Tensor, right: Tensor) -> Tensor:
    return (left @ right.T).cpu().to(torch.float64)
