"""What a token is worth: repeated data, excess parameters, and quality.

Repetition:
    L = E + A N'^-alpha + B D'^-beta
    D' = U + U RD* (1 - exp(-RD / RD*)),    RD = D / U - 1
    N' = UN + UN RN* (1 - exp(-RN / RN*)),  RN = N / UN - 1,  UN = min(N, size that is compute-optimal for U tokens)

Quality:
    L = E + A N^-alpha + B (D Q)^-beta,    log Q = sum_k c_k z_k

Legend: N parameters, D training tokens, U unique tokens among them, RD how often they were repeated, RD* after how many
repetitions most of their worth is gone; z_k features of the data (diversity, syntheticity, or 1 for a source of data
and 0 otherwise), Q worth of a token relative to one with z = 0.

A factor common to all Q cannot be told from B: the worth of data is relative.

References:
    Muennighoff et al. 2023, arXiv 2305.16264 (repetition); Chang et al. 2024, arXiv 2410.03083 (effective tokens from
    diversity and syntheticity).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from landscape_ray.errors import UserError
from landscape_ray.laws.core.law import Law, Variable, linear, nonlinear
from landscape_ray.laws.core.points import Points
from landscape_ray.laws.scaling.chinchilla import PARAMETERS, TOKENS, size_for_tokens

UNIQUE = Variable("U", "tokens", "unique tokens")
REPETITION_REFERENCE = "Muennighoff et al. 2023, arXiv 2305.16264"


def effective_amount(total: Any, unique: Any, half_life: Any) -> Any:
    """Return U + U R* (1 - exp(-R / R*)) with R = total / U - 1: what repeated data, or excess parameters, are worth.

    Args:
        total: tokens seen, or parameters.
        unique: of them unique, or useful; at most the total.
        half_life: R*, repetitions after which 1 - 1/e of the worth is gone.

    >>> float(round(effective_amount(100e9, 100e9, 15.4) / 1e9, 6))
    100.0
    >>> round(effective_amount(4e15, 100e9, 15.4) / 1e9)  # never more than U (1 + R*)
    1640
    """
    repeats = total / unique - 1
    return unique * (1 - half_life * np.expm1(-repeats / half_life))


def _check_unique(data: Points, grid_values: Mapping[str, float]) -> dict[str, Any]:
    del grid_values
    x = {name: np.asarray(values) for name, values in data.variables.items()}
    over = x["U"] > x["D"] * (1 + 1e-12)
    if over.any():
        raise UserError(
            f"U must be <= D, got {x['U'][over][0]:g} unique of {x['D'][over][0]:g} tokens; U counts tokens that were "
            "seen at least once"
        )
    return x


def repetition_law(base: Mapping[str, float] | None = None) -> Law:
    """Return the law of repeated data.

    Args:
        base: parameters (A, B, alpha, beta) of a Chinchilla law of the same data seen once. With it, parameters beyond
            the compute-optimal size for U unique tokens are discounted too, and RN* is fitted. None: only data are.

    >>> base = {"A": 521.0, "B": 1488.0, "alpha": 0.353, "beta": 0.353}
    >>> repetition_law(base).nonlinear_names
    ('alpha', 'beta', 'RD', 'RN')
    """

    def columns(x: Any, p: Mapping[str, Any]) -> tuple[Any, ...]:
        data = effective_amount(x["D"], x["U"], p["RD"])
        size = x["N"]
        if base is not None:
            useful = np.minimum(x["N"], size_for_tokens(base, x["U"]))
            size = effective_amount(x["N"], useful, p["RN"])
        return 1.0, np.exp(-p["alpha"] * np.log(size)), np.exp(-p["beta"] * np.log(data))

    return Law(
        name="repetition" if base is None else "repetition_excess",
        title="loss over size, tokens and unique tokens",
        formula=f"L = E + A {'N' if base is None else 'N_eff(N, U; RN)'}^-alpha + B D_eff(D, U; RD)^-beta",
        reference=REPETITION_REFERENCE,
        variables=(PARAMETERS, TOKENS, UNIQUE),
        parameters=(
            linear("E", "loss that no size and no data removes"),
            linear("A", "factor of the size"),
            nonlinear("alpha", "exponent of the size", 0.01, 3.0, starts=3),
            linear("B", "factor of the data"),
            nonlinear("beta", "exponent of the data", 0.01, 3.0, starts=3),
            nonlinear("RD", "repetitions after which data are worth little", 0.1, 1e4, log=True, starts=(3.0, 30.0)),
            *(
                (nonlinear("RN", "excess sizes after which parameters do", 0.1, 1e4, log=True, starts=(3.0, 30.0)),)
                if base is not None
                else ()
            ),
        ),
        columns=columns,
        prepare=_check_unique,
        assumptions=("epochs are over the same unique tokens", "some runs repeat their data, others do not"),
    )


REPETITION = repetition_law()


def effective_tokens_law(features: Sequence[str], name: str = "effective_tokens") -> Law:
    """Return the law whose tokens count by the quality of the data, log Q = sum_k c_k z_k.

    Args:
        features: names of the z_k, columns of the table; their coefficients are called c_<name>.
        name: key of the law.

    Raises:
        UserError: no features.

    >>> effective_tokens_law(["code"]).formula
    'L = E + A N^-alpha + B (D exp(c_code code))^-beta'
    """
    if not features:
        raise UserError("features must name a column at least, got none; without any it is the Chinchilla law")

    def spread(feature: str) -> Any:
        return lambda x, p: 1 / max(float(np.std(x[feature])), 1e-300)

    def columns(x: Any, p: Mapping[str, Any]) -> tuple[Any, ...]:
        tokens = np.log(x["D"]) + sum(p[f"c_{feature}"] * x[feature] for feature in features)
        return 1.0, np.exp(-p["alpha"] * np.log(x["N"])), np.exp(-p["beta"] * tokens)

    worth = " + ".join(f"c_{feature} {feature}" for feature in features)
    return Law(
        name=name,
        title="loss over size and tokens weighted by quality",
        formula=f"L = E + A N^-alpha + B (D exp({worth}))^-beta",
        reference="Chang et al. 2024, arXiv 2410.03083",
        variables=(PARAMETERS, TOKENS, *(Variable(f, "", "feature of the data", positive=False) for f in features)),
        parameters=(
            linear("E", "loss that no size and no data removes"),
            linear("A", "factor of the size"),
            nonlinear("alpha", "exponent of the size", 0.01, 3.0, starts=(0.2, 0.6)),
            linear("B", "factor of the data"),
            nonlinear("beta", "exponent of the data", 0.01, 3.0, starts=(0.2, 0.6)),
            *(
                nonlinear(f"c_{f}", f"log worth of a token per {f}", -10.0, 10.0, starts=(-0.5, 0.5), scale=spread(f))
                for f in features
            ),
        ),
        columns=columns,
        assumptions=("the features are of the data as trained on", "quality acts like more tokens"),
    )


EFFECTIVE_TOKENS = effective_tokens_law(("diversity", "syntheticity"))
