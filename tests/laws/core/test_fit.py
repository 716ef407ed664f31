"""One call fits any law: against closed forms, with fixed and penalised parameters, links, and its predictions."""

import math

import numpy as np
import pytest

from landscape_ray.errors import UserError
from landscape_ray.laws import Law, Objective, Points, Variable, fit, grid, linear, nonlinear, predict_points
from landscape_ray.laws.core.fit import solve
from landscape_ray.laws.scaling.chinchilla import CHINCHILLA

N, D = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 5)))
TRUTH = {"E": 1.7, "A": 400.0, "alpha": 0.34, "B": 400.0, "beta": 0.28}


def losses(noise=0.0, seed=0):
    clean = TRUTH["E"] + TRUTH["A"] * N ** -TRUTH["alpha"] + TRUTH["B"] * D ** -TRUTH["beta"]
    return clean * np.exp(noise * np.random.default_rng(seed).standard_normal(len(N)))


def table(noise=0.0, seed=0):
    return Points({"N": N, "D": D}, losses(noise, seed))


LINE = Law(
    name="line",
    formula="y = a + b x",
    variables=(Variable("x", positive=False),),
    response=Variable("y", positive=False),
    parameters=(linear("a", free=True), linear("b", free=True), nonlinear("k", "unused", 0.0, 1.0)),
    columns=lambda x, p: (1.0, x["x"] + 0 * p["k"]),
    space="raw",
)
RNG = np.random.default_rng(0)
LINE_X = RNG.standard_normal(30)
LINE_Y = 2 - 3 * LINE_X + 0.1 * RNG.standard_normal(30)


def test_least_squares_in_raw_space_is_a_regression():
    found = fit(LINE, Points({"x": LINE_X}, LINE_Y), objective=Objective("least_squares"), fix={"k": 0.5})
    b, a = np.polyfit(LINE_X, LINE_Y, 1)
    assert found.parameters["a"] == pytest.approx(a, rel=1e-9)
    assert found.parameters["b"] == pytest.approx(b, rel=1e-9)
    assert found.fixed == {"k": 0.5}
    assert "k" not in found.intervals
    assert "given" in str(found)
    assert found.objective["value"] == pytest.approx(0.5 * np.sum((LINE_Y - a - b * LINE_X) ** 2))


def test_least_absolute_deviations_in_raw_space_is_the_median():
    flat = Law(
        name="flat",
        formula="y = a",
        variables=(),
        response=Variable("y", positive=False),
        parameters=(linear("a", free=True), nonlinear("k", "unused", 0.0, 1.0)),
        columns=lambda x, p: (1.0 + 0 * p["k"],),
        space="raw",
    )
    y = np.array([-5.0, 1.0, 2.0, 3.0, 100.0])
    found = fit(flat, Points({}, y), objective=Objective("least_absolute"), fix={"k": 0.5}, num_bootstrap=0)
    assert found.parameters["a"] == pytest.approx(2.0, abs=1e-6)
    assert found.objective["value"] == pytest.approx(np.abs(y - 2).sum(), rel=1e-6)


@pytest.mark.parametrize("given", [{"alpha": 0.34}, {"E": 1.7}, {"E": 1.7, "beta": 0.28}])
def test_given_parameters_stay_and_the_others_are_found(given):
    found = fit(CHINCHILLA, table(), fix=given, num_bootstrap=0)
    for name, value in TRUTH.items():
        assert found.parameters[name] == pytest.approx(value, rel=1e-6)
    assert found.certificate["num_parameters"] == 5 - len(given)
    assert found.certificate["bounds_hit"] == []


def test_a_wrong_given_value_costs():
    right, wrong = (fit(CHINCHILLA, table(1e-3), fix={"E": e}, num_bootstrap=0).objective["value"] for e in (1.7, 1.5))
    assert wrong > 2 * right


def test_a_penalty_is_ridge_regression():
    """With one exponent and noise-free data the pull moves it by what the quadratic model says."""
    free, _ = solve(CHINCHILLA, table(1e-3), objective=Objective("least_squares"))
    stiff, _ = solve(CHINCHILLA, table(1e-3), objective=Objective("least_squares"), penalty={"alpha": (0.5, 1e9)})
    assert float(stiff.natural(stiff.best)["alpha"][0]) == pytest.approx(0.5, abs=1e-6)
    weak, _ = solve(CHINCHILLA, table(1e-3), objective=Objective("least_squares"), penalty={"alpha": (0.5, 1e-9)})
    assert float(weak.natural(weak.best)["alpha"][0]) == pytest.approx(
        float(free.natural(free.best)["alpha"][0]), rel=1e-4
    )
    values = [
        float(s.natural(s.best)["alpha"][0])
        for k in (1e-6, 1e-4, 1e-2, 1.0)
        for s, _ in [solve(CHINCHILLA, table(1e-3), objective=Objective("least_squares"), penalty={"alpha": (0.5, k)})]
    ]
    assert values == sorted(values)


def test_a_link_is_fitted_through():
    law = Law(
        name="logit",
        formula="logit(p) = a + b log x",
        variables=(Variable("x"),),
        response=Variable("p", "", "accuracy"),
        parameters=(linear("a", free=True), linear("b", free=True), nonlinear("k", "unused", 0.0, 1.0)),
        columns=lambda x, p: (1.0, np.log(x["x"]) + 0 * p["k"]),
        space="raw",
        link=lambda p: np.log(p / (1 - p)),
        unlink=lambda z: 1 / (1 + np.exp(-z)),
    )
    x = np.geomspace(1, 100, 9)
    p = 1 / (1 + np.exp(-(-2 + 0.8 * np.log(x))))
    found = fit(law, Points({"x": x}, p), fix={"k": 0.5}, num_bootstrap=50)
    assert found.parameters["a"] == pytest.approx(-2, abs=1e-6)
    expected = predict_points(law, found, {"x": [1e3]}, allow_extrapolation=True)
    assert expected.value[0] == pytest.approx(1 / (1 + np.exp(-(-2 + 0.8 * np.log(1e3)))))
    assert 0 < expected.measured_low[0] <= expected.measured_high[0] < 1
    with pytest.raises(UserError, match="p must be in the range of law 'logit'"), np.errstate(divide="ignore"):
        fit(law, Points({"x": x}, np.where(x > 50, 1.0, p)), fix={"k": 0.5})


def test_a_grid_parameter_is_chosen_and_said():
    law = Law(
        name="power",
        formula="y = a x^-g",
        variables=(Variable("x"),),
        parameters=(linear("a"), grid("g", "exponent", (0.3, 0.5, 0.7)), nonlinear("k", "unused", 0.0, 1.0)),
        columns=lambda x, p: (x + 0 * p["k"],),
        prepare=lambda data, grid_values: np.asarray(data.variables["x"]) ** -grid_values["g"],
    )
    x = np.geomspace(1, 100, 12)
    found = fit(
        law, Points({"x": x}, 2 * x**-0.5 * np.exp(1e-4 * np.random.default_rng(0).standard_normal(12))), fix={"k": 0.5}
    )
    assert found.parameters["g"] == 0.5
    assert any(w.startswith("g_selected") for w in found.warnings)
    assert set(found.certificate["g_objectives"]) == {"0.3", "0.5", "0.7"}


def test_factors_are_judged_by_their_terms_not_by_their_digits():
    """B spans a factor of three while the term that it is the factor of is known to a few per cent."""
    found = fit(CHINCHILLA, table(3e-3))
    low, high = found.intervals["B"]
    assert high > 1.5 * low
    assert found.status == "certified", found.reasons


LEAST = Objective("least_squares")


@pytest.fixture(scope="module")
def over_data():
    """The spread of an exponent between data sets."""
    fits = (fit(CHINCHILLA, table(3e-3, seed), num_bootstrap=0, objective=LEAST) for seed in range(60))
    return np.std([found.parameters["alpha"] for found in fits])


@pytest.mark.parametrize("method", ["runs", "counts", "blocks"])
def test_bootstraps_tell_the_spread_between_data_sets(method, over_data):
    told = []
    for seed in range(6):
        found = fit(CHINCHILLA, table(3e-3, seed), num_bootstrap=100, resampling=method, objective=LEAST)
        assert found.certificate["bootstrap"]["method"].endswith(method)
        told.append(found.samples[:, found.sample_names.index("alpha")].std())
    assert np.mean(told) == pytest.approx(over_data, rel=0.3)


def test_weights_are_repetitions():
    points = table(3e-3)
    counts = np.random.default_rng(1).integers(1, 4, len(points))
    weighted = fit(CHINCHILLA, Points(points.variables, points.response, weights=counts), num_bootstrap=0)
    repeated = Points({k: v.repeat(counts) for k, v in points.variables.items()}, points.response.repeat(counts))
    other = fit(CHINCHILLA, repeated, num_bootstrap=0)
    for name, value in weighted.parameters.items():
        assert value == pytest.approx(other.parameters[name], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fix": {"alpha": 9.0}}, r"alpha must be in \[0.01, 3\], got 9"),
        ({"fix": {"gamma": 1.0}}, "law 'chinchilla' has no parameter 'gamma'"),
        ({"num_bootstrap": -1}, "num_bootstrap must be >= 0, got -1"),
        ({"confidence": 1.5}, r"confidence must be in \(0, 1\), got 1.5"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        fit(CHINCHILLA, table(), **options)


def test_too_few_points():
    with pytest.raises(UserError, match="fits 5 parameters and needs more points than that, got 5"):
        fit(CHINCHILLA, table().take([0, 6, 12, 18, 24]))


def test_a_bootstrap_that_leaves_the_positive_numbers_is_refused():
    law = Law(
        name="flat",
        formula="y = a",
        variables=(),
        parameters=(linear("a"), nonlinear("k", "unused", 0.0, 1.0)),
        columns=lambda x, p: (1.0 + 0 * p["k"],),
    )
    found = fit(law, Points({}, [1.0, 1.1, 0.9, 1.2]), fix={"k": 0.5})
    assert found.certificate["bootstrap"]["method"] == "residual blocks"
    assert found.intervals["a"][0] < found.parameters["a"] < found.intervals["a"][1]


class TestPrediction:
    found = fit(CHINCHILLA, table(3e-3))

    def test_value_and_intervals(self):
        expected = predict_points(CHINCHILLA, self.found, {"N": [1e8, 3e9], "D": 1e10})
        p = self.found.parameters
        by_hand = p["E"] + p["A"] * np.array([1e8, 3e9]) ** -p["alpha"] + p["B"] * 1e10 ** -p["beta"]
        np.testing.assert_allclose(expected.value, by_hand)
        assert (expected.low < expected.value).all()
        assert (expected.measured_low < expected.low).all()
        assert (expected.high < expected.measured_high).all()
        width = expected.high - expected.low
        assert width[1] > width[0]  # beyond the data the law is less sure

    def test_measurements_are_inside_at_the_stated_rate(self):
        fresh = losses(3e-3, seed=99)
        expected = predict_points(CHINCHILLA, self.found, {"N": N, "D": D})
        inside = ((expected.measured_low <= fresh) & (fresh <= expected.measured_high)).mean()
        assert inside >= 0.75

    def test_misfit_widens(self):
        import dataclasses

        wide = dataclasses.replace(self.found, misfit=0.02, num_misfits=10)
        before, after = (predict_points(CHINCHILLA, f, {"N": 1e8, "D": 1e10}) for f in (self.found, wide))
        assert after.value == before.value
        reach = 1.8124611228107335 * 0.02 * before.value  # t of 10 degrees of freedom at 90 %
        assert after.high - after.value == pytest.approx(np.hypot(before.high - before.value, reach))
        assert after.value - after.low == pytest.approx(np.hypot(before.value - before.low, reach))

    def test_without_a_bootstrap_it_says_so(self):
        bare = fit(CHINCHILLA, table(3e-3), num_bootstrap=0)
        expected = predict_points(CHINCHILLA, bare, {"N": 1e8, "D": 1e10})
        assert any(w.startswith("no_bootstrap") for w in expected.warnings)

    def test_far_outside_is_flagged_then_refused(self):
        expected = predict_points(CHINCHILLA, self.found, {"N": 3e10, "D": 1e10})
        assert any("N is 30 times outside" in w for w in expected.warnings)
        with pytest.raises(UserError, match="N must lie within 100 times the fitted range"):
            predict_points(CHINCHILLA, self.found, {"N": 3e11, "D": 1e10})
        assert predict_points(CHINCHILLA, self.found, {"N": 3e11, "D": 1e10}, allow_extrapolation=True).value > 0

    @pytest.mark.parametrize(
        ("variables", "message"),
        [
            ({"N": 1e8}, "variables must hold those of law 'chinchilla', missing: D"),
            ({"N": -1.0, "D": 1e9}, "N must be finite and > 0"),
            ({"N": math.nan, "D": 1e9}, "N must be finite and > 0"),
        ],
    )
    def test_unsound_variables(self, variables, message):
        with pytest.raises(UserError, match=message):
            predict_points(CHINCHILLA, self.found, variables)

    def test_other_and_failed_fits(self):
        import dataclasses

        with pytest.raises(UserError, match="fit must be of the law 'chinchilla', got 'line'"):
            predict_points(CHINCHILLA, dataclasses.replace(self.found, law="line"), {"N": 1e8, "D": 1e9})
        failed = dataclasses.replace(self.found, status="failed", reasons=("no optimum",))
        with pytest.raises(UserError, match=r"got status 'failed' \(no optimum\)"):
            predict_points(CHINCHILLA, failed, {"N": 1e8, "D": 1e9})
