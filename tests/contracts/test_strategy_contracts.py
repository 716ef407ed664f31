"""What every strategy has to keep, in both modes, among members of different speed of which some diverge."""

import functools
import itertools
import math

import pytest

from landscape_ray.domains import Domain
from landscape_ray.errors import UserError
from landscape_ray.populations import STRATEGIES, Decision, Failure, Observation, Point, Strategy
from landscape_ray.populations.simulation import LawCurves, Simulator
from landscape_ray.populations.strategy import STATE_VERSION
from landscape_ray.registry import resolve
from tests.populations.conftest import (
    NUM_STEPS,
    OPTIONS,
    SCHEDULE,
    SPACE,
    History,
    make,
    name,
    resumed,
    simulate,
    synchronous,
)

__all__ = ["name", "synchronous"]


@functools.cache
def played(name: str, synchronous: bool, **problem: float) -> tuple[Strategy, History]:
    """Return a population at its end and its history, which many tests look at and none changes."""
    strategy = make(name, synchronous=synchronous)
    return strategy, simulate(strategy, **problem)


def test_everything_registered_is_in_the_suite() -> None:
    assert set(STRATEGIES) == set(OPTIONS)
    assert all(key == strategy.name for key, strategy in STRATEGIES.items())


def test_a_path_names_a_strategy_of_ones_own() -> None:
    found = resolve("landscape_ray.populations.strategies:Truncation", STRATEGIES, "population.strategy")
    assert found is STRATEGIES["truncation"]


def test_values_stay_inside_their_domains(name: str, synchronous: bool) -> None:
    history = simulate(make(name, synchronous=synchronous, factors=(0.1, 10.0), resample_probability=0.2))
    decided = [decision for _, decisions in history for decision in decisions]
    assert len(decided) >= 8
    for decision in decided:
        assert all(domain.contains(decision.values[key]) for key, domain in SPACE.items()), decision


@pytest.mark.acceptance
def test_one_seed_gives_one_history(name: str, synchronous: bool) -> None:
    histories = [simulate(make(name, synchronous=synchronous, seed=seed)) for seed in (5, 5, 6)]
    assert histories[0] == histories[1]
    assert histories[0] != histories[2]


@pytest.mark.acceptance
def test_resuming_at_every_decision_gives_the_same_history(name: str, synchronous: bool) -> None:
    def fresh() -> Strategy:
        return make(name, synchronous=synchronous)

    _, straight = played(name, synchronous)
    strategy = fresh()
    simulator = Simulator(LawCurves(SCHEDULE), strategy, seed=3, spread=0.3)
    broken = []
    for step in simulator.run():
        broken.append(step)
        simulator.strategy = resumed(simulator.strategy, fresh)
    assert broken == straight
    assert simulator.strategy.finished
    assert simulator.strategy.state_dict() == resumed(simulator.strategy, fresh).state_dict()


def test_the_donor_step_is_the_step_of_the_copied_weights(name: str, synchronous: bool) -> None:
    at: dict[int, int] = {}  # the step of the weights that each member holds as its last observation
    for observation, decisions in played(name, synchronous)[1]:
        at[observation.member] = observation.step
        before = dict(at)
        for decision in decisions:
            assert (decision.donor is None) == (decision.donor_step is None)
            if decision.donor is not None:
                assert decision.donor_step == before[decision.donor]
                at[decision.member] = before[decision.donor]
            assert decision.action == "stop" or at[decision.member] < decision.until_step <= NUM_STEPS


@pytest.mark.acceptance
def test_diverged_members_are_replaced(name: str, synchronous: bool) -> None:
    if name == "independent":
        pytest.skip("members of a random search are not replaced")
    strategy, history = played(name, synchronous, divergence=0.01)  # a third of the initial members
    state: dict[int, Observation] = {}
    num_replaced = 0
    for observation, decisions in history:
        state[observation.member] = observation
        racing = [o for o in state.values() if math.isfinite(o.loss) and o.step < NUM_STEPS]
        for decision in decisions:
            if not math.isfinite(state[decision.member].loss):
                num_replaced += decision.action == "exploit"
                # only where everybody else is at the horizon, or as bad, is there nobody left to copy
                assert decision.action in ("exploit", "restart") or not racing
    assert num_replaced >= 1
    assert strategy.finished


def test_nobody_is_copied_once_it_has_diverged(name: str, synchronous: bool) -> None:
    losses: dict[int, float] = {}
    for observation, decisions in played(name, synchronous, divergence=0.01)[1]:
        losses[observation.member] = observation.loss
        before = dict(losses)
        for decision in decisions:
            if decision.donor is not None:
                assert math.isfinite(before[decision.donor])
                losses[decision.member] = before[decision.donor]


class Failing:
    """A strategy that is told of failures in place of some reports: every `every`-th; `broken` members never report."""

    def __init__(self, strategy: Strategy, every: int, broken: tuple[int, ...] = (), *, final: bool = False) -> None:
        self.strategy, self.every, self.broken, self.final = strategy, every, broken, final
        self.count, self.failed = 0, 0
        self.told: list[Decision] = []

    def start(self) -> list[Decision]:
        return self.strategy.start()

    def observe(self, observation: Observation) -> list[Decision]:
        self.count += 1
        if observation.member in self.broken or self.count % self.every == 0:
            self.failed += 1
            decisions = self.strategy.fail(observation.member, "RuntimeError: x", final=self.final)
        else:
            decisions = self.strategy.observe(observation)
        self.told += decisions
        return decisions


def failing(strategy: Strategy, every: int, broken: tuple[int, ...] = (), *, final: bool = False) -> Failing:
    """Run a population to its end."""
    given = Failing(strategy, every, broken, final=final)
    simulator = Simulator(LawCurves(SCHEDULE), strategy, seed=3, spread=0.3)
    simulator.strategy = given  # type: ignore[assignment]
    simulator.finish()
    return given


@pytest.mark.acceptance
def test_members_that_fail_are_replaced_or_left_out_and_the_others_go_on(name: str, synchronous: bool) -> None:
    strategy = make(name, synchronous=synchronous)
    run = failing(strategy, 7)
    assert run.failed >= 4
    assert strategy.finished
    rescues = [decision for decision in run.told if decision.reason == "failed: RuntimeError: x"]
    replaced = [(one.member, one.donor, one.donor_step) for one in strategy.failures if one.donor is not None]
    assert [(decision.member, decision.donor, decision.donor_step) for decision in rescues] == replaced
    assert len(strategy.failures) == run.failed
    left_out = {failure.member for failure in strategy.failures if failure.donor is None}
    assert left_out == {number for number, member in strategy.members.items() if member.status == "failed"}
    if name == "independent":
        assert rescues == []
    else:
        assert len(rescues) >= 3
        assert len(left_out) <= 2, "only where all others are at the horizon is there nobody to copy"
    for number, member in strategy.members.items():
        assert member.status == "failed" or member.step == NUM_STEPS
        if number not in left_out and number in strategy.lineage.members:
            path = strategy.lineage.path(number)
            assert all(a.stop_step == b.start_step for a, b in itertools.pairwise(path))
            assert (path[0].start_step, path[-1].stop_step) == (0, NUM_STEPS)
    assert all(domain.contains(decision.values[key]) for decision in run.told for key, domain in SPACE.items())


@pytest.mark.acceptance
def test_most_members_may_be_left_out_and_come_back(name: str, synchronous: bool) -> None:
    """Six of eight never report: the other two end. Tried again later, also from the saved state, the six end, too."""
    strategy = make(name, synchronous=synchronous)
    broken = (0, 2, 3, 5, 6, 7)
    run = failing(strategy, 10**9, broken, final=True)
    assert run.failed == 6
    assert strategy.finished
    assert [n for n, member in strategy.members.items() if member.status == "failed"] == list(broken)
    assert all(decision.donor not in broken for decision in run.told)
    assert strategy.best() not in broken
    strategy = resumed(strategy, lambda: make(name, synchronous=synchronous))
    assert sorted(strategy.failures) == [Failure(number, 0, "RuntimeError: x") for number in broken]
    assert strategy.retry() == list(broken)
    assert strategy.retry() == []
    targets = dict.fromkeys(broken, 40)
    while targets:
        number = min(targets, key=lambda n: (targets[n], n))
        until = targets.pop(number)
        made = strategy.observe(Observation(number, (Point(until, 3.0 - until / 1000 + number / 100, 0.01),)))
        targets |= {decision.member: decision.until_step for decision in made if decision.action != "stop"}
    assert all(strategy.members[number].step == NUM_STEPS for number in broken)


def test_a_failure_that_nobody_survives_leaves_all_for_another_try(name: str, synchronous: bool) -> None:
    strategy = make(name, synchronous=synchronous)
    before = strategy.start()
    for decision in before:
        assert strategy.fail(decision.member, "RuntimeError: x") == []
    assert strategy.finished
    assert {member.status for member in strategy.members.values()} == {"failed"}
    assert [failure.donor for failure in strategy.failures] == [None] * 8
    with pytest.raises(UserError, match="member 0 must be training to fail, got one that is failed; report it once"):
        strategy.fail(0, "again")
    with pytest.raises(UserError, match="member 99 must be training to fail, got one that is unknown"):
        strategy.fail(99, "again")
    assert strategy.retry() == list(range(8))
    assert not strategy.finished


def test_a_population_that_diverges_whole_ends(name: str, synchronous: bool) -> None:
    strategy = make(name, synchronous=synchronous)
    history = simulate(strategy, divergence=1e-9)
    assert len(history) == 8
    assert strategy.finished
    with pytest.raises(UserError, match="a member must have a finite loss, got none"):
        strategy.best()


def test_in_synchrony_all_members_are_decided_about_together(name: str) -> None:
    for position, (_, decisions) in enumerate(played(name, True)[1]):
        assert len(decisions) == (8 if position % 8 == 7 else 0)


def test_out_of_synchrony_nobody_waits(name: str) -> None:
    for observation, decisions in played(name, False)[1]:
        assert [decision.member for decision in decisions] == [observation.member]


def test_every_member_has_a_lineage_that_begins_with_fresh_weights(name: str, synchronous: bool) -> None:
    strategy, _ = played(name, synchronous)
    assert strategy.lineage.members
    for member in strategy.lineage.members:
        path = strategy.lineage.path(member)
        assert path[0].parent is None
        assert path[0].start_step == 0
        assert path[-1].stop_step == strategy.members[member].step == NUM_STEPS
        assert all(a.stop_step == b.start_step for a, b in itertools.pairwise(path))
        assert strategy.lineage.applied(member, "lr").shape == (NUM_STEPS,)


def test_the_longest_history_goes_to_the_horizon_with_a_finite_loss(name: str, synchronous: bool) -> None:
    strategy, _ = played(name, synchronous)
    best = strategy.members[strategy.best()]
    assert best.step == NUM_STEPS
    assert best.loss == min(m.loss for m in strategy.members.values() if m.step == NUM_STEPS and m.sound)


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (Observation(99, (Point(40, 1.0, 0.1),)), "member 99 must be training to report, got one that is unknown"),
        (Observation(0, ()), "points of member 0 must hold an evaluation, got none"),
        (Observation(0, (Point(40, 1.0, 0.1), Point(20, 1.0, 0.1))), "points of member 0 must come after step 0"),
    ],
)
def test_reports_that_cannot_be_are_refused(name: str, observation: Observation, message: str) -> None:
    strategy = make(name)
    strategy.start()
    with pytest.raises(UserError, match=message):
        strategy.observe(observation)


def test_a_member_reports_once(name: str) -> None:
    strategy = make(name, synchronous=True)
    strategy.start()
    report = Observation(0, (Point(40, 1.0, 0.1),))
    assert strategy.observe(report) == []
    with pytest.raises(UserError, match="member 0 must be training to report, got one that is waiting"):
        strategy.observe(report)


def test_state_of_another_strategy_is_refused(name: str) -> None:
    other = "truncation" if name != "truncation" else "pb2"
    with pytest.raises(UserError, match=f"state must be of strategy '{name}', version {STATE_VERSION}, got '{other}'"):
        make(name).load_state_dict(make(other).state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_members": 0}, "num_members must be >= 1, got 0"),
        ({"interval_steps": 0}, r"interval_steps must be in \[1, num_steps = 400\], got 0"),
        ({"quantile_fraction": 0.6}, r"quantile_fraction must be in \(0, 0.5\], got 0.6"),
        ({"factors": ()}, r"factors must be positive and at least one, got \[\]"),
        ({"factors": (0.0, 2.0)}, "factors must be positive"),
        ({"resample_probability": 1.5}, r"resample_probability must be in \[0, 1\], got 1.5"),
        ({"initial": [{"lr": 1.0, "depth": 1, "shape": "a"}]}, r"initial\[0\] must hold lr inside its domain, got 1.0"),
        ({"initial": [{"lr": 0.01, "depth": 1}]}, r"initial\[0\] must hold shape inside its domain, got None"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(name, **options)


def test_an_empty_space_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="space must name at least one hyperparameter, got none"):
        STRATEGIES[name]({}, num_members=8, num_steps=10, interval_steps=5, **OPTIONS[name])


def test_given_members_come_first(name: str) -> None:
    first = {"lr": 0.02, "depth": 3, "shape": "b"}
    start: list[Decision] = make(name, initial=[first]).start()
    assert [d.member for d in start] == list(range(8))
    assert start[0].values == first
    assert all(d.action == "start" and d.until_step == 40 for d in start)
    assert len({d.values["lr"] for d in start}) == 8
    assert isinstance(SPACE["lr"], Domain)
