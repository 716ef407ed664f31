"""The journal file of a search: what a kill leaves is mended, several lines are written as one."""

import os
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import TrialState

from landscape_ray.sweep.searching.journal_file import JournalFile, mend_journal


def test_lines_written_together_are_synced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    file = JournalFile(tmp_path / "study.journal")
    storage = JournalStorage(file)
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "s")
    trial_id = storage.create_new_trial(study_id)
    before = len(synced)
    with file.together():
        for step in range(5):
            storage.set_trial_intermediate_value(trial_id, step, 1.0 / (step + 1))
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.2])
    assert len(synced) == before + 1
    with file.together():  # nothing to write is no reason to write
        pass
    assert len(synced) == before + 1
    elsewhere = JournalStorage(JournalFileBackend(str(tmp_path / "study.journal")))
    for each in (storage, elsewhere):
        (trial,) = each.get_all_trials(study_id)
        assert trial.state == TrialState.COMPLETE
        assert trial.intermediate_values == {step: 1.0 / (step + 1) for step in range(5)}


def test_what_another_process_appends_meanwhile_is_kept(tmp_path: Path) -> None:
    """optuna-dashboard writes notes into the journal that it shows."""
    file = JournalFile(tmp_path / "study.journal")
    storage = JournalStorage(file)
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "s")
    trial_id = storage.create_new_trial(study_id)
    dashboard = JournalStorage(JournalFileBackend(str(tmp_path / "study.journal")))
    with file.together():
        storage.set_trial_intermediate_value(trial_id, 1, 0.5)
        dashboard.set_study_user_attr(study_id, "note", "mine")
        storage.set_trial_intermediate_value(trial_id, 2, 0.25)
    for each in (storage, dashboard):
        assert each.get_study_user_attrs(study_id) == {"note": "mine"}
        assert each.get_trial(trial_id).intermediate_values == {1: 0.5, 2: 0.25}


def test_what_a_killed_driver_leaves_is_cleared(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    storage = JournalStorage(JournalFile(path))
    storage.create_new_study([StudyDirection.MINIMIZE], "s")
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code": 4, "worker')
    (tmp_path / "study.journal.lock").touch()
    optuna.load_study(study_name="s", storage=JournalStorage(JournalFile(path)))
    assert path.read_bytes() == whole
    assert not (tmp_path / "study.journal.lock").exists()
    mend_journal(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
