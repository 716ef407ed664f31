"""The parametric law of loss in model size and data (approach 3 of Hoffmann et al.), and its compute frontier.

    L(N, D) = E + A N^-alpha + B D^-beta

    G = (alpha A / (beta B))^(1 / (alpha + beta))
    N*(C) = G (C / k)^(beta / (alpha + beta)),    D*(C) = (C / k)^(alpha / (alpha + beta)) / G
    L*(C) = E + (A G^-alpha + B G^beta) (C / k)^(-alpha beta / (alpha + beta))

Legend: N parameters, D training tokens, C = k N D training FLOPs (k = 6), E irreducible loss; N*, D*, L* what is best
for a given C.

References:
    Hoffmann et al. 2022, arXiv 2203.15556; Besiroglu et al. 2024, arXiv 2404.10102.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from landscape_ray.errors import UserError
from landscape_ray.laws.core.law import Law, Variable, linear, nonlinear
from landscape_ray.laws.core.predict import check_usable, range_warnings
from landscape_ray.laws.core.propagate import Interval, propagate
from landscape_ray.laws.core.result import FitResult

FLOPS_PER_TOKEN = 6.0
"""Training FLOPs per parameter and token, k."""

PARAMETERS = Variable("N", "parameters", "model size", min_distinct=3)
TOKENS = Variable("D", "tokens", "number of training tokens", min_distinct=3)


def _columns(x: Any, p: Mapping[str, Any]) -> tuple[Any, ...]:
    return 1.0, x["N"] ** -p["alpha"], x["D"] ** -p["beta"]


def _slopes(x: Any, p: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    size, data = np.log(x["N"]), np.log(x["D"])
    return {}, {"alpha": -size * np.exp(-p["alpha"] * size)}, {"beta": -data * np.exp(-p["beta"] * data)}


CHINCHILLA = Law(
    name="chinchilla",
    title="loss over model size and tokens",
    formula="L = E + A N^-alpha + B D^-beta",
    reference="Hoffmann et al. 2022, arXiv 2203.15556",
    variables=(PARAMETERS, TOKENS),
    parameters=(
        linear("E", "loss that no size and no data removes"),
        linear("A", "factor of the size"),
        nonlinear("alpha", "exponent of the size", 0.01, 3.0, starts=5),
        linear("B", "factor of the data"),
        nonlinear("beta", "exponent of the data", 0.01, 3.0, starts=5),
    ),
    columns=_columns,
    slopes=_slopes,
    derived=lambda p: {"a": p["beta"] / (p["alpha"] + p["beta"]), "G": _balance(p)},
    assumptions=("N is counted alike in all runs", "every run's schedule ended at its D tokens"),
)


def _balance(p: Mapping[str, Any]) -> Any:
    """Return G: the square root of the parameters per token, as far as it does not hang on C."""
    return (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"]))


def optimal_size(p: Mapping[str, Any], flops: Any, flops_per_token: float = FLOPS_PER_TOKEN) -> Any:
    """Return N*(C).

    >>> published = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
    >>> size = optimal_size(published, 5.76e23)
    >>> round(size / 1e9, 1), round(optimal_tokens(published, 5.76e23) * size * 6 / 5.76e23, 9)
    (32.2, 1.0)
    """
    return _balance(p) * (flops / flops_per_token) ** (p["beta"] / (p["alpha"] + p["beta"]))


def optimal_tokens(p: Mapping[str, Any], flops: Any, flops_per_token: float = FLOPS_PER_TOKEN) -> Any:
    """Return D*(C)."""
    return (flops / flops_per_token) ** (p["alpha"] / (p["alpha"] + p["beta"])) / _balance(p)


def optimal_loss(p: Mapping[str, Any], flops: Any, flops_per_token: float = FLOPS_PER_TOKEN) -> Any:
    """Return L*(C), the lowest loss that C buys."""
    balance, decay = _balance(p), p["alpha"] * p["beta"] / (p["alpha"] + p["beta"])
    factor = p["A"] * balance ** -p["alpha"] + p["B"] * balance ** p["beta"]
    return p["E"] + factor * (flops / flops_per_token) ** -decay


def flops_for_loss(p: Mapping[str, Any], loss: Any, flops_per_token: float = FLOPS_PER_TOKEN) -> Any:
    """Return the least compute that reaches a loss, the inverse of L*(C); inf at E and below.

    >>> p = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
    >>> round(float(flops_for_loss(p, optimal_loss(p, 1e21))) / 1e21, 9), float(flops_for_loss(p, 1.6))
    (1.0, inf)
    """
    balance, decay = _balance(p), p["alpha"] * p["beta"] / (p["alpha"] + p["beta"])
    factor = p["A"] * balance ** -p["alpha"] + p["B"] * balance ** p["beta"]
    excess = np.asarray(loss - p["E"], dtype=np.float64)
    reachable = excess > 0
    return np.where(reachable, flops_per_token * (np.where(reachable, excess, 1.0) / factor) ** (-1 / decay), np.inf)


def flops_for_size(p: Mapping[str, Any], size: Any, flops_per_token: float = FLOPS_PER_TOKEN) -> Any:
    """Return the compute for which a size is the best, the inverse of N*(C)."""
    return flops_per_token * (size / _balance(p)) ** ((p["alpha"] + p["beta"]) / p["beta"])


def size_for_tokens(p: Mapping[str, Any], tokens: Any) -> Any:
    """Return the size that is compute-optimal for a number of tokens."""
    balance = _balance(p)
    return (tokens * balance) ** (p["beta"] / p["alpha"]) * balance


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Frontier:
    """What a fitted Chinchilla law considers best for compute budgets.

    Attributes:
        flops: (k,) budgets.
        size: N*.
        tokens: D*.
        loss: L*.
        exponent: a = beta / (alpha + beta), N* ~ C^a.
        warnings: in what respect this lies outside what was fitted, each "name: sentence".
    """

    flops: np.ndarray[Any, np.dtype[np.float64]]
    size: Interval
    tokens: Interval
    loss: Interval
    exponent: Interval
    warnings: tuple[str, ...]


def compute_frontier(
    fit: FitResult,
    flops: ArrayLike,
    *,
    flops_per_token: float = FLOPS_PER_TOKEN,
    allow_extrapolation: bool = False,
) -> Frontier:
    """Return the best size, tokens and loss for compute budgets, with intervals from the bootstrap samples.

    Args:
        fit: of the Chinchilla law.
        flops: budgets C, > 0.
        flops_per_token: FLOPs per parameter and token.
        allow_extrapolation: also where the best size or tokens are more than 100 times outside what was fitted.

    Raises:
        UserError: a fit of another law or a failed one, a budget that is not positive, a law without a trade-off, or
            budgets far outside.

    >>> from landscape_ray.laws.core.fit import fit
    >>> from landscape_ray.laws.core.points import Points
    >>> n, d = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e8, 1e9, 4), np.geomspace(1e9, 1e10, 4)))
    >>> found = fit(CHINCHILLA, Points({"N": n, "D": d}, 1.7 + 400 / n**0.5 + 400 / d**0.5), num_bootstrap=0)
    >>> frontier = compute_frontier(found, 6e18)
    >>> round(float(frontier.size.value[0] / 1e9), 6), round(float(frontier.tokens.value[0] / 1e9), 6)
    (1.0, 1.0)
    """
    check_usable(CHINCHILLA, fit)
    budgets = np.atleast_1d(np.asarray(flops, dtype=np.float64))
    if not (np.isfinite(budgets).all() and (budgets > 0).all()):
        raise UserError(f"flops must be finite and > 0, got {budgets}; give training FLOPs")
    if not (fit.parameters["A"] > 0 and fit.parameters["B"] > 0) or {"A", "B"} & set(fit.certificate["bounds_hit"]):
        raise UserError(
            f"fit must have A > 0 and B > 0 for a best size to exist, got A {fit.parameters['A']:g} and "
            f"B {fit.parameters['B']:g}; fit runs that vary in both size and tokens"
        )

    def functions(p: Mapping[str, Any]) -> dict[str, Any]:
        with np.errstate(all="ignore"):  # a sample without a trade-off is nan or inf, and seen as such
            return {
                "size": optimal_size(p, budgets, flops_per_token),
                "tokens": optimal_tokens(p, budgets, flops_per_token),
                "loss": optimal_loss(p, budgets, flops_per_token),
                "exponent": p["beta"] / (p["alpha"] + p["beta"]),
            }

    found = propagate(fit, functions)
    best = {"N": found["size"].value, "D": found["tokens"].value}
    warnings = [f"weak_fit: {'; '.join(fit.reasons)}"] if fit.status == "weak" else []
    warnings += range_warnings(CHINCHILLA, fit, best, allow_extrapolation)
    return Frontier(flops=budgets, **found, warnings=tuple(warnings))
