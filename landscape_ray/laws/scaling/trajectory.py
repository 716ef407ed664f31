"""The whole loss trajectory of a run at any batch size: Kaplan's laws of steps and of the critical batch in one.

    L = (Nc / N)^aN + (Sc / S_min)^aS,    S_min = S / (1 + B_crit(L) / B),    B_crit(L) = B* / L^(1 / aB)

Legend: N parameters without embeddings, S optimizer steps, B batch in tokens, L loss (nats per token).

S_min hangs on the loss itself, so L is the root of one scalar equation a step. The right side falls as L rises, so
there is exactly one; it lies between the loss at an infinite batch and the right side taken there. Newton's method in
log L inside that bracket, all points at once, finds it to rounding.

The fitter sees, with A = Nc^aN and l = L / A,

    l = N^-aN + F S^-aS (1 + K / (B l^(1 / aB)))^aS,

from which Nc, Sc and B* are derived with their intervals.

References:
    Su, Tian, Shen and Cai 2024, arXiv 2403.06563; Kaplan et al. 2020, arXiv 2001.08361.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from landscape_ray.laws.core.law import Law, Variable, linear, nonlinear
from landscape_ray.laws.scaling.kaplan import NO_EMBEDDINGS, SIZE

Array: TypeAlias = NDArray[np.float64]

_MAX_ITERATIONS = 100


def trajectory_loss(
    size: ArrayLike,
    steps: ArrayLike,
    batch: ArrayLike,
    *,
    nc: float,
    a_n: float,
    sc: float,
    a_s: float,
    b_star: float,
    a_b: float,
) -> Array:
    """Return the loss after `steps` updates with `batch` tokens each; arguments broadcast.

    >>> constants = dict(nc=6.5e13, a_n=0.077, sc=2.1e3, a_s=0.76, b_star=2.1e8, a_b=0.21)
    >>> loss = trajectory_loss(1e8, 1e4, [1e4, 1e6, 1e12], **constants)
    >>> bool((np.diff(loss) < 0).all())
    True
    >>> infinite_batch = (6.5e13 / 1e8) ** 0.077 + (2.1e3 / 1e4) ** 0.76
    >>> bool(abs(loss[2] / infinite_batch - 1) < 1e-6)
    True
    """
    n, s, b = (np.asarray(v, dtype=np.float64) for v in (size, steps, batch))
    floor = (nc / n) ** a_n
    return np.asarray(np.exp(_log_root(floor, (sc / s) ** a_s, b_star / b, a_s, 1 / a_b)))


def _right_side(t: Any, floor: Any, progress: Any, need: Any, a_s: Any, inverse: Any) -> Any:
    return floor + progress * np.exp(a_s * np.log1p(need * np.exp(-inverse * t)))


def _log_root(floor: Any, progress: Any, need: Any, a_s: Any, inverse: Any) -> Any:
    """Return t with e^t = floor + progress (1 + need e^(-inverse t))^a_s; complex arguments give complex roots.

    A complex part is an infinitesimal here (a complex step): the root is found for the real parts, and one Newton step
    with the complex arguments carries the derivative, which is exact.
    """
    given = (floor, progress, need, a_s, inverse)
    real = tuple(np.real(v) for v in given)
    t = _real_log_root(*real)
    if not any(np.iscomplexobj(v) for v in given):
        return t
    return t - (np.exp(t) - _right_side(t, *given)) / _slope(t, *real)


def _slope(t: Any, floor: Any, progress: Any, need: Any, a_s: Any, inverse: Any) -> Any:
    """Return d/dt of e^t - right side, > 0."""
    ratio = need * np.exp(-inverse * t)
    rise = _right_side(t, floor, progress, need, a_s, inverse) - floor
    return np.exp(t) + rise * a_s * inverse * ratio / (1 + ratio)


def _real_log_root(floor: Any, progress: Any, need: Any, a_s: Any, inverse: Any) -> Any:
    low = np.log(floor + progress)
    high = np.log(_right_side(low, floor, progress, need, a_s, inverse))
    low, high = (np.array(v) for v in np.broadcast_arrays(low, high))
    t = low.copy()
    for _ in range(_MAX_ITERATIONS):
        excess = np.exp(t) - _right_side(t, floor, progress, need, a_s, inverse)
        low, high = np.where(excess <= 0, t, low), np.where(excess > 0, t, high)
        new = t - excess / _slope(t, floor, progress, need, a_s, inverse)
        new = np.where((new >= low) & (new <= high), new, (low + high) / 2)
        done = np.abs(new - t) <= 1e-15 * (1 + np.abs(t))
        t = new
        if done.all():
            break
    return t


def _columns(x: Any, p: Mapping[str, Any]) -> tuple[Any, ...]:
    floor = np.exp(-p["aN"] * np.log(x["N"]))
    progress = p["F"] * np.exp(-p["aS"] * np.log(x["S"]))
    return (np.exp(_log_root(floor, progress, p["K"] / x["B"], p["aS"], 1 / p["aB"])),)


def _middle(x: Any, name: str) -> Any:
    return np.log(x[name]).mean()


def _constants(p: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "Nc": p["A"] ** (1 / p["aN"]),
        "Sc": (p["A"] * p["F"]) ** (1 / p["aS"]),
        "Bstar": p["K"] * p["A"] ** (1 / p["aB"]),
    }


KAPLAN_TRAJECTORY = Law(
    name="kaplan_trajectory",
    title="loss trajectory of any size at any batch",
    formula="L = A l, l = N^-aN + F S^-aS (1 + K / (B l^(1 / aB)))^aS",
    reference="Su et al. 2024, arXiv 2403.06563; Kaplan et al. 2020, arXiv 2001.08361",
    variables=(
        SIZE,
        Variable("S", "steps", "optimizer steps"),
        Variable("B", "tokens", "batch"),
    ),
    parameters=(
        linear("A", "factor, Nc^aN"),
        nonlinear("aN", "exponent of the size", 0.01, 1.0, starts=(0.05, 0.15)),
        nonlinear("aS", "exponent of the steps", 0.05, 3.0, starts=(0.3, 0.8)),
        nonlinear(
            "F",
            "size of the steps' term over that of the size",
            1e-4,
            1e4,
            log=True,
            starts=(0.3,),
            scale=lambda x, p: np.exp(p["aS"] * _middle(x, "S") - p["aN"] * _middle(x, "N")),
        ),
        nonlinear(
            "K",
            "critical batch at l = 1",
            1e-4,
            1e4,
            log=True,
            starts=(0.1, 3.0),
            scale=lambda x, p: np.exp(_middle(x, "B") - p["aN"] / p["aB"] * _middle(x, "N")),
        ),
        nonlinear("aB", "exponent of the critical batch", 0.05, 2.0, starts=(0.25,)),
    ),
    columns=_columns,
    derived=_constants,
    assumptions=(
        NO_EMBEDDINGS,
        "points lie after the initial transient, at a learning rate tuned for the batch",
        "the data are ample: no token is seen twice",
    ),
)
