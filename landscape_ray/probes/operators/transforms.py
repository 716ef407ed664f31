"""Operators in other coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from landscape_ray.errors import UserError
from landscape_ray.probes.operators.operator import CurvatureOperator


class Scaled(CurvatureOperator):
    """`D A D` for a diagonal D: the curvature in coordinates u with w = D u.

    With D = |w| its largest eigenvalue is the adaptive sharpness, which rescaling the weights between layers of a ReLU
    network leaves as it is. D times an eigenvector is the direction in the weights.

    References:
        Kwon et al., ASAM: Adaptive sharpness-aware minimization for scale-invariant learning of deep neural networks,
        2021, arXiv:2102.11600.
    """

    def __init__(self, operator: CurvatureOperator, diagonal: Tensor) -> None:
        """Nothing is computed yet.

        Args:
            operator: A.
            diagonal: of D, (size,), finite and >= 0.

        Raises:
            UserError: another shape, or entries that are negative or not finite.
        """
        _check("diagonal", operator, diagonal, diagonal >= 0, "at least 0")
        super().__init__(operator.size, operator.dtype, operator.device)
        self.operator = operator
        self.setup_gradients = getattr(operator, "setup_gradients", 0.0)
        self.matvec_gradients = getattr(operator, "matvec_gradients", 0.0)
        self.diagonal = diagonal.detach().to(dtype=self.dtype, device=self.device, copy=True)

    def _product(self, vector: Tensor) -> Tensor:
        return self.diagonal * self.operator(self.diagonal * vector)


class Preconditioned(Scaled):
    """`P^-1/2 A P^-1/2` for a diagonal P > 0: symmetric, with the eigenvalues of `P^-1 A`.

    P is what an optimizer divides the gradient by, element by element. An eigenvector u belongs to the eigenvector
    P^-1/2 u of `P^-1 A`.

    References:
        Cohen et al., Adaptive gradient methods at the edge of stability, 2022, arXiv:2207.14484.

    >>> class Diagonal(CurvatureOperator):
    ...     def _product(self, vector):
    ...         return torch.tensor([2.0, 3.0]) * vector
    >>> curvature = Diagonal(2, torch.float32, torch.device("cpu"))
    >>> Preconditioned(curvature, torch.tensor([4.0, 0.25]))(torch.ones(2))
    tensor([ 0.5000, 12.0000])
    """

    def __init__(self, operator: CurvatureOperator, preconditioner: Tensor) -> None:
        """Nothing is computed yet.

        Args:
            operator: A.
            preconditioner: the diagonal of P, (size,), finite and > 0.

        Raises:
            UserError: another shape, or entries that are not positive and finite.
        """
        _check("preconditioner", operator, preconditioner, preconditioner > 0, "positive")
        # in float64: the squares of Adam's epsilon are below what float32 holds to full precision
        super().__init__(operator, preconditioner.detach().to(torch.float64).rsqrt())


def _check(name: str, operator: CurvatureOperator, values: Tensor, good: Tensor, condition: str) -> None:
    if values.shape != (operator.size,):
        raise UserError(f"{name} must have shape ({operator.size},), got {tuple(values.shape)}; flatten it")
    bad = ~(good & values.isfinite())
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise UserError(f"{name} must be finite and {condition} everywhere, got {float(values[index])} at {index}")
