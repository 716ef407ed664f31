"""What a rule for the learning rate and the batch costs on runs that were made: its regret.

The regret in a group of runs of one (N, D) is the loss of the run nearest to the recommendation over that of the best
run of the group, minus 1; nearest by the Euclidean distance in (log lr, log B). It counts a rule by what it would have
cost, not by how well it fits, and can be counted for any rule, published ones included.

References:
    Li et al. 2025, arXiv 2503.04715 (the relative loss of the nearest grid point).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws.optima.sweep import Sweep

Array: TypeAlias = NDArray[np.float64]

Rule: TypeAlias = Callable[[float, float], tuple[float, float | None]]
"""From (N, D) to the learning rate and the batch, None for a rule that leaves the batch open."""


@dataclasses.dataclass(frozen=True, eq=False)
class Regret:
    """What a rule costs, by group.

    Attributes:
        groups: the pairs (N, D).
        relative: (g,) loss of the nearest run over the best of the group, minus 1.
        distance: (g,) how far that run is from the recommendation, in natural logarithms.
    """

    groups: tuple[tuple[float, float], ...]
    relative: Array
    distance: Array

    @property
    def mean(self) -> float:
        """Mean over the groups."""
        return float(self.relative.mean())

    @property
    def worst(self) -> float:
        """Largest of the groups."""
        return float(self.relative.max())

    def __str__(self) -> str:
        return f"regret {self.mean:.3%} on average, {self.worst:.3%} at worst, over {len(self.groups)} groups"


def regret(sweep: Sweep, rule: Rule) -> Regret:
    """Return what following a rule would have cost on the runs of a sweep.

    Args:
        sweep: the runs.
        rule: what is recommended.

    Raises:
        UserError: a recommendation is not finite and > 0, or one of a batch is needed and there is none.

    >>> sweep = Sweep([1e-3, 2e-3, 4e-3], [2.02, 2.0, 2.1])
    >>> round(regret(sweep, lambda N, D: (1.1e-3, None)).mean, 6)
    0.01
    """
    loss, lr = np.asarray(sweep.loss), np.asarray(sweep.lr)
    relative, distance = [], []
    for (n, d), rows in sweep.groups.items():
        chosen_lr, chosen_batch = rule(n, d)
        squared = (np.log(lr[rows]) - _log("lr", chosen_lr)) ** 2
        if sweep.batch is not None and chosen_batch is not None:
            squared = squared + (np.log(np.asarray(sweep.batch)[rows]) - _log("batch", chosen_batch)) ** 2
        nearest = int(squared.argmin())
        relative.append(loss[rows][nearest] / loss[rows].min() - 1)
        distance.append(float(np.sqrt(squared[nearest])))
    return Regret(tuple(sweep.groups), np.array(relative), np.array(distance))


def leave_one_group_out(sweep: Sweep, fitter: Callable[[Sweep], Rule], *, by: str = "group") -> Regret:
    """Return the regret of rules in groups that they were not fitted to.

    Args:
        sweep: the runs.
        fitter: makes a rule from runs.
        by: what is left out together: "group", one (N, D); or "size", all groups of one N.

    Raises:
        UserError: `by` is neither, or there are too few groups.

    >>> sweep = Sweep([1e-3, 2e-3] * 2, [2.0, 2.1, 1.9, 2.0], N=[1e6, 1e6, 1e7, 1e7])
    >>> leave_one_group_out(sweep, lambda runs: lambda N, D: (float(runs.lr[runs.loss.argmin()]), None)).mean
    0.0
    """
    if by not in ("group", "size"):
        raise UserError(f"by must be group or size, got '{by}'; a group is one (N, D)")
    held_out = sorted(set(sweep.groups) if by == "group" else {(n, None) for n, _ in sweep.groups}, key=str)
    if len(held_out) < 2:
        raise UserError(f"sweep must have two {by}s at least to leave one out, got {len(held_out)}; add runs")
    parts = []
    for n, d in held_out:
        out = (sweep.sizes == n) & ((sweep.horizons == d) if d is not None else True)
        parts.append(regret(sweep.take(out), fitter(sweep.take(~out))))
    return Regret(
        tuple(pair for part in parts for pair in part.groups),
        np.concatenate([part.relative for part in parts]),
        np.concatenate([part.distance for part in parts]),
    )


def _log(name: str, value: float) -> float:
    if not (np.isfinite(value) and value > 0):
        raise UserError(f"{name} of the rule must be finite and > 0, got {value}; check its constants")
    return float(np.log(value))
