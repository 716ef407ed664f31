"""What a registered law over points promises: exact derivatives, recovery without noise, a lossless record, errors."""

import dataclasses
import runpy
from pathlib import Path

import numpy as np
import pytest

from landscape_ray.errors import UserError
from landscape_ray.laws import LAWS, FitResult, Objective, Points, fit, predict_points
from landscape_ray.laws.core.bound import Bound

SIZES, TOKENS = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e10, 5), np.geomspace(1e9, 1e11, 5)))
BATCH = np.geomspace(1e3, 1e7, 9)
EXAMPLES = {
    "lr_power": ({"N": SIZES, "D": TOKENS}, {"c": 1.79, "p": 0.713, "q": 0.307}),
    "batch_power": ({"N": SIZES, "D": TOKENS}, {"k": 0.58, "r": -0.1, "s": 0.571}),
    "lr_horizon": ({"D": np.geomspace(1e9, 1e12, 7)}, {"c": 2.5, "beta": 0.32}),
    "lr_horizon_size": ({"N": SIZES, "D": TOKENS}, {"c": 2.0, "p": 0.4, "beta": 0.3, "gamma": 0.02}),
    "lr_batch_linear": ({"batch": BATCH}, {"c": 1e-8}),
    "lr_batch_sqrt": ({"batch": BATCH}, {"c": 1e-6}),
    "lr_batch_power": ({"batch": BATCH}, {"c": 1e-6, "a": 0.7}),
    "lr_batch_saturating": ({"batch": BATCH}, {"lr_max": 3e-3, "B_noise": 2e5, "a": 0.5}),
    "lr_batch_surge": ({"batch": BATCH}, {"lr_max": 3e-3, "B_noise": 2e5}),
    "steps_batch": ({"batch": BATCH}, {"S_min": 800.0, "E_min": 3e8}),
    "critical_batch_tokens": ({"D": np.geomspace(1e8, 1e11, 6)}, {"c": 22.9, "k": 0.47}),
    "loss_to_loss": ({"loss_0": np.linspace(2.2, 5, 30)}, {"E1": 1.2, "K": 0.9, "kappa": 1.1, "E0": 1.5}),
    "excess_to_excess": ({"excess_0": np.geomspace(0.3, 3, 12)}, {"K": 0.9, "kappa": 1.1}),
    "task_loss": ({"N": SIZES, "D": TOKENS}, {"E": 0.5, "A": 40.0, "alpha": 0.25, "B": 100.0, "beta": 0.23}),
    "task_accuracy": (
        {"task_loss": np.linspace(0.3, 1.5, 30)},
        {"top": 0.95, "drop": 0.7, "k": 6.0, "L_half": 0.7},
    ),
}
each = pytest.mark.parametrize("name", EXAMPLES)


def example(name):
    variables, truth = EXAMPLES[name]
    law = LAWS[name]
    return (
        law,
        variables,
        truth,
        np.asarray(law.predict(variables, truth)) + np.zeros(len(next(iter(variables.values())))),
    )


def coordinates(law, truth):
    return np.array([[p.inward(truth[p.name]) for p in law.parameters if p.role == "nonlinear"]], dtype=float)


@each
def test_derivatives_equal_finite_differences_and_the_complex_step(name):
    law, variables, truth, y = example(name)
    at = coordinates(law, truth) + 0.01
    bound = Bound(law, variables, len(y), {})
    _, slopes = bound.columns(at)
    _, stepped = Bound(dataclasses.replace(law, slopes=None), variables, len(y), {}).columns(at)
    np.testing.assert_allclose(slopes, stepped, rtol=1e-9, atol=1e-12)
    for i in range(at.shape[1]):
        up, down = at.copy(), at.copy()
        up[0, i] += 1e-6
        down[0, i] -= 1e-6
        difference = (bound.columns(up)[0] - bound.columns(down)[0]) / 2e-6
        np.testing.assert_allclose(slopes[..., i], difference, rtol=1e-5, atol=1e-7)


@each
def test_noise_free_recovery_and_a_lossless_record(name):
    law, variables, truth, y = example(name)
    found = fit(law, Points(variables, y), objective=Objective("least_squares"), num_bootstrap=5)
    assert found.status != "failed"
    for parameter, value in truth.items():
        assert found.parameters[parameter] == pytest.approx(value, rel=1e-5), parameter
    assert FitResult.from_json(found.to_json()) == found
    point = {variable: values[3] for variable, values in variables.items()}
    assert predict_points(law, found, point).value[0] == pytest.approx(y[3], rel=1e-7)


@each
def test_bad_tables_are_refused(name):
    law, variables, _, y = example(name)
    first = law.variables[0]
    with pytest.raises(UserError, match=f"missing: {first.name}"):
        fit(law, Points({v: a for v, a in variables.items() if v != first.name}, y))
    with pytest.raises(UserError, match=f"{first.name} must be > 0, got -1"):
        fit(law, Points(variables | {first.name: np.where(np.arange(len(y)) == 2, -1.0, variables[first.name])}, y))
    with pytest.raises(
        UserError, match=f"{first.name} must have at least {first.min_distinct} different values, got 1"
    ):
        fit(law, Points(variables | {first.name: np.full(len(y), 2.0)}, y))


def test_a_law_says_what_it_is():
    for name in EXAMPLES:
        law = LAWS[name]
        assert law.reference
        assert law.title
        assert law.formula
        assert all(parameter.meaning for parameter in law.parameters)


def test_draws_of_estimates_widen_intervals_and_need_their_shape():
    law, variables, _, y = example("lr_horizon")
    draws = y * np.exp(0.1 * np.random.default_rng(0).standard_normal((200, len(y))))
    points = Points(variables, y)
    sharp = fit(law, points, num_bootstrap=200)
    wide = fit(law, points, num_bootstrap=200, draws=draws)
    spread = 0.1 / np.sqrt(((np.log(variables["D"]) - np.log(variables["D"]).mean()) ** 2).sum())
    low, high = wide.intervals["beta"]
    assert sharp.intervals["beta"][1] - sharp.intervals["beta"][0] < 1e-6
    assert 2.0 * 1.64 * spread < high - low < 4.5 * 1.64 * spread  # draws alone give 2; weights of the points add to it
    with pytest.raises(UserError, match="draws must have shape"):
        fit(law, points, num_bootstrap=100, draws=draws)


def test_every_registered_law_of_points_has_its_contract_tested():
    scaling = runpy.run_path(str(Path(__file__).with_name("scaling") / "test_contract.py"))["EXAMPLES"]
    assert {*EXAMPLES, *scaling} == {name for name, law in LAWS.items() if law.of == "points"}
