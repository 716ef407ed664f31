"""What the folders of a search's trials hold of their past."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from landscape_ray.sweep.run import trial_id_of
from landscape_ray.tracking.collected import run_columns
from landscape_ray.tracking.folder import SweepFolder, TrialFolder
from landscape_ray.tracking.parts import read_part


class History:
    """What a trial's folder holds of its past: held-out losses and the last value of every probe.

    Attributes:
        evals: step, loss and time stamp of every committed evaluation, in their order.
        probes: last value of each, by name.
        first: first value of each that was finite.
    """

    def __init__(self, trial: TrialFolder) -> None:
        self.evals: list[tuple[int, float, float]] = []
        self.probes: dict[str, float] = {}
        self.first: dict[str, float] = {}
        commit = trial.read()
        for index in range(commit.num_parts if commit is not None else 0):
            table = read_part(trial.part_path(index))
            rows = run_columns(table, trial.trial_id, "eval")
            self.evals += zip(
                map(int, rows["step"]), map(float, rows["loss_nats"]), map(float, rows["time_unix"]), strict=True
            )
            rows = run_columns(table, trial.trial_id, "probe")
            for name, value in zip(rows["probe"], map(float, rows["value"]), strict=True):
                self.probes[name] = value
                if math.isfinite(value):
                    self.first.setdefault(name, value)


class Committed(NamedTuple):
    """What the folders of a search's trials say of held-out losses.

    Attributes:
        evals: time, number of the trial, step and loss of each evaluation, in the order in which they were made; with
            levels the last one of each run that finished, and the value of its level in place of the step.
        ended: final loss of each trial that has ended; nan where it diverged.
        levels: index of the last level that each trial has begun, where it has begun one.
    """

    evals: list[tuple[float, int, int, float]]
    ended: dict[int, float]
    levels: dict[int, int]


def committed(folder: SweepFolder, indices: Iterable[int], levels: Sequence[int]) -> Committed:
    """Return what earlier drivers have made durable.

    Args:
        folder: of the sweep.
        indices: numbers of its trials.
        levels: values of [search.fidelity]; none without it.
    """
    found = Committed([], {}, {})
    for index in indices:
        if not levels:
            trial = folder.trial(trial_id_of(index))
            if (summary := trial.summary()) is None:
                continue
            found.evals.extend((time, index, step, loss) for step, loss, time in History(trial).evals)
            if summary.status in ("finished", "diverged"):
                found.ended[index] = summary.final_loss_nats if summary.status == "finished" else math.nan
            continue
        for level, value in enumerate(levels):
            trial = folder.trial(trial_id_of(index, level))
            summary = trial.summary()
            if summary is None or not summary.config:
                break
            found.levels[index] = level
            if summary.status == "diverged":
                found.ended[index] = math.nan
            elif summary.status == "finished":
                history = History(trial).evals
                found.evals.append((history[-1][2] if history else 0.0, index, value, summary.final_loss_nats))
    found.evals.sort()
    return found
