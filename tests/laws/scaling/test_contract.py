"""What every registered law of points keeps: exact derivatives, recovery, units, JSON, and clear errors.

A new law of points gets an entry in EXAMPLES: a design and the parameters that generate it.
"""

import dataclasses

import numpy as np
import pytest

from landscape_ray.errors import UserError
from landscape_ray.laws import LAWS, FitResult, Objective, Points, fit, predict_points
from landscape_ray.laws.core.bound import Bound


@dataclasses.dataclass(frozen=True)
class Example:
    """A design, what generates it, and the variables whose unit may be changed, alone or together."""

    x: dict[str, np.ndarray]
    truth: dict[str, float]
    units: tuple[tuple[str, ...], ...]


def grid(**axes):
    return {name: a.ravel() for name, a in zip(axes, np.meshgrid(*axes.values(), indexing="ij"), strict=True)}


def geometric(low, high, count):
    return np.geomspace(low, high, count)


def repeated():
    x = grid(N=geometric(1e7, 1e9, 4), U=geometric(1e8, 1e10, 4), epochs=geometric(1, 60, 5))
    return {"N": x["N"], "U": x["U"], "D": x["U"] * x["epochs"]}


def graded():
    rng = np.random.default_rng(0)
    x = grid(N=geometric(1e7, 1e9, 4), D=geometric(1e9, 1e11, 4), repeat=np.arange(5))
    count = len(x["N"])
    return x | {"diversity": rng.uniform(2, 5, count), "syntheticity": rng.uniform(0, 1, count)}


def timed():
    x = grid(N=geometric(1e7, 1e9, 4), D=geometric(1e9, 1e11, 3), b=geometric(1e5, 4e6, 3), shape=geometric(0.3, 3, 3))
    return x | {"S": x["D"] / x["b"], "H": x["shape"] * x["N"] ** (2 / 3)}


NC, DC = 6.4e13, 1.8e13
SURFACE = {"E": 1.8, "A": 480.0, "alpha": 0.347, "B": 2100.0, "beta": 0.367}
TRAJECTORY = {
    "A": 6.5e13**0.077,
    "aN": 0.077,
    "aS": 0.76,
    "F": 2.1e3**0.76 / 6.5e13**0.077,
    "K": 2.1e8 / 6.5e13 ** (0.077 / 0.21),
    "aB": 0.21,
}
SIZES, TOKENS = geometric(1e7, 1e9, 5), geometric(1e9, 1e11, 5)
EXAMPLES = {
    "power": Example(grid(x=geometric(1e3, 1e8, 12)), {"A": 5.0, "alpha": 0.2}, (("x",),)),
    "power_floor": Example(grid(x=geometric(1e3, 1e8, 12)), {"E": 1.5, "A": 5.0, "alpha": 0.2}, (("x",),)),
    "broken_power": Example(
        grid(x=geometric(1e2, 1e8, 31)), {"E": 0.5, "A": 3.0, "alpha": 0.4, "x0": 2e4, "f": 0.5}, (("x",),)
    ),
    "compute_frontier": Example(grid(C=geometric(1e17, 1e21, 8)), {"k": 0.0009, "b": 0.5681}, (("C",),)),
    "kaplan_size": Example(grid(N=geometric(1e6, 1e9, 9)), {"A": 8.8e13**0.076, "aN": 0.076}, (("N",),)),
    "kaplan_data": Example(grid(D=geometric(1e7, 1e10, 9)), {"A": 5.4e13**0.095, "aD": 0.095}, (("D",),)),
    "kaplan_compute": Example(grid(C=geometric(1e17, 1e22, 9)), {"A": 20.0, "aC": 0.05}, (("C",),)),
    "kaplan_size_data": Example(
        grid(N=geometric(1e6, 1e9, 6), D=geometric(2e7, 2e10, 6)),
        {"A": NC**0.076, "g": 0.076 / 0.103, "aD": 0.103, "q": DC * NC ** (-0.076 / 0.103)},
        (("N",), ("D",)),
    ),
    "kaplan_size_steps": Example(
        grid(N=geometric(1e6, 1e9, 5), S_min=geometric(1e3, 1e5, 8)),
        {"A": 6.5e13**0.077, "aN": 0.077, "F": 2.1e3**0.76, "aS": 0.76},
        (("N",), ("S_min",)),
    ),
    "kaplan_trajectory": Example(
        grid(N=geometric(1e6, 1e9, 3), S=geometric(1e3, 1e5, 6), B=geometric(3e4, 3e6, 4)),
        TRAJECTORY,
        (("N",), ("S",), ("B",)),
    ),
    "critical_batch": Example(grid(L=geometric(2, 8, 9)), {"Bstar": 2e8, "inverse_aB": 4.76}, (("L",),)),
    "chinchilla": Example(grid(N=SIZES, D=TOKENS), SURFACE, (("N",), ("D",))),
    "overtraining": Example(
        grid(N=SIZES, M=geometric(5, 640, 5)), {"E": 1.8, "a": 200.0, "b": 300.0, "alpha": 0.3}, (("N",), ("M",))
    ),
    "overtraining_compute": Example(
        grid(C=geometric(1e17, 1e21, 5), M=geometric(5, 640, 5)),
        {"E": 1.8, "a": 200.0, "b": 1300.0, "eta": 0.15},
        (("C",), ("M",)),
    ),
    "downstream_error": Example(grid(L=np.linspace(2, 4.5, 12)), {"epsilon": 0.85, "k": 2.0, "gamma": 0.9}, ()),
    "repetition": Example(repeated(), SURFACE | {"RD": 15.4}, (("N",), ("D", "U"))),
    "effective_tokens": Example(
        graded(), SURFACE | {"c_diversity": 0.3, "c_syntheticity": -0.8}, (("N",), ("D",), ("diversity",))
    ),
    "training_time": Example(timed(), {"c": 1e-14, "w": 1e-11, "u": 3e-12, "o": 0.02}, (("N",), ("H",))),
    "data_dimension": Example(grid(d=geometric(2, 60, 9)), {"c": 4.0, "b": 1.0}, (("d",),)),
    "finetuning": Example(
        grid(N=geometric(1e8, 1e10, 5), D_f=geometric(1e3, 1e6, 5)),
        {"E": 0.8, "A": 30.0, "alpha_N": 0.1, "alpha_D_f": 0.15},
        (("N",), ("D_f",)),
    ),
    "concept_frequency": Example(grid(frequency=geometric(1, 1e5, 9)), {"a": 0.1, "b": 0.05}, (("frequency",),)),
    "accuracy_probit": Example(grid(accuracy_in=np.linspace(0.4, 0.95, 9)), {"a": -0.5, "b": 0.9}, ()),
    "accuracy_logit": Example(grid(accuracy_in=np.linspace(0.4, 0.95, 9)), {"a": -0.5, "b": 0.9}, ()),
}
SQUARES = Objective("least_squares")
every_law = pytest.mark.parametrize("name", sorted(EXAMPLES))


def noisy(name, seed=0):
    law, example = LAWS[name], EXAMPLES[name]
    y = law.predict(example.x, example.truth)
    noise = 0.003 * np.random.default_rng(seed).standard_normal(len(y))
    return Points(example.x, y * np.exp(noise) if law.space == "log" else np.clip(y + noise, 1e-3, 1 - 1e-3))


def test_the_registry_knows_laws_by_their_names():
    assert all(name == law.name for name, law in LAWS.items())


@every_law
def test_it_says_what_it_is(name):
    law = LAWS[name]
    assert law.title
    for parameter in law.parameters:
        assert parameter.meaning, parameter.name
        assert parameter.name in law.formula, parameter.name
    assert set(EXAMPLES[name].truth) == {parameter.name for parameter in law.parameters}


@every_law
def test_derivatives_equal_finite_differences(name):
    law, example = LAWS[name], EXAMPLES[name]
    count = len(next(iter(example.x.values())))
    bound = Bound(law, example.x, count, {})
    # The coordinate of a parameter with a scale is its multiple of that, taken at the others' true values.
    ones = [np.full((1, 1), p.inward(1.0 if p.scale else example.truth[p.name])) for p in bound.inner]
    scale = bound.values(ones)
    truth = [
        p.inward(example.truth[p.name] / (np.asarray(scale[p.name]).item() if p.scale else 1.0)) for p in bound.inner
    ]
    at = np.array([truth], dtype=np.float64).reshape(1, len(bound.inner))
    columns, slopes = bound.columns(at)
    assert columns.shape == (1, count, len(law.linear_names))
    for i in range(len(bound.inner)):
        step = np.zeros_like(at)
        step[0, i] = 1e-6 * max(abs(at[0, i]), 0.1)
        expected = (bound.columns(at + step)[0] - bound.columns(at - step)[0]) / (2 * step[0, i])
        np.testing.assert_allclose(slopes[..., i], expected, rtol=1e-5, atol=1e-7 * np.abs(columns).max())


@pytest.mark.acceptance
@every_law
def test_noise_free_recovery(name):
    law, example = LAWS[name], EXAMPLES[name]
    found = fit(law, Points(example.x, law.predict(example.x, example.truth)), num_bootstrap=0)
    for parameter, value in example.truth.items():
        assert found.parameters[parameter] == pytest.approx(value, rel=1e-8), parameter
    assert found.status == "certified"
    assert found.certificate["agree_share"] >= 0.9


@every_law
def test_units_of_a_variable_do_not_matter(name):
    """In another unit, the same predictions at the same exponents."""
    law, example, points = LAWS[name], EXAMPLES[name], noisy(name)
    found = fit(law, points, objective=SQUARES, num_bootstrap=0)
    plain = [p.name for p in law.parameters if p.role == "nonlinear" and p.scale is None]
    for group in example.units:
        x = {key: values * (1e-3 if key in group else 1.0) for key, values in example.x.items()}
        again = fit(law, Points(x, points.response), objective=SQUARES, num_bootstrap=0)
        assert again.objective["value"] == pytest.approx(found.objective["value"], rel=1e-7)
        for parameter in plain:
            assert again.parameters[parameter] == pytest.approx(found.parameters[parameter], rel=1e-4), parameter
        np.testing.assert_allclose(
            law.predict(x, again.parameters), law.predict(example.x, found.parameters), rtol=1e-5
        )


@every_law
def test_json_round_trip_and_prediction(name):
    law, example, points = LAWS[name], EXAMPLES[name], noisy(name)
    found = fit(law, points, objective=SQUARES, num_bootstrap=8, seed=3)
    again = FitResult.from_json(found.to_json())
    assert again == found
    prediction = predict_points(law, again, {v.name: example.x[v.name] for v in law.variables})
    assert (prediction.low <= prediction.high).all()
    assert (prediction.measured_low <= prediction.measured_high).all()
    np.testing.assert_allclose(prediction.value, points.response, rtol=0.05, atol=0.02)
    assert set(found.derived_intervals) <= set(found.derived)
    assert found.data["sha256"] == again.data["sha256"]


@every_law
def test_bad_points_are_refused(name):
    law, points = LAWS[name], noisy(name)
    first = law.variables[0].name
    x = {key: np.array(values) for key, values in points.variables.items()}
    y = np.array(points.response)
    with pytest.raises(UserError, match=f"missing: {first}"):
        fit(law, Points({key: values for key, values in x.items() if key != first}, y))
    for bad, message in ((np.nan, "response must be finite, got nan"), (np.inf, "response must be finite, got inf")):
        with pytest.raises(UserError, match=message):
            Points(x, np.r_[bad, y[1:]])
    with pytest.raises(UserError, match=f"{law.response.name} must be > 0, got -1"):
        fit(law, Points(x, np.r_[-1.0, y[1:]]))
    with pytest.raises(UserError, match=r"must have at least \d different values, got 1"):
        fit(law, Points(x | {first: np.full_like(y, x[first][0])}, y))
    positive = [variable.name for variable in law.variables if variable.positive]
    with pytest.raises(UserError, match=f"{positive[0]} must be > 0, got 0"):
        fit(law, Points(x | {positive[0]: np.r_[0.0, x[positive[0]][1:]]}, y))


@every_law
def test_too_few_points_are_refused(name):
    law, points = LAWS[name], noisy(name)
    count = law.num_fitted()
    kept = points.take(np.random.default_rng(1).permutation(len(points))[:count])
    with pytest.raises(UserError, match=r"different values|needs more points than that"):
        fit(law, kept)


@every_law
def test_duplicates_are_named(name):
    law, points = LAWS[name], noisy(name)
    twice = points.take(np.r_[np.arange(len(points)), 0])
    assert any(warning.startswith("duplicates: 1 points") for warning in twice.check(law))
