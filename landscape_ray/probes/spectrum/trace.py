"""Trace and Frobenius norm of a curvature matrix."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import nn

from landscape_ray.probes.estimate import UNKNOWN, Estimate
from landscape_ray.probes.fixed_loss import Batches, FixedLoss, observing
from landscape_ray.probes.losses import Loss
from landscape_ray.probes.operators.checked import CheckedHessian, Products, check_route
from landscape_ray.probes.operators.hessian import HessianOperator
from landscape_ray.probes.operators.jacobian import JacobianOperator
from landscape_ray.probes.probe import Host, Probe
from landscape_ray.probes.spectrum.eigenpairs import Curvature, check_curvature, curvature_operator
from landscape_ray.probes.spectrum.sign_samples import random_signs
from landscape_ray.probes.spectrum.split_trace import rest_of, split_trace
from landscape_ray.probes.spectrum.trace_estimators import Method, TraceResult, check_settings, stochastic_trace

Way: TypeAlias = Literal["split", "whole"]
"""Whether the Gauss-Newton matrix and the rest are sampled apart, or the matrix as a whole."""

LEAST_TO_SPLIT = 15.0
"""Gradients; with less to spend the whole is sampled, of which two products can be had for six or seven."""

EVERY = 10
"""Of so many measurements of a run, one checks differences exactly, and one tries the way that was the dearer one."""


def trace(
    module: nn.Module,
    loss: Loss,
    batches: Batches,
    *,
    tol: float = 0.05,
    max_matvecs: int = 100,
    curvature: Curvature = "hessian",
    method: Method = "auto",
    route: Products = "exact",
    seed: int = 0,
    eval_mode: bool = True,
) -> Estimate:
    """Return the trace of the Hessian, or of another curvature matrix, of the mean loss at the present weights.

    The module and all global random generators are bit-identical afterwards. Non-finite weights or losses give nan.
    The trace of the Gauss-Newton matrix alone is had for far less by :func:`landscape_ray.probes.spectrum.ggn_trace`.
    Method auto makes use of that: where the loss of a network is a `DetailedLoss` with a likelihood, it samples that
    trace and, with products, the trace of the rest (:mod:`landscape_ray.probes.spectrum.split_trace`).

    Routes to a product with the Hessian are those of :data:`landscape_ray.probes.operators.checked.Products`. How far
    the sample of a check was off is part of the standard error.

    Args:
        module: any module, float32 or float64; data-parallel wrappers taken off.
        loss: `loss(module, batch)`, the mean loss of one micro-batch; a `DetailedLoss` for all but the Hessian.
        batches: pairs `(batch, num_examples)`, batches with `num_examples`, or a single batch.
        tol: standard error to reach, relative to the trace, > 0.
        max_matvecs: most products for the estimate, >= 2.
        curvature: hessian; ggn; fisher, with one label drawn for each target; or empirical_fisher, of the examples.
        method: see :func:`landscape_ray.probes.spectrum.trace_estimators.stochastic_trace`, and above.
        route: see above; all but the Hessian know only exact.
        seed: of the random vectors, and the labels of the Fisher matrix.
        eval_mode: measure in eval mode: no dropout, running batch statistics. False keeps the modes of the host.

    Returns:
        The estimate; its `route` names the method, and the products where they are differences.

    Raises:
        UserError: an argument out of its range, or parameters that cannot be measured.

    >>> module = nn.Linear(2, 1, bias=False)  # half squares: the mean of |x|^2
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    >>> trace(module, lambda m, batch: 0.5 * m(batch).square().mean(), [x]).value
    7.0
    """
    began = time.perf_counter()
    _check(tol, max_matvecs, curvature, method, route)
    with observing(module, loss, batches, eval_mode=eval_mode) as function:
        found = UNKNOWN
        if function.finite:
            function.check_deterministic()
            wanted = curvature == "hessian" and method == "auto" and function.size > max_matvecs
            rest = rest_of(function) if wanted else None
            if rest is not None:
                found = split_trace(function, rest, tol, max_matvecs, route, seed)
            else:
                found, _ = trace_and_frobenius(
                    function, tol, max_matvecs, curvature, method, route, seed, check_exactly=True
                )
    return dataclasses.replace(
        found, price_gradients=function.spent_gradients, cost_seconds=time.perf_counter() - began
    )


def trace_and_frobenius(
    function: FixedLoss,
    tol: float,
    max_matvecs: int,
    curvature: Curvature,
    method: Method,
    route: Products,
    seed: int,
    *,
    check_exactly: bool,
    allowance_gradients: float = math.inf,
) -> tuple[Estimate, Estimate]:
    """Return the trace and the Frobenius norm (not squared) at finite weights; the cost is counted by `function`.

    Route auto checks with an exact product if `check_exactly`, and otherwise with a central difference, cheaper.
    """
    operator: HessianOperator | JacobianOperator | CheckedHessian
    if route == "exact":
        operator = curvature_operator(function, curvature, seed=seed)
    else:
        generator = torch.Generator().manual_seed(seed)
        signs = random_signs(function.size, generator, function.dtype, function.device)  # the first of the estimate
        operator = CheckedHessian(function, route, signs, check_exactly=check_exactly)
    checked = operator if isinstance(operator, CheckedHessian) else None
    left = allowance_gradients - function.spent_gradients
    most = min(max_matvecs, max(2, operator.most_products(left, max_matvecs)))
    result = stochastic_trace(
        operator,
        function.size,
        method=method if most >= 8 else "hutchinson",
        tol=tol,
        max_matvecs=most,
        seed=seed,
        dtype=function.dtype,
        device=function.device,
    )
    num_matvecs = operator.num_matvecs if checked is None else checked.num_spent
    if not (math.isfinite(result.value) and math.isfinite(result.frobenius_squared)):
        return dataclasses.replace(UNKNOWN, num_matvecs=num_matvecs), UNKNOWN
    if checked is None or not checked.by_differences:
        return _estimates(result, 0.0, True, result.route, num_matvecs)
    return _estimates(result, checked.deviation, checked.trusted, f"{result.route}, finite differences", num_matvecs)


def _estimates(
    result: TraceResult, bias: float, trusted: bool, route: str, num_matvecs: int
) -> tuple[Estimate, Estimate]:
    frobenius = math.sqrt(result.frobenius_squared)
    error = result.frobenius_squared_error / (2 * frobenius) if frobenius > 0 else 0.0
    converged = result.converged and trusted
    return (
        Estimate(
            value=result.value,
            standard_error=math.hypot(result.standard_error, bias * result.value),
            num_matvecs=num_matvecs,
            converged=converged,
            route=route,
        ),
        Estimate(value=frobenius, standard_error=math.hypot(error, bias * frobenius), converged=converged, route=route),
    )


def _check(tol: float, max_matvecs: int, curvature: str, method: str, route: str) -> None:
    check_settings(method, tol, max_matvecs)
    check_curvature(curvature)
    check_route(route, curvature)


class TraceProbe(Probe):
    """Trace along a training run, as `trace`; the Frobenius norm, too, as `trace/frobenius`, if asked for.

    Every measurement draws random vectors of its own. Method auto splits the trace as :func:`trace` does; the third
    measurement, and every tenth after it, goes the other way, by products with the whole matrix, and those in between
    the way that took less for the tolerance, counted in gradients and not by the clock. The Frobenius norm is that of
    products with the whole matrix, which are then the only way.

    With `route="auto"` the first and every tenth measurement check finite differences by an exact product; those in
    between check by a central difference, or use exact products if the last one had to.
    """

    name = "trace"
    STATE: ClassVar[tuple[str, ...]] = ("_may_split", "_exact", "_spent", "_wanted")

    def __init__(
        self,
        batches: Batches,
        *,
        tol: float = 0.05,
        max_matvecs: int = 100,
        curvature: Curvature = "hessian",
        method: Method = "auto",
        route: Products = "exact",
        frobenius: bool = False,
        eval_mode: bool = True,
        seed: int = 0,
    ) -> None:
        """Keep the settings.

        Args:
            batches: see :func:`trace`; the same at every measurement.
            tol: see :func:`trace`.
            max_matvecs: see :func:`trace`.
            curvature: see :func:`trace`.
            method: see :func:`trace`.
            route: see :func:`trace`.
            frobenius: whether to give the Frobenius norm.
            eval_mode: see :func:`trace`.
            seed: of the random vectors, others at each measurement.

        Raises:
            UserError: an argument out of its range.
        """
        _check(tol, max_matvecs, curvature, method, route)
        super().__init__(batches, eval_mode=eval_mode, seed=seed)
        self.tol, self.max_matvecs, self.curvature, self.method, self.route = tol, max_matvecs, curvature, method, route
        self.frobenius = frobenius
        self._may_split = curvature == "hessian" and method == "auto" and not frobenius
        self._exact: dict[str, bool] = {}
        self._spent: dict[str, float] = {}
        self._wanted: dict[str, float] = {}

    @property
    def _way(self) -> Way:
        """The way of the next measurement, if it can pay for it."""
        if not self._may_split:
            return "whole"
        if self._num_measured < 2:  # the first checks more, so that the second tells the price
            return "split"
        cheaper = self._wanted.get("split", 0.0) <= self._wanted.get("whole", math.inf)
        return "split" if cheaper != (self._num_measured % EVERY == 2) else "whole"

    @property
    def price_gradients(self) -> float:
        """What the last measurement that went the way of the next cost, in gradients on the batches of the probe.

        A typical price before any.
        """
        typical = 1.5 * self._spent["split"] if "split" in self._spent else 20.0
        return self._spent.get(self._way, typical)

    def _measure(self, function: FixedLoss, host: Host) -> dict[str, Estimate]:
        """Return the trace, and the Frobenius norm if asked for, at the present weights."""
        before, way, thorough = function.spent_gradients, self._way, self._num_measured % EVERY == 0
        rest = None
        if way == "split":
            if function.size <= self.max_matvecs:  # every column can be read off
                self._may_split = False
            elif host.allowance_gradients >= LEAST_TO_SPLIT:
                rest = rest_of(function)
                self._may_split = rest is not None
        way = "whole" if rest is None else "split"
        route = (
            "exact"
            if self.route == "auto" and self._exact.get(way, any(self._exact.values())) and not thorough
            else self.route
        )
        seed, frobenius = self.seed + self._num_measured, UNKNOWN
        if rest is not None:
            found = split_trace(
                function,
                rest,
                self.tol,
                self.max_matvecs,
                route,
                seed,
                check_exactly=thorough,
                allowance_gradients=host.allowance_gradients,
            )
        else:
            found, frobenius = trace_and_frobenius(
                function,
                self.tol,
                self.max_matvecs,
                self.curvature,
                self.method,
                route,
                seed,
                check_exactly=thorough,
                allowance_gradients=host.allowance_gradients,
            )
        if math.isfinite(found.value):
            self._exact = self._exact | {way: "differences" not in found.route}
            self._spent = self._spent | {way: function.spent_gradients}
            if not thorough:
                short = found.standard_error / max(self.tol * abs(found.value), 1e-300)
                price = (function.spent_gradients - before) * max(1.0, short * short)
                self._wanted = self._wanted | {way: price}
        return {self.name: found} | ({f"{self.name}/frobenius": frobenius} if self.frobenius else {})
