"""The parametric law of loss in model size and data (approach 3 of Hoffmann et al.), and its compute frontier.

    L(N, D) = E + A N^-alpha + B D^-beta

Legend: N parameters, D training tokens, C = k N D training FLOPs (k = 6), E irreducible loss.

References:
    Hoffmann et al. 2022, arXiv 2203.15556; Besiroglu et al. 2024, arXiv 2404.10102.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from landscape_ray.laws.core.law import Law, Variable, linear, nonlinear

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
    assumptions=("N is counted alike in all runs", "every run's schedule ended at its D tokens"),
)
