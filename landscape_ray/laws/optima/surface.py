"""The loss around the best learning rate and batch, over model size and horizon: one surface for all runs.

    log L(N, D, lr, B) = floor(N, D) + a u^2/2 + c u v + b v^2/2 + (third order in u, v)
    u = log(lr / lr*),  lr* = lr0 (N/N0)^-p (D/D0)^q
    v = log(B / B*),    B*  = B0 (N/N0)^-r (D/D0)^s

Legend: N parameters, D training tokens, lr peak learning rate, B batch in tokens, L final loss; lr*, B* where the loss
is lowest; a, b curvatures, c what links them; N0, D0 geometric means over the groups, so that lr0 and B0 are optima in
the middle of the data. The floor is free in every group (N, D): what size and data do to the loss is not modelled, so
it cannot mislead. There is no linear term in u and v, so that the optimum is where the power products say, and these
are fitted to every run at once, not to a handful of noisy minima. The third order carries what a parabola misses: too
high a rate costs more than too low a one.

References:
    Li et al. 2025 ("Step Law"), arXiv 2503.04715 (the power products); Bjorck et al. 2024, arXiv 2409.19913 (parabolas
    in log lr). The joint surface is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from landscape_ray.laws.core.law import Law, Parameter, Variable, linear, nonlinear

NAME = "step_law"
TITLE = "best learning rate and batch over size and tokens"
FORMULA = "lr* = c N^-p D^q, B* = k N^-r D^s"
REFERENCE = "after Li et al. 2025, arXiv 2503.04715, and Bjorck et al. 2024, arXiv 2409.19913"

LEVELLED = ("N", "D")
"""Variables over which residuals have no trend whatever the form: each of their pairs has a floor of its own."""

SIZE = Variable("N", "parameters", "model size", min_distinct=1)
TOKENS = Variable("D", "tokens", "number of training tokens", min_distinct=1)
LR = Variable("lr", "", "peak learning rate", min_distinct=3)
BATCH = Variable("batch", "tokens", "batch", min_distinct=3)

_SHAPE = (("a", 2, 0), ("c", 1, 1), ("b", 0, 2), ("uuu", 3, 0), ("uuv", 2, 1), ("uvv", 1, 2), ("vvv", 0, 3))
"""Coefficients of the bowl, each with its powers of u and v."""

_FACTORIAL = (1.0, 1.0, 2.0, 6.0)

_VALLEY_STEPS = 8
_NEAR = np.linspace(-0.5, 0.5, 101)
"""How the best learning rate of a given batch is looked for: in steps from the best batch, within e^0.5 in each."""


def surface(
    groups: Sequence[tuple[float, float]],
    lr: tuple[float, float, float],
    batch: tuple[float, float, float] | None,
    *,
    order: int = 3,
    batch_by_size: bool = True,
    by_horizon: bool = True,
) -> Law:
    """Return the surface over these groups as a law.

    Args:
        groups: the pairs (N, D), each of which gets a floor of its own.
        lr: (smallest, where the search begins, largest) lr0.
        batch: the same of B0; None leaves the batch out.
        order: 2 or 3.
        batch_by_size: whether the best batch may depend on the size.
        by_horizon: whether the optimum may depend on the horizon beside the size; not where one follows the other.
    """
    pairs = [(float(n), float(d)) for n, d in groups]
    n0, d0 = centre(pairs)
    sizes, horizons = (len(set(axis)) for axis in zip(*pairs, strict=True))
    inner = [nonlinear("lr0", "best learning rate at N0, D0", lr[0], lr[2], log=True, starts=_around(lr))]
    known = horizons > 1 and by_horizon
    inner += _exponents(("p", sizes > 1, 0.5), ("q", known, 0.2), "the best learning rate")
    if batch is not None:
        inner.append(nonlinear("B0", "best batch at N0, D0", batch[0], batch[2], log=True, starts=_around(batch)))
        inner += _exponents(("r", sizes > 1 and batch_by_size, 0.0), ("s", known, 0.5), "the best batch")
    shape = [row for row in _SHAPE if row[1] + row[2] <= order and (batch is not None or row[2] == 0)]
    # A cubic has a second stationary point with the same residuals, a top or a saddle: curvatures are not negative.
    bowl = [linear(name, "shape of the bowl", free=name not in ("a", "b"), normalised=False) for name, _, _ in shape]
    floors = [
        linear(f"floor{i}", f"log of the lowest loss at N {n:g}, D {d:g}", free=True) for i, (n, d) in enumerate(pairs)
    ]

    def columns(x: Mapping[str, Any], p: Mapping[str, Any]) -> tuple[Any, ...]:
        u, v = offsets(x, p, n0, d0)
        member = [((x["N"] == n) & (x["D"] == d)).astype(np.float64) for n, d in pairs]
        return (*(_power(u, i) * _power(v, j) for _, i, j in shape), *member)

    def slopes(x: Mapping[str, Any], p: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
        u, v = offsets(x, p, n0, d0)
        size, horizon = np.log(x["N"] / n0), np.log(x["D"] / d0)
        by_u = {"lr0": -1 / p["lr0"], "p": size, "q": -horizon}
        by_v = {"B0": -1 / p["B0"], "r": size, "s": -horizon} if batch is not None else {}
        found: list[Mapping[str, Any]] = []
        for _, i, j in shape:
            to_u, to_v = _power(u, i - 1) * _power(v, j), _power(u, i) * _power(v, j - 1)
            found.append(
                {name: slope * to_u for name, slope in by_u.items() if i}
                | {name: slope * to_v for name, slope in by_v.items() if j}
            )
        return (*found, *({} for _ in pairs))

    return Law(
        name=NAME,
        title=TITLE,
        formula=f"{FORMULA}; log L = floor(N, D) + bowl(log lr/lr*, log B/B*)"
        if batch is not None
        else "log L = floor(N, D) + a u^2/2 + third order, u = log(lr/lr*), lr* = lr0 (N/N0)^-p (D/D0)^q",
        reference=REFERENCE,
        variables=(SIZE, TOKENS, LR, BATCH) if batch is not None else (SIZE, TOKENS, LR),
        parameters=(*inner, *bowl, *floors),
        columns=columns,
        slopes=slopes,
        space="raw",
        link=np.log,
        unlink=np.exp,
        assumptions=(
            "the runs of a group differ in learning rate and batch only",
            "every run's schedule ended at its D tokens",
        ),
    )


def centre(groups: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return N0 and D0, the geometric means over the groups.

    >>> [f"{v:.6g}" for v in centre([(1e8, 1e9), (1e10, 1e9)])]
    ['1e+09', '1e+09']
    """
    n0, d0 = np.exp(np.log(np.array(groups)).mean(axis=0))
    return float(n0), float(d0)


def best_point(p: Mapping[str, Any], size: Any, horizon: Any) -> tuple[Any, Any | None]:
    """Return log lr* and log B* at log(N/N0) and log(D/D0); None without batch."""
    log_lr = np.log(p["lr0"]) - p.get("p", 0.0) * size + p.get("q", 0.0) * horizon
    if "B0" not in p:
        return log_lr, None
    return log_lr, np.log(p["B0"]) - p.get("r", 0.0) * size + p.get("s", 0.0) * horizon


def offsets(x: Mapping[str, Any], p: Mapping[str, Any], n0: float, d0: float) -> tuple[Any, Any]:
    """Return u and v, the logarithms of how far learning rate and batch are from their optima; v is 0 without batch."""
    log_lr, log_batch = best_point(p, np.log(x["N"] / n0), np.log(x["D"] / d0))
    return np.log(x["lr"]) - log_lr, 0.0 if log_batch is None else np.log(x["batch"]) - log_batch


def rise(p: Mapping[str, Any], u: Any, v: Any) -> Any:
    """Return how much higher log L is at (u, v) than at the optimum."""
    return sum(p[name] * _power(u, i) * _power(v, j) for name, i, j in _SHAPE if name in p)


def valley(p: Mapping[str, Any], away: Any) -> tuple[Any, Any]:
    """Return the log lr (s,), from the best, that is best at a batch away from the best, and how much log L rises.

    The third order turns down far out: the valley that belongs to the optimum is followed from there, step by step.

    Args:
        p: parameters (s,) or of shapes that broadcast to it.
        away: (s,) logarithm of the batch over the best one.
    """
    u = np.zeros(np.broadcast_shapes(np.shape(away), np.shape(p["a"])))
    at = {name: np.asarray(values)[..., None] for name, values in p.items()}
    for share in np.linspace(0, 1, _VALLEY_STEPS + 1)[1:]:
        near = u[:, None] + _NEAR
        lowest = np.argmin(rise(at, near, share * np.asarray(away)[..., None]), axis=1)
        u = near[np.arange(len(u)), lowest]
    step = _NEAR[1] - _NEAR[0]
    left, middle, right = (rise(p, u + shift, away) for shift in (-step, 0.0, step))
    bend = left - 2 * middle + right
    u = u + np.where(bend > 0, 0.5 * step * (left - right) / np.where(bend > 0, bend, 1.0), 0.0)
    return u, rise(p, u, away)


def _power(u: Any, exponent: int) -> Any:
    """Return u^exponent / exponent!, whose slope is the same of one less; 0 for exponent -1."""
    return u**exponent / _FACTORIAL[exponent] if exponent >= 0 else 0.0 * u


def _exponents(by_size: tuple[str, bool, float], by_horizon: tuple[str, bool, float], what: str) -> list[Parameter]:
    """Return the exponents that the groups can tell, each with its start."""
    texts = (f"how {what} falls with the size", f"how {what} rises with the horizon")
    return [
        nonlinear(name, text, -3.0, 3.0, starts=(start,))
        for (name, known, start), text in zip((by_size, by_horizon), texts, strict=True)
        if known
    ]


def _around(ends: tuple[float, float, float]) -> tuple[float, ...]:
    """Return starts on both sides of the middle one, inside the ends."""
    low, middle, high = ends
    return tuple(sorted({float(np.clip(middle * factor, low, high)) for factor in (0.7, 1.4)}))
