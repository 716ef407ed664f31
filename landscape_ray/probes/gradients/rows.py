"""Several gradients beside each other: the rows of a matrix, written out or as products of two vectors each.

The gradient of a linear layer that sees one vector for each example is an outer product. What is asked of rows (norms,
inner products, sums) follows from the two vectors alone: for multilayer perceptrons that saves nearly all of the memory
and of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

R = TypeVar("R", bound="Rows")


class Rows(Protocol):
    """Gradients g_1 ... g_c, each (size,). Inner products are float64."""

    @property
    def num_bytes(self) -> int:
        """Memory that they take."""
        ...

    def __len__(self) -> int:
        """Return c."""
        ...

    def squared_norms(self) -> Tensor:
        """Return |g_i|^2, (c,)."""
        ...

    def products(self, vector: Tensor) -> Tensor:
        """Return g_i . vector, (c,), for vector (size,)."""
        ...

    def combination(self, coefficients: Tensor) -> Tensor:
        """Return sum_i coefficients_i g_i, (size,), for coefficients (c,)."""
        ...

    def gram(self: R, other: R) -> Tensor:
        """Return g_i . h_j, (c, d), for d rows h_j of the same kind."""
        ...


class DenseRows:
    """Rows written out, (c, size)."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    @property
    def num_bytes(self) -> int:
        """Memory that they take."""
        return self.matrix.numel() * self.matrix.element_size()

    def __len__(self) -> int:
        """Return c."""
        return len(self.matrix)

    def squared_norms(self) -> Tensor:
        """Return |g_i|^2, (c,)."""
        return _squared_norms(self.matrix)

    def products(self, vector: Tensor) -> Tensor:
        """Return g_i . vector, (c,)."""
        return (self.matrix @ vector).double()

    def combination(self, coefficients: Tensor) -> Tensor:
        """Return sum_i coefficients_i g_i, (size,)."""
        return coefficients.to(self.matrix) @ self.matrix

    def gram(self, other: DenseRows) -> Tensor:
        """Return g_i . h_j, (c, d)."""
        return (self.matrix @ other.matrix.mT).double()


class Part(NamedTuple):
    """The rows' entries for one parameter: `left_i right_i'`, or `left_i` itself where right is None.

    Attributes:
        left: (c, rows of the parameter).
        right: (c, columns of the parameter), or None for a vector.
    """

    left: Tensor
    right: Tensor | None

    @property
    def size(self) -> int:
        """Number of entries of the parameter."""
        return self.left.shape[1] * (1 if self.right is None else self.right.shape[1])

    def to(self, dtype: torch.dtype) -> Part:
        """Return the part in another precision."""
        return Part(self.left.to(dtype), None if self.right is None else self.right.to(dtype))


class FactoredRows:
    """Rows whose entries for each matrix are an outer product, parameter by parameter."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.sizes = [part.size for part in parts]

    @property
    def num_bytes(self) -> int:
        """Memory that they take."""
        tensors = [tensor for part in self.parts for tensor in part if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def __len__(self) -> int:
        """Return c."""
        return len(self.parts[0].left)

    def squared_norms(self) -> Tensor:
        """Return |g_i|^2, (c,)."""
        total = self.parts[0].left.new_zeros(len(self), dtype=torch.float64)
        for left, right in self.parts:
            squared = _squared_norms(left)
            total += squared if right is None else squared * _squared_norms(right)
        return total

    def products(self, vector: Tensor) -> Tensor:
        """Return g_i . vector, (c,)."""
        total = self.parts[0].left.new_zeros(len(self), dtype=torch.float64)
        for (left, right), part in zip(self.parts, torch.split(vector, self.sizes), strict=True):
            total += left @ part if right is None else (left @ part.view(left.shape[1], -1)).mul_(right).sum(1)
        return total

    def combination(self, coefficients: Tensor) -> Tensor:
        """Return sum_i coefficients_i g_i, (size,)."""
        weights = coefficients.to(self.parts[0].left)
        return torch.cat(
            [
                weights @ left if right is None else ((left * weights[:, None]).mT @ right).flatten()
                for left, right in self.parts
            ]
        )

    def gram(self, other: FactoredRows) -> Tensor:
        """Return g_i . h_j, (c, d)."""
        total = self.parts[0].left.new_zeros(len(self), len(other), dtype=torch.float64)
        for (left, right), (other_left, other_right) in zip(self.parts, other.parts, strict=True):
            products = (left @ other_left.mT).double()
            if right is not None and other_right is not None:
                products *= right @ other_right.mT
            total += products
        return total


def _squared_norms(matrix: Tensor) -> Tensor:
    # vector_norm adds up in float32 one by one, which is off by 2e-5 for 10^6 entries; this is off by 1e-7
    squares: Tensor = torch.linalg.vecdot(matrix, matrix)
    return squares.double()
