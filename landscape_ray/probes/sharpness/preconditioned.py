"""Preconditioned sharpness: the largest curvature in the coordinates in which an adaptive optimizer steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.probes.estimate import UNKNOWN, Estimate
from landscape_ray.probes.fixed_loss import Batches, FixedLoss
from landscape_ray.probes.losses import Loss
from landscape_ray.probes.probe import Host, Need, Probe
from landscape_ray.probes.sharpness.top import Route, top_pair


def preconditioned_sharpness(
    module: nn.Module,
    loss: Loss,
    batches: Batches,
    preconditioner: Sequence[Tensor],
    *,
    start: Tensor | None = None,
    tol: float = 0.03,
    max_matvecs: int = 40,
    route: Route = "exact",
    seed: int = 0,
    eval_mode: bool = True,
) -> Estimate:
    """Return the largest algebraic eigenvalue of `P^-1 H` at the present weights.

    P is diagonal, and an update is `w <- w - lr P^-1 m` with m a running mean of the gradient. With P held fixed that
    diverges on a quadratic above the threshold of the optimizer, 38 / lr for Adam at beta1 = 0.9 (see
    `stability.threshold`); along full-batch training the value settles there. Found by Lanczos on the symmetric
    `P^-1/2 H P^-1/2`, which has the same eigenvalues.

    Adam's own P after t updates, from its state v, is

        P = (1 - beta1^t) (sqrt(v / (1 - beta2^t)) + eps)

    The first factor undoes the correction of the first moment, which lengthens early steps: with it, the threshold
    holds from the first update on. It is 0.995 after 50 updates at beta1 = 0.9, and can be left out from there on.
    Where parameter groups have factors of the learning rate (muP), divide P by them.

    Weights whose gradients died have P near eps; their curvature, divided by that, can be the largest without
    mattering for stability.

    Args:
        module: any module, float32 or float64; data-parallel wrappers taken off.
        loss: `loss(module, batch)`, the mean loss of one micro-batch.
        batches: pairs `(batch, num_examples)`, batches with `num_examples`, or a single batch.
        preconditioner: P, one tensor for each trainable parameter, in their order and shapes, > 0.
        start: first direction, flat over the trainable parameters; the `vector` of an earlier estimate saves products.
            None draws one.
        tol: residual to reach, relative to the value, > 0.
        max_matvecs: most products, >= 1; memory: one vector of the size of the parameters for each.
        route: see :func:`landscape_ray.probes.sharpness.top.sharpness`.
        seed: of the start vector.
        eval_mode: measure in eval mode: no dropout, running batch statistics. False keeps the modes of the host.

    Returns:
        The estimate. `standard_error` is the residual in the coordinates of the symmetric matrix: an eigenvalue lies
        within that distance. `vector` is the eigenvector of `P^-1 H` in weight space, at unit length. nan where P is
        not finite.

    Raises:
        UserError: an argument out of its range, P of other shapes or not positive, or a function that cannot be
            measured.

    References:
        Cohen et al., Adaptive gradient methods at the edge of stability, 2022, arXiv:2207.14484.

    >>> scales = nn.ParameterList([nn.Parameter(torch.ones(2))])  # 0.5 (w1^2 + 10 w2^2): H = diag(1, 10)
    >>> def loss(module, curvature):
    ...     return 0.5 * (curvature * module[0] ** 2).sum()
    >>> found = preconditioned_sharpness(scales, loss, [torch.tensor([1.0, 10.0])], [torch.tensor([0.01, 1.0])])
    >>> round(found.value, 3)
    100.0
    """
    probe = PreconditionedSharpnessProbe(
        batches, tol=tol, max_matvecs=max_matvecs, route=route, eval_mode=eval_mode, seed=seed
    )
    probe._vector = start
    return probe.measure(module, loss, Host(preconditioner=lambda: preconditioner))[probe.name]


class PreconditionedSharpnessProbe(Probe):
    """Preconditioned sharpness along a training run, started from the eigenvector of the last measurement.

    The host tells what the optimizer divides the gradient by; for adam and adamw, the factor `1 - beta1^t` comes on
    top, with `host.momentum` as beta1 and `host.step` as t. For SGD it is the factors of the learning rate, if any.
    Where there is no such diagonal (before Adam's first update; Muon), or it is not finite: nan, not converged.

    As with the sharpness, a warm start can hold on to an eigenvector that another one has overtaken, so every
    `cold_every`-th measurement starts from a random vector; and with `route="auto"` these are the ones that check
    finite differences by an exact product.
    """

    name = "preconditioned_sharpness"
    needs: ClassVar[frozenset[Need]] = frozenset({"preconditioner"})
    STATE: ClassVar[tuple[str, ...]] = ("_vector", "_differences_failed", "_difference_error", "_price_gradients")

    def __init__(
        self,
        batches: Batches,
        *,
        tol: float = 0.03,
        max_matvecs: int = 40,
        route: Route = "exact",
        cold_every: int = 10,
        eval_mode: bool = True,
        seed: int = 0,
    ) -> None:
        """Keep the settings.

        Args:
            batches: see :func:`preconditioned_sharpness`; the same at every measurement.
            tol: see :func:`preconditioned_sharpness`.
            max_matvecs: see :func:`preconditioned_sharpness`.
            route: see :func:`preconditioned_sharpness`.
            cold_every: a random start at measurements 0, cold_every, 2 cold_every ...; >= 1, where 1 is always.
            eval_mode: see :func:`preconditioned_sharpness`.
            seed: of the random starts, each another one.

        Raises:
            UserError: an argument out of its range.
        """
        if not (math.isfinite(tol) and tol > 0):
            raise UserError(f"tol must be positive and finite, got {tol}; 0.03 is three percent")
        if max_matvecs < 1:
            raise UserError(f"max_matvecs must be at least 1, got {max_matvecs}; 40 suffices for most networks")
        if route not in get_args(Route):
            raise UserError(f"route must be one of {', '.join(get_args(Route))}, got '{route}'")
        if cold_every < 1:
            raise UserError(f"cold_every must be at least 1, got {cold_every}; 1 starts every measurement anew")
        super().__init__(batches, eval_mode=eval_mode, seed=seed)
        self.tol, self.max_matvecs, self.route, self.cold_every = tol, max_matvecs, route, cold_every
        self._vector: Tensor | None = None
        self._differences_failed, self._difference_error = False, 0.0
        self._price_gradients = {"exact": 25.0, "finite_difference": 15.0, "auto": 18.0}[route]

    @property
    def price_gradients(self) -> float:
        """What the last measurement cost, in gradients on the batches of the probe; a typical price before any."""
        return self._price_gradients

    def _measure(self, function: FixedLoss, host: Host) -> dict[str, Estimate]:
        """Return the preconditioned sharpness; one that is not finite is not remembered."""
        diagonal = _diagonal(function, host)
        if diagonal is None or not bool(diagonal.isfinite().all()):
            return {self.name: UNKNOWN}
        before = function.spent_gradients
        roots = diagonal.sqrt()
        cold = self._vector is None or (self._num_measured > 0 and self._num_measured % self.cold_every == 0)
        start = None if cold or self._vector is None else self._vector.to(roots)
        if start is not None and start.shape == roots.shape:
            start = roots * start
        first = self._num_measured == 0  # also where a start was given
        route = "exact" if self.route == "auto" and self._differences_failed and not cold else self.route
        estimate, error, good = top_pair(
            function,
            start,
            self.tol,
            self.max_matvecs,
            route,
            self.seed + self._num_measured,
            error=None if cold or first else self._difference_error,
            allowance_gradients=host.allowance_gradients - before,
            preconditioner=diagonal,
        )
        if estimate.vector is None:
            return {self.name: estimate}
        vector = estimate.vector / roots
        self._vector = vector / torch.linalg.vector_norm(vector)
        self._differences_failed, self._difference_error = not good, error
        self._price_gradients = function.spent_gradients - before
        return {self.name: dataclasses.replace(estimate, vector=self._vector)}


def _diagonal(function: FixedLoss, host: Host) -> Tensor | None:
    """Return P as one vector, None where there is none.

    Raises:
        UserError: it is not that of these parameters.
    """
    tensors = None if host.preconditioner is None else host.preconditioner()
    if tensors is None:
        return None
    if [t.shape for t in tensors] != [p.shape for p in function.parameters]:
        raise UserError(
            f"preconditioner must have the shapes of the {len(function.parameters)} trainable parameters, got "
            f"{len(tensors)} tensors; give them in the order of module.parameters()"
        )
    diagonal = function.flatten(tensors).to(function.device)
    if host.optimizer in ("adam", "adamw") and host.step > 0:
        diagonal *= 1 - host.momentum**host.step
    return diagonal
