"""The durable study of a search, in a file that only grows: a line for each proposal, and for what became of it.

optuna-dashboard reads it. Trials of earlier sweeps stand first in it, then those of this one, by their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal._storage import JournalOperation, JournalStorageReplayResult
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from landscape_ray.domains import Value
from landscape_ray.errors import UserError
from landscape_ray.sweep.searching.journal_file import JournalFile, open_file
from landscape_ray.sweep.searching.measures import direction
from landscape_ray.sweep.searching.proposer import STATES, Outcome
from landscape_ray.sweep.searching.warm import PRIOR, warm_start
from landscape_ray.sweep.spec import SweepSpec


class Journal:
    """Opens the journal of a sweep, or begins it with what earlier sweeps know.

    Args:
        spec: the sweep; must have a [search] table.
        path: of the file.
        tracking_uri: of the MLflow server that [search.warm_start] may name.

    Attributes:
        num_priors: trials of earlier sweeps.
        own: trials of this sweep that were there when it was opened, by number.
        points: values that earlier sweeps say to try first.

    Raises:
        UserError: a warm start that finds nothing, or a journal that cannot be read.
    """

    def __init__(self, spec: SweepSpec, path: Path, tracking_uri: str = "") -> None:
        assert spec.search is not None
        self._name, self._path = spec.name, path
        self._lines = JournalFile(path)
        self._storage = _LeanStorage(self._lines)
        names = [study.study_name for study in self._storage.get_all_studies()]
        if spec.name in names:
            self._study_id = self._storage.get_study_id_from_name(spec.name)
        else:
            ways = {"minimize": StudyDirection.MINIMIZE, "maximize": StudyDirection.MAXIMIZE}
            directions = [ways[direction(name)] for name in spec.search.objectives]
            self._study_id = self._storage.create_new_study(directions, spec.name)
            if len(spec.search.objectives) > 1:
                self._storage.set_study_user_attr(self._study_id, "objectives", spec.search.objectives)
        trials = self._storage.get_all_trials(self._study_id)
        if any(trial.state == TrialState.WAITING for trial in trials):
            raise UserError(f"{path} was written by an earlier version of landscape_ray; start a new sweep")
        self.points: list[dict[str, Value]] = []
        if spec.search.warm_start is not None:
            if "points" not in self._storage.get_study_user_attrs(self._study_id):
                found = warm_start(spec, spec.search.warm_start, tracking_uri)
                for prior in found.results:
                    self._storage.create_new_trial(self._study_id, prior.frozen(spec.space))
                self._storage.set_study_user_attr(self._study_id, "points", found.points)
                trials = self._storage.get_all_trials(self._study_id)
            self.points = self._storage.get_study_user_attrs(self._study_id)["points"]
        self.num_priors = sum(PRIOR in trial.user_attrs for trial in trials)
        self._priors, self.own = trials[: self.num_priors], trials[self.num_priors :]
        self._identifiers = [trial._trial_id for trial in self.own]
        """How Optuna calls the trials of this sweep, by their number."""
        self._written = {
            number: set(trial.intermediate_values)
            for number, trial in enumerate(self.own)
            if not trial.state.is_finished()
        }
        """Steps, or fidelities, of the losses that are in the file, by number of the trials that are not settled."""
        self._storage.forget_trials()

    @property
    def study(self) -> optuna.Study:
        """The study, to read from: it is read whole."""
        return optuna.load_study(study_name=self._name, storage=JournalStorage(open_file(self._path)))

    def as_asked(self) -> list[FrozenTrial]:
        """Return all trials that were there at opening, this sweep's as they were when they were handed out."""
        return [*self._priors, *(_as_running(trial, {}) for trial in self.own)]

    def attributes(self) -> dict[str, Any]:
        """Return what the samplers have noted about the study as a whole."""
        return dict(self._storage.get_study_system_attrs(self._study_id))

    def add(self, trial: FrozenTrial, note: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
        """Append the next proposal, in one line.

        Args:
            trial: the proposal.
            note: what was changed about it.
            attributes: of the study, as the samplers have left them.
        """
        running = _as_running(trial, {"note": dict(note)} if note else {})
        self._written[len(self._identifiers)] = set()
        self._identifiers.append(self._storage.create_new_trial(self._study_id, running))
        known = self._storage.get_study_system_attrs(self._study_id)
        for key, value in attributes.items():
            if known.get(key) != value:
                self._storage.set_study_system_attr(self._study_id, key, value)

    def settle(self, number: int, outcome: Outcome) -> None:
        """Append what became of a trial."""
        trial_id = self._identifiers[number]
        with self._lines.together():
            self._append_losses(number, outcome.intermediate)
            for key, value in outcome.constraint_attributes().items():
                self._storage.set_trial_system_attr(trial_id, key, value)
            self._storage.set_trial_state_values(trial_id, STATES[outcome.state], outcome.told_values)
        del self._written[number]

    def write(self, number: int, losses: Mapping[int, float]) -> None:
        """Append losses of a trial that are not there yet."""
        with self._lines.together():
            self._append_losses(number, losses)

    def _append_losses(self, number: int, losses: Mapping[int, float]) -> None:
        trial_id, written = self._identifiers[number], self._written[number]
        for step in [step for step in losses if step not in written]:
            self._storage.set_trial_intermediate_value(trial_id, step, losses[step])
            written.add(step)


class _LeanStorage(JournalStorage):
    """Optuna's storage, which can forget trials: to append to the file, their count is enough."""

    _replay_result: JournalStorageReplayResult

    def forget_trials(self) -> None:
        """Keep no trials from here on, neither those that were read nor new ones."""
        self._replay_result = _Count(self._replay_result)


class _Count(JournalStorageReplayResult):
    """What is known of a journal's lines: all of studies, of trials how many there are."""

    def __init__(self, known: JournalStorageReplayResult) -> None:
        super().__init__(known._worker_id_prefix)
        self.log_number_read, self._studies = known.log_number_read, known._studies
        self._next_study_id, self._num_trials = known._next_study_id, len(known._trials)
        self._last_created_trial_id_by_this_process = -1

    def apply_logs(self, logs: Iterable[dict[str, Any]]) -> None:
        """Take note of lines; a trial is called by how many there were before it, whoever made them."""
        for log in logs:
            if log["op_code"] == JournalOperation.CREATE_TRIAL:
                self.log_number_read += 1
                if self._study_exists(log["study_id"], log):
                    if self._is_issued_by_this_worker(log):
                        self._last_created_trial_id_by_this_process = self._num_trials
                    self._num_trials += 1
            elif "trial_id" in log:
                self.log_number_read += 1
            else:
                super().apply_logs([log])


def outcome_of(trial: FrozenTrial) -> Outcome:
    """Return what a settled trial of the journal was told as."""
    state = next(name for name, known in STATES.items() if known == trial.state)
    return Outcome(
        state=state,
        values=tuple(trial.values) if state == "complete" else None,
        intermediate=dict(trial.intermediate_values),
        constraints=dict(trial.constraints),
    )


def _as_running(trial: FrozenTrial, user_attributes: dict[str, Any]) -> FrozenTrial:
    """Return a copy of a trial as it was when it was handed out."""
    told = outcome_of(trial).constraint_attributes() if trial.state.is_finished() else {}
    return FrozenTrial(
        number=trial.number,
        trial_id=trial._trial_id,
        state=TrialState.RUNNING,
        value=None,
        datetime_start=trial.datetime_start,
        datetime_complete=None,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs=user_attributes,
        system_attrs={key: value for key, value in trial.system_attrs.items() if key not in told},
        intermediate_values={},
    )
