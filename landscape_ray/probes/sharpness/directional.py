"""Curvature along one direction of the weights, by an exact product or by differences of gradients or losses."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.probes.estimate import UNKNOWN, Estimate
from landscape_ray.probes.fixed_loss import FORWARD, Batches, FixedLoss
from landscape_ray.probes.losses import Loss
from landscape_ray.probes.operators import HessianOperator
from landscape_ray.probes.operators.kinks import HeldLoss
from landscape_ray.probes.probe import Host, Need, Probe

Route: TypeAlias = Literal["auto", "exact", "gradient", "parabola"]
"""How the curvature is found; see :func:`directional_sharpness`."""

ROUNDING = 0.5
"""Standard deviation of the rounding of one loss, in machine epsilons of it: 0.25 to 0.6 on small GPTs in float32."""

CHECK_EVERY = 10
"""Measurements of a probe from one check of the parabola by an exact product to the next."""

CHECKED_AT_MOST = 9 * FORWARD
"""Price of a parabola that is measured at two steps."""

PRICES: dict[Route, float] = {"exact": 3.5, "gradient": 2 + FORWARD, "parabola": 5 * FORWARD}


def directional_sharpness(
    module: nn.Module,
    loss: Loss,
    batches: Batches,
    direction: Tensor,
    *,
    route: Route = "auto",
    tol: float = 0.05,
    step: float | None = None,
    eval_mode: bool = True,
) -> Estimate:
    """Return the curvature of the mean loss along a direction, at the present weights.

        v' H v,    v = direction / |direction|

    Never above the sharpness lambda_1(H) on the same batches; the step that an optimizer can take along v before the
    loss rises again is near -2 (g' v) / (v' H v).

    Routes, with L(t) the loss at w + t v:
        exact: one Hessian-vector product, 3.5 gradients. No error but rounding.
        gradient: `(L'(h) - L'(-h)) / 2h`, 2.3 gradients. The losses that come with them, and L(0), give the parabola
            at the same step, which has half of the error in h^2: the bound is `2 |gradient - parabola|`. Where rounding
            hides that, two more losses give the parabola at a longer step, and the bound shrinks with the square of
            the ratio.
        parabola: `(L(h) - 2 L(0) + L(-h)) / h^2` with step h and h / 2, extrapolated; five forwards, 1.7 gradients. The
            error is what the extrapolation adds, which is more than what it leaves, and the rounding of the losses.
            Where that misses `tol`, once more with the shortest step for which rounding does not matter.
        auto: for probes along a run: parabola where it serves, checked by an exact product at the first measurement and
            every tenth, which return that product; exact where its error misses `tol`. A single call checks, too, so
            that it is exact and dearer than that. ReLU and its relatives are held on the piece that they are on
            (:mod:`landscape_ray.probes.operators.kinks`); kinks of another make are seen, where a step crosses them, as
            curvature. Along random directions that is all that differences see, and in 2 of 30 their errors did not
            tell.
    All but exact keep fused attention and compiled modules at their speed. Differences are symmetric, so that the third
    derivative drops out; the one-sided `2 (L(D) - L(0) - g' D) / |D|^2` along an update D is off by it, 2 to 5 % on
    small GPTs.

    Args:
        module: any module, float32 or float64; data-parallel wrappers taken off.
        loss: `loss(module, batch)`, the mean loss of one micro-batch.
        batches: pairs `(batch, num_examples)`, batches with `num_examples`, or a single batch.
        direction: flat over the trainable parameters, (size,); the sign does not matter.
        route: see above.
        tol: error to reach, relative to the value, > 0.
        step: h, in the units of the weights, > 0; None takes the length of the direction.
        eval_mode: measure in eval mode: no dropout, running batch statistics. False keeps the modes of the host.

    Returns:
        The estimate; nan for a direction that is zero.

    Raises:
        UserError: an argument out of its range, or a function that cannot be measured.

    References:
        Pan and Li, Toward understanding why Adam converges faster than SGD for transformers, 2023, arXiv:2306.00204.

    >>> square = nn.ParameterList([nn.Parameter(torch.zeros(2))])  # 0.5 (w1 + 3 w2)^2: H = [[1, 3], [3, 9]]
    >>> def loss(module, row):
    ...     return 0.5 * (module[0] @ row - 1) ** 2
    >>> found = directional_sharpness(square, loss, [torch.tensor([1.0, 3.0])], torch.tensor([1.0, 1.0]))
    >>> round(found.value, 3), found.route
    (8.0, 'exact')
    """
    probe = DirectionalSharpnessProbe(batches, route=route, tol=tol, step=step, eval_mode=eval_mode)
    return probe.measure(module, loss, Host(update=[direction]))[probe.name]  # one flat tensor is a list of parts, too


def flat_update(function: FixedLoss, host: Host) -> Tensor | None:
    """Return what the last update added to the parameters that are looked at, (size,); None where there was none.

    None also for an update of zero, or one that is not finite.

    Raises:
        UserError: it is not that of these parameters.
    """
    if host.update is None:
        return None
    update = function.flatten(host.update).to(function.device)
    if update.shape != (function.size,):
        raise UserError(f"update must have {function.size} elements, one for each trainable weight, got {len(update)}")
    length = float(torch.linalg.vector_norm(update))
    return update if math.isfinite(length) and length > 0 else None


class DirectionalSharpnessProbe(Probe):
    """Directional sharpness along the last update of a training run, at the weights that it led to.

    Before the first update there is none: nan, not converged. With `route="auto"` the first measurement and every
    tenth are exact products, which check the parabola: if it misses `tol`, by its own account or by the product, those
    in between are exact, and so are they after one that did not converge. The step of the parabola is the one that
    served last.
    """

    name = "directional_sharpness"
    needs: ClassVar[frozenset[Need]] = frozenset({"update"})
    STATE: ClassVar[tuple[str, ...]] = ("_step", "_parabola_serves", "_price_gradients")

    def __init__(
        self,
        batches: Batches,
        *,
        route: Route = "auto",
        tol: float = 0.05,
        step: float | None = None,
        eval_mode: bool = True,
        seed: int = 0,
    ) -> None:
        """Keep the settings.

        Args:
            batches: see :func:`directional_sharpness`; the same at every measurement.
            route: see :func:`directional_sharpness`.
            tol: see :func:`directional_sharpness`.
            step: see :func:`directional_sharpness`; the length of the first update where it is None.
            eval_mode: see :func:`directional_sharpness`.
            seed: of the noise that the loss may contain.

        Raises:
            UserError: an argument out of its range.
        """
        if route not in get_args(Route):
            raise UserError(f"route must be one of {', '.join(get_args(Route))}, got '{route}'")
        if not (math.isfinite(tol) and tol > 0):
            raise UserError(f"tol must be positive and finite, got {tol}; 0.05 is five percent")
        if step is not None and not (math.isfinite(step) and step > 0):
            raise UserError(f"step must be positive and finite, got {step}; None takes the length of the direction")
        super().__init__(batches, eval_mode=eval_mode, seed=seed)
        self.route, self.tol, self.step = route, tol, step
        self._step: float | None = None
        self._parabola_serves = False  # until a check has said so
        self._price_gradients = PRICES["exact" if route == "auto" else route]

    @property
    def price_gradients(self) -> float:
        """What the last measurement cost, in gradients on the batches of the probe; a typical price before any.

        Where the next one checks, that is added.
        """
        if self.route == "auto" and self._num_measured % CHECK_EVERY == 0:
            return self._price_gradients + PRICES["exact" if self._parabola_serves else "parabola"]
        return self._price_gradients

    def _measure(self, function: FixedLoss, host: Host) -> dict[str, Estimate]:
        update = flat_update(function, host)
        if update is None:
            return {self.name: UNKNOWN}
        length = float(torch.linalg.vector_norm(update))
        unit = update.div_(length)
        before = function.spent_gradients
        # The check is left out where it cannot be paid for: the exact product alone is the cheaper one then.
        left = host.allowance_gradients - before
        checking = self._num_measured % CHECK_EVERY == 0 and left >= PRICES["exact"] + CHECKED_AT_MOST
        step = self.step or self._step or length
        found = UNKNOWN
        if self.route == "gradient":
            found = self._by_gradients(function, unit, step)
        elif self.route == "parabola" or (self.route == "auto" and (checking or self._parabola_serves)):
            found, step = self._by_parabola(function, unit, step)
        guess, price = found, function.spent_gradients - before
        if self.route == "exact" or (self.route == "auto" and (checking or not found.converged)):
            operator = HessianOperator(function)
            found = Estimate(value=float(unit @ operator(unit)), num_matvecs=1, route="exact")
            if not guess.converged:
                step = self._shortest(operator.mean_loss, found.value, function) or step
        if math.isfinite(found.value):
            if self.route == "auto":
                agrees = not checking or abs(guess.value - found.value) <= self.tol * abs(found.value)
                self._parabola_serves = guess.converged and agrees
            if found.route == "exact" and not (checking and self._parabola_serves):
                price = PRICES["exact"]  # of the next one, which tries no parabola
            self._step, self._price_gradients = step, price
        return {self.name: found}

    def _by_gradients(self, function: FixedLoss, unit: Tensor, step: float) -> Estimate:
        held = HeldLoss(function)
        centre = held.value()
        (ahead, rising), (behind, falling) = held.gradient_at(step * unit), held.gradient_at(-step * unit)
        value = float(unit @ (rising - falling)) / (2 * step)
        reach = self._shortest(centre, value, function) or step
        if reach > step:
            ahead, behind = held.value_at(reach * unit), held.value_at(-reach * unit)
        else:
            reach = step
        deviation = abs(value - (ahead - 2 * centre + behind) / reach**2)
        smooth = deviation <= 0.5 * abs(value)  # with kinks, nothing shrinks in proportion to the step
        rounding = torch.finfo(function.dtype).eps * float(torch.linalg.vector_norm(rising)) / step
        error = (2 * (step / reach) ** 2 if smooth else 1.0) * deviation + rounding
        return Estimate(value=value, standard_error=error, converged=error <= self.tol * abs(value), route="gradient")

    def _by_parabola(self, function: FixedLoss, unit: Tensor, step: float) -> tuple[Estimate, float]:
        """Return the estimate, and the step that would have been best."""
        held = HeldLoss(function)
        centre = held.value()
        found = self._extrapolated(held, unit, step, centre)
        best = self._shortest(centre, found.value, function)
        if not found.converged and best is not None and not 0.5 < best / step < 1.2:
            step = best
            found = self._extrapolated(held, unit, step, centre)
            best = self._shortest(centre, found.value, function)
        return found, step if found.converged or best is None else best

    def _extrapolated(self, held: HeldLoss, unit: Tensor, step: float, centre: float) -> Estimate:
        whole, half = (
            (held.value_at(h * unit) - 2 * centre + held.value_at(-h * unit)) / h**2 for h in (step, step / 2)
        )
        added = (half - whole) / 3
        error = abs(added) + _rounding(centre, held.function) / step**2
        value = half + added
        return Estimate(value=value, standard_error=error, converged=error <= self.tol * abs(value), route="parabola")

    def _shortest(self, centre: float, value: float, function: FixedLoss) -> float | None:
        """Return the step at which rounding makes half of the error that is allowed; None where there is none."""
        allowed = 0.5 * self.tol * abs(value)
        if not (math.isfinite(allowed) and allowed > 0 and math.isfinite(centre) and centre != 0):
            return None
        return math.sqrt(_rounding(centre, function) / allowed)


def _rounding(loss: float, function: FixedLoss) -> float:
    """Return the rounding of the extrapolated parabola times the square of its step.

    Of the five losses it is (16, -30, 16, -1, -1) / 3 over the square of the step: the root of the sum of squares is
    12.5.
    """
    return 12.5 * ROUNDING * torch.finfo(function.dtype).eps * abs(loss)
