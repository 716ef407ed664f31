"""The book under Ray Tune's interfaces; the rest of what it does is in test_book.py."""

import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from landscape_ray.domains import Domain
from landscape_ray.sweep.searching.book import Book
from landscape_ray.sweep.searching.searcher import OptunaSearcher, SearchScheduler
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.tracking.folder import SweepFolder


def make(spec: SweepSpec, path: Path) -> OptunaSearcher:
    path.mkdir(exist_ok=True)
    return OptunaSearcher(Book(spec, SweepFolder(path)), {"sweep_path": "p"})


def states(searcher: OptunaSearcher) -> list[TrialState]:
    return [t.state for t in searcher.book.study.get_trials()]


def done(loss: float, **more: Any) -> dict[str, Any]:
    return {"loss_nats": loss, "ended": True, "done": True, "measures": [["loss_nats", loss]], "evals": [], **more}


def suggested(searcher: OptunaSearcher, name: str) -> dict[str, Any]:
    for _ in range(10_000):
        if (config := searcher.suggest(name)) is not None:
            assert isinstance(config, dict)
            return config
    raise AssertionError("nothing is suggested")


def test_initial_points_come_first_then_proposals_then_the_end(search_spec: SweepSpec, tmp_path: Path) -> None:
    searcher = make(search_spec, tmp_path)
    given = []
    for number in range(5):
        config = suggested(searcher, f"ray{number}")
        assert config["sweep_path"] == "p"
        assert config["trial"]["trial_id"] == f"t{number:04d}"
        given.append(config["trial"]["values"])
        searcher.on_trial_complete(f"ray{number}", done(3.0 - number))
    assert [v["schedule.name"] for v in given[:3]] == ["constant", "linear", "cosine"]
    for values in given:
        assert ("schedule.cooldown_fraction" in values) == (values["schedule.name"] == "wsd")
        assert all(search_spec.space[name].contains(value) for name, value in values.items())
    assert searcher.suggest("ray5") == "FINISHED"
    assert searcher.book.study.best_value == -1.0


@pytest.mark.parametrize(
    ("result", "error"), [(None, True), (None, False), ({"loss_nats": 1.0, "done": True}, False), ({}, True)]
)
def test_interrupted_and_failed_trials_stay_open(
    search_spec: SweepSpec, tmp_path: Path, result: dict[str, Any] | None, error: bool
) -> None:
    """Ray's own `done` says nothing: it is set for a trial that is taken off as well."""
    searcher = make(search_spec, tmp_path)
    first = suggested(searcher, "a")
    searcher.on_trial_complete("a", result, error)
    assert states(searcher) == [TrialState.RUNNING]
    assert suggested(make(search_spec, tmp_path), "b") == first


@pytest.mark.acceptance
def test_results_are_told_with_their_losses_and_divergence_as_failure(search_spec: SweepSpec, tmp_path: Path) -> None:
    searcher = make(search_spec, tmp_path)
    for name in "ab":
        suggested(searcher, name)
    searcher.on_trial_result("a", {"evals": [[0, 4.0], [5, 3.0]]})
    searcher.on_trial_complete("a", done(2.5, evals=[[10, 2.5]]))
    searcher.on_trial_complete("b", done(2.0, diverged=True))
    assert states(searcher) == [TrialState.COMPLETE, TrialState.FAIL]
    first = searcher.book.study.trials[0]
    assert first.intermediate_values == {0: 4.0, 5: 3.0, 10: 2.5}
    assert first.value == 2.5


def test_a_stale_lock_does_not_hang(search_spec: SweepSpec, tmp_path: Path) -> None:
    (tmp_path / "study.journal.lock").write_text("")
    assert suggested(make(search_spec, tmp_path), "a")


@pytest.mark.parametrize("seed", [0, 5000, 2**40])
def test_any_seed_will_do(search_spec: SweepSpec, tmp_path: Path, seed: int) -> None:
    searcher = make(search_spec.model_copy(update={"seed": seed}), tmp_path)
    for number in range(5):
        suggested(searcher, str(number))
        searcher.on_trial_complete(str(number), done(float(number)))


def test_quasi_random_points_fill_the_space_evenly(search_spec: SweepSpec, tmp_path: Path) -> None:
    assert search_spec.search is not None
    search = search_spec.search.model_copy(update={"sampler": "qmc", "num_trials": 33, "initial": []})
    space = {name: Domain(uniform=[0.0, 1.0]) for name in ("a", "b")}
    searcher = make(search_spec.model_copy(update={"search": search, "space": space}), tmp_path)
    points = []
    for number in range(33):
        points.append(suggested(searcher, str(number))["trial"]["values"])
        searcher.on_trial_complete(str(number), done(1.0))
    # the first is random (Optuna learns the space from it); of the others every eighth of each axis holds four
    for name in ("a", "b"):
        counts = np.histogram([point[name] for point in points[1:]], bins=8, range=(0, 1))[0]
        assert counts.tolist() == [4] * 8


def test_the_end_of_a_finite_loss_is_a_failure_if_it_is_nan(search_spec: SweepSpec, tmp_path: Path) -> None:
    searcher = make(search_spec, tmp_path)
    suggested(searcher, "a")
    searcher.on_trial_complete("a", done(math.nan))
    assert states(searcher) == [TrialState.FAIL]


def test_one_trial_more_than_there_is_room_for_is_out(
    search_spec: SweepSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer would keep workers from being started, more would propose before results are there that could be used."""
    from landscape_ray.sweep.searching import searcher as module

    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    room = [1]
    searcher = OptunaSearcher(Book(search_spec, SweepFolder(tmp_path)), {}, lambda: room[0])
    for number in range(2):
        suggested(searcher, f"ray{number}")
    assert [searcher.suggest("ray2") for _ in range(50)] == [None] * 50
    searcher.on_trial_complete("ray0", done(1.0))
    suggested(searcher, "ray2")
    assert searcher.suggest("ray3") is None
    room[0] = 2
    assert searcher.suggest("ray3") is None, "it is not asked at every turn"
    now[0] = module.ROOM_SECONDS + 1
    suggested(searcher, "ray3")
    searcher.book.close()


def test_trials_run_in_the_order_of_ray_tunes_own_scheduler() -> None:
    """Ours asks nobody about trials that have ended: that would be all of them at each event."""
    ours, theirs = SearchScheduler(), FIFOScheduler()
    assert pickle.dumps(ours)
    trials: list[Any] = []
    controller = SimpleNamespace(get_trials=lambda: trials)
    asked: list[int] = []

    class Asked(SimpleNamespace):
        def is_finished(self) -> bool:
            asked.append(self.number)
            return self.status in (Trial.TERMINATED, Trial.ERROR)

    generator = np.random.default_rng(0)
    ends = [Trial.PENDING, Trial.PAUSED, Trial.RUNNING, Trial.TERMINATED, Trial.ERROR]
    for number in range(300):
        trials.append(trial := Asked(number=number, status=Trial.PENDING, placement_group_factory=f"{number % 2} CPU"))
        ours.on_trial_add(controller, trial)
        for changed in trials[-6:]:  # those that have ended stay so
            if changed.status not in ends[3:]:
                changed.status = ends[generator.integers(5)]
        if number >= 6 and trials[-7].status not in ends[3:]:
            trials[-7].status = Trial.TERMINATED
        assert ours.choose_trial_to_run(controller) is theirs.choose_trial_to_run(controller)
    asked.clear()
    ours.choose_trial_to_run(controller)
    assert len(asked) < 8
    assert len({id(trial.placement_group_factory) for trial in trials}) == 2, "of equal requests there is one"
    for trial in trials:
        trial.status = Trial.ERROR
    assert ours.choose_trial_to_run(controller) is None
