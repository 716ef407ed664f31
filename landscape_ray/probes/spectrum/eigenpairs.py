"""The largest and smallest eigenvalues of a curvature matrix of a module."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.probes.estimate import UNKNOWN, Estimate
from landscape_ray.probes.fixed_loss import Batches, FixedLoss, observing
from landscape_ray.probes.losses import Loss
from landscape_ray.probes.operators.fisher import EmpiricalFisher, SampledFisher
from landscape_ray.probes.operators.gauss_newton import GGNOperator
from landscape_ray.probes.operators.hessian import HessianOperator
from landscape_ray.probes.operators.jacobian import JacobianOperator
from landscape_ray.probes.probe import Host, Probe
from landscape_ray.probes.spectrum.lanczos import ExtremalPairs, extremal_pairs

Curvature: TypeAlias = Literal["hessian", "ggn", "fisher", "empirical_fisher"]
"""Which matrix: the Hessian, Gauss-Newton, Fisher with one sampled label a target, or the data's labels."""

FLOOR = 0.01
"""Eigenvalues below this share of the largest in magnitude need not be known better than `tol` of that share."""


def curvature_operator(
    function: FixedLoss, curvature: Curvature, *, seed: int = 0
) -> HessianOperator | JacobianOperator:
    """Return a curvature matrix of a function.

    Args:
        function: whose; with a `DetailedLoss` for all but the Hessian.
        curvature: see :data:`Curvature`.
        seed: of the labels of the Fisher matrix.

    Raises:
        UserError: an unknown name, or a loss that cannot be taken apart.
    """
    check_curvature(curvature)
    if curvature == "hessian":
        return HessianOperator(function)
    if curvature == "ggn":
        return GGNOperator(function)
    return SampledFisher(function, seed=seed) if curvature == "fisher" else EmpiricalFisher(function)


def check_curvature(curvature: str) -> None:
    """Check the name of a curvature matrix.

    Raises:
        UserError: there is none of that name.
    """
    if curvature not in get_args(Curvature):
        raise UserError(f"curvature must be one of {', '.join(get_args(Curvature))}, got '{curvature}'")


def expected_price(curvature: Curvature, batches: Batches, num_products: int) -> float:
    """Return what so many products will cost, in gradients; see the operators, which count it.

    With several processes the price is that of several micro-batches: it must not depend on what one of them holds.
    """
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    single = len(batches) == 1 and not (there and torch.distributed.get_world_size() > 1)
    setup, each = (HessianOperator if curvature == "hessian" else JacobianOperator).prices(single)
    return setup + each * num_products


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Eigenvalues:
    """What :func:`eigenvalues` found.

    Attributes:
        largest: the largest eigenvalues, descending; `standard_error` is the residual, a bound, and `vector` the
            eigenvector. nan where weights or loss are not finite.
        smallest: the smallest ones, ascending.
        condition_number: see :func:`condition_number`.
        start: the normalised sum of the eigenvectors, where to start the next time; None where there are none.
        num_matvecs: products spent.
        price_gradients: what was spent, in gradients on the batches.
        cost_seconds: wall-clock seconds, everything included.
        converged: whether every residual met the tolerance.
    """

    largest: tuple[Estimate, ...]
    smallest: tuple[Estimate, ...]
    condition_number: Estimate
    start: Tensor | None = dataclasses.field(repr=False, compare=False)
    num_matvecs: int
    price_gradients: float
    cost_seconds: float
    converged: bool


def eigenvalues(
    module: nn.Module,
    loss: Loss,
    batches: Batches,
    *,
    k: int = 1,
    num_smallest: int = 0,
    curvature: Curvature = "hessian",
    start: Tensor | None = None,
    tol: float = 0.01,
    max_matvecs: int = 200,
    max_basis: int | None = None,
    block: int = 1,
    parameters: Sequence[nn.Parameter] | None = None,
    seed: int = 0,
    eval_mode: bool = True,
) -> Eigenvalues:
    """Return the algebraically largest and smallest eigenvalues of a curvature matrix at the present weights.

    Each comes with its residual; a value is within it of *some* eigenvalue, and mostly far nearer, about
    residual^2 / gap. Residuals do not tell that none was skipped: at tol = 0.03 the last of five or ten close
    eigenvalues was up to 8 percent off in one of twenty runs, at 0.01 no error above 0.1 percent was seen in those
    that follow.

    Products for the largest one / the ten largest, cold, and the largest relative error of a value; in brackets those
    of ARPACK, with the better of two sizes of its basis:

        tol                                0.01                        0.001
        GPT, 171k weights            8 / 43, 3e-4 (9 / 47)       10 / 49, 3e-6 (9 / 54)
        convolutional net, 19k       9 / 29, 4e-4 (21 / 27)      11 / 31, 6e-7 (13 / 34)

    Args:
        module: any module, float32 or float64; data-parallel wrappers taken off.
        loss: `loss(module, batch)`, the mean loss of one micro-batch; a `DetailedLoss` for all but the Hessian.
        batches: pairs `(batch, num_examples)`, batches with `num_examples`, or a single batch.
        k: how many of the largest, >= 0.
        num_smallest: how many of the smallest, >= 0; at least one value in all.
        curvature: hessian; ggn; fisher, with one label drawn for each target; or empirical_fisher, of the examples.
        start: first vector; `start` of an earlier result. None draws one.
        tol: residual to reach for every value, relative to it, or to a hundredth of the largest in magnitude if it is
            smaller; > 0.
        max_matvecs: most products, >= k + num_smallest.
        max_basis: most vectors of the size of the parameters kept at once; None: three times the number of values, but
            at least 40. For ten values 20 took an eighth more products, 16 a quarter.
        block: number of start vectors; an eigenvalue that is repeated exactly is found up to `block` times, and with 1
            mostly once. 2 took a fifth more products for ten values, half more for one.
        parameters: those to look at, such as a layer's; None for all with `requires_grad`.
        seed: of the start vectors, and the labels of the Fisher matrix.
        eval_mode: measure in eval mode: no dropout, running batch statistics. False keeps the modes of the host.

    Raises:
        UserError: an argument out of its range, or something that cannot be measured.

    >>> layer = nn.Linear(2, 1, bias=False)  # 0.5 mean (w x)^2: H = X'X / n
    >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> found = eigenvalues(layer, lambda module, batch: 0.5 * module(batch).square().mean(), [x], k=1, num_smallest=1)
    >>> round(found.largest[0].value, 4), round(found.smallest[0].value, 4), round(found.condition_number.value, 4)
    (2.0, 0.5, 4.0)
    """
    began = time.perf_counter()
    check_tol(tol)
    check_curvature(curvature)
    with observing(module, loss, batches, eval_mode=eval_mode, parameters=parameters, seed=seed) as function:
        found = unknown(k, num_smallest)
        if function.finite:
            function.check_deterministic()
            found = solve(
                function,
                k=k,
                num_smallest=num_smallest,
                curvature=curvature,
                start=start,
                tol=tol,
                max_matvecs=max_matvecs,
                max_basis=max_basis,
                block=block,
                seed=seed,
            )
    return dataclasses.replace(
        found, price_gradients=function.spent_gradients, cost_seconds=time.perf_counter() - began
    )


def solve(
    function: FixedLoss,
    *,
    k: int,
    num_smallest: int,
    curvature: Curvature,
    start: Tensor | None,
    tol: float,
    max_matvecs: int,
    max_basis: int | None = None,
    block: int = 1,
    seed: int,
    allowance_gradients: float = math.inf,
) -> Eigenvalues:
    """Return the eigenvalues at finite weights; the cost is counted by `function`. Arguments as above.

    The allowance covers what was spent before, too. It may be too small for a product for each value, which is made.
    """
    operator = curvature_operator(function, curvature, seed=seed)
    affordable = operator.most_products(allowance_gradients - function.spent_gradients, max_matvecs)
    pairs = extremal_pairs(
        operator,
        function.size,
        k=k,
        num_smallest=num_smallest,
        start=start,
        tol=tol,
        floor=FLOOR,
        max_matvecs=min(max_matvecs, max(k + num_smallest, affordable)),
        max_basis=max(40, 3 * (k + num_smallest), block + k + num_smallest + 2) if max_basis is None else max_basis,
        block=block,
        seed=seed,
        dtype=function.dtype,
        device=function.device,
    )
    if not (bool(pairs.values.isfinite().all()) and math.isfinite(operator.mean_loss)):
        return dataclasses.replace(unknown(k, num_smallest), num_matvecs=pairs.num_matvecs)
    # residuals go on shrinking while other pairs are waited for; products are no better than their rounding
    rounding = torch.finfo(function.dtype).eps * float(pairs.ritz_values.abs().max())
    found = tuple(
        Estimate(
            value=value,
            standard_error=max(residual, rounding),
            num_matvecs=pairs.num_matvecs,
            converged=pairs.converged or residual < tol * max(abs(value), FLOOR * float(pairs.ritz_values.abs().max())),
            vector=vector,
        )
        for value, residual, vector in zip(pairs.values.tolist(), pairs.residuals.tolist(), pairs.vectors, strict=True)
    )
    together = pairs.vectors.sum(0)
    return Eigenvalues(
        largest=found[:k],
        smallest=found[k:],
        condition_number=condition_number(pairs, torch.finfo(function.dtype).eps, whole=start is None),
        start=together / torch.linalg.vector_norm(together),
        num_matvecs=pairs.num_matvecs,
        price_gradients=0.0,
        cost_seconds=0.0,
        converged=pairs.converged,
    )


def unknown(k: int, num_smallest: int) -> Eigenvalues:
    """Return what is known where weights or loss are not finite."""
    return Eigenvalues(
        largest=(UNKNOWN,) * k,
        smallest=(UNKNOWN,) * num_smallest,
        condition_number=UNKNOWN,
        start=None,
        num_matvecs=0,
        price_gradients=0.0,
        cost_seconds=0.0,
        converged=False,
    )


def condition_number(pairs: ExtremalPairs, eps: float, *, whole: bool) -> Estimate:
    """Return the ratio of the largest to the smallest nonzero magnitude of an eigenvalue, as far as it is known.

        kappa = max_i |lambda_i| / min_{lambda_i != 0} |lambda_i|

    For an indefinite matrix the smallest magnitude lies inside the spectrum, where Ritz values may fall anywhere. So
    it is taken from the singular values of T: the smallest `||A v||` over unit vectors of the Krylov space. By
    interlacing none of them is below the |lambda_i| at its place, so the ratio grows with the iteration towards kappa,
    and is below it unless A has eigenvalues at zero that the iteration has not yet told from small ones. Where the
    Krylov space was exhausted without a restart it is kappa, and `converged`. It rarely is for a network: its Hessian
    has a continuum of eigenvalues around zero, and kappa then says little more than where rounding begins.

    Args:
        pairs: of an iteration.
        eps: machine epsilon of its vectors; magnitudes below its square root, relative to the largest, count as zero.
        whole: whether the start vector had parts along all eigenvectors; a warm one may not.

    Returns:
        kappa as far as it is known; inf for a matrix of zeros.
    """
    magnitudes = torch.linalg.svdvals(pairs.projected)
    nonzero = magnitudes[magnitudes > math.sqrt(eps) * magnitudes[0]]
    value = float(nonzero[0] / nonzero[-1]) if len(nonzero) else math.inf
    exact = whole and pairs.exhausted and pairs.num_restarts == 0
    return Estimate(value=value, standard_error=0.0, num_matvecs=pairs.num_matvecs, converged=exact)


def check_tol(tol: float) -> None:
    """Check a relative tolerance.

    Raises:
        UserError: it is not positive and finite.
    """
    if not (math.isfinite(tol) and tol > 0):
        raise UserError(f"tol must be positive and finite, got {tol}; 0.01 tells close eigenvalues apart")


class EigenvaluesProbe(Probe):
    """The largest and smallest eigenvalues of the Hessian along a training run.

    It starts from the sum of the last eigenvectors, which takes the memory of one. For five and ten values on a small
    GPT and a convolutional net that saves a tenth of the products where two updates lie between measurements, and
    nothing where 50 do; to start from all of them as a block doubles the products. A warm start can hold on to
    eigenvectors that others have overtaken, so every `cold_every`-th measurement starts from a random vector.
    """

    name = "eigenvalues"
    STATE: ClassVar[tuple[str, ...]] = ("_start", "_price_gradients")

    def __init__(
        self,
        batches: Batches,
        *,
        k: int = 3,
        num_smallest: int = 1,
        tol: float = 0.01,
        max_matvecs: int = 100,
        curvature: Curvature = "hessian",
        cold_every: int = 10,
        eval_mode: bool = True,
        seed: int = 0,
    ) -> None:
        """Keep the settings.

        Args:
            batches: see :func:`eigenvalues`; the same at every measurement.
            k: how many of the largest, >= 1: `eigenvalues`, `eigenvalues/2` ...
            num_smallest: how many of the smallest, >= 0: `eigenvalues/smallest`, `eigenvalues/smallest_2` ...
            tol: see :func:`eigenvalues`.
            max_matvecs: see :func:`eigenvalues`.
            curvature: see :func:`eigenvalues`; all but hessian need a `DetailedLoss`.
            cold_every: a random start at measurements 0, cold_every, 2 cold_every ...; >= 1, where 1 is always.
            eval_mode: see :func:`eigenvalues`.
            seed: of the random starts, each another one.

        Raises:
            UserError: an argument out of its range.
        """
        check_tol(tol)
        check_curvature(curvature)
        if k < 1 or num_smallest < 0 or max_matvecs < k + num_smallest:
            raise UserError(
                "k must be at least 1, num_smallest at least 0 and max_matvecs at least their sum, "
                f"got {k}, {num_smallest} and {max_matvecs}"
            )
        if cold_every < 1:
            raise UserError(f"cold_every must be at least 1, got {cold_every}; 1 starts every measurement anew")
        super().__init__(batches, eval_mode=eval_mode, seed=seed)
        self.k, self.num_smallest, self.tol, self.max_matvecs = k, num_smallest, tol, max_matvecs
        self.curvature: Curvature = curvature
        self.cold_every = cold_every
        self._start: Tensor | None = None
        self._price_gradients: float | None = None

    @property
    def price_gradients(self) -> float:
        """What the last measurement cost, in gradients on the batches of the probe; a typical price before any."""
        if self._price_gradients is None:
            usual = min(self.max_matvecs, 10 + 3 * (self.k + self.num_smallest))
            return expected_price(self.curvature, self.batches, usual)
        return self._price_gradients

    def _measure(self, function: FixedLoss, host: Host) -> dict[str, Estimate]:
        """Return the eigenvalues at the present weights.

        A measurement that is not finite is not remembered: the next one starts where the last finite one ended.
        """
        k, num_smallest = self._counts(function.size)
        found = solve(
            function,
            k=k,
            num_smallest=num_smallest,
            curvature=self.curvature,
            start=None if self._num_measured % self.cold_every == 0 else self._start,
            tol=self.tol,
            max_matvecs=self.max_matvecs,
            seed=self.seed + self._num_measured,
            allowance_gradients=host.allowance_gradients,
        )
        if found.start is not None:
            self._start, self._price_gradients = found.start, function.spent_gradients
        estimates = {self.name: found.largest[0]}
        estimates |= {f"{self.name}/{place}": estimate for place, estimate in enumerate(found.largest[1:], start=2)}
        for place, estimate in enumerate(found.smallest, start=1):
            estimates[f"{self.name}/smallest" + (f"_{place}" if place > 1 else "")] = estimate
        return estimates

    def _counts(self, size: int) -> tuple[int, int]:
        k = min(self.k, size)
        return k, min(self.num_smallest, size - k)
