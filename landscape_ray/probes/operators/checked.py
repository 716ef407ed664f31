"""Products with the Hessian by differences of gradients, for estimates that need many, where one of them is right."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from landscape_ray.errors import UserError
from landscape_ray.probes.fixed_loss import FixedLoss
from landscape_ray.probes.operators.hessian import FiniteDifferenceHessian, HessianOperator
from landscape_ray.probes.operators.operator import CurvatureOperator

Products: TypeAlias = Literal["exact", "finite_difference", "auto"]
"""How products with the Hessian are computed.

exact: second derivatives; 2.3 gradients on one micro-batch, 3.5 on several. finite_difference: one gradient; the first
is checked by a finer central difference, two gradients, and nothing is converged where they differ by more than 2
percent. auto: finite differences, if the first is within 2 percent of the exact product; else exact ones.
"""

MAX_DIFFERENCE = 0.02
"""Of a product by finite differences from the exact one, relative: 0.003 is usual, 1 across kinks that are not held."""


class CheckedHessian(CurvatureOperator):
    """Products with the Hessian by differences of gradients, the first of which is checked when this is made.

    Attributes:
        by_differences: whether products are differences; else exact.
        trusted: whether the differences agreed with what they were checked by.
        deviation: how far the quadratic form of the first vector was off, relative; 0 for exact products.
    """

    def __init__(
        self,
        function: FixedLoss,
        route: Products,
        first: Tensor,
        *,
        check_exactly: bool = True,
        eps: float | None = None,
    ) -> None:
        """Check the product with one vector, which is remembered.

        Args:
            function: whose Hessian.
            route: auto or finite_difference.
            first: the vector to check with, (size,): the first that an estimate will ask for.
            check_exactly: in route auto, check by an exact product; else by a central difference, cheaper.
            eps: length of the step of differences; None is that of :class:`FiniteDifferenceHessian`.
        """
        super().__init__(function.size, function.dtype, function.device)
        self.exact, self.differences = HessianOperator(function), FiniteDifferenceHessian(function, eps=eps)
        self._check_exactly = route == "auto" and check_exactly
        product, reference = self.differences(first), self.anew(first)
        distance = float(torch.linalg.vector_norm(product - reference))
        self.trusted = distance <= MAX_DIFFERENCE * float(torch.linalg.vector_norm(reference))
        self.by_differences = self.trusted or route == "finite_difference"
        used = self._used
        self.setup_gradients, self.matvec_gradients = used.setup_gradients, used.matvec_gradients
        self.deviation = 0.0
        if self.by_differences:
            form = float(first @ reference)
            tiny = torch.finfo(torch.float64).tiny
            self.deviation = abs(float(first @ product) - form) / max(abs(form), tiny)
        self._first, self._known = first, product if self.by_differences else reference
        self._remembered = self.by_differences or self._check_exactly

    def anew(self, vector: Tensor) -> Tensor:
        """Return the product with `vector` in the way that checks differences: exact, or by a central difference."""
        return (self.exact if self._check_exactly else self.differences.central)(vector)

    @property
    def price_of_anew(self) -> float:
        """What that costs, in gradients; once the graph of exact products is there."""
        return self.exact.matvec_gradients if self._check_exactly else 2.0

    @property
    def mean_loss(self) -> float:
        """L(w)."""
        return self._used.mean_loss

    @property
    def num_spent(self) -> int:
        """Products so far, with those of the check."""
        return self.exact.num_matvecs + self.differences.num_matvecs

    def most_products(self, allowance_gradients: float, most: int) -> int:
        """Return how many products an allowance pays for; what the check has paid for already does not count."""
        paid = self.setup_gradients if self._used.num_matvecs else 0.0
        return super().most_products(
            allowance_gradients + paid + (self.matvec_gradients if self._remembered else 0.0), most
        )

    @property
    def _used(self) -> HessianOperator | FiniteDifferenceHessian:
        return self.differences if self.by_differences else self.exact

    def _product(self, vector: Tensor) -> Tensor:
        # the same but for rounding: an iteration may bring it to length one once more
        if self._remembered and torch.allclose(vector, self._first, rtol=1e-5, atol=0.0):
            return self._known
        return self._used(vector)


def check_route(route: str, curvature: str) -> None:
    """Check the name of a route.

    Raises:
        UserError: there is none of that name, or it is not one of this curvature matrix.
    """
    if route not in get_args(Products):
        raise UserError(f"route must be one of {', '.join(get_args(Products))}, got '{route}'")
    if curvature != "hessian" and route != "exact":
        raise UserError(
            f"route must be exact for curvature {curvature}, got '{route}'; differences are of the gradient"
        )
