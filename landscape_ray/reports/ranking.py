"""The rank study: which measure of a run tells how it generalises, over the runs of a sweep and at equal settings.

The question of Andriushchenko et al. (2023, arXiv:2302.07011), for the user's own sweep: each probe against the
generalisation gap, the error on held-out data and the error on every shifted set. They found sharpness to follow
settings such as the learning rate rather than generalisation, on models that differ in other settings than a user's; so
the conditional correlations of Jiang et al. (2020, arXiv:1912.02178) stand beside those over all runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from landscape_ray import text
from landscape_ray.analysis.runs import Run
from landscape_ray.config import flatten
from landscape_ray.errors import UserError
from landscape_ray.laws.ranking import MIN_RUNS, Association, conditional, holm, kendall
from landscape_ray.reports.views import Sweep, label, open_sweep

if TYPE_CHECKING:
    from landscape_ray.tracking.folder import SweepFolder

GAP, LOSS, ERROR = "gap", "held-out loss", "held-out error"

TRAINING_SHARE = 10
"""The training loss at the end is the mean over this part of the updates: the last tenth."""

MIN_TRAINING_STEPS = 10

NO_SETTINGS = ("probes", "eval", "device", "compile")
"""Tables and fields that do not change what is trained; nor do seeds, beyond noise."""

SIGNIFICANT = 0.05

Found = Association | str
"""A correlation, or why there is none."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Row:
    """One line of a table: a measure, which runs were compared, and what was found for every target."""

    measure: str
    compared: str
    cells: dict[str, Found]
    """Target to correlation."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class RankStudy:
    """The correlations of a sweep, or of several together, and what they were computed from."""

    sweeps: tuple[Sweep, ...]
    runs: dict[str, Run]
    """Name to run, those that were compared."""
    excluded: dict[str, str]
    """Name of a run that was left out to the reason."""
    settings: dict[str, tuple[Any, ...]]
    """Dotted name to a value for each run, where runs differ in it."""
    measures: dict[str, tuple[float, ...]]
    """Probe to its last value in each run; nan where it has none."""
    targets: dict[str, tuple[float, ...]]
    """Gap, held-out loss and error, and the error on each shifted set (its loss, where targets are no classes)."""
    num_configurations: int
    overall: tuple[Row, ...]
    conditional: tuple[Row, ...]

    @property
    def headline(self) -> str:
        """The target that the figure shows: the gap, or where no training loss is known the held-out loss."""
        return next(iter(self.targets))

    def significant(self, rows: Sequence[Row]) -> set[tuple[int, str]]:
        """Return (row, target) of the cells with p < 0.05 after Holm's correction for all cells of the table."""
        cells = correlations(rows)
        adjusted = holm([found.p_value for _, _, found in cells])
        return {(k, name) for (k, name, _), p in zip(cells, adjusted, strict=True) if p < SIGNIFICANT}

    def to_json(self) -> dict[str, Any]:
        """Return the values of every run and the tables, as JSON holds them: None where there is no number."""

        def plain(values: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
            return {
                name: [None if isinstance(v, float) and not math.isfinite(v) else v for v in row]
                for name, row in values.items()
            }

        def table(rows: Sequence[Row]) -> dict[str, Any]:
            marked = self.significant(rows)
            lines = [
                {
                    "measure": row.measure,
                    "runs_compared": row.compared,
                    "found": {
                        name: {"none_because": cell}
                        if isinstance(cell, str)
                        else {**dataclasses.asdict(cell), "significant": (k, name) in marked}
                        for name, cell in row.cells.items()
                    },
                }
                for k, row in enumerate(rows)
            ]
            return {"num_comparisons": len(correlations(rows)), "rows": lines}

        return {
            "sweeps": [sweep.name for sweep in self.sweeps],
            "definitions": definitions(self),
            "runs": list(self.runs),
            "left_out": self.excluded,
            "settings": plain(self.settings),
            "measures": plain(self.measures),
            "targets": plain(self.targets),
            "overall": table(self.overall),
            "conditional": table(self.conditional),
        }


def rank_study(folders: Iterable[SweepFolder | Path | str], *, confidence: float = 0.95) -> RankStudy:
    """Return how the last value of every probe ranks with how its run generalises.

    Compared are the runs that finished under settings of their own: a run that diverged, failed or was stopped has no
    result, and a member of a population that copied weights shares them with others.

    Args:
        folders: sweeps whose runs are compared with each other.
        confidence: of the intervals, in (0, 1).

    Raises:
        UserError: losses of different kinds, or fewer than five configurations with a probe.
    """
    sweeps = tuple(open_sweep(folder) for folder in folders)
    everything = {label(sweeps, sweep, run.run_id): run for sweep in sweeps for run in sweep.runs}
    reasons = {name: _unusable(run) for name, run in everything.items()}
    runs = {name: run for name, run in everything.items() if not reasons[name]}
    excluded = {name: why for name, why in reasons.items() if why}
    names = list(dict.fromkeys(str(name) for run in runs.values() for name in run.probes["probe"]))
    measures = {name: tuple(_last(run.probe(name), "value") for run in runs.values()) for name in names}
    settings = _settings(list(runs.values()))
    members = _configurations(settings, len(runs))
    _check(sweeps, measures, members, excluded)
    targets = _targets(list(runs.values()))

    def row(measure: str, compared: str, **given: Any) -> Row:
        cells = {
            target: _cell(measures[measure], values, members, settings, confidence, **given)
            for target, values in targets.items()
        }
        return Row(measure=measure, compared=compared, cells=cells)

    rows = []
    for measure in measures:
        for name in settings:
            others = [other for other in settings if other != name]
            if others:
                rows.append(row(measure, f"only {name} differs", equal=others, differing=name))
            rows.append(row(measure, f"{name} is equal", equal=[name]))
    return RankStudy(
        sweeps=sweeps,
        runs=runs,
        excluded=excluded,
        settings=settings,
        measures=measures,
        targets=targets,
        num_configurations=len(set(members)),
        overall=tuple(row(measure, "all runs") for measure in measures),
        conditional=tuple(rows),
    )


def definitions(study: RankStudy) -> str:
    """Return what the numbers are, in a few sentences."""
    shifts = "; the other columns are the same on shifted data" if len(study.targets) > 3 else ""
    data = [run.summary.config.get("data", {}) for run in study.runs.values()]
    augmented = any(isinstance(table, Mapping) and table.get("augment", "none") != "none" for table in data)
    harder = " That one is of augmented examples, which are harder, so a gap may be negative." if augmented else ""
    return (
        "A measure is the last value of its probe. The gap is the final held-out loss minus the mean training loss of "
        f"the last tenth of the updates (at least {MIN_TRAINING_STEPS}).{harder} The error is 1 - accuracy{shifts}. "
        "Positive: the larger the measure, the worse."
    )


def main_setting(study: RankStudy) -> str | None:
    """Return the setting that measures follow most often: the learning rate, or the first; None without any."""
    return next((name for name in study.settings if name.endswith("peak_lr")), next(iter(study.settings), None))


def _unusable(run: Run) -> str:
    """Return why a run is not compared, an empty text when it is."""
    if run.summary.status != "finished":
        return run.summary.status
    if run.mutated:
        return "changed by a population"
    return "" if run.has_result else "without a held-out loss"


def _last(rows: Mapping[str, Any], column: str) -> float:
    values = rows[column]
    return float(values[-1]) if len(values) else math.nan


def _settings(runs: Sequence[Run]) -> dict[str, tuple[Any, ...]]:
    """Return the settings in which the runs differ, those that were searched first."""
    flat = [flatten(run.summary.config) | run.summary.varied for run in runs]
    names = dict.fromkeys(name for run in runs for name in run.summary.varied)
    names |= dict.fromkeys(name for values in flat for name in values)
    found = {}
    for name in names:
        last = name.rpartition(".")[2]
        values = tuple(one.get(name) for one in flat)
        if name.partition(".")[0] in NO_SETTINGS or last == "seed" or last.endswith("_seed"):
            continue
        if len({repr(value) for value in values}) > 1:
            found[name] = values
    return found


def _configurations(settings: Mapping[str, Sequence[Any]], num_runs: int) -> list[int]:
    """Return the number of the configuration of each run; runs of one number differ in their seed only."""
    seen: dict[str, int] = {}
    keys = [repr([values[k] for values in settings.values()]) for k in range(num_runs)]
    return [seen.setdefault(key, len(seen)) for key in keys]


def _targets(runs: Sequence[Run]) -> dict[str, tuple[float, ...]]:
    """Return what the measures are compared with; a column that no run has is left out."""
    found = {
        GAP: tuple(run.loss - _training_loss(run) for run in runs),
        LOSS: tuple(run.loss for run in runs),
        ERROR: tuple(1 - _number(run.summary.final_accuracy) for run in runs),
    }
    # averaged weights are variants too; shifts are those that the configuration asks for
    shifts = dict.fromkeys(name for run in runs for name in _shifts(run))
    for name in shifts:
        rows = [_variant(run, name) for run in runs]
        accuracy = np.array([_last(one, "accuracy") for one in rows])
        if np.isfinite(accuracy).any():
            found[f"{name} error"] = tuple((1 - accuracy).tolist())
        else:
            found[f"{name} loss"] = tuple(_last(one, "loss_nats") for one in rows)
    return {name: values for name, values in found.items() if np.isfinite(values).any()}


def _shifts(run: Run) -> list[str]:
    asked = run.summary.config.get("eval", {})
    return list(asked.get("shifts", [])) if isinstance(asked, Mapping) else []


def _variant(run: Run, name: str) -> dict[str, Any]:
    """Return the rows of one variant of a run."""
    chosen = run.variants["variant"].astype(str) == name
    return {key: column[chosen] for key, column in run.variants.items()}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _training_loss(run: Run) -> float:
    """Return the mean training loss of the last updates; nan without any."""
    losses = np.asarray(run.steps["loss_nats"], dtype=np.float64)
    last = losses[-max(len(losses) // TRAINING_SHARE, MIN_TRAINING_STEPS) :]
    return float(last.mean()) if len(last) else math.nan


def _cell(
    measured: Sequence[float],
    target: Sequence[float],
    members: Sequence[int],
    settings: Mapping[str, Sequence[Any]],
    confidence: float,
    **given: Any,
) -> Found:
    kept = np.flatnonzero(np.isfinite(measured) & np.isfinite(target))
    x, y = np.asarray(measured)[kept], np.asarray(target)[kept]
    options: dict[str, Any] = {"configurations": np.asarray(members)[kept], "confidence": confidence}
    if not given:
        return kendall(x, y, **options)
    present = {name: [values[k] for k in kept.tolist()] for name, values in settings.items()}
    return conditional(x, y, present, **given, **options)


def _check(
    sweeps: Sequence[Sweep],
    measures: Mapping[str, Sequence[float]],
    members: Sequence[int],
    excluded: Mapping[str, str],
) -> None:
    """Make sure that there is something to compare.

    Raises:
        UserError: losses of different kinds, or too few configurations with a probe.
    """
    units = sorted({run.summary.loss_unit for sweep in sweeps for run in sweep.runs})
    if len(units) > 1:
        raise UserError(f"sweeps must have losses of one kind, got {text.listing(units)}; rank them one by one")
    probed = [{m for m, v in zip(members, row, strict=True) if math.isfinite(v)} for row in measures.values()]
    most = max((len(found) for found in probed), default=0)
    if most >= MIN_RUNS:
        return
    finished = f"{most} among {text.plural(len(members), 'finished run')}{left_out(excluded)}"
    remedy = "set search.num_trials to 16 or more" if measures or not members else "add [train.probes.sharpness]"
    raise UserError(
        f"a rank study must have {MIN_RUNS} finished configurations with a probe, got {finished}; "
        f"{remedy} in the sweep file and run it"
    )


def left_out(excluded: Mapping[str, str]) -> str:
    """Return how many runs were left out for which reason; empty without any."""
    reasons = list(excluded.values())
    counted = [f"{reasons.count(why)} {why}" for why in dict.fromkeys(reasons)]
    return f" (left out: {', '.join(counted)})" if counted else ""


def spoken(study: RankStudy) -> str:
    """Return the headline target in words."""
    return "generalisation gap" if study.headline == GAP else study.headline


def correlations(rows: Sequence[Row]) -> list[tuple[int, str, Association]]:
    """Return the cells of a table that hold a number, with their row and target."""
    return [
        (k, name, cell)
        for k, row in enumerate(rows)
        for name, cell in row.cells.items()
        if isinstance(cell, Association)
    ]
