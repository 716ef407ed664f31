"""The schedule: warm-up, decay, end; as one value that can be called with a step.

Conventions, with S = num_steps, W = warmup_steps and k the update number, counted from 0 (update k turns state k into
state k + 1, so a run makes the updates 0 ... S - 1):

- warm-up, k < W: value = peak (k + 1) / W, so that update W - 1 is the first at the peak;
- after it: value = peak (final_ratio + (1 - final_ratio) height(k)), where height falls from 1 to 0;
- the decay starts at update W (wsd: at `cooldown_start`, the peak is held until there) and its progress is
  (k - start) / (S - start): update `start` is still at the peak, and final_ratio is reached at k = S exactly, that is
  by the update that would come after the last one. The last update of a decay to zero therefore still moves;
- k >= S holds the final value: peak * final_ratio, or the peak for a schedule that does not decay.

Identities: wsd with cooldown_fraction = 1 is linear or cosine (by its cooldown_shape), with 0 it is constant.

References:
    Loshchilov and Hutter 2016, arXiv 1608.03983 (cosine); Hu et al. 2024, arXiv 2404.06395 (warm-up, stable, decay);
    Haegele et al. 2024, arXiv 2405.18392 (cooldown fraction and the shape 1 - sqrt).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from landscape_ray.errors import UserError
from landscape_ray.registry import resolve, suggest

Array: TypeAlias = NDArray[np.float64]

Height: TypeAlias = Callable[["Schedule", Array], Array]
"""Maps a schedule and steps after the warm-up (float64, any shape) to heights in [0, 1]: 1 is peak, 0 is the end."""


def _linear(progress: Array) -> Array:
    return 1.0 - progress


def _cosine(progress: Array) -> Array:
    return np.asarray(0.5 * (1.0 + np.cos(np.pi * progress)))


def _sqrt(progress: Array) -> Array:
    return np.asarray(1.0 - np.sqrt(progress))


COOLDOWN_SHAPES: dict[str, Callable[[Array], Array]] = {"linear": _linear, "sqrt": _sqrt, "cosine": _cosine}
"""Height as a function of progress, both in [0, 1]."""


def _constant_height(schedule: Schedule, step: Array) -> Array:
    return np.ones_like(step)


def _linear_height(schedule: Schedule, step: Array) -> Array:
    return _linear(schedule.progress(step, schedule.warmup_steps))


def _cosine_height(schedule: Schedule, step: Array) -> Array:
    return _cosine(schedule.progress(step, schedule.warmup_steps))


def _wsd_height(schedule: Schedule, step: Array) -> Array:
    if schedule.cooldown_fraction == 0:
        return np.ones_like(step)
    return COOLDOWN_SHAPES[schedule.cooldown_shape](schedule.progress(step, schedule.cooldown_start))


SCHEDULES: dict[str, Height] = {
    "constant": _constant_height,
    "linear": _linear_height,
    "cosine": _cosine_height,
    "wsd": _wsd_height,
}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The value of a hyperparameter in every update of a run.

    Attributes:
        name: constant, linear, cosine, wsd (warm-up, stable, decay), or `package.module:Name` of a `Height`.
        peak: largest value, >= 0, in the unit of the hyperparameter.
        num_steps: updates of the run, S >= 1.
        warmup_steps: updates of linear warm-up, 0 <= W <= S.
        final_ratio: value at the end over the peak, in [0, 1]; `constant` does not use it.
        cooldown_fraction: wsd only: length of the cooldown over num_steps, in [0, 1], rounded to whole updates. A
            cooldown that would begin inside the warm-up begins at its end.
        cooldown_shape: wsd only: linear, sqrt (1 - sqrt(progress): fast at first) or cosine.

    >>> schedule = Schedule(name="linear", peak=1.0, num_steps=6, warmup_steps=2)
    >>> schedule.values().tolist()
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    >>> schedule(6)
    0.0
    """

    name: str
    peak: float
    num_steps: int
    warmup_steps: int = 0
    final_ratio: float = 0.0
    cooldown_fraction: float = 0.2
    cooldown_shape: Literal["linear", "sqrt", "cosine"] = "linear"

    def __post_init__(self) -> None:
        resolve(self.name, SCHEDULES, "name")
        if not (math.isfinite(self.peak) and self.peak >= 0):
            raise UserError(f"peak must be finite and >= 0, got {self.peak}; give the largest value of the schedule")
        if not _is_whole(self.num_steps) or self.num_steps < 1:
            raise UserError(f"num_steps must be a whole number >= 1, got {self.num_steps}; give the updates of the run")
        if not _is_whole(self.warmup_steps) or not 0 <= self.warmup_steps <= self.num_steps:
            raise UserError(
                f"warmup_steps must be a whole number in [0, num_steps = {self.num_steps}], got {self.warmup_steps}; "
                "shorten the warm-up or lengthen the run"
            )
        for field in ("final_ratio", "cooldown_fraction"):
            if not 0 <= getattr(self, field) <= 1:
                raise UserError(f"{field} must be in [0, 1], got {getattr(self, field)}; it is a share, not a count")
        if self.cooldown_shape not in COOLDOWN_SHAPES:
            raise UserError(
                f"cooldown_shape must be a known shape, got '{self.cooldown_shape}'; "
                f"{suggest(self.cooldown_shape, COOLDOWN_SHAPES)}"
            )

    @property
    def cooldown_start(self) -> int:
        """The first update of the wsd cooldown (still at the peak): where runs can branch off a constant one."""
        return max(self.warmup_steps, self.num_steps - round(self.cooldown_fraction * self.num_steps))

    def progress(self, step: Array, start: int) -> Array:
        """Return (step - start) / (num_steps - start) held to [0, 1]; 1 from num_steps on, whatever the start."""
        length = max(self.num_steps - start, 1)
        return np.where(step >= self.num_steps, 1.0, np.clip((step - start) / length, 0.0, 1.0))

    @overload
    def __call__(self, step: int | float) -> float: ...

    @overload
    def __call__(self, step: ArrayLike) -> float | Array: ...

    def __call__(self, step: ArrayLike) -> float | Array:
        """Return the value applied in update number `step`.

        Args:
            step: update number(s), counted from 0; a number or an array of any shape.

        Returns:
            A float for a number, else a float64 array of the shape of `step`.

        Raises:
            UserError: a step is negative or not finite.
        """
        steps = np.asarray(step, dtype=np.float64)
        if not (np.isfinite(steps) & (steps >= 0)).all():
            raise UserError(f"step must be >= 0 and finite, got {step!r}; updates are counted from 0")
        height = resolve(self.name, SCHEDULES, "name")(self, steps)
        value = self.peak * (self.final_ratio + (1.0 - self.final_ratio) * height)
        if self.warmup_steps:
            value = np.where(steps < self.warmup_steps, self.peak * ((steps + 1.0) / self.warmup_steps), value)
        return float(value) if steps.ndim == 0 else np.asarray(value, dtype=np.float64)

    def values(self) -> Array:
        """Return the value applied in each of the updates 0 ... num_steps - 1, shape (num_steps,)."""
        return np.asarray(self(np.arange(self.num_steps)), dtype=np.float64)


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
