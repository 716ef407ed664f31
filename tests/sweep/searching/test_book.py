"""The book of a search: what is told to Optuna, what survives a killed driver, and what one seed determines."""

import math
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState

from landscape_ray.config import parse
from landscape_ray.errors import UserError
from landscape_ray.sweep.searching.book import Book
from landscape_ray.sweep.searching.samplers import SEARCHERS
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.tracking.folder import SweepFolder

SPACE: dict[str, Any] = {
    "schedule.peak_lr": {"log_uniform": [1e-3, 1e-1]},
    "schedule.name": {"choices": ["cosine", "wsd"]},
    "schedule.cooldown_fraction": {"uniform": [0.2, 0.8], "when": {"schedule.name": "wsd"}},
}


def loss_of(values: dict[str, Any], step: int) -> float:
    """A curve that falls with the steps towards a floor which is lowest at a learning rate of 1e-2."""
    floor = 1 + math.log10(values["schedule.peak_lr"] / 1e-2) ** 2 + (0.1 if values["schedule.name"] == "cosine" else 0)
    return floor + 3 / step


@pytest.fixture
def spec(sweep_text: Callable[..., str], tiny: dict[str, Any]) -> Callable[..., SweepSpec]:
    def make(**search: Any) -> SweepSpec:
        changes: dict[str, Any] = {key: search.pop(key) for key in ("train", "space", "seed") if key in search}
        train = {**tiny, "num_steps": 90, "eval": {**tiny["eval"], "every_steps": 10}} | changes.pop("train", {})
        text = sweep_text(**({"train": train, "space": SPACE} | changes), search={"num_trials": 10, **search})
        return parse(SweepSpec, tomllib.loads(text), "book")

    return make


ASHA = {"name": "asha", "min_steps": 10, "reduction_factor": 3}


@pytest.mark.acceptance
def test_what_became_of_trials_is_told_as_what_it_is(spec: Any, drive: Any) -> None:
    """Ended: COMPLETE. Stopped: PRUNED, with every loss it had. Diverged: FAIL. Of each the losses by step."""

    def loss(values: dict[str, Any], step: int) -> float:
        return math.nan if values["schedule.peak_lr"] > 5e-2 else loss_of(values, step)

    initial = [{"schedule.peak_lr": 8e-2, "schedule.name": "cosine"}]
    driver = drive(spec(stopping=ASHA, initial=initial, num_trials=20), loss, num_workers=2).run()
    trials = driver.book.study.get_trials()
    states = Counter(trial.state for trial in trials)
    assert sum(states.values()) == 20
    assert states[TrialState.FAIL] >= 1
    assert states[TrialState.PRUNED] >= 3
    assert states[TrialState.COMPLETE] >= 1
    assert driver.book.num_left() == 0
    for trial in trials:
        summary = driver.folder.trial(f"t{trial.number:04d}").summary()
        expected = {s: loss(trial.params, s) for s in range(10, summary.step + 1, 10)}
        assert trial.intermediate_values == pytest.approx(expected, nan_ok=True)
        if trial.state == TrialState.PRUNED:
            assert summary.status == "stopped"
            assert trial.value == trial.intermediate_values[summary.step]
            assert summary.step in (10, 30)
        elif trial.state == TrialState.COMPLETE:
            assert summary.status == "finished"
            assert trial.value == pytest.approx(loss(trial.params, 90))
        else:
            assert summary.status == "diverged"
    best = min(loss(trial.params, 90) for trial in trials if trial.state == TrialState.PRUNED)
    assert driver.book.study.best_value <= best, "the best of a noiseless search is never taken off"


@pytest.mark.acceptance
def test_a_killed_search_goes_on_under_the_old_numbers(spec: Any, drive: Any) -> None:
    """Killed twice: every proposal is run to its end once, and those made before a kill are what they were."""
    first = drive(spec(), loss_of).run(14)
    second = drive(spec(), loss_of).run(20)
    assert second.order[0].number == first.running[0].job.number, "the open one is handed out first"
    third = drive(spec(), loss_of).run()
    assert third.book.num_left() == 0
    assert {n: first.proposals[n] for n in (0, 1)} == {n: third.proposals[n] for n in (0, 1)}
    for trial in third.book.study.get_trials():
        assert trial.state == TrialState.COMPLETE
        assert trial.intermediate_values == {s: pytest.approx(loss_of(trial.params, s)) for s in range(10, 91, 10)}
        assert trial.value == trial.intermediate_values[90]


@pytest.mark.acceptance
@pytest.mark.parametrize("sampler", sorted(SEARCHERS))
def test_with_a_lag_one_seed_gives_one_sequence_however_it_is_run(spec: Any, drive: Any, sampler: str) -> None:
    """Workers, order of ending and two kills make no difference to what is proposed."""
    options = {"population_size": 4} if sampler in ("nsgaii", "nsgaiii") else {}
    one = spec(sampler=sampler, options=options, lag=3, num_trials=12, train={"num_steps": 20})
    whole = drive(one, loss_of, "a").run().proposals
    assert drive(one, loss_of, "b", num_workers=3).run().proposals == whole
    drive(one, loss_of, "c", num_workers=2).run(7)
    drive(one, loss_of, "c", num_workers=2).run(6)
    assert drive(one, loss_of, "c", num_workers=2).run().proposals == whole
    other = drive(one.model_copy(update={"seed": 2}), loss_of, "d").run().proposals
    assert other != whole


@pytest.mark.acceptance
@pytest.mark.parametrize(
    "stopping",
    [
        {"name": "median", "min_steps": 20, "min_trials": 3},
        {"name": "forecast", "min_steps": 60, "min_finished": 2},
    ],
    ids=["median", "forecast"],
)
def test_a_rule_that_stops_is_the_same_after_a_kill(spec: Any, drive: Any, stopping: dict[str, Any]) -> None:
    """What is stopped stays so and is told as PRUNED; what the rule has learnt is learnt again from the rows."""
    one = spec(stopping=stopping, num_trials=9, sampler="random", train={"num_steps": 120})
    whole = drive(one, loss_of, "whole").run()
    drive(one, loss_of, "killed").run(30)
    again = drive(one, loss_of, "killed").run()
    for driver in (whole, again):
        assert driver.book.num_left() == 0
        trials = driver.book.study.get_trials()
        stopped = [trial for trial in trials if trial.state == TrialState.PRUNED]
        assert stopped
        for trial in stopped:
            summary = driver.folder.trial(f"t{trial.number:04d}").summary()
            assert (summary.status, summary.step) == ("stopped", max(trial.intermediate_values))
    assert [t.state for t in whole.book.study.get_trials()] == [t.state for t in again.book.study.get_trials()]


@pytest.mark.acceptance
def test_paused_trials_are_on_their_rungs_again_after_a_kill(spec: Any, drive: Any) -> None:
    one = spec(stopping=ASHA, num_trials=12)
    first = drive(one, loss_of, num_workers=2).run(24)
    paused, rungs = set(first.book._paused), first.book.rule.state()["rungs"]
    assert paused
    for trial in first.book.study.get_trials(deepcopy=False):
        if trial.number in paused:
            assert trial.intermediate_values, "whoever looks at the study sees how far it got"
    second = drive(one, loss_of, num_workers=2)
    assert second.book.rule.state()["rungs"] == rungs
    assert second.book._paused == paused
    assert {k for k, v in second.book.standing.items() if v == "paused"} == {f"t{n:04d}" for n in paused}
    second.run()
    assert second.book.num_left() == 0
    trials = second.book.study.get_trials()
    assert Counter(t.state for t in trials).keys() <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert not second.book._paused
    assert set(second.book.standing.values()) == {"stopped"}


@pytest.mark.acceptance
def test_halving_saves_more_than_half_and_keeps_the_best(spec: Any, drive: Any) -> None:
    """27 random trials: the best of them is trained to the end, for less than half of the updates of all."""
    driver = drive(spec(stopping=ASHA, num_trials=27, sampler="random"), loss_of).run()
    rungs = driver.book.rule.state()["rungs"]
    assert len(rungs[0]) == 27
    assert len(rungs[1]) >= 9
    assert driver.num_evals < 0.5 * 27 * 9
    best = min(driver.proposals, key=lambda n: loss_of(driver.proposals[n], 90))
    assert driver.book.study.best_trial.number == best


@pytest.mark.acceptance
def test_constraints_are_told_and_learnt(spec: Any, drive: Any, tiny: dict[str, Any]) -> None:
    """Sharpness above the bound is infeasible: the best is the best of those that keep it, off the optimum."""
    one = spec(constraints={"probe/sharpness": 60.0}, num_trials=30)

    def probes(values: dict[str, Any]) -> dict[str, float]:
        return {"sharpness": 2 / values["schedule.peak_lr"]}  # feasible from 1/30 on, the optimum is at 1/100

    driver = drive(one, loss_of, probes=probes).run()
    study = driver.book.study
    assert study.best_trial.params["schedule.peak_lr"] >= 1 / 30
    assert any(trial.value < study.best_trial.value for trial in study.get_trials())
    for trial in study.get_trials():
        expected = probes(trial.params)["sharpness"] - 60.0
        assert trial.constraints == {"probe/sharpness": pytest.approx(expected)}
    feasible = [t.constraints["probe/sharpness"] <= 0 for t in study.get_trials()]
    assert np.mean(feasible[15:]) >= np.mean(feasible[:10])


@pytest.mark.acceptance
def test_several_objectives_make_a_front(spec: Any, drive: Any) -> None:
    one = spec(objectives=["loss_nats", "probe/sharpness", "flops"], num_trials=12)
    driver = drive(one, loss_of, probes=lambda values: {"sharpness": 0.2 / values["schedule.peak_lr"]}).run()
    study = driver.book.study
    assert len(study.directions) == 3
    for trial in study.get_trials():
        assert trial.values[1] == pytest.approx(0.2 / trial.params["schedule.peak_lr"])
    front = {trial.number for trial in study.best_trials}
    for a in study.get_trials():
        dominated = any(
            all(x <= y for x, y in zip(b.values, a.values, strict=True)) and b.values != a.values
            for b in study.get_trials()
        )
        assert (a.number in front) == (not dominated)


def test_what_is_not_measured_is_infeasible_or_failed(spec: Any, drive: Any) -> None:
    driver = drive(spec(constraints={"probe/sharpness": 1.0}, num_trials=1), loss_of).run()
    assert driver.book.study.trials[0].constraints == {"probe/sharpness": math.inf}
    driver = drive(spec(objectives=["probe/sharpness"], num_trials=1), loss_of, "other").run()
    assert driver.book.study.trials[0].state == TrialState.FAIL


@pytest.mark.acceptance
def test_a_slow_sampler_keeps_no_trial_waiting(spec: Any, drive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a trial runs, `next` returns at once; what is proposed does not depend on how long it took."""
    import time

    from landscape_ray.sweep.searching import proposer

    quick = drive(spec(), loss_of, "quick").run().proposals
    original = proposer.Proposer.ask

    def slow(self: Any, *arguments: Any) -> Any:
        time.sleep(0.1)
        return original(self, *arguments)

    monkeypatch.setattr(proposer.Proposer, "ask", slow)
    driver = drive(spec(), loss_of, "slow")
    driver.run(max_evals=1)  # one trial is running
    start = time.monotonic()
    assert driver.book.next() == []
    assert time.monotonic() - start < 0.05
    assert driver.run().proposals == quick


@pytest.mark.acceptance
def test_higher_fidelities_are_new_runs_of_the_best(spec: Any, drive: Any) -> None:
    one = spec(fidelity={"name": "num_steps", "values": [10, 30, 90], "reduction_factor": 3}, num_trials=9)
    driver = drive(one, loss_of, num_workers=2).run()
    ids = Counter(job.trial_id for job in driver.order)
    assert set(ids.values()) == {1}
    levels = Counter("r" in name and int(name.partition("r")[2]) for name in ids)
    assert levels[0] == 9
    assert 1 <= levels[1] <= 3
    assert levels[2] <= 1
    for job in driver.order:
        level = int(job.trial_id.partition("r")[2] or 0)
        assert job.values["num_steps"] == [10, 30, 90][level]
        assert driver.folder.trial(job.trial_id).summary().status == "finished"
    trials = driver.book.study.get_trials()
    assert all("num_steps" not in trial.params for trial in trials)
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    assert [t.value for t in complete] == [pytest.approx(loss_of(t.params, 90)) for t in complete]
    for trial in trials:
        if trial.state == TrialState.PRUNED:
            assert trial.intermediate_values
            assert max(trial.intermediate_values) in (10, 30)


@pytest.mark.parametrize("killed_after", [1, 5, 9, 14])
def test_a_killed_search_over_fidelities_goes_on(spec: Any, drive: Any, killed_after: int) -> None:
    one = spec(fidelity={"name": "num_steps", "values": [10, 30, 90], "reduction_factor": 3}, num_trials=9)
    first = drive(one, loss_of, num_workers=2).run(killed_after)
    done = {job.trial_id for job in first.order} - {run.job.trial_id for run in first.running}
    second = drive(one, loss_of, num_workers=2).run()
    assert not done & {job.trial_id for job in second.order}, "a finished run was made again"
    assert second.book.num_left() == 0
    names = {job.trial_id for job in first.order + second.order}
    assert sum("r" not in name for name in names) == 9
    for name in names:
        if "r2" in name:
            assert name.replace("r2", "r1") in names


def test_a_failed_trial_stays_open_and_paused_ones_wait_for_it(spec: Any, drive: Any) -> None:
    driver = drive(spec(stopping=ASHA, num_trials=4), loss_of)
    (job,) = driver.book.next()
    driver.book.failed(job.number)
    driver.run()
    assert driver.book.num_left() >= 1
    assert driver.book._paused
    again = drive(spec(stopping=ASHA, num_trials=4), loss_of).run()
    assert job.number in [each.number for each in again.order]
    assert again.book.num_left() == 0


def test_a_lag_behind_a_failed_trial_ends_the_search_instead_of_hanging(spec: Any, drive: Any) -> None:
    driver = drive(spec(lag=1), loss_of)
    (job,) = driver.book.next()
    driver.book.failed(job.number)
    assert driver.book.next() is None
    assert driver.book.num_left() == 10


@pytest.mark.acceptance
def test_a_line_cut_off_by_a_kill_is_mended(spec: Any, drive: Any, tmp_path: Path) -> None:
    drive(spec(), loss_of).run(12)
    journal = tmp_path / "sweep" / "study.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 4, "worker')
    driver = drive(spec(), loss_of)
    assert journal.read_bytes().startswith(whole)
    driver.run()
    assert driver.book.num_left() == 0


def test_a_journal_of_an_earlier_version_is_refused(spec: Any, drive: Any) -> None:
    driver = drive(spec(), loss_of)
    driver.book.study.enqueue_trial({})
    with pytest.raises(UserError, match="written by an earlier version"):
        drive(spec(), loss_of)


def test_a_population_has_no_book(population_spec: SweepSpec, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no \[search\] table"):
        Book(population_spec, SweepFolder(tmp_path))


@pytest.mark.acceptance
def test_the_study_is_what_optuna_dashboard_opens(spec: Any, drive: Any) -> None:
    """Its command is `optuna-dashboard --storage-class JournalFileStorage FILE`."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    search = spec(num_trials=6)
    driver = drive(search, loss_of).run()
    storage = JournalStorage(JournalFileBackend(str(driver.folder.study_path)))
    (study,) = optuna.get_all_study_summaries(storage)
    assert (study.study_name, study.n_trials) == (search.name, 6)
    trials = optuna.load_study(study_name=search.name, storage=storage).get_trials()
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    for trial in trials:
        assert trial.value == pytest.approx(loss_of(trial.params, 90))
        assert len(trial.intermediate_values) == 9
        assert set(trial.distributions) == set(trial.params)
