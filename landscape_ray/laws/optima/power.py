"""Power products of optima: what the best learning rate or batch of every group says about other sizes and horizons.

    lr*(N, D) = c N^-p D^q               over size and horizon
    lr*(D) = c D^-beta                   over the horizon, one size
    lr*(N, D) = c N^-p D^-(beta + gamma log(N / 1e8))    the exponent of the horizon may change with the size
    B*(N, D) = k N^-r D^s

Legend: N parameters, D training tokens, lr* best peak learning rate, B* best batch in tokens.

These are fitted to the optima of groups (:func:`landscape_ray.laws.optima.vertex.group_optima`), in two stages. The
uncertainty of each optimum goes into the second stage: every bootstrap sample takes a draw of every optimum, and
resamples the groups on top.

References:
    Bjorck et al. 2024, arXiv 2409.19913 (over the horizon); Li et al. 2025, arXiv 2503.04715 (over size and horizon).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws.core.fit import fit
from landscape_ray.laws.core.law import Law, Variable, linear, nonlinear
from landscape_ray.laws.core.objective import Objective
from landscape_ray.laws.core.points import Points
from landscape_ray.laws.core.result import FitResult
from landscape_ray.laws.optima.vertex import Optima

Array: TypeAlias = NDArray[np.float64]

SIZE = Variable("N", "parameters", "model size", min_distinct=2)
TOKENS = Variable("D", "tokens", "number of training tokens", min_distinct=2)
BEST_LR = Variable("lr", "", "best peak learning rate")
BEST_BATCH = Variable("batch", "tokens", "best batch")

_ASSUMPTIONS = (
    "N and D are counted alike in all groups",
    "each optimum was inside its sweep",
    "every run's schedule ended at its D tokens",
)


def _product(x: Mapping[str, Any], p: Mapping[str, Any], size: str, horizon: str) -> Any:
    return np.exp(-p[size] * np.log(x["N"]) + p[horizon] * np.log(x["D"]))


LR_POWER = Law(
    name="lr_power",
    title="best learning rate over size and horizon",
    formula="lr* = c N^-p D^q",
    reference="Li et al. 2025, arXiv 2503.04715",
    variables=(SIZE, TOKENS),
    response=BEST_LR,
    parameters=(
        linear("c", "factor"),
        nonlinear("p", "how it falls with the size", -3.0, 3.0, starts=(0.0, 0.7)),
        nonlinear("q", "how it rises with the horizon", -3.0, 3.0, starts=(-0.3, 0.3)),
    ),
    columns=lambda x, p: (_product(x, p, "p", "q"),),
    slopes=lambda x, p: (
        {"p": -np.log(x["N"]) * _product(x, p, "p", "q"), "q": np.log(x["D"]) * _product(x, p, "p", "q")},
    ),
    assumptions=_ASSUMPTIONS,
)

BATCH_POWER = Law(
    name="batch_power",
    title="best batch over size and horizon",
    formula="batch* = k N^-r D^s",
    reference="Li et al. 2025, arXiv 2503.04715",
    variables=(SIZE, TOKENS),
    response=BEST_BATCH,
    parameters=(
        linear("k", "factor"),
        nonlinear("r", "how it falls with the size", -3.0, 3.0, starts=(0.0,)),
        nonlinear("s", "how it rises with the horizon", -3.0, 3.0, starts=(0.2, 0.8)),
    ),
    columns=lambda x, p: (_product(x, p, "r", "s"),),
    slopes=lambda x, p: (
        {"r": -np.log(x["N"]) * _product(x, p, "r", "s"), "s": np.log(x["D"]) * _product(x, p, "r", "s")},
    ),
    assumptions=_ASSUMPTIONS,
)

LR_HORIZON = Law(
    name="lr_horizon",
    title="best learning rate over the horizon",
    formula="lr* = c D^-beta",
    reference="Bjorck et al. 2024, arXiv 2409.19913",
    variables=(TOKENS,),
    response=BEST_LR,
    parameters=(
        linear("c", "factor"),
        nonlinear("beta", "how it falls with the horizon", -3.0, 3.0, starts=(0.0, 0.5)),
    ),
    columns=lambda x, p: (np.exp(-p["beta"] * np.log(x["D"])),),
    slopes=lambda x, p: ({"beta": -np.log(x["D"]) * np.exp(-p["beta"] * np.log(x["D"]))},),
    assumptions=("one model size", *_ASSUMPTIONS[1:]),
)

REFERENCE_SIZE = 1e8
"""Size at which beta of the law with a changing exponent is quoted."""


def _bent(x: Mapping[str, Any], p: Mapping[str, Any]) -> Any:
    size, horizon = np.log(x["N"] / REFERENCE_SIZE), np.log(x["D"])
    return np.exp(-p["p"] * size - (p["beta"] + p["gamma"] * size) * horizon)


def _bent_slopes(x: Mapping[str, Any], p: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    size, horizon, value = np.log(x["N"] / REFERENCE_SIZE), np.log(x["D"]), _bent(x, p)
    return ({"p": -size * value, "beta": -horizon * value, "gamma": -size * horizon * value},)


LR_HORIZON_SIZE = Law(
    name="lr_horizon_size",
    title="best learning rate over the horizon, its exponent changing with the size",
    formula="lr* = c (N/1e8)^-p D^-(beta + gamma log(N/1e8))",
    reference="after Bjorck et al. 2024, arXiv 2409.19913",
    variables=(SIZE, TOKENS),
    response=BEST_LR,
    parameters=(
        linear("c", "factor"),
        nonlinear("p", "how it falls with the size", -30.0, 30.0, starts=(0.0,)),
        nonlinear("beta", "how it falls with the horizon at 1e8 parameters", -3.0, 3.0, starts=(0.0, 0.5)),
        nonlinear("gamma", "how that changes by a factor e in size", -2.0, 2.0, starts=(0.0,)),
    ),
    columns=lambda x, p: (_bent(x, p),),
    slopes=_bent_slopes,
    assumptions=_ASSUMPTIONS,
)


def fit_optima(
    law: Law,
    optima: Optima,
    *,
    num_bootstrap: int = 200,
    confidence: float = 0.9,
    seed: int = 0,
) -> FitResult:
    """Return a law of the best learning rate or batch, fitted to the optima of groups by least squares of logarithms.

    Args:
        law: with the response lr or batch, and variables among N, D and batch.
        optima: of the groups, from :func:`landscape_ray.laws.optima.vertex.group_optima`.
        num_bootstrap: number of bootstrap samples, 0 for none: draws of every optimum, and weights of the groups.
        confidence: level of the intervals, in (0, 1).
        seed: of the bootstrap.

    Returns:
        The fit; groups without an optimum, and what was said of the others, are among its warnings.

    Raises:
        UserError: the law has another response, a batch is missing, too few groups, or see
            :func:`landscape_ray.laws.core.fit.fit`.

    >>> from landscape_ray.laws.optima.sweep import Sweep
    >>> from landscape_ray.laws.optima.vertex import group_optima
    >>> lr, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e-4, 1e-1, 9), [1e8, 1e9, 1e10]))
    >>> loss = 3 * np.exp(0.004 * np.log(lr / (5 * d**-0.32)) ** 2)
    >>> round(fit_optima(LR_HORIZON, group_optima(Sweep(lr, loss, D=d)), num_bootstrap=0).parameters["beta"], 6)
    0.32
    """
    if law.response.name not in ("lr", "batch"):
        raise UserError(f"law must predict lr or batch, got '{law.name}' of {law.response.name}; take one that does")
    found, column = optima.found, 0 if law.response.name == "lr" else 1
    if column and any(optimum.batch_interval is None for optimum in found):
        raise UserError("batch must have been swept in every group for a law of the best batch; fit one of lr instead")
    response = [optimum.lr if column == 0 else optimum.batch for optimum in found]
    columns: dict[str, Any] = {"N": [o.N for o in found], "D": [o.D for o in found]}
    if any(variable.name == "batch" for variable in law.variables):
        if any(optimum.batch is None for optimum in found):
            raise UserError(
                "batch must be known in every group for a law over the batch; use group_optima(by_batch=True)"
            )
        columns["batch"] = [optimum.batch for optimum in found]
    names = [", ".join(f"{name} {values[i]:g}" for name, values in columns.items()) for i in range(len(found))]
    draws = _draws([optimum.samples for optimum in found], np.array(response), column, num_bootstrap, seed)
    result = fit(
        law,
        Points(columns, response, names),
        objective=Objective("least_squares"),
        num_bootstrap=num_bootstrap,
        resampling="auto",
        confidence=confidence,
        seed=seed,
        draws=draws,
    )
    said = [f"{name} ({warning})" for name, optimum in zip(names, found, strict=True) for warning in optimum.warnings]
    refused = [f"no_optimum: {', '.join(f'{v:g}' for v in key)} ({why})" for key, why in optima.refused.items()]
    noted = [f"uncertain_optimum: {text}" for text in said]
    return dataclasses.replace(result, warnings=(*result.warnings, *refused, *noted))


def _draws(samples: Sequence[Array], best: Array, column: int, num_bootstrap: int, seed: int) -> Array | None:
    """Return draws (num_bootstrap, groups) of the optima; a group without any stays at its estimate."""
    if not num_bootstrap:
        return None
    rng = np.random.default_rng([seed, 1])
    return np.stack(
        [
            np.exp(rng.choice(drawn[:, column], num_bootstrap)) if len(drawn) else np.full(num_bootstrap, value)
            for drawn, value in zip(samples, best, strict=True)
        ],
        axis=1,
    )
