"""The momentum law across sizes, the functional law and the convex bound: recovery, guards and exact values."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from landscape_ray.errors import UserError
from landscape_ray.laws import (
    LAWS,
    Curve,
    CurveSet,
    convex_bound,
    fit_annealing,
    fit_curves,
    leave_one_schedule_out,
    objective_sensitivity,
    predict_curve,
    transfer_peak,
)
from landscape_ray.laws.curves.sized import ANNEALING_SIZED
from landscape_ray.laws.memory.convex import CONVEX
from landscape_ray.laws.memory.functional import FUNCTIONAL

SIZED = {"L0": 1.7, "A": 0.4, "alpha": 0.5, "B": 60.0, "beta": 0.25, "C": 0.02, "gamma": 0.2, "decay": 0.98}
NOISY = {"L0": 2.0, "A": 0.3, "s": 0.5, "B": 3000.0, "c": 200.0, "delta": 0.8}


def follow(law, truth, curves):
    """Return the curves with the losses of a law."""
    made = []
    for curve in curves:
        x = law.prepare(CurveSet([curve]), {name: truth[name] for name in law.grid_names})
        made.append(dataclasses.replace(curve, loss_nats=law.predict(x, truth)))
    return made


def bare(synthetic, name, **fields):
    curve = synthetic.curve(name)
    return dataclasses.replace(curve, **{"run_id": f"{name} {sorted(fields.items())}"[:60], **fields})


@pytest.fixture(scope="module")
def sized(synthetic):
    grid = [(name, size) for name in ("constant", "cosine", "wsd_30") for size in (1e7, 1e8, 1e9)]
    return follow(ANNEALING_SIZED, SIZED, [bare(synthetic, name, num_params=size) for name, size in grid])


def two_peaks(synthetic):
    curves = []
    for name, peak, batch in (("constant", 1e-3, 32), ("cosine", 1e-3, 64), ("cosine", 2e-3, 32), ("linear", 5e-4, 16)):
        lr = synthetic.lr(name, peak=peak)
        step = np.arange(80, 1001, 30)
        curves.append(Curve(f"{name} {peak} {batch}", lr, step, np.ones(len(step)), synthetic.warmup, batch))
    return follow(FUNCTIONAL, NOISY, curves)


@pytest.mark.acceptance
def test_sized_law_is_recovered_and_predicts_another_size(synthetic, sized):
    fit = fit_curves(ANNEALING_SIZED, sized, decay=0.98, num_bootstrap=0)
    for name, value in SIZED.items():
        assert fit.parameters[name] == pytest.approx(value, rel=1e-5)
    other = follow(ANNEALING_SIZED, SIZED, [bare(synthetic, "linear", num_params=3e8)])[0]
    found = predict_curve(fit, other.lr, other.step, other.warmup_steps, num_params=3e8)
    np.testing.assert_allclose(found.loss_nats, other.loss_nats, rtol=1e-7)
    with pytest.raises(UserError, match="num_params must be given for law 'annealing_sized', got none"):
        predict_curve(fit, other.lr, other.step, other.warmup_steps)


def test_sizes_are_kept_apart(sized, synthetic):
    with pytest.raises(UserError, match=r"curves must be of one model size for law 'annealing', got num_params 1e\+07"):
        fit_annealing(sized)
    with pytest.raises(UserError, match="curves must have num_params for law 'annealing_sized', missing for cosine"):
        fit_curves(ANNEALING_SIZED, [synthetic.curve("cosine")])
    with pytest.raises(UserError, match="run 'a': num_params must be finite and > 0, got -1"):
        Curve("a", [1.0], [1], [2.0], num_params=-1.0)
    fit = fit_curves(ANNEALING_SIZED, [c for c in sized if c.num_params != 1e9], decay=0.98, num_bootstrap=0)
    assert "few_sizes" in fit.reasons


@pytest.mark.acceptance
def test_functional_law_is_recovered_across_peaks_and_batches(synthetic):
    curves = two_peaks(synthetic)
    fit = fit_curves(FUNCTIONAL, curves, num_bootstrap=0, huber_delta=math.inf)
    for name, value in NOISY.items():
        assert fit.parameters[name] == pytest.approx(value, rel=1e-3)
    ramp = np.where(np.arange(1000) < 500, 16.0, 64.0)
    lr = synthetic.lr("constant", peak=1.5e-3)
    query = follow(FUNCTIONAL, NOISY, [Curve("ramp", lr, [400, 900], [1.0, 1.0], synthetic.warmup, ramp)])[0]
    found = predict_curve(fit, lr, [400, 900], synthetic.warmup, batch_size=ramp)
    np.testing.assert_allclose(found.loss_nats, query.loss_nats, rtol=1e-6)
    assert not any(warning.startswith("peak_lr") for warning in found.warnings)
    high = predict_curve(fit, 4 * lr, [900], synthetic.warmup, batch_size=32.0)
    assert any(
        warning.startswith("peak_lr: peak 0.006 was not fitted (fitted 0.0005 to 0.002)") for warning in high.warnings
    )


def test_larger_batches_and_later_noise(synthetic):
    lr = synthetic.lr("constant")
    small, large = (
        follow(FUNCTIONAL, NOISY, [Curve("b", lr, [900], [1.0], synthetic.warmup, batch)])[0] for batch in (16.0, 64.0)
    )
    assert large.loss_nats[0] < small.loss_nats[0]


def test_functional_law_asks_for_batches_and_variation(synthetic):
    with pytest.raises(
        UserError, match=r"curves must have batch_size for law 'functional', missing for cosine; .*=256"
    ):
        fit_curves(FUNCTIONAL, [synthetic.curve("cosine")])
    with pytest.raises(UserError, match="run 'a': batch_size must be a number > 0, or one for each of 2 updates"):
        Curve("a", [1.0, 1.0], [1], [2.0], batch_size=[1.0, 2.0, 3.0])
    constant = follow(FUNCTIONAL, NOISY, [bare(synthetic, "constant", batch_size=32.0)])
    fit = fit_curves(FUNCTIONAL, constant, num_bootstrap=0)
    assert "noise_not_identified" in fit.reasons
    with pytest.raises(UserError, match=r"decay must be left out for law 'functional', which has none, got 0\.9"):
        fit_curves(FUNCTIONAL, constant, decay=0.9)


@pytest.mark.acceptance
@settings(deadline=None)
@given(st.integers(1, 200), st.floats(1e-3, 10), st.floats(0.1, 10), st.floats(0.1, 10))
def test_convex_bound_of_a_constant_schedule(num_steps, gamma, norm, distance):
    found = convex_bound(np.full(num_steps, gamma), norm, distance)
    harmonic = np.sum(1 / np.arange(1, num_steps))
    assert found.distance == pytest.approx(distance**2 / (2 * gamma * num_steps))
    assert found.noise_now == pytest.approx(gamma * norm**2 / 2)
    assert found.noise_history == pytest.approx(gamma * norm**2 * harmonic / 2)
    assert found.value == pytest.approx(found.distance + found.noise_now + found.noise_history)


def test_convex_bound_is_its_double_sum_and_best_at_its_best_factor():
    rng = np.random.default_rng(0)
    lr, norm = 0.1 + rng.random(40), 0.5 + rng.random(40)
    energy = lr**2 * norm**2
    history = sum(lr[k] / lr[k + 1 :].sum() * energy[k:].sum() / lr[k:].sum() for k in range(39)) / 2
    found = convex_bound(lr, norm, 3.0)
    assert found.noise_history == pytest.approx(history, rel=1e-12)
    best = convex_bound(found.best_factor * lr, norm, 3.0)
    assert best.value == pytest.approx(found.best_value, rel=1e-12)
    for factor in (0.9, 1.1):
        assert convex_bound(factor * found.best_factor * lr, norm, 3.0).value > best.value
    assert convex_bound(np.append(lr, [0.0, 0.0])).value == pytest.approx(convex_bound(lr).value)


def test_a_decay_to_zero_beats_a_constant_rate_at_the_end():
    linear, constant = convex_bound(np.linspace(1, 0.01, 100)), convex_bound(np.ones(100))
    assert linear.best_value < constant.best_value
    assert transfer_peak(1e-3, np.ones(100), np.ones(100)) == pytest.approx(1e-3)
    assert transfer_peak(1e-3, np.ones(100), 7 * np.linspace(1, 0.01, 100)) > 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: convex_bound([1.0, 1.0], [1.0, -1.0]), "grad_norm must be > 0, a number or one for each of 2 updates"),
        (lambda: convex_bound([1.0], 1.0, 0.0), "distance must be finite and > 0, got 0.0"),
        (lambda: convex_bound([0.0]), "convex bound: lr must be finite, >= 0 and somewhere > 0"),
        (lambda: transfer_peak(-1.0, [1.0], [1.0]), "peak_lr must be finite and > 0, got -1.0"),
    ],
)
def test_bounds_of_unsound_input(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_convex_law_is_linear_in_all_its_parameters(synthetic):
    truth = {"L0": 2.0, "A": 0.01, "B": 50.0}
    curves = follow(CONVEX, truth, [synthetic.curve(name) for name in ("constant", "cosine")])
    fit = fit_curves(CONVEX, curves, num_bootstrap=0)
    assert {name: fit.parameters[name] for name in truth} == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("law", [CONVEX, FUNCTIONAL, ANNEALING_SIZED], ids=lambda law: law.name)
def test_every_law_validates_alike(synthetic, sized, law):
    curves = {
        "convex": lambda: follow(
            CONVEX, {"L0": 2.0, "A": 0.01, "B": 50.0}, [synthetic.curve(n) for n in ("constant", "cosine", "linear")]
        ),
        "functional": lambda: two_peaks(synthetic),
        "annealing_sized": lambda: sized,
    }[law.name]()
    options = {"decay": 0.98} if law is ANNEALING_SIZED else {}
    assert LAWS[law.name] is law
    found = leave_one_schedule_out(curves, law=law, num_bootstrap=0, **options)
    assert len(found) == len(curves)
    rows = objective_sensitivity(curves, law=law, **options)
    assert list(rows) == ["huber", "least_absolute", "least_squares"]


def test_a_fit_of_an_unlisted_law_needs_the_law(synthetic):
    fit = fit_annealing(synthetic.curves("constant", "cosine"), decay=0.98, num_bootstrap=0)
    with pytest.raises(UserError, match="law must be given for a fit of 'own', which is not a listed law; pass law="):
        predict_curve(dataclasses.replace(fit, law="own"), synthetic.lr("cosine"), [900], synthetic.warmup)
    points = dataclasses.replace(fit, law="chinchilla")
    with pytest.raises(UserError, match="law 'chinchilla' must be one of loss curves, got one of points"):
        predict_curve(points, synthetic.lr("cosine"), [900], synthetic.warmup)
