"""Sums over the past in lumps, against the sums themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from landscape_ray.laws.memory.functional import noises
from landscape_ray.laws.memory.lumps import Lumps, lump
from landscape_ray.laws.memory.multi_power import changes


def multi_power_sum(lr, step, c, beta, gamma):
    """The sum of the law as it is written, in its own units."""
    peak, out = lr.max(), []
    for s in step:
        k = np.arange(1, s)
        reach = c * (lr[k] / peak) ** -gamma * np.array([lr[i:s].sum() for i in k]) / peak
        out.append(np.sum((lr[k - 1] - lr[k]) * (1 - (1 + reach) ** -beta)))
    return np.array(out)


def lumped(lr, step, c, beta, gamma):
    drops = changes(lr, 0, np.asarray(step))
    return drops.sum(1 - (1 + c * np.exp(-gamma * drops.q) * drops.age) ** -beta)


SCHEDULES = {
    "cosine": 0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * np.arange(900) / 900)),
    "steps": np.repeat([1.0, 0.5, 0.7, 0.1], [300, 200, 150, 250]),
    "warm-up and exponential": np.concatenate([np.linspace(0.01, 1, 100), 0.997 ** np.arange(800)]),
    "to zero": np.linspace(1, 0.0011, 900),
    "rough": 0.5 + 0.4 * np.random.default_rng(0).random(900),
}


@pytest.mark.acceptance
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("shape", [(0.01, 0.5, 0.5), (1.0, 1.5, 1.0), (1e-4, 0.1, 0.0)])
def test_lumped_changes_are_the_sum_of_the_law(name, shape):
    lr, step = SCHEDULES[name], np.array([1, 2, 150, 300, 301, 640, 900])
    np.testing.assert_allclose(lumped(lr, step, *shape), multi_power_sum(lr, step, *shape), rtol=0, atol=1e-8)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0.05, 2))
def test_any_schedule(num_steps, seed, gamma, beta):
    rng = np.random.default_rng(seed)
    lr = np.repeat(0.01 + rng.random(num_steps), rng.integers(1, 4, num_steps))[:num_steps]
    step = np.unique(rng.integers(1, num_steps + 1, 5))
    np.testing.assert_allclose(
        lumped(lr, step, 0.1, beta, gamma), multi_power_sum(lr, step, 0.1, beta, gamma), rtol=0, atol=1e-7
    )


def test_rates_of_zero_are_felt_at_once_or_not_at_all():
    lr = np.array([1.0, 1.0, 0.0, 0.0, 0.5])
    drops = changes(lr, 0, np.array([2, 4, 5]))
    felt = drops.sum(1 - (1 + 0.1 * np.exp(-0.5 * drops.q) * drops.age) ** -0.5)
    assert felt[:2].tolist() == [0.0, 0.0]  # a drop to nothing: no area since
    assert felt[2] == pytest.approx(1 - 0.5 * (1 - (1 + 0.1 * 0.5**-0.5 * 0.5) ** -0.5), rel=1e-9)


def test_a_long_cooldown_costs_some_hundred_terms_a_point():
    lr = np.linspace(1, 0.1, 100_000)
    drops = changes(lr, 0, np.array([50_000, 100_000]))
    assert len(drops.weight) < 1000
    exact = np.sum((lr[0] - lr[1]) * (1 - (1 + 0.01 * lr[1:] ** -0.5 * np.cumsum(lr[::-1])[::-1][1:]) ** -0.5))
    assert drops.sum(1 - (1 + 0.01 * np.exp(-0.5 * drops.q) * drops.age) ** -0.5)[1] == pytest.approx(exact, rel=1e-8)


def test_the_warmup_counts_only_if_it_is_not_declared():
    lr = np.concatenate([np.linspace(0.1, 1, 10), np.ones(20), np.full(20, 0.3)])
    all_changes, later = (changes(lr, warmup, np.array([50])) for warmup in (0, 10))
    assert all_changes.weight.sum() == pytest.approx(0.1 - 0.3)
    assert later.weight.sum() == pytest.approx(0.7)


def test_noises_are_the_sum_of_the_law():
    rng = np.random.default_rng(3)
    lr, batch = 1e-3 * SCHEDULES["cosine"], rng.integers(1, 5, 900).astype(float)
    step, time = np.array([1, 5, 400, 900]), np.cumsum(lr)
    got = noises(lr, batch, step)
    expected = [np.sum(lr[:s] ** 2 / batch[:s] * (1 + 300 * (time[s - 1] - time[:s])) ** -0.8) for s in step]
    np.testing.assert_allclose(got.sum((1 + 300 * got.age) ** -0.8), expected, rtol=1e-6)


def test_points_without_a_past_sum_to_zero():
    found = lump(np.zeros(5), np.zeros(5), np.arange(5.0), np.array([1, 5]), np.array([1.0, 5.0]))
    assert found.sum(np.ones(len(found.weight))).tolist() == [0.0, 0.0]
    both = Lumps.join([found, found])
    assert both.first.tolist() == [0, 1, 2, 3]
