"""One trial and its folder: what is durable when, and what a crash leaves."""

import math
from typing import Any

import pyarrow.compute as pc
import pytest

from landscape_ray.sweep.run import TrialRun
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


def test_a_process_that_was_cut_off_writes_no_more(search_spec: SweepSpec, folder: SweepFolder) -> None:
    run = TrialRun(search_spec, folder.trial("t0000"), 0, VALUES, attempt=1)
    folder.update_meta(attempts=2)
    with pytest.raises(RuntimeError, match="driver 1 of this sweep was superseded by driver 2"):
        run.advance()
    successor = TrialRun(search_spec, folder.trial("t0000"), 0, VALUES, attempt=2)
    finish(successor)
    assert [row["step"] for row in rows(folder, "t0000", "step")] == list(range(1, 11))


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
