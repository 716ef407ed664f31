"""The diagonal of a curvature matrix, and of any symmetric matrix that is known by its products with vectors."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.probes.fixed_loss import Batches, observing
from landscape_ray.probes.losses import Loss
from landscape_ray.probes.spectrum.eigenpairs import Curvature, check_curvature, curvature_operator, solve
from landscape_ray.probes.spectrum.sign_samples import MIN_SAMPLES, SignSamples, random_signs, student


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DiagonalResult:
    """The diagonal, element by element.

    Attributes:
        values: (size,).
        standard_errors: of the values, (size,), widened for few samples.
        num_matvecs: products spent, one a sample, and those for outliers.
        converged: the requested accuracy was reached.
        price_gradients: what was spent, in gradients on the batches, where a module was measured.
        cost_seconds: wall-clock seconds, likewise.
    """

    values: Tensor
    standard_errors: Tensor
    num_matvecs: int
    converged: bool
    price_gradients: float = 0.0
    cost_seconds: float = 0.0


def curvature_diagonal(
    module: nn.Module,
    loss: Loss,
    batches: Batches,
    *,
    curvature: Curvature = "hessian",
    num_outliers: int = 0,
    tol: float = 0.1,
    max_matvecs: int = 100,
    seed: int = 0,
    eval_mode: bool = True,
) -> DiagonalResult:
    """Return the diagonal of a curvature matrix of the mean loss at the present weights, flat over the parameters.

    Args:
        module: any module, float32 or float64; data-parallel wrappers taken off.
        loss: `loss(module, batch)`, the mean loss of one micro-batch; a `DetailedLoss` for all but the Hessian.
        batches: pairs `(batch, num_examples)`, batches with `num_examples`, or a single batch.
        curvature: hessian; ggn; fisher, with one label drawn for each target; or empirical_fisher, of the examples.
        num_outliers: largest eigenvalues whose part is computed first, so that it need not be sampled; about three
            products each.
        tol: root of the summed squared standard errors to reach, relative to the length of the diagonal, > 0.
        max_matvecs: most samples, >= 2, beside the products for the outliers.
        seed: of the random signs, the start vector, and the labels of the Fisher matrix.
        eval_mode: measure in eval mode: no dropout, running batch statistics. False keeps the modes of the host.

    Returns:
        The diagonal; nan where weights or loss are not finite.

    Raises:
        UserError: an argument out of its range, or something that cannot be measured.

    >>> layer = nn.Linear(2, 1, bias=False)  # 0.5 mean (w x)^2: H = X'X / n
    >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> curvature_diagonal(layer, lambda module, batch: 0.5 * module(batch).square().mean(), [x]).values
    tensor([2.0000, 0.5000])
    """
    began = time.perf_counter()
    check_curvature(curvature)
    if num_outliers < 0:
        raise UserError(f"num_outliers must be at least 0, got {num_outliers}; 10 are usual with ten classes")
    with observing(module, loss, batches, eval_mode=eval_mode, seed=seed) as function:
        _check(function.size, None, tol, max_matvecs)
        found = unknown_diagonal(function.size)
        if function.finite:
            function.check_deterministic()
            low_rank, spent = None, 0
            if num_outliers:
                k = min(num_outliers, function.size)
                pairs = solve(
                    function,
                    k=k,
                    num_smallest=0,
                    curvature=curvature,
                    start=None,
                    tol=0.03,
                    max_matvecs=30 + 10 * k,
                    seed=seed,
                )
                vectors = [e.vector for e in pairs.largest if e.vector is not None]
                spent = pairs.num_matvecs
                if len(vectors) == k:
                    low_rank = torch.tensor([e.value for e in pairs.largest]), torch.stack(vectors)
            operator = curvature_operator(function, curvature, seed=seed)
            found = diagonal(
                operator,
                function.size,
                low_rank=low_rank,
                tol=tol,
                max_matvecs=max_matvecs,
                seed=seed,
                dtype=function.dtype,
                device=function.device,
            )
            found = dataclasses.replace(found, num_matvecs=found.num_matvecs + spent)
            if not math.isfinite(operator.mean_loss):
                found = unknown_diagonal(function.size)
    return dataclasses.replace(
        found, price_gradients=function.spent_gradients, cost_seconds=time.perf_counter() - began
    )


def unknown_diagonal(size: int) -> DiagonalResult:
    """Return what is known where weights or loss are not finite."""
    nothing = torch.full((size,), math.nan)
    return DiagonalResult(values=nothing, standard_errors=nothing, num_matvecs=0, converged=False)


def diagonal(
    matvec: Callable[[Tensor], Tensor],
    size: int,
    *,
    low_rank: tuple[Tensor, Tensor] | None = None,
    tol: float = 0.1,
    max_matvecs: int = 100,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> DiagonalResult:
    """Return the diagonal of a symmetric matrix A, as the mean of v * (A v) over random signs v.

    The variance of a sample is the sum of the squares of the other entries of the row. Outliers of the spectrum, which
    make most of it, can be handed over: the diagonal of their part is known, and the rest is sampled.

    Args:
        matvec: `A v` for v of shape (size,).
        size: number of rows, >= 1.
        low_rank: values (k,) and orthonormal vectors (k, size) of a known part, such as the top eigenpairs; any part
            leaves the result unbiased.
        tol: root of the summed squared standard errors to reach, relative to the length of the diagonal, > 0.
        max_matvecs: most products, >= 2. Memory: five vectors beside the low-rank part.
        seed: of the random signs.
        dtype: of the vectors.
        device: of the vectors.

    Raises:
        UserError: an argument out of its range.

    References:
        Bekas, Kokiopoulou and Saad, An estimator for the diagonal of a matrix, Applied Numerical Mathematics 57, 2007;
        with a low-rank part: Baston and Nakatsukasa, 2022, arXiv:2201.10684.

    >>> matrix = torch.diag(torch.tensor([3.0, -1.0]))
    >>> diagonal(lambda v: matrix @ v, 2).values
    tensor([ 3., -1.])
    """
    _check(size, low_rank, tol, max_matvecs)
    generator = torch.Generator().manual_seed(seed)
    samples = SignSamples(elementwise=True)
    known = torch.zeros(size, dtype=dtype, device=device)
    if low_rank is not None:
        values, vectors = (part.to(known) for part in low_rank)
        known = values @ vectors.square()
    converged = False
    while len(samples.forms) < max_matvecs and samples.finite and not converged:
        signs = random_signs(size, generator, dtype, known.device)
        product = matvec(signs)
        if low_rank is not None:
            product = product - (values * (vectors @ signs)) @ vectors
        samples.add(signs, product)
        if len(samples.forms) >= MIN_SAMPLES:
            assert samples.mean is not None
            errors = _errors(samples)
            length = float(torch.linalg.vector_norm(known + samples.mean))
            converged = float(torch.linalg.vector_norm(errors)) <= tol * length
    assert samples.mean is not None
    return DiagonalResult(
        values=known + samples.mean,
        standard_errors=_errors(samples),
        num_matvecs=len(samples.forms),
        converged=converged,
    )


def _errors(samples: SignSamples) -> Tensor:
    assert samples.deviations is not None
    n = len(samples.forms)
    return (samples.deviations / (n * max(n - 1, 1))).clamp(min=0.0).sqrt() * student(max(n - 1, 1))


def _check(size: int, low_rank: tuple[Tensor, Tensor] | None, tol: float, max_matvecs: int) -> None:
    if size < 1:
        raise UserError(f"size must be at least 1, got {size}")
    if not (math.isfinite(tol) and tol > 0):
        raise UserError(f"tol must be positive and finite, got {tol}; 0.1 is 10 percent of the length of the diagonal")
    if max_matvecs < 2:
        raise UserError(f"max_matvecs must be at least 2, got {max_matvecs}; 100 is usual")
    if low_rank is not None and low_rank[1].shape != (*low_rank[0].shape, size):
        raise UserError(
            f"low_rank must be values (k,) and vectors (k, {size}), got {tuple(low_rank[0].shape)} and "
            f"{tuple(low_rank[1].shape)}"
        )
