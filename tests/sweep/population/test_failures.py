"""Members that fail for good: the others go on, and what becomes of the member is one history."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from landscape_ray.populations import Failure
from landscape_ray.reports.lineage import exploits
from landscape_ray.reports.views import open_sweep
from landscape_ray.sweep.population.book import PopulationBook, failure_text, failures_of, population_of
from landscape_ray.sweep.run import trial_id_of
from landscape_ray.sweep.spec import spec_of
from landscape_ray.tracking.collect import collect
from landscape_ray.tracking.folder import SweepFolder
from tests.sweep.population.local import Local, make

Text = Callable[..., str]
WHY = "RuntimeError: a faulty batch"


class Faulty(Local):
    """Member 1 fails in the middle of its second order, as often as `times` says: at a commit, or before its first."""

    def __init__(self, folder: SweepFolder, attempt: int = 1, times: int = 1, early: bool = False) -> None:
        super().__init__(folder, attempt)
        self.times, self.early = times, early

    def step(self, member: int) -> dict[str, Any] | None:
        order = self.orders[member]
        if member == 1 and order.serial >= 1 and self.times and self.lost.get(1) != order.serial:
            if not self.early:
                super().step(member)
                assert not self.runs[1].reached
            self.times -= 1
            self.fail(member, WHY)
            return {}
        return super().step(member)


def lives(folder: SweepFolder, member: int) -> list[list[int]]:
    """Return the updates of a member, apart for all weights that it has had: none is there twice, none is missing."""
    found: list[list[int]] = [[]]
    for row in collect(folder.path).records.to_pylist():
        if row["run_id"] == trial_id_of(member):
            if row["event"] == "exploit":
                found.append([])
            if row["kind"] == "step":
                found[-1].append(row["step"])
    for steps in found:
        assert steps == list(range(steps[0], steps[0] + len(steps))) if steps else True
    return found


@pytest.mark.acceptance
@pytest.mark.parametrize("synchronous", [True, False], ids=["sync", "async"])
@pytest.mark.parametrize("early", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["midway", "early"])
def test_a_member_that_fails_for_good_is_replaced(text: Text, tmp_path: Path, synchronous: bool, early: bool) -> None:
    folder = make(tmp_path / "s", text(synchronous=synchronous))
    run = Faulty(folder, early=early)
    run.run()
    assert run.times == 0
    assert [trial.summary().status for trial in folder.trials()] == ["finished"] * 4  # type: ignore[union-attr]
    assert run.book.strategy.finished
    (rescue,) = (decision for decision in run.decisions if decision.reason == f"failed: {WHY}")
    assert (rescue.member, rescue.action) == (1, "exploit")
    assert rescue.donor in (0, 2, 3)
    (failure,) = failures_of(folder)
    assert failure == Failure(1, 5, WHY, rescue.donor, rescue.donor_step)
    # what it had made of the order is there, once; then come those after the weights that it took
    before, after = lives(folder, 1)[:2]
    assert before == list(range(1, 6 if early else 7))
    assert after[0] == rescue.donor_step + 1  # type: ignore[operator]
    assert lives(folder, 1)[-1][-1] == 20
    path = population_of(run.spec, folder).lineage.path(1)
    assert [(segment.start_step, segment.stop_step) for segment in path] == [(k, k + 5) for k in range(0, 20, 5)]
    told = [copy for copy in exploits(open_sweep(folder).runs) if copy.reason]
    assert [(copy.run_id, copy.reason) for copy in told] == [("t0001", f"failed: {WHY}")]
    assert set(told[0].values) == set(rescue.values)


@pytest.mark.parametrize("synchronous", [True, False], ids=["sync", "async"])
def test_one_that_fails_again_is_left_out_until_the_next_driver(text: Text, tmp_path: Path, synchronous: bool) -> None:
    """The others end; a new driver lets it train on as it was told last, and it ends, too."""
    folder = make(tmp_path / "s", text(synchronous=synchronous))
    run = Faulty(folder, times=9)
    run.run()
    assert run.times == 7, "max_failures = 1: replaced once"
    statuses = [member.status for member in run.book.strategy.members.values()]
    assert statuses == ["finished", "failed", "finished", "finished"]
    assert run.book.open == [1]
    assert [failure.donor is None for failure in failures_of(folder)] == [False, True]
    order = run.book.orders[1]
    assert (order.serial, order.abandoned) == (2, 1)
    assert Local(folder).orders == {1: order}, "whoever reads the book next continues it"
    later = Local(folder, attempt=2).run()
    assert later.book.open == []
    assert later.book.strategy.finished
    assert [trial.summary().step for trial in folder.trials()] == [20] * 4  # type: ignore[union-attr]
    assert lives(folder, 1)[-1][-1] == 20


def test_when_all_have_failed_nothing_is_lost(text: Text, tmp_path: Path) -> None:
    """A fault that all share: nobody is good enough to be copied, and the next driver takes everybody up."""
    folder = make(tmp_path / "s", text(synchronous=True))
    run = Local(folder)
    for member in range(4):
        run.step(member)
        run.fail(member, WHY)
    assert run.run().decisions == []
    assert [failure.donor for failure in failures_of(folder)] == [None] * 4
    assert run.book.open == [0, 1, 2, 3]
    later = Local(folder, attempt=2).run()
    assert later.book.strategy.finished
    whole = make(tmp_path / "whole", text(synchronous=True))
    assert population_of(later.spec, folder).members == Local(whole).run().book.strategy.members


class Killed(BaseException):
    pass


@pytest.mark.acceptance
@pytest.mark.parametrize("early", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["midway", "early"])
def test_a_crash_after_a_failure_continues_the_same_history(text: Text, tmp_path: Path, early: bool) -> None:
    """Every process dies after every few steps, from the moment on that the book says who takes the member's place."""
    written = text(synchronous=True)
    whole, broken = make(tmp_path / "whole", written), make(tmp_path / "broken", written)
    Faulty(whole, early=early).run()
    first = Faulty(broken, early=early)
    while not failures_of(broken):
        for member in range(4):
            first.step(member)

    def die(count: int) -> None:
        if count == 5:
            raise Killed

    for attempt in range(2, 100):
        broken.update_meta(attempts=attempt)
        try:
            Local(broken, attempt).run(die)
            break
        except Killed:
            continue
    assert attempt > 4
    assert json.loads(broken.population_path.read_text()) == json.loads(whole.population_path.read_text())
    for member in range(4):
        assert lives(broken, member) == lives(whole, member)


def test_a_member_that_never_came_to_a_commit_is_replaced(text: Text, tmp_path: Path) -> None:
    """Its network cannot be made, say: it has no checkpoint to go on from, and needs none. Not even after a crash."""
    folder = make(tmp_path / "s", text(synchronous=True))
    run = Local(folder)
    run.fail(1, WHY)
    while run.orders[1].serial == 0:
        for member in (0, 2, 3):
            run.step(member)
    assert (run.orders[1].abandoned, run.orders[1].last_reported) == (1, -1)
    taken = run.orders[1].source
    assert taken is not None
    contents = taken.path(folder.trial(trial_id_of(taken.member)))
    moved = contents.rename(contents.with_suffix(".moved"))
    with pytest.raises(Exception, match=contents.name):
        Local(folder, memory=False).step(1)  # dies between its fresh weights and those that it is to take
    moved.rename(contents)
    later = Local(folder, attempt=2).run()
    assert later.book.strategy.finished
    assert lives(folder, 1) == [[], list(range(6, 21))]


def test_failures_in_one_line_each_and_of_other_sweeps_none(text: Text, tmp_path: Path) -> None:
    folder = make(tmp_path / "s", text())
    assert failures_of(folder) == []
    book = PopulationBook(spec_of(folder), folder)
    book.fail(0, WHY)
    assert book.fail(0, WHY) == [], "it waits for somebody to copy, or has been left out"
    assert (
        failure_text(Failure(0, 5, WHY)) == f"t0000 failed after step 5, left out until `landscape-ray resume`: {WHY}"
    )
    folder.population_path.write_text("{")
    assert failures_of(folder) == []
    assert math.isnan(book.strategy.members[0].loss)
