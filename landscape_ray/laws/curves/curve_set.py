"""Several curves as data of a fit: the points that are fitted, and where each stands on its curve."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws.core.law import Law
from landscape_ray.laws.curves.curve import Curve, data_hash, follows

Array: TypeAlias = NDArray[np.float64]

PEAK_TOLERANCE = 0.01
"""Largest relative difference between peak learning rates that count as the same peak."""


@dataclasses.dataclass(frozen=True, eq=False)
class CurveSet:
    """Curves, as far as a law is fitted to them: after the warm-up, and after `skip_steps`.

    Attributes:
        curves: at least one, with distinct names.
        skip_steps: losses up to this step are not fitted, in addition to those in the warm-up: the laws describe the
            course after the initial transient.
        with_warmup: keep the points in the warm-up, to predict them.
        late_weight: points weigh like step ** late_weight, in [0, 4].
        equal_runs: every run weighs the same, however many points it has: runs are what is independent.
        count_once: points that runs share, because one branched off another, are fitted with the first of them only.

    Raises:
        UserError: no curves, two of one name, or a late_weight out of range.
    """

    curves: Sequence[Curve]
    skip_steps: int = 0
    with_warmup: bool = False
    late_weight: float = 0.0
    equal_runs: bool = False
    count_once: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "curves", tuple(self.curves))
        if not self.curves:
            raise UserError("curves must hold at least one curve, got none; pass the runs to fit")
        if not 0 <= self.late_weight <= 4:
            raise UserError(
                f"late_weight must be in [0, 4], got {self.late_weight}; 0 is none, 1 weighs points like their step"
            )
        names = [curve.run_id for curve in self.curves]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"curves must have distinct run_ids, got '{twice}' twice; rename or drop one")
        first = [self.skip_steps if self.with_warmup else max(c.warmup_steps, self.skip_steps) for c in self.curves]
        kept = tuple(curve.step > skipped for curve, skipped in zip(self.curves, first, strict=True))
        if self.count_once:
            kept = tuple(keep & ~shared for keep, shared in zip(kept, self.shared, strict=True))
        object.__setattr__(self, "_kept", kept)

    @property
    def fitted(self) -> list[tuple[Curve, NDArray[np.int64]]]:
        """The curves that have points left, each with the steps (k,) of these."""
        kept: tuple[NDArray[np.bool_], ...] = self._kept  # type: ignore[attr-defined]
        pairs = [(curve, curve.step[keep]) for curve, keep in zip(self.curves, kept, strict=True)]
        return [(curve, step) for curve, step in pairs if len(step)]

    @property
    def shared(self) -> list[NDArray[np.bool_]]:
        """For every curve, which of its points (k,) are also points of an earlier one: same step, same loss."""
        seen: set[tuple[int, float]] = set()
        found = []
        for curve in self.curves:
            points = list(zip(curve.step.tolist(), curve.loss_nats.tolist(), strict=True))
            found.append(np.array([point in seen for point in points], dtype=bool))
            seen.update(points)
        return found

    @property
    def response(self) -> Array:
        """Losses (n,), curve after curve."""
        kept: tuple[NDArray[np.bool_], ...] = self._kept  # type: ignore[attr-defined]
        return np.concatenate([curve.loss_nats[keep] for curve, keep in zip(self.curves, kept, strict=True)])

    @property
    def run(self) -> NDArray[np.int64]:
        """Number of the curve of every point (n,)."""
        lengths = [len(step) for _, step in self.fitted]
        return np.repeat(np.arange(len(lengths)), lengths)

    @property
    def run_ids(self) -> tuple[str, ...]:
        """Names of the curves that have points."""
        return tuple(curve.run_id for curve, _ in self.fitted)

    @property
    def weights(self) -> Array | None:
        """Weight of every point (n,), with mean 1; None where all weigh the same."""
        if self.late_weight == 0 and not self.equal_runs:
            return None
        parts = [step.astype(np.float64) ** self.late_weight for _, step in self.fitted]
        if self.equal_runs:
            parts = [part / part.sum() for part in parts]
        raw = np.concatenate(parts)
        return np.asarray(raw / raw.mean())

    def thinned(self, most: int) -> CurveSet:
        """Return the set with about `most` points, every curve in proportion, its first and last among them."""
        kept: tuple[NDArray[np.bool_], ...] = self._kept  # type: ignore[attr-defined]
        share = min(most / max(sum(int(keep.sum()) for keep in kept), 1), 1.0)
        fewer = []
        for keep in kept:
            points = np.flatnonzero(keep)
            count = min(len(points), max(2, round(share * len(points))))
            some = np.zeros_like(keep)
            if count:
                some[points[np.linspace(0, len(points) - 1, count).round().astype(int)]] = True
            fewer.append(some)
        copied = dataclasses.replace(self)
        object.__setattr__(copied, "_kept", tuple(fewer))
        return copied

    @property
    def peak_lr(self) -> float:
        """The largest learning rate of all curves."""
        return max(curve.peak_lr for curve in self.curves)

    def at_points(self, values: Sequence[Array]) -> Array:
        """Return at the fitted points (n,) what is given for every update of each of `fitted`."""
        pairs = zip(values, self.fitted, strict=True)
        return np.concatenate([np.empty(0), *(each[step - 1] for each, (_, step) in pairs)])

    def check(self, law: Law) -> tuple[str, ...]:
        """Return warnings about the schedules; raise where peaks differ.

        Raises:
            UserError: too few points, or the curves do not share one peak learning rate.
        """
        count = law.num_fitted()
        if len(self.response) <= count:
            raise UserError(
                f"curves must have more than {count} points after the warm-up, got {len(self.response)}; "
                "evaluate more often or lower skip_steps"
            )
        asked = {variable.name for variable in law.variables}
        self._check_fields(law, asked)
        peaks = {curve.run_id: curve.peak_lr for curve in self.curves}
        if "eta" not in asked and max(peaks.values()) > min(peaks.values()) * (1 + PEAK_TOLERANCE):
            listing = ", ".join(f"{name}: {peak:g}" for name, peak in peaks.items())
            raise UserError(
                f"curves must share one peak learning rate, got {listing}; fit each peak on its own, the law does not "
                "hold across peaks"
            )
        warnings = []
        if self.one_schedule:
            warnings.append("one_schedule: all runs follow one schedule, so the effect of another one is extrapolated")
        odd = [
            curve.run_id
            for curve in self.curves
            if (np.diff(curve.schedule()) > PEAK_TOLERANCE * curve.peak_lr).any()
            or curve.lr[curve.warmup_steps] < (1 - PEAK_TOLERANCE) * curve.peak_lr
        ]
        if odd:
            warnings.append(
                f"lr_rises: the learning rate of {', '.join(odd)} rises, or starts below the peak, after the declared "
                "warm-up; declare warmup_steps, the law is not validated for re-warming"
            )
        shared = {c.run_id: int(s.sum()) for c, s in zip(self.curves, self.shared, strict=True) if s.sum() > 1}
        if shared and not self.count_once:
            listing = ", ".join(f"{name} ({count} points)" for name, count in shared.items())
            warnings.append(f"shared_points: {listing}: the same losses as another run's, which therefore count twice")
        return tuple(warnings)

    def _check_fields(self, law: Law, asked: set[str]) -> None:
        for name, field, example in (("N", "num_params", "124e6"), ("b", "batch_size", "256")):
            missing = [curve.run_id for curve in self.curves if getattr(curve, field) is None]
            if name in asked and missing:
                raise UserError(
                    f"curves must have {field} for law '{law.name}', missing for {', '.join(missing)}; pass "
                    f"Curve(..., {field}={example})"
                )
        sizes = {curve.num_params for curve in self.curves if curve.num_params is not None}
        if "N" not in asked and len(sizes) > 1:
            raise UserError(
                f"curves must be of one model size for law '{law.name}', got num_params "
                f"{', '.join(f'{size:g}' for size in sorted(sizes))}; fit each size on its own, or a law with N"
            )

    @property
    def one_schedule(self) -> bool:
        """Whether all curves follow the schedule of the longest."""
        longest = max(self.curves, key=lambda curve: len(curve.lr))
        return all(follows(longest, curve) for curve in self.curves)

    def summary(self) -> dict[str, Any]:
        """Return what was fitted."""
        count = len(self.response)
        area = self.at_points([curve.s1() for curve, _ in self.fitted])
        return {
            "runs": [curve.run_id for curve in self.curves],
            "num_points": count,
            "num_points_dropped": sum(len(curve.step) for curve in self.curves) - count,
            "skip_steps": self.skip_steps,
            "late_weight": self.late_weight,
            "equal_runs": self.equal_runs,
            "count_once": self.count_once,
            "peak_lr": self.peak_lr,
            "peak_range": [min(curve.peak_lr for curve in self.curves), self.peak_lr],
            "horizon": max(int(curve.step[-1]) for curve in self.curves),
            "lowest_ratio": min(float(curve.lr[curve.warmup_steps : step[-1]].min()) for curve, step in self.fitted)
            / self.peak_lr,
            "area_range": [float(end(areas)) for end, areas in ((np.min, area), (np.max, area))],
            "sha256": data_hash(self.curves),
        }
