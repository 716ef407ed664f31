"""What to do with the result: the configuration to use, how sure it is, and what to try next."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from landscape_ray import text
from landscape_ray.analysis.forecast import recommended_schedule
from landscape_ray.analysis.importance import importances
from landscape_ray.analysis.runs import Run
from landscape_ray.errors import UserError
from landscape_ray.laws import BestSchedule
from landscape_ray.reports.markup import prose
from landscape_ray.reports.population import baseline, schedule_toml, survivors
from landscape_ray.reports.views import Sweep, best_overall, edge_of_search, label, loss_unit, no_best


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recommendation:
    """What to do.

    Attributes:
        use: which run's configuration to use.
        toml: its searched values, as lines of a sweep file.
        caution: how far that can be trusted.
        further: what to try next.
        schedule: what the law considers best, and its TOML; empty where no law says anything.
    """

    use: str
    toml: str
    caution: tuple[str, ...] = ()
    further: tuple[str, ...] = ()
    schedule: tuple[str, str] = ("", "")


def recommend(sweeps: Sequence[Sweep]) -> Recommendation | str:
    """Return what to do with sweeps, or why that can't be said yet."""
    found = best_overall(sweeps)
    if found is None:
        return no_best(sweeps)
    sweep, run = found
    unit = loss_unit(sweeps)
    name = label(sweeps, sweep, run.run_id)
    return Recommendation(
        use=f"Train with the values of {name}, which reached {text.loss(run.loss)} {unit}.",
        toml=configuration(sweep, run),
        caution=tuple(_caution(sweeps, sweep, run)),
        further=tuple(_further(sweeps)),
        schedule=_by_law(sweeps),
    )


def recommendation(sweeps: Sequence[Sweep]) -> str:
    """Return the recommendation as HTML."""
    found = recommend(sweeps)
    if isinstance(found, str):
        return f'<p class="empty">{escape(found)}</p>'
    parts = [f"<p>{escape(found.use)}</p>", f'<pre class="wrap">{escape(found.toml)}</pre>']
    for head, sentences in (("How sure that is", found.caution), ("What to try next", found.further)):
        if sentences:
            items = "".join(f"<li>{prose(one)}</li>" for one in sentences)
            parts.append(f'<h3>{head}</h3><ul class="prose">{items}</ul>')
    sentence, toml = found.schedule
    if sentence:
        parts.append(f"<h3>What the law would choose</h3><p>{escape(sentence)}</p>")
    if toml:
        parts.append(
            f'<details><summary>That schedule as TOML</summary><pre class="wrap">{escape(toml)}</pre></details>'
        )
    return "".join(parts)


def configuration(sweep: Sweep, run: Run) -> str:
    """Return what a run differs from its sweep's [train] table in, as lines of a sweep file.

    For weights that were copied on the way, it is the schedule that they went through.
    """
    if run.mutated and sweep.population:
        winner = next(one for one in survivors(sweep) if one.run is run)
        if found := schedule_toml(winner):
            return found
    values = run.summary.varied or {f"schedule.{key}": run.schedule[key] for key in run.schedule}
    return "\n".join(["[train]", *(f"{name} = {_toml(value)}" for name, value in values.items() if value is not None)])


def _caution(sweeps: Sequence[Sweep], sweep: Sweep, best: Run) -> Iterator[str]:
    finished = sorted((one for each in sweeps for one in each.finished), key=lambda run: run.loss)
    if len(finished) > 1:
        second = finished[1]
        owner = next(each for each in sweeps if any(run is second for run in each.runs))
        yield (
            f"The next best, {label(sweeps, owner, second.run_id)}, is {text.loss(second.loss - best.loss)} behind. "
            "Each run was made once: repeat both with other seeds before this order counts for anything."
        )
    if not sweep.population and (edge := edge_of_search(sweep.finished)):
        yield edge
    for one in sweeps:
        beside = baseline(sweeps, one) if one.population and one.best is not None else None
        if beside is not None and beside.run is not None and one.best is not None:
            gap = one.best.loss - beside.run.loss
            word = "above" if gap > 0 else "below"
            yield (
                f"The population {one.name} ended {text.loss(abs(gap))} {word} the best run with a WSD schedule; it "
                f"trained {text.plural(len(one.runs), 'member')}, each for as many updates as that run."
            )


def _further(sweeps: Sequence[Sweep]) -> Iterator[str]:
    for sweep in sweeps:
        where = f" in {sweep.name}" if len(sweeps) > 1 else ""
        if not sweep.population:
            found = importances(sweep.runs)
            if mattered := [one.name for one in found if one.found]:
                rest = " or ".join(one.name for one in found if not one.found)
                fixed = f" That {rest} matters these runs do not show: fixing it saves trials." if rest else ""
                yield f"Spend further trials{where} on {text.listing(mattered)}, which the result depends on.{fixed}"
        gone = [run.peak_lr for run in sweep.runs if run.summary.status == "diverged" and run.peak_lr > 0]
        sound = [run.peak_lr for run in sweep.finished if run.peak_lr > 0]
        if gone and sound and min(gone) > max(sound):
            yield (
                f"Every run{where} with a peak LR of {text.lr(min(gone))} or more diverged: an upper end of the search "
                f"near {text.lr(max(sound))} saves these trials."
            )
        if any(run.summary.status in ("pending", "running", "failed") for run in sweep.runs):
            yield f"{sweep.name} has not ended: `landscape-ray resume {sweep.name}` goes on with it."
    searches = [sweep for sweep in sweeps if not sweep.population]
    if searches and not any(sweep.fit for sweep in searches) and all(len(s.finished) >= 3 for s in searches):
        yield (
            f"`landscape-ray fit {searches[0].name}` forecasts schedules that were not run, where three or more runs "
            "share one peak LR."
        )


def _by_law(sweeps: Sequence[Sweep]) -> tuple[str, str]:
    """Return what a fitted law considers best, in a sentence and as TOML."""
    for sweep in sweeps:
        if sweep.fit is None or sweep.fit.fit.status == "failed":
            continue
        try:
            best = recommended_schedule(sweep.fit, sweep.runs)
        except UserError as error:
            return f"The law of {sweep.name} recommends no schedule: {error}.", ""
        return _chosen(sweep, best), best.toml()
    return "", ""


def _chosen(sweep: Sweep, best: BestSchedule) -> str:
    assert sweep.fit is not None
    end = best.prediction
    low, value, high = (float(part[-1]) for part in (end.low, end.loss_nats, end.high))
    sure = (
        "so it is worth a run"
        if best.gain_low > 0
        else "so the law does not know whether it is better"
        if best.gain_high > 0
        else "so it is no better than what was run"
    )
    weak = (
        "" if sweep.fit.fit.status == "certified" else f" The fit is {sweep.fit.fit.status}: read its warnings first."
    )
    return (
        f"At peak LR {text.lr(best.peak_lr)} the law of {sweep.name} prefers {best.description}: "
        f"{text.loss(value)} {sweep.fit.loss_unit}, {text.percent(end.confidence)} interval {text.loss(low)} to "
        f"{text.loss(high)}. Its gain over the best fitted schedule, that of {best.compared_with}, is "
        f"{text.loss(best.gain_nats)} ({text.loss(best.gain_low)} to {text.loss(best.gain_high)}), {sure}.{weak}"
    )


def _toml(value: Any) -> str:
    """Return a value as TOML writes it.

    >>> _toml(True), _toml("wsd"), _toml([[0.0, 1.0]]), _toml(float("inf"))
    ('true', '"wsd"', '[[0.0, 1.0]]', 'inf')
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(item)}" for name, item in value.items() if item is not None) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)
