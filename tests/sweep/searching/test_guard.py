import json
import tomllib
from collections.abc import Callable
from typing import Any

import pytest

from landscape_ray.config import parse
from landscape_ray.errors import UserError
from landscape_ray.sweep.searching.guard import LearningRateGuard, stable_lr
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.training import TrainConfig

SGD = {"name": "sgd", "momentum": 0.0}
SPACE = {"schedule.peak_lr": {"log_uniform": [1e-3, 1.0]}}
PROBES = {"sharpness": {"every_steps": 5, "batch_size": 2}}


def config(tiny: dict[str, Any], **optimizer: Any) -> TrainConfig:
    return parse(TrainConfig, {**tiny, "optimizer": optimizer}, "guard")


@pytest.fixture
def spec(sweep_text: Callable[..., str], tiny: dict[str, Any]) -> Callable[..., SweepSpec]:
    def make(space: dict[str, Any] = SPACE, train: dict[str, Any] | None = None, **guard: Any) -> SweepSpec:
        train = {**tiny, "optimizer": SGD, "probes": PROBES, **(train or {})}
        search = {"num_trials": 6, "sampler": "random", "guard": guard}
        return parse(SweepSpec, tomllib.loads(sweep_text(train=train, space=space, search=search)), "guard")

    return make


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("optimizer", "limit"),
    [
        ({"name": "sgd", "momentum": 0.0}, 2 / 50),
        ({"name": "sgd", "momentum": 0.9}, 2 * 1.9 / 50),
        ({"name": "sgd", "momentum": 0.9, "nesterov": True}, 2 * 1.9 / (2.8 * 50)),
        ({"name": "sgd", "momentum": 0.0, "weight_decay": 1.0, "l2": True}, 2 / 51),
        ({"name": "adamw", "beta1": 0.9, "weight_decay": 0.0}, 38 / 50),
        ({"name": "adamw", "beta1": 0.9, "weight_decay": 0.1}, 38 / (50 + 38 * 0.05)),
    ],
)
def test_the_limit_is_that_of_the_stability_condition(
    tiny: dict[str, Any], optimizer: dict[str, Any], limit: float
) -> None:
    assert stable_lr(config(tiny, **optimizer), 50.0) == pytest.approx(limit, rel=1e-9)


@pytest.mark.acceptance
def test_gradient_descent_on_a_quadratic_is_stable_just_below_the_limit_only(tiny: dict[str, Any]) -> None:
    for momentum in (0.0, 0.9):
        limit = stable_lr(config(tiny, name="sgd", momentum=momentum), 7.0)
        assert limit is not None
        for share, stable in ((0.99, True), (1.01, False)):
            x, velocity = 1.0, 0.0
            for _ in range(3000):
                velocity = momentum * velocity + 7.0 * x
                x -= share * limit * velocity
            assert (abs(x) < 1) == stable


def test_without_positive_curvature_or_a_condition_there_is_no_limit(tiny: dict[str, Any]) -> None:
    assert stable_lr(config(tiny, name="sgd"), -1.0) == float("inf")
    assert stable_lr(config(tiny, name="muon"), 5.0) is None
    assert stable_lr(config(tiny, name="sgd", momentum=0.0, weight_decay=10.0, l2=True), 5.0) == pytest.approx(2 / 15)


@pytest.mark.acceptance
def test_proposals_are_held_and_what_was_changed_is_noted(spec: Any) -> None:
    guard = LearningRateGuard(spec(margin=0.5))
    note: dict[str, Any] = {}
    assert guard.holder(0)({"schedule.peak_lr": 0.9}, note) == {"schedule.peak_lr": 0.9}
    guard.learn(0, {"schedule.peak_lr": 0.5}, {"sharpness": 10.0})
    guard.learn(1, {"schedule.peak_lr": 0.1}, {"sharpness": 30.0})
    guard.learn(1, {"schedule.peak_lr": 0.1}, {"sharpness": 900.0})  # later in the run: the first value stays
    hold = guard.holder(2)
    held = hold({"schedule.peak_lr": 0.9}, note)
    assert held["schedule.peak_lr"] == pytest.approx(0.5 * 2 / 20)
    assert note["clamp"]["proposed"] == 0.9
    assert note["clamp"]["held"] == held["schedule.peak_lr"]
    assert note["clamp"]["curvature"] == 20.0
    assert json.loads(json.dumps(note)) == note
    before = dict(note)
    assert hold({"schedule.peak_lr": 0.04}, note) == {"schedule.peak_lr": 0.04}
    assert guard.holder(1)({"schedule.peak_lr": 0.9}, {})["schedule.peak_lr"] == pytest.approx(0.1)
    guard.learn(2, {"schedule.peak_lr": 0.1}, {"sharpness": 1e9})
    assert guard.holder(3)({"schedule.peak_lr": 0.9}, {})["schedule.peak_lr"] >= 1e-3, "inside its domain"
    assert note == before


def test_another_model_has_a_landscape_of_its_own(spec: Any) -> None:
    guard = LearningRateGuard(spec({**SPACE, "model.width": {"choices": [16, 32]}}))
    guard.learn(0, {"schedule.peak_lr": 0.5, "model.width": 16}, {"sharpness": 100.0})
    hold = guard.holder(1)
    assert hold({"schedule.peak_lr": 0.9, "model.width": 32}, {})["schedule.peak_lr"] == 0.9
    assert hold({"schedule.peak_lr": 0.9, "model.width": 16}, {})["schedule.peak_lr"] == pytest.approx(0.02)


@pytest.mark.acceptance
def test_a_search_hands_out_held_rates_and_the_study_knows_them(spec: Any, drive: Any) -> None:
    """Switched off unless asked for; what was tried is what samplers learn from."""
    one = spec()
    driver = drive(one, lambda values, step: 1.0, probes=lambda values: {"sharpness": 40.0}).run()
    rates = {job.number: job.values["schedule.peak_lr"] for job in driver.order}
    assert max(rate for number, rate in rates.items() if number > 0) <= 0.05 * (1 + 1e-9)
    clamped = [job for job in driver.order if job.note]
    assert clamped
    for trial in driver.book.study.get_trials():
        assert trial.params["schedule.peak_lr"] == rates[trial.number]
        assert ("note" in trial.user_attrs) == (trial.number in {job.number for job in clamped})
    assert one.search is not None
    off = one.model_copy(update={"search": one.search.model_copy(update={"guard": None})})
    assert all(not job.note for job in drive(off, lambda values, step: 1.0, "off").run().order)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"space": {"batch_size": {"choices": [4, 8]}}}, "search.guard holds schedule.peak_lr, which is not searched"),
        ({"train": {"optimizer": {"name": "muon"}}}, "limit of stability is known, got 'muon'"),
        ({"train": {"probes": {}}}, r"search.guard needs \[train.probes.sharpness\]"),
        ({"train": {"optimizer": {"name": "adamw"}}}, r"needs \[train.probes.preconditioned_sharpness\]"),
        ({"margin": 0.0}, "'search.guard.margin' input should be greater than 0"),
    ],
)
def test_a_guard_that_cannot_work_is_refused(spec: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        spec(**arguments)
