"""Fisher matrices: second moments of the scores, with labels of the model or of the data."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from landscape_ray.errors import UserError
from landscape_ray.probes.fixed_loss import FixedLoss
from landscape_ray.probes.operators.blocks import ClassLoss
from landscape_ray.probes.operators.gauss_newton import closed_form_hessian, holds
from landscape_ray.probes.operators.jacobian import JacobianOperator, OutputMatrix, same

Per: TypeAlias = Literal["example", "target"]
"""Whose gradient is squared: of an example's mean loss, or of the loss of each target."""


class SampledFisher(JacobianOperator):
    """The Fisher matrix by sampling: `1/(K N) sum_k sum_n g_kn g_kn'`, g_kn the gradient of -log p(y_kn | x_n).

    There are N targets, and K labels y_kn are drawn for each from the model itself, once for the operator: from the
    softmax for a categorical likelihood, from a unit normal for a gaussian one. The expectation is the Gauss-Newton
    matrix. Labels cost next to nothing: all scores go through the network together, so that K of them have the price
    of one. Kept: the labels, or for a gaussian likelihood K times the outputs.

    References:
        Kunstner et al., Limitations of the empirical Fisher approximation, 2019, arXiv:1905.12558.
    """

    def __init__(
        self, function: FixedLoss, *, num_samples: int = 1, seed: int = 0, retain_graph: bool | None = None
    ) -> None:
        """Nothing is computed yet.

        Args:
            function: whose Fisher matrix; its loss is a `DetailedLoss` with a likelihood.
            num_samples: labels for each target, >= 1.
            seed: of the labels; the same numbers on every device, others in every process.
            retain_graph: keep the graphs of all micro-batches; None keeps it for a single one.

        Raises:
            UserError: no likelihood, or num_samples below one. At the first product: the likelihood is not that of the
                loss.
        """
        super().__init__(function, "the Fisher matrix", retain_graph)
        if self.loss.likelihood is None:
            raise UserError(
                "loss.likelihood must be categorical or gaussian for the Fisher matrix, got None; "
                "the Gauss-Newton matrix needs none"
            )
        if num_samples < 1:
            raise UserError(f"num_samples must be at least 1, got {num_samples}; the error falls with its root")
        self.num_samples = num_samples
        there = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._generator = torch.Generator().manual_seed(
            seed + 1_000_003 * (torch.distributed.get_rank() if there else 0)
        )
        self._draws: dict[int, Tensor] = {}

    def _matrix(self, index: int, outputs: Tensor, targets: Tensor) -> OutputMatrix:
        if index not in self._draws:
            hessian = closed_form_hessian(self.loss, outputs)
            if hessian is None or not holds(hessian, self.loss, outputs, targets):
                raise UserError(
                    f"loss.likelihood must be that of the loss, got '{self.loss.likelihood}', whose Hessian in the "
                    "outputs is another; leave out class weights, ignored targets and penalties, halve squared errors"
                )
            self._draws[index] = self._draw(outputs)
        scale = 1.0 / (self.num_samples * (outputs.numel() // outputs.shape[-1]))
        draws = self._draws[index]
        if self.loss.likelihood == "gaussian":
            return lambda tangent: scale * (draws * (draws * tangent).sum(-1, keepdim=True)).sum(0)
        p = outputs.softmax(-1)

        def times(tangent: Tensor) -> Tensor:
            # the score is p - onehot(label)
            along = (p * tangent).sum(-1, keepdim=True) - tangent.gather(-1, draws)
            return scale * (p * along.sum(-1, keepdim=True)).scatter_add(-1, draws, -along)

        return times

    def _draw(self, outputs: Tensor) -> Tensor:
        """Return labels (..., K) for outputs (..., C), or noise (K, ..., C)."""
        if self.loss.likelihood == "gaussian":
            noise = torch.randn((self.num_samples, *outputs.shape), generator=self._generator, dtype=outputs.dtype)
            return noise.to(outputs.device)
        uniform = torch.rand((*outputs.shape[:-1], self.num_samples), generator=self._generator, dtype=outputs.dtype)
        cumulative = outputs.softmax(-1).cumsum(-1)
        # `right`: a class of probability zero is never drawn, not even by uniform = 0
        labels = torch.searchsorted(cumulative, uniform.to(outputs.device) * cumulative[..., -1:], right=True)
        return labels.clamp_(max=outputs.shape[-1] - 1)


class EmpiricalFisher(JacobianOperator):
    """The second moment of the gradients: `1/N sum_n g_n g_n'`, with the targets of the data.

    N is the number of examples, g_n the gradient of an example's mean loss; or for `per="target"`, of single targets.
    It is neither the Fisher nor the Gauss-Newton matrix, only close to them where the model fits the data's
    distribution; less the outer product of the mean gradient it is the covariance of the gradient noise.

    References:
        Kunstner et al., Limitations of the empirical Fisher approximation, 2019, arXiv:1905.12558.
    """

    def __init__(self, function: FixedLoss, *, per: Per = "example", retain_graph: bool | None = None) -> None:
        """Nothing is computed yet.

        Args:
            function: whose gradients; its loss is a `DetailedLoss`.
            per: example, a row of the inputs; or target, such as a token of a sequence.
            retain_graph: keep the graphs of all micro-batches; None keeps it for a single one.

        Raises:
            UserError: the loss cannot be taken apart, or weighs targets by class. At the first product: it mixes what
                is to be told apart.
        """
        super().__init__(function, "the empirical Fisher matrix", retain_graph)
        if per not in get_args(Per):
            raise UserError(f"per must be one of {', '.join(get_args(Per))}, got '{per}'")
        if isinstance(self.loss, ClassLoss):
            raise UserError(
                "loss must weigh all targets the same for the empirical Fisher matrix, got that of one class among "
                "several of an example; use the Hessian or the Gauss-Newton matrix of the class"
            )
        self.per = per

    def _matrix(self, index: int, outputs: Tensor, targets: Tensor) -> OutputMatrix:
        leaf = outputs.detach().requires_grad_()
        losses = self.loss.per_target(leaf, targets)
        num_parts = losses.numel() if self.per == "target" else len(targets)
        if losses.dim() != 1 or len(losses) % num_parts or leaf.numel() % num_parts:
            raise UserError(
                "loss.per_target must return as many losses for every example, flat, "
                f"got shape {tuple(losses.shape)} for {len(targets)} examples; do not reduce"
            )
        each = len(losses) // num_parts
        (scores,) = torch.autograd.grad(losses.sum() / each, leaf, retain_graph=True)
        scores = scores.reshape(num_parts, -1)
        # Flipping the sign of some losses must flip exactly their scores, or the outputs lie in another order.
        signs = torch.randint(2, (num_parts,), generator=torch.Generator().manual_seed(0)).to(leaf) * 2 - 1
        (flipped,) = torch.autograd.grad((losses * signs.repeat_interleave(each)).sum() / each, leaf)
        if not same(flipped.reshape(num_parts, -1), signs[:, None] * scores, scores):
            raise UserError(
                f"loss.per_target must give each {self.per} a loss that depends on its own outputs alone, those beside "
                "each other in memory; got one that mixes them, put the classes last"
            )

        def times(tangent: Tensor) -> Tensor:
            along = (scores * tangent.reshape(num_parts, -1)).sum(1, keepdim=True)
            return (along * scores / num_parts).view(tangent.shape)

        return times
