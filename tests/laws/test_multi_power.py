"""The multi-power law: recovery, the published errors at the published parameters, and the regularised fit."""

import dataclasses
import math

import numpy as np
import pytest

from landscape_ray.errors import UserError
from landscape_ray.laws import LAWS, Curve, CurveSet, fit_curves, fit_multi_power, leave_one_schedule_out, predict_curve
from landscape_ray.laws.memory.multi_power import MULTI_POWER
from landscape_ray.laws.memory.regularised import CENTRE

TRUTH = {"L0": 2.5, "A": 0.4, "alpha": 0.5, "B": 400.0, "C": 0.02, "beta": 0.6, "gamma": 0.7}
TRAINED_ON = ("cosine_24000", "constant_24000", "wsdcon_9")
PUBLISHED = {
    "25M": (3.04045406, 0.52468604, 0.50786857, 363.78751622, 2.06560812, 0.58279013, 0.64142257),
    "100M": (2.6514477, 0.60115152, 0.45295811, 437.9464276, 2.13245612, 0.59785199, 0.65523644),
    "400M": (2.37474466, 0.65421216, 0.42878731, 523.42464371, 2.02462735, 0.59350493, 0.63472457),
}
ERRORS = {  # mean R2, MAE, relative error and worst relative error over the six curves that were not fitted
    "25M": (0.9988, 0.00376, 0.00110, 0.00409),
    "100M": (0.9983, 0.00435, 0.00142, 0.00583),
    "400M": (0.9978, 0.00484, 0.00168, 0.00995),
}
UNREGULARISED = {"25M": 0.00137, "100M": 0.00165, "400M": 0.00216}
"""Mean relative error over the six of the best optimum of the authors' objective."""


def synthetic_curve(name, num_steps=2000, warmup=100, noise=0.0, truth=TRUTH, seed=0):
    k = np.arange(num_steps)
    progress = np.clip((k - warmup) / (num_steps - warmup), 0, 1)
    body = {
        "constant": np.ones(num_steps),
        "cosine": 0.1 + 0.45 * (1 + np.cos(np.pi * progress)),
        "step": np.where(progress < 0.5, 1.0, 0.3),
        "linear": 1 - 0.95 * progress,
    }[name]
    lr = 1e-3 * np.where(k < warmup, (k + 1) / warmup, body)
    step = np.arange(150, num_steps + 1, 50)
    bare = Curve(name, lr, step, np.ones(len(step)), warmup)
    loss = MULTI_POWER.predict(MULTI_POWER.prepare(CurveSet([bare]), {}), truth)
    error = noise * np.random.default_rng(seed).standard_normal(len(step))
    return dataclasses.replace(bare, loss_nats=loss * np.exp(error))


@pytest.fixture(scope="module")
def exact():
    return [synthetic_curve(name) for name in ("constant", "cosine", "step")]


def mean_errors(parameters, curves, names):
    rows = []
    for name in names:
        data = CurveSet([curves[name]])
        predicted = MULTI_POWER.predict(MULTI_POWER.prepare(data, {}), parameters)
        error, loss = predicted - data.response, data.response
        r2 = 1 - (error**2).sum() / ((loss - loss.mean()) ** 2).sum()
        rows.append((r2, np.abs(error).mean(), (np.abs(error) / loss).mean(), (np.abs(error) / loss).max()))
    return np.mean(rows, axis=0)


@pytest.mark.acceptance
def test_noise_free_recovery(exact):
    fit = fit_curves(MULTI_POWER, exact, num_bootstrap=0, huber_delta=math.inf)
    for name, value in TRUTH.items():
        assert fit.parameters[name] == pytest.approx(value, rel=1e-4)
    assert fit.residuals["max_abs"] < 1e-7


def test_slopes_are_those_of_the_complex_step(exact):
    x = MULTI_POWER.prepare(CurveSet(exact), {})
    at = {name: np.array([[value]]) for name, value in TRUTH.items()}
    for j, by_name in enumerate(MULTI_POWER.slopes(x, at)):
        for name in MULTI_POWER.nonlinear_names:
            moved = MULTI_POWER.columns(x, {**at, name: at[name] + 1e-100j})[j]
            expected = np.imag(moved) / 1e-100 if np.iscomplexobj(moved) else 0.0
            np.testing.assert_allclose(by_name.get(name, 0.0), expected, rtol=1e-9, atol=1e-15)


def test_an_unseen_schedule_is_predicted(exact):
    fit = fit_curves(MULTI_POWER, exact, num_bootstrap=0)
    other = synthetic_curve("linear")
    found = predict_curve(fit, other.lr, other.step, other.warmup_steps)
    np.testing.assert_allclose(found.loss_nats, other.loss_nats, rtol=1e-6)


def test_strength_is_chosen_by_schedules_that_were_left_out():
    runs = [
        synthetic_curve(name, noise=1e-3, seed=i) for i, name in enumerate(("constant", "cosine", "step", "linear"))
    ]
    fit = fit_multi_power(runs, strengths=[1e-8, 1e-5], num_bootstrap=0)
    record = fit.certificate["regularisation"]
    errors = record["unseen_errors"]
    assert len(errors) == 2
    assert errors[repr(record["strength"])] == min(errors.values())
    assert fit.law == "multi_power"
    companions = fit_multi_power(runs[:3], companions=[runs[1:]], strengths=[1e-6, 1e-5], num_bootstrap=0)
    assert companions.certificate["regularisation"]["num_groups"] == 2


def test_a_strong_penalty_ends_at_the_centre_and_none_at_the_optimum(exact):
    held = fit_multi_power(exact, strengths=[math.inf], num_bootstrap=0)
    assert {name: held.parameters[name] for name in CENTRE} == pytest.approx(CENTRE, rel=1e-12)
    assert held.certificate["regularisation"]["held_at_centre"]
    strong = fit_multi_power(exact, strengths=[1e3], num_bootstrap=0)
    assert all(strong.parameters[name] == pytest.approx(CENTRE[name], rel=1e-4) for name in CENTRE)
    free = fit_multi_power(exact, strengths=[0.0], num_bootstrap=0)
    assert free.parameters["gamma"] == pytest.approx(TRUTH["gamma"], rel=1e-3)


def test_points_of_a_shared_trunk_count_once(exact):
    trunk, branch = synthetic_curve("constant"), synthetic_curve("step")
    shared = CurveSet([trunk, branch]).shared
    assert not shared[0].any()
    assert shared[1].sum() == (branch.step <= 1050).sum()
    assert len(CurveSet([trunk, branch], count_once=True).response) == 38 * 2 - shared[1].sum()
    fit = fit_curves(MULTI_POWER, exact, num_bootstrap=0)
    assert any(warning.startswith("shared_points: step (19 points)") for warning in fit.warnings)


def test_runs_weigh_the_same_if_asked_for():
    curves = [synthetic_curve("constant"), synthetic_curve("cosine", num_steps=1000)]
    weights = CurveSet(curves, equal_runs=True).weights
    run = CurveSet(curves).run
    assert weights[run == 0].sum() == pytest.approx(weights[run == 1].sum())
    late = CurveSet(curves[:1], late_weight=1.0).weights
    np.testing.assert_allclose(late / late[0], curves[0].step / curves[0].step[0])
    assert CurveSet(curves).weights is None


def test_without_a_decay_its_effect_is_not_identified():
    runs = [synthetic_curve("constant", num_steps=n, noise=1e-3) for n in (1500, 2000)]
    runs = [dataclasses.replace(run, run_id=f"r{i}") for i, run in enumerate(runs)]
    fit = fit_multi_power(runs, num_bootstrap=0)
    assert fit.status == "weak"
    assert "B_not_identified" in fit.reasons
    assert any(warning.startswith("strength_not_chosen") for warning in fit.warnings)
    other = synthetic_curve("cosine")
    with pytest.raises(UserError, match=r"lr must not decay, because no fitted run .* and B is not identified"):
        predict_curve(fit, other.lr, [2000], other.warmup_steps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strengths": []}, r"strengths must hold values >= 0, got \[\]"),
        ({"strengths": [-1.0, 1.0]}, "strengths must hold values >= 0"),
        ({"centre": {"C": 1.0}}, "centre must give alpha, C, beta and gamma, got C; give all four"),
        ({"late_weight": 5.0}, r"late_weight must be in \[0, 4\], got 5.0"),
    ],
)
def test_options_out_of_range(exact, options, message):
    with pytest.raises(UserError, match=message):
        fit_multi_power(exact, num_bootstrap=0, **options)


def test_the_registry_lists_the_law():
    assert LAWS["multi_power"] is MULTI_POWER


@pytest.mark.data
@pytest.mark.acceptance
@pytest.mark.parametrize("size", PUBLISHED)
def test_published_parameters_give_the_published_errors(authors_curves, size):
    l0, a, alpha, b, c, beta, gamma = PUBLISHED[size]
    values = {"L0": l0, "A": a, "alpha": alpha, "B": b, "C": c * 3e-4 ** (1 - gamma), "beta": beta, "gamma": gamma}
    curves = authors_curves(size, warmup_counts=True)
    found = mean_errors(values, curves, [name for name in curves if name not in TRAINED_ON])
    np.testing.assert_allclose(found, ERRORS[size], atol=6e-5, rtol=0)


@pytest.fixture(scope="module")
def regularised(authors_curves):
    """Fits to the three training curves of each size; the strength is chosen on the training curves of all sizes."""
    curves = {size: authors_curves(size) for size in PUBLISHED}
    groups = {size: [curves[size][name] for name in TRAINED_ON] for size in PUBLISHED}
    found = {}
    for size in PUBLISHED:
        companions = [groups[other] for other in PUBLISHED if other != size]
        fit = fit_multi_power(groups[size], companions=companions, num_bootstrap=0)
        names = [name for name in curves[size] if name not in TRAINED_ON]
        found[size] = fit, mean_errors(fit.parameters, curves[size], names)
    return found


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.acceptance
@pytest.mark.parametrize("size", PUBLISHED)
def test_the_regularised_fit_beats_the_optimum_on_unseen_schedules(regularised, size):
    fit, errors = regularised[size]
    assert fit.status == "certified"
    assert errors[2] < UNREGULARISED[size]


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.acceptance
@pytest.mark.parametrize(
    "size",
    [
        pytest.param("25M", marks=pytest.mark.xfail(reason=".00119, see bench_multi_power.py", strict=True)),
        "100M",
        pytest.param("400M", marks=pytest.mark.xfail(reason=".00196, see bench_multi_power.py", strict=True)),
    ],
)
def test_the_regularised_fit_is_as_good_as_the_published_one(regularised, size):
    """Nor does any candidate of `scripts/bench_multi_power.py` that training schedules alone choose, at 25M and 400M.

    The published errors owe to a search that stops early, which by errors on training schedules is not chosen.
    """
    assert regularised[size][1][2] <= ERRORS[size][2]


@pytest.mark.slow
@pytest.mark.data
def test_leaving_schedules_out_of_published_curves(authors_curves):
    curves = authors_curves("100M")
    runs = [curves[name] for name in (*TRAINED_ON, "wsdld_20000_24000")]
    found = leave_one_schedule_out(runs, law=MULTI_POWER, fitter=fit_multi_power, strengths=[1e-6], num_bootstrap=0)
    assert max(abs(one.relative_error) for one in found) < 0.006
