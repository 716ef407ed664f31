"""One trial and its folder: what is durable when, and what a crash leaves."""

import math
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest

from landscape_ray.sweep.run import CHECKPOINT, TrialRun
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.tracking.collect import collect
from landscape_ray.tracking.folder import SweepFolder

VALUES: dict[str, Any] = {"schedule.name": "linear", "schedule.peak_lr": 0.02}


def rows(folder: SweepFolder, trial_id: str, kind: str) -> list[dict[str, Any]]:
    table = collect(folder.path).records
    mask = pc.and_(pc.equal(table["run_id"], trial_id), pc.equal(table["kind"], kind))
    return list(table.filter(mask).to_pylist())


def finish(run: TrialRun) -> TrialRun:
    while not run.state.finished:
        run.advance()
    return run


def test_a_trial_leaves_every_row_once(search_spec: SweepSpec, folder: SweepFolder) -> None:
    run = finish(TrialRun(search_spec, folder.trial("t0000"), 0, VALUES))
    assert [row["step"] for row in rows(folder, "t0000", "step")] == list(range(1, 11))
    summary = folder.trial("t0000").summary()
    assert summary is not None
    assert (summary.status, summary.step, summary.varied) == ("finished", 10, VALUES)
    assert summary.final_loss_nats == run.state.loss_nats == rows(folder, "t0000", "eval")[-1]["loss_nats"]
    assert run.result()["done"]


@pytest.mark.acceptance
@pytest.mark.parametrize("crash_at", ["after rows", "after checkpoint", "between commits"])
def test_a_crash_loses_and_doubles_nothing(
    search_spec: SweepSpec, folder: SweepFolder, crash_at: str, monkeypatch: Any
) -> None:
    expected = finish(TrialRun(search_spec, folder.trial("t0000"), 0, VALUES))
    run = TrialRun(search_spec, folder.trial("t0001"), 0, VALUES)
    run.advance()

    class Killed(BaseException):
        pass

    def die(*args: Any, **kwargs: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if crash_at == "after rows":
            patch.setattr(run, "save", die)
        elif crash_at == "after checkpoint":
            patch.setattr(run.folder, "commit", die)
        else:
            patch.setattr(run, "commit", die)
        with pytest.raises(Killed):
            run.advance()
    finish(TrialRun(search_spec, folder.trial("t0001"), 0, VALUES, attempt=1))

    ours, whole = rows(folder, "t0001", "step"), rows(folder, "t0000", "step")
    assert [(r["step"], r["loss_nats"], r["lr"]) for r in ours] == [(r["step"], r["loss_nats"], r["lr"]) for r in whole]
    assert [r["step"] for r in rows(folder, "t0001", "eval")] == [0, 5, 10]
    summary = folder.trial("t0001").summary()
    assert summary is not None
    assert summary.final_loss_nats == expected.state.loss_nats
    # after the checkpoint of the last step nothing is left to be done, so there is nothing to resume
    resumed = [r["step"] for r in rows(folder, "t0001", "event")]
    assert resumed == ([] if crash_at == "after checkpoint" else [5])


def test_an_exploit_copies_weights_and_keeps_own_values(
    population_spec: SweepSpec, folder: SweepFolder, tmp_path: Path
) -> None:
    donor = TrialRun(population_spec, folder.trial("t0000"), 0, {"schedule.peak_lr": 0.01})
    donor.advance()
    donor.save(tmp_path / CHECKPOINT)
    member = TrialRun(population_spec, folder.trial("t0001"), 1, {"schedule.peak_lr": 0.03})
    member.advance()

    mutated = TrialRun(population_spec, folder.trial("t0001"), 1, {"schedule.peak_lr": 0.05})
    mutated.adopt(tmp_path / CHECKPOINT, "1.1")
    for p, q in zip(mutated.state.module.parameters(), donor.state.module.parameters(), strict=True):
        assert bool((p == q).all())
    assert mutated.state.config.seed == member.state.config.seed != donor.state.config.seed
    assert mutated.state.elapsed_seconds == pytest.approx(member.state.elapsed_seconds)
    finish(mutated)

    event = rows(folder, "t0001", "event")[0]
    assert (event["event"], event["step"], event["donor"], event["donor_step"]) == ("exploit", 5, "t0000", 5)
    assert event["detail"] == '{"schedule.peak_lr": 0.05}'
    lrs = [row["lr"] for row in rows(folder, "t0001", "step")]
    assert lrs[4] == pytest.approx(0.03)
    assert lrs[5] == pytest.approx(0.05)
    summary = folder.trial("t0001").summary()
    assert summary is not None
    assert summary.varied == {"schedule.peak_lr": 0.05}


def test_a_repeated_exploit_changes_nothing_and_a_new_one_does(
    population_spec: SweepSpec, folder: SweepFolder, tmp_path: Path
) -> None:
    donor = TrialRun(population_spec, folder.trial("t0000"), 0, {"schedule.peak_lr": 0.01})
    donor.advance()
    donor.save(tmp_path / CHECKPOINT)
    member = TrialRun(population_spec, folder.trial("t0001"), 1, {"schedule.peak_lr": 0.03})
    member.advance()
    member.adopt(tmp_path / CHECKPOINT, "1.1")
    member.advance()
    assert member.state.finished
    reopened = TrialRun(population_spec, folder.trial("t0001"), 1, {"schedule.peak_lr": 0.03})
    for run in (member, reopened):
        run.adopt(tmp_path / CHECKPOINT, "1.1")  # Ray hands out the donor's checkpoint again after a crash
        assert run.state.step == 10
    donor.advance()
    donor.adopt(tmp_path / CHECKPOINT, "")  # and a member's own, older one after a pause
    assert donor.state.step == 10
    assert len(rows(folder, "t0001", "event")) == 1
    reopened.adopt(
        tmp_path / CHECKPOINT, ""
    )  # a later driver knows of no exploit: whatever it hands out is the member's
    assert reopened.state.step == 10
    assert len(rows(folder, "t0001", "event")) == 1
    reopened.adopt(tmp_path / CHECKPOINT, "1.2")  # the same weights once more, on purpose
    assert reopened.state.step == 5
    assert [event["donor_step"] for event in rows(folder, "t0001", "event")] == [5, 5]


def test_a_process_that_was_cut_off_writes_no_more(search_spec: SweepSpec, folder: SweepFolder) -> None:
    run = TrialRun(search_spec, folder.trial("t0000"), 0, VALUES, attempt=1)
    folder.update_meta(attempts=2)
    with pytest.raises(RuntimeError, match="driver 1 of this sweep was superseded by driver 2"):
        run.advance()
    successor = TrialRun(search_spec, folder.trial("t0000"), 0, VALUES, attempt=2)
    finish(successor)
    assert [row["step"] for row in rows(folder, "t0000", "step")] == list(range(1, 11))


def test_mutated_values_become_durable_with_their_weights_only(population_spec: SweepSpec, folder: SweepFolder) -> None:
    TrialRun(population_spec, folder.trial("t0001"), 1, {"schedule.peak_lr": 0.03}).advance()
    before = folder.trial("t0001").summary()
    TrialRun(population_spec, folder.trial("t0001"), 1, {"schedule.peak_lr": 0.05})  # killed before it adopts
    assert folder.trial("t0001").summary() == before


def test_divergence_is_committed(search_spec: SweepSpec, folder: SweepFolder) -> None:
    run = TrialRun(search_spec, folder.trial("t0000"), 0, VALUES)
    run.advance()
    next(iter(run.state.module.parameters())).data.fill_(math.nan)
    run.advance()
    result = run.result()
    assert result["done"]
    assert result["diverged"]
    assert math.isnan(result["loss_nats"])
    summary = folder.trial("t0000").summary()
    assert summary is not None
    assert summary.status == "diverged"
    assert "in update 6" in summary.message
    assert rows(folder, "t0000", "event")[0]["event"] == "diverged"
    again = TrialRun(search_spec, folder.trial("t0000"), 0, VALUES, attempt=1)
    assert again.state.finished
    assert len(rows(folder, "t0000", "event")) == 1
