"""Curves: the areas against their literal definitions, and the checks on what comes in."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from landscape_ray.errors import UserError
from landscape_ray.laws import Curve, annealing_area
from landscape_ray.laws.curves.curve import data_hash, follows

rates = hnp.arrays(np.float64, st.integers(1, 60), elements=st.floats(0.0, 1.0).map(lambda x: x + 1e-3))


def literal_area(schedule, decay):
    """S2 by its double sum: every drop so far, weighted with how far its momentum has built up."""
    out = []
    for s in range(len(schedule)):
        total = 0.0
        for i in range(1, s + 1):
            for k in range(1, i + 1):
                total += (schedule[k - 1] - schedule[k]) * decay ** (i - k)
        out.append(total)
    return np.array(out)


@pytest.mark.acceptance
@given(rates, st.floats(0.0, 0.9999))
def test_annealing_area_equals_its_double_loop(schedule, decay):
    np.testing.assert_allclose(annealing_area(schedule, decay), literal_area(schedule, decay), rtol=1e-9, atol=1e-12)


@given(rates, st.floats(0.0, 0.999), st.floats(1e-3, 1e3))
def test_annealing_area_is_linear_in_the_schedule(schedule, decay, factor):
    np.testing.assert_allclose(
        annealing_area(factor * schedule, decay),
        factor * annealing_area(schedule, decay),
        rtol=1e-9,
        atol=1e-9 * factor,
    )


def test_annealing_area_of_one_drop_is_a_geometric_sum():
    schedule = np.where(np.arange(300) < 100, 1.0, 0.25)
    since = np.maximum(np.arange(300) - 99, 0)
    np.testing.assert_allclose(annealing_area(schedule, 0.97), 0.75 * (1 - 0.97**since) / 0.03, rtol=1e-12)


def test_annealing_area_without_forgetting_of_zero_is_the_total_drop():
    schedule = np.linspace(1.0, 0.0, 11)
    np.testing.assert_allclose(annealing_area(schedule, 0.0), 1.0 - schedule, atol=1e-15)


def test_warmup_counts_with_the_peak():
    lr = np.array([0.1, 0.2, 0.4, 0.4, 0.2])
    curve = Curve("a", lr, [5], [3.0], warmup_steps=2)
    np.testing.assert_allclose(curve.schedule(), [0.4, 0.4, 0.4, 0.4, 0.2])
    np.testing.assert_allclose(curve.s1(), np.cumsum([0.4, 0.4, 0.4, 0.4, 0.2]))
    np.testing.assert_allclose(curve.s2(0.5), [0, 0, 0, 0, 0.2])
    assert curve.s2(0.5) is curve.s2(0.5)
    assert curve.peak_lr == 0.4


def test_a_curve_keeps_its_own_copy():
    lr = np.ones(4)
    curve = Curve("a", lr, [1, 4], [3.0, 2.0])
    lr[:] = 7
    assert curve.peak_lr == 1.0
    with pytest.raises(ValueError, match="read-only"):
        curve.loss_nats[0] = 1.0


def test_follows_is_about_the_whole_schedule():
    short, long = (Curve(f"{n}", np.full(n, 0.1), [n], [2.0]) for n in (5, 9))
    decayed = Curve("decayed", np.r_[np.full(5, 0.1), np.full(4, 0.05)], [9], [2.0])
    assert follows(long, short)
    assert follows(decayed, short)
    assert not follows(short, long)
    assert not follows(decayed, long)


def test_data_hash_sees_every_field():
    base = {"run_id": "a", "lr": [1.0, 0.5], "step": [1, 2], "loss_nats": [3.0, 2.0], "warmup_steps": 0}
    changes = [
        {},
        {"run_id": "b"},
        {"lr": [1.0, 0.4]},
        {"step": [1], "loss_nats": [3.0]},
        {"loss_nats": [3.0, 2.1]},
        {"warmup_steps": 1},
    ]
    hashes = [data_hash([Curve(**base | change)]) for change in changes]
    assert len(set(hashes)) == len(changes)
    assert hashes[0] == data_hash([Curve(**base)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": []}, r"run 'a': lr must have shape \(num_steps,\), got \(0,\)"),
        ({"lr": [1.0, math.nan]}, "run 'a': lr must be finite, >= 0 and somewhere > 0"),
        ({"lr": [1.0, -1.0]}, "run 'a': lr must be finite, >= 0"),
        ({"lr": [0.0, 0.0]}, "run 'a': lr must be finite, >= 0 and somewhere > 0"),
        ({"step": [], "loss_nats": []}, r"run 'a': step must have shape \(num_points,\), got \(0,\)"),
        ({"step": [1.0, 1.5]}, "run 'a': step must hold whole numbers"),
        ({"step": [0, 1]}, r"run 'a': step must lie in \[1, 2\].*got \[0, 1\]; drop what was measured before"),
        ({"step": [1, 3]}, r"run 'a': step must lie in \[1, 2\].*got \[1, 3\]"),
        ({"step": [2, 1]}, "run 'a': step must increase"),
        ({"loss_nats": [2.0]}, "run 'a': loss_nats must have one value per step, got shape .1,. for 2 steps"),
        ({"loss_nats": [2.0, math.inf]}, "run 'a': loss_nats must be finite and > 0, got inf; drop these points"),
        ({"loss_nats": [2.0, 0.0]}, "run 'a': loss_nats must be finite and > 0, got 0.0"),
        ({"warmup_steps": 2}, r"run 'a': warmup_steps must be in \[0, 1\], got 2"),
    ],
)
def test_errors_name_the_run_and_the_remedy(change, message):
    with pytest.raises(UserError, match=message):
        Curve(**{"run_id": "a", "lr": [1.0, 0.5], "step": [1, 2], "loss_nats": [3.0, 2.0]} | change)
