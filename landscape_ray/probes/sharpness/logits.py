"""The outputs of a classifier or language model: put to unit length, and sharpness with respect to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.probes.estimate import Estimate
from landscape_ray.probes.fixed_loss import FORWARD, Batches, FixedLoss
from landscape_ray.probes.losses import DetailedLoss, Likelihood, Loss, detailed
from landscape_ray.probes.probe import Host, Probe

SHORTEST = 1e-10
"""Of the logits that are divided by their length."""


class NormalisedLogits:
    """A classification loss on logits that are centred and of unit length, for each target by itself.

        o -> (o - mean(o)) / max(||o - mean(o)||, 1e-10)

    Without it, a network grows flat by the mere size of its logits.

    References:
        Andriushchenko et al., A modern look at the relationship between sharpness and generalization, 2023,
        arXiv:2302.07011; centring and the floor as in the authors' code.
    """

    likelihood: Likelihood | None = "categorical"

    def __init__(self, loss: Loss) -> None:
        """Keep the loss.

        Raises:
            UserError: the loss cannot be taken apart, or is not one on logits.
        """
        self.loss: DetailedLoss = detailed(loss, "normalised logits")
        if self.loss.likelihood != "categorical":
            raise UserError(
                f"loss must be a categorical likelihood for normalised logits, got {self.loss.likelihood}; "
                "set normalise_logits to false"
            )

    def per_target(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return one loss for each target, flat."""
        centred = outputs - outputs.mean(-1, keepdim=True)
        length = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
        return self.loss.per_target(centred / length.clamp_min(SHORTEST), targets)

    def __call__(self, module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean loss, 0-d."""
        inputs, targets = batch
        return self.per_target(module(inputs), targets).mean()


def logit_sharpness(
    module: nn.Module, loss: Loss, batches: Batches, *, radius: float = 1e-3, eval_mode: bool = True
) -> Estimate:
    """Return by how much the loss can grow, in percent, when the logits of the last position move within a box.

        100 (max_z f(y + z) - f(y)) / (1 + f(y)),    |z_i| <= radius (|y_i| + 1)

    y are the outputs at the last position of each example, which in an autoregressive model has seen all others; f is
    the mean over examples of the negative log-likelihood of its target. For examples without positions, y is their
    output. Label smoothing does not enter.

    The maximum is exact: f grows with every logit but that of the target, with which it falls, so the largest value
    is at the corner with z_i = +b_i elsewhere and -b_i at the target; with a gaussian likelihood each output moves away
    from its target. Outputs are perturbed, not weights: one forward pass is all it takes. Computed in float64 from the
    outputs, and exact for the batches, hence with standard error 0.

    This is the sharpness of Keskar et al. (their equation 4 with A the identity: the box, the denominator, the factor
    100; radius 1e-3 and 5e-4 are theirs) with the logits of the last token in the place of the weights, which is how
    Lee et al. measure autoregressive language models. What could be read of Lee et al. states the formula's origin,
    the last token, and that one forward pass does. Not confirmed, and ours: the radius, the identity for A, the mean
    over examples inside f, and the exact corner in the place of an iterative maximiser (Keskar et al. take ten steps
    of L-BFGS-B, which cannot find more). Compare values of one definition only.

    Args:
        module: any module, float32 or float64.
        loss: a `DetailedLoss` with a likelihood.
        batches: pairs `(batch, num_examples)`, or a single batch; batches are `(inputs, targets)`, outputs (B, ..., C),
            and targets (B, ...) for classes, (B, ..., C) for values; under a gaussian likelihood, classes are compared
            as one-hot vectors.
        radius: of the box, relative, > 0.
        eval_mode: measure in eval mode.

    Returns:
        The estimate, in percent.

    Raises:
        UserError: an argument out of its range, or a loss without likelihood.

    References:
        Lee et al., To FP8 and back again: quantifying reduced precision effects on LLM training stability, 2024,
        arXiv:2405.18710.
        Keskar et al., On large-batch training for deep learning: generalization gap and sharp minima, 2017,
        arXiv:1609.04836.

    >>> from landscape_ray.probes.losses import OutputLoss
    >>> line = nn.Linear(1, 2, bias=False)  # logits (0, 0): f = log 2, max f = log(1 + e^(2 radius))
    >>> _ = nn.init.zeros_(line.weight)
    >>> loss = OutputLoss(nn.CrossEntropyLoss(reduction="none"), likelihood="categorical")
    >>> batch = (torch.ones(1, 1), torch.zeros(1, dtype=torch.long))
    >>> round(logit_sharpness(line, loss, [batch], radius=0.001).value, 5)
    0.05909
    """
    return LogitSharpnessProbe(batches, radii=[radius], eval_mode=eval_mode).measure(module, loss)["logit_sharpness"]


class LogitSharpnessProbe(Probe):
    """Sharpness with respect to the output logits along a training run; see :func:`logit_sharpness`."""

    name = "logit_sharpness"
    examples_apart: ClassVar[bool] = True

    def __init__(
        self, batches: Batches, *, radii: Sequence[float] = (1e-3, 5e-4), eval_mode: bool = True, seed: int = 0
    ) -> None:
        """Keep the settings.

        Args:
            batches: see :func:`logit_sharpness`; the same at every measurement.
            radii: of the boxes; the first gives the main estimate, the others `logit_sharpness/rho_0.0005` and so on.
            eval_mode: see :func:`logit_sharpness`.
            seed: of the noise that the module may contain outside eval mode.

        Raises:
            UserError: an argument out of its range.
        """
        if (
            not radii
            or not all(math.isfinite(r) and r > 0 for r in radii)
            or len({f"{r:g}" for r in radii}) < len(radii)
        ):
            raise UserError(
                f"radii must be one or more different numbers, positive and finite, got {list(radii)}; 0.001 is usual"
            )
        super().__init__(batches, eval_mode=eval_mode, seed=seed)
        self.radii = list(radii)

    @property
    def price_gradients(self) -> float:
        """One forward pass."""
        return FORWARD

    def _measure(self, function: FixedLoss, host: Host) -> dict[str, Estimate]:
        loss = detailed(function.loss, "the sharpness of logits")
        if loss.likelihood is None:
            raise UserError(
                "loss must be a categorical or gaussian likelihood for the sharpness of logits, got neither; "
                "the maximum over the box is known for those"
            )
        classes = loss.likelihood == "categorical"
        function.spent_gradients += FORWARD
        sums = torch.zeros(1 + len(self.radii), dtype=torch.float64, device=function.device)
        with function.surroundings(), torch.no_grad():
            for (inputs, targets), share in function.batches:
                function.seed_noise()
                outputs = function.module(inputs)
                last = (slice(None), *[-1] * (outputs.dim() - 2))
                y, wanted = outputs[last].double(), targets[last]
                if not wanted.is_floating_point():
                    _check_classes(wanted, y.shape[-1])
                    if not classes:  # squared error on classes compares with one-hot vectors
                        wanted = nn.functional.one_hot(wanted, y.shape[-1]).double()
                elif not classes:
                    wanted = wanted.reshape(y.shape)  # (B,) would be spread over (B, 1)
                corner = _worst_corner(y, wanted, classes) * (y.abs() + 1)
                base = _loss(y, wanted, classes)
                growths = [_loss(y + radius * corner, wanted, classes) - base for radius in self.radii]
                sums += share * torch.stack([base, *growths])
        total, *gains = function.reduce(sums).tolist()
        names = [self.name, *(f"{self.name}/rho_{radius:g}" for radius in self.radii[1:])]
        return {name: Estimate(value=100 * gain / (1 + total)) for name, gain in zip(names, gains, strict=True)}


def _check_classes(targets: Tensor, num_classes: int) -> None:
    if bool(((targets < 0) | (targets >= num_classes)).any()):
        raise UserError(
            f"targets at the last position must be classes from 0 to {num_classes - 1}, got {targets.tolist()}; "
            "leave out examples whose last target is masked"
        )


def _worst_corner(outputs: Tensor, targets: Tensor, classes: bool) -> Tensor:
    """Return the signs of the displacement of `outputs`, (B, C), that raises the loss most."""
    if not classes:
        return torch.where(outputs >= targets, 1.0, -1.0)
    return torch.where(torch.arange(outputs.shape[-1], device=outputs.device) == targets[:, None], -1.0, 1.0)


def _loss(outputs: Tensor, targets: Tensor, classes: bool) -> Tensor:
    """Return the mean negative log-likelihood, 0-d, up to a constant for values."""
    if classes:
        return nn.functional.cross_entropy(outputs, targets)
    return 0.5 * (outputs - targets).square().sum(-1).mean()
