"""Learning rate against batch, the largest stable rate, and the critical batch.

    lr*(B) = c B                          linear, SGD below the critical batch
    lr*(B) = c sqrt(B)                    square root, Adam
    lr*(B) = c B^a                        any power; also of the largest stable rate
    lr*(B) = lr_max (1 + B_noise/B)^-a    saturating around the noise scale: a = 1 for SGD, about 1/2 for Adam
    lr*(B) = 2 lr_max / (sqrt(B_noise/B) + sqrt(B/B_noise))   sign descent: falls again beyond the noise scale

    S(B) = S_min + E_min / B              updates to reach a loss
    B_crit(D) = c D^k                     critical batch over training tokens

The updates say the same as (S/S_min - 1) (E/E_min - 1) = 1 with E = B S. At the critical batch, B_crit = E_min / S_min,
a run costs twice the fewest updates and twice the fewest examples.

The critical batch over the loss is :data:`landscape_ray.laws.scaling.kaplan.CRITICAL_BATCH`.

Legend: lr* best peak learning rate at the batch B, B_noise gradient noise scale, S updates, E examples (tokens), D
training tokens.

References:
    McCandlish et al. 2018, arXiv 1812.06162 (trade-off, saturating form, noise scale); Granziol, Zohren and
    Roberts 2020, arXiv 2006.09092 (linear for SGD, square root for Adam, largest rates); Li et al. 2024, arXiv
    2405.14578 (the form that falls again); Zhang et al. 2024, arXiv 2410.21676 (critical batch over tokens).
"""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws.core.fit import fit
from landscape_ray.laws.core.law import Law, Variable, linear, nonlinear
from landscape_ray.laws.core.objective import Objective
from landscape_ray.laws.core.points import Points
from landscape_ray.laws.core.result import FitResult

Array: TypeAlias = NDArray[np.float64]

BATCH = Variable("batch", "tokens", "batch", min_distinct=2)
BATCHES = Variable("batch", "tokens", "batch", min_distinct=3)
BEST_LR = Variable("lr", "", "peak learning rate")
STEPS = Variable("steps", "updates", "updates to reach the loss")
CRITICAL = Variable("batch_critical", "tokens", "critical batch")
TOKENS = Variable("D", "tokens", "number of training tokens", min_distinct=2)

_ONE_TASK = ("model, data and horizon are the same at all batches",)

LR_BATCH_LINEAR = Law(
    name="lr_batch_linear",
    title="best learning rate over the batch, SGD",
    formula="lr* = c B",
    reference="Granziol et al. 2020, arXiv 2006.09092",
    variables=(BATCH,),
    response=BEST_LR,
    parameters=(linear("c", "learning rate by batch"),),
    columns=lambda x, p: (x["batch"],),
    assumptions=(*_ONE_TASK, "all batches are below the critical one"),
)

LR_BATCH_SQRT = Law(
    name="lr_batch_sqrt",
    title="best learning rate over the batch, Adam",
    formula="lr* = c sqrt(B)",
    reference="Granziol et al. 2020, arXiv 2006.09092",
    variables=(BATCH,),
    response=BEST_LR,
    parameters=(linear("c", "learning rate by root of the batch"),),
    columns=lambda x, p: (np.sqrt(x["batch"]),),
    assumptions=(*_ONE_TASK, "all batches are below the critical one"),
)

LR_BATCH_POWER = Law(
    name="lr_batch_power",
    title="best or largest stable learning rate over the batch",
    formula="lr = c B^a",
    reference="Granziol et al. 2020, arXiv 2006.09092",
    variables=(BATCH,),
    response=BEST_LR,
    parameters=(linear("c", "factor"), nonlinear("a", "exponent of the batch", -2.0, 3.0, starts=(0.0, 0.5, 1.0))),
    columns=lambda x, p: (np.exp(p["a"] * np.log(x["batch"])),),
    slopes=lambda x, p: ({"a": np.log(x["batch"]) * np.exp(p["a"] * np.log(x["batch"]))},),
    assumptions=_ONE_TASK,
)

LR_BATCH_SATURATING = Law(
    name="lr_batch_saturating",
    title="best learning rate over the batch, saturating at the noise scale",
    formula="lr* = lr_max (1 + B_noise/B)^-a",
    reference="McCandlish et al. 2018, arXiv 1812.06162",
    variables=(BATCHES,),
    response=BEST_LR,
    parameters=(
        linear("lr_max", "best learning rate at an endless batch"),
        nonlinear("B_noise", "batch at which noise and curvature matter alike", 1e-2, 1e12, log=True, starts=14),
        nonlinear("a", "1 for SGD, about 1/2 for Adam", 0.1, 2.0, starts=(0.5, 1.0)),
    ),
    columns=lambda x, p: ((1 + p["B_noise"] / x["batch"]) ** -p["a"],),
    assumptions=_ONE_TASK,
)

LR_BATCH_SURGE = Law(
    name="lr_batch_surge",
    title="best learning rate over the batch, falling again beyond the noise scale",
    formula="lr* = 2 lr_max / (sqrt(B_noise/B) + sqrt(B/B_noise))",
    reference="Li et al. 2024, arXiv 2405.14578",
    variables=(BATCHES,),
    response=BEST_LR,
    parameters=(
        linear("lr_max", "best learning rate at the noise scale"),
        nonlinear("B_noise", "batch with the largest best learning rate", 1e-2, 1e12, log=True, starts=14),
    ),
    columns=lambda x, p: (2 / ((p["B_noise"] / x["batch"]) ** 0.5 + (x["batch"] / p["B_noise"]) ** 0.5),),
    assumptions=_ONE_TASK,
)

STEPS_BATCH = Law(
    name="steps_batch",
    title="updates to reach a loss over the batch",
    formula="S = S_min + E_min / B",
    reference="McCandlish et al. 2018, arXiv 1812.06162",
    variables=(BATCHES,),
    response=STEPS,
    parameters=(linear("S_min", "fewest updates"), linear("E_min", "fewest examples")),
    columns=lambda x, p: (1.0, 1 / x["batch"]),
    assumptions=("one loss is reached by all runs", "the learning rate is the best one at every batch"),
)

CRITICAL_BATCH_TOKENS = Law(
    name="critical_batch_tokens",
    title="critical batch over training tokens",
    formula="B_crit = c D^k",
    reference="Zhang et al. 2024, arXiv 2410.21676",
    variables=(TOKENS,),
    response=CRITICAL,
    parameters=(linear("c", "factor"), nonlinear("k", "exponent of the tokens", -1.0, 2.0, starts=(0.0, 0.5))),
    columns=lambda x, p: (np.exp(p["k"] * np.log(x["D"])),),
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class CriticalBatch:
    """The trade-off between updates and examples at one loss.

    Attributes:
        fit: of S = S_min + E_min / B.
        value: B_crit = E_min / S_min, in the unit of the batch.
        interval: (low, high) of it, at the level of the fit; None without a bootstrap.
        warnings: of the fit, and whether the batches lie on both sides of it.
    """

    fit: FitResult
    value: float
    interval: tuple[float, float] | None
    warnings: tuple[str, ...]


def fit_critical_batch(
    batch: ArrayLike, steps: ArrayLike, *, num_bootstrap: int = 200, confidence: float = 0.9, seed: int = 0
) -> CriticalBatch:
    """Return the critical batch from the updates that runs of different batches took to reach one loss.

    Args:
        batch: (n,) batches, at least three different ones.
        steps: (n,) updates to reach the loss, see :func:`steps_to_loss`.
        num_bootstrap: number of bootstrap samples, 0 for none.
        confidence: level of the intervals, in (0, 1).
        seed: of the bootstrap.

    Raises:
        UserError: see :func:`landscape_ray.laws.core.fit.fit`; or the updates do not fall to a limit that the data see.

    >>> batch = np.array([1e3, 4e3, 16e3, 64e3, 256e3])
    >>> round(fit_critical_batch(batch, 500 * (1 + 2e4 / batch), num_bootstrap=0).value, 3)
    20000.0
    """
    result = fit(
        STEPS_BATCH,
        Points({"batch": batch}, steps),
        objective=Objective("least_squares"),
        num_bootstrap=num_bootstrap,
        confidence=confidence,
        seed=seed,
    )
    fewest, cheapest = result.parameters["S_min"], result.parameters["E_min"]
    none = [name for name in ("S_min", "E_min") if name in result.certificate["bounds_hit"]]
    if none:
        more = "larger" if none == ["S_min"] else "smaller"
        raise UserError(
            f"steps must show both limits, got {none[0]} 0: all batches are on one side of the critical one; add "
            f"{more} ones"
        )
    interval = None
    if len(result.samples):
        drawn = {name: result.samples[:, i] for i, name in enumerate(result.sample_names)}
        tail = (1 - confidence) / 2
        with np.errstate(divide="ignore"):
            low, high = np.quantile(drawn["E_min"] / drawn["S_min"], [tail, 1 - tail])
        interval = (float(low), float(high))
    critical, tried = cheapest / fewest, np.asarray(batch, dtype=np.float64)
    outside = []
    if not tried.min() < critical < tried.max():
        outside.append(
            f"one_sided: the critical batch {critical:.4g} is outside what was tried, "
            f"[{tried.min():g}, {tried.max():g}]"
        )
    return CriticalBatch(fit=result, value=critical, interval=interval, warnings=(*result.warnings, *outside))


def steps_to_loss(step: ArrayLike, loss: ArrayLike, target: float) -> float:
    """Return the update at which a loss curve first falls to a target, linearly between its points; nan if never.

    Args:
        step: (k,) rising.
        loss: (k,).
        target: the loss to be reached.

    >>> steps_to_loss([0, 100, 200], [4.0, 3.0, 2.5], 2.75)
    150.0
    """
    steps, losses = (np.asarray(values, dtype=np.float64) for values in (step, loss))
    if steps.shape != losses.shape or steps.ndim != 1 or not (np.diff(steps) > 0).all():
        raise UserError(f"step must rise and have the shape of loss {losses.shape}, got {steps.shape}; sort the curve")
    reached = np.flatnonzero(losses <= target)
    if not len(reached):
        return float("nan")
    i = int(reached[0])
    if i == 0:
        return float(steps[0])
    share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class StableEdge:
    """Between which learning rates training becomes unstable, by batch.

    Attributes:
        batch: (b,) ascending.
        stable: (b,) largest rate up to which all runs were stable.
        unstable: (b,) the next rate tried, where one was not; inf where all were stable.
    """

    batch: Array
    stable: Array
    unstable: Array


def stable_edge(lr: ArrayLike, batch: ArrayLike, loss: ArrayLike, *, limit: float) -> StableEdge:
    """Return the largest stable learning rate of every batch.

    Args:
        lr: (n,) peak learning rates, > 0.
        batch: (n,) batches, > 0.
        loss: (n,) final losses; nan or inf for runs that diverged.
        limit: a run with a loss above this was unstable, for instance the loss at initialisation.

    Raises:
        UserError: shapes differ, something is not > 0, or the smallest rate of a batch is unstable already.

    >>> edge = stable_edge([0.1, 0.2, 0.4] * 2, [32] * 3 + [64] * 3, [2, np.nan, np.inf, 2, 2, 9], limit=5)
    >>> edge.stable.tolist(), edge.unstable.tolist()
    ([0.1, 0.2], [0.2, 0.4])
    """
    rates, batches, losses = (np.asarray(values, dtype=np.float64) for values in (lr, batch, loss))
    if not rates.shape == batches.shape == losses.shape or rates.ndim != 1:
        raise UserError(
            f"lr, batch and loss must have one shape (n,), got {rates.shape}, {batches.shape}, {losses.shape}"
        )
    if not ((rates > 0).all() and (batches > 0).all()):
        raise UserError("lr and batch must be > 0 in every run, got one that is not; drop it")
    fine = np.isfinite(losses) & (losses <= limit)
    edges = []
    for value in np.unique(batches):
        rows = batches == value
        tried = np.unique(rates[rows])
        good = [bool(fine[rows & (rates == rate)].all()) for rate in tried]
        first = good.index(False) if not all(good) else len(tried)
        if first == 0:
            raise UserError(
                f"lr must be stable somewhere at batch {value:g}, got none from {tried[0]:g} on; try lower ones"
            )
        edges.append((value, tried[first - 1], tried[first] if first < len(tried) else np.inf))
    columns = np.array(edges).T
    return StableEdge(batch=columns[0], stable=columns[1], unstable=columns[2])


def fit_largest_stable_lr(
    edge: StableEdge, *, num_bootstrap: int = 200, confidence: float = 0.9, seed: int = 0
) -> FitResult:
    """Return the largest stable learning rate over the batch as c B^a: a is 1 for SGD, 1/2 for Adam.

    The edge is somewhere between the last stable and the first unstable rate: it is put in the geometric middle, and
    every bootstrap sample draws it evenly by logarithm in between. Batches at which nothing was unstable are left out.

    Args:
        edge: see :func:`stable_edge`.
        num_bootstrap: number of bootstrap samples, 0 for none.
        confidence: level of the intervals, in (0, 1).
        seed: of the bootstrap.

    Raises:
        UserError: fewer than three batches became unstable, or see :func:`landscape_ray.laws.core.fit.fit`.

    >>> batch = 2.0 ** np.arange(4, 9)
    >>> edge = StableEdge(batch=batch, stable=0.1 * batch, unstable=0.2 * batch)
    >>> round(fit_largest_stable_lr(edge, num_bootstrap=0).parameters["a"], 6)
    1.0
    """
    bounded = np.isfinite(edge.unstable)
    if bounded.sum() < 3:
        raise UserError(
            f"edge must be bounded at three batches at least, got {bounded.sum()}; try higher learning rates"
        )
    low, high = np.log(edge.stable[bounded]), np.log(edge.unstable[bounded])
    rng = np.random.default_rng([seed, 2])
    draws = np.exp(low + (high - low) * rng.uniform(size=(num_bootstrap, len(low)))) if num_bootstrap else None
    result = fit(
        LR_BATCH_POWER,
        Points({"batch": edge.batch[bounded]}, np.exp((low + high) / 2)),
        objective=Objective("least_squares"),
        num_bootstrap=num_bootstrap,
        confidence=confidence,
        seed=seed,
        draws=draws,
    )
    left_out = [f"unbounded: nothing was unstable at batch {value:g}" for value in edge.batch[~bounded]]
    return dataclasses.replace(result, warnings=(*result.warnings, *left_out))
