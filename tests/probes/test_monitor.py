from __future__ import annotations

import itertools
import time

import pytest
import torch
from torch import nn

from landscape_ray.errors import UserError
from landscape_ray.probes import Estimate, Host, Monitor, OutputLoss, Probe, SharpnessProbe
from landscape_ray.probes import monitor as monitoring

NOBODY = Host()


class Clock:
    """A clock that only moves when told."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(monitoring, "time", clock)
    return clock


class Costly(Probe):
    """Takes as long as it says."""

    def __init__(self, name, seconds, clock, price=10.0, batches=((None, 4),), needs=()):
        super().__init__(list(batches))
        self.name, self.seconds, self.clock, self.price, self.needs = name, seconds, clock, price, frozenset(needs)
        self.told = []

    @property
    def price_gradients(self):
        return self.price

    def _measure(self, function, host):
        raise NotImplementedError

    def measure(self, module, loss, host=None):
        self.clock.now += self.seconds
        self.told.append(host)
        self._num_measured += 1
        return {
            self.name: Estimate(value=1.0, price_gradients=self.price, cost_seconds=self.seconds),
            f"{self.name}/second": Estimate(value=2.0),
        }


def run(monitor, num_steps, seconds_per_step, clock, host=NOBODY, known_end=True):
    """Return (step, name) of all that was measured along a run."""
    found, training = [], 0.0
    for step in range(num_steps + 1):
        if step:
            clock.now += seconds_per_step
            training += seconds_per_step
        end = num_steps if known_end else None
        names = [name for name, _ in monitor(step, None, None, host, training_seconds=training, num_steps=end)]
        found += [(step, name) for name in names if "/" not in name]
    return found, training


def test_without_a_budget_probes_run_on_their_steps_and_at_the_end(clock):
    monitor = Monitor([Costly("a", 5.0, clock), Costly("b", 1.0, clock)], {"a": 4, "b": 3})
    found, _ = run(monitor, 10, 1.0, clock)
    assert found == [(0, "a"), (0, "b"), (3, "b"), (4, "a"), (6, "b"), (8, "a"), (9, "b"), (10, "a"), (10, "b")]
    assert monitor.spent_seconds == pytest.approx(4 * 5 + 5 * 1)


def test_all_estimates_come_out_the_main_one_first(clock):
    monitor = Monitor([Costly("a", 1.0, clock)], 1)
    assert [name for name, _ in monitor(1, None, None)] == ["a", "a/second"]
    assert list(monitor(1, None, None)) == []  # once a step


@pytest.mark.acceptance
@pytest.mark.parametrize("every", [None, 1, 50])
@pytest.mark.parametrize("budget", [0.02, 0.05, 0.3])
def test_a_budget_is_kept_at_every_moment(clock, every, budget):
    probes = [Costly("dear", 3.0, clock), Costly("cheap", 0.3, clock, price=1.0)]
    monitor = Monitor(probes, every, budget=budget)
    training = 0.0
    last = 2000
    for step in range(last + 1):
        training += 1.0 if step else 0.0
        list(monitor(step, None, None, Host(batch_size=4), training_seconds=training, num_steps=last))
        if step < last:
            assert monitor.spent_seconds <= budget * training + 1e-9
    assert monitor.spent_seconds <= budget * training + 1e-9  # the end was put aside
    if every is None:
        assert monitor.spent_seconds >= 0.9 * budget * training  # and nothing is left over
    # neither starves the other
    assert abs(probes[0]._num_measured - probes[1]._num_measured) <= 1


def test_what_waits_is_measured_as_soon_as_it_can_be_paid(clock):
    monitor = Monitor([Costly("a", 1.0, clock)], 10, budget=0.05)
    found, _ = run(monitor, 100, 1.0, clock, Host(batch_size=4), known_end=False)
    # a measurement costs 20 updates; before the first the price of 10 gradients tells 10 updates, 200 of training
    assert found == []
    found, _ = run(Monitor([Costly("a", 1.0, clock, price=1.0)], 10, budget=0.05), 100, 1.0, clock, Host(batch_size=4))
    # each costs 20 updates, and the one at the end is saved for all along
    assert [step for step, _ in found] == pytest.approx([25, 50, 75, 100], abs=1)


def test_what_costs_nothing_does_not_wait(clock):
    free, dear = Costly("free", 0.0, clock, price=0.0), Costly("dear", 5.0, clock)
    found, _ = run(Monitor([dear, free], 20, budget=0.05), 100, 1.0, clock, Host(batch_size=4))
    assert [step for step, name in found if name == "free"] == [0, 20, 40, 60, 80, 100]


def test_what_can_never_be_paid_for_does_not_keep_the_others_waiting(clock):
    dear, cheap = Costly("dear", 60.0, clock, price=100.0), Costly("cheap", 0.3, clock, price=1.0)
    monitor = Monitor([dear, cheap], 20, budget=0.05)
    found, _ = run(monitor, 1000, 1.0, clock, Host(batch_size=4))
    assert [step for step, name in found if name == "dear"] == [1000]
    assert dear.told[0].allowance_gradients < 100  # cut as short as it can be
    assert len([step for step, name in found if name == "cheap"]) > 20


def test_the_end_is_put_aside_also_for_what_was_never_measured(clock):
    slow = Costly("slow", 20.0, clock, price=20.0)
    quick = Costly("quick", 1.0, clock, price=1.0)
    monitor = Monitor([slow, quick], {"slow": 1000, "quick": 1}, budget=0.05)
    _, training = run(monitor, 1000, 1.0, clock, Host(batch_size=4))
    assert slow._num_measured >= 1
    assert monitor.spent_seconds <= 0.05 * training + 1e-9


def test_the_monitors_own_clock_goes_on_after_a_resume(clock):
    def build():
        return Monitor([Costly("a", 1.0, clock)], 10, budget=0.05)

    first = build()
    for step in range(1, 501):
        clock.now += 1.0
        list(first(step, None, None, Host(batch_size=4)))
    state = first.state_dict()
    clock.now += 1e4  # the time in between is nobody's
    second = build()
    second.load_state_dict(state)
    steps = []
    for step in range(501, 701):
        clock.now += 1.0
        steps += [step for _, e in second(step, None, None, Host(batch_size=4)) if e.price_gradients]
    assert len(steps) == pytest.approx(10, abs=1)
    assert steps[0] <= 520


def test_examples_of_a_batch_without_weight_are_counted(clock):
    batch = (torch.zeros(32, 3), torch.zeros(32))
    one, other = (Monitor([Costly("a", 1.0, clock, batches=b)], None, budget=0.1) for b in ([batch], [(batch, 32)]))
    for monitor in (one, other):
        steps = []
        for step in range(1, 1201):
            steps += [step for _ in monitor(step, None, None, Host(batch_size=4), training_seconds=float(step))]
        assert steps[0] == pytest.approx(800, abs=2)  # ten gradients of eight updates each


def test_the_first_measurement_is_free_where_nothing_tells_its_cost(clock):
    monitor = Monitor([Costly("a", 1.0, clock)], 10, budget=0.05)
    found, _ = run(monitor, 60, 1.0, clock, known_end=False)
    assert found == [(0, "a"), (40, "a"), (60, "a")]  # the debt of 20 updates is paid back first


def test_the_allowance_is_told_in_gradients(clock):
    probe = Costly("a", 1.0, clock)  # ten gradients a second
    monitor = Monitor([probe], None, budget=0.1)
    list(monitor(0, None, None, training_seconds=0.0))
    assert probe.told[0].allowance_gradients == float("inf")
    list(monitor(30, None, None, training_seconds=30.0))
    assert probe.told[1].allowance_gradients == pytest.approx((0.1 * 30 - 1.0) * 10)
    list(monitor(31, None, None, training_seconds=31.0, num_steps=31))
    assert probe.told[2].allowance_gradients == pytest.approx((0.1 * 31 - 2.0) * 10)  # at the end what is left


def test_probes_wait_for_what_they_need(clock):
    needy = Costly("needy", 1.0, clock, needs=["update"])
    monitor = Monitor([needy], 5)
    assert monitor.wants("update", 5)
    assert not monitor.wants("update", 6)
    assert not monitor.wants("preconditioner", 5)
    assert list(monitor(0, None, None)) == []
    assert next(name for name, _ in monitor(5, None, None, Host(update=[torch.ones(1)]))) == "needy"
    assert Host(preconditioner=lambda: None).answers(frozenset()) is True
    assert Host(preconditioner=lambda: None).answers(frozenset({"preconditioner"})) is False
    assert Host(preconditioner=lambda: [torch.ones(1)]).answers(frozenset({"preconditioner"})) is True


def test_state_goes_on_where_it_was(clock):
    def build():
        return Monitor([Costly("a", 1.0, clock), Costly("b", 2.0, clock)], None, budget=0.1)

    whole, _ = run(build(), 200, 1.0, clock)
    first = build()
    found, training = [], 0.0
    for step in range(201):
        training += 1.0 if step else 0.0
        if step == 90:
            second = build()
            second.load_state_dict(first.state_dict())
            first = second
        names = [name for name, _ in first(step, None, None, training_seconds=training, num_steps=200)]
        found += [(step, name) for name in names if "/" not in name]
    assert found == whole


def test_a_state_may_know_other_probes(clock):
    old = Monitor([Costly("a", 1.0, clock), Costly("gone", 2.0, clock)], 1)
    list(old(1, None, None))
    new = Monitor([Costly("a", 1.0, clock), Costly("new", 2.0, clock)], 1)
    new.load_state_dict(old.state_dict())
    assert new.due(1) == ["new"]
    assert new.probes["a"]._num_measured == 1


def test_without_a_given_time_the_monitor_looks_at_the_clock(clock):
    monitor = Monitor([Costly("a", 1.0, clock)], None, budget=0.1)
    steps = []
    for step in range(1, 61):
        clock.now += 1.0
        steps += [step for name, _ in monitor(step, None, None) if "/" not in name]
    # at step 1 it is free; from then on every ten seconds of training
    assert steps == [1, 20, 30, 40, 50, 60]


def test_refused_settings(clock):
    twin = [Costly("a", 1.0, clock), Costly("a", 1.0, clock)]
    with pytest.raises(UserError, match="probes must have different names, got a, a"):
        Monitor(twin, 1)
    with pytest.raises(UserError, match="budget must be positive and finite, got 0"):
        Monitor(twin[:1], 1, budget=0)
    with pytest.raises(UserError, match="every_steps of the probe 'a' must be at least 1, got 0"):
        Monitor(twin[:1], 0)
    with pytest.raises(UserError, match="every_steps of the probe 'a' must be given where there is no budget"):
        Monitor(twin[:1], {"b": 3})


@pytest.mark.acceptance
def test_training_with_a_monitor_gives_the_same_bits_and_keeps_to_the_budget():
    """Anybody's loop: the weights are those of a run without, and the share of time is what was asked for."""

    def training(budget):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 10))
        inputs, targets = torch.randn(512, 64), torch.randint(10, (512,))
        loss = OutputLoss(nn.CrossEntropyLoss(reduction="none"), likelihood="categorical")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        probe = SharpnessProbe([((inputs[:128], targets[:128]), 128)], route="finite_difference", tol=0.1)
        monitor = Monitor([probe], None, budget=budget) if budget else None
        host, seconds, values = Host(batch_size=512), 0.0, []
        for step in range(1, 901):  # a measurement costs as much as some forty of these updates
            began = time.perf_counter()
            optimizer.zero_grad()
            loss(model, (inputs, targets)).backward()
            optimizer.step()
            seconds += time.perf_counter() - began
            if monitor is not None:
                values += [e.value for _, e in monitor(step, model, loss, host, training_seconds=seconds)]
        return model.state_dict(), values, monitor.spent_seconds / seconds if monitor else 0.0

    alone, _, _ = training(None)
    probed, values, share = training(0.2)
    assert all(torch.equal(a, b) for a, b in zip(alone.values(), probed.values(), strict=True))
    assert len(values) >= 3
    assert all(b > 0 for b in values)
    assert share < 0.3  # this machine's clock is what it is; the exact rule is tested with a clock of our own


def test_due_is_in_the_order_of_the_last_measurements(clock):
    monitor = Monitor([Costly(n, 1.0, clock) for n in "abc"], {"a": 2, "b": 3, "c": 6})
    for step in range(1, 6):
        list(monitor(step, None, None))
    assert monitor.due(6) == ["c", "b", "a"]
    assert list(itertools.chain(monitor.due(7))) == []
