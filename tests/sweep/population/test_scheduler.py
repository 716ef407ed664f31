"""What Ray Tune is told: who goes on, who makes room, who ends."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.tune.experiment import Trial

from landscape_ray.errors import UserError
from landscape_ray.populations import Point
from landscape_ray.populations.decisions import points_to_json
from landscape_ray.sweep.population.book import PopulationBook
from landscape_ray.sweep.population.scheduler import PopulationScheduler
from landscape_ray.sweep.spec import spec_of
from tests.sweep.population.local import make

Text = Callable[..., str]


class FakeTrial:
    def __init__(self, member: int, status: str) -> None:
        self.member, self.status, self.tries_left = member, status, True
        self.config: dict[str, Any] = {"exchange": "e", "trial": {"trial_id": f"t{member:04d}", "values": {}}}

    def __str__(self) -> str:
        return f"t{self.member:04d}"

    def should_recover(self) -> bool:
        return self.tries_left

    def reset(self) -> "FakeTrial":
        return FakeTrial(self.member, Trial.PENDING)

    def set_config(self, config: dict[str, Any]) -> None:
        self.config = config


class FakeController:
    """Keeps trials in their states as Ray's does."""

    def __init__(self, members: int, running: int) -> None:
        self.trials = [FakeTrial(m, Trial.RUNNING if m < running else Trial.PENDING) for m in range(members)]

    def get_trials(self) -> list[FakeTrial]:
        return self.trials

    def pause_trial(self, trial: FakeTrial, should_checkpoint: bool = True) -> None:
        assert not should_checkpoint
        assert trial.status == Trial.RUNNING
        trial.status = Trial.PAUSED

    def add_trial(self, trial: FakeTrial) -> None:
        trial.config = {**trial.config}  # Ray fills in what a grid search has chosen
        self.trials.append(trial)

    def stop_trial(self, trial: FakeTrial) -> None:
        assert trial.status == Trial.PAUSED
        trial.status = Trial.TERMINATED


class FakeExchange:
    """Notes what is called on it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        class Method:
            @staticmethod
            def remote(*arguments: Any) -> None:
                self.calls.append((name, arguments))

        return Method


def population(
    text: Text, tmp_path: Path, running: int, **table: Any
) -> tuple[PopulationScheduler, FakeController, FakeExchange]:
    folder = make(tmp_path / "s", text(**table))
    exchange = FakeExchange()
    scheduler = PopulationScheduler(PopulationBook(spec_of(folder), folder), exchange, running)
    return scheduler, FakeController(4, running), exchange


def report(scheduler: PopulationScheduler, controller: Any, member: int, step: int, serial: int) -> str:
    result = {
        "serial": serial,
        "reached": True,
        "num_tokens": step,
        "points": points_to_json((Point(step, 1.0 + member, 0.1),)),
    }
    answer = scheduler.on_trial_result(controller, controller.trials[member], result)
    scheduler._pool.submit(lambda: None).result()  # what was to be saved is saved
    return answer


def test_with_room_for_all_nobody_is_ever_paused(text: Text, tmp_path: Path) -> None:
    scheduler, controller, exchange = population(text, tmp_path, 4, synchronous=True)
    trials: Any = controller
    between = {"serial": 0, "reached": False, "num_tokens": 3, "points": []}
    assert scheduler.on_trial_result(trials, trials.trials[0], between) == "CONTINUE"
    answers = [report(scheduler, controller, member, 5, 0) for member in range(4)]
    assert answers == ["CONTINUE"] * 4
    assert [name for name, _ in exchange.calls] == ["publish", "publish"]
    ((orders, needed),) = [arguments for _, arguments in exchange.calls[1:]]
    assert {weights.serial for weights in needed} == {0, 1}  # those reported, and those that the next orders will be
    assert [order.serial for order in orders] == [1] * 4
    assert scheduler.choose_trial_to_run(trials) is None
    assert scheduler.__getstate__() == {}
    assert scheduler.debug_string() == ""


@pytest.mark.parametrize("synchronous", [True, False], ids=["sync", "async"])
def test_without_room_members_take_turns(text: Text, tmp_path: Path, synchronous: bool) -> None:
    scheduler, controller, _ = population(text, tmp_path, 2, synchronous=synchronous)
    trials: Any = controller
    assert report(scheduler, controller, 0, 5, 0) == "NOOP"
    assert controller.trials[0].status == Trial.PAUSED
    assert scheduler.choose_trial_to_run(trials) is controller.trials[2], "has made no update yet"
    controller.trials[2].status = controller.trials[3].status = Trial.RUNNING
    if synchronous:
        assert scheduler.choose_trial_to_run(trials) is None, "the first one waits for the others"
        assert report(scheduler, controller, 1, 5, 0) == "CONTINUE", "nobody needs its place"
        assert report(scheduler, controller, 2, 5, 0) == "CONTINUE"
        assert report(scheduler, controller, 3, 5, 0) == "NOOP", "now the first one can go on"
    assert scheduler.choose_trial_to_run(trials) is controller.trials[0]


def test_the_end_reaches_those_that_are_paused(text: Text, tmp_path: Path) -> None:
    scheduler, controller, exchange = population(text, tmp_path, 2, synchronous=True, interval_steps=20)
    for member in range(3):
        controller.trials[member].status = Trial.RUNNING
        report(scheduler, controller, member, 20, 0)
        controller.trials[member].status = Trial.PAUSED
    trials: Any = controller
    controller.trials[3].status = Trial.RUNNING
    assert report(scheduler, controller, 3, 20, 0) == "STOP"
    assert scheduler.choose_trial_to_run(trials) is None
    assert [trial.status for trial in controller.trials[:3]] == [Trial.TERMINATED] * 3
    assert all(order.stops for order in exchange.calls[-1][1][0])
    assert scheduler.book.open == []


def fail(scheduler: PopulationScheduler, controller: Any, trial: FakeTrial) -> None:
    trial.tries_left = False
    scheduler.on_trial_error(controller, trial)  # type: ignore[arg-type]
    trial.status = Trial.ERROR
    scheduler._pool.submit(lambda: None).result()


@pytest.mark.acceptance
def test_nobody_waits_for_a_member_that_has_failed_for_good(text: Text, tmp_path: Path) -> None:
    """It goes on in a trial anew, as a copy of another; that trial must not ask for the order that it failed of."""
    scheduler, controller, exchange = population(text, tmp_path, 4, synchronous=True)
    trials: Any = controller
    trials.trials[1].status = Trial.ERROR  # so it is while Ray puts it back into the queue
    scheduler.on_trial_error(trials, trials.trials[1])
    trials.trials[1].status = Trial.RUNNING
    assert report(scheduler, controller, 0, 5, 0) == "CONTINUE", "it is tried again"
    fail(scheduler, trials, trials.trials[1])
    assert exchange.calls[-1][1][0] == [], "nobody has been told anything"
    assert report(scheduler, controller, 2, 5, 0) == "CONTINUE"
    assert len(controller.trials) == 4
    assert report(scheduler, controller, 3, 5, 0) == "CONTINUE"
    assert [order.serial for order in exchange.calls[-1][1][0]] == [1] * 4
    again = controller.trials[4]
    order = scheduler.book.orders[1]
    assert (str(again), again.status) == ("t0001", Trial.PENDING)
    given = {"serial": 1, "values": order.decision.values, "donor": order.decision.donor}
    assert again.config["trial"] == {"trial_id": "t0001", **given}
    assert again.config["exchange"] == "e"
    assert (order.decision.action, order.decision.reason) == ("exploit", "failed: t0001")
    assert scheduler.choose_trial_to_run(trials) is again
    fail(scheduler, trials, again)
    assert [report(scheduler, controller, member, 10, 1) for member in (0, 2, 3)] == ["CONTINUE"] * 3
    assert len(controller.trials) == 5, "it has been replaced as often as it may be tried again: once"
    assert scheduler.choose_trial_to_run(trials) is None
    assert len(scheduler.book.open) == 4, "left for the next driver"


def test_a_process_that_dies_while_its_member_waits_costs_nothing(text: Text, tmp_path: Path) -> None:
    """The member has reported: it goes on by the order that it waits for, and nobody is copied in its place."""
    scheduler, controller, _ = population(text, tmp_path, 4, synchronous=True)
    trials: Any = controller
    for member in range(3):
        report(scheduler, controller, member, 5, 0)
    fail(scheduler, trials, trials.trials[0])
    assert len(controller.trials) == 4
    report(scheduler, controller, 3, 5, 0)
    assert [str(trial) for trial in controller.trials[4:]] == ["t0000"]
    assert scheduler.book.orders[0].decision.action == "continue"
    assert scheduler.book.strategy.failures == []


def test_a_trial_that_ray_gives_up_before_it_runs_has_failed(text: Text, tmp_path: Path) -> None:
    """Ray tries those again that were running only, however many attempts are left."""
    scheduler, controller, _ = population(text, tmp_path, 4)
    trials: Any = controller
    trials.trials[1].status = Trial.PENDING
    scheduler.on_trial_error(trials, trials.trials[1])
    assert scheduler.book.strategy.members[1].failure == "t0001"


def test_when_all_have_failed_the_population_ends(text: Text, tmp_path: Path) -> None:
    scheduler, controller, exchange = population(text, tmp_path, 4, synchronous=True)
    trials: Any = controller
    for trial in list(trials.trials):
        fail(scheduler, trials, trial)
    assert len(controller.trials) == 4
    assert {member.status for member in scheduler.book.strategy.members.values()} == {"failed"}
    assert exchange.calls[-1][1][0] == []
    scheduler.close()


def test_a_book_that_cannot_be_saved_ends_the_population(
    text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody hears of orders that are not on disk."""
    scheduler, controller, exchange = population(text, tmp_path, 4)

    def full(draft: Any) -> None:
        raise UserError("cannot write population.json: no space left on device; free some space")

    monkeypatch.setattr(scheduler.book, "save", full)
    report(scheduler, controller, 0, 5, 0)
    report(scheduler, controller, 1, 5, 0)
    assert [name for name, _ in exchange.calls] == ["publish", "close"]
    with pytest.raises(UserError, match="no space left on device"):
        scheduler.close()


def test_without_synchrony_a_member_is_replaced_as_soon_as_there_is_somebody_to_copy(
    text: Text, tmp_path: Path
) -> None:
    scheduler, controller, _ = population(text, tmp_path, 4)
    trials: Any = controller
    fail(scheduler, trials, trials.trials[1])
    assert len(controller.trials) == 4
    assert report(scheduler, controller, 0, 5, 0) == "CONTINUE"
    assert [str(trial) for trial in controller.trials[4:]] == ["t0001"]
    assert scheduler.book.orders[1].decision.donor == 0
