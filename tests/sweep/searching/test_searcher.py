import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState

from landscape_ray.domains import Domain
from landscape_ray.errors import UserError
from landscape_ray.records import RunSummary
from landscape_ray.sweep.searcher import SEARCHERS, OptunaSearcher
from landscape_ray.sweep.spec import SweepSpec


def summary(trial_id: str, status: Any, loss: float = math.nan) -> RunSummary:
    return RunSummary(run_id=trial_id, status=status, config={}, varied={}, final_loss_nats=loss)


def make(spec: SweepSpec, path: Path, known: dict[str, RunSummary] | None = None) -> OptunaSearcher:
    return OptunaSearcher(spec, path / "study.journal", (known or {}).get, {"sweep_path": "p"})


def states(searcher: OptunaSearcher) -> list[TrialState]:
    return [t.state for t in searcher.study.get_trials() if t.state != TrialState.WAITING]


def test_initial_points_come_first_then_proposals_then_the_end(search_spec: SweepSpec, tmp_path: Path) -> None:
    searcher = make(search_spec, tmp_path)
    given = []
    for number in range(5):
        config = searcher.suggest(f"ray{number}")
        assert isinstance(config, dict)
        assert config["sweep_path"] == "p"
        assert config["trial"]["trial_id"] == f"t{number:04d}"
        given.append(config["trial"]["values"])
        searcher.on_trial_complete(f"ray{number}", {"loss_nats": 3.0 - number, "done": True})
    assert [v["schedule.name"] for v in given[:3]] == ["constant", "linear", "cosine"]
    for values in given:
        assert ("schedule.cooldown_fraction" in values) == (values["schedule.name"] == "wsd")
        assert all(search_spec.space[name].contains(value) for name, value in values.items())
    assert searcher.suggest("ray5") == "FINISHED"
    assert searcher.study.best_value == -1.0


def test_one_seed_one_sequence(search_spec: SweepSpec, tmp_path: Path) -> None:
    def sequence(path: Path, spec: SweepSpec) -> list[Any]:
        path.mkdir()
        searcher = make(spec, path)
        out = []
        for number in range(5):
            out.append(searcher.suggest(str(number))["trial"]["values"])  # type: ignore[index]
            searcher.on_trial_complete(str(number), {"loss_nats": float(number), "done": True})
        return out

    other = search_spec.model_copy(update={"seed": 2})
    first = sequence(tmp_path / "a", search_spec)
    assert first == sequence(tmp_path / "b", search_spec)
    assert first != sequence(tmp_path / "c", other)


def test_a_new_driver_settles_what_ended_and_hands_out_the_rest(search_spec: SweepSpec, tmp_path: Path) -> None:
    killed = make(search_spec, tmp_path)
    before = [killed.suggest(str(number)) for number in range(4)]
    known = {
        "t0000": summary("t0000", "finished", 2.5),
        "t0001": summary("t0001", "diverged"),
        "t0002": summary("t0002", "running", 9.0),
    }
    searcher = make(search_spec, tmp_path, known)
    assert states(searcher)[:2] == [TrialState.COMPLETE, TrialState.FAIL]
    assert searcher.study.best_value == 2.5
    assert searcher.num_left() == 3
    again = [searcher.suggest(f"new{i}") for i in range(3)]
    assert again[:2] == before[2:]
    assert again[2]["trial"]["trial_id"] == "t0004"  # type: ignore[index]
    assert searcher.suggest("more") == "FINISHED"


def test_a_trial_half_asked_is_completed_with_the_values_it_has(search_spec: SweepSpec, tmp_path: Path) -> None:
    killed = make(search_spec, tmp_path)
    for number in range(3):
        killed.suggest(str(number))
        killed.on_trial_complete(str(number), {"loss_nats": 1.0, "done": True})
    trial = killed.study.ask()
    trial.suggest_categorical("schedule.name", ["constant", "linear", "cosine", "wsd"])  # and here the driver dies
    chosen = trial.params["schedule.name"]
    config = make(search_spec, tmp_path).suggest("x")
    values = config["trial"]["values"]  # type: ignore[index]
    assert values["schedule.name"] == chosen
    assert "schedule.peak_lr" in values


@pytest.mark.parametrize(
    ("result", "error"), [(None, True), (None, False), ({"loss_nats": 1.0, "done": False}, False), ({}, True)]
)
def test_interrupted_and_failed_trials_stay_open(
    search_spec: SweepSpec, tmp_path: Path, result: dict[str, Any] | None, error: bool
) -> None:
    searcher = make(search_spec, tmp_path)
    first = searcher.suggest("a")
    searcher.on_trial_complete("a", result, error)
    assert states(searcher) == [TrialState.RUNNING]
    assert make(search_spec, tmp_path).suggest("b") == first


def test_divergence_is_told_as_failure(search_spec: SweepSpec, tmp_path: Path) -> None:
    searcher = make(search_spec, tmp_path)
    searcher.suggest("a")
    searcher.on_trial_complete("a", {"loss_nats": math.nan, "done": True, "diverged": True})
    assert states(searcher) == [TrialState.FAIL]


def test_a_stale_lock_does_not_hang(search_spec: SweepSpec, tmp_path: Path) -> None:
    (tmp_path / "study.journal.lock").write_text("")
    assert make(search_spec, tmp_path).suggest("a") is not None


@pytest.mark.parametrize("sampler", sorted(SEARCHERS))
def test_every_sampler_proposes_inside_the_space(search_spec: SweepSpec, tmp_path: Path, sampler: Any) -> None:
    assert search_spec.search is not None
    spec = search_spec.model_copy(
        update={"search": search_spec.search.model_copy(update={"sampler": sampler, "num_trials": 8})}
    )
    searcher = make(spec, tmp_path)
    for number in range(8):
        values = searcher.suggest(str(number))["trial"]["values"]  # type: ignore[index]
        assert all(spec.space[name].contains(value) for name, value in values.items())
        searcher.on_trial_complete(str(number), {"loss_nats": float(number % 3), "done": True})


@pytest.mark.parametrize("seed", [0, 5000, 2**40])
def test_any_seed_will_do(search_spec: SweepSpec, tmp_path: Path, seed: int) -> None:
    searcher = make(search_spec.model_copy(update={"seed": seed}), tmp_path)
    for number in range(5):
        assert searcher.suggest(str(number)) != "FINISHED"
        searcher.on_trial_complete(str(number), {"loss_nats": float(number), "done": True})


def test_quasi_random_points_fill_the_space_evenly(search_spec: SweepSpec, tmp_path: Path) -> None:
    assert search_spec.search is not None
    search = search_spec.search.model_copy(update={"sampler": "qmc", "num_trials": 33, "initial": []})
    space = {name: Domain(uniform=[0.0, 1.0]) for name in ("a", "b")}
    searcher = make(search_spec.model_copy(update={"search": search, "space": space}), tmp_path)
    points = []
    for number in range(33):
        points.append(searcher.suggest(str(number))["trial"]["values"])  # type: ignore[index]
        searcher.on_trial_complete(str(number), {"loss_nats": 1.0, "done": True})
    # the first is random (Optuna learns the space from it); of the others every eighth of each axis holds four
    for name in ("a", "b"):
        counts = np.histogram([point[name] for point in points[1:]], bins=8, range=(0, 1))[0]
        assert counts.tolist() == [4] * 8


def test_a_population_has_no_searcher(population_spec: SweepSpec, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no \[search\] table"):
        make(population_spec, tmp_path)
