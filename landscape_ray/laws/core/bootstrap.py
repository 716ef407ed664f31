"""Bootstrap samples of loss curves that respect what is dependent: points of one run are never drawn one by one.

With many runs, the runs are resampled; with few, blocks of residuals inside each run. A sample is a pair of weights
and observations, so that all samples are one batch for the fitter.

Two ways to resample runs: smooth weights (the default), which never lose the only run that identifies a parameter, and
counts drawn with replacement, as published intervals of scaling laws were made.

How wide they are: 95 % intervals of the Chinchilla law held the truth in 93 to 97 % of 200 data sets of 240 runs; with
48 runs in 93 to 94 % under least squares, but in 97 to 99 % under a Huber threshold far below the residuals. That
objective is one of medians, whose bootstrap spread exceeds the true one where runs are few: it errs on the safe side.

References:
    Rubin 1981 (Bayesian bootstrap); Politis and Romano 1992 (circular blocks);
    Carlstein 1986 (block length from the first autocorrelation); De Angelis, Hall and Young 1993
    (smoothing, for objectives of medians).
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

Method: TypeAlias = Literal["auto", "runs", "counts", "blocks"]

MIN_RUNS = 5
"""From this many runs on, runs are resampled; below, blocks of residuals within the runs."""


def resample(
    y: Array,
    residual: Array,
    run: NDArray[np.int64],
    num_parameters: int,
    num_samples: int,
    seed: int,
    *,
    method: Method = "auto",
    log: bool = True,
) -> tuple[Array, Array, dict[str, Any]]:
    """Return weights (num_samples, n), observations (num_samples, n) and a description of the method.

    Runs: every sample gives the runs Dirichlet weights, concentration 1 - 2 / num_runs, with mean 1 and variance 1: the
    spread of a mean over runs is then unbiased, which that of counts is not for few runs. And unlike counts, such
    weights never lose the only run that identifies a parameter.

    Blocks: y* = prediction * exp(residual*), where residual* is put together inside each run from circular blocks of
    consecutive centred residuals, plus the mean residual of the run times a standard normal: what a whole run is off by
    is one draw, not many. Both are inflated by sqrt(n / (n - num_parameters)) for what the fit has absorbed. Runs of
    one point draw a residual of all such runs with a random sign, smoothed by a normal kernel that keeps the variance;
    the `num_parameters` smallest, which the fit may have made zero, are not drawn from, which for a mean is the
    inflation. A normal factor on each residual would crowd them at zero, to which an objective of medians (a Huber
    threshold far below the residuals) answers with less than half the spread: 40 % of it for a power law of 30 points
    under least absolute deviations, now 98 %.

    Args:
        y: (n,) observations.
        residual: (n,) log y - log prediction, or y - prediction.
        run: (n,) run number of every point, 0 ... num_runs - 1, points of a run in order.
        num_parameters: parameters fitted.
        num_samples: how many samples.
        seed: of the generator.
        method: runs: smooth weights; counts: multinomial counts of runs; blocks: of residuals inside runs; auto: runs
            where there are 5 or more, else blocks.
        log: whether residuals are of the logarithm.
    """
    rng = np.random.default_rng(seed)
    num_runs = int(run.max()) + 1
    if method == "counts":
        counts = rng.multinomial(num_runs, np.full(num_runs, 1 / num_runs), size=num_samples).astype(np.float64)
        return counts[:, run], np.broadcast_to(y, (num_samples, len(y))), {"method": "counts", "num_runs": num_runs}
    if method == "runs" or (method == "auto" and num_runs >= MIN_RUNS):
        share = rng.dirichlet(np.full(num_runs, 1 - 2 / num_runs), size=num_samples) * num_runs
        return share[:, run], np.broadcast_to(y, (num_samples, len(y))), {"method": "runs", "num_runs": num_runs}
    inflated = residual * np.sqrt(len(y) / max(len(y) - num_parameters, 1))
    drawn = np.empty((num_samples, len(y)))
    lengths = []
    alone = np.flatnonzero(np.bincount(run)[run] == 1)
    drawn[:, alone] = _single_points(residual[alone], inflated[alone], num_parameters, num_samples, rng)
    for number in range(num_runs):
        member = np.flatnonzero(run == number)
        length = block_length(residual[member])
        lengths.append(length)
        if len(member) > 1:
            mean = inflated[member].mean()
            block = _circular_blocks(len(member), length, num_samples, rng)
            drawn[:, member] = (inflated[member] - mean)[block] + mean * rng.standard_normal((num_samples, 1))
    observations = y * np.exp(drawn - residual) if log else y + drawn - residual
    return np.ones_like(observations), observations, {"method": "residual blocks", "block_length": lengths}


def _single_points(
    residual: Array, inflated: Array, num_parameters: int, num_samples: int, rng: np.random.Generator
) -> Array:
    """Return residuals (num_samples, k) of runs of one point each, see :func:`resample`."""
    shape = (num_samples, len(residual))
    sign = rng.choice([-1.0, 1.0], size=shape)
    pool = np.sort(np.abs(residual))[num_parameters:]
    if not len(pool):
        return np.asarray(sign * np.abs(inflated))
    drawn = sign * rng.choice(pool, size=shape)
    width = 1.06 * len(pool) ** -0.2
    noise = width * np.sqrt(np.mean(pool**2)) * rng.standard_normal(shape)
    return np.asarray((drawn + noise) / np.sqrt(1 + width**2))


def block_length(residual: Array) -> int:
    """Return the length of blocks that carry the dependence of a series: longer for more autocorrelation.

    length = (sqrt(6) rho / (1 - rho^2))^(2/3) n^(1/3), rho the first autocorrelation, held to [1, n / 2].

    >>> block_length(np.array([1.0, -1.0] * 10))
    1
    """
    num_points = len(residual)
    centred = residual - residual.mean()
    energy = float(centred @ centred)
    rho = float(centred[1:] @ centred[:-1]) / energy if energy > 0 else 0.0
    rho = min(max(rho, 0.0), 0.97)
    length = round((np.sqrt(6) * rho / (1 - rho**2)) ** (2 / 3) * num_points ** (1 / 3))
    return int(min(max(length, 1), max(num_points // 2, 1)))


def _circular_blocks(num_points: int, length: int, num_samples: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return indices (num_samples, num_points) made of blocks of `length` consecutive ones, wrapping at the end."""
    num_blocks = -(-num_points // length)
    first = rng.integers(num_points, size=(num_samples, num_blocks, 1))
    return ((first + np.arange(length)) % num_points).reshape(num_samples, -1)[:, :num_points]
