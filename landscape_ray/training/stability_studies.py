"""Studies of how curvature moves along a run: edge of stability, SGD's own bound, and sharpness over widths.

follow_edge         curvature along a run, and the threshold of its optimizer
sgd_stability       SGD on one example at a time, against the bound on the trace of the Hessian
sharpness_transfer  sharpness along runs of several widths: does it coincide?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from landscape_ray.errors import UserError
from landscape_ray.probes.sharpness.stability import EdgeState, edge_state, threshold
from landscape_ray.records import ProbeRecord, StepRecord
from landscape_ray.training.config import TrainConfig
from landscape_ray.training.loop import train
from landscape_ray.training.optimizers import SGDConfig
from landscape_ray.training.state import TrainState
from landscape_ray.training.studies import Progress, checked_widths, with_width

Floats = NDArray[np.float64]

CURVATURES = {
    "sgd": ("sharpness", "preconditioned_sharpness"),
    "adamw": ("preconditioned_sharpness",),
    "schedule_free_adamw": ("preconditioned_sharpness",),
}
"""Which probes the threshold of an optimizer is one of; for sgd they differ where layers have factors of the learning
rate, and then it is the second."""


@dataclass(frozen=True, kw_only=True)
class EdgeRun:
    """Curvature along a run, and where its optimizer stops being stable.

    Attributes:
        probe: what was measured: sharpness, or preconditioned_sharpness.
        optimizer: sgd, adamw ...
        steps: of the measurements, shape (M,).
        curvature: shape (M,).
        thresholds: at the same steps, by the learning rate and momentum applied there, shape (M,).
        losses: training loss of every update, shape (T,).
        state: of the second half of the run.
    """

    probe: str
    optimizer: str
    steps: Floats
    curvature: Floats
    thresholds: Floats
    losses: Floats
    state: EdgeState


def follow_edge(config: TrainConfig, *, progress: Callable[[int], None] | None = None) -> EdgeRun:
    """Return curvature and threshold along a run.

    Args:
        config: with the probe that goes with its optimizer: [train.probes.sharpness] for sgd, and
            [train.probes.preconditioned_sharpness] for adamw. The theory is one of full batches: `batch_size` equal to
            `data.train_size`, and a probe batch of all of it.
        progress: called with the number of updates made.

    Raises:
        UserError: no threshold is known for the optimizer, its probe is missing, or the run diverged at once.

    References:
        Cohen et al. 2021, arXiv 2103.00065; Cohen et al. 2022, arXiv 2207.14484 (adaptive methods).
    """
    optimizer = config.optimizer
    names = CURVATURES.get(optimizer.name)
    if names is None:
        raise UserError(
            f"optimizer.name must be one with a known threshold ({', '.join(CURVATURES)}), got '{optimizer.name}'"
        )
    measured = [name for name in names if name in config.probes.tables]
    if not measured:
        raise UserError(f"the file must measure what {optimizer.name} is stable by; add [train.probes.{names[0]}]")
    name = measured[-1]
    state = TrainState.create(config)
    size = getattr(config.data, "train_size", None)
    if size != config.batch_size:
        raise UserError(
            f"batch_size must be data.train_size, got {config.batch_size} of {size or 'all'}: the threshold is one of "
            "full batches"
        )
    schedule = config.schedule.build(config.num_steps)
    steps, values, limits, losses = [], [], [], []
    for record in train(state):
        if isinstance(record, StepRecord):
            losses.append(record.loss_nats)
            if progress is not None and record.step % 50 == 0:
                progress(record.step)
        elif isinstance(record, ProbeRecord) and record.probe == name and math.isfinite(record.value):
            last = max(record.step - 1, 0)
            # an independent decay shrinks weights by its product with the shape of the schedule
            independent = getattr(optimizer, "decay_coupling", "") == "independent"
            limit = threshold(
                optimizer.name,
                float(schedule(last)),
                schedule.momentum(last, optimizer.momentum),
                nesterov=isinstance(optimizer, SGDConfig) and optimizer.nesterov,
                weight_decay=optimizer.weight_decay / (config.schedule.peak_lr if independent else 1.0),
                coupled=isinstance(optimizer, SGDConfig) and optimizer.l2,
            )
            if limit is not None and math.isfinite(limit):
                steps.append(record.step)
                values.append(record.value)
                limits.append(limit)
    if len(values) < 4:
        how = state.diverged or f"it has {config.num_steps} updates"
        raise UserError(f"the run must live for four measurements, got {len(values)} ({how}); lower the learning rate")
    return EdgeRun(
        probe=name,
        optimizer=optimizer.name,
        steps=np.array(steps, dtype=np.float64),
        curvature=np.array(values),
        thresholds=np.array(limits),
        losses=np.array(losses),
        state=edge_state(values, limits, steps, tail=0.5),
    )


@dataclass(frozen=True, kw_only=True)
class SGDStability:
    """SGD on one example at a time, over learning rates.

    Attributes:
        dimension: d.
        trace: of the Hessian.
        sharpness: its largest eigenvalue.
        num_steps: updates made.
        lrs: shape (L,).
        growth: mean |w|^2 after the updates divided by that before, shape (L,).
        standard_error: of it, over repetitions, shape (L,).
        expected: by theory, shape (L,).
    """

    dimension: int
    trace: float
    sharpness: float
    num_steps: int
    lrs: Floats
    growth: Floats
    standard_error: Floats
    expected: Floats

    @property
    def measured_threshold(self) -> float:
        """The learning rate where the measured growth crosses 1; between two, by a line through the logarithms."""
        logs = np.log(self.growth)
        above = np.flatnonzero(logs > 0)
        if not len(above) or above[0] == 0:
            return math.nan
        right = int(above[0])
        share = -logs[right - 1] / (logs[right] - logs[right - 1])
        return float(self.lrs[right - 1] + share * (self.lrs[right] - self.lrs[right - 1]))


def sgd_stability(
    lrs: Sequence[float],
    *,
    dimension: int = 10,
    num_steps: int = 300,
    num_repetitions: int = 2000,
    seed: int = 0,
) -> SGDStability:
    """Return how the squared distance from the minimum grows under SGD with one example in each update.

    Loss `0.5 (w'x)^2`, x uniform on the unit sphere of R^d: `H = I / d`, so that the largest eigenvalue is 1 / d and
    the trace 1. Each update multiplies the expected |w|^2 by `1 - 2 lr / d + lr^2 / d`: SGD is stable below
    `lr tr(H) = 2`, where gradient descent on the full loss would be until `lr lambda_1 = 2`, d times as far.

    Args:
        lrs: increasing.
        dimension: d, >= 2.
        num_steps: updates.
        num_repetitions: runs to average over.
        seed: of the examples.

    Raises:
        UserError: fewer than two learning rates, or one that is not positive.

    References:
        Wu, Ma and E, How SGD selects the global minima, NeurIPS 2018. Ma and Ying 2021, arXiv 2105.13462.
    """
    if len(lrs) < 2 or min(lrs) <= 0:
        raise UserError(f"lrs must hold two or more positive learning rates, got {list(lrs)}")
    rates = np.sort(np.asarray(lrs, dtype=np.float64))
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(num_repetitions, dimension, generator=generator, dtype=torch.float64)
    start /= start.norm(dim=1, keepdim=True)
    weights = start.expand(len(rates), -1, -1).clone()
    column = torch.from_numpy(rates)[:, None, None]
    # log of the mean: the mean itself is ruled by few repetitions; but it is the mean that the theory is about
    for _ in range(num_steps):
        x = torch.randn(num_repetitions, dimension, generator=generator, dtype=torch.float64)
        x /= x.norm(dim=1, keepdim=True)
        weights -= column * (weights * x).sum(-1, keepdim=True) * x
    squares = weights.square().sum(-1)
    return SGDStability(
        dimension=dimension,
        trace=1.0,
        sharpness=1.0 / dimension,
        num_steps=num_steps,
        lrs=rates,
        growth=squares.mean(1).numpy(),
        standard_error=(squares.std(1) / math.sqrt(num_repetitions)).numpy(),
        expected=(1 - 2 * rates / dimension + rates**2 / dimension) ** num_steps,
    )


@dataclass(frozen=True, kw_only=True)
class SharpnessTransfer:
    """Sharpness along runs of several widths, as the optimizer sees it: of diag(factor) H, or of P^-1 H.

    Attributes:
        widths: increasing, shape (W,).
        steps: of the measurements, shape (M,).
        sharpness: shape (W, M), geometric mean over seeds; nan after a divergence.
    """

    widths: tuple[int, ...]
    steps: Floats
    sharpness: Floats

    @property
    def spread(self) -> Floats:
        """Largest over smallest sharpness of the widths at each step, shape (M,)."""
        return np.asarray(self.sharpness.max(axis=0) / self.sharpness.min(axis=0))

    @property
    def slope(self) -> float:
        """D log(sharpness) / d log(width), the mean over the second half of the measurements; 0 where it transfers."""
        late = self.sharpness[:, len(self.steps) // 2 :]
        known = np.isfinite(late).all(axis=0) & (late > 0).all(axis=0)
        if not known.any():
            return math.nan
        x = np.log(np.array(self.widths, dtype=np.float64))
        return float(np.mean(np.polyfit(x, np.log(late[:, known]), 1)[0]))


def sharpness_transfer(
    config: TrainConfig, widths: Sequence[int], *, num_seeds: int = 1, progress: Progress | None = None
) -> SharpnessTransfer:
    """Return the sharpness along runs that differ in width only: same data, same schedule, same steps.

    Args:
        config: of the runs, with [train.probes.preconditioned_sharpness]: the largest eigenvalue of the Hessian in the
            coordinates in which all weights have one learning rate. Under muP that is what has a limit at large width;
            for SGD under the standard parametrisation it is the sharpness.
        widths: two or more values of `model.width`.
        num_seeds: to average over, >= 1: of the initial weights and the data alike.
        progress: called after each run.

    Raises:
        UserError: fewer than two widths, a model without a width, or no such probe.

    References:
        Noci et al. 2024, Super consistency of neural network landscapes, arXiv 2402.17457.
    """
    if config.probes.preconditioned_sharpness is None:
        raise UserError("the file must measure sharpness along the run; add [train.probes.preconditioned_sharpness]")
    _, ordered = checked_widths(config, widths)
    curves: list[list[dict[int, float]]] = []
    for width in ordered:
        curves.append([])
        for seed in range(config.seed, config.seed + num_seeds):
            state = TrainState.create(with_width(config, width, seed=seed))
            found = {
                r.step: r.value
                for r in train(state)
                if isinstance(r, ProbeRecord) and r.probe == "preconditioned_sharpness"
            }
            if not found:
                raise UserError(
                    f"the run at width {width} must be measured, got no value "
                    f"({state.diverged or config.optimizer.name}); "
                    "take sgd or adamw, and a learning rate that it survives"
                )
            curves[-1].append(found)
            if progress is not None:
                progress(f"width {width}: sharpness {list(found.values())[-1]:.3g}")
    steps = sorted({step for runs in curves for run in runs for step in run})
    values = np.array([[[run.get(step, math.nan) for step in steps] for run in runs] for runs in curves])
    logs = np.log(np.where(values > 0, values, np.nan))  # a curvature below zero has no place on a logarithmic scale
    return SharpnessTransfer(
        widths=ordered, steps=np.array(steps, dtype=np.float64), sharpness=np.exp(logs.mean(axis=1))
    )
