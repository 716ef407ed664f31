"""Sharpness: the largest eigenvalue of the Hessian of the mean loss on fixed batches."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.probes.estimate import Estimate
from landscape_ray.probes.guard import host_untouched
from landscape_ray.probes.lanczos import LanczosResult, lanczos, unit_vector
from landscape_ray.probes.operators import (
    Batches,
    CurvatureOperator,
    FiniteDifferenceHessian,
    HessianOperator,
    Loss,
)
from landscape_ray.probes.probe import Probe

Route: TypeAlias = Literal["exact", "finite_difference", "auto"]
"""How Hessian-vector products are computed; see :func:`sharpness`."""


def sharpness(
    module: nn.Module,
    loss: Loss,
    batches: Batches,
    *,
    start: Tensor | None = None,
    tol: float = 0.03,
    max_matvecs: int = 30,
    route: Route = "exact",
    seed: int = 0,
    eval_mode: bool = True,
) -> Estimate:
    """Return the largest algebraic eigenvalue of the Hessian at the present weights.

        lambda_max(grad^2 L),    L(w) = sum_i share_i loss(module, batch_i)

    The largest, not the largest in magnitude: on convolutional nets the most negative one can win. The batch belongs
    to the measurement: values on different batch sizes do not compare. The module and all global random generators
    are bit-identical afterwards. Non-finite weights or losses give the value nan.

    Routes:
        exact: second derivatives; 2.3 gradients a product on one micro-batch, 3.5 on several.
        finite_difference: one gradient a product, and three more: the gradient at the weights, and two for a central
            difference along the eigenvector, which gives value and residual. For networks without kinks. Its error is
            only known as far as the products fail to be symmetric, which is added to the bound.
        auto: finite differences where they agree with one exact product at the start vector, and with each other, to
            `tol`; the larger disagreement is added to the bound. Exact products otherwise.

    Args:
        module: any module, float32 or float64; data-parallel wrappers taken off.
        loss: `loss(module, batch)`, the mean loss of one micro-batch.
        batches: pairs `(batch, num_examples)`, batches with `num_examples`, or a single batch.
        start: first Lanczos vector, flat over the trainable parameters; the `vector` of an earlier estimate saves
            products. None draws one.
        tol: residual to reach, relative to the value, > 0. Where the largest eigenvalue stands alone, the value is then
            about tol^2 too low. Eigenvalues closer than 2 tol are not told apart, and it can be that much too low.
        max_matvecs: most Lanczos products, >= 1; memory: one more vectors of the size of the parameters.
        route: see above.
        seed: of the start vector.
        eval_mode: measure in eval mode: no dropout, running batch statistics. False keeps the modes of the host, with
            the same dropout masks at every evaluation.

    Returns:
        The estimate; `standard_error` is the residual, a bound, and `vector` the eigenvector.

    Raises:
        UserError: an argument out of its range, or parameters that cannot be measured.

    References:
        Cohen et al., Gradient descent on neural networks typically occurs at the edge of stability, 2021,
        arXiv:2103.00065.

    >>> chain = nn.ParameterList([nn.Parameter(torch.tensor(w)) for w in (2.0, 0.5)])
    >>> def half_square(chain, target):  # 0.5 (w1 w2 - 1)^2 at its minimum: 1/w1^2 + 1/w2^2
    ...     return 0.5 * (chain[0] * chain[1] - target) ** 2
    >>> round(sharpness(chain, half_square, [1.0]).value, 4)
    4.25
    """
    return _sharpness(module, loss, batches, start, tol, max_matvecs, route, seed, eval_mode, known_error=math.nan)


def _sharpness(
    module: nn.Module,
    loss: Loss,
    batches: Batches,
    start: Tensor | None,
    tol: float,
    max_matvecs: int,
    route: Route,
    seed: int,
    eval_mode: bool,
    known_error: float,
) -> Estimate:
    """Return the sharpness; `known_error` of the finite differences spares route auto its check, nan is not known."""
    began = time.perf_counter()
    _check(tol, route)
    with host_untouched(module):
        if eval_mode:
            module.eval()
        exact = HessianOperator(module, loss, batches)
        differences = FiniteDifferenceHessian(module, loss, batches)
        operator: CurvatureOperator = exact
        first = unit_vector(exact.size, start, seed=seed, dtype=exact.dtype, device=exact.device)
        solve = functools.partial(
            lanczos, size=exact.size, tol=tol, max_matvecs=max_matvecs, dtype=exact.dtype, device=exact.device
        )
        result: LanczosResult | None = None
        error = known_error
        if all(bool(p.isfinite().all()) for p in module.parameters()):
            if route == "auto" and math.isnan(error):
                error = _disagreement(differences, exact, first)
            if route == "finite_difference" or (route == "auto" and error <= tol):
                exact.release()
                operator = differences
                result = _recentred(solve(differences, start=first), differences)
                asymmetry = result.asymmetry / max(abs(result.value), sys.float_info.min)
                error = max(asymmetry, error)  # in this order: an error that is not known (nan) does not win
                first = result.vector
            if result is None or (route == "auto" and not error <= tol):
                operator = exact
                result = solve(exact, start=first)

    value, bound, converged, vector = math.nan, math.nan, False, None
    if result is not None and math.isfinite(result.value) and math.isfinite(operator.mean_loss):
        value, bound, converged, vector = result.value, result.residual, result.converged, result.vector
        if operator is differences:
            bound += error * abs(value)
            converged = converged and error <= tol
    return Estimate(
        value=value,
        standard_error=bound,
        num_matvecs=exact.num_matvecs + differences.num_matvecs,
        price_gradients=exact.price_gradients + differences.price_gradients,
        cost_seconds=time.perf_counter() - began,
        converged=converged,
        finite_difference_error=error,
        vector=vector,
    )


def _recentred(result: LanczosResult, differences: CurvatureOperator) -> LanczosResult:
    """Return the Ritz pair with value and residual from a central difference along its vector.

    A forward difference is off by `eps/2` times the third derivative, along the sharpest direction by percents; the
    sum over both signs is not, for two gradients more.
    """
    if not math.isfinite(result.value):
        return result
    product = 0.5 * (differences(result.vector) - differences(-result.vector))
    value = float(result.vector @ product)
    residual = float(torch.linalg.vector_norm(product - value * result.vector))
    return dataclasses.replace(result, value=value, residual=residual)


def _disagreement(differences: CurvatureOperator, exact: CurvatureOperator, vector: Tensor) -> float:
    """Return `||H_fd v - H v|| / ||H v||`; nan or infinite where H v vanishes."""
    reference = exact(vector)
    distance = torch.linalg.vector_norm(differences(vector) - reference)
    return float(distance / torch.linalg.vector_norm(reference))


def _check(tol: float, route: str) -> None:
    if not (math.isfinite(tol) and tol > 0):
        raise UserError(
            f"tol must be positive and finite, got {tol}; 0.03 tells eigenvalues apart that differ by 6 percent"
        )
    if route not in get_args(Route):
        raise UserError(f"route must be one of {', '.join(get_args(Route))}, got '{route}'")


class SharpnessProbe(Probe):
    """Sharpness along a training run, started from the eigenvector of the last measurement.

    A warm start saves half of the products where measurements are dense, a tenth where they are sparse. It can hold on
    to an eigenvector that another one has overtaken, and no residual tells; so every `cold_every`-th measurement starts
    from a random vector. With `route="auto"` the finite differences are checked at cold starts only: the verdict, and
    the error, hold until the next one, unless the differences fail to be symmetric in between.
    """

    name = "sharpness"

    def __init__(
        self,
        batches: Batches,
        *,
        tol: float = 0.03,
        max_matvecs: int = 30,
        route: Route = "exact",
        cold_every: int = 10,
        eval_mode: bool = True,
        seed: int = 0,
    ) -> None:
        """Keep the settings.

        Args:
            batches: see :func:`sharpness`; the same at every measurement.
            tol: see :func:`sharpness`.
            max_matvecs: see :func:`sharpness`.
            route: see :func:`sharpness`.
            cold_every: a random start at measurements 0, cold_every, 2 cold_every ...; >= 1, where 1 is always.
            eval_mode: see :func:`sharpness`.
            seed: of the random starts, each another one.

        Raises:
            UserError: an argument out of its range.
        """
        _check(tol, route)
        if cold_every < 1:
            raise UserError(f"cold_every must be at least 1, got {cold_every}; 1 starts every measurement anew")
        self.batches, self.tol, self.max_matvecs, self.route = batches, tol, max_matvecs, route
        self.cold_every, self.eval_mode, self.seed = cold_every, eval_mode, seed
        self._vector: Tensor | None = None
        self._num_measured = 0
        self._finite_difference_error = math.nan
        self._price_gradients = {"exact": 20.0, "finite_difference": 12.0, "auto": 15.0}[route]

    @property
    def price_gradients(self) -> float:
        """What the last measurement cost, in gradients on the batches of the probe; a typical price before any."""
        return self._price_gradients

    def measure(self, module: nn.Module, loss: Loss) -> Estimate:
        """Return the sharpness at the present weights; arguments and errors as for :func:`sharpness`.

        A measurement that is not finite is not remembered: the next one starts where the last finite one ended.
        """
        cold = self._vector is None or self._num_measured % self.cold_every == 0
        estimate = _sharpness(
            module,
            loss,
            self.batches,
            start=None if cold else self._vector,
            tol=self.tol,
            max_matvecs=self.max_matvecs,
            route=self.route,
            seed=self.seed + self._num_measured,
            eval_mode=self.eval_mode,
            known_error=math.nan if cold else self._finite_difference_error,
        )
        if estimate.vector is not None:
            self._vector = estimate.vector
            self._num_measured += 1
            self._finite_difference_error = estimate.finite_difference_error
            self._price_gradients = estimate.price_gradients
        return estimate

    def state_dict(self) -> dict[str, Any]:
        """Return the last eigenvector, how many measurements were made, and what was learned about their price."""
        return {
            "vector": self._vector,
            "num_measured": self._num_measured,
            "finite_difference_error": self._finite_difference_error,
            "price_gradients": self._price_gradients,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of this or another instance.

        Raises:
            UserError: an entry is missing or unknown.
        """
        if set(state) != set(self.state_dict()):
            raise UserError(
                f"state of the sharpness probe must hold {', '.join(self.state_dict())}, "
                f"got {', '.join(state) or 'nothing'}; the checkpoint is of another version"
            )
        self._vector = state["vector"]
        self._num_measured = int(state["num_measured"])
        self._finite_difference_error = float(state["finite_difference_error"])
        self._price_gradients = float(state["price_gradients"])
