"""How far the loss can rise within a neighbourhood of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from landscape_ray.errors import UserError
from landscape_ray.probes.estimate import Estimate
from landscape_ray.probes.fixed_loss import Batches, FixedLoss
from landscape_ray.probes.losses import Loss
from landscape_ray.probes.probe import Host
from landscape_ray.probes.sharpness.ascent import Ascent, RiseProbe
from landscape_ray.probes.sharpness.perturbation import Norm, Scaling, affordable


def worst_case_sharpness(
    module: nn.Module,
    loss: Loss,
    batches: Batches,
    *,
    radius: float = 0.5,
    scaling: Scaling = "elementwise",
    norm: Norm = "l2",
    eta: float = 0.0,
    one_dimensional: bool = True,
    subset_examples: int = 0,
    normalise_logits: bool = False,
    num_steps: int = 20,
    num_starts: int = 1,
    tol: float = 0.01,
    eval_mode: bool = True,
    seed: int = 0,
) -> Estimate:
    """Return the largest rise of the loss found in a neighbourhood of the weights, a lower bound of the largest.

        max_z L(w + T z) - L(w),    ||z|| <= radius

    To second order at a minimum that is `radius^2/2 lambda_max(T H T)` for l2, and `radius ||T g||` more where the
    gradient is not zero and dominates. Adaptive values (T from the weights) do not change when a layer of a ReLU
    network is scaled up and the next one down.

    Projected ascent on z: `z <- P(z + step radius steepest(T g))`, steepest being the normalised gradient (l2) or its
    signs (linf), from the one-step point of :func:`sam_sharpness`. A step that does not raise the loss is taken back
    and halved. One gradient a step. That T stands in front of z makes the path invariant, too, and the projection a
    division; the authors' APGD runs in w and projects on an ellipsoid. Both look for the same maximum.

    Args:
        module: any module, float32 or float64; data-parallel wrappers taken off.
        loss: `loss(module, batch)`, the mean loss of one micro-batch; a `DetailedLoss` for subsets or normalised
            logits.
        batches: pairs `(batch, num_examples)`, batches with `num_examples`, or a single batch.
        radius: rho > 0, in units of T. ASAM trains with 0.5 to 1 (elementwise, l2), SAM with 0.05 (standard, l2). The
            authors looked, elementwise, at 0.25 to 2 for a ResNet-18 and 0.5 to 4 for a ViT (l2), 0.001 to 0.008 and
            0.0005 to 0.004 (linf).
        scaling: standard, elementwise or filterwise; see `perturbation`.
        norm: l2 or linf, of the ball.
        eta: added to T where it is not standard, >= 0.
        one_dimensional: whether biases and gains are moved.
        subset_examples: m, each m examples get their own worst case and the values are averaged; 0 for all together.
            The authors' m is 128, of 1024 examples.
        normalise_logits: see :class:`NormalisedLogits`.
        num_steps: most steps from each start, >= 1.
        num_starts: starts, >= 1: the one-step point, then random points of the boundary.
        tol: relative to the value, >= 0: stop where the gradient promises no more than that within the ball.
        eval_mode: measure in eval mode.
        seed: of the random starts.

    Returns:
        The estimate. `standard_error` is what the gradient at the point found still promises,
        `max_z' slope . (z' - z)` over the ball: zero at a stationary point, and a bound of what is missing only if the
        loss is concave. `converged` says that it met `tol`; other maxima are not excluded. On an MLP with 26 thousand
        weights five further starts found nothing higher in an l2 ball; in an linf ball, where many corners are
        stationary, three found a rise 60 % higher, so give those several.

    Raises:
        UserError: an argument out of its range, or parameters that cannot be measured.

    References:
        Andriushchenko et al., A modern look at the relationship between sharpness and generalization, 2023,
        arXiv:2302.07011.

    >>> import torch
    >>> line = nn.Linear(2, 1, bias=False)  # L = (9 w1^2 + w2^2)/4 at its minimum: rho^2/2 times 4.5
    >>> _ = nn.init.zeros_(line.weight)
    >>> half_square = lambda module, x: 0.5 * module(x).square().mean()
    >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> found = worst_case_sharpness(line, half_square, [x], radius=0.1, scaling="standard", tol=1e-4)
    >>> round(found.value, 4)
    0.0225
    """
    probe = WorstCaseSharpnessProbe(
        batches,
        radii=[radius],
        scaling=scaling,
        norm=norm,
        eta=eta,
        one_dimensional=one_dimensional,
        subset_examples=subset_examples,
        normalise_logits=normalise_logits,
        num_steps=num_steps,
        num_starts=num_starts,
        tol=tol,
        eval_mode=eval_mode,
        seed=seed,
    )
    return probe.measure(module, loss)[probe.name]


class WorstCaseSharpnessProbe(RiseProbe):
    """Worst-case sharpness along a training run, at several radii; see :func:`worst_case_sharpness`."""

    name = "worst_case_sharpness"
    STATE: ClassVar[tuple[str, ...]] = ("_price_gradients",)

    def __init__(
        self,
        batches: Batches,
        *,
        radii: Sequence[float] = (0.5,),
        scaling: Scaling = "elementwise",
        norm: Norm = "l2",
        eta: float = 0.0,
        one_dimensional: bool = True,
        subset_examples: int = 0,
        normalise_logits: bool = False,
        num_steps: int = 20,
        num_starts: int = 1,
        tol: float = 0.01,
        eval_mode: bool = True,
        seed: int = 0,
    ) -> None:
        """Keep the settings.

        Args:
            batches: see :func:`worst_case_sharpness`; the same at every measurement.
            radii: the first gives the main estimate, the others `worst_case_sharpness/rho_0.1` and so on; the values
                never fall with the radius.
            scaling: see :func:`worst_case_sharpness`.
            norm: see :func:`worst_case_sharpness`.
            eta: see :func:`worst_case_sharpness`.
            one_dimensional: see :func:`worst_case_sharpness`.
            subset_examples: see :func:`worst_case_sharpness`.
            normalise_logits: see :func:`worst_case_sharpness`.
            num_steps: most steps from each start, for each radius; fewer where the allowance ends before.
            num_starts: see :func:`worst_case_sharpness`.
            tol: see :func:`worst_case_sharpness`.
            eval_mode: see :func:`worst_case_sharpness`.
            seed: of the random starts, others at every measurement.

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
        for field, given in (("num_steps", num_steps), ("num_starts", num_starts)):
            if given < 1:
                raise UserError(f"{field} must be at least 1, got {given}")
        if not (math.isfinite(tol) and tol >= 0):
            raise UserError(f"tol must be finite and at least 0, got {tol}; 0 takes all steps")
        self.num_steps, self.num_starts, self.tol = num_steps, num_starts, tol
        self._price_gradients = 1.0 + num_steps * num_starts * len(self.radii)

    @property
    def price_gradients(self) -> float:
        """What the last measurement cost; before any, the most: a gradient, and one a step, start and radius."""
        return self._price_gradients

    def _measure(self, function: FixedLoss, host: Host) -> dict[str, Estimate]:
        generator = self.generator()
        ascents = self.num_starts * len(self.radii)
        num_steps = affordable(self.num_steps, 1, ascents, host.allowance_gradients - function.spent_gradients - 1)

        def search(ascent: Ascent) -> list[float]:
            found: dict[float, list[float]] = {}
            for radius in sorted(self.radii):
                best, stationary = ascent.search(radius, num_steps, self.num_starts, self.tol, generator)
                found[radius] = [best.rise, best.promise(ascent.ball, radius), 0.0 if stationary else 1.0]
            return [number for radius in self.radii for number in found[radius]]

        results = self.mean_over_landscapes(function, search)
        if all(math.isfinite(number) for number in results):
            self._price_gradients = function.spent_gradients
        numbers = iter(results)
        return self.by_radius(
            [
                Estimate(value=rise, standard_error=promise, converged=unfinished == 0.0)
                for rise, promise, unfinished in zip(numbers, numbers, numbers, strict=True)
            ]
        )
