"""Gradient noise scale: from which batch size on larger batches stop paying."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.probes.estimate import UNKNOWN, Estimate
from landscape_ray.probes.fixed_loss import Batches, FixedLoss, observing
from landscape_ray.probes.gradients.pair_formula import Source, jackknife_covariances, pair_table, ratio_estimate
from landscape_ray.probes.gradients.units import MAX_BYTES, agreed, check_max_bytes, jackknife_error
from landscape_ray.probes.losses import Loss
from landscape_ray.probes.operators import HessianOperator
from landscape_ray.probes.probe import Host, Probe


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NoiseScale:
    """Gradient noise scale and what it is made of; batch sizes are in examples.

    Attributes:
        noise_scale: B_simple = tr(S) / |G|^2. Unknown where the estimate of |G|^2 is not positive: the batches are too
            small to tell the gradient from noise, and the scale is of the order of all their examples, or larger.
            `converged` says whether |G|^2 is two of its standard errors away from zero; an error bar of the ratio
            means little before.
        gradient_norm_squared: |G|^2, unbiased; it can be negative.
        covariance_trace: tr(S), of the gradients of single examples, unbiased.
        covariance: between the errors of those two.
        hessian_weighted: B_noise = tr(H S) / (G' H G); unknown where G' H G is not positive; None if not asked for.
    """

    noise_scale: Estimate
    gradient_norm_squared: Estimate
    covariance_trace: Estimate
    covariance: float
    hessian_weighted: Estimate | None = None

    @property
    def critical_batch_size(self) -> float:
        """Batch size where one has to decide: B_noise where it was measured and is positive, else B_simple.

        For plain SGD at its best learning rate for each batch size, to reach the same loss takes
        (1 + B_crit / B) times the least number of steps, and (1 + B / B_crit) times the least number of examples
        (McCandlish et al.). So B_crit costs twice the least of either; a tenth of it saves nearly all of the
        examples that can be saved, ten times it nearly all steps.

        Limits: B_simple is B_noise only if the Hessian is a multiple of the identity; in the paper they differ by small
        factors. It is the scale at the present weights, and grows during training. Adam rescales directions, so its
        critical batch size follows the scale only in order of magnitude, and its learning rate grows with the batch
        by a power between 0.5 and 1 and not as `learning_rate_share`. An example is a row of the inputs: a sequence
        counts as one, whatever its number of tokens.
        """
        weighted = self.hessian_weighted
        if weighted is not None and weighted.value > 0:  # it can be negative, where the loss is not convex
            return weighted.value
        return self.noise_scale.value

    def overheads(self, batch_size: float) -> tuple[float, float]:
        """Return steps and examples that a batch size takes, each as a multiple of the least; nan if unknown.

        Args:
            batch_size: examples in an update, > 0.

        Raises:
            UserError: batch_size is not positive.

        >>> signal, noise = Estimate(value=2.0), Estimate(value=1000.0)
        >>> scale = NoiseScale(
        ...     noise_scale=Estimate(value=500.0), gradient_norm_squared=signal, covariance_trace=noise, covariance=0.0
        ... )
        >>> scale.overheads(1000)
        (1.5, 3.0)
        """
        _check_batch_size(batch_size)
        critical = max(self.critical_batch_size, 0.0)  # roundings, where all gradients are the same
        return 1 + critical / batch_size, 1 + batch_size / critical if critical else math.inf

    def learning_rate_share(self, batch_size: float) -> float:
        """Return the best SGD learning rate at a batch size, as a share of the best for noiseless gradients.

        1 / (1 + B_noise / B) (McCandlish et al.); nan if the scale is unknown.

        Args:
            batch_size: examples in an update, > 0.

        Raises:
            UserError: batch_size is not positive.
        """
        _check_batch_size(batch_size)
        return 1 / (1 + max(self.critical_batch_size, 0.0) / batch_size)


def gradient_noise_scale(
    module: nn.Module,
    loss: Loss,
    batches: Batches,
    *,
    source: Source = "auto",
    num_products: int = 0,
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
) -> NoiseScale:
    """Return the gradient noise scale at the present weights.

    The gradient of b examples has the squared norm |G|^2 + tr(S) / b on average. So the m units that B examples come in
    (micro-batches of b_u, or single examples), with gradients g_u and mean g, give, with b = B / m,

        |G|^2 = (B |g|^2 - b M) / (B - b),    tr(S) = (M - |g|^2) / (1 / b - 1 / B),    M = sum_u (b_u / B) |g_u|^2

    without bias, also for units of unequal size; the ratio of the two is the noise scale. It has a bias of the order
    of its relative variance. Examples are taken as drawn independently. The standard errors are those of the jackknife
    over units. Measured in eval mode: the noise is that of the choice of examples, not of dropout.

    Args:
        module: any module, float32 or float64.
        loss: `loss(module, batch)`; a `DetailedLoss` for single examples.
        batches: see :data:`landscape_ray.probes.fixed_loss.Batches`.
        source: micro_batches, at least 3 of them, at the price of one gradient; examples, far more exact for the same
            data, at 2 to 3 gradients; auto takes micro-batches if there are 8 or the loss cannot be taken apart.
        num_products: units for the Hessian-weighted scale, with one Hessian-vector product each and one for the mean;
            0, or at least 2. The Hessian is that of the loss on all batches, so it is not independent of the gradients;
            that biases the result by an order of 1 / B.
        seed: of the choice of these units.
        max_bytes: of gradients that are kept; those of more units are computed twice.

    Returns:
        The scale, the two that it is the ratio of, and their errors.

    Raises:
        UserError: an argument out of its range, fewer than 3 units, or batches that cannot be measured.

    References:
        McCandlish, Kaplan, Amodei et al., An empirical model of large-batch training, 2018, arXiv:1812.06162.

    >>> from landscape_ray.probes import OutputLoss
    >>> module = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(module.weight)
    >>> loss = OutputLoss(lambda outputs, targets: 0.5 * (outputs - targets) ** 2)
    >>> batch = (torch.ones(4, 1), torch.tensor([[1.0], [2.0], [3.0], [4.0]]))  # gradients -1, -2, -3, -4
    >>> found = gradient_noise_scale(module, loss, [batch], source="examples")
    >>> round(found.covariance_trace.value, 3), round(found.gradient_norm_squared.value, 3)
    (1.667, 5.833)
    """
    began = time.perf_counter()
    _check(source, num_products)
    with observing(module, loss, batches) as function:
        if not function.finite:
            weighted = UNKNOWN if num_products else None
            return NoiseScale(
                noise_scale=UNKNOWN,
                gradient_norm_squared=UNKNOWN,
                covariance_trace=UNKNOWN,
                covariance=math.nan,
                hessian_weighted=weighted,
            )
        found = _read(*pair_table(function, source, num_products, seed, max_bytes))
    scale = dataclasses.replace(
        found.noise_scale, price_gradients=function.spent_gradients, cost_seconds=time.perf_counter() - began
    )
    return dataclasses.replace(found, noise_scale=scale)


def combine(measurements: Sequence[NoiseScale]) -> NoiseScale:
    """Return the noise scale from several measurements on independent batches, averaged before dividing.

    For batches that are drawn anew at each step. Where each measurement is on the same ones, as in a probe, their
    errors are not independent: use the probe's `smoothing`. Hessian-weighted scales are not combined.

    Args:
        measurements: at least one, all finite.

    Raises:
        UserError: there is none, or one of them could not be measured.
    """
    if not measurements:
        raise UserError("measurements must hold at least one, got none")
    parts = [(m.gradient_norm_squared, m.covariance_trace) for m in measurements]
    if not all(math.isfinite(part.value) for pair in parts for part in pair):
        raise UserError("measurements must be finite, got one of non-finite weights or losses; leave it out")
    num = len(parts)
    values = torch.tensor([[part.value for part in pair] for pair in parts], dtype=torch.float64).mean(0)
    errors = torch.tensor([[part.standard_error for part in pair] for pair in parts], dtype=torch.float64)
    first, second = (errors.square().sum(0) / num**2).tolist()
    covariance = math.fsum(m.covariance for m in measurements) / num**2
    scale = ratio_estimate(values.tolist(), first, second, covariance, route="combined")
    return NoiseScale(
        noise_scale=dataclasses.replace(
            scale,
            num_matvecs=sum(m.noise_scale.num_matvecs for m in measurements),
            price_gradients=math.fsum(m.noise_scale.price_gradients for m in measurements),
            cost_seconds=math.fsum(m.noise_scale.cost_seconds for m in measurements),
        ),
        gradient_norm_squared=Estimate(value=float(values[0]), standard_error=math.sqrt(first), route="combined"),
        covariance_trace=Estimate(value=float(values[1]), standard_error=math.sqrt(second), route="combined"),
        covariance=covariance,
    )


def _read(table: Tensor, route: str, num_matvecs: int) -> NoiseScale:
    values, left_out = table[:, 0].tolist(), table[:, 1:]
    errors = jackknife_error(left_out).tolist()
    covariances = jackknife_covariances(left_out)
    signal, noise = (
        Estimate(value=value, standard_error=error, route=route)
        for value, error in zip(values[:2], errors[:2], strict=True)
    )
    plain, *weighted = (
        ratio_estimate(values[i : i + 2], errors[i] ** 2, errors[i + 1] ** 2, covariances[i // 2], route=route)
        for i in range(0, len(values), 2)
    )
    return NoiseScale(
        noise_scale=plain,
        gradient_norm_squared=signal,
        covariance_trace=noise,
        covariance=covariances[0],
        hessian_weighted=dataclasses.replace(weighted[0], num_matvecs=num_matvecs) if weighted else None,
    )


def _check(source: str, num_products: int) -> None:
    if source not in get_args(Source):
        raise UserError(f"source must be one of {', '.join(get_args(Source))}, got '{source}'")
    if num_products < 0 or num_products == 1:
        raise UserError(f"num_products must be 0 or at least 2, got {num_products}; 16 is a start")


def _check_batch_size(batch_size: float) -> None:
    if not batch_size > 0:
        raise UserError(f"batch_size must be positive, got {batch_size}")


class GradientNoiseScaleProbe(Probe):
    """The gradient noise scale along a training run.

    With `smoothing`, |G|^2 and tr(S) are averaged over measurements before dividing, with weights that decay by that
    factor from one to the next; an average over another number of units is dropped. The same goes for the values with
    one unit left out, so the errors stay right although all measurements are on the same examples.
    """

    name = "gradient_noise_scale"
    STATE: ClassVar[tuple[str, ...]] = ("_average", "_weight", "_price_gradients")

    def __init__(
        self,
        batches: Batches,
        *,
        source: Source = "auto",
        num_products: int = 0,
        smoothing: float = 0.0,
        max_bytes: int = MAX_BYTES,
        seed: int = 0,
    ) -> None:
        """Keep the settings.

        Args:
            batches: see :func:`gradient_noise_scale`; the same at every measurement.
            source: see :func:`gradient_noise_scale`.
            num_products: see :func:`gradient_noise_scale`; fewer where the allowance is smaller.
            smoothing: share of the average that earlier measurements keep, in [0, 1); 0 forgets them.
            max_bytes: see :func:`gradient_noise_scale`.
            seed: of the units for the Hessian-weighted scale, others each time.

        Raises:
            UserError: an argument out of its range.
        """
        _check(source, num_products)
        check_max_bytes(max_bytes)
        if not 0 <= smoothing < 1:
            raise UserError(f"smoothing must be at least 0 and below 1, got {smoothing}; 0 is no average")
        super().__init__(batches, seed=seed)
        self.source, self.num_products, self.smoothing, self.max_bytes = source, num_products, smoothing, max_bytes
        self._average: Tensor | None = None
        self._weight = 0.0
        self._price_gradients: float | None = None

    @property
    def price_gradients(self) -> float:
        """What the last measurement cost, in gradients on the batches of the probe; a typical price before any."""
        if self._price_gradients is None:
            setup, each = HessianOperator.prices(False)
            return 2.5 + (setup + each * (self.num_products + 1) if self.num_products else 0.0)
        return self._price_gradients

    def _measure(self, function: FixedLoss, host: Host) -> dict[str, Estimate]:
        table, route, num_matvecs = pair_table(
            function,
            self.source,
            self.num_products,
            self.seed + self._num_measured,
            self.max_bytes,
            host.allowance_gradients,
        )
        if bool(table.isfinite().all()):
            table = self._averaged(table)
            self._price_gradients = agreed(function.spent_gradients)
        found = _read(table, route, num_matvecs)
        result: dict[str, Estimate] = {
            self.name: found.noise_scale,
            f"{self.name}/gradient_norm_squared": found.gradient_norm_squared,
            f"{self.name}/covariance_trace": found.covariance_trace,
        }
        if found.hessian_weighted is not None:
            result[f"{self.name}/hessian_weighted"] = found.hessian_weighted
        return result

    def _averaged(self, table: Tensor) -> Tensor:
        if self.smoothing == 0:
            return table
        if self._average is None or self._average.shape != table.shape:  # of a run with another batch size
            self._average, self._weight = torch.zeros_like(table), 0.0
        earlier = self._average.to(table.device)
        kept = self.smoothing * self._weight
        self._weight = kept + 1.0
        self._average = (kept * earlier + table) / self._weight
        return self._average
