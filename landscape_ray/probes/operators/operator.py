"""A symmetric matrix over the weights, known by its products with vectors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from landscape_ray.errors import UserError


class CurvatureOperator(ABC):
    """A symmetric matrix, known by its products with vectors. One of them belongs to one state of the weights.

    Attributes:
        setup_gradients: price of what is computed once, before the first product, in gradients.
        matvec_gradients: price of a product.
        size: number of rows.
        dtype, device: of the vectors.
        num_matvecs: products so far.
    """

    setup_gradients: float
    matvec_gradients: float

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.dtype, self.device = size, dtype, device
        self.num_matvecs = 0

    def __call__(self, vector: Tensor) -> Tensor:
        """Return the product with `vector`, shape (size,); both finite or not, nothing is raised for that.

        Raises:
            UserError: wrong shape; or the loss is not a scalar, or does not depend on the parameters.
        """
        if vector.shape != (self.size,):
            raise UserError(f"vector must have shape ({self.size},), got {tuple(vector.shape)}")
        self.num_matvecs += 1
        with torch.inference_mode(False):  # its tensors could not be written to
            return self._product(vector.to(dtype=self.dtype, device=self.device))

    def most_products(self, allowance_gradients: float, most: int) -> int:
        """Return how many products an allowance pays for, `most` at most and one at least."""
        if not math.isfinite(allowance_gradients):
            return most
        return max(1, min(most, int((allowance_gradients - self.setup_gradients) / self.matvec_gradients)))

    @abstractmethod
    def _product(self, vector: Tensor) -> Tensor: ...

    def dense(self) -> Tensor:
        """Return the matrix itself, (size, size), by one product for each column; for small networks."""
        columns = torch.eye(self.size, dtype=self.dtype, device=self.device)
        return torch.stack([self(column) for column in columns], dim=1)
