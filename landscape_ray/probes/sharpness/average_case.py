"""How far the loss rises on average when noise is added to the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from landscape_ray.errors import UserError
from landscape_ray.probes.estimate import Estimate
from landscape_ray.probes.fixed_loss import FORWARD, Batches, FixedLoss
from landscape_ray.probes.losses import Loss
from landscape_ray.probes.probe import Host
from landscape_ray.probes.sharpness.perturbation import Norm, PerturbationProbe, Scaling, affordable
from landscape_ray.probes.spectrum.sign_samples import error_of_mean


def average_case_sharpness(
    module: nn.Module,
    loss: Loss,
    batches: Batches,
    *,
    radius: float = 0.05,
    scaling: Scaling = "elementwise",
    norm: Norm = "l2",
    eta: float = 0.0,
    one_dimensional: bool = True,
    per_dimension: bool = False,
    normalise_logits: bool = False,
    num_pairs: int = 10,
    eval_mode: bool = True,
    seed: int = 0,
) -> Estimate:
    """Return by how much the loss rises on average under noise on the weights.

        E_z L(w + T z) - L(w),    z_i independent: normal with standard deviation `radius` (l2),
                                  or uniform on [-radius, radius] (linf)

    To second order that is `radius^2/2 tr(T H T)` for normal noise and a third of it for uniform noise, so
    `radius^2/2 sum_i w_i^2 H_ii` for scaling elementwise. As in the authors' code the noise has the same size in
    each coordinate, and its length is about `radius sqrt(d)`; with `per_dimension` it is divided by sqrt(d), d the
    number of weights that move, for lengths about `radius` and `radius^2/2 tr(T H T) / d`, comparable across sizes.

    The noise comes in pairs z, -z, whose mean is free of the gradient: all that it adds is variance. The error falls
    with the square root of the number of pairs.

    Args:
        module: any module, float32 or float64; data-parallel wrappers taken off.
        loss: `loss(module, batch)`, the mean loss of one micro-batch; a `DetailedLoss` for normalised logits.
        batches: pairs `(batch, num_examples)`, batches with `num_examples`, or a single batch.
        radius: rho > 0, of one coordinate in units of T: 0.05 is noise of 5 % on each weight for scaling elementwise.
            There the authors looked at 0.05 to 0.4 (linf: 0.1 to 0.8) for a ResNet-18, at 0.1 to 0.8 for a ViT.
        scaling: standard, elementwise or filterwise; see `perturbation`.
        norm: l2 for normal, linf for uniform noise.
        eta: added to T where it is not standard, >= 0.
        one_dimensional: whether biases and gains are moved.
        per_dimension: divide the noise by sqrt(d).
        normalise_logits: see :class:`NormalisedLogits`.
        num_pairs: >= 2; two forward passes each.
        eval_mode: measure in eval mode.
        seed: of the noise.

    Returns:
        The estimate, with the standard error of the mean over the pairs, widened for few of them by Student's t.

    Raises:
        UserError: an argument out of its range, or parameters that cannot be measured.

    References:
        Andriushchenko et al., A modern look at the relationship between sharpness and generalization, 2023,
        arXiv:2302.07011.

    >>> line = nn.Linear(1, 1, bias=False)  # L = w^2/2: E (w + rho z)^2/2 - w^2/2 = rho^2/2
    >>> half_square = lambda module, x: 0.5 * module(x).square().mean()
    >>> found = average_case_sharpness(
    ...     line, half_square, [torch.ones(1, 1)], radius=1.0, scaling="standard", num_pairs=200
    ... )
    >>> abs(found.value - 0.5) < 3 * found.standard_error < 0.2
    True
    """
    probe = AverageCaseSharpnessProbe(
        batches,
        radii=[radius],
        scaling=scaling,
        norm=norm,
        eta=eta,
        one_dimensional=one_dimensional,
        per_dimension=per_dimension,
        normalise_logits=normalise_logits,
        num_pairs=num_pairs,
        eval_mode=eval_mode,
        seed=seed,
    )
    return probe.measure(module, loss)[probe.name]


class AverageCaseSharpnessProbe(PerturbationProbe):
    """Average-case sharpness along a training run, at several radii; see :func:`average_case_sharpness`."""

    name = "average_case_sharpness"

    def __init__(
        self,
        batches: Batches,
        *,
        radii: Sequence[float] = (0.05,),
        scaling: Scaling = "elementwise",
        norm: Norm = "l2",
        eta: float = 0.0,
        one_dimensional: bool = True,
        per_dimension: bool = False,
        normalise_logits: bool = False,
        num_pairs: int = 10,
        eval_mode: bool = True,
        seed: int = 0,
    ) -> None:
        """Keep the settings.

        Args:
            batches: see :func:`average_case_sharpness`; the same at every measurement.
            radii: the first gives the main estimate, the others `average_case_sharpness/rho_0.1` and so on, all from
                the same noise.
            scaling: see :func:`average_case_sharpness`.
            norm: see :func:`average_case_sharpness`.
            eta: see :func:`average_case_sharpness`.
            one_dimensional: see :func:`average_case_sharpness`.
            per_dimension: see :func:`average_case_sharpness`.
            normalise_logits: see :func:`average_case_sharpness`.
            num_pairs: see :func:`average_case_sharpness`; fewer where the allowance ends before, but two:
                not converged then.
            eval_mode: see :func:`average_case_sharpness`.
            seed: of the noise, other noise at every measurement.

        Raises:
            UserError: an argument out of its range.
        """
        if num_pairs < 2:
            raise UserError(f"num_pairs must be at least 2, got {num_pairs}; one has no standard error")
        super().__init__(
            batches,
            radii=radii,
            scaling=scaling,
            norm=norm,
            eta=eta,
            one_dimensional=one_dimensional,
            normalise_logits=normalise_logits,
            eval_mode=eval_mode,
            seed=seed,
        )
        self.per_dimension, self.num_pairs = per_dimension, num_pairs

    @property
    def price_gradients(self) -> float:
        """A forward pass at the weights, and two for each pair and radius."""
        return FORWARD * (1 + 2 * self.num_pairs * len(self.radii))

    def _measure(self, function: FixedLoss, host: Host) -> dict[str, Estimate]:
        generator, ball = self.generator(), self.ball(function)
        unit = 1 / math.sqrt(int((ball.scale > 0).sum())) if self.per_dimension else 1.0
        price = FORWARD * 2 * len(self.radii)
        num_pairs = affordable(self.num_pairs, 2, price, host.allowance_gradients - function.spent_gradients - FORWARD)
        base = function.value()
        rises = torch.empty(num_pairs, len(self.radii), dtype=torch.float64)
        for pair in range(num_pairs):
            noise = ball.scale * ball.draw_noise(generator)
            for index, radius in enumerate(self.radii):
                step = noise * (radius * unit)
                rises[pair, index] = (function.value_at(step) + function.value_at(-step)) / 2 - base
        return self.by_radius(
            [
                Estimate(
                    value=float(column.mean()),
                    standard_error=error_of_mean(column.tolist()),
                    converged=num_pairs == self.num_pairs,
                )
                for column in rises.unbind(1)
            ]
        )
