"""How the extremal eigenvalues grow as the batch shrinks: curvature on batches against curvature on all examples."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.probes.estimate import Estimate
from landscape_ray.probes.fixed_loss import Batches, FixedLoss, observing
from landscape_ray.probes.losses import Loss
from landscape_ray.probes.spectrum.eigenpairs import Curvature, check_curvature, check_tol, solve
from landscape_ray.probes.spectrum.sign_samples import error_of_mean


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchSizeEffect:
    """What :func:`batch_size_effect` found.

    Attributes:
        num_examples: N, of the whole.
        batch_sizes: B, ascending.
        largest: largest eigenvalue on batches of each size: the mean, with its standard error, over disjoint batches.
        smallest: smallest eigenvalue, likewise; empty for matrices without negative eigenvalues.
        full_largest: largest eigenvalue on all examples; `standard_error` is the residual.
        full_smallest: smallest one, likewise; None for matrices without negative eigenvalues.
        variance_largest: P s^2 as fitted to the largest eigenvalues; nan where they are not finite.
        variance_smallest: as fitted to the smallest ones; by the theory the same. None as above.
        fit_error_largest: root mean square of the relative differences between fit and measurement.
        fit_error_smallest: likewise.
        num_matvecs: products spent, on batches and on the whole.
        price_gradients: what was spent, in gradients on all examples.
        cost_seconds: wall-clock seconds, everything included.
    """

    num_examples: int
    batch_sizes: tuple[int, ...]
    largest: tuple[Estimate, ...]
    smallest: tuple[Estimate, ...]
    full_largest: Estimate
    full_smallest: Estimate | None
    variance_largest: Estimate
    variance_smallest: Estimate | None
    fit_error_largest: float
    fit_error_smallest: float
    num_matvecs: int
    price_gradients: float
    cost_seconds: float

    def predict(self, batch_size: float) -> tuple[float, float]:
        """Return the largest and the smallest eigenvalue that the fit expects on batches of this size.

        Args:
            batch_size: 1 ... num_examples. The smallest is nan for matrices without negative eigenvalues.

        Raises:
            UserError: a batch size out of that range.
        """
        if not 1 <= batch_size <= self.num_examples:
            raise UserError(f"batch_size must be 1 ... {self.num_examples}, got {batch_size}")
        share = _shortage(batch_size, self.num_examples)
        largest = batch_eigenvalue(self.full_largest.value, self.variance_largest.value * share)
        if self.full_smallest is None or self.variance_smallest is None:
            return largest, math.nan
        return largest, -batch_eigenvalue(-self.full_smallest.value, self.variance_smallest.value * share)


def batch_eigenvalue(value: float, variance: float) -> float:
    """Return the largest eigenvalue of a matrix plus symmetric noise, P x P, in the limit of large P.

        value + P s^2 / value    if value > sqrt(P s^2),    otherwise 2 sqrt(P s^2)

    Args:
        value: largest eigenvalue of the matrix, of low rank.
        variance: P s^2, s the standard deviation of the elements of the noise, independent but for the symmetry.

    References:
        Granziol, Zohren and Roberts, Learning rates as a function of batch size: a random matrix theory approach to
        neural network training, JMLR 23, 2022, arXiv:2006.09092; Capitaine, Donati-Martin and Feral, The largest
        eigenvalues of finite rank deformation of large Wigner matrices, Annals of Probability 37, 2009.

    >>> batch_eigenvalue(2.0, 1.0), batch_eigenvalue(0.5, 1.0)
    (2.5, 2.0)
    """
    return value + variance / value if value > math.sqrt(variance) else 2.0 * math.sqrt(variance)


def batch_size_effect(
    module: nn.Module,
    loss: Loss,
    examples: Any,
    batch_sizes: Sequence[int],
    *,
    num_batches: int = 4,
    curvature: Curvature = "hessian",
    tol: float = 0.01,
    max_matvecs: int = 100,
    seed: int = 0,
    eval_mode: bool = True,
    progress: Callable[[str], None] | None = None,
) -> BatchSizeEffect:
    """Return extremal eigenvalues on batches of several sizes and on all examples, and the noise that explains them.

    If the curvature on a batch is that of the whole plus noise whose elements are independent, with variance
    s^2 (1/B - 1/N), then with `v = P s^2 (1/B - 1/N)`

        lambda_1(B) = lambda_1 + v / lambda_1    if lambda_1 > sqrt(v),    otherwise 2 sqrt(v)

    and the same for the negative of the smallest eigenvalue. P s^2 is fitted to the relative differences, separately at
    both ends. The noise of a network is not of that kind, the Hessians of single examples have low rank: `fit_error`
    says how well the law describes it. With B = 8, 32, 128 of 1024 it was 0.5 to 8 percent at initialisation of an MLP
    and a convolutional net, 0.1 to 17 percent along the training of the MLP, and 21 and 45 percent, at the two ends,
    for the trained convolutional net. So measure the size that matters.

    Args:
        module: any module, float32 or float64; data-parallel wrappers taken off.
        loss: `loss(module, batch)`, the mean loss of one batch; a `DetailedLoss` for all but the Hessian.
        examples: one batch with all examples: a tensor, or a tuple, list or dict of tensors, whose first dimension
            counts the examples; the whole of them in this process. It is evaluated in pieces of the largest batch size.
        batch_sizes: two or more, 1 ... N / 2. A batch of one size begins like the first batch of a larger one.
        num_batches: disjoint batches of each size, >= 2; fewer where there are not that many.
        curvature: hessian; ggn; fisher, with one label drawn for each target; or empirical_fisher, of the examples. The
            smallest eigenvalue is of interest for the Hessian alone.
        tol: see :func:`landscape_ray.probes.spectrum.eigenpairs.eigenvalues`.
        max_matvecs: as there.
        seed: of the choice of examples, and as there.
        eval_mode: as there.
        progress: called with a few words about the batch that comes next.

    Raises:
        UserError: an argument out of its range, several processes, or something that cannot be measured.

    References:
        Granziol, Zohren and Roberts, Learning rates as a function of batch size: a random matrix theory approach to
        neural network training, JMLR 23, 2022, arXiv:2006.09092.
    """
    began = time.perf_counter()
    check_tol(tol)
    check_curvature(curvature)
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    if there and torch.distributed.get_world_size() > 1:
        raise UserError(
            "the effect of the batch size must be measured in one process, got several; "
            "a batch of one of them would be counted as the whole"
        )
    num_examples = _count(examples)
    sizes = check_batch_sizes(batch_sizes, num_examples)
    if num_batches < 2:
        raise UserError(f"num_batches must be at least 2, got {num_batches}; the error needs two disjoint batches")
    order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed))
    num_smallest = 1 if curvature == "hessian" else 0
    spent, num_matvecs = 0.0, 0

    def extremes(parts: Batches, share: float) -> tuple[Estimate, ...]:
        nonlocal spent, num_matvecs
        function = FixedLoss(module, loss, parts, seed=seed)
        found = solve(
            function,
            k=1,
            num_smallest=num_smallest,
            curvature=curvature,
            start=None,
            tol=tol,
            max_matvecs=max_matvecs,
            seed=seed,
        )
        spent += share * function.spent_gradients
        num_matvecs += found.num_matvecs
        return *found.largest, *found.smallest

    with observing(module, loss, [(examples, 1)], eval_mode=eval_mode, seed=seed):
        tell = progress or (lambda words: None)
        tell(f"all {num_examples} examples")
        whole = [(_rows(examples, rows), len(rows)) for rows in torch.split(order, sizes[-1])]
        full = extremes(whole, 1.0)
        on_batches: list[list[Estimate]] = [[] for _ in full]
        for size in sizes:
            chosen = torch.split(order[: min(num_batches, num_examples // size) * size], size)
            tell(f"{len(chosen)} batches of {size}")
            found = [extremes([(_rows(examples, rows), size)], size / num_examples) for rows in chosen]
            for end, values in zip(on_batches, zip(*found, strict=True), strict=True):
                end.append(_mean([estimate.value for estimate in values]))

    shortages = [_shortage(size, num_examples) for size in sizes]
    top, top_error = _fit(full[0].value, [e.value for e in on_batches[0]], shortages)
    bottom, bottom_error = None, math.nan
    if num_smallest:
        bottom, bottom_error = _fit(-full[1].value, [-e.value for e in on_batches[1]], shortages)
    return BatchSizeEffect(
        num_examples=num_examples,
        batch_sizes=tuple(sizes),
        largest=tuple(on_batches[0]),
        smallest=tuple(on_batches[1]) if num_smallest else (),
        full_largest=full[0],
        full_smallest=full[1] if num_smallest else None,
        variance_largest=top,
        variance_smallest=bottom,
        fit_error_largest=top_error,
        fit_error_smallest=bottom_error,
        num_matvecs=num_matvecs,
        price_gradients=spent,
        cost_seconds=time.perf_counter() - began,
    )


def check_batch_sizes(batch_sizes: Sequence[int], num_examples: int) -> list[int]:
    """Return the sizes, ascending and each once.

    Raises:
        UserError: fewer than two, or one that leaves no two disjoint batches.
    """
    sizes = sorted(set(batch_sizes))
    if len(sizes) < 2 or sizes[0] < 1 or 2 * sizes[-1] > num_examples:
        raise UserError(
            f"batch_sizes must be two or more between 1 and {num_examples // 2}, half of the examples, got "
            f"{list(batch_sizes)}; its error needs two disjoint batches: take smaller ones, or more examples"
        )
    return sizes


def _shortage(batch_size: float, num_examples: int) -> float:
    """Return 1/B - 1/N: the variance of a mean over B of N examples, drawn without replacement."""
    return 1.0 / batch_size - 1.0 / num_examples


def _fit(full: float, measured: Sequence[float], shortages: Sequence[float]) -> tuple[Estimate, float]:
    """Return P s^2 with its standard error, and the root mean square of the relative differences that are left."""
    from scipy.optimize import minimize_scalar

    if not all(math.isfinite(value) and value != 0.0 for value in (full, *measured)):
        return Estimate(value=math.nan, standard_error=math.nan, converged=False), math.nan
    # Each size alone asks for its own P s^2; the law grows with it, so the best for all is between them.
    alone = [_solve_for_variance(full, value) / share for value, share in zip(measured, shortages, strict=True)]

    def differences(variance: float) -> list[float]:
        return [
            batch_eigenvalue(full, variance * share) / value - 1.0
            for value, share in zip(measured, shortages, strict=True)
        ]

    low, high = min(alone), max(alone)
    best = low
    if high > low:
        found = minimize_scalar(
            lambda variance: sum(d * d for d in differences(variance)),
            bounds=(low, high),
            method="bounded",
            options={"xatol": 1e-9 * high},
        )
        best = float(found.x)
    squares = sum(d * d for d in differences(best))
    left = math.sqrt(squares / len(measured))
    if best == 0.0:
        return Estimate(value=0.0), left
    slopes = [
        share / (value * (full if full > math.sqrt(best * share) else math.sqrt(best * share)))
        for value, share in zip(measured, shortages, strict=True)
    ]
    error = math.sqrt(squares / (len(measured) - 1) / sum(slope * slope for slope in slopes))
    return Estimate(value=best, standard_error=error), left


def _solve_for_variance(full: float, measured: float) -> float:
    """Return the variance at which :func:`batch_eigenvalue` is `measured`; 0 where it is less than without noise."""
    if measured <= max(full, 0.0):
        return 0.0
    return (measured - full) * full if measured < 2.0 * full else 0.25 * measured * measured


def _mean(samples: Sequence[float]) -> Estimate:
    return Estimate(value=math.fsum(samples) / len(samples), standard_error=error_of_mean(samples))


def _count(examples: Any) -> int:
    tensors = _tensors(examples)
    counts = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    if len(counts) != 1 or 0 in counts:
        raise UserError(
            "examples must be tensors whose first dimension counts the examples, got "
            f"{[tuple(tensor.shape) for tensor in tensors]}; give all examples as one batch"
        )
    return counts.pop()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _rows(value: Any, rows: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value[rows.to(value.device)]
    if isinstance(value, dict):
        return {key: _rows(part, rows) for key, part in value.items()}
    parts = [_rows(part, rows) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
