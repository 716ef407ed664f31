"""The curvature guard: proposed learning rates are held below the measured limit of stability.

On a quadratic, an optimizer diverges where its learning rate is above a limit that falls as the curvature rises:
2 (1 + momentum) / sharpness for SGD, 2 (1 + beta1) / ((1 - beta1) preconditioned sharpness) for Adam; see
:func:`landscape_ray.probes.sharpness.stability.threshold`. What is measured is the curvature at the start of training,
the first finite value of each run: later on, the curvature of a stable run rises until its own learning rate is at the
limit, so that the limit says no more than what the run was.

A limit at the start is not one for the peak of a warm-up, which moves to flatter places on the way up (Kalra and
Barkeshli 2024, arXiv 2406.09405); `margin` says how far this is trusted. The guard is off unless a sweep asks for it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any, Protocol

from landscape_ray.domains import Value
from landscape_ray.errors import UserError
from landscape_ray.probes.sharpness.stability import threshold
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.training import TrainConfig

PEAK = "schedule.peak_lr"

_BISECTIONS = 100


class Hold(Protocol):
    """Returns proposed values held below the limit, and says in `note` what was changed."""

    def __call__(self, values: dict[str, Value], note: dict[str, Any]) -> dict[str, Value]:
        """See the class."""


def curvature_probe(optimizer: str) -> str | None:
    """Return the probe whose curvature limits an optimizer's learning rate, None where none is known to.

    >>> curvature_probe("sgd"), curvature_probe("adamw"), curvature_probe("muon")
    ('sharpness', 'preconditioned_sharpness', None)
    """
    if threshold(optimizer, 1.0) is None:
        return None
    return "sharpness" if optimizer == "sgd" else "preconditioned_sharpness"


def stable_lr(config: TrainConfig, curvature: float) -> float | None:
    """Return the largest learning rate under which a quadratic of this curvature is stable.

    Args:
        config: of the run: its optimizer, momentum and weight decay.
        curvature: sharpness or preconditioned sharpness, as `curvature_probe` says.

    Returns:
        The limit; inf without positive curvature; None where no limit is known.
    """
    if not curvature > 0:
        return math.inf
    optimizer = config.optimizer
    settings: dict[str, Any] = {"nesterov": bool(getattr(optimizer, "nesterov", False))}
    if getattr(optimizer, "decay_coupling", "lr") == "lr":
        settings |= {"weight_decay": optimizer.weight_decay, "coupled": bool(getattr(optimizer, "l2", False))}

    def stable(lr: float) -> bool | None:
        limit = threshold(optimizer.name, lr, optimizer.momentum, **settings)
        return None if limit is None else curvature <= limit

    low, high = 1e-12, 1e12
    if stable(1.0) is None:
        return None
    if not stable(low):  # weight decay alone is above the limit
        return 0.0
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if stable(middle) else (low, middle)
    return low


class LearningRateGuard:
    """Holds the proposed peak learning rates of a search.

    Args:
        spec: the sweep; its table [search.guard] says how.

    Raises:
        UserError: no peak learning rate is searched, the optimizer has no known limit, or nothing measures it.
    """

    def __init__(self, spec: SweepSpec) -> None:
        assert spec.search is not None
        assert spec.search.guard is not None
        self._spec, self._margin = spec, spec.search.guard.margin
        self.probe = check_guard(spec)
        self._measured: dict[int, tuple[tuple[tuple[str, Value], ...], float]] = {}

    def learn(self, index: int, values: Mapping[str, Value], probes: Mapping[str, float]) -> None:
        """Take note of what trial `index` has measured first."""
        if self.probe in probes and math.isfinite(probes[self.probe]):
            self._measured.setdefault(index, (_setting(values), probes[self.probe]))

    def holder(self, known: int) -> Hold:
        """Return what holds proposals by the measurements of the first `known` trials as they stand now."""
        measured = [each for index, each in sorted(self._measured.items()) if index < known]

        def hold(values: dict[str, Value], note: dict[str, Any]) -> dict[str, Value]:
            found = [curvature for setting, curvature in measured if setting == _setting(values)]
            if not found or PEAK not in values:
                return values
            curvature = statistics.median(found)
            limit = stable_lr(self._spec.train_config(values, 0), curvature)
            if limit is None or float(values[PEAK]) <= self._margin * limit:
                return values
            domain = self._spec.space[PEAK]
            held = domain.clip(self._margin * limit)
            if held == values[PEAK]:
                return values
            note["clamp"] = {
                "name": PEAK,
                "proposed": values[PEAK],
                "held": held,
                "limit": limit,
                "margin": self._margin,
                "probe": self.probe,
                "curvature": curvature,
            }
            return {**values, PEAK: held}

        return hold


def check_guard(spec: SweepSpec) -> str:
    """Return the probe that the guard reads.

    Raises:
        UserError: no peak learning rate is searched, the optimizer has no known limit, or nothing measures it.
    """
    assert spec.search is not None
    assert spec.search.guard is not None
    config = spec.train_config(spec.first_values(), 0)
    domain = spec.space.get(PEAK)
    if domain is None or domain.choices is not None:
        raise UserError(f"search.guard holds {PEAK}, which is not searched as a range; search it or remove the guard")
    probe = spec.search.guard.probe
    if probe == "auto":
        known = curvature_probe(config.optimizer.name)
        if known is None:
            raise UserError(
                f"search.guard needs an optimizer whose limit of stability is known, got '{config.optimizer.name}'; "
                "sgd, adam, adamw and rmsprop have one"
            )
        probe = known
    if probe not in config.probes.tables:
        raise UserError(f"search.guard needs [train.probes.{probe}] to measure the curvature; add it")
    return probe


def _setting(values: Mapping[str, Value]) -> tuple[tuple[str, Value], ...]:
    """Return the values on which the landscape at the start depends: all but the schedule's."""
    return tuple(sorted((name, value) for name, value in values.items() if not name.startswith("schedule.")))
