"""Coherence: how many examples a step along the gradient of one of them helps."""

from __future__ import annotations

import dataclasses
import time
from typing import ClassVar

import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.probes.estimate import UNKNOWN, Estimate
from landscape_ray.probes.fixed_loss import Batches, FixedLoss, observing
from landscape_ray.probes.gradients.per_example import ExampleGradients
from landscape_ray.probes.gradients.units import MAX_BYTES, agreed, check_max_bytes, inverse_roots, jackknife_error
from landscape_ray.probes.losses import DetailedLoss, detailed
from landscape_ray.probes.probe import Host, Probe


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Coherence:
    """How alike the gradients of m examples are.

    Attributes:
        m_coherence: m |mean g|^2 / mean |g_i|^2, in [0, m]: 1 for orthogonal gradients, m for identical ones, below 1
            where they cancel. It grows with m, unless they are orthogonal: compare at the same number of examples.
        mean_cosine: of the pairs of different examples; does not depend on m on average. Zero gradients count as
            orthogonal to all.
        num_examples: m.
    """

    m_coherence: Estimate
    mean_cosine: Estimate
    num_examples: int


def gradient_coherence(
    module: nn.Module, loss: DetailedLoss, batches: Batches, *, max_bytes: int = MAX_BYTES
) -> Coherence:
    """Return the m-coherence of the examples' gradients at the present weights, in eval mode.

    The standard errors are those of the jackknife over examples: of the same statistic on another draw of m examples.

    Args:
        module: any module, float32 or float64.
        loss: see :class:`landscape_ray.probes.fixed_loss.DetailedLoss`.
        batches: of `(inputs, targets)`, with 3 examples at least; all examples count the same.
        max_bytes: of gradients that are kept; those of more examples are computed twice.

    Returns:
        The coherence; unknown where weights or gradients are not finite, or all gradients are zero.

    Raises:
        UserError: a loss that cannot be taken apart, or batches that are not rows of at least 3 examples.

    References:
        Chatterjee and Zielinski, Making coherence out of nothing at all, 2020, arXiv:2008.01217.

    >>> from landscape_ray.probes import OutputLoss
    >>> module = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.zeros_(module.weight)
    >>> loss = OutputLoss(lambda outputs, targets: 0.5 * (outputs - targets) ** 2)
    >>> batch = (torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), torch.ones(4, 1))
    >>> round(gradient_coherence(module, loss, [batch]).m_coherence.value, 4)  # two of each kind
    2.0
    """
    began = time.perf_counter()
    with observing(module, loss, batches) as function:
        found = Coherence(m_coherence=UNKNOWN, mean_cosine=UNKNOWN, num_examples=0)
        if function.finite:
            found = _coherence(function, max_bytes)
    main = dataclasses.replace(
        found.m_coherence, price_gradients=function.spent_gradients, cost_seconds=time.perf_counter() - began
    )
    return dataclasses.replace(found, m_coherence=main)


def _coherence(function: FixedLoss, max_bytes: int) -> Coherence:
    gradients = ExampleGradients(function, detailed(function.loss, "gradients of examples"), max_bytes=max_bytes)
    num = len(gradients)
    if num < 3:
        raise UserError(f"batches must hold at least 3 examples, got {num}; their pairs are what is measured")
    norms, mean, unit_mean = gradients.means()
    with_mean, with_unit_mean = gradients.products(mean, unit_mean)
    there = (norms > 0).double()
    return Coherence(
        m_coherence=_with_error(*_coherences(norms, with_mean), gradients.route),
        mean_cosine=_with_error(*_cosines(there, with_unit_mean * inverse_roots(norms)), gradients.route),
        num_examples=num,
    )


def _coherences(norms: Tensor, with_mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return m |mean g|^2 / mean |g_i|^2, and m times that ratio with one example left out, (m,)."""
    num = len(norms)
    total, square = norms.sum(), num * with_mean.sum()  # the square of the sum of all gradients
    others, square_left = total - norms, square - 2 * num * with_mean + norms
    left = torch.where(others > 0, square_left / others, 1.0)  # zeros are orthogonal
    return square / total, left * num / (num - 1)


def _cosines(norms: Tensor, with_mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean product of pairs of gradients of length one or zero, and that with one left out, (m,)."""
    num = len(norms)
    total, square = norms.sum(), num * with_mean.sum()
    left = square - 2 * num * with_mean + norms - (total - norms)
    return (square - total) / (num * (num - 1)), left / ((num - 1) * (num - 2))


def _with_error(value: Tensor, left_out: Tensor, route: str) -> Estimate:
    if not bool(value.isfinite()):
        return dataclasses.replace(UNKNOWN, route=route)
    return Estimate(value=float(value), standard_error=float(jackknife_error(left_out)), route=route)


class GradientCoherenceProbe(Probe):
    """The m-coherence of the examples of the batches along a training run."""

    name = "gradient_coherence"
    examples_apart = True
    STATE: ClassVar[tuple[str, ...]] = ("_price_gradients",)

    def __init__(self, batches: Batches, *, max_bytes: int = MAX_BYTES, seed: int = 0) -> None:
        """Keep the settings.

        Args:
            batches: see :func:`gradient_coherence`; the same at every measurement.
            max_bytes: see :func:`gradient_coherence`.
            seed: of noise that the loss may contain.

        Raises:
            UserError: an argument out of its range.
        """
        check_max_bytes(max_bytes)
        super().__init__(batches, seed=seed)
        self.max_bytes = max_bytes
        self._price_gradients = 2.5

    @property
    def price_gradients(self) -> float:
        """What the last measurement cost, in gradients on the batches of the probe; a typical price before any."""
        return self._price_gradients

    def _measure(self, function: FixedLoss, host: Host) -> dict[str, Estimate]:
        found = _coherence(function, self.max_bytes)
        self._price_gradients = agreed(function.spent_gradients)
        return {self.name: found.m_coherence, f"{self.name}/mean_cosine": found.mean_cosine}
