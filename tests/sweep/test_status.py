"""`landscape-ray status`: how a sweep is doing, from its folder."""

from __future__ import annotations

import io
import json
import os
import shutil
import time

import pytest
from rich.console import Console

from landscape_ray.sweep import status as module
from landscape_ray.sweep.status import status_of, watch
from landscape_ray.tracking.folder import SweepFolder


@pytest.fixture
def folder(search_folder, tmp_path):
    return SweepFolder(shutil.copytree(search_folder.path, tmp_path / "search"))


def drawn(folder) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(status_of(folder)[1])
    return console.file.getvalue()


def running(folder, **meta):
    """Make the sweep look as in its middle: t003 at half of its updates."""
    folder.update_meta(status="running", num_trials=14, attempts=1, created_unix=time.time() - 120, **meta)
    folder.trial("t003").set_status("running")


def test_a_finished_sweep_lists_the_best_first(folder):
    folder.update_meta(num_trials=12, ended_unix=folder.meta["created_unix"] + 90)
    lines = drawn(folder).splitlines()
    assert lines[0].startswith("search: 12/12 trials ended · best 2.0994 nats/token · 1 min 30 s spent · 1 diverged")
    assert lines[1] == "finished"
    assert lines[2].startswith("disk: ")
    assert lines[4].startswith("t003")
    assert "name=wsd" in lines[4]


def test_a_running_sweep_tells_its_rate_and_when_it_last_wrote(folder):
    running(folder)
    said = drawn(folder)
    assert "11/14 trials ended" in said
    assert "about" in said.splitlines()[0]
    assert "running, last commit" in said
    row = next(line for line in said.splitlines() if line.startswith("t003"))
    assert "running" in row
    assert "e-0" in row  # the learning rate of its last update


def test_a_resumed_sweep_has_no_rate(folder):
    running(folder)
    folder.update_meta(attempts=2)
    assert "left (until" not in drawn(folder)


def test_a_sweep_that_is_quiet_for_long_may_have_lost_its_driver(folder):
    running(folder)
    assert "if its driver was killed" not in drawn(folder)
    old = time.time() - module.QUIET_SECONDS - 60
    for trial in folder.trials():
        os.utime(trial.commit_path, (old, old))
    assert "if its driver was killed: landscape-ray resume search" in drawn(folder)


def test_an_interrupted_sweep_says_how_to_go_on(folder):
    folder.update_meta(status="interrupted")
    assert "to go on: landscape-ray resume search" in drawn(folder)


def test_members_that_failed_are_named(folder):
    """Replaced ones always; those that are left out as long as they are, once."""
    failures = [[2, 100, "RuntimeError: x", 3, 120], [3, 10, "y", None, None], [5, 40, "z", None, None]] * 2
    folder.population_path.write_text(json.dumps({"strategy": {"failures": failures}}))
    folder.trial("t003").set_status("failed")
    identifiers = {number: f"t{number:03d}" for number in range(9)}  # of this fixture
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "trial_id_of", identifiers.__getitem__)
        said = drawn(folder)
    assert said.count("t0002 failed after step 100, replaced by a copy of t0003 at step 120: RuntimeError: x") == 1
    assert said.count("t0003 failed after step 10, left out until `landscape-ray resume`: y") == 1
    assert "t0005 failed" not in said


def test_a_damaged_trial_is_named_and_the_others_are_shown(folder):
    folder.trial("t005").commit_path.write_text("{")
    said = drawn(folder)
    assert "trial.json is damaged" in said
    assert "t003" in said


def test_a_sweep_that_has_just_begun(tmp_path):
    folder = SweepFolder.create(tmp_path / "new", spec_text="", meta={"num_trials": 3})
    assert "new: 0/3 trials ended · best - nats/token" in drawn(folder)


def test_watching_ends_with_the_sweep(folder, monkeypatch):
    running(folder)
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        folder.trial("t003").set_status("finished")
        folder.update_meta(status="finished")

    monkeypatch.setattr(module.time, "sleep", sleep)
    console = Console(file=io.StringIO(), width=140, force_terminal=True)
    watch(folder, console, 2.0)
    assert slept == [2.0]
    assert "12/14" in console.file.getvalue()
