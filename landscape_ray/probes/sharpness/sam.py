"""How far the loss rises by one step uphill: the sharpness that SAM and ASAM train against."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from landscape_ray.probes.estimate import Estimate
from landscape_ray.probes.fixed_loss import FORWARD, Batches, FixedLoss
from landscape_ray.probes.losses import Loss
from landscape_ray.probes.probe import Host
from landscape_ray.probes.sharpness.ascent import RiseProbe
from landscape_ray.probes.sharpness.perturbation import Norm, Scaling


def sam_sharpness(
    module: nn.Module,
    loss: Loss,
    batches: Batches,
    *,
    radius: float = 0.05,
    scaling: Scaling = "standard",
    norm: Norm = "l2",
    eta: float = 0.0,
    one_dimensional: bool = True,
    subset_examples: int = 0,
    normalise_logits: bool = False,
    eval_mode: bool = True,
) -> Estimate:
    """Return by how much the loss rises after one step uphill, the sharpness that SAM trains against.

        L(w + d) - L(w),    d = radius T z,    z = T g / ||T g|| (l2) or sign(T g) (linf),    g = grad L(w)

    That is `d = radius g / ||g||` for scaling standard, and `radius T^2 g / ||T g||`, with `||T^-1 d|| = radius`, for
    ASAM. To second order the value is `radius ||g|| + radius^2/2 g'H g / ||g||^2`: far from a minimum mostly the
    gradient; at one, where g = 0, it is 0 whatever the curvature. All trainable parameters count, biases too; ASAM's
    own code scales weights only. A difference of two losses: in float32 below about 1e-6 of the loss it is rounding.

    With `subset_examples = m`, each m examples take their own step, and the values are averaged: m-sharpness.

    Args:
        module: any module, float32 or float64; data-parallel wrappers taken off.
        loss: `loss(module, batch)`, the mean loss of one micro-batch; a `DetailedLoss` for subsets or normalised
            logits.
        batches: pairs `(batch, num_examples)`, batches with `num_examples`, or a single batch.
        radius: rho > 0, in units of T.
        scaling: standard, elementwise or filterwise; see `perturbation`.
        norm: l2 or linf, of the ball.
        eta: added to T where it is not standard, >= 0.
        one_dimensional: whether biases and gains are moved.
        subset_examples: m; 0 for all examples together.
        normalise_logits: see :class:`NormalisedLogits`.
        eval_mode: measure in eval mode.

    Raises:
        UserError: an argument out of its range, or parameters that cannot be measured.

    References:
        Foret et al., Sharpness-aware minimization for efficiently improving generalization, 2021, arXiv:2010.01412.
        Kwon et al., ASAM, 2021, arXiv:2102.11600.

    >>> import torch
    >>> line = nn.Linear(1, 1, bias=False)  # L = w^2/2 at w = 2: (2.1^2 - 2^2) / 2
    >>> _ = nn.init.constant_(line.weight, 2.0)
    >>> half_square = lambda module, x: 0.5 * module(x).square().mean()
    >>> round(sam_sharpness(line, half_square, [torch.ones(1, 1)], radius=0.1).value, 4)
    0.205
    """
    probe = SamSharpnessProbe(
        batches,
        radii=[radius],
        scaling=scaling,
        norm=norm,
        eta=eta,
        one_dimensional=one_dimensional,
        subset_examples=subset_examples,
        normalise_logits=normalise_logits,
        eval_mode=eval_mode,
    )
    return probe.measure(module, loss)[probe.name]


class SamSharpnessProbe(RiseProbe):
    """SAM's one-step sharpness along a training run, at several radii; see :func:`sam_sharpness`."""

    name = "sam_sharpness"

    def __init__(
        self,
        batches: Batches,
        *,
        radii: Sequence[float] = (0.05,),
        scaling: Scaling = "standard",
        norm: Norm = "l2",
        eta: float = 0.0,
        one_dimensional: bool = True,
        subset_examples: int = 0,
        normalise_logits: bool = False,
        eval_mode: bool = True,
        seed: int = 0,
    ) -> None:
        """Keep the settings.

        Args:
            batches: see :func:`sam_sharpness`; the same at every measurement.
            radii: the first gives the main estimate, the others `sam_sharpness/rho_0.1` and so on.
            scaling: see :func:`sam_sharpness`.
            norm: see :func:`sam_sharpness`.
            eta: see :func:`sam_sharpness`.
            one_dimensional: see :func:`sam_sharpness`.
            subset_examples: see :func:`sam_sharpness`.
            normalise_logits: see :func:`sam_sharpness`.
            eval_mode: see :func:`sam_sharpness`.
            seed: of the noise that the module may contain outside eval mode.

        Raises:
            UserError: an argument out of its range.
        """
        super().__init__(
            batches,
            radii=radii,
            scaling=scaling,
            norm=norm,
            eta=eta,
            one_dimensional=one_dimensional,
            subset_examples=subset_examples,
            normalise_logits=normalise_logits,
            eval_mode=eval_mode,
            seed=seed,
        )

    @property
    def price_gradients(self) -> float:
        """A gradient, and a forward pass for each radius."""
        return 1.0 + FORWARD * len(self.radii)

    def _measure(self, function: FixedLoss, host: Host) -> dict[str, Estimate]:
        rises = self.mean_over_landscapes(
            function, lambda ascent: [ascent.value_after_one_step(radius) for radius in self.radii]
        )
        return self.by_radius([Estimate(value=rise) for rise in rises])
