"""The spectral density of a curvature matrix, at the present weights and along a run."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from landscape_ray.probes.estimate import Estimate
from landscape_ray.probes.fixed_loss import Batches, FixedLoss, observing
from landscape_ray.probes.losses import Loss
from landscape_ray.probes.operators.checked import CheckedHessian, Products, check_route
from landscape_ray.probes.operators.hessian import HessianOperator
from landscape_ray.probes.operators.jacobian import JacobianOperator
from landscape_ray.probes.probe import Host, Probe
from landscape_ray.probes.spectrum.eigenpairs import (
    FLOOR,
    Curvature,
    check_curvature,
    curvature_operator,
    expected_price,
)
from landscape_ray.probes.spectrum.quadrature import (
    MAX_RESIDUAL,
    SpectralDensity,
    check_quadrature,
    lanczos_quadrature,
    unknown_density,
)
from landscape_ray.probes.spectrum.sign_samples import random_signs

STEP = 0.002
"""Of differences, in float32: a step of 0.005, which suits a random vector, is 1.8 percent off at the largest
eigenvalue of a ReLU residual net with 269k weights. With 0.002 products with random vectors are off by up to 1.3
percent, mostly by rounding, of which their quadratic forms hardly see anything."""


def spectral_density(
    module: nn.Module,
    loss: Loss,
    batches: Batches,
    *,
    curvature: Curvature = "hessian",
    num_steps: int = 80,
    num_vectors: int = 2,
    sigma: float | None = None,
    min_gap: float = 0.25,
    route: Products = "exact",
    seed: int = 0,
    eval_mode: bool = True,
) -> SpectralDensity:
    """Return the density of the eigenvalues of a curvature matrix at the present weights, with trace, norm and edges.

    Bulk and outliers: an outlier is a Ritz value at an end of the spectrum that is resolved, its residual less than
    half the distance to the next, and that a gap parts from the bulk. The bulk ends below the lowest gap of at least
    `min_gap` of the distance to the median eigenvalue. A network for C classes has about C of them, C - 1 at
    initialisation, but no rule finds them where there is no gap: with 10 classes, 9, 8, 8 and 7 were found for an MLP
    after 0, 30, 100 and 400 updates, and 9 and 2 for a convolutional net after 0 and 100.

    Errors: the standard deviation over probe vectors, over the root of their number, widened by Student's t so that one
    error covers the truth in 68 percent of cases. One vector gives its own error of the trace, an upper bound: the
    variance of v'Av is 2 (|A|_F^2 - sum_i A_ii^2), and |A|_F^2 comes from the same run. Edges by one vector have the
    residual of the Ritz pair.

    Args:
        module: any module, float32 or float64; data-parallel wrappers taken off.
        loss: `loss(module, batch)`, the mean loss of one micro-batch; a `DetailedLoss` for all but the Hessian.
        batches: pairs `(batch, num_examples)`, batches with `num_examples`, or a single batch.
        curvature: hessian; ggn; fisher, with one label drawn for each target; or empirical_fisher, of the examples.
        num_steps: products for each vector, >= 3; memory: one vector of the size of the parameters for each. The bulk
            is resolved into as many pieces; extremal eigenvalues take 30.
        num_vectors: probe vectors, >= 1. One suffices for large networks; two or more give errors of the density.
        sigma: width of the Gaussians, > 0; None: the mean distance between nodes in the bulk.
        min_gap: see above, between 0 and 1.
        route: see :data:`landscape_ray.probes.operators.checked.Products`; all but the Hessian know only exact. With
            differences the largest value is measured anew along its Ritz vector, and how far it was off is part of the
            errors.
        seed: of the probe vectors.
        eval_mode: measure in eval mode: no dropout, running batch statistics. False keeps the modes of the host.

    Raises:
        UserError: an argument out of its range, or something that cannot be measured.

    References:
        Ghorbani, Krishnan and Xiao, An investigation into neural net optimization via Hessian eigenvalue density, 2019,
        arXiv:1901.10159; Papyan, Traces of class/cross-class structure pervade deep learning spectra, JMLR 21, 2020,
        arXiv:2008.11865; Ubaru, Chen and Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, SIAM J.
        Matrix Anal. Appl. 38, 2017.

    >>> layer = nn.Linear(2, 1, bias=False)  # 0.5 mean (w x)^2: H = X'X / n
    >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> found = spectral_density(layer, lambda module, batch: 0.5 * module(batch).square().mean(), [x])
    >>> round(found.trace.value, 4), round(found.largest.value, 4)
    (2.5, 2.0)
    """
    began = time.perf_counter()
    check_curvature(curvature)
    check_route(route, curvature)
    check_quadrature(num_steps, num_vectors, sigma, min_gap)
    with observing(module, loss, batches, eval_mode=eval_mode, seed=seed) as function:
        if function.finite:
            function.check_deterministic()
        found = measure(function, curvature, num_steps, num_vectors, sigma, min_gap, seed, route=route)
    return dataclasses.replace(
        found, price_gradients=function.spent_gradients, cost_seconds=time.perf_counter() - began
    )


def measure(
    function: FixedLoss,
    curvature: Curvature,
    num_steps: int,
    num_vectors: int,
    sigma: float | None,
    min_gap: float,
    seed: int,
    allowance_gradients: float = math.inf,
    *,
    route: Products = "exact",
) -> SpectralDensity:
    """Return the density; the cost is counted by `function`. Arguments as above.

    An allowance, which covers what was spent before, too, takes fewer steps, 3 at least, and then fewer vectors; then
    nothing is `converged`.
    """
    if not function.finite:
        return unknown_density(0)
    operator: HessianOperator | JacobianOperator | CheckedHessian
    if route == "exact":
        operator = curvature_operator(function, curvature, seed=seed)
    else:
        first = random_signs(function.size, torch.Generator().manual_seed(seed), function.dtype, function.device)
        length = torch.linalg.vector_norm(first)
        eps = STEP * math.sqrt(torch.finfo(function.dtype).eps / torch.finfo(torch.float32).eps)
        operator = CheckedHessian(function, route, first / length, eps=eps)  # as the iteration asks for it
    checked = operator if isinstance(operator, CheckedHessian) and operator.by_differences else None
    wanted = num_steps * num_vectors
    reserve = checked.price_of_anew if checked is not None else 0.0
    affordable = operator.most_products(allowance_gradients - function.spent_gradients - reserve, wanted)
    enough = affordable >= min(num_steps, function.size) * num_vectors
    if not enough:
        num_steps, num_vectors = max(3, affordable // num_vectors), min(num_vectors, max(1, affordable // 3))
    found = lanczos_quadrature(
        operator,
        function.size,
        num_steps=num_steps,
        num_vectors=num_vectors,
        sigma=sigma,
        min_gap=min_gap,
        seed=seed,
        dtype=function.dtype,
        device=function.device,
    )
    if checked is not None and found.largest.vector is not None:
        found = _measured_anew(found, checked)
    num_matvecs = operator.num_spent if isinstance(operator, CheckedHessian) else operator.num_matvecs
    if not math.isfinite(operator.mean_loss):
        return unknown_density(num_matvecs)
    found = dataclasses.replace(
        found,
        by_differences=checked is not None,
        num_matvecs=num_matvecs,
        trace=dataclasses.replace(found.trace, num_matvecs=num_matvecs),
        largest=dataclasses.replace(found.largest, vector=None),
    )
    trusted = checked is None or checked.trusted
    return (
        found if enough and trusted else _each(found, lambda estimate: dataclasses.replace(estimate, converged=False))
    )


def _measured_anew(found: SpectralDensity, operator: CheckedHessian) -> SpectralDensity:
    """Return the same with the largest value by a better product, and errors that hold how far differences are off."""
    vector = found.largest.vector
    assert vector is not None
    product = operator.anew(vector)
    value = float(vector @ product)
    residual = float(torch.linalg.vector_norm(product - value * vector))
    off = abs(found.largest.value - value) / abs(value) if value else 0.0

    def widened(estimate: Estimate) -> Estimate:
        return dataclasses.replace(estimate, standard_error=math.hypot(estimate.standard_error, off * estimate.value))

    largest = dataclasses.replace(
        found.largest,
        value=value,
        standard_error=residual,
        converged=residual <= MAX_RESIDUAL * max(abs(value), FLOOR * abs(found.smallest.value)),
    )
    return dataclasses.replace(
        _each(found, widened), largest=largest, num_above=found.num_above, num_below=found.num_below
    )


def _each(found: SpectralDensity, change: Callable[[Estimate], Estimate]) -> SpectralDensity:
    """Return the same with every estimate changed."""
    parts = [field.name for field in dataclasses.fields(found) if isinstance(getattr(found, field.name), Estimate)]
    changed: dict[str, Any] = {name: change(getattr(found, name)) for name in parts}
    return dataclasses.replace(found, **changed)


class SpectralDensityProbe(Probe):
    """The spectral density along a training run, as the numbers that a row can hold.

    Estimates: `spectral_density`, the upper edge of the bulk; `/bulk_lower`, `/num_above` and `/num_below`, the
    outliers; `/largest`, `/smallest`, `/trace` and `/frobenius_norm`. The density itself is had by
    :func:`spectral_density` at a checkpoint.
    """

    name = "spectral_density"
    STATE: ClassVar[tuple[str, ...]] = ("_by_differences",)

    def __init__(
        self,
        batches: Batches,
        *,
        num_steps: int = 50,
        num_vectors: int = 1,
        curvature: Curvature = "hessian",
        min_gap: float = 0.25,
        route: Products = "exact",
        eval_mode: bool = True,
        seed: int = 0,
    ) -> None:
        """Keep the settings.

        Args:
            batches: see :func:`spectral_density`; the same at every measurement.
            num_steps: see :func:`spectral_density`.
            num_vectors: see :func:`spectral_density`.
            curvature: see :func:`spectral_density`; all but hessian need a `DetailedLoss`.
            min_gap: see :func:`spectral_density`.
            route: see :func:`spectral_density`; the price is that of exact products before the first measurement.
            eval_mode: see :func:`spectral_density`.
            seed: of the probe vectors; every measurement draws anew.

        Raises:
            UserError: an argument out of its range.
        """
        check_quadrature(num_steps, num_vectors, None, min_gap)
        check_curvature(curvature)
        check_route(route, curvature)
        super().__init__(batches, eval_mode=eval_mode, seed=seed)
        self.num_steps, self.num_vectors, self.min_gap, self.route = num_steps, num_vectors, min_gap, route
        self.curvature: Curvature = curvature
        self._by_differences = route == "finite_difference"

    @property
    def price_gradients(self) -> float:
        """What a measurement costs, in gradients on the batches of the probe."""
        num = self.num_steps * self.num_vectors
        exact = expected_price(self.curvature, self.batches, num)
        if not self._by_differences:
            return exact
        checks = 4.0 if self.route == "finite_difference" else expected_price(self.curvature, self.batches, 2)
        return 1.0 + num + checks

    def _measure(self, function: FixedLoss, host: Host) -> dict[str, Estimate]:
        """Return the numbers at the present weights; a smaller allowance takes fewer steps."""
        found = measure(
            function,
            self.curvature,
            self.num_steps,
            self.num_vectors,
            None,
            self.min_gap,
            self.seed + self._num_measured,
            host.allowance_gradients,
            route=self.route,
        )
        self._by_differences = found.by_differences
        return {
            self.name: dataclasses.replace(found.bulk_upper, num_matvecs=found.num_matvecs),
            f"{self.name}/bulk_lower": found.bulk_lower,
            f"{self.name}/num_above": found.num_above,
            f"{self.name}/num_below": found.num_below,
            f"{self.name}/largest": found.largest,
            f"{self.name}/smallest": found.smallest,
            f"{self.name}/trace": found.trace,
            f"{self.name}/frobenius_norm": found.frobenius_norm,
        }
