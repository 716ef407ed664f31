"""Layer-wise and class-wise spectra: the eigenvalues of a layer's diagonal block, and of the loss on one class."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from landscape_ray.probes.fixed_loss import Batches, FixedLoss, observing
from landscape_ray.probes.losses import Loss
from landscape_ray.probes.operators.blocks import by_class, layers
from landscape_ray.probes.spectrum.eigenpairs import (
    Curvature,
    Eigenvalues,
    check_curvature,
    check_tol,
    solve,
    unknown,
)


def layer_eigenvalues(
    module: nn.Module,
    loss: Loss,
    batches: Batches,
    *,
    k: int = 1,
    num_smallest: int = 0,
    curvature: Curvature = "hessian",
    tol: float = 0.03,
    max_matvecs: int = 100,
    seed: int = 0,
    eval_mode: bool = True,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Eigenvalues]:
    """Return the largest and smallest eigenvalues of each layer's diagonal block of a curvature matrix.

    By interlacing, those of a block lie between the largest and the smallest of the whole; they do not sum to it. Each
    block has its own Lanczos run, whose products go through the whole network.

    Args:
        module: any module, float32 or float64; data-parallel wrappers taken off. A layer is a module with parameters of
            its own; tied weights belong to the first that has them.
        loss: see :func:`landscape_ray.probes.spectrum.eigenpairs.eigenvalues`; likewise what follows.
        batches: as there.
        k: as there, for each layer; a layer with fewer parameters has fewer values.
        num_smallest: as there, likewise.
        curvature: as there.
        tol: as there.
        max_matvecs: as there, for each layer.
        seed: as there.
        eval_mode: as there.
        progress: called with the name of each layer before it is solved.

    Returns:
        What was found, with its own cost, by the name of the layer, in the order of the parameters.

    Raises:
        UserError: as there.
    """
    check_tol(tol)
    check_curvature(curvature)
    with observing(module, loss, batches, eval_mode=eval_mode, seed=seed):
        found: dict[str, Eigenvalues] = {}
        for name, own in layers(module).items():
            if progress is not None:
                progress(name)
            function = FixedLoss(module, loss, batches, parameters=own, seed=seed)
            found[name] = _solve(function, k, num_smallest, curvature, tol, max_matvecs, seed)
        return found


def class_eigenvalues(
    module: nn.Module,
    loss: Loss,
    batches: Batches,
    *,
    groups: Tensor | Sequence[int] | None = None,
    k: int = 1,
    num_smallest: int = 0,
    curvature: Curvature = "hessian",
    tol: float = 0.03,
    max_matvecs: int = 100,
    seed: int = 0,
    eval_mode: bool = True,
    progress: Callable[[int], None] | None = None,
) -> dict[int, Eigenvalues]:
    """Return the largest and smallest eigenvalues of the curvature of each class: of the mean loss on its targets.

    The matrices of the classes, weighted by their shares of the targets, sum to that of all.

    Args:
        module: any module, float32 or float64; data-parallel wrappers taken off.
        loss: a `DetailedLoss`; see :func:`landscape_ray.probes.spectrum.eigenpairs.eigenvalues`, likewise what follows.
        batches: `(inputs, targets)` with integer targets.
        groups: class of each target value, such as a frequency band of each token; None takes the values as classes.
        k: as there, for each class.
        num_smallest: as there, likewise.
        curvature: as there.
        tol: as there.
        max_matvecs: as there, for each class.
        seed: as there.
        eval_mode: as there.
        progress: called with each class before it is solved.

    Returns:
        What was found, with its own cost in gradients on the examples of the class, by the class.

    Raises:
        UserError: as there; or targets that are no classes.

    References:
        Papyan, Traces of class/cross-class structure pervade deep learning spectra, JMLR 21, 2020, arXiv:2008.11865.
    """
    check_tol(tol)
    check_curvature(curvature)
    parts = by_class(loss, batches, groups)
    with observing(module, loss, batches, eval_mode=eval_mode, seed=seed):
        found: dict[int, Eigenvalues] = {}
        for number, part in parts.items():
            if progress is not None:
                progress(number)
            function = FixedLoss(module, part.loss, part.batches, seed=seed)
            found[number] = _solve(function, k, num_smallest, curvature, tol, max_matvecs, seed)
        return found


def _solve(
    function: FixedLoss, k: int, num_smallest: int, curvature: Curvature, tol: float, max_matvecs: int, seed: int
) -> Eigenvalues:
    began = time.perf_counter()
    k = min(k, function.size)
    num_smallest = min(num_smallest, function.size - k)
    found = unknown(k, num_smallest)
    if function.finite:
        found = solve(
            function,
            k=k,
            num_smallest=num_smallest,
            curvature=curvature,
            start=None,
            tol=tol,
            max_matvecs=max_matvecs,
            seed=seed,
        )
    return dataclasses.replace(
        found, price_gradients=function.spent_gradients, cost_seconds=time.perf_counter() - began
    )
