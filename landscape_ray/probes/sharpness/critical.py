"""Critical sharpness: how much longer an update could have been before it raised the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.probes.estimate import UNKNOWN, Estimate
from landscape_ray.probes.fixed_loss import FORWARD, Batches, FixedLoss
from landscape_ray.probes.losses import Loss
from landscape_ray.probes.probe import Host, Need, Probe
from landscape_ray.probes.sharpness.directional import ROUNDING, flat_update
from landscape_ray.probes.sharpness.perturbation import affordable

RANGE = 1e4
"""Multiples of the update between one over this and this are looked at."""

LONGEST_STRIDE = 8.0
"""Factor between one multiple and the next while the crossing is not bracketed."""


def critical_sharpness(
    module: nn.Module,
    loss: Loss,
    batches: Batches,
    update: Tensor,
    *,
    lr: float,
    tol: float = 0.1,
    max_forwards: int = 20,
    eval_mode: bool = True,
) -> Estimate:
    """Return the critical sharpness of the update that led to the present weights, from losses alone.

        2 / eta_c,    eta_c = lr min{a > 0: L(w0 + a D) > L(w0)},    w0 = w - D

    w0 are the weights before the update D, which was made at learning rate lr. For gradient descent on a quadratic it
    is the curvature along the gradient, so that 2 / lr is where the loss rises: at most lambda_1(H). For other
    optimizers it is that of the preconditioned update, and does not compare with the sharpness.

    The crossing is bracketed, and the bracket narrowed around the root of the parabola through its ends and w0: about
    six forwards, exact for a quadratic after the third. Losses that are not finite count as raised. Of several
    crossings, one is found; it need not be the first.

    Args:
        module: any module, float32 or float64, after the update.
        loss: `loss(module, batch)`, the mean loss of one micro-batch.
        batches: pairs `(batch, num_examples)`, batches with `num_examples`, or a single batch.
        update: D, flat over the trainable parameters, (size,).
        lr: at which it was made.
        tol: width of the bracket to reach, relative to its lower end, > 0.
        max_forwards: most evaluations of the loss, >= 4.
        eval_mode: measure in eval mode: no dropout, running batch statistics. False keeps the modes of the host.

    Returns:
        The estimate; its error is half of the bracket, and what rounding adds. `2 / (lr value)` is the multiple of the
        update at which the loss is back where it was; below 1 the update raised it. nan, not converged, where no
        multiple between 1e-4 and 1e4 is a crossing: the direction is uphill from the start, or downhill throughout.

    Raises:
        UserError: an argument out of its range, or a function that cannot be measured.

    References:
        Kalra et al., A scalable measure of loss landscape curvature for analyzing the training dynamics of LLMs, 2026,
        arXiv:2601.16979.

    >>> weight = nn.ParameterList([nn.Parameter(torch.tensor(2.8))])  # from 4 by gradient descent on 1.5 w^2, lr 0.1
    >>> found = critical_sharpness(weight, lambda w, _: 1.5 * w[0] ** 2, [None], torch.tensor([-1.2]), lr=0.1, tol=1e-3)
    >>> round(found.value, 2)
    3.0
    """
    probe = CriticalSharpnessProbe(batches, tol=tol, max_forwards=max_forwards, eval_mode=eval_mode)
    host = Host(update=[update], lr=lr)  # one flat tensor is a list of parts, too
    return probe.measure(module, loss, host)[probe.name]


class CriticalSharpnessProbe(Probe):
    """Critical sharpness of the last update of a training run; the search starts where the last one ended.

    Estimates: `critical_sharpness`, and `critical_sharpness/multiple`, the eta_c / lr that goes with it.

    Before the first update, or where the learning rate is not known or zero: nan, not converged.
    """

    name = "critical_sharpness"
    needs: ClassVar[frozenset[Need]] = frozenset({"update"})
    STATE: ClassVar[tuple[str, ...]] = ("_multiple", "_price_gradients")

    def __init__(
        self, batches: Batches, *, tol: float = 0.1, max_forwards: int = 20, eval_mode: bool = True, seed: int = 0
    ) -> None:
        """Keep the settings.

        Args:
            batches: see :func:`critical_sharpness`; the same at every measurement.
            tol: see :func:`critical_sharpness`.
            max_forwards: see :func:`critical_sharpness`; fewer where the host allows less, but four.
            eval_mode: see :func:`critical_sharpness`.
            seed: of the noise that the loss may contain.

        Raises:
            UserError: an argument out of its range.
        """
        if not (math.isfinite(tol) and tol > 0):
            raise UserError(f"tol must be positive and finite, got {tol}; 0.1 is ten percent")
        if max_forwards < 4:
            raise UserError(f"max_forwards must be at least 4, got {max_forwards}; 20 suffices for most updates")
        super().__init__(batches, eval_mode=eval_mode, seed=seed)
        self.tol, self.max_forwards = tol, max_forwards
        self._multiple: float | None = None
        self._price_gradients = 7 * FORWARD

    @property
    def price_gradients(self) -> float:
        """What the last measurement cost, in gradients on the batches of the probe; a typical price before any."""
        return self._price_gradients

    def _measure(self, function: FixedLoss, host: Host) -> dict[str, Estimate]:
        update = flat_update(function, host)
        if update is None or not host.lr > 0:
            return {self.name: UNKNOWN}
        before = function.spent_gradients
        base = function.value_at(-update)
        rounding = math.sqrt(2) * ROUNDING * torch.finfo(function.dtype).eps * abs(base)
        most = affordable(self.max_forwards, 4, FORWARD, host.allowance_gradients - before)
        crossing = _crossing(
            lambda multiple: function.value_at((multiple - 1) * update) - base,
            self._multiple,
            self.tol,
            most - 1,
            rounding,
        )
        if crossing is None:
            return {self.name: UNKNOWN}
        low, high, noise = crossing
        multiple = math.sqrt(low * high)
        self._multiple, self._price_gradients = multiple, function.spent_gradients - before
        converged = high - low <= self.tol * low and noise <= self.tol * low
        value, error = 2 / (host.lr * multiple), (1 / low - 1 / high) / host.lr + 2 * noise / (host.lr * multiple**2)
        return {
            self.name: Estimate(value=value, standard_error=error, converged=converged),
            f"{self.name}/multiple": Estimate(
                value=multiple, standard_error=(high - low) / 2 + noise, converged=converged
            ),
        }


def _crossing(
    rise: Callable[[float], float], guess: float | None, tol: float, most: int, rounding: float
) -> tuple[float, float, float] | None:
    """Return multiples (low, high) of which the first does not raise the loss and the second does, and the uncertainty.

    That is how far `rounding` of a difference of losses moves the crossing. None where there was no crossing.
    `rise(a) / a` is a straight line for a quadratic: its root is where to look.
    """
    seen: list[tuple[float, float]] = []
    low: tuple[float, float] | None = None
    high: tuple[float, float] | None = None
    multiple, stride = (1.0, 4.0) if guess is None else (guess, 1 + tol)
    for _ in range(most):
        point = (multiple, rise(multiple) / multiple)
        seen.append(point)
        if point[1] <= 0:
            low = point
        else:  # also what is not finite
            high = point
        if low is not None and high is not None:
            if high[0] - low[0] <= tol * low[0]:
                break
            multiple = _inside(low, high, tol)
        else:
            multiple = _beyond(seen, stride, tol, upward=high is None)
            stride = min(stride**2, LONGEST_STRIDE)
            if not 1 / RANGE <= multiple <= RANGE:
                return None
    if low is None or high is None:
        return None
    root = _root(low, high) or high[0]
    # the slope at the crossing, from the largest difference of all: those of close points are mostly rounding
    far = max((p for p in seen if math.isfinite(p[1])), key=lambda p: abs(p[0] * p[1]))
    change = abs(far[0] * far[1]) - rounding
    return low[0], high[0], rounding * abs(root - far[0]) * far[0] / (change * root) if change > 0 else math.inf


def _beyond(seen: list[tuple[float, float]], stride: float, tol: float, *, upward: bool) -> float:
    """Return the next multiple to try, where all so far were on one side: a little beyond the root, or a stride on."""
    multiple = seen[-1][0]
    root = _root(seen[-2], seen[-1]) if len(seen) > 1 else None
    if root is None or (root > multiple) != upward:
        root = multiple * stride if upward else multiple / stride
    root *= 1 + 0.4 * tol if upward else 1 - 0.4 * tol
    return min(max(root, multiple / LONGEST_STRIDE), multiple * LONGEST_STRIDE)


def _root(first: tuple[float, float], second: tuple[float, float]) -> float | None:
    """Return where the line through two points is zero; None where it rises nowhere."""
    slope = (second[1] - first[1]) / (second[0] - first[0])
    return second[0] - second[1] / slope if math.isfinite(slope) and slope > 0 else None


def _inside(low: tuple[float, float], high: tuple[float, float], tol: float) -> float:
    """Return the next multiple to try: just beyond the root, seen from the end that is farther from it."""
    middle = (low[0] + high[0]) / 2
    root = _root(low, high)
    if root is None:
        return middle
    trial = root * (1 - 0.4 * tol) if root > middle else root * (1 + 0.4 * tol)
    # near an end it would hardly narrow the bracket if the line is wrong
    return trial if low[0] + 0.05 * (high[0] - low[0]) < trial < high[0] - 0.05 * (high[0] - low[0]) else middle
