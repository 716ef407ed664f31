"""What each rule promises beyond the contract of all."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from landscape_ray.domains import Domain
from landscape_ray.errors import UserError
from landscape_ray.populations import STRATEGIES, Decision, Observation, Point, Strategy, Values, position
from landscape_ray.populations.strategies import (
    Bandit,
    Frequencies,
    ImprovementRate,
    Iterated,
    Significance,
    Truncation,
)
from landscape_ray.populations.strategies.bandit import Process
from landscape_ray.populations.strategies.improvement import faster
from landscape_ray.populations.strategies.truncation import welch
from tests.populations.conftest import SPACE, make, resumed, simulate

LR = {"lr": Domain(log_uniform=[1e-4, 1e-1])}


def population(kind: type[Strategy], num_members: int = 8, **options: Any) -> Any:
    """Return a started population over a learning rate, ten updates between decisions."""
    strategy = kind(LR, num_members=num_members, num_steps=1000, interval_steps=10, **options)
    strategy.start()
    return strategy


def meet(strategy: Strategy, losses: list[float], step: int | None = None) -> list[Decision]:
    """Let all members report these losses; return what was decided."""
    made: list[Decision] = []
    for number, loss in enumerate(losses):
        at = strategy.members[number].step + 10 if step is None else step
        made = strategy.observe(Observation(number, (Point(at - 5, loss + 0.1, 0.01), Point(at, loss, 0.01))))
    return made


def test_truncation_replaces_the_worst_quarter_by_the_best() -> None:
    decisions = meet(population(Truncation, resample_probability=0.0), [float(n) for n in range(8)])
    copied = {d.member: d.donor for d in decisions if d.donor is not None}
    assert set(copied) == {6, 7}
    assert set(copied.values()) <= {0, 1}
    for d in decisions:
        assert d.action == ("exploit" if d.member in copied else "continue")


def test_a_copy_moves_by_a_factor_in_log_space() -> None:
    strategy = population(Truncation, resample_probability=0.0, factors=(0.5, 2.0))
    before = {n: m.values["lr"] for n, m in strategy.members.items()}
    for d in meet(strategy, [float(n) for n in range(8)]):
        if d.donor is not None:
            ratio = float(d.values["lr"]) / float(before[d.donor])
            assert ratio in (pytest.approx(0.5), pytest.approx(2.0)) or d.values["lr"] in (1e-4, 1e-1)


def test_draws_of_a_log_uniform_value_are_uniform_in_the_logarithm() -> None:
    strategy = population(Truncation, resample_probability=1.0)
    units = [position(LR["lr"], strategy.explored({"lr": 1e-2})["lr"]) for _ in range(2000)]
    assert stats.kstest(units, "uniform").pvalue > 1e-3


def test_a_copy_that_has_not_reported_is_no_donor() -> None:
    strategy = population(Truncation, synchronous=False)
    meet(strategy, [float(n) for n in range(8)])
    copied = [n for n, m in strategy.members.items() if not m.tested]
    assert copied
    assert not set(copied) & set(strategy.donors(0))


@pytest.mark.parametrize("seed", range(5))
def test_welch_is_scipys(seed: int) -> None:
    generator = np.random.default_rng(seed)
    a, b = generator.normal(0, 1, 6), generator.normal(0.5, 3, 4)
    assert welch(a, b) == pytest.approx(stats.ttest_ind(a, b, equal_var=False, alternative="less").pvalue, rel=1e-9)
    assert welch(np.ones(3), np.ones(3)) == 1.0
    assert welch(np.zeros(3), np.ones(3)) == 0.0


def test_a_difference_within_the_noise_replaces_nobody() -> None:
    def replaced(gap: float) -> int:
        strategy = population(Significance, num_points=4, significance=0.01)
        generator = np.random.default_rng(0)
        decisions: list[Decision] = []
        for round_ in range(1, 7):
            for number in range(8):
                losses = 1.0 + gap * number + 0.1 * generator.standard_normal(2)
                points = tuple(Point(10 * round_ - 5 + 5 * k, float(v)) for k, v in enumerate(losses))
                decisions += strategy.observe(Observation(number, points))
        return sum(d.donor is not None for d in decisions)

    assert replaced(1.0) >= 4
    assert replaced(0.01) <= 1


def test_the_process_is_exact_inference() -> None:
    """Mean and deviation against the conditional of one joint Gaussian, written out."""
    generator = np.random.default_rng(0)
    time, points = np.repeat([0.1, 0.2, 0.3], 4), generator.random((12, 2))
    targets = np.sin(5 * points[:, 0]) + 0.1 * generator.standard_normal(12)
    process = Process(time, points, targets, np.array([False, True]))
    length, forgetting, noise = process.hyperparameters
    new = np.array([[0.4, points[0, 1]]])

    def kernel(t: float, x: np.ndarray[Any, Any], s: float, y: np.ndarray[Any, Any]) -> float:
        distance = (x[0] - y[0]) ** 2 + (x[1] != y[1])
        return float(math.exp(-distance / (2 * length**2)) * (1 - forgetting) ** (abs(t - s) * 3 / 2))

    seen = list(zip(time, points, strict=True))
    matrix = np.array([[kernel(t, x, s, y) for s, y in seen] for t, x in seen])
    matrix += noise**2 * np.eye(12)
    cross = np.array([kernel(0.3, new[0], s, y) for s, y in seen])
    standard = (targets - targets.mean()) / targets.std()
    mean, deviation = process.predict(np.array([0.3]), new, np.empty((0, 2)))
    assert mean[0] == pytest.approx(targets.mean() + targets.std() * cross @ np.linalg.solve(matrix, standard))
    assert deviation[0] == pytest.approx(targets.std() * math.sqrt(1 - cross @ np.linalg.solve(matrix, cross)))
    assert process.predict(np.array([0.3]), new, new)[1][0] < deviation[0]


def test_pb2_finds_values_under_which_the_loss_falls_fast() -> None:
    """The loss falls by up to a tenth an interval, most at lr = 3e-3, depth = 6 and shape = "b"."""
    strategy = Bandit(SPACE, num_members=6, num_steps=120, interval_steps=10, exploration=0.0)

    def speed(values: dict[str, Any]) -> float:
        distance = (math.log10(values["lr"] / 3e-3)) ** 2 + ((values["depth"] - 6) / 4) ** 2
        return 0.1 * math.exp(-distance) * (1.0 if values["shape"] == "b" else 0.4)

    pending = strategy.start()
    losses = dict.fromkeys(range(6), 1.0)
    while pending:
        decisions: list[Decision] = []
        for d in pending:
            if d.action == "stop":
                continue
            losses[d.member] = (losses[d.member] if d.donor is None else losses[d.donor]) * (1 - speed(d.values))
            decisions += strategy.observe(Observation(d.member, (Point(d.until_step, losses[d.member]),)))
        pending = decisions
    chosen = [strategy.suggested(120, strategy.members[0].values) for _ in range(20)]
    speeds = [speed(c) for c in chosen if c is not None]
    drawn = [speed(strategy.explored({"lr": 1e-2, "depth": 2, "shape": "a"})) for _ in range(50)]
    assert len(speeds) == 20
    assert np.median(speeds) > 0.07 > 2 * np.median(drawn)


def test_parts_evolve_at_their_frequencies() -> None:
    strategy = population(Frequencies, frequencies=(1, 3))
    for round_ in range(1, 7):
        decisions = meet(strategy, [float(n) for n in range(8)])
        copied = {d.member for d in decisions if d.donor is not None}
        assert any(n < 4 for n in copied)
        assert any(n >= 4 for n in copied) == (round_ % 3 == 0)


def test_values_come_along_from_slower_parts_only() -> None:
    strategy = population(Frequencies, frequencies=(1, 2))
    meet(strategy, [9.0] * 8)
    values = {n: dict(m.values) for n, m in strategy.members.items()}
    # the fast part: 0 best ... 3 worst, but member 4 of the slow part is better than all of them
    decisions = {d.member: d for d in meet(strategy, [1.0, 2.0, 3.0, 4.0, 0.5, 8.0, 9.0, 10.0])}
    assert decisions[2].donor == 4
    assert decisions[2].values == values[4]
    # member 6 of the slow part takes weights of the fast part, and goes on under the values of its own best
    assert decisions[6].donor == 0
    assert decisions[6].values == values[4]


def test_a_faster_curve_is_steeper_at_the_same_loss_and_lower_elsewhere() -> None:
    def line(start: float, slope: float) -> tuple[Point, ...]:
        return tuple(Point(10 * k, start + slope * k) for k in range(4))

    assert faster(line(2.0, -0.3), line(1.8, -0.1))
    assert not faster(line(1.8, -0.1), line(2.0, -0.3))
    assert faster(line(1.0, -0.1), line(5.0, -0.3))  # they have no loss in common
    assert faster(line(1.0, 0.0), (Point(0, math.nan),))
    assert not faster((Point(0, math.nan),), line(1.0, 0.0))


def test_evaluators_train_parents_under_the_best_greedy_values() -> None:
    strategy = population(ImprovementRate)
    assert (list(strategy.greedy), list(strategy.parents), list(strategy.evaluators)) == ([0, 1, 2], [3, 4, 5], [6, 7])
    best = dict(strategy.members[1].values)
    decisions = {d.member: d for d in meet(strategy, [2.0, 1.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])}
    assert {decisions[6].donor, decisions[7].donor} == {3, 4}  # those that have waited longest
    assert decisions[6].values == decisions[7].values == best
    assert all(decisions[n].donor in (None, 1) for n in (0, 1, 2))


def test_an_evaluator_that_wins_joins_the_greedy_part() -> None:
    strategy = population(ImprovementRate)
    meet(strategy, [2.0, 1.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    decisions = {d.member: d for d in meet(strategy, [2.0, 1.0, 3.0, 4.0, 5.0, 6.0, 0.5, 8.0])}
    assert decisions[2].donor == 6


def test_stagnation_doubles_the_interval_and_restarts_all_but_the_best() -> None:
    strategy = population(Iterated, patience=2)
    until: list[int] = []
    for loss in (1.0, 1.0, 1.0):
        decisions = meet(strategy, [loss + 0.01 * n for n in range(8)])
        until.append(decisions[0].until_step)
    assert until == [20, 30, 40]
    assert strategy.interval_steps == 20
    assert [d.action for d in decisions] == ["continue"] + ["restart"] * 7
    assert {tuple(d.restart) for d in decisions if d.restart} <= {(0.2, 0.1), (0.0, 1.0)}


def test_there_is_no_restart_near_the_end() -> None:
    strategy = Iterated(LR, num_members=4, num_steps=60, interval_steps=10, patience=3)
    strategy.start()
    actions = [d.action for _ in range(6) for d in meet(strategy, [1.0, 1.1, 1.2, 1.3])]
    assert "restart" not in actions[: 4 * 3]
    assert strategy.interval_steps == 20 or "restart" not in actions


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("significance", {"significance": 0.0}, r"significance must be in \(0, 1\), got 0.0"),
        ("significance", {"num_points": 1}, "num_points must be >= 2, got 1"),
        ("pb2", {"window": 2}, "window must be >= 4, got 2"),
        ("pb2", {"num_candidates": 0}, "num_candidates must be >= 1, got 0"),
        ("mf_pbt", {"frequencies": (2, 1)}, r"frequencies must be two or more, increasing, >= 1, got \[2, 1\]"),
        ("mf_pbt", {"num_members": 7}, "num_members must be a multiple of 2 with 3 or more in each part, got 7"),
        ("ipbt", {"patience": 0}, "patience must be >= 1, got 0"),
        ("ipbt", {"growth": 0.5}, "growth must be >= 1, got 0.5"),
        ("ipbt", {"shrink": 0.0, "perturb": 0.0}, r"shrink and perturb must be in \[0, 1\], not both 0, got 0.0, 0.0"),
        ("fire", {"num_members": 4}, "num_members must allow 1 evaluator, 2 parents and 2 greedy members, got 4"),
        ("fire", {"eval_intervals": 0}, "eval_intervals must be >= 1, got 0"),
        ("forecast", {"lr_name": "depht"}, "lr_name must be in the space, got 'depht'; .*did you mean 'depth'"),
        ("forecast", {"lr_name": "shape"}, "shape must be a range of positive numbers"),
        ("forecast", {"certainty": -1.0}, "certainty must be >= 0, got -1.0"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(name, **options)


def test_a_foreign_strategy_is_held_to_its_domains_and_donors() -> None:
    class Wild(Truncation):
        def propose(self, donor: int) -> dict[str, Any]:
            return {"lr": 5.0}

    with pytest.raises(UserError, match=r"the choice for member 6 must hold lr inside its domain, got 5\.0"):
        meet(population(Wild), [float(n) for n in range(8)])

    from landscape_ray.populations import Choice

    class Narcissus(Truncation):
        def decide(self, ready: list[int]) -> dict[int, Choice]:
            return {0: Choice(donor=0)}

    with pytest.raises(UserError, match="donor of member 0 must be another member with a finite loss, got 0"):
        meet(population(Narcissus), [1.0] * 8)


def test_forecasts_need_the_learning_rate_that_was_applied() -> None:
    strategy = make("forecast")
    strategy.start()
    with pytest.raises(UserError, match="points of member 0 must carry the mean learning rate, got nan"):
        strategy.observe(Observation(0, (Point(40, 1.0),)))


def test_every_strategy_ends_a_simulation(name: str) -> None:
    strategy = STRATEGIES[name]
    assert issubclass(strategy, Strategy)
    assert simulate(make(name))[-1][1]


@pytest.mark.acceptance
def test_a_member_that_diverges_before_anybody_has_reported_waits_for_somebody_to_copy() -> None:
    def fresh() -> Strategy:
        return make("truncation", synchronous=False)

    strategy = fresh()
    strategy.start()
    assert strategy.observe(Observation(0, (Point(10, math.inf, 0.1),))) == []
    strategy = resumed(strategy, fresh)
    assert not strategy.finished
    first, second = strategy.observe(Observation(1, (Point(40, 1.0, 0.1),)))
    assert (first.member, first.action, first.donor, first.donor_step) == (0, "exploit", 1, 40)
    assert (second.member, second.action) == (1, "continue")


def test_an_explorer_proposes_the_values_of_copies_from_what_it_has_learnt() -> None:
    class Memory:
        """Proposes the values under which the loss fell fastest."""

        def __init__(self) -> None:
            self.seen: list[Any] = []

        def explore(self, values: Values) -> Values:
            sound = [each for each in self.seen if math.isfinite(each[1])]
            return dict(max(sound, key=lambda each: float(each[1]))[0]) if sound else values

        def learn(self, values: Values, rate: float) -> None:
            self.seen.append([values, rate])

        def state_dict(self) -> dict[str, Any]:
            return {"seen": [[values, repr(rate)] for values, rate in self.seen]}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.seen = [[values, float(rate)] for values, rate in state["seen"]]

    def fresh() -> Strategy:
        return make("truncation", explorer=Memory())

    strategy = fresh()
    history = simulate(strategy, divergence=0.02)
    memory = strategy.explorer
    assert isinstance(memory, Memory)
    segments = [o for o, _ in history if o.step > 40]
    assert 0 < len(memory.seen) <= len(segments)
    assert all(domain.contains(values[key]) for values, _ in memory.seen for key, domain in SPACE.items())
    copies = [d for _, decisions in history for d in decisions if d.action == "exploit"]
    tried = [values for values, _ in memory.seen] + [d.values for d in fresh().start()]
    assert all(decision.values in tried for decision in copies)
    assert resumed(strategy, fresh).state_dict() == strategy.state_dict()
