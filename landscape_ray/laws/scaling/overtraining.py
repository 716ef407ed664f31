"""Over-training: loss when models are trained on more tokens a parameter than is compute-optimal; error from loss.

    L(N, M) = E + a N^-alpha + b 6^(-alpha / 2) (M N)^-alpha
    L(C, M) = E + (a M^eta + b M^-eta) C^-eta,    eta = alpha / 2
    error(L) = epsilon - k exp(-gamma L)

Legend: N parameters, M = D / N tokens a parameter, C = 6 N D FLOPs, L loss (nats per token), error a mean top-1 error.

One exponent serves both terms, so at fixed M the excess loss is a power law of compute whose exponent does not hang on
M: lines of equal M are parallel. That is what allows to extrapolate from small over-trained runs. The two forms of the
loss are one law: a of the second is 6^eta times that of the first.

References:
    Gadre et al. 2024, arXiv 2403.08540.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from landscape_ray.laws.core.law import Law, Variable, linear, nonlinear
from landscape_ray.laws.scaling.chinchilla import PARAMETERS
from landscape_ray.laws.scaling.power import COMPUTE

REFERENCE = "Gadre et al. 2024, arXiv 2403.08540"
RATIO = Variable("M", "tokens/parameter", "tokens a parameter")


def _size_columns(x: Any, p: Mapping[str, Any]) -> tuple[Any, ...]:
    size = np.exp(-p["alpha"] * np.log(x["N"]))
    data = np.exp(-p["alpha"] * (np.log(x["M"] * x["N"]) + 0.5 * np.log(6)))
    return 1.0, size, data


OVERTRAINING = Law(
    name="overtraining",
    title="loss over size and tokens a parameter",
    formula="L = E + a N^-alpha + b 6^(-alpha/2) (M N)^-alpha",
    reference=REFERENCE,
    variables=(PARAMETERS, RATIO),
    parameters=(
        linear("E", "loss that no size and no data removes"),
        linear("a", "factor of the size"),
        linear("b", "factor of the data"),
        nonlinear("alpha", "exponent of both", 0.01, 3.0, starts=8),
    ),
    columns=_size_columns,
    assumptions=("size and data have one exponent", "N is counted alike in all runs"),
)


def _compute_columns(x: Any, p: Mapping[str, Any]) -> tuple[Any, ...]:
    compute, ratio = np.log(x["C"]), np.log(x["M"])
    return 1.0, np.exp(p["eta"] * (ratio - compute)), np.exp(-p["eta"] * (ratio + compute))


OVERTRAINING_COMPUTE = Law(
    name="overtraining_compute",
    title="loss over compute and tokens a parameter",
    formula="L = E + (a M^eta + b M^-eta) C^-eta",
    reference=REFERENCE,
    variables=(COMPUTE, RATIO),
    parameters=(
        linear("E", "loss that no compute removes"),
        linear("a", "factor of few parameters"),
        linear("b", "factor of few tokens"),
        nonlinear("eta", "exponent of the compute", 0.005, 1.5, starts=8),
    ),
    columns=_compute_columns,
    derived=lambda p: {"M_opt": (p["b"] / p["a"]) ** (0.5 / p["eta"])},
    assumptions=("size and data have one exponent", "C = 6 N D"),
)

DOWNSTREAM_ERROR = Law(
    name="downstream_error",
    title="mean downstream error over loss",
    formula="error = epsilon - k exp(-gamma L)",
    reference=REFERENCE,
    variables=(Variable("L", "nats/token", "loss"),),
    parameters=(
        linear("epsilon", "error of a useless model"),
        linear("k", "size of the gain"),
        nonlinear("gamma", "rate of the gain", 0.01, 10.0, starts=8),
    ),
    columns=lambda x, p: (1.0, -np.exp(-p["gamma"] * x["L"])),
    response=Variable("error", "", "mean top-1 error", below=1.0 + 1e-12),
    space="raw",
    assumptions=("the error is a mean over tasks that the smallest model beats chance on",),
)
