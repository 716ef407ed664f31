"""What these strategies promise, asked of Ray Tune's own scheduler too, which is why it is asked at all.

Where Ray keeps a promise as well, a test says so. Optimizer states and the folders of a sweep have theirs in
tests/sweep/population/test_stock_ray.py, whole runs of Ray in tests/ray/test_stock_ray.py.
"""

from __future__ import annotations

import inspect
import json
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining, PopulationBasedTrainingReplay
from ray.tune.schedulers.pb2 import PB2
from scipy import stats

from landscape_ray.domains import Domain
from landscape_ray.populations import STRATEGIES, Decision, Observation, Point, Strategy, position
from tests.populations.stock import INTERVAL, OurPopulation, RayPopulation, generators, rivals, trained

__all__ = ["generators", "rivals"]

SPACE = {"lr": Domain(log_uniform=[1e-3, 1e-1])}

Make = Callable[..., Strategy]


@pytest.fixture
def stock(rivals: Any, generators: None) -> Make:
    """Ray's scheduler as a strategy, the one of the benchmark's row "stock Ray"."""
    return rivals.StockRay  # type: ignore[no-any-return]


def scheduler(**options: Any) -> PopulationBasedTraining:
    return PopulationBasedTraining(
        time_attr="step",
        metric="loss",
        mode="min",
        perturbation_interval=INTERVAL,
        hyperparam_mutations={"lr": tune.loguniform(1e-3, 1e-1)},
        **options,
    )


def run(strategy: Strategy, losses: Callable[[int, int], float], rounds: int) -> list[Decision]:
    """Let every member report at every interval; return all decisions."""
    decisions = waiting = strategy.start()
    for _ in range(rounds):
        made: list[Decision] = []
        for decision in waiting:
            if decision.action != "stop":
                step = decision.until_step
                point = Point(step, losses(decision.member, step), float(decision.values["lr"]))
                made += strategy.observe(Observation(decision.member, (point,)))
        decisions, waiting = decisions + made, made
    return decisions


def make(kind: Make, space: dict[str, Domain] = SPACE, **options: Any) -> Strategy:
    return kind(space, **{"num_members": 8, "num_steps": 10_000, "interval_steps": INTERVAL, **options})


def ranks(member: int, step: int) -> float:
    """Return losses of which the first member has the lowest, always."""
    return 1.0 + member - step / 1000


@pytest.mark.parametrize("synchronous", [True, False], ids=["sync", "async"])
def test_the_worst_quarter_takes_weights_of_the_best_as_ray_decides(stock: Make, synchronous: bool) -> None:
    strategy = make(stock, synchronous=synchronous)
    decisions = run(strategy, ranks, 3)
    copies = [d for d in decisions if d.donor is not None]
    assert copies
    assert {d.donor for d in copies} <= {0, 1}
    if synchronous:
        assert [d.member for d in copies] == [6, 7] * 3
        factors = {round(float(d.values["lr"]) / float(strategy.members[d.donor].values["lr"]), 9) for d in copies}
        assert factors & {0.8, 1.2}


# values


@pytest.mark.acceptance
def test_values_stay_inside_their_domain_and_rays_do_not(stock: Make) -> None:
    def outside(kind: Make) -> int:
        strategy = make(kind, initial=[{"lr": 1e-1}] * 8)
        return sum(not SPACE["lr"].contains(d.values["lr"]) for d in run(strategy, ranks, 20))

    assert outside(STRATEGIES["truncation"]) == 0
    assert outside(stock) > 0


@pytest.mark.acceptance
def test_an_integer_moves_and_a_small_one_of_rays_does_not(stock: Make) -> None:
    """Of what is not drawn anew: 2 * 1.2 and 2 * 0.8 are both rounded to 2."""
    space = {"lr": SPACE["lr"], "depth": Domain(integers=[1, 64])}

    def moved(kind: Make) -> set[int]:
        start = [{"lr": 1e-2, "depth": 2}] * 8
        decisions = run(make(kind, space, initial=start), ranks, 1)
        return {int(d.values["depth"]) for d in decisions if d.donor is not None}

    found = [moved(lambda *a, k=k, **o: STRATEGIES["truncation"](*a, **o | {"seed": k})) for k in range(20)]
    assert not any(2 in depths for depths in found)
    assert {1, 3} <= set().union(*found)
    near = [moved(lambda *a, k=k, **o: stock(*a, **o | {"seed": k})) & {1, 2, 3} for k in range(20)]
    assert set().union(*near) == {2}


@pytest.mark.acceptance
def test_log_uniform_values_move_and_are_drawn_in_log_space_as_those_of_rays_pbt_are(stock: Make) -> None:
    """Ray keeps this one in PBT, but for a drift: 1.2 * 0.8 < 1, so that values which do not matter shrink."""

    def moves(kind: Make) -> tuple[list[float], list[float]]:
        strategy = make(kind, num_members=400, initial=[{"lr": 1e-2}] * 400)
        copies = [float(d.values["lr"]) / 1e-2 for d in run(strategy, ranks, 1) if d.donor is not None]
        steps = [ratio for ratio in copies if round(ratio, 9) in (0.8, 1.25, 1.2)]
        return steps, [position(SPACE["lr"], 1e-2 * ratio) for ratio in copies if ratio not in steps]

    for kind, factors in ((STRATEGIES["truncation"], {0.8, 1.25}), (stock, {0.8, 1.2})):
        steps, drawn = moves(kind)
        assert {round(ratio, 9) for ratio in steps} == factors
        assert len(drawn) >= 5
        assert stats.kstest(drawn, "uniform").pvalue > 1e-3
    assert math.prod(inspect.signature(Strategy).parameters["factors"].default) == 1.0
    assert math.prod(inspect.signature(PopulationBasedTraining).parameters["perturbation_factors"].default) < 1.0


@pytest.mark.acceptance
def test_pb2_draws_a_learning_rate_in_log_space_and_rays_on_a_linear_scale(rivals: Any, generators: None) -> None:
    """Nine tenths of Ray's begin in the highest of three decades: it has bounds, and no scale."""
    space = {"lr": Domain(log_uniform=[1e-4, 1e-1])}
    ours = [float(d.values["lr"]) for d in make(STRATEGIES["pb2"], space, num_members=300).start()]
    peer = PB2(
        metric="loss", mode="min", time_attr="step", perturbation_interval=10, hyperparam_bounds={"lr": [1e-4, 1e-1]}
    )
    trials = [rivals.Trial(number, {}) for number in range(300)]
    for trial in trials:
        peer.on_trial_add(rivals.Controller(trials), trial)
    assert sum(lr > 1e-2 for lr in ours) == 100
    assert sum(trial.config["lr"] > 1e-2 for trial in trials) > 250


# members that diverge


@pytest.mark.acceptance
def test_a_diverged_member_is_replaced_and_by_ray_it_is_not(stock: Make) -> None:
    def rescued(kind: Make) -> bool:
        decisions = run(make(kind), lambda member, step: math.nan if (member, step) == (3, 20) else 1.0 + member, 4)
        return any(d.member == 3 and d.donor is not None for d in decisions)

    assert rescued(STRATEGIES["truncation"])
    assert not rescued(stock)


# one seed


@pytest.mark.acceptance
def test_one_seed_gives_one_history_and_rays_depends_on_who_else_draws(stock: Make) -> None:
    """Ray takes no seed. Who seeds the global generators has one history, until a callback or a data set draws too."""
    assert "seed" not in inspect.signature(PopulationBasedTraining).parameters

    def history(kind: Make, *, company: bool) -> list[Decision]:
        def losses(member: int, step: int) -> float:
            if company and (member, step) == (5, 20):
                random.random()
            return ranks(member, step)

        return run(make(kind, seed=7), losses, 5)

    assert history(STRATEGIES["truncation"], company=False) == history(STRATEGIES["truncation"], company=True)
    assert history(stock, company=False) == history(stock, company=False)
    assert history(stock, company=False) != history(stock, company=True)


# a driver that dies

NUM_STEPS = 60
PLACES = {"in the middle of a round": 12, "between two rounds": 16}
"""After so many reports of eight members the driver is killed."""


@pytest.mark.acceptance
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("synchronous", [True, False], ids=["sync", "async"])
def test_decisions_go_on_after_a_crash_as_if_there_had_been_none(synchronous: bool, place: str) -> None:
    def population() -> OurPopulation:
        return OurPopulation(make(STRATEGIES["truncation"], num_steps=NUM_STEPS, synchronous=synchronous, seed=1))

    whole, broken = population(), population()
    for each in (whole, broken):
        for count in range(PLACES[place]):
            each.report(count % 8, ranks(count % 8, each.steps[count % 8] + INTERVAL))
    before = list(broken.copies)
    resumed = broken.restored(population().strategy)
    for each in (whole, resumed):
        each.go_on(ranks)
    assert whole.copies == before + resumed.copies
    assert len(resumed.copies) >= 6
    assert whole.weights == resumed.weights
    assert whole.strategy.state_dict() == resumed.strategy.state_dict()


@pytest.mark.acceptance
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("synchronous", [True, False], ids=["sync", "async"])
def test_rays_scheduler_forgets_everything_at_a_crash(
    rivals: Any, generators: None, tmp_path: Path, synchronous: bool, place: str
) -> None:
    """It can't be saved. A new one has no scores, knows no checkpoint, and thinks that the first interval is to come.

    In synchrony, members that are all beyond that are never given their turn again: the experiment hangs. Where the
    crash was in the middle of a round, members of different steps are ranked together.
    """
    with pytest.raises(NotImplementedError):
        scheduler().save(str(tmp_path / "scheduler"))
    configs = [{"lr": 0.01 * (1 + number)} for number in range(8)]
    options = {"synch": synchronous, "log_config": False}
    population = RayPopulation(rivals, scheduler(**options), configs, tmp_path)
    for count in range(PLACES[place]):
        population.report(count % 8, population.steps[count % 8] + INTERVAL, ranks(count % 8, 0))
    before, drawn = len(population.copies), random.getstate()
    resumed = population.restored(scheduler(**options))
    assert population.go_on(NUM_STEPS, ranks)
    random.setstate(drawn)  # more than Ray does
    ended = resumed.go_on(NUM_STEPS, ranks)
    assert population.copies[before:] != resumed.copies
    if not synchronous:
        assert ended
        assert len(resumed.copies) < len(population.copies[before:])
    elif place == "between two rounds":
        assert not ended
        assert {trial.status for trial in resumed.trials} == {"PAUSED"}
        assert set(resumed.steps) == {30}
        assert resumed.copies == population.copies[before:][:2]
    else:  # those that had reported are an interval ahead, of all rounds to come
        assert all(step == donor_step for _, step, _, donor_step in population.copies)
        assert {(step, donor_step) for _, step, _, donor_step in resumed.copies[:2]} == {(20, 30)}


# whose weights, and how to get them again


def two_of_ray(rivals: Any, folder: Path, **options: Any) -> RayPopulation:
    return RayPopulation(rivals, scheduler(**options), [{"lr": 0.1}, {"lr": 0.03}], folder)


def two_of_ours(*, synchronous: bool) -> OurPopulation:
    options = {"num_members": 2, "num_steps": 40, "quantile_fraction": 0.5, "synchronous": synchronous}
    return OurPopulation(make(STRATEGIES["truncation"], initial=[{"lr": 0.1}, {"lr": 0.03}], **options))


def log_of_ray(folder: Path) -> tuple[int, dict[str, Any]]:
    """Return the donor's step and the new configuration in the only row of the log of trial 0."""
    ((_, _, _, step, _, config),) = map(json.loads, (folder / "pbt_policy_0.txt").read_text().splitlines())
    return step, config


@pytest.fixture
def asynchronous(rivals: Any, generators: None, tmp_path: Path) -> tuple[RayPopulation, OurPopulation]:
    """On both sides, trial 0 copies trial 1, which has gone on to step 25 since it was saved at 20."""
    theirs = two_of_ray(rivals, tmp_path)
    for trial, step, loss in ((1, 10, 1.0), (0, 10, 2.0), (1, 20, 1.0), (1, 25, 1.0), (0, 20, 2.0)):
        theirs.report(trial, step, loss)
    ours = two_of_ours(synchronous=False)
    ours.report(1, 1.0)
    ours.train(0, 5)
    ours.report(1, 1.0)
    ours.train(1, 25)
    ours.report(0, 2.0)
    return theirs, ours


@pytest.mark.acceptance
def test_the_recorded_donor_step_is_that_of_the_copied_weights_and_rays_is_not(
    asynchronous: tuple[RayPopulation, OurPopulation], tmp_path: Path
) -> None:
    theirs, ours = asynchronous
    assert theirs.copies == [(0, 20, 1, 20)]
    assert theirs.weights[0] == trained(0.0, 0.03, 20)
    assert log_of_ray(tmp_path)[0] == 25, "what the donor had come to since"
    assert ours.copies == [(0, 10, 1, 20)]
    assert ours.weights[0] == trained(0.0, 0.03, 20)
    assert ours.strategy.lineage.path(0)[-1].stop_step == 20


@pytest.mark.acceptance
def test_in_synchrony_too_ray_records_the_report_before(rivals: Any, generators: None, tmp_path: Path) -> None:
    """Where the donor is the last one to report: the scheduler is asked before the trial has its result."""
    theirs = two_of_ray(rivals, tmp_path, synch=True)
    theirs.report(0, 10, 2.0)
    theirs.report(1, 10, 1.0)
    assert theirs.copies == [(0, 10, 1, 10)]
    assert theirs.weights[0] == trained(0.0, 0.03, 10)
    assert log_of_ray(tmp_path)[0] == 0
    ours = two_of_ours(synchronous=True)
    ours.report(0, 2.0)
    ours.report(1, 1.0)
    assert ours.copies == [(0, 10, 1, 10)]


@pytest.mark.acceptance
def test_a_member_that_never_exploited_has_a_schedule_and_rays_has_none(
    asynchronous: tuple[RayPopulation, OurPopulation], tmp_path: Path
) -> None:
    _, ours = asynchronous
    assert [change.value for change in ours.strategy.lineage.changes(1, "lr")] == [0.03]
    assert ours.strategy.lineage.replay(1, "lr").values().tolist() == [0.03] * 20
    assert sorted(path.name for path in tmp_path.glob("pbt_policy_*")) == ["pbt_policy_0.txt"]
    with pytest.raises(ValueError, match="Policy file not found"):
        PopulationBasedTrainingReplay(str(tmp_path / "pbt_policy_1.txt"))


@pytest.mark.acceptance
def test_a_replay_gives_the_same_weights_to_the_bit_and_rays_gives_others(
    rivals: Any, asynchronous: tuple[RayPopulation, OurPopulation], tmp_path: Path
) -> None:
    """Ray's changes the values at the step that it has recorded."""
    theirs, ours = asynchronous
    for step in (25, 30, 35, 40):
        theirs.report(0, step, 0.5)
    assert theirs.copies == [(0, 20, 1, 20)]
    new = theirs.trials[0].config["lr"]
    assert theirs.weights[0] == trained(trained(0.0, 0.03, 20), new, 20)
    weights = replayed_by_ray(rivals, tmp_path, range(5, 45, 5))
    assert weights == trained(trained(0.0, 0.03, 25), new, 15) != theirs.weights[0]

    ours.report(0, 0.5)
    ours.report(0, 0.5)
    assert ours.copies == [(0, 10, 1, 20)]
    assert ours.steps[0] == 40
    schedule = ours.strategy.lineage.replay(0, "lr").values()
    assert len(set(schedule)) >= 2
    alone = 0.0
    for lr in schedule:
        alone += float(lr)
    assert alone == ours.weights[0]


def replayed_by_ray(rivals: Any, folder: Path, steps: Iterable[int]) -> float:
    """Return the weights at the end of Ray's replay of trial 0, which reports at these steps."""

    class Saving(rivals.Controller):  # type: ignore[misc, name-defined]
        def _schedule_trial_save(self, trial: Any, result: dict[str, Any]) -> Any:
            saved = super()._schedule_trial_save(trial, result)
            future = type("Future", (), {"resolve": lambda self: saved})  # the replay waits for it
            return future()

    replay = PopulationBasedTrainingReplay(str(folder / "pbt_policy_0.txt"))
    trial = rivals.Trial(0, {})
    controller = Saving([trial])
    replay.on_trial_add(controller, trial)
    weights, at = 0.0, 0
    for step in steps:  # it goes on from its own checkpoint, so that the weights stay
        weights, at = trained(weights, trial.config["lr"], step - at), step
        replay.on_trial_result(controller, trial, {"step": step, "training_iteration": step})
    return weights
