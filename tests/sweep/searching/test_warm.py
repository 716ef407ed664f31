"""Earlier sweeps as what they are to a new one: results where they compare, points to try where they do not."""

import math
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from rich.console import Console

from landscape_ray.config import parse
from landscape_ray.errors import UserError
from landscape_ray.sweep.searching.warm import PRIOR, warm_start
from landscape_ray.sweep.session import new_sweep, train_one
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.tracking.uris import default_tracking_uri

SPACE = {"schedule.peak_lr": {"log_uniform": [1e-3, 1e-1]}}


def loss_of(values: dict[str, Any], step: int) -> float:
    rate = values["schedule.peak_lr"]
    return math.nan if rate > 0.08 else 1 + math.log10(rate / 1e-2) ** 2 + 1 / step


@pytest.fixture
def spec(sweep_text: Callable[..., str], tiny: dict[str, Any]) -> Callable[..., SweepSpec]:
    def make(train: dict[str, Any] | None = None, space: dict[str, Any] = SPACE, **search: Any) -> SweepSpec:
        text = sweep_text(
            train={**tiny, **(train or {})}, space=space, search={"num_trials": 8, "sampler": "random", **search}
        )
        return parse(SweepSpec, tomllib.loads(text), "warm")

    return make


@pytest.fixture
def earlier(spec: Any, drive: Any, tmp_path: Path) -> Path:
    """A finished sweep of eight trials, one of which diverged."""
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "sweep.json").write_text('{"format_version": 1, "name": "earlier"}')
    initial = [{"schedule.peak_lr": 0.09}, {"schedule.peak_lr": 0.0101}]
    drive(spec(initial=initial), loss_of, "earlier").run()
    return tmp_path / "earlier"


@pytest.mark.acceptance
def test_results_of_runs_that_compare_are_trials_of_the_new_study(spec: Any, drive: Any, earlier: Path) -> None:
    one = spec(sampler="tpe", num_trials=5, warm_start={"sources": [str(earlier)]})
    driver = drive(one, loss_of).run(2)
    again = drive(one, loss_of).run()
    trials = again.book.study.get_trials()
    assert len(trials) == 13
    assert again.book.num_left() == 0
    assert [t.user_attrs.get(PRIOR) for t in trials[:8]] == [f"earlier/t{n:04d}" for n in range(8)]
    assert trials[0].state == TrialState.FAIL
    for trial in trials[1:8]:
        assert trial.value == pytest.approx(loss_of(trial.params, 10))
    assert sorted({job.trial_id for job in driver.order + again.order}) == [f"t{n:04d}" for n in range(5)]
    near = sorted(abs(math.log10(t.params["schedule.peak_lr"]) + 2) for t in trials[8:])
    assert near[0] < 0.5


@pytest.mark.acceptance
def test_the_best_points_of_another_model_are_tried_first(spec: Any, drive: Any, earlier: Path) -> None:
    one = spec(
        {"model": {"depth": 1, "width": 32, "num_heads": 2}},
        num_trials=4,
        warm_start={"sources": [str(earlier)], "use": "points", "num_points": 2},
    )
    driver = drive(one, loss_of).run()
    assert driver.order[0].values == {"schedule.peak_lr": 0.0101}
    losses = [loss_of(job.values, 10) for job in driver.order]
    assert losses[0] <= losses[1]
    assert len(driver.book.study.get_trials()) == 4
    assert all(PRIOR not in trial.user_attrs for trial in driver.book.study.get_trials())


@pytest.mark.acceptance
def test_an_mlflow_experiment_is_a_source(
    spec: Any, sweep_text: Any, tiny: dict[str, Any], tmp_path: Path, store_template: Path
) -> None:
    results = tmp_path / "runs"
    results.mkdir()
    shutil.copy(store_template, results / "mlflow.db")
    text = sweep_text(train=tiny, space=SPACE, search={"num_trials": 1})
    old = parse(SweepSpec, tomllib.loads(text), "old")
    assert train_one(new_sweep(old, text, results, "old", None), Console(quiet=True)).status == "finished"
    one = spec(warm_start={"sources": ["mlflow:landscape_ray"]})
    assert one.search is not None
    assert one.search.warm_start is not None
    found = warm_start(one, one.search.warm_start, default_tracking_uri(results))
    (prior,) = found.results
    assert prior.values == {"schedule.peak_lr": 1e-3}
    assert prior.source.startswith("mlflow:landscape_ray/")
    assert prior.outcome.state == "complete"
    with pytest.raises(UserError, match="needs a tracking server"):
        warm_start(one, one.search.warm_start)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": {"num_steps": 20}}, r"got 8, none of them \(8 differ in num_steps\); use = 'points'"),
        ({"space": {"schedule.peak_lr": {"uniform": [0.5, 0.6]}}}, "8 have schedule.peak_lr outside its domain"),
    ],
)
def test_sources_that_do_not_fit_say_why(spec: Any, earlier: Path, arguments: dict[str, Any], message: str) -> None:
    one = spec(**arguments, warm_start={"sources": [str(earlier)]})
    assert one.search.warm_start is not None
    with pytest.raises(UserError, match=message):
        warm_start(one, one.search.warm_start)


def test_points_need_a_run_that_ended(spec: Any, earlier: Path) -> None:
    space = {"schedule.peak_lr": {"uniform": [0.085, 0.095]}}
    one = spec(space=space, warm_start={"sources": [str(earlier)], "use": "points"})
    with pytest.raises(UserError, match="must hold runs that fit this sweep, got 8"):
        warm_start(one, one.search.warm_start)
