"""Sharpness: the largest eigenvalue of the Hessian of the mean loss on fixed batches."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.probes.estimate import UNKNOWN, Estimate
from landscape_ray.probes.fixed_loss import Batches, FixedLoss, observing
from landscape_ray.probes.losses import Loss
from landscape_ray.probes.operators import (
    CurvatureOperator,
    FiniteDifferenceHessian,
    HessianOperator,
    Preconditioned,
)
from landscape_ray.probes.probe import Host, Probe
from landscape_ray.probes.spectrum.lanczos import LanczosResult, lanczos, unit_vector

Route: TypeAlias = Literal["exact", "finite_difference", "auto"]
"""How Hessian-vector products are computed; see :func:`sharpness`."""


MAX_ASYMMETRY = 0.02
"""Of finite differences, relative: below 0.0012 on smooth networks, and on those whose kinks are held, with the short
steps of this file. Across other kinks it was 0.6 and more; in one network of ten 0.011, and in four no kink was
crossed: in all five the value was right to 0.2 percent."""


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
        finite_difference: one gradient a product; then value and residual anew by a finer central difference along the
            vector, two gradients. ReLU and its relatives are held on the piece that they are on; the Hessian is that of
            the loss as differences see it.
        auto: finite differences; then value and residual anew by one exact product along the vector. Where that
            residual misses `tol`, or the differences are not symmetric, exact products go on from there. With
            tol below 0.02 they mostly do, and still save products by what the differences found.

    Args:
        module: any module, float32 or float64; data-parallel wrappers taken off.
        loss: `loss(module, batch)`, the mean loss of one micro-batch.
        batches: pairs `(batch, num_examples)`, batches with `num_examples`, or a single batch.
        start: first Lanczos vector, flat over the trainable parameters; the `vector` of an earlier estimate saves
            products. None draws one.
        tol: residual to reach, relative to the value, > 0. It bounds the distance to some eigenvalue; one that lies
            a little below the largest is returned where the start vector has hardly any part along the largest.
            On a small GPT, over 50 random starts: 0.03 took 8 products for a median error of 0.1 %, but 10 times it was
            above 1 %, once 13 %; 0.01 took 10 products, 2 times above 1 %; 0.005 took 12, never above 0.1 %.
        max_matvecs: most products of one Lanczos run, >= 1; memory: one vector of the size of the parameters for each.
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
    began = time.perf_counter()
    _check(tol, max_matvecs, route)
    with observing(module, loss, batches, eval_mode=eval_mode) as function:
        found = UNKNOWN
        if function.finite:
            function.check_deterministic()
            found, _, _ = top_pair(function, start, tol, max_matvecs, route, seed)
    return dataclasses.replace(
        found, price_gradients=function.spent_gradients, cost_seconds=time.perf_counter() - began
    )


def top_pair(
    function: FixedLoss,
    start: Tensor | None,
    tol: float,
    max_matvecs: int,
    route: Route,
    seed: int,
    *,
    error: float | None = None,
    allowance_gradients: float = math.inf,
    preconditioner: Tensor | None = None,
    extrapolate: bool = False,
) -> tuple[Estimate, float, bool]:
    """Return the sharpness at finite weights, the error of differences, and whether differences did.

    The cost is counted by `function`. The arguments are those of :func:`sharpness`, and `error`: how far products by
    differences are off along the vector, relative to the value, as an earlier check found it. None checks: in route
    auto by an exact product, else by a central difference. And `allowance_gradients`, which is exceeded only where it
    does not pay for a single product and its check; where it does not pay for exact products in the place of
    differences, the estimate by differences stands, not converged. With a diagonal P > 0 as `preconditioner`, (size,),
    it is that of `P^-1/2 H P^-1/2`, and so are start and vector. `extrapolate` adds what a further product
    is expected to.
    """
    hessian, differing = HessianOperator(function), FiniteDifferenceHessian(function, eps=_step(function.dtype))
    exact: CurvatureOperator = hessian
    differences: CurvatureOperator = differing
    central: Callable[[Tensor], Tensor] = differing.central
    if preconditioner is not None:
        exact, differences = Preconditioned(hessian, preconditioner), Preconditioned(differing, preconditioner)
        central = _between(differences.diagonal, differing.central)
    limit = function.spent_gradients + allowance_gradients
    first = unit_vector(function.size, start, seed=seed, dtype=function.dtype, device=function.device)
    solve = functools.partial(lanczos, size=function.size, dtype=function.dtype, device=function.device)
    mean_loss_of: HessianOperator | FiniteDifferenceHessian = hessian
    found: LanczosResult | None = None
    good = False
    if route != "exact":
        mean_loss_of = differing
        check = exact if route == "auto" else central
        price = exact.setup_gradients + exact.matvec_gradients if route == "auto" else 2.0
        left = allowance_gradients - (price if error is None else 0.0)
        most = differences.most_products(left, max_matvecs)
        found, good, error = _by_differences(
            functools.partial(solve, max_matvecs=most), differences, check, first, tol, error
        )
        first = found.vector
    left = limit - function.spent_gradients
    if hessian.num_matvecs:
        left += exact.setup_gradients  # was paid for the check
    # one product alone would tell no more than the check
    pays = left >= exact.setup_gradients + 2 * exact.matvec_gradients
    if route == "exact" or (route == "auto" and not good and pays):
        mean_loss_of = hessian
        found = solve(exact, start=first, tol=tol, max_matvecs=exact.most_products(left, max_matvecs))
    num_matvecs = hessian.num_matvecs + differing.num_matvecs
    if found is None or not (math.isfinite(found.value) and math.isfinite(mean_loss_of.mean_loss)):
        return dataclasses.replace(UNKNOWN, num_matvecs=num_matvecs), math.nan, good
    estimate = Estimate(
        value=found.value + (found.expected_gain if extrapolate else 0.0),
        standard_error=found.residual,
        num_matvecs=num_matvecs,
        converged=found.converged,
        route="exact" if mean_loss_of is hessian else "finite_difference",
        vector=found.vector,
    )
    return estimate, 0.0 if error is None else error, good


def _between(diagonal: Tensor, product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda vector: diagonal * product(diagonal * vector)


def _step(dtype: torch.dtype) -> float:
    """Return the length of a step: shorter than suits random vectors, whose products are smaller.

    Largest error of the value over ten measurements, 50 updates apart, of a GPT with 214k weights and of a ReLU
    residual net with 269k, in percent: 0.6 and 1.6 with steps of 0.002; 0.4 and 0.8 with 0.001; 0.35 and 0.5 with
    0.0005, where exact products have 0.3 and 0.4. Rounding does not show yet at 0.00025. Shorter steps cross fewer
    kinks, so that small networks with some are found out less often.
    """
    return 0.0005 * math.sqrt(torch.finfo(dtype).eps / torch.finfo(torch.float32).eps)


def _by_differences(
    solve: Callable[..., LanczosResult],
    differences: CurvatureOperator,
    check: Callable[[Tensor], Tensor],
    first: Tensor,
    tol: float,
    error: float | None,
) -> tuple[LanczosResult, bool, float]:
    """Return the top pair by finite differences, whether it can stand, and the relative error of the differences.

    Without a known error, value and residual come from `check`. The pair cannot stand where the differences were not
    symmetric, or met the tolerance by their own account only. What is not finite, or ran out of products, stands:
    other products would not mend that.
    """
    # What is left of the tolerance is for the error of the differences, which adds to the residual in squares.
    own = 0.8 * tol if error is None else math.sqrt(max(tol**2 - error**2, 0.25 * tol**2))
    found = solve(differences, start=first, tol=own, max_asymmetry=MAX_ASYMMETRY)
    if not math.isfinite(found.value):
        return found, True, math.nan
    symmetric = found.asymmetry <= MAX_ASYMMETRY * float(found.ritz_values.abs().max())
    value = found.value
    if error is None:
        product = check(found.vector)
        value = float(found.vector @ product)
        residual = float(torch.linalg.vector_norm(product - value * found.vector))
        error = math.sqrt(max(0.0, residual**2 - found.residual**2)) / abs(value) if value else 0.0
    else:
        residual = math.hypot(found.residual, error * value)
    accurate = residual <= tol * abs(value)
    anew = dataclasses.replace(
        found, value=value, residual=residual, converged=found.converged and symmetric and accurate
    )
    return anew, symmetric and (accurate or not found.converged), error


def _check(tol: float, max_matvecs: int, route: str) -> None:
    if not (math.isfinite(tol) and tol > 0):
        raise UserError(
            f"tol must be positive and finite, got {tol}; 0.03 tells eigenvalues apart that differ by 6 percent"
        )
    if max_matvecs < 1:
        raise UserError(f"max_matvecs must be at least 1, got {max_matvecs}; 30 suffices for most networks")
    if route not in get_args(Route):
        raise UserError(f"route must be one of {', '.join(get_args(Route))}, got '{route}'")


class SharpnessProbe(Probe):
    """Sharpness along a training run, started from the eigenvector of the last measurement.

    A warm start saves half of the products where measurements are dense. Every 50 updates of a GPT and a residual net,
    with tol = 0.05, it took 3 to 4 products instead of 5 to 7, with errors of 0.2 percent in the median and 0.6 at
    most over 20 measurements; tol = 0.1 took 3, but missed by up to 17 percent. Half of the last but one eigenvector
    is added, which holds a part of the present one that the last one lacks: a twelfth of the products less. A warm
    start can hold on to an eigenvector that another one has overtaken, and no residual tells; so every `cold_every`-th
    measurement is a cold one. With `route="auto"` these are also the ones that check finite differences by an exact
    product. Those in between cost a gradient for each product and one at the weights: the error that the check found is
    part of their error bar, their symmetry is watched, and they use exact products if the last measurement had to.
    """

    name = "sharpness"
    STATE: ClassVar[tuple[str, ...]] = (
        *("_vector", "_earlier_vector"),
        *("_differences_failed", "_difference_error", "_price_gradients"),
    )

    def __init__(
        self,
        batches: Batches,
        *,
        tol: float = 0.03,
        max_matvecs: int = 30,
        route: Route = "exact",
        cold_every: int = 10,
        extrapolate: bool = False,
        eval_mode: bool = True,
        seed: int = 0,
    ) -> None:
        """Keep the settings.

        Args:
            batches: see :func:`sharpness`; the same at every measurement.
            tol: see :func:`sharpness`; 0.05 suffices for warm starts where 1 percent does.
            max_matvecs: see :func:`sharpness`.
            route: see :func:`sharpness`.
            cold_every: a random start at measurements 0, cold_every, 2 cold_every ...; >= 1, where 1 is always.
            extrapolate: add to the value what a further product is expected to, see
                :func:`landscape_ray.probes.spectrum.lanczos.expected_gain`; it is then no longer the quadratic form of
                the vector, nor a lower bound, but no further from the largest eigenvalue than the residual where that
                form is not. With tol = 0.12 that left errors of 0.9 percent at most on the residual net of above, of
                2.1 percent without; with 0.15 one in ten of 2. On the GPT, whose eigenvectors change places, 0.12
                missed by 17 percent, extrapolated or not.
            eval_mode: see :func:`sharpness`.
            seed: of the random starts, each another one.

        Raises:
            UserError: an argument out of its range.
        """
        _check(tol, max_matvecs, route)
        if cold_every < 1:
            raise UserError(f"cold_every must be at least 1, got {cold_every}; 1 starts every measurement anew")
        super().__init__(batches, eval_mode=eval_mode, seed=seed)
        self.tol, self.max_matvecs, self.route, self.cold_every = tol, max_matvecs, route, cold_every
        self.extrapolate = extrapolate
        self._vector: Tensor | None = None
        self._earlier_vector: Tensor | None = None
        self._differences_failed, self._difference_error = False, 0.0
        self._price_gradients = {"exact": 20.0, "finite_difference": 12.0, "auto": 15.0}[route]

    @property
    def price_gradients(self) -> float:
        """What the last measurement cost, in gradients on the batches of the probe; a typical price before any."""
        return self._price_gradients

    def _measure(self, function: FixedLoss, host: Host) -> dict[str, Estimate]:
        """Return the sharpness at the present weights.

        A measurement that is not finite is not remembered: the next one starts where the last finite one ended.
        """
        before = function.spent_gradients
        cold = self._vector is None or self._num_measured % self.cold_every == 0
        route = "exact" if self.route == "auto" and self._differences_failed and not cold else self.route
        estimate, error, good = top_pair(
            function,
            None if cold else self._start(),
            self.tol,
            self.max_matvecs,
            route,
            self.seed + self._num_measured,
            error=None if cold else self._difference_error,
            allowance_gradients=host.allowance_gradients - before,
            extrapolate=self.extrapolate,
        )
        if estimate.vector is not None:
            self._vector, self._earlier_vector = estimate.vector, self._vector
            self._differences_failed, self._difference_error = not good, error
            self._price_gradients = function.spent_gradients - before
        return {self.name: estimate}

    def _start(self) -> Tensor | None:
        """Return where to start: the last eigenvector, and half of the one before with the sign that it agrees by."""
        last, earlier = self._vector, self._earlier_vector
        if last is None or earlier is None:
            return last
        earlier = earlier.to(last)
        return last + math.copysign(0.5, float(last @ earlier)) * earlier
