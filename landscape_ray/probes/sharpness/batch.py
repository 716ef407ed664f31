"""Batch sharpness: the curvature of minibatch losses along their own gradients."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.probes.estimate import Estimate
from landscape_ray.probes.fixed_loss import Batches, FixedLoss
from landscape_ray.probes.losses import Loss
from landscape_ray.probes.operators.kinks import Kinks
from landscape_ray.probes.probe import Host, Probe

Route: TypeAlias = Literal["exact", "finite_difference"]
"""How the products of Hessians and gradients are computed; see :func:`batch_sharpness`."""

STEP = 0.001
"""Length of the differences in float32. Minibatch gradients point where the loss is sharp: products are large there."""

PRICES: dict[Route, float] = {"exact": 3.5, "finite_difference": 2.0}


def batch_sharpness(
    module: nn.Module,
    loss: Loss,
    batches: Batches,
    *,
    of_ratios: bool = False,
    route: Route = "exact",
    tol: float = 0.05,
    eval_mode: bool = True,
) -> Estimate:
    """Return the mean curvature of minibatch losses along their own gradients, at the present weights.

        E_B[g_B' H_B g_B] / E_B[|g_B|^2]

    where g_B and H_B are gradient and Hessian of the loss on one minibatch, the same for both. SGD without momentum
    settles where this is 2 / lr, while the sharpness of the whole stays below. The value belongs to the batch size:
    take minibatches of the size of an update.

    Args:
        module: any module, float32 or float64; data-parallel wrappers taken off.
        loss: `loss(module, batch)`, the mean loss of one minibatch.
        batches: at least two pairs `(batch, num_examples)`, each of them one minibatch; 5 to 20 are usual. Means weigh
            them by their number of examples.
        of_ratios: `E_B[g_B' H_B g_B / |g_B|^2]` instead, the other form in use.
        route: exact, second derivatives, 3.5 gradients on all minibatches; or finite_difference, which keeps fused
            attention and compiled modules: differences of gradients along g_B, two gradients, and an exact product for
            the first minibatch, whose deviation is added to the error.
        tol: deviation of the differences that is accepted, relative, > 0.
        eval_mode: measure in eval mode: no dropout, running batch statistics. False keeps the modes of the host.

    Returns:
        The estimate. The standard error is that over the minibatches (delete-one jackknife); minibatches with large
        gradients weigh most, so that the sums are skewed: with 20, two errors held the truth in 84 to 93 %.

    Raises:
        UserError: fewer than two minibatches, an argument out of its range, or a function that cannot be measured.

    References:
        Andreyev and Beneventano, Edge of stochastic stability: revisiting the edge of stability for SGD, 2024,
        arXiv:2412.20553.

    >>> weight = nn.Linear(2, 1, bias=False)  # 0.5 (w'x)^2: g = (w'x) x, H = x x', g'Hg / |g|^2 = |x|^2
    >>> rows = [(torch.tensor([3.0, 4.0]), 1), (torch.tensor([0.0, 5.0]), 1)]
    >>> round(batch_sharpness(weight, lambda m, x: 0.5 * m(x) ** 2, rows).value, 3)
    25.0
    """
    probe = BatchSharpnessProbe(batches, route=route, tol=tol, eval_mode=eval_mode)
    found = probe.measure(module, loss)
    return found[f"{probe.name}/of_ratios"] if of_ratios else found[probe.name]


class BatchSharpnessProbe(Probe):
    """Batch sharpness along a training run, over the same minibatches each time.

    Estimates: `batch_sharpness`, the ratio of means, and `batch_sharpness/of_ratios`, the mean of ratios.
    """

    name = "batch_sharpness"
    STATE: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        batches: Batches,
        *,
        route: Route = "exact",
        tol: float = 0.05,
        eval_mode: bool = True,
        seed: int = 0,
    ) -> None:
        """Keep the settings.

        Args:
            batches: see :func:`batch_sharpness`; the same at every measurement.
            route: see :func:`batch_sharpness`.
            tol: see :func:`batch_sharpness`.
            eval_mode: see :func:`batch_sharpness`.
            seed: of the noise that the loss may contain.

        Raises:
            UserError: an argument out of its range.
        """
        if route not in get_args(Route):
            raise UserError(f"route must be one of {', '.join(get_args(Route))}, got '{route}'")
        if not (math.isfinite(tol) and tol > 0):
            raise UserError(f"tol must be positive and finite, got {tol}; 0.05 is five percent")
        super().__init__(batches, eval_mode=eval_mode, seed=seed)
        self.route, self.tol = route, tol

    @property
    def price_gradients(self) -> float:
        """Price of a measurement, in gradients on all minibatches."""
        check = PRICES["exact"] / max(len(self.batches), 1) if self.route == "finite_difference" else 0.0
        return PRICES[self.route] + check

    def _measure(self, function: FixedLoss, host: Host) -> dict[str, Estimate]:
        num = float(function.reduce(torch.tensor(float(len(function.batches)), device=function.device)))
        if num < 2:
            raise UserError("batches must hold at least 2 minibatches, got 1; split it: the spread tells the error")
        measure = _exact if self.route == "exact" else _difference
        rows = [(share, *measure(function, batch)) for batch, share in function.batches]
        function.spent_gradients += self.price_gradients
        table = torch.tensor(rows, dtype=torch.float64, device=function.device)
        shares, curvatures, squares = table.unbind(1)
        deviation = 0.0
        if self.route == "finite_difference":
            truth, _ = _exact(function, function.batches[0][0])
            first = torch.stack([(curvatures[0] - truth).abs(), curvatures.new_tensor(abs(truth))])
            missed, whole = function.reduce(first)
            deviation = float(missed / whole) if missed > 0 else 0.0
        pairs = {
            self.name: (shares * curvatures, shares * squares),
            f"{self.name}/of_ratios": (shares * curvatures / squares, shares),
        }
        found = {}
        for name, (numerators, denominators) in pairs.items():
            value, error = _jackknife(function, numerators, denominators, num)
            found[name] = Estimate(
                value=value,
                standard_error=math.hypot(error, deviation * value),
                num_matvecs=len(rows) if self.route == "exact" else 1,
                converged=deviation <= self.tol,
                route=self.route,
            )
        return found


def _exact(function: FixedLoss, batch: Any) -> tuple[float, float]:
    """Return `g' H g` and `g' g` of one minibatch."""
    with function.surroundings(second_derivatives=True):
        _, gradient = function.differentiate(batch, create_graph=True)
        flat = function.flatten(gradient)
        curved = [g for g in gradient if g.requires_grad]  # a parameter that enters linearly has no second derivative
        if not curved:
            return 0.0, float(flat @ flat)
        product = torch.autograd.grad(
            curved, function.parameters, grad_outputs=[g.detach() for g in curved], materialize_grads=True
        )
        return float(flat @ function.flatten(product)), float(flat @ flat)


def _difference(function: FixedLoss, batch: Any) -> tuple[float, float]:
    """Return `g' H g` and `g' g` of one minibatch, by a step along g."""
    step = STEP * math.sqrt(torch.finfo(function.dtype).eps / torch.finfo(torch.float32).eps)
    kinks = Kinks()
    with function.surroundings():
        with kinks.taken_down(function.module):
            flat = function.flatten(function.differentiate(batch)[1])
        length = float(torch.linalg.vector_norm(flat))
        if length == 0:
            return 0.0, 0.0
        with function.moved_by(flat * (step / length)), kinks.held():
            ahead = function.flatten(function.differentiate(batch)[1])
        return float(flat @ (ahead - flat)) * length / step, length**2


def _jackknife(function: FixedLoss, numerators: Tensor, denominators: Tensor, num: float) -> tuple[float, float]:
    """Return the ratio of the sums over all processes, and its standard error.

    Needs sums only, no process the values of another: `theta_i` is the ratio without minibatch i, and the variance is
    `(m - 1) / m sum_i (theta_i - mean theta)^2`.
    """
    over, under = function.reduce(torch.stack([numerators.sum(), denominators.sum()]))
    without = (over - numerators) / (under - denominators) - over / under
    first, second = function.reduce(torch.stack([without.sum(), without.square().sum()]))
    return float(over / under), math.sqrt(max(float((num - 1) / num * (second - first**2 / num)), 0.0))
