"""The power laws of Kaplan et al.: loss over size, data, compute, steps, and what a finite batch costs.

    L(N) = (Nc / N)^aN        L(D) = (Dc / D)^aD        L(C) = (Cc / C)^aC
    L(N, D) = [(Nc / N)^(aN / aD) + Dc / D]^aD
    L(N, S_min) = (Nc / N)^aN + (Sc / S_min)^aS
    B_crit(L) = B* / L^(1 / aB),    S_min = S / (1 + B_crit / B),    C_min = C / (1 + B / B_crit)

Legend: N parameters without embeddings, D training tokens, C training FLOPs (C_min: at a batch far below critical), S
optimizer steps, B batch in tokens, L loss (nats per token). S_min is the number of steps that would do at a batch far
above the critical one.

The fitter sees (Nc / N)^aN as A N^-aN, and L(N, D) as A [N^-g + q / D]^aD with g = aN / aD; Nc, Dc, Sc and Cc are
derived, with their intervals.

References:
    Kaplan et al. 2020, arXiv 2001.08361; McCandlish et al. 2018, arXiv 1812.06162 (critical batch).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from landscape_ray.laws.core.analytic import log_sum
from landscape_ray.laws.core.law import Law, Variable, linear, nonlinear
from landscape_ray.laws.scaling.power import COMPUTE, power_law

REFERENCE = "Kaplan et al. 2020, arXiv 2001.08361"
SIZE = Variable("N", "parameters", "model size without embeddings")
TOKENS = Variable("D", "tokens", "number of training tokens")
NO_EMBEDDINGS = "N counts no embeddings: with them the exponent of the size is another one"

KAPLAN_SIZE = power_law(
    SIZE,
    name="kaplan_size",
    exponents=("aN",),
    scale_name="Nc",
    reference=REFERENCE,
    assumptions=(NO_EMBEDDINGS, "trained to convergence on ample data"),
)

KAPLAN_DATA = power_law(
    TOKENS,
    name="kaplan_data",
    exponents=("aD",),
    scale_name="Dc",
    reference=REFERENCE,
    assumptions=("the model is large enough not to matter", "early stopping on held-out loss"),
)

KAPLAN_COMPUTE = power_law(
    COMPUTE,
    name="kaplan_compute",
    exponents=("aC",),
    scale_name="Cc",
    reference=REFERENCE,
    assumptions=("the size is the optimal one for each compute",),
)

CRITICAL_BATCH = power_law(
    Variable("L", "nats/token", "loss reached"),
    name="critical_batch",
    response=Variable("B_crit", "tokens", "critical batch"),
    factor="Bstar",
    exponents=("inverse_aB",),
    title="critical batch over the loss reached",
    reference=f"{REFERENCE}; McCandlish et al. 2018, arXiv 1812.06162",
)


def critical_batch(loss: Any, b_star: Any, a_b: Any) -> Any:
    """Return B_crit = B* / L^(1 / aB), in the unit of B*.

    >>> round(float(critical_batch(2.0, 2e8, 0.5)))
    50000000
    """
    return b_star * loss ** (-1 / a_b)


def minimal_steps(steps: Any, batch: Any, critical: Any) -> Any:
    """Return S_min = S / (1 + B_crit / B): the steps that would have done at a very large batch.

    >>> minimal_steps(1000, 1e6, 1e6)
    500.0
    """
    return steps / (1 + critical / batch)


def minimal_compute(flops: Any, batch: Any, critical: Any) -> Any:
    """Return C_min = C / (1 + B / B_crit): the compute that would have done at a very small batch.

    The two are one trade: S_min / S + C_min / C = 1.

    >>> minimal_compute(1e18, 3e6, 1e6)
    2.5e+17
    """
    return flops / (1 + batch / critical)


def _size_data(x: Any, p: Mapping[str, Any]) -> tuple[Any, ...]:
    capacity = -p["g"] * np.log(x["N"])
    return (np.exp(p["aD"] * log_sum(capacity, np.log(p["q"]) - np.log(x["D"]))),)


def _middle_tokens(x: Any, p: Mapping[str, Any]) -> Any:
    """Return the q at which both terms are equal in the middle of the data."""
    return np.exp(np.log(x["D"]).mean() - p["g"] * np.log(x["N"]).mean())


def _size_data_constants(p: Mapping[str, Any]) -> dict[str, Any]:
    size = p["g"] * p["aD"]
    nc = p["A"] ** (1 / size)
    return {"aN": size, "Nc": nc, "Dc": p["q"] * nc ** p["g"]}


KAPLAN_SIZE_DATA = Law(
    name="kaplan_size_data",
    title="loss over size and data, with overfitting",
    formula="L = A [N^-g + q / D]^aD",
    reference=REFERENCE,
    variables=(SIZE, TOKENS),
    parameters=(
        linear("A", "factor, Nc^aN"),
        nonlinear("g", "exponent of the data that a size needs, aN / aD", 0.05, 10.0, starts=(0.3, 0.7, 1.5, 3.0)),
        nonlinear("aD", "exponent of the data", 0.01, 2.0, starts=4),
        nonlinear(
            "q",
            "D = q N^g are the tokens at which few data cost as much as a small size",
            1e-6,
            1e6,
            log=True,
            starts=(0.1, 1.0, 10.0),
            scale=_middle_tokens,
        ),
    ),
    columns=_size_data,
    derived=_size_data_constants,
    assumptions=(NO_EMBEDDINGS, "early stopping on held-out loss"),
)

KAPLAN_SIZE_STEPS = Law(
    name="kaplan_size_steps",
    title="loss over size and steps at a large batch",
    formula="L = A N^-aN + F S_min^-aS",
    reference=REFERENCE,
    variables=(SIZE, Variable("S_min", "steps", "steps at a batch far above critical")),
    parameters=(
        linear("A", "factor of the size, Nc^aN"),
        nonlinear("aN", "exponent of the size", 0.01, 2.0, starts=5),
        linear("F", "factor of the steps, Sc^aS"),
        nonlinear("aS", "exponent of the steps", 0.01, 3.0, starts=5),
    ),
    columns=lambda x, p: (x["N"] ** -p["aN"], x["S_min"] ** -p["aS"]),
    slopes=lambda x, p: (
        {"aN": -np.log(x["N"]) * x["N"] ** -p["aN"]},
        {"aS": -np.log(x["S_min"]) * x["S_min"] ** -p["aS"]},
    ),
    derived=lambda p: {"Nc": p["A"] ** (1 / p["aN"]), "Sc": p["F"] ** (1 / p["aS"])},
    assumptions=(NO_EMBEDDINGS, "points lie after the initial transient", "the data are ample"),
)
