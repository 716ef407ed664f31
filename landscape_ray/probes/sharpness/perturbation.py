"""Neighbourhoods of the weights: in which units they are measured, which shape they have, on which examples.

A displacement is `d = T z` with a diagonal `T >= 0` and z in a ball of radius rho:

    standard      T = 1
    elementwise   T_i = |w_i| + eta                     relative changes of single weights
    filterwise    T_i = ||w_f|| + eta, i in filter f    relative changes of whole filters

A filter is what belongs to one output: a slice along the first dimension of a parameter with at least two (a row of a
linear layer, a token of an embedding). Parameters with one dimension or none (biases, gains of norms) have no filters
and count element by element, as in ASAM. All parameters that the function looks at are moved, biases and gains
included; with `one_dimensional=False` those stay where they are.

With T in front of z nothing is divided by a weight: a weight at zero stays there, which is the limit of the definition
`||T^-1 d|| <= rho`. ASAM trains with eta = 0.01, which lets it move; every eta > 0 gives up the invariance to
rescaled layers that T is for.

References:
    Kwon et al., ASAM: adaptive sharpness-aware minimization for scale-invariant learning of deep neural networks,
    2021, arXiv:2102.11600.
    Andriushchenko et al., A modern look at the relationship between sharpness and generalization, 2023,
    arXiv:2302.07011.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.probes.estimate import Estimate
from landscape_ray.probes.fixed_loss import FORWARD, Batches, FixedLoss
from landscape_ray.probes.losses import Loss, detailed
from landscape_ray.probes.probe import NOBODY, Host, Probe
from landscape_ray.probes.sharpness.logits import NormalisedLogits

Scaling: TypeAlias = Literal["standard", "elementwise", "filterwise"]
"""The units T of a displacement; see above."""

Norm: TypeAlias = Literal["l2", "linf"]
"""Of the ball that z lies in."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ball:
    """The unit ball of z, and the units T in which it is measured.

    Attributes:
        scale: T, (size,); zero where a weight must not move.
        norm: see :data:`Norm`.
    """

    scale: Tensor
    norm: Norm

    def steepest(self, slope: Tensor) -> Tensor:
        """Return the z of the unit ball with the largest `slope . z`; zero where the slope is zero.

        Args:
            slope: gradient by z, `T g`, (size,).
        """
        if self.norm == "linf":
            return slope.sign()
        length = torch.linalg.vector_norm(slope)
        return slope / length if float(length) > 0 else slope

    def reach(self, slope: Tensor) -> float:
        """Return that largest `slope . z`: the dual norm of the slope."""
        return float(torch.linalg.vector_norm(slope, ord=1 if self.norm == "linf" else 2))

    def project(self, z: Tensor, radius: float) -> Tensor:
        """Return the point next to z in the ball of this radius."""
        if self.norm == "linf":
            return z.clamp(-radius, radius)
        length = float(torch.linalg.vector_norm(z))
        return z * (radius / length) if length > radius else z

    def draw_noise(self, generator: torch.Generator) -> Tensor:
        """Return z with independent entries: standard normal (l2), or uniform on [-1, 1] (linf); 0 where T is 0."""
        shape, dtype = self.scale.shape, self.scale.dtype
        if self.norm == "linf":
            noise = 2 * torch.rand(shape, generator=generator, dtype=dtype) - 1
        else:
            noise = torch.randn(shape, generator=generator, dtype=dtype)
        return noise.to(self.scale.device) * (self.scale > 0)

    def draw_boundary(self, generator: torch.Generator) -> Tensor:
        """Return a random z of length 1: uniform on the sphere (l2), or a random corner of the cube (linf)."""
        return self.steepest(self.draw_noise(generator))


def ball_around(
    function: FixedLoss, *, scaling: Scaling, norm: Norm, eta: float = 0.0, one_dimensional: bool = True
) -> Ball:
    """Return the unit ball around the present weights; the arguments are those of :class:`PerturbationProbe`."""
    parts = []
    for parameter in function.parameters:
        weight = parameter.detach()
        if weight.dim() < 2 and not one_dimensional:
            parts.append(torch.zeros_like(weight))
        elif scaling == "standard":
            parts.append(torch.ones_like(weight))
        elif scaling == "filterwise" and weight.dim() >= 2:
            lengths = torch.linalg.vector_norm(weight.flatten(1), dim=1)
            parts.append((lengths + eta).view(-1, *[1] * (weight.dim() - 1)).expand_as(weight))
        else:
            parts.append(weight.abs() + eta)
    return Ball(scale=function.flatten(parts), norm=norm)


class Landscape(Protocol):
    """The loss as a function of the displacement."""

    def value_at(self, displacement: Tensor) -> float:
        """Return L(w + displacement)."""
        ...

    def gradient_at(self, displacement: Tensor) -> tuple[float, Tensor]:
        """Return L and its gradient at w + displacement."""
        ...


class Subset:
    """The mean loss on some examples of one micro-batch, on this process alone.

    Attributes:
        share: of these examples in the whole function.
    """

    def __init__(self, function: FixedLoss, examples: Any, share: float, price: float) -> None:
        """Keep them; `price` is that of a gradient on them."""
        self.function, self.examples, self.share, self._price = function, examples, share, price

    def value_at(self, displacement: Tensor) -> float:
        """Return L(w + displacement)."""
        function = self.function
        function.spent_gradients += FORWARD * self._price
        with function.moved_by(displacement), function.surroundings(), torch.no_grad():
            return float(function.evaluate(self.examples))

    def gradient_at(self, displacement: Tensor) -> tuple[float, Tensor]:
        """Return L and its gradient at w + displacement."""
        function = self.function
        function.spent_gradients += self._price
        with function.moved_by(displacement), function.surroundings():
            value, gradient = function.differentiate(self.examples)
        return float(value), function.flatten(gradient)


def subsets_of(function: FixedLoss, num_examples: int) -> list[Subset]:
    """Return the micro-batches cut, in their order, into subsets of `num_examples`, the last of each perhaps smaller.

    Raises:
        UserError: the loss cannot be taken apart, or a batch is not `(inputs, targets)`.
    """
    detailed(function.loss, "a sharpness on subsets of the examples")
    here = math.fsum(share for _, share in function.batches)
    subsets = []
    for batch, share in function.batches:
        if not (isinstance(batch, tuple) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
            raise UserError(
                f"batches must be pairs of tensors (inputs, targets) to be cut into subsets, got "
                f"{type(batch).__name__}; set subset_examples to 0"
            )
        inputs, targets = batch
        for chosen in zip(inputs.split(num_examples), targets.split(num_examples), strict=True):
            part = share * len(chosen[0]) / len(inputs)
            subsets.append(Subset(function, chosen, part, part / here))
    return subsets


class PerturbationProbe(Probe):
    """What the probes of this room share that displace the weights: the settings, and radii as parts of the result."""

    def __init__(
        self,
        batches: Batches,
        *,
        radii: Sequence[float],
        scaling: Scaling,
        norm: Norm,
        eta: float,
        one_dimensional: bool,
        normalise_logits: bool,
        eval_mode: bool,
        seed: int,
    ) -> None:
        """Keep the settings.

        Args:
            batches: see :data:`landscape_ray.probes.fixed_loss.Batches`; the same at every measurement.
            radii: rho, in units of T; the first gives the main estimate, the others `name/rho_0.1` and so on.
            scaling: the units T: standard, elementwise, or filterwise.
            norm: of the ball of z: l2 or linf.
            eta: added to T, >= 0; 0 lets weights at zero rest.
            one_dimensional: whether parameters with less than two dimensions are moved, too.
            normalise_logits: measure with outputs of unit length; see :class:`NormalisedLogits`.
            eval_mode: measure in eval mode: no dropout, running batch statistics. False keeps the modes of the host.
            seed: of random starts and samples.

        Raises:
            UserError: an argument out of its range.
        """
        if (
            not radii
            or not all(math.isfinite(r) and r > 0 for r in radii)
            or len({f"{r:g}" for r in radii}) < len(radii)
        ):
            raise UserError(
                f"radii must be one or more different numbers, positive and finite, got {list(radii)}; "
                "0.05 is usual for SAM"
            )
        for field, given, known in (("scaling", scaling, Scaling), ("norm", norm, Norm)):
            if given not in get_args(known):
                raise UserError(f"{field} must be one of {', '.join(get_args(known))}, got '{given}'")
        if not (math.isfinite(eta) and eta >= 0):
            raise UserError(f"eta must be finite and at least 0, got {eta}; ASAM trains with 0.01")
        if eta and scaling == "standard":
            raise UserError(f"eta must be 0 where scaling is standard, got {eta}; there is nothing to add it to")
        super().__init__(batches, eval_mode=eval_mode, seed=seed)
        self.radii, self.scaling, self.norm, self.eta = list(radii), scaling, norm, eta
        self.one_dimensional, self.normalise_logits = one_dimensional, normalise_logits

    def measure(self, module: nn.Module, loss: Loss, host: Host = NOBODY) -> dict[str, Estimate]:
        """Return the estimates at the present weights, by name; see :meth:`Probe.measure`."""
        return super().measure(module, NormalisedLogits(loss) if self.normalise_logits else loss, host)

    def ball(self, function: FixedLoss) -> Ball:
        """Return the unit ball around the present weights.

        Raises:
            UserError: no weight may move.
        """
        ball = ball_around(
            function, scaling=self.scaling, norm=self.norm, eta=self.eta, one_dimensional=self.one_dimensional
        )
        if not bool(ball.scale.any()):
            raise UserError(
                "module must have weights that may move, got none: all are zero or in parameters left out; "
                "set eta above 0, or one_dimensional to true"
            )
        return ball

    def generator(self) -> torch.Generator:
        """Return the generator of this measurement, on the CPU: the same numbers for every device."""
        return torch.Generator().manual_seed(self.seed + self._num_measured)

    def by_radius(self, estimates: Sequence[Estimate]) -> dict[str, Estimate]:
        """Return one estimate for each radius, by name."""
        names = [self.name, *(f"{self.name}/rho_{radius:g}" for radius in self.radii[1:])]
        return dict(zip(names, estimates, strict=True))


def affordable(wanted: int, least: int, price: float, allowance: float) -> int:
    """Return how many of `wanted` things at a price each the allowance pays for, but at least `least`."""
    return max(least, int(min(float(wanted), allowance / price)))
