"""A law as data: what is derived from its declaration."""

import dataclasses

import numpy as np
import pytest

from landscape_ray.errors import UserError
from landscape_ray.laws import Law, Variable, grid, linear, nonlinear
from landscape_ray.laws.core.bound import Bound, halton

SATURATING = Law(
    name="saturating",
    formula="y = a + b (1 - exp(-k x)) + c x^-q",
    variables=(Variable("x"),),
    parameters=(
        linear("a"),
        linear("b", free=True),
        nonlinear("k", "rate", 1e-3, 1e2, log=True),
        linear("c"),
        nonlinear("q", "exponent", 0.1, 3.0),
    ),
    columns=lambda x, p: (1.0, 1 - np.exp(-p["k"] * x["x"]), x["x"] ** -p["q"]),
)
X = {"x": np.geomspace(0.1, 10, 12)}


@pytest.mark.parametrize("fixed", [{}, {"b": 0.7}, {"k": 2.0}])
def test_slopes_by_a_complex_step_are_those_of_differences(fixed):
    bound = Bound(SATURATING, X, 12, fixed)
    at = np.array([[np.log(0.8), 0.6], [np.log(3.0), 1.7]])
    for function in (bound.columns, bound.offset, bound.raw):
        _, slopes = function(at)
        for i in range(2):
            step = np.zeros(2)
            step[i] = 1e-6
            difference = (function(at + step)[0] - function(at - step)[0]) / 2e-6
            np.testing.assert_allclose(slopes[..., i], difference, rtol=1e-6, atol=1e-9)


def test_given_slopes_take_the_place_of_the_complex_step():
    given = dataclasses.replace(
        SATURATING,
        slopes=lambda x, p: (
            {},
            {"k": x["x"] * np.exp(-p["k"] * x["x"])},
            {"q": -np.log(x["x"]) * x["x"] ** -p["q"]},
        ),
    )
    at = np.array([[0.3, 0.6]])
    for one, other in zip(Bound(given, X, 12, {}).raw(at), Bound(SATURATING, X, 12, {}).raw(at), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-13)


def test_coefficients_of_the_fitter_are_terms_in_the_middle_of_the_data():
    bound = Bound(SATURATING, X, 12, {})
    columns, _ = bound.columns(np.array([[0.0, 1.0]]))
    np.testing.assert_allclose(np.exp(np.log(np.abs(columns[0])).mean(axis=0)), 1.0)
    natural = bound.natural(np.array([[1.0, 2.0, 3.0, 0.0, 1.0]]))
    values = {name: float(value[0]) for name, value in natural.items()}
    assert values["k"] == 1.0
    np.testing.assert_allclose(SATURATING.predict(X, values), columns[0] @ [1.0, 2.0, 3.0])


def test_starts_are_a_grid_or_a_sequence():
    separable = Bound(SATURATING, X, 12, {}).separable()
    assert separable.starts.shape == (16, 2)
    assert Bound(SATURATING, X, 12, {"k": 2.0}).separable().starts.shape == (4, 2)
    many = dataclasses.replace(
        SATURATING,
        parameters=tuple(
            p if p.role == "linear" else dataclasses.replace(p, starts=tuple(np.linspace(0.2, 2, 40)))
            for p in SATURATING.parameters
        ),
    )
    assert Bound(many, X, 12, {}).separable().starts.shape == (256, 2)


def test_halton_fills_the_cube_evenly():
    points = halton(512, 3)
    assert ((points > 0) & (points < 1)).all()
    counts, _ = np.histogramdd(points, bins=4, range=[(0, 1)] * 3)
    assert counts.min() >= 4
    assert counts.max() <= 12


def test_grid_values_can_be_changed_and_count_where_there_is_a_choice():
    law = dataclasses.replace(SATURATING, parameters=(*SATURATING.parameters, grid("g", "choice", (1.0,))))
    assert law.num_fitted() == 5
    changed = law.with_grid({"g": [1, 2, 3]})
    assert changed.parameter("g").values == (1.0, 2.0, 3.0)
    assert changed.num_fitted() == 6
    assert changed.num_fitted({"a": 1.0}) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": (linear("a"), linear("a"))}, "parameters must have distinct names, got a, a"),
        ({"parameters": (nonlinear("k", "", 0, 1),)}, "must have a linear parameter, got none"),
        ({"link": np.log}, "must have both link and unlink or neither, got one"),
    ],
)
def test_impossible_declarations(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SATURATING, **changes)


def test_unknown_parameters_and_penalties():
    with pytest.raises(UserError, match="law 'saturating' has no parameter 'z'; it has a, b, k, c, q"):
        SATURATING.parameter("z")
    with pytest.raises(UserError, match="penalty must be on a non-linear parameter without a scale, got 'a'"):
        Bound(SATURATING, X, 12, {}).separable({"a": (1.0, 1.0)})
