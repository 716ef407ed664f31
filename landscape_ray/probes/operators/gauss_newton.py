"""The generalised Gauss-Newton matrix: curvature of the loss in the outputs, seen through the linearised network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from landscape_ray.probes.fixed_loss import FixedLoss
from landscape_ray.probes.losses import DetailedLoss
from landscape_ray.probes.operators.jacobian import JacobianOperator, OutputMatrix, same


class GGNOperator(JacobianOperator):
    """Products with `G = sum_i share_i J_i' (d2 L_i / d outputs2) J_i`, the weights in the outputs' place linearised.

    It is the Hessian without the curvature of the network: equal to it where the outputs are linear in the weights,
    and positive semi-definite where the loss is convex in the outputs. For a likelihood it is the Fisher matrix.

    The curvature in the outputs is written down where the loss names its likelihood and it holds, with autograd
    otherwise (extra penalties on logits, class weights, ignored targets). What a loss adds beyond `per_target`, such
    as a penalty on weights, is not in it.

    References:
        Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, Neural Computation
        14(7), 2002; Martens, New insights and perspectives on the natural gradient method, 2014, arXiv:1412.1193.

    >>> from landscape_ray.probes.losses import OutputLoss
    >>> def half_squares(outputs, targets):
    ...     return 0.5 * (outputs - targets).square()
    >>> module = torch.nn.Linear(2, 1, bias=False)
    >>> batch = (torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]))
    >>> ggn = GGNOperator(FixedLoss(module, OutputLoss(half_squares, "gaussian"), [batch]))
    >>> ggn(torch.tensor([1.0, 0.0]))  # x x' v
    tensor([1., 2.])
    """

    def __init__(self, function: FixedLoss, *, retain_graph: bool | None = None) -> None:
        """Nothing is computed yet.

        Args:
            function: whose Gauss-Newton matrix; its loss is a `DetailedLoss`.
            retain_graph: keep the graphs of all micro-batches; None keeps it for a single one.

        Raises:
            UserError: the loss cannot be taken apart.
        """
        super().__init__(function, "the Gauss-Newton matrix", retain_graph)
        self._closed: dict[int, bool] = {}

    def _matrix(self, index: int, outputs: Tensor, targets: Tensor) -> OutputMatrix:
        closed_form = closed_form_hessian(self.loss, outputs)
        if closed_form is not None and index not in self._closed:
            self._closed[index] = holds(closed_form, self.loss, outputs, targets)
        if closed_form is not None and self._closed[index]:
            return closed_form
        return output_hessian(self.loss, outputs, targets)


def output_hessian(loss: DetailedLoss, outputs: Tensor, targets: Tensor) -> OutputMatrix:
    """Return the Hessian of the mean loss over the outputs, by differentiating twice."""
    leaf = outputs.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss.per_target(leaf, targets).mean(), leaf, create_graph=True)
    if not gradient.requires_grad:  # a loss that is linear in the outputs
        return torch.zeros_like

    def times(tangent: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(gradient, leaf, tangent, retain_graph=True, materialize_grads=True)
        return product

    return times


def closed_form_hessian(loss: DetailedLoss, outputs: Tensor) -> OutputMatrix | None:
    """Return the Hessian that the likelihood of the loss implies, over outputs with one row for each target.

    With p = softmax(row): `diag(p) - p p'` for categorical, the identity for gaussian; over the number of rows.
    """
    num_rows = outputs.numel() // outputs.shape[-1]
    if loss.likelihood == "gaussian":
        return lambda tangent: tangent / num_rows
    if loss.likelihood == "categorical":
        p = outputs.softmax(-1)
        return lambda tangent: p * (tangent - (p * tangent).sum(-1, keepdim=True)) / num_rows
    return None


def holds(closed_form: Callable[[Tensor], Tensor], loss: DetailedLoss, outputs: Tensor, targets: Tensor) -> bool:
    """Return whether a Hessian over the outputs is that of the loss, by its product with one random tensor."""
    generator = torch.Generator(outputs.device).manual_seed(0)
    tangent = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device)
    num_rows = outputs.numel() // outputs.shape[-1]
    return same(closed_form(tangent), output_hessian(loss, outputs, targets)(tangent), tangent / num_rows)
