"""Signal and noise of gradients from their squared norms at two batch sizes, with errors by the jackknife."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from landscape_ray.errors import UserError
from landscape_ray.probes.estimate import UNKNOWN, Estimate
from landscape_ray.probes.fixed_loss import FixedLoss
from landscape_ray.probes.gradients.per_example import ExampleGradients
from landscape_ray.probes.gradients.units import Gradients, MicroBatchGradients, agreed, gathered
from landscape_ray.probes.losses import DetailedLoss, detailed
from landscape_ray.probes.operators import HessianOperator

Source: TypeAlias = Literal["auto", "micro_batches", "examples"]
"""Whose gradients are compared; see :func:`pair_table`."""

ENOUGH_MICRO_BATCHES = 8
"""From which number on their spread says how large it is itself; fewer give way to single examples."""


def pair_table(
    function: FixedLoss,
    source: Source,
    num_products: int,
    seed: int,
    max_bytes: int,
    allowance_gradients: float = math.inf,
) -> tuple[Tensor, str, int]:
    """Return |G|^2 and tr(S), then G' H G and tr(H S) if `num_products`: a row for each.

    Args:
        function: whose gradients, in eval mode.
        source: see :data:`Source`; auto takes micro-batches if there are 8, or the loss cannot be taken apart.
        num_products: units whose own product with the Hessian is computed; 0, or at least 2.
        seed: of the choice of these units.
        max_bytes: of gradients that are kept.
        allowance_gradients: takes fewer products, 2 at least; it covers what was spent before, too.

    Returns:
        Values in the first column, those with one unit left out in the others, (2 or 4, 1 + m) float64; the route of
        the gradients; the number of Hessian-vector products.

    Raises:
        UserError: fewer than 3 units, or a loss that cannot be taken apart.
    """
    gradients = _gradients(function, source, max_bytes)
    sizes, num = gradients.sizes, len(gradients)
    if num < 3:
        raise UserError(f"batches must hold at least 3 {gradients.route}, got {num}; their spread is what is measured")
    norms, mean, _ = gradients.means()
    if not num_products:
        (with_mean,) = gradients.products(mean)
        return pair_estimates(sizes, norms, with_mean, torch.arange(num)), gradients.route, 0
    hessian = HessianOperator(function)
    with_mean, with_product = gradients.products(mean, hessian(mean))
    if math.isfinite(allowance_gradients):
        each = hessian.matvec_gradients + agreed(gradients.row_price)
        left = allowance_gradients - agreed(function.spent_gradients)
        num_products = max(2, min(num_products, int(left / each)))
    chosen = torch.randperm(num, generator=torch.Generator().manual_seed(seed))[:num_products].sort().values
    curvatures = torch.zeros_like(norms)
    for index in chosen.tolist():
        row = gradients.row(index)
        curvatures[index] = row.double() @ hessian(row).double()
    plain = pair_estimates(sizes, norms, with_mean, torch.arange(num))
    table = torch.cat([plain, pair_estimates(sizes, curvatures, with_product, chosen)])
    return table, gradients.route, hessian.num_matvecs


def _gradients(function: FixedLoss, source: Source, max_bytes: int) -> Gradients:
    if source == "auto":
        num = len(gathered(torch.zeros(len(function.batches), device=function.device))[0])  # of all processes
        together = num >= (3 if not isinstance(function.loss, DetailedLoss) else ENOUGH_MICRO_BATCHES)
        source = "micro_batches" if together else "examples"
    if source == "micro_batches":
        return MicroBatchGradients(function, max_bytes=max_bytes)
    return ExampleGradients(function, detailed(function.loss, "gradients of examples"), max_bytes=max_bytes)


def pair_estimates(sizes: Tensor, squares: Tensor, with_mean: Tensor, chosen: Tensor) -> Tensor:
    """Return the two estimates of the pair formula, (2, 1 + m).

    Args:
        sizes: b_u, (m,).
        squares: g_u' A g_u, (m,), for A = 1 or H; those of units that are not chosen are not used.
        with_mean: g' A g_u for the mean gradient g, (m,).
        chosen: indices, of k units.
    """
    total = sizes.sum()
    mean = (sizes * with_mean).sum() / total
    picked = torch.zeros_like(sizes).index_fill_(0, chosen.to(sizes.device), 1.0)
    size, count = (picked * sizes).sum(), picked.sum()
    square = (picked * sizes * squares).sum() / size
    left = total - sizes
    # what leaving a unit out does to the mean needs its own square; that of one not chosen is taken as the average
    known = torch.where(picked > 0, squares, square)
    mean_left = (total**2 * mean - 2 * total * sizes * with_mean + sizes**2 * known) / left**2
    size_left, count_left = size - picked * sizes, count - picked
    square_left = (size * square - picked * sizes * squares) / size_left
    big, small, at_big, at_small = (
        torch.cat([whole.reshape(1), others])
        for whole, others in (
            (total, left),
            (size / count, size_left / count_left),
            (mean, mean_left),
            (square, square_left),
        )
    )
    signal = (big * at_big - small * at_small) / (big - small)
    noise = (at_small - at_big) / (1 / small - 1 / big)
    return torch.stack([signal, noise])


def jackknife_covariances(left_out: Tensor) -> list[float]:
    """Return the covariance of each pair of rows."""
    num = left_out.shape[1]
    deviations = left_out - left_out.mean(1, keepdim=True)
    return ((num - 1) / num * (deviations[0::2] * deviations[1::2]).sum(1)).tolist()


def ratio_estimate(values: Sequence[float], first: float, second: float, covariance: float, *, route: str) -> Estimate:
    """Return second / first with its error to first order, from their variances; unknown for first <= 0."""
    signal, noise = values
    if not (signal > 0 and math.isfinite(noise)):
        return dataclasses.replace(UNKNOWN, route=route)
    ratio = noise / signal
    variance = max(0.0, second - 2 * ratio * covariance + ratio**2 * first) / signal**2
    return Estimate(
        value=ratio, standard_error=math.sqrt(variance), converged=signal > 2 * math.sqrt(first), route=route
    )
