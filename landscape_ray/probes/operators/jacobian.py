"""Products J' M J v: what the Gauss-Newton matrix and the Fisher matrices have in common."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from landscape_ray.errors import UserError
from landscape_ray.probes.fixed_loss import FixedLoss
from landscape_ray.probes.losses import detailed
from landscape_ray.probes.operators.operator import CurvatureOperator

OutputMatrix: TypeAlias = Callable[[Tensor], Tensor]
"""A symmetric matrix over the outputs of a micro-batch: takes and returns tensors in their shape."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Linearised:
    """The module at one micro-batch.

    Attributes:
        outputs: with their graph.
        cotangent: zeros in their shape; J' cotangent is linear in it, and its derivative is how J is applied.
        pulled_back: J' cotangent with its graph, one tensor for each parameter.
        matrix: M.
        mean_loss: of the micro-batch.
    """

    outputs: Tensor
    cotangent: Tensor
    pulled_back: Sequence[Tensor]
    matrix: OutputMatrix
    mean_loss: Tensor


class JacobianOperator(CurvatureOperator):
    """`sum_i share_i J_i' M_i J_i`: J_i the Jacobian of the outputs of micro-batch i, M_i a matrix over them.

    J is applied by differentiating `c -> J' c`, which works wherever a gradient can be differentiated; forward mode and
    tracing work for fewer modules, and were not faster on a kept graph.

    With one micro-batch the graph is kept; with several it is built anew for each, which takes the memory of one.
    Prices, in gradients, of setup, product on the kept graph and product with a new one, as measured on one CPU thread:
    0.8, 1.1 and 1.9 for an MLP of 301k weights; 1.1, 1.6 and 2.7 for a GPT of 427k, which are counted; for a residual
    net of 75k 1.2, 2 to 2.5 and 2.5 to 4, since convolutions are slow to differentiate twice.

    The weights must stay as they are while the operator is in use.

    Attributes:
        function: whose outputs.
        loss: its loss, taken apart.
        mean_loss: L(w), known after the first product.
    """

    def __init__(self, function: FixedLoss, purpose: str, retain_graph: bool | None) -> None:
        super().__init__(function.size, function.dtype, function.device)
        self.function, self.loss = function, detailed(function.loss, purpose)
        self.mean_loss = math.nan
        self.retain_graph = function.single if retain_graph is None else retain_graph
        self.setup_gradients, self.matvec_gradients = self.prices(self.retain_graph)
        self._graphs: list[_Linearised] | None = None
        self._versions = [p._version for p in function.parameters]

    @staticmethod
    def prices(retain_graph: bool) -> tuple[float, float]:
        """Return what is computed once and what a product costs, in gradients."""
        return (1.1, 1.6) if retain_graph else (0.0, 2.7)

    @abstractmethod
    def _matrix(self, index: int, outputs: Tensor, targets: Tensor) -> OutputMatrix:
        """Return M of micro-batch `index`, the same at every call; outputs are detached."""

    def release(self) -> None:
        """Free the graph; the next product builds it again."""
        self._graphs = None

    def _product(self, vector: Tensor) -> Tensor:
        function = self.function
        if self._versions != [p._version for p in function.parameters]:
            raise UserError(
                "weights must stay as they are while an operator is in use; build a new one after an update"
            )
        product = torch.zeros_like(vector)
        mean_loss = torch.zeros((), dtype=torch.float64, device=self.device)
        with function.surroundings(second_derivatives=True):
            batches = function.batches
            if self.retain_graph and self._graphs is None:
                function.spent_gradients += self.setup_gradients
                self._graphs = [self._linearise(index, batch) for index, (batch, _) in enumerate(batches)]
            function.spent_gradients += self.matvec_gradients
            direction = function.unflatten(vector)
            for index, (batch, share) in enumerate(batches):
                graph = self._linearise(index, batch) if self._graphs is None else self._graphs[index]
                product.add_(self._sandwich(graph, direction), alpha=share)
                mean_loss += share * graph.mean_loss
        if math.isnan(self.mean_loss):
            self.mean_loss = float(function.reduce(mean_loss))
        return function.reduce(product)

    def _linearise(self, index: int, batch: Any) -> _Linearised:
        inputs, targets = batch
        self.function.seed_noise()
        outputs = self.function.module(inputs)
        if not isinstance(outputs, Tensor):
            raise UserError(f"module must return its outputs as one tensor, got {type(outputs).__name__}; wrap it")
        if not outputs.requires_grad:
            raise UserError("outputs must depend on the trainable parameters, got a constant; do not detach them")
        cotangent = torch.zeros_like(outputs, requires_grad=True)
        pulled_back = torch.autograd.grad(
            outputs, self.function.parameters, cotangent, create_graph=True, materialize_grads=True
        )
        matrix = self._matrix(index, outputs.detach(), targets)
        with torch.no_grad():
            mean_loss = self.loss.per_target(outputs, targets).mean().to(torch.float64)
        return _Linearised(outputs, cotangent, pulled_back, matrix, mean_loss)

    def _sandwich(self, graph: _Linearised, direction: Sequence[Tensor]) -> Tensor:
        (tangent,) = torch.autograd.grad(
            graph.pulled_back, graph.cotangent, direction, retain_graph=self.retain_graph, materialize_grads=True
        )
        products = torch.autograd.grad(
            graph.outputs,
            self.function.parameters,
            graph.matrix(tangent),
            retain_graph=self.retain_graph,
            materialize_grads=True,
        )
        return self.function.flatten(products)


def same(found: Tensor, expected: Tensor, scale: Tensor) -> bool:
    """Return whether two tensors agree up to rounding in float32 of terms of size `scale`; what is not finite does."""
    distance = torch.linalg.vector_norm(found - expected)
    slack = 1e-4 * torch.linalg.vector_norm(expected) + 1e-6 * torch.linalg.vector_norm(scale)
    return not bool(distance > slack)
