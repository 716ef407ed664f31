"""The trace of the Hessian as the trace of the Gauss-Newton matrix and that of the rest.

    H = G + R,    R = sum_i share_i sum_j (d L_i / d z_ij) (d2 z_ij / d w2),    z_i the outputs of micro-batch i

Large eigenvalues, which make up the variance of samples of a trace, belong to G, and samples of tr G cost a backward
pass instead of a product (:mod:`landscape_ray.probes.spectrum.ggn_trace`). R, the curvature of the network itself, has
hardly any outliers: of a GPT and a residual net, 200 updates old, one sample of tr H varies by 19 and 29 % of tr H, one
of tr R by 9 and 14 %, so that a fourth of the products suffices. R is the Hessian of another function, the outputs
weighted by the present gradient of the loss in them, and so has its products from the same operators.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from landscape_ray.probes.estimate import UNKNOWN, Estimate
from landscape_ray.probes.fixed_loss import FORWARD, FixedLoss
from landscape_ray.probes.losses import DetailedLoss
from landscape_ray.probes.operators.checked import CheckedHessian, Products
from landscape_ray.probes.operators.gauss_newton import closed_form_hessian, holds
from landscape_ray.probes.operators.hessian import HessianOperator
from landscape_ray.probes.spectrum.ggn_trace import GGNTraceSampling
from landscape_ray.probes.spectrum.sign_samples import MIN_SAMPLES, SignSamples, random_signs

MOST_SAMPLES = 100
"""Of tr G."""

Rows = tuple[Tensor, Tensor]
"""Inputs, and the gradient of the mean loss in their outputs."""


def weighted_outputs(module: nn.Module, batch: Rows) -> Tensor:
    """Return the sum of the outputs, each times its weight: the loss to first order in them, but for a constant."""
    inputs, cotangent = batch
    outputs: Tensor = module(inputs)
    return (outputs * cotangent).sum()


def rest_of(function: FixedLoss) -> FixedLoss | None:
    """Return the function whose Hessian is H - G; None where the loss cannot be taken apart.

    That takes a `DetailedLoss` of which all is in `per_target`, and whose curvature in the outputs is that of its
    likelihood. Two thirds of a gradient, counted by `function`; what is made of the result is counted by itself.
    """
    loss = function.loss
    if not isinstance(loss, DetailedLoss) or loss.likelihood is None:
        return None
    found: list[tuple[Rows, float]] = []
    fits = True
    value = torch.zeros((), dtype=torch.float64, device=function.device)
    with function.surroundings():
        for batch, share in function.batches:
            if not (isinstance(batch, tuple) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
                fits = False
                break
            inputs, targets = batch
            function.seed_noise()
            with torch.no_grad():
                outputs: Any = function.module(inputs)
            if not isinstance(outputs, Tensor):
                fits = False
                break
            leaf = outputs.detach().requires_grad_()
            mean = loss.per_target(leaf, targets).mean()
            (cotangent,) = torch.autograd.grad(mean, leaf)
            matrix = closed_form_hessian(loss, leaf.detach())
            if not found:  # one micro-batch tells of all
                fits = matrix is not None and holds(matrix, loss, leaf.detach(), targets)
            value += share * mean.detach()
            found.append(((inputs, cotangent), share))
        # processes must go the same way
        fits = not bool(function.reduce(torch.tensor(float(not fits), device=function.device)))
        mean_loss = float(function.reduce(value))
    function.spent_gradients += FORWARD
    if not fits:
        return None
    whole = function.value()
    if not abs(whole - mean_loss) <= 1e-5 * abs(whole):  # the loss has something beside, such as a penalty
        return None
    return FixedLoss(function.module, weighted_outputs, found, parameters=function.parameters, seed=function.seed)


def split_trace(
    function: FixedLoss,
    rest: FixedLoss,
    tol: float,
    max_matvecs: int,
    route: Products,
    seed: int,
    *,
    check_exactly: bool = True,
    allowance_gradients: float = math.inf,
) -> Estimate:
    """Return the trace of the Hessian at finite weights; the cost is counted by `function`.

    Samples are taken of the part of which one more is expected to take the variance down by most for what it costs,
    until the error of the sum meets the tolerance.

    Args:
        function: whose Hessian.
        rest: as `rest_of` gives it.
        tol: standard error to reach, relative to the trace.
        max_matvecs: most products with R, those of a check not counted, >= 2.
        route: how they are computed.
        seed: of all random signs.
        check_exactly: in route auto, check by an exact product; else by a central difference, cheaper.
        allowance_gradients: most that `function` should have spent at the end; two products and a sample of tr G are
            always taken.
    """
    assert isinstance(function.loss, DetailedLoss)
    generator = torch.Generator().manual_seed(seed)
    signs = random_signs(rest.size, generator, rest.dtype, rest.device)
    checked = CheckedHessian(rest, route, signs, check_exactly=check_exactly) if route != "exact" else None
    product = HessianOperator(rest) if checked is None else checked
    large, small = GGNTraceSampling(function, function.loss, seed), SignSamples()

    def left() -> float:
        return allowance_gradients - function.spent_gradients - rest.spent_gradients

    least = min(MIN_SAMPLES, max_matvecs, max(2, product.most_products(left() - large.price, max_matvecs)))
    while True:
        if len(small.forms) < least:
            small.add(signs, product(signs))
            signs = random_signs(rest.size, generator, rest.dtype, rest.device)
            continue
        if not large.num:
            large.sample()
        known, error = large.value_and_error()
        bias = 0.0 if checked is None else checked.deviation * small.trace
        value, own = known + small.trace, math.hypot(small.standard_error, bias)
        converged = math.hypot(error, own) <= tol * abs(value)
        if converged or not math.isfinite(value):
            break
        # a sample more takes an n-th of the variance off
        if error**2 / (large.num * large.price) >= small.standard_error**2 / (
            len(small.forms) * product.matvec_gradients
        ):
            if large.num == MOST_SAMPLES or large.price > left():
                break
            large.sample()
        else:
            if len(small.forms) == max_matvecs or product.matvec_gradients > left():
                break
            small.add(signs, product(signs))
            signs = random_signs(rest.size, generator, rest.dtype, rest.device)
    function.spent_gradients += rest.spent_gradients
    num_matvecs = product.num_matvecs if checked is None else checked.num_spent
    if not math.isfinite(value):
        return dataclasses.replace(UNKNOWN, num_matvecs=num_matvecs)
    differences = checked is not None and checked.by_differences
    return Estimate(
        value=value,
        standard_error=math.hypot(error, own),
        num_matvecs=num_matvecs,
        converged=converged and (checked is None or checked.trusted),
        route="split, finite differences" if differences else "split",
    )
