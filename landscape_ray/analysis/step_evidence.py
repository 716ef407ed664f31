"""What a step law costs where it was not fitted: on groups and sizes left out, beyond the range, beside other rules."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws import Regret, StepLaw, Sweep, fit_step_law, leave_one_group_out, regret
from landscape_ray.laws.optima.regret import Rule
from landscape_ray.laws.optima.step_law import MIN_GROUPS
from landscape_ray.laws.optima.surface import centre
from landscape_ray.laws.trust.checklist import Item
from landscape_ray.laws.trust.holdout import Stability

Array: TypeAlias = NDArray[np.float64]

PUBLISHED_FROM = (1e7, 1e9)
"""Parameters and tokens from which on runs are compared with the published constants, which are of larger ones."""

HELD_BACK = 0.25
"""Share of the largest sizes, and of the longest horizons, that a fit to the others is asked about."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class StepEvidence:
    """What was found.

    Attributes:
        sentences: regret on what a fit has not seen, as a person reads it.
        items: the same and more for the record.
        regrets: by group, for figures: "groups", "fitted", "left_out" (empty for one group), "middle" (the optimum of
            the middle taken everywhere), "published" (empty where the runs are far from the published ones).
        by_size: the exponents of the fits without each size; None for one size.
    """

    sentences: tuple[str, ...]
    items: tuple[Item, ...]
    regrets: dict[str, Any]
    by_size: Stability | None


def published(N: float, D: float) -> tuple[float, float]:
    """Return learning rate and batch in tokens by the constants of Li et al. 2025, arXiv 2503.04715."""
    return 1.79 * N**-0.713 * D**0.307, 0.58 * D**0.571


def gather(sweep: Sweep, law: StepLaw, *, batch_by_size: bool = True) -> StepEvidence:
    """Return what a step law costs on runs that it was not fitted to.

    Args:
        sweep: all runs, those far from the optimum too.
        law: fitted to it.
        batch_by_size: as it was fitted.
    """
    groups = list(law.groups)
    sizes = sorted({n for n, _ in groups})
    fitted = law.regret(sweep)
    regrets: dict[str, Any] = {"groups": [list(g) for g in groups], "fitted": fitted.relative.tolist()}
    regrets |= {"left_out": [], "middle": [], "published": []}
    items = [Item("E", "regret on the fitted runs", str(fitted))]
    sentences = []
    by_size = None

    def fitter(made: list[StepLaw], with_size: bool = batch_by_size) -> Callable[[Sweep], Rule]:
        def one(runs: Sweep) -> Rule:
            made.append(fit_step_law(runs, batch_by_size=with_size, num_bootstrap=0))
            return made[-1].rule

        return one

    def held_out(what: str, of: Callable[[], Regret]) -> Regret | None:
        try:
            found = of()
        except UserError as error:
            items.append(Item("E", f"held out: {what}", "not possible", "warning", str(error)))
            return None
        items.append(Item("E", f"held out: {what}", str(found)))
        sentences.append(f"{what}: {found}")
        return found

    found = None
    if len(groups) > 1:
        found = held_out("each pair of N and D", lambda: leave_one_group_out(sweep, fitter([])))
        if found is not None:
            order = {pair: i for i, pair in enumerate(found.groups)}
            regrets["left_out"] = [float(found.relative[order[pair]]) for pair in groups]
    if 1 < len(sizes) < len(groups):
        laws: list[StepLaw] = []
        if held_out("each N", lambda: leave_one_group_out(sweep, fitter(laws), by="size")) is not None:
            by_size = _stability(law, laws, sorted(sizes, key=lambda n: str((n, None))))
    for name, values in (("N", sweep.sizes), ("D", sweep.horizons)):
        distinct = np.unique(values)
        if len(distinct) >= 4:
            above = float(distinct[-1 - max(1, round(HELD_BACK * len(distinct)))])
            rest, more = sweep.take(values <= above), sweep.take(values > above)
            factor = float(distinct[-1]) / above
            what = f"{name} up to {factor:.3g} times the fitted range"
            held_out(what, functools.partial(_beyond, rest, more, fitter([])))
    if not sentences:
        remark = "all runs have one N and D: how the optimum changes with them is not known"
        items.append(Item("E", "held out", "nothing", "warning", remark))
    else:
        middle = law.rule(*centre(groups))
        other = regret(sweep, lambda N, D: middle)
        regrets["middle"] = other.relative.tolist()
        items.append(Item("E", "regret of one learning rate and batch for all groups", str(other)))
    if law.batch is not None and all(n >= PUBLISHED_FROM[0] and d >= PUBLISHED_FROM[1] for n, d in groups):
        theirs = regret(sweep, published)
        regrets["published"] = theirs.relative.tolist()
        items.append(Item("E", "regret of the published constants (Li et al. 2025)", str(theirs)))
    if law.batch is not None and batch_by_size and len(sizes) > 1 and len(groups) >= MIN_GROUPS:
        items.append(_candidate(found, lambda: leave_one_group_out(sweep, fitter([], False))))
    else:
        items.append(Item("A", "candidate laws compared", "none"))
    return StepEvidence(sentences=tuple(sentences), items=tuple(items), regrets=regrets, by_size=by_size)


def _beyond(rest: Sweep, more: Sweep, fitter: Callable[[Sweep], Rule]) -> Regret:
    return regret(more, fitter(rest))


def _candidate(mine: Regret | None, other: Callable[[], Regret]) -> Item:
    """Return how the published form, whose best batch does not depend on N, does on groups left out."""
    try:
        theirs = other()
    except UserError as error:
        return Item("A", "candidate laws compared", f"a batch that does not depend on N cannot be fitted: {error}")
    beaten = mine is not None and theirs.mean < mine.mean
    return Item(
        "A",
        "candidate laws compared",
        f"on groups left out, this form: {mine}; a batch that does not depend on N (--fix r=0): {theirs}",
        "warning" if beaten else "ok",
        "the form with --fix r=0 has less regret: fit that one" if beaten else "",
    )


def _stability(law: StepLaw, without: list[StepLaw], sizes: list[float]) -> Stability | None:
    """Return the exponents of the fits without each size; None where one of these cannot tell them."""
    names = [name for name in ("p", "q", "r", "s") if name in law.fit.parameters]
    if not names or any(name not in one.fit.parameters for name in names for one in without):
        return None
    return Stability(
        groups=tuple(f"N {n:g}" for n in sizes),
        parameters={name: np.array([one.fit.parameters[name] for one in without]) for name in names},
        best={name: law.fit.parameters[name] for name in names},
        errors=np.zeros(0),
    )
