"""Loss curves as the annealing laws see them: the learning rate of every update, and losses at some steps.

Legend: eta learning rate, lambda (`decay`) forgetting factor of the annealing momentum, S1 sum of the learning rate
(forward area), S2 annealing area.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from landscape_ray.errors import UserError

Array: TypeAlias = NDArray[np.float64]
Steps: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Curve:
    """One run: its schedule and its held-out losses.

    Attributes:
        run_id: name of the run.
        lr: (S,) learning rate applied in each update, the ones actually applied.
        step: (k,) updates completed when each loss was measured, increasing, 1 <= step <= S. The loss at step s has
            seen lr[0] ... lr[s - 1].
        loss_nats: (k,) held-out loss in nats per token, positive.
        warmup_steps: updates of warm-up, 0 <= warmup_steps < S. Losses measured inside it are not fitted.
        batch_size: (S,) of every update, or one number, > 0, in any unit that all runs share; None where it is not
            known. Only laws that trade it against the rate ask for it.
        num_params: parameters of the model; None where it is not known. Only laws across sizes ask for it.

    Raises:
        UserError: a field is out of range; the message names the run.
    """

    run_id: str
    lr: Array
    step: Steps
    loss_nats: Array
    warmup_steps: int = 0
    batch_size: Array | None = None
    num_params: float | None = None
    memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    """What laws have derived from the schedule, kept for the next fit."""

    def __post_init__(self) -> None:
        lr, step = check_schedule(f"run '{self.run_id}'", self.lr, self.step, self.warmup_steps)
        loss = np.array(self.loss_nats, dtype=np.float64)
        if loss.shape != step.shape:
            raise UserError(
                f"run '{self.run_id}': loss_nats must have one value per step, got shape {loss.shape} for "
                f"{len(step)} steps; pass the losses of exactly these steps"
            )
        if not (np.isfinite(loss) & (loss > 0)).all():
            bad = loss[~(np.isfinite(loss) & (loss > 0))][0]
            raise UserError(
                f"run '{self.run_id}': loss_nats must be finite and > 0, got {bad}; drop these points, or the run if "
                "it diverged"
            )
        loss.setflags(write=False)
        object.__setattr__(self, "batch_size", check_batch_size(f"run '{self.run_id}'", self.batch_size, len(lr)))
        if self.num_params is not None and not (math.isfinite(self.num_params) and self.num_params > 0):
            raise UserError(
                f"run '{self.run_id}': num_params must be finite and > 0, got {self.num_params}; count the parameters"
            )
        for name, value in (("lr", lr), ("step", step), ("loss_nats", loss)):
            object.__setattr__(self, name, value)

    @property
    def peak_lr(self) -> float:
        """The largest learning rate of the run."""
        return float(self.lr.max())

    def schedule(self) -> Array:
        """Return the learning rate (S,) as the laws count it: the warm-up at the peak."""
        return count_warmup_at_peak(self.lr, self.warmup_steps)

    def s1(self) -> Array:
        """Return S1 after every update, shape (S,)."""
        return np.cumsum(self.schedule())

    def s2(self, decay: float) -> Array:
        """Return S2 after every update, shape (S,); kept for the next call with the same decay."""
        if decay not in self.memo:
            self.memo[decay] = annealing_area(self.schedule(), decay)
        return np.asarray(self.memo[decay])


def check_schedule(owner: str, lr: ArrayLike, step: ArrayLike, warmup_steps: int) -> tuple[Array, Steps]:
    """Return a learning rate (S,) and steps (k,) as read-only arrays, once they have been found sound.

    Args:
        owner: whose they are, for the error messages.
        lr: learning rate of every update.
        step: numbers of completed updates.
        warmup_steps: updates of warm-up.

    Raises:
        UserError: wrong shape, values out of range, or steps that do not increase.
    """
    rates = np.array(lr, dtype=np.float64)
    if rates.ndim != 1 or not len(rates):
        raise UserError(f"{owner}: lr must have shape (num_steps,), got {rates.shape}; give one value per update")
    if not (np.isfinite(rates) & (rates >= 0)).all() or rates.max() == 0:
        raise UserError(
            f"{owner}: lr must be finite, >= 0 and somewhere > 0, got values in [{rates.min()}, {rates.max()}]; give "
            "the learning rate that was applied"
        )
    steps = np.array(step)
    if steps.ndim != 1 or not len(steps):
        raise UserError(f"{owner}: step must have shape (num_points,), got {steps.shape}; give at least one step")
    if not np.isfinite(steps).all() or (steps != np.floor(steps)).any():
        raise UserError(f"{owner}: step must hold whole numbers, got {steps}; count completed updates")
    steps = steps.astype(np.int64)
    if steps.min() < 1 or steps.max() > len(rates):
        raise UserError(
            f"{owner}: step must lie in [1, {len(rates)}], the number of updates in lr, got "
            f"[{steps.min()}, {steps.max()}]; drop what was measured before the first update, or extend lr"
        )
    if (np.diff(steps) <= 0).any():
        raise UserError(f"{owner}: step must increase, got {steps}; sort the points and keep one per step")
    if not 0 <= warmup_steps < len(rates):
        raise UserError(
            f"{owner}: warmup_steps must be in [0, {len(rates) - 1}], got {warmup_steps}; a law needs updates after "
            "the warm-up"
        )
    rates.setflags(write=False)
    steps.setflags(write=False)
    return rates, steps


def check_batch_size(owner: str, batch_size: ArrayLike | None, num_steps: int) -> Array | None:
    """Return the batch size (S,) of every update, read-only, once it has been found sound.

    Raises:
        UserError: wrong shape, or values that are not finite and positive.
    """
    if batch_size is None:
        return None
    sizes = np.array(batch_size, dtype=np.float64)
    if sizes.shape not in ((), (num_steps,)) or not (np.isfinite(sizes) & (sizes > 0)).all():
        raise UserError(
            f"{owner}: batch_size must be a number > 0, or one for each of {num_steps} updates, got "
            f"{sizes if sizes.size < 4 else f'shape {sizes.shape}'}; give what was trained with"
        )
    sizes = np.broadcast_to(sizes, num_steps).copy()
    sizes.setflags(write=False)
    return sizes


def count_warmup_at_peak(lr: Array, warmup_steps: int) -> Array:
    """Return the schedule with its first `warmup_steps` values replaced by the peak."""
    counted = lr.copy()
    counted[:warmup_steps] = lr.max()
    return counted


def annealing_area(schedule: Array, decay: float) -> Array:
    """Return S2 after every update: how much the learning rate has been lowered, felt with a delay.

    m_1 = 0,  m_i = decay m_{i-1} + (eta_{i-1} - eta_i),  S2_s = sum_{i <= s} m_i

    A drop by d contributes d (1 - decay^(t + 1)) / (1 - decay) once t further updates have been made. O(S).

    Args:
        schedule: (S,) learning rate as counted (see :func:`count_warmup_at_peak`).
        decay: lambda, in [0, 1).

    Returns:
        (S,) in the unit of the learning rate.

    >>> annealing_area(np.array([1.0, 1.0, 0.0, 0.0]), 0.5).tolist()
    [0.0, 0.0, 1.0, 1.5]

    References:
        Tissue, Wang and Wang 2024, arXiv 2408.11029, section 3.
    """
    from scipy.linalg import solve_banded  # here, because it takes longer to import than the whole package

    drop = -np.diff(schedule, prepend=schedule[0])
    # The recursion is a bidiagonal system, m_i - decay m_{i-1} = drop_i, which LAPACK solves by forward substitution.
    band = np.ones((2, len(schedule)))
    band[1] = -decay
    return np.cumsum(solve_banded((1, 0), band, drop))


def follows(curve: Curve, other: Curve) -> bool:
    """Return whether `curve` made the whole of the other's schedule, and perhaps went on from there."""
    length = len(other.lr)
    return len(curve.lr) >= length and np.allclose(curve.schedule()[:length], other.schedule(), rtol=1e-6, atol=0)


def data_hash(curves: Sequence[Curve]) -> str:
    """Return the SHA-256 of everything that a fit reads from the curves."""
    digest = hashlib.sha256()
    for curve in curves:
        digest.update(f"{curve.run_id}\0{curve.warmup_steps}\0{len(curve.lr)}\0{len(curve.step)}\0".encode())
        for array in (curve.lr, curve.step, curve.loss_nats):
            digest.update(array.tobytes())
        if curve.batch_size is not None:
            digest.update(curve.batch_size.tobytes())
        if curve.num_params is not None:
            digest.update(f"N{curve.num_params!r}".encode())
    return digest.hexdigest()
