"""Hessian-vector products: exact, and by differences of gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from landscape_ray.errors import UserError
from landscape_ray.probes.fixed_loss import FixedLoss
from landscape_ray.probes.operators.kinks import HeldLoss
from landscape_ray.probes.operators.operator import CurvatureOperator


class HessianOperator(CurvatureOperator):
    """Exact products `H v = grad(grad L . v)` by differentiating the gradient once more.

    With one micro-batch the graph of the gradient is kept, and a product costs 2.3 gradients: what fits for one
    product then fits for all, since the graph is needed during a product anyway. With several micro-batches the graph
    is built anew for each, which costs 3.5 gradients and the memory of one micro-batch. These are prices as measured on
    small GPTs and convolutional nets.

    The weights must stay as they are while the operator is in use.

    References:
        Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6(1), 1994.

    >>> module = torch.nn.Linear(2, 1, bias=False)  # 0.5 (w1 x1 + w2 x2)^2: H = x x'
    >>> x = torch.tensor([[1.0, 2.0]])
    >>> hessian = HessianOperator(FixedLoss(module, lambda m, batch: 0.5 * m(batch).square().mean(), [x]))
    >>> hessian(torch.tensor([1.0, 0.0]))
    tensor([1., 2.])
    """

    def __init__(self, function: FixedLoss, *, retain_graph: bool | None = None) -> None:
        """Nothing is computed yet.

        Args:
            function: whose Hessian.
            retain_graph: keep the graphs of all micro-batches; None keeps it for a single one.
        """
        super().__init__(function.size, function.dtype, function.device)
        self.function = function
        self.mean_loss = math.nan
        """L(w), known after the first product."""
        self.retain_graph = function.single if retain_graph is None else retain_graph
        self.setup_gradients, self.matvec_gradients = self.prices(self.retain_graph)
        self._graphs: list[tuple[Tensor, tuple[Tensor, ...]]] | None = None
        self._versions = [p._version for p in function.parameters]

    @staticmethod
    def prices(retain_graph: bool) -> tuple[float, float]:
        """Return what is computed once and what a product costs, in gradients."""
        return (1.2, 2.3) if retain_graph else (0.0, 3.5)

    def release(self) -> None:
        """Free the graph; the next product builds it again."""
        self._graphs = None

    def _product(self, vector: Tensor) -> Tensor:
        function = self.function
        if self._versions != [p._version for p in function.parameters]:
            raise UserError(
                "weights must stay as they are while an operator is in use; build a new one after an update"
            )
        with function.surroundings(second_derivatives=True):
            if self.retain_graph and self._graphs is None:
                function.spent_gradients += self.setup_gradients
                self._graphs = [function.differentiate(batch, create_graph=True) for batch, _ in function.batches]
            function.spent_gradients += self.matvec_gradients
            direction = function.unflatten(vector)
            product = torch.zeros_like(vector)
            mean_loss = 0.0
            for index, (batch, share) in enumerate(function.batches):
                known = self._graphs[index] if self._graphs is not None else None
                value, gradient = known or function.differentiate(batch, create_graph=True)
                product.add_(self._differentiate(gradient, direction), alpha=share)
                mean_loss += share * float(value)
        if math.isnan(self.mean_loss):
            self.mean_loss = float(function.reduce(torch.tensor(mean_loss, dtype=torch.float64, device=self.device)))
        return function.reduce(product)

    def _differentiate(self, gradient: Sequence[Tensor], direction: Sequence[Tensor]) -> Tensor:
        # A parameter that enters linearly, or not at all, has a gradient without a graph: its rows are zero.
        pairs = [(g, d) for g, d in zip(gradient, direction, strict=True) if g.requires_grad]
        if not pairs:
            return torch.zeros(self.size, dtype=self.dtype, device=self.device)
        products = torch.autograd.grad(
            [g for g, _ in pairs],
            self.function.parameters,
            grad_outputs=[d for _, d in pairs],
            retain_graph=self.retain_graph,
            materialize_grads=True,
        )
        return self.function.flatten(products)


class FiniteDifferenceHessian(CurvatureOperator):
    """Products by differences of gradients: one gradient each, or two for a central one.

        H v = |v| (g(w + eps v/|v|) - g(w)) / eps + O(eps)

    The error sits where it matters: on a GPT with 241k weights, early in training, eps = 0.02 is off by 0.3 % for a
    random v, but by 9 % along the sharpest direction, where the curvature changes within the step; 0.005 by 0.1 % and
    2 %. So check along the vector that was found, not along a random one.

    Networks with the usual kinks (ReLU and its relatives, max pooling) are held on the piece that they are on
    (:mod:`landscape_ray.probes.operators.kinks`), which is what second derivatives see of them. Of kinks of another
    make a difference sees the jumps that it crosses, and stops being symmetric.

    Fused attention and compiled modules work and keep their speed. The weights are moved during a product and put back
    bit by bit, also after an exception.
    """

    setup_gradients = 1.0
    matvec_gradients = 1.0

    def __init__(self, function: FixedLoss, *, eps: float | None = None) -> None:
        """Nothing is computed yet.

        Args:
            function: whose Hessian.
            eps: length of the step in parameter space, > 0. None: 0.005 in float32, where rounding and curvature
                weigh the same for random vectors on small GPTs; in proportion to sqrt(machine epsilon).

        Raises:
            UserError: eps is not positive and finite.
        """
        super().__init__(function.size, function.dtype, function.device)
        if eps is None:
            eps = 0.005 * math.sqrt(torch.finfo(self.dtype).eps / torch.finfo(torch.float32).eps)
        if not (math.isfinite(eps) and eps > 0):
            raise UserError(f"eps must be positive and finite, got {eps}; 0.005 suits float32")
        self.function, self.eps = function, eps
        self.mean_loss = math.nan
        """L(w), known after the first product."""
        self._base: Tensor | None = None
        self._held = HeldLoss(function)

    def _product(self, vector: Tensor) -> Tensor:
        if self._base is None:
            self.mean_loss, self._base = self._held.gradient()
        length = float(torch.linalg.vector_norm(vector))
        if length == 0.0:
            return torch.zeros_like(vector)
        _, ahead = self._held.gradient_at(vector * (self.eps / length))
        return ahead.sub_(self._base).mul_(length / self.eps)

    def central(self, vector: Tensor) -> Tensor:
        """Return the product with `vector`, not zero, to second order in a quarter of the step; two gradients.

        Meant for eigenvectors, whose products are large enough for the shorter step.
        """
        self.num_matvecs += 2
        length = float(torch.linalg.vector_norm(vector))
        step = vector * (0.25 * self.eps / length)
        (_, ahead), (_, behind) = self._held.gradient_at(step), self._held.gradient_at(-step)
        return ahead.sub_(behind).mul_(length / (0.5 * self.eps))
