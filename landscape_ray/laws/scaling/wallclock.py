"""Training time from FLOPs and memory traffic, and the Chinchilla law in wall-clock.

    T = c 6 N D + w N S + u H D + o S
    time per token: tau(N) = 6 c N + w N / B + u H(N) + o / B,    D = T / tau(N)
    L(N, T) = E + A N^-alpha + B_D (T / tau(N))^-beta

Legend: T seconds, N parameters, D tokens, S = D / B updates of B tokens, H = depth x width, the activations that a
token leaves in memory; c seconds a FLOP, w seconds per parameter and update (weights, gradients and optimizer state go
through memory once an update), u seconds per token and unit of H, o seconds of overhead an update; B_D the factor of
the data in the Chinchilla law.

FLOPs alone are a poor estimate of time: small and deep models move memory. The time of a token is a sum of powers of N
with exponents >= 0, whatever of it dominates, and then the best size for a given time is unique (below).

References:
    Inbar and Sernau 2024, arXiv 2406.18922 (time from memory copies, Chinchilla in wall-clock);
    Hoffmann et al. 2022, arXiv 2203.15556 (the law of the loss).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws.core.law import Law, Variable, linear
from landscape_ray.laws.core.predict import check_usable, range_warnings, samples_of
from landscape_ray.laws.core.propagate import Interval, interval
from landscape_ray.laws.core.result import FitResult
from landscape_ray.laws.scaling.chinchilla import CHINCHILLA, FLOPS_PER_TOKEN, PARAMETERS

Array: TypeAlias = NDArray[np.float64]

TRAINING_TIME = Law(
    name="training_time",
    title="training time over FLOPs and memory traffic",
    formula="T = c 6 N D + w N S + u H D + o S",
    reference="Inbar and Sernau 2024, arXiv 2406.18922",
    variables=(
        dataclasses.replace(PARAMETERS, min_distinct=2),
        Variable("D", "tokens", "number of training tokens"),
        Variable("S", "steps", "updates"),
        Variable("H", "", "depth x width"),
    ),
    parameters=(
        linear("c", "seconds a FLOP"),
        linear("w", "seconds per parameter and update"),
        linear("u", "seconds per token and unit of depth x width"),
        linear("o", "seconds of overhead an update"),
    ),
    columns=lambda x, p: (FLOPS_PER_TOKEN * x["N"] * x["D"], x["N"] * x["S"], x["H"] * x["D"], x["S"]),
    response=Variable("T", "s", "training time"),
    assumptions=("all runs on one machine with one software stack", "time to load data does not matter"),
)


def time_per_token(p: Mapping[str, Any], size: Any, batch_tokens: float, activations: tuple[float, float]) -> Any:
    """Return tau(N) in seconds.

    Args:
        p: parameters of the time law.
        size: N.
        batch_tokens: tokens an update.
        activations: (h, q) with depth x width = h N^q; q is 2/3 for one shape of transformer at all sizes.

    >>> time_per_token({"c": 1e-12, "w": 0.0, "u": 0.0, "o": 0.0}, 1e9, 1e6, (1.0, 2 / 3))
    0.006
    """
    factor, power = activations
    flops = FLOPS_PER_TOKEN * p["c"] * size
    return flops + p["w"] * size / batch_tokens + p["u"] * factor * size**power + p["o"] / batch_tokens


def _growth(p: Mapping[str, Any], size: Any, batch_tokens: float, activations: tuple[float, float]) -> Any:
    """Return d log tau / d log N, a mean of the exponents that moves to the larger ones as N grows."""
    factor, power = activations
    first = FLOPS_PER_TOKEN * p["c"] * size + p["w"] * size / batch_tokens
    second = p["u"] * factor * size**power
    return (first + power * second) / time_per_token(p, size, batch_tokens, activations)


def time_optimal_size(
    loss: Mapping[str, Any],
    time: Mapping[str, Any],
    seconds: Any,
    batch_tokens: float,
    activations: tuple[float, float],
) -> Array:
    """Return the size with the lowest loss after a given time; arguments broadcast.

    d L / d log N = -alpha A N^-alpha + beta B_D (tau / T)^beta * d log tau / d log N rises in N: the first term does,
    and the second is a product of two that do. So its root is unique, and bisection in log N finds it.

    Args:
        loss: parameters of the Chinchilla law.
        time: parameters of the time law.
        seconds: T.
        batch_tokens: tokens an update.
        activations: (h, q) with depth x width = h N^q, q in [0, 1].

    Where time is FLOPs alone, it is the compute-optimal size for C = T / c:

    >>> from landscape_ray.laws.scaling.chinchilla import optimal_size
    >>> loss = {"E": 1.7, "A": 400.0, "B": 410.0, "alpha": 0.34, "beta": 0.28}
    >>> time = {"c": 1e-14, "w": 0.0, "u": 0.0, "o": 0.0}
    >>> size = time_optimal_size(loss, time, 1e6, 1e6, (1.0, 2 / 3))
    >>> round(float(size / optimal_size(loss, 1e20)), 9)
    1.0
    """
    shape = np.broadcast_shapes(*(np.shape(v) for v in (*loss.values(), *time.values(), seconds)))
    low, high = np.zeros(shape), np.full(shape, np.log(1e18))
    for _ in range(80):
        middle = (low + high) / 2
        size = np.exp(middle)
        tokens = seconds / time_per_token(time, size, batch_tokens, activations)
        rise = loss["beta"] * loss["B"] * tokens ** -loss["beta"] * _growth(time, size, batch_tokens, activations)
        falling = rise < loss["alpha"] * loss["A"] * size ** -loss["alpha"]
        low, high = np.where(falling, middle, low), np.where(falling, high, middle)
    return np.asarray(np.exp((low + high) / 2))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TimeFrontier:
    """What is best for a given time on a given machine.

    Attributes:
        seconds: (k,) times.
        size: best N.
        tokens: D that the time allows at that size.
        loss: what is expected.
        warnings: each "name: sentence".
    """

    seconds: Array
    size: Interval
    tokens: Interval
    loss: Interval
    warnings: tuple[str, ...]


def time_frontier(
    loss_fit: FitResult,
    time_fit: FitResult,
    seconds: ArrayLike,
    *,
    batch_tokens: float,
    activations: tuple[float, float],
    allow_extrapolation: bool = False,
) -> TimeFrontier:
    """Return the best size, tokens and loss for training times, with intervals from the samples of both fits.

    Args:
        loss_fit: of the Chinchilla law.
        time_fit: of the law of training time.
        seconds: T, > 0.
        batch_tokens: tokens an update, > 0.
        activations: (h, q) with depth x width = h N^q, h > 0, q in [0, 1].
        allow_extrapolation: also more than 100 times outside what was fitted.

    Raises:
        UserError: a fit of another law or a failed one, an argument out of range, or times far outside.
    """
    check_usable(CHINCHILLA, loss_fit)
    check_usable(TRAINING_TIME, time_fit)
    times = np.atleast_1d(np.asarray(seconds, dtype=np.float64))
    if not (np.isfinite(times).all() and (times > 0).all()):
        raise UserError(f"seconds must be finite and > 0, got {times}; give training times")
    if not (batch_tokens > 0 and activations[0] > 0 and 0 <= activations[1] <= 1):
        raise UserError(
            f"batch_tokens and activations must be > 0 and (> 0, in [0, 1]), got {batch_tokens} and {activations}; "
            "activations are (h, q) of depth x width = h N^q"
        )

    def solve(loss: Mapping[str, Any], time: Mapping[str, Any]) -> tuple[Array, Array, Array]:
        size = time_optimal_size(loss, time, times, batch_tokens, activations)
        tokens = times / time_per_token(time, size, batch_tokens, activations)
        return size, tokens, CHINCHILLA.predict({"N": size, "D": tokens}, loss)

    values = solve(loss_fit.parameters, time_fit.parameters)
    drawn_loss, drawn_time = samples_of(loss_fit), samples_of(time_fit)
    count = max(len(loss_fit.samples), len(time_fit.samples))
    # The fits are independent: any pairing of their samples will do.
    pairs = [{name: np.resize(v, (max(count, 1), 1)) for name, v in d.items()} for d in (drawn_loss, drawn_time)]
    samples = solve(*pairs) if count else tuple(np.empty((0, len(times))) for _ in range(3))
    size, tokens, loss = (
        interval(value, drawn, loss_fit.confidence) for value, drawn in zip(values, samples, strict=True)
    )
    fits = (loss_fit, time_fit)
    warnings = [f"weak_fit: {fit.law}: {'; '.join(fit.reasons)}" for fit in fits if fit.status == "weak"]
    best = {"N": values[0], "D": values[1]}
    warnings += range_warnings(CHINCHILLA, loss_fit, best, allow_extrapolation)
    known = time_fit.data.get("ranges", {}).get("N")
    if known is not None and not ((values[0] >= known[0]) & (values[0] <= known[1])).all():
        warnings.append(
            f"time_extrapolation: sizes from {values[0].min():.3g} to {values[0].max():.3g} were timed at "
            f"{known[0]:.3g} to {known[1]:.3g} only"
        )
    return TimeFrontier(seconds=times, size=size, tokens=tokens, loss=loss, warnings=tuple(warnings))
