"""What earlier sweeps know about a space: their runs as trials of the sampler, or their best points tried first."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from optuna.trial import FrozenTrial

from landscape_ray.config import flatten
from landscape_ray.domains import Domain, Value, applies, in_order
from landscape_ray.errors import UserError
from landscape_ray.records import RunSummary
from landscape_ray.sweep.searching.config import MLFLOW, WarmStartConfig
from landscape_ray.sweep.searching.history import History
from landscape_ray.sweep.searching.measures import measures, objective_values, violations
from landscape_ray.sweep.searching.proposer import Outcome, frozen_trial
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.tracking.collect import collect_mlflow
from landscape_ray.tracking.collected import run_columns
from landscape_ray.tracking.folder import SweepFolder

PRIOR = "landscape_ray.prior"
"""User attribute of trials in the journal that are of an earlier sweep: which run of which."""

IRRELEVANT = ("seed", "device", "compile", "eval.", "probes.", "data.source", "data.cache")
"""Settings that runs may differ in and still be compared: of one name, or with this prefix."""


@dataclasses.dataclass(frozen=True)
class Prior:
    """A run of an earlier sweep that tells something about this one's space."""

    source: str
    values: dict[str, Value]
    outcome: Outcome

    def frozen(self, space: Mapping[str, Domain]) -> FrozenTrial:
        """Return it as a trial of Optuna."""
        trial = frozen_trial(list(in_order(dict(space))), self.values, self.outcome)
        trial.set_user_attr(PRIOR, self.source)
        return trial


class Warmth(NamedTuple):
    """What was found."""

    results: list[Prior]
    points: list[dict[str, Value]]


class _Found(NamedTuple):
    source: str
    summary: RunSummary
    probes: dict[str, float]


def warm_start(spec: SweepSpec, config: WarmStartConfig, tracking_uri: str = "") -> Warmth:
    """Return what the sources know about the space of `spec`.

    Args:
        spec: the new sweep.
        config: sources, and how they are used.
        tracking_uri: of the server for sources "mlflow:<experiment>".

    Raises:
        UserError: a source cannot be read, or no run of any fits.
    """
    found = [run for source in config.sources for run in _runs(source, tracking_uri)]
    fitting: list[tuple[_Found, dict[str, Value]]] = []
    reasons: Counter[str] = Counter()
    for run in found:
        values = _values(spec, run.summary)
        if isinstance(values, str):
            reasons[values] += 1
        elif config.use == "results" and (other := _difference(spec, run.summary, values)) is not None:
            reasons[f"differ in {other}"] += 1
        else:
            fitting.append((run, values))
    if config.use == "points":
        ended = [
            (run.summary.final_loss_nats, place, values)
            for place, (run, values) in enumerate(fitting)
            if run.summary.status == "finished" and math.isfinite(run.summary.final_loss_nats)
        ]
        points = [values for _, _, values in sorted(ended, key=lambda each: each[:2])]
        distinct = [point for place, point in enumerate(points) if point not in points[:place]]
        if not distinct:
            raise UserError(_nothing(config, len(found), reasons))
        return Warmth([], distinct[: config.num_points])
    priors = [prior for run, values in fitting if (prior := _prior(spec, run, values)) is not None]
    if not priors:
        raise UserError(_nothing(config, len(found), reasons))
    return Warmth(priors, [])


def _nothing(config: WarmStartConfig, num_runs: int, reasons: Counter[str]) -> str:
    why = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common(3)) or "none has ended"
    remedy = "" if config.use == "points" else "; use = 'points' takes the best values only, from any model and length"
    return f"search.warm_start.sources must hold runs that fit this sweep, got {num_runs}, none of them ({why}){remedy}"


def _runs(source: str, tracking_uri: str) -> list[_Found]:
    if not source.startswith(MLFLOW):
        folder = SweepFolder.open(Path(source).expanduser())
        name = folder.path.name
        there = [(trial, summary) for trial in folder.trials() if (summary := trial.summary()) is not None]
        return [_Found(f"{name}/{trial.trial_id}", summary, History(trial).probes) for trial, summary in there]
    experiment = source.removeprefix(MLFLOW)
    if not tracking_uri:
        raise UserError(f"search.warm_start.sources '{source}' needs a tracking server; give --tracking-uri")
    collected = collect_mlflow(tracking_uri, experiment)
    runs = []
    for summary in collected.runs:
        rows = run_columns(collected.records, summary.run_id, "probe")
        probes = dict(zip(rows["probe"], map(float, rows["value"]), strict=True))
        runs.append(_Found(f"{source}/{summary.run_id}", summary, probes))
    return runs


def _values(spec: SweepSpec, summary: RunSummary) -> dict[str, Value] | str:
    """Return the run's values of the searched names, or why it has none that fit."""
    config = flatten(summary.config)
    values: dict[str, Value] = {}
    for name, domain in in_order(dict(spec.space)):
        if not applies(domain, values):
            continue
        value: Any = summary.varied.get(name, config.get(name))
        if (
            isinstance(value, int)
            and not isinstance(value, bool)
            and domain.integers is None
            and domain.choices is None
        ):
            value = float(value)
        if value is None:
            return f"lack {name}"
        if not domain.contains(value):
            return f"have {name} outside its domain"
        values[name] = value
    return values


def _difference(spec: SweepSpec, summary: RunSummary, values: dict[str, Value]) -> str | None:
    """Return the name of a setting in which the run differs from what this sweep would have trained."""
    here = flatten(spec.train_config(values, 0).model_dump(mode="json"))
    there = flatten(summary.config)
    for name, value in here.items():
        if name in there and there[name] != value and not name.startswith(IRRELEVANT):
            return name
    return None


def _prior(spec: SweepSpec, run: _Found, values: dict[str, Value]) -> Prior | None:
    """Return the run as a result; None for one that has not ended."""
    assert spec.search is not None
    if run.summary.status == "diverged":
        return Prior(run.source, values, Outcome(state="failed"))
    if run.summary.status != "finished":
        return None
    measured = measures(run.summary, run.probes)
    objectives = objective_values(spec.search.objectives, measured)
    if objectives is None:
        return None
    constraints = violations(spec.search.constraints, measured)
    return Prior(run.source, values, Outcome(state="complete", values=tuple(objectives), constraints=constraints))
