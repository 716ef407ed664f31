import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from landscape_ray.errors import UserError
from landscape_ray.populations import Change, Decision, Lineage, Observation, Point, Restart, table_of
from landscape_ray.populations.simulation import LawCurves, Simulator
from landscape_ray.schedules import Schedule
from tests.populations.conftest import NUM_STEPS, SCHEDULE, make, simulate


def report(lineage: Lineage, member: int, step: int, loss: float = 1.0) -> None:
    lineage.end(Observation(member, (Point(step, loss),), num_tokens=100 * step))


def go_on(member: int, lr: float, until: int, donor: int | None = None, step: int | None = None) -> Decision:
    return Decision(member, "continue" if donor is None else "exploit", {"lr": lr}, until, donor, step)


@pytest.fixture
def family() -> Lineage:
    """Member 1 copies member 0 at step 10; member 0 never exploits."""
    lineage = Lineage()
    lineage.begin([Decision(0, "start", {"lr": 0.1}, 10), Decision(1, "start", {"lr": 0.9}, 10)])
    report(lineage, 0, 10)
    report(lineage, 1, 10)
    lineage.begin([go_on(0, 0.1, 20), go_on(1, 0.08, 20, donor=0, step=10)])
    report(lineage, 0, 20)
    report(lineage, 1, 20)
    lineage.begin([go_on(0, 0.1, 30), go_on(1, 0.06, 30)])
    report(lineage, 0, 30)
    report(lineage, 1, 30)
    return lineage


def test_a_schedule_follows_the_weights_across_members(family: Lineage) -> None:
    assert family.changes(1, "lr") == [
        Change(0, 0, 0.1, member=0),
        Change(10, 1000, 0.08, member=1),
        Change(20, 2000, 0.06, member=1),
    ]
    assert family.applied(1, "lr").tolist() == [0.1] * 10 + [0.08] * 10 + [0.06] * 10
    assert [p.step for p in family.curve(1)] == [10, 20, 30]


@pytest.mark.acceptance
def test_a_member_that_never_exploited_has_a_schedule(family: Lineage) -> None:
    assert family.changes(0, "lr") == [Change(0, 0, 0.1, member=0)]
    assert family.replay(0, "lr").values().tolist() == [0.1] * 30


def test_what_nobody_descends_from_is_forgotten(family: Lineage) -> None:
    assert len(family) == 5  # the first ten updates of member 1 are gone
    assert all(segment.values["lr"] != 0.9 for segment in family.segments().values())
    family.forget(0)
    assert len(family) == 3
    assert family.members == (1,)


def test_two_members_can_trade_places() -> None:
    lineage = Lineage()
    lineage.begin([Decision(0, "start", {"lr": 1.0}, 10), Decision(1, "start", {"lr": 2.0}, 10)])
    report(lineage, 0, 10)
    report(lineage, 1, 10)
    lineage.begin([go_on(0, 3.0, 20, donor=1, step=10), go_on(1, 4.0, 20, donor=0, step=10)])
    report(lineage, 0, 20)
    report(lineage, 1, 20)
    assert [s.values["lr"] for s in lineage.path(0)] == [2.0, 3.0]
    assert [s.values["lr"] for s in lineage.path(1)] == [1.0, 4.0]


@given(
    st.lists(st.tuples(st.integers(1, 40), st.just(0.0) | st.floats(1e-12, 1e3)), min_size=1, max_size=12),
)
def test_a_table_equals_the_values_to_the_bit(stretches: list[tuple[int, float]]) -> None:
    values = np.concatenate([np.full(count, value) for count, value in stretches])
    assert np.array_equal(table_of(values).values(), values)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["constant", "wsd", "cosine", "one_cycle", "step"]))
def test_a_replayed_lineage_equals_the_values_applied(seed: int, shape: str) -> None:
    """The property that replay from scratch rests on: update by update, the table has what the population applied."""
    base = Schedule(name=shape, peak=1.0, num_steps=NUM_STEPS)
    strategy = make("truncation", seed=seed)
    applied: dict[int, list[float]] = {}
    peaks = {d.member: d.values["lr"] for d in strategy.start()}
    fresh = make("truncation", seed=seed)
    for observation, decisions in Simulator(LawCurves(base), fresh, seed=seed).run():
        member = observation.member
        steps = np.arange(len(applied.get(member, [])), observation.step)
        own = dataclasses.replace(base, peak=float(peaks[member]))
        applied[member] = applied.get(member, []) + [own(int(step)) for step in steps]
        before = {m: list(v) for m, v in applied.items()}
        for decision in decisions:
            peaks[decision.member] = decision.values["lr"]
            if decision.donor is not None:
                applied[decision.member] = before[decision.donor]
    for member in range(8):
        assert fresh.lineage.applied(member, "lr", base).tolist() == applied[member]
        assert fresh.lineage.replay(member, "lr", base).values().tolist() == applied[member]


def test_a_lineage_survives_json(family: Lineage) -> None:
    other = Lineage()
    other.load_state_dict(json.loads(json.dumps(family.state_dict())))
    assert other.state_dict() == family.state_dict()
    assert other.changes(1, "lr") == family.changes(1, "lr")
    other.forget(0)
    family.forget(0)
    assert other.state_dict() == family.state_dict()
    assert len(other) == 3


def test_a_restart_is_in_the_lineage_and_cannot_be_replayed() -> None:
    strategy = make("ipbt")
    simulate(strategy)
    restarted = [
        member
        for member in strategy.lineage.members
        if any(segment.restart is not None for segment in strategy.lineage.path(member))
    ]
    assert restarted
    with pytest.raises(UserError, match="must descend from one initialisation to be replayed, got a restart"):
        strategy.lineage.replay(restarted[0], "lr", SCHEDULE)
    assert Restart(0.2, 0.1).shrink == 0.2


def test_wrong_questions_are_refused(family: Lineage) -> None:
    with pytest.raises(UserError, match=r"member must be one of \[0, 1\], got 7"):
        family.path(7)
    with pytest.raises(UserError, match=r"name must be one of \['lr'\], got 'wd'"):
        family.changes(0, "wd")
    with pytest.raises(UserError, match="values must be finite, >= 0 and at least one"):
        table_of(np.array([-1.0]))
    strategy = make("truncation")
    simulate(strategy)
    with pytest.raises(UserError, match="shape must be a number to be applied, got '"):
        strategy.lineage.applied(0, "shape")


def test_memory_does_not_grow_with_generations() -> None:
    lineage = Lineage()
    lineage.begin([Decision(m, "start", {"lr": 1.0}, 1) for m in range(4)])
    sizes = []
    for step in range(1, 400):
        for member in range(4):
            report(lineage, member, step)
        # everybody copies member 0, so that three of four segments end each time
        copies = [go_on(m, 1.0, step + 1, donor=0, step=step) for m in (1, 2, 3)]
        lineage.begin([go_on(0, 1.0, step + 1), *copies])
        sizes.append(len(lineage))
    assert sizes == list(range(1, 400))
