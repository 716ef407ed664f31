"""The step law on a table of runs: its fit, held against groups it has not seen, and the choice for a new run.

Legend: N parameters, D training tokens, lr peak learning rate, batch in the unit of D. A group is all runs of one N and
D. What a fit of it is saved as is a :class:`landscape_ray.analysis.scaling.ScalingFit`, like that of any law.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.analysis.scaling import ScalingFit
from landscape_ray.analysis.step_evidence import gather
from landscape_ray.analysis.table import RunTable, complete_compute
from landscape_ray.errors import UserError
from landscape_ray.laws import (
    Excess,
    FlatRegion,
    Objective,
    Points,
    Recommendation,
    StepLaw,
    Sweep,
    excess,
    fit_step_law,
    flat_region,
)
from landscape_ray.laws.optima.step_law import batch_varies
from landscape_ray.laws.optima.surface import LEVELLED
from landscape_ray.laws.optima.surface import NAME as STEP_LAW
from landscape_ray.laws.trust.checklist import Evidence, Item, checklist, to_plain
from landscape_ray.laws.trust.comparison import objective_table, residual_trends, seed_noise
from landscape_ray.laws.trust.holdout import leave_groups_out

Array: TypeAlias = NDArray[np.float64]

ONE_HORIZON = 0.01
"""Horizons of one size closer than this, relative, are one: tokens come in whole batches."""

MAX_RUNS_LEFT_OUT = 200
"""Runs near the optimum up to which each is left out in turn."""

ALIKE = ("schedule.peak_lr", "schedule.warmup_steps", "batch_size", "num_steps", "seed")
"""What may differ between the runs of a step law, beside the model and what does not change training."""

NOT_TRAINING = ("model.", "eval.", "probes.", "device", "compile")


def sweep_of(table: RunTable) -> tuple[Sweep, dict[str, str], list[Item], float | None]:
    """Return the runs of a table, those left out with the reason, what was found, and the tokens of an example.

    The batch is the column `batch`, in the unit of D; or `batch_size`, in examples, times what D over all examples says
    that an example has. It is left out where it never differs at one N and D.

    Raises:
        UserError: no learning rate or loss, a batch whose unit is not known, or see
            :class:`landscape_ray.laws.Sweep`.
    """
    columns = {name: np.array(table.column(name, STEP_LAW)) for name in ("lr", "loss")}
    columns |= {name: np.array(table.columns[name]) for name in ("N", "D") if name in table.columns}
    per_example, items = _add_batch(table, columns)
    good = np.all([np.isfinite(values) & (values > 0) for values in columns.values()], axis=0)
    dropped = {
        run: f"{next(n for n, v in columns.items() if not (np.isfinite(v[i]) and v[i] > 0))} is missing or not > 0"
        for i, run in enumerate(table.run_ids)
        if not good[i]
    }
    if not good.any():
        raise UserError(f"no run has all of {', '.join(columns)} > 0; look at the columns that were mapped")
    kept = {name: values[good] for name, values in columns.items()}
    for name in ("N", "D"):
        if name not in kept:
            remark = f"all runs are taken to have one {name}; give the column if they do not"
            items.append(Item("B", f"no column {name}", "unknown", "warning", remark))
    if "D" in kept:
        kept["D"], apart = _joined(kept.get("N", np.ones(len(kept["D"]))), kept["D"])
        if apart:
            items.append(Item("C", "horizons joined", f"tokens up to {apart:.2%} apart count as one horizon"))
    if "steps" in table.columns and np.isfinite(table.columns["steps"][good]).all():
        kept["steps"] = table.columns["steps"][good]
    sweep = Sweep(**kept, run_ids=[run for run, fine in zip(table.run_ids, good, strict=True) if fine])
    if sweep.batch is not None and not batch_varies(sweep):
        sweep = dataclasses.replace(sweep, batch=None)
        remark = (
            "the batch does not have three values at one N and D: the learning rate is the best for the batches that "
            "were used; to learn the batch, sweep it at an equal number of tokens"
        )
        items.append(Item("B", "batch not swept", _range(kept["batch"]), "warning", remark))
    others = [n for n in table.varied if n not in ALIKE and not n.startswith(NOT_TRAINING)]
    if others:
        remark = f"the law takes runs as alike that also differ in {', '.join(others)}: fit runs that do not"
        items.append(Item("B", "runs differ in more", ", ".join(others), "warning", remark))
    return sweep, dropped, items, per_example


def fit_step_table(
    table: RunTable,
    *,
    fix: Mapping[str, float] | None = None,
    num_bootstrap: int = 400,
    confidence: float = 0.9,
    seed: int = 0,
    command: str = "",
    progress: Callable[[str], None] | None = None,
) -> ScalingFit:
    """Return the step law of a table, held against the groups and sizes that a fit has not seen.

    Args:
        table: the runs.
        fix: r = 0 for a best batch that does not depend on the size; nothing else can be given.
        num_bootstrap: bootstrap samples, 0 for none.
        confidence: level of the intervals, in (0, 1).
        seed: of the bootstrap.
        command: what fits it again, for the record.
        progress: called with what is being done.

    Raises:
        UserError: see :func:`sweep_of` and :func:`landscape_ray.laws.fit_step_law`.
    """
    if any((name, value) != ("r", 0.0) for name, value in (fix or {}).items()):
        raise UserError(
            f"--fix must be r=0 for law '{STEP_LAW}' (a best batch that does not depend on N), got "
            f"{', '.join(f'{name}={value:g}' for name, value in (fix or {}).items())}; leave it out"
        )
    say = progress or (lambda news: None)
    sweep, dropped, items, per_example = sweep_of(table)
    by_size = "r" not in (fix or {})
    say(f"{STEP_LAW}: search and {num_bootstrap} bootstrap samples")
    law = fit_step_law(sweep, batch_by_size=by_size, num_bootstrap=num_bootstrap, confidence=confidence, seed=seed)
    say("fits without each group and each size")
    seen = gather(sweep, law, batch_by_size=by_size)
    kept = sweep.take(sweep.excess <= law.fit.data["window"])
    columns = {"N": kept.sizes, "D": kept.horizons, "lr": np.asarray(kept.lr)}
    if law.batch is not None:
        columns["batch"] = np.asarray(kept.batch)
    points = Points(columns, kept.loss, kept.run_ids)
    say("other objectives")
    surface, least = law.law, Objective("least_squares")
    predicted = np.asarray(surface.predict(points.variables, law.fit.parameters))
    trends = residual_trends(surface, points, np.log(np.asarray(kept.loss) / predicted))
    evidence = Evidence(
        runs_out=leave_groups_out(surface, points, objective=least) if len(kept) <= MAX_RUNS_LEFT_OUT else None,
        sizes_out=seen.by_size,
        objectives=_without_floors(objective_table(surface, points)),
        trends={name: trend for name, trend in trends.items() if not set(name.split("/")) & set(LEVELLED)},
        noise=seed_noise(surface, points),
    )
    facts = [*table.facts, *items, _window_item(law), Item("F", "refit", command or "see fit.json and table.csv")]
    record = [item for item in checklist(surface, law.fit, evidence, facts) if item.name not in _REPLACED]
    record = sorted([*record, *seen.items], key=lambda item: item.section)
    data = law.fit.data | {"regret": seen.regrets, "tokens_per_example": per_example}
    if law.batch is None and "batch" in table.columns:
        data["batch_used"] = sorted({float(b) for b in table.columns["batch"] if np.isfinite(b)})
    found = dataclasses.replace(law.fit, data=data, checklist=to_plain(record))
    return ScalingFit(
        law_path=STEP_LAW,
        fit=found,
        source=table.source,
        excluded={**table.dropped, **dropped},
        rollouts=seen.sentences,
        run_ids=tuple(points.run_of or ()),
        points={name: np.asarray(values).tolist() for name, values in points.variables.items()}
        | {"loss": np.asarray(points.response).tolist()},
        predicted=predicted.tolist(),
        command=command,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Learning rate and batch for a run, and what is known about that choice.

    Attributes:
        N: parameters.
        D: training tokens.
        choice: learning rate and batch, with intervals and expected regret.
        region: what costs less than a tenth of a per cent.
        given_cost: what a batch that was given costs, with its best learning rate; None for the best batch.
        confidence: level of the intervals.
        held_out: mean regret of the law in groups that it was not fitted to; None where there is one group only.
        batch: the batch to use: that of the choice, or the one that all runs had; None where neither is known.
        tokens_per_example: None where the table does not tell.
        warnings: "name: sentence".
    """

    N: float
    D: float
    choice: Recommendation
    region: FlatRegion
    given_cost: Excess | None
    confidence: float
    held_out: float | None
    batch: float | None
    tokens_per_example: float | None
    warnings: tuple[str, ...]

    @property
    def batch_size(self) -> int | None:
        """The batch in examples."""
        if self.batch is None or self.tokens_per_example is None:
            return None
        return max(1, round(self.batch / self.tokens_per_example))

    @property
    def num_steps(self) -> int | None:
        """Updates that train on D tokens."""
        if self.batch is None or self.D == 1:
            return None
        size = self.batch_size
        return max(1, round(self.D / (self.batch if size is None else size * (self.tokens_per_example or 1.0))))


def plan(found: ScalingFit, values: Mapping[str, float], *, allow_extrapolation: bool = False) -> Plan:
    """Return which learning rate and batch to train with.

    Args:
        found: a fit of the step law.
        values: N and D, or C and one of them; those that all fitted runs share may be left out. A `batch` that is given
            gets the learning rate that is best for it.
        allow_extrapolation: also far outside the fitted range.

    Raises:
        UserError: another law, a value that is missing or not known, or see
            :meth:`landscape_ray.laws.StepLaw.recommend`.
    """
    law = _law(found)
    at = _place(law, values)
    choice = law.recommend(at["N"], at["D"], batch=at.get("batch"), allow_extrapolation=allow_extrapolation)
    data, warnings = found.fit.data, list(choice.warnings)
    if not len(found.fit.samples):
        warnings.append("no_bootstrap: there are no intervals, and the regret leaves out what the law leaves open")
    used = data.get("batch_used", [])
    if choice.batch is None and len(used) > 1:
        warnings.append(
            f"batch_not_swept: the learning rate is the best for the batches of the runs, {used[0]:g} to {used[-1]:g}"
        )
    given_cost = None
    if "batch" in at:
        given_cost = excess(law, at["N"], at["D"], choice.lr, at["batch"], allow_extrapolation=allow_extrapolation)
        away = math.log(choice.lr / law.lr(at["N"], at["D"]))
        if given_cost.beyond or not data["offsets"]["u"][0] <= away <= data["offsets"]["u"][1]:
            warnings.append(
                f"far_batch: batch {at['batch']:g} is farther from the best one than the runs that were fitted; the "
                "learning rate for it is a guess"
            )
    regrets = data["regret"]["left_out"]
    return Plan(
        N=at["N"],
        D=at["D"],
        choice=choice,
        region=flat_region(law, at["N"], at["D"]),
        given_cost=given_cost,
        confidence=found.fit.confidence,
        held_out=float(np.mean(regrets)) if regrets else None,
        batch=choice.batch if choice.batch is not None else used[0] if len(used) == 1 else None,
        tokens_per_example=data["tokens_per_example"],
        warnings=tuple(warnings),
    )


def cost(found: ScalingFit, values: Mapping[str, float], *, allow_extrapolation: bool = False) -> Excess:
    """Return what the learning rate (and the batch) of `values` cost beside the best ones, see :func:`plan`.

    Raises:
        UserError: see :func:`plan` and :func:`landscape_ray.laws.excess`.
    """
    law = _law(found)
    at = _place(law, values)
    if "lr" not in at:
        raise UserError("--set must give lr to say what it costs; for instance --set lr=1e-3")
    return excess(law, at["N"], at["D"], at["lr"], at.get("batch"), allow_extrapolation=allow_extrapolation)


def _law(found: ScalingFit) -> StepLaw:
    if found.law_path != STEP_LAW:
        raise UserError(
            f"fit must be of law '{STEP_LAW}' for a learning rate, got '{found.law_path}'; fit the table with "
            f"--law {STEP_LAW}"
        )
    return StepLaw(found.fit)


def _place(law: StepLaw, values: Mapping[str, float]) -> dict[str, float]:
    """Return N and D, and what else was given."""
    unknown = [name for name in values if name not in ("N", "D", "C", "lr", "batch")]
    if unknown:
        raise UserError(f"--set must name N, D, C, lr or batch, got '{unknown[0]}'; law '{STEP_LAW}' has no other")
    columns = {name: np.array([value]) for name, value in values.items()}
    complete_compute(columns)
    at = {name: float(value[0]) for name, value in columns.items()}
    for name, fitted in zip(("N", "D"), zip(*law.groups, strict=True), strict=True):
        if name not in at:
            if len(set(fitted)) > 1:
                raise UserError(
                    f"--set must give {name} ({'parameters' if name == 'N' else 'training tokens'}), which the best "
                    f"learning rate depends on; the fitted runs have {min(fitted):.4g} to {max(fitted):.4g}"
                )
            at[name] = fitted[0]
    return at


_REPLACED = ("held out", "candidate laws compared", "stability without one run", "error on runs left out")


def _without_floors(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the parameters under each objective without the levels of the groups, which decide nothing."""
    return {name: {k: v for k, v in row.items() if not k.startswith("floor")} for name, row in rows.items()}


def _window_item(law: StepLaw) -> Item:
    data = law.fit.data
    return Item(
        "C",
        "near the optimum",
        f"{data['num_points']} runs within {data['window']:.1%} of the best of their group; {data['num_left_out']} "
        "worse ones do not shape the law",
    )


def _add_batch(table: RunTable, columns: dict[str, Array]) -> tuple[float | None, list[Item]]:
    """Add the batch to the columns, in the unit of D; return the tokens of an example, and what was found."""
    there = table.columns
    batch, size, steps = (there.get(name) for name in ("batch", "batch_size", "steps"))
    if batch is None and size is None:
        remark = "the learning rate is the best for whatever batch the runs had; map it with --column batch=NAME*FACTOR"
        return None, [Item("B", "batch", "unknown", "warning", remark)]
    if batch is None:
        assert size is not None
        if steps is None or "D" not in columns:
            raise UserError(
                "batch must be known in tokens, got batch_size alone; map the updates too (--column steps=NAME), or "
                "--column batch=NAME*CONTEXT_LENGTH"
            )
        per = _whole(columns["D"] / (steps * size))
        columns["batch"] = size * (math.nan if per is None else per)
        return per, [Item("B", "batch unit", f"batch_size times {per or math.nan:g}, from D over all examples")]
    columns["batch"] = np.array(batch)
    per_example = None if size is None else _whole(batch / size)
    if steps is None:
        remark = "taken to be in the unit of D: without a column of updates (steps) that cannot be checked"
        return per_example, [Item("B", "batch unit", "unknown", "unknown", remark)]
    return per_example, [Item("B", "batch unit", "that of D: batch times updates is D")]


def _whole(ratios: Array) -> float | None:
    """Return the median of ratios, a whole number where it is near one."""
    known = ratios[np.isfinite(ratios)]
    if not len(known):
        return None
    middle = float(np.median(known))
    return float(round(middle)) if middle >= 1 and abs(middle / round(middle) - 1) < ONE_HORIZON else middle


def _joined(size: Array, horizon: Array) -> tuple[Array, float]:
    """Return the horizons (n,) with near ones of a size made equal, and how far apart these were at most."""
    found, apart = horizon.copy(), 0.0
    for n in np.unique(size):
        rows = np.flatnonzero(size == n)
        first = -math.inf
        for i in rows[np.argsort(horizon[rows], kind="stable")]:
            if horizon[i] > (1 + ONE_HORIZON) * first:
                first = float(horizon[i])
            apart = max(apart, float(horizon[i] / first - 1))
            found[i] = first
    return found, apart


def _range(values: Array) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
