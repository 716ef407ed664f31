"""What mattered in a search: how much of the ranking of its runs each searched value explains by itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from landscape_ray.analysis.runs import Run

Array = NDArray[np.float64]

MIN_RUNS = 8
"""Fewer runs with a value do not tell a dependence from chance."""

NUM_SHUFFLES = 400
BANDWIDTHS = (0.05, 0.1, 0.2, 0.4)
"""Widths of the smoothing, as shares of all runs; the one that predicts left-out runs best is taken."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """How much of the ranking by final loss one searched value explains.

    Attributes:
        name: dotted name of the value.
        share: explained share of the variance of the ranks, of runs left out one at a time; between 0 and 1.
        chance: what 95 of 100 shuffled rankings stay below; nothing is explained where `share` does not exceed it.
        num_runs: runs that had the value; of a conditional one these are not all.
    """

    name: str
    share: float
    chance: float
    num_runs: int

    @property
    def found(self) -> bool:
        """Whether the dependence is more than chance at the level of 5 %."""
        return self.share > self.chance


def importances(runs: Sequence[Run], seed: int = 0) -> list[Importance]:
    """Return the importance of every searched value that differs between runs, the highest first.

    Runs are ranked by final loss, those that diverged last; runs that were stopped or have not ended are left out. The
    rank of each run is forecast from the others, by the mean of its group for names and by a Gaussian mean over the
    order of the values for numbers. The share is 1 minus the ratio of squared errors to those of the plain mean of the
    others: a first-order sensitivity index (Sobol 1993), which ranks make blind to the scale of losses, and which says
    nothing about values that matter only together. Chance is the same number for shuffled ranks.

    Args:
        runs: of one search.
        seed: of the shuffles.
    """
    counted = [run for run in runs if run.has_result or run.summary.status == "diverged"]
    found: list[Importance] = []
    for name in dict.fromkeys(name for run in counted for name in run.summary.varied):
        chosen = [run for run in counted if name in run.summary.varied]
        values = [run.summary.varied[name] for run in chosen]
        if len(chosen) < MIN_RUNS or len({str(value) for value in values}) < 2:
            continue
        ranks = _ranks([math.inf if run.summary.status == "diverged" else run.loss for run in chosen])
        if np.ptp(ranks) == 0:
            continue
        shuffled = np.random.default_rng([seed, len(found)]).permuted(np.tile(ranks, (NUM_SHUFFLES, 1)), axis=1)
        shares = _explained(values, np.concatenate([ranks[None], shuffled]))
        chance = max(0.0, float(np.quantile(shares[1:], 0.95)))
        share = max(0.0, float(shares[0]))
        found.append(Importance(name=name, share=share, chance=chance, num_runs=len(chosen)))
    return sorted(found, key=lambda one: (-one.share, one.name))


def _ranks(losses: Sequence[float]) -> Array:
    """Return the ranks from 0, equal losses sharing their mean rank."""
    order = np.asarray(losses, dtype=np.float64)
    _, inverse, counts = np.unique(order, return_inverse=True, return_counts=True)
    upper = np.cumsum(counts)
    mean: Array = upper - (counts + 1) / 2.0
    return np.asarray(mean[inverse], dtype=np.float64)


def _explained(values: Sequence[Any], ranks: Array) -> Array:
    """Return the share of the variance that is explained, for every row of ranks, shape (rows, runs)."""
    count = ranks.shape[1]
    plain = (ranks.sum(axis=1, keepdims=True) - ranks) / (count - 1)  # the mean of the others
    total = ((ranks - plain) ** 2).sum(axis=1)
    best = np.full(len(ranks), -np.inf)
    for weights in _weights(values):
        np.fill_diagonal(weights, 0.0)
        reached = weights.sum(axis=1)
        lonely = reached == 0
        weights = weights / np.where(lonely, 1.0, reached)[:, None]
        forecast = np.where(lonely, plain, ranks @ weights.T)
        best = np.maximum(best, 1 - ((ranks - forecast) ** 2).sum(axis=1) / total)
    return best


def _weights(values: Sequence[Any]) -> list[Array]:
    """Return who is asked about whom, shape (runs, runs): the same name, or numbers close by in order."""
    if any(isinstance(value, str | bool) or not isinstance(value, int | float) for value in values):
        names = np.array([str(value) for value in values])
        return [(names[:, None] == names[None]).astype(np.float64)]
    place = _ranks([float(value) for value in values]) / max(len(values) - 1, 1)
    apart = place[:, None] - place[None]
    return [np.exp(-0.5 * (apart / width) ** 2) for width in BANDWIDTHS]
