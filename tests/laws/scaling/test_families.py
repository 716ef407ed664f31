"""The scaling laws against closed forms, slow twins and each other."""

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from landscape_ray.errors import UserError
from landscape_ray.laws import LAWS, Law, Objective, Points, fit, linear, nonlinear
from landscape_ray.laws.core.law import Variable
from landscape_ray.laws.core.propagate import propagate
from landscape_ray.laws.scaling.axes import linked_law
from landscape_ray.laws.scaling.broken import power_law_regions
from landscape_ray.laws.scaling.chinchilla import CHINCHILLA, optimal_size
from landscape_ray.laws.scaling.crossover import crossover
from landscape_ray.laws.scaling.kaplan import critical_batch, minimal_compute, minimal_steps
from landscape_ray.laws.scaling.power import power_law
from landscape_ray.laws.scaling.tokens import effective_tokens_law, repetition_law
from landscape_ray.laws.scaling.trajectory import KAPLAN_TRAJECTORY, trajectory_loss
from landscape_ray.laws.scaling.wallclock import TRAINING_TIME, time_frontier, time_optimal_size, time_per_token

SQUARES = Objective("least_squares")
CONSTANTS = {"nc": 6.5e13, "a_n": 0.077, "sc": 2.1e3, "a_s": 0.76, "b_star": 2.1e8, "a_b": 0.21}
logs = st.floats


@settings(max_examples=60, deadline=None)
@given(logs(5, 11), logs(1, 7), logs(2, 12), logs(0.05, 0.5), logs(0.2, 1.5), logs(0.1, 1.0))
def test_the_trajectory_is_the_root_of_its_equation(n, s, b, a_n, a_s, a_b):
    """The loss equals the right side at itself, and a bracketing solver finds the same."""
    constants = CONSTANTS | {"a_n": a_n, "a_s": a_s, "a_b": a_b}
    size, steps, batch = 10**n, 10**s, 10**b
    loss = float(trajectory_loss(size, steps, batch, **constants))

    def excess(log_loss):
        critical = critical_batch(np.exp(log_loss), constants["b_star"], a_b)
        right = (constants["nc"] / size) ** a_n + (constants["sc"] / minimal_steps(steps, batch, critical)) ** a_s
        return log_loss - np.log(right)

    floor = (constants["nc"] / size) ** a_n + (constants["sc"] / steps) ** a_s
    expected = scipy.optimize.brentq(excess, np.log(floor) - 1e-9, np.log(floor) + 500, xtol=1e-13, rtol=1e-14)
    assert np.log(loss) == pytest.approx(expected, abs=1e-10)


def test_a_trajectory_falls_with_steps_batch_and_size():
    size, steps, batch = np.geomspace(1e6, 1e10, 9), np.geomspace(1e2, 1e6, 9), np.geomspace(1e3, 1e9, 9)
    table = trajectory_loss(size[:, None, None], steps[:, None], batch, **CONSTANTS)
    assert table.shape == (9, 9, 9)
    for axis in range(3):
        assert (np.diff(table, axis=axis) < 0).all()


def test_the_law_of_trajectories_is_the_function():
    p = {"aN": 0.077, "aS": 0.76, "aB": 0.21, "A": 6.5e13**0.077}
    p |= {"F": 2.1e3**0.76 / p["A"], "K": 2.1e8 / p["A"] ** (1 / 0.21)}
    x = {"N": np.array([1e7, 1e8]), "S": np.array([3e3, 1e5]), "B": np.array([1e5, 1e6])}
    expected = trajectory_loss(x["N"], x["S"], x["B"], **CONSTANTS)
    np.testing.assert_allclose(KAPLAN_TRAJECTORY.predict(x, p), expected, rtol=1e-12)
    derived = KAPLAN_TRAJECTORY.derived(p)
    assert derived == {"Nc": pytest.approx(6.5e13), "Sc": pytest.approx(2.1e3), "Bstar": pytest.approx(2.1e8)}


@given(logs(1, 1e6), logs(1e3, 1e8), logs(1e3, 1e8))
def test_steps_and_compute_trade_on_a_hyperbola(steps, batch, critical):
    assert minimal_steps(steps, batch, critical) / steps + minimal_compute(1.0, batch, critical) == pytest.approx(1)


def test_kaplan_size_and_data_have_their_limits():
    law, p = LAWS["kaplan_size_data"], {"A": 12.0, "g": 0.8, "aD": 0.1, "q": 200.0}
    far = law.predict({"N": np.array([1e8]), "D": np.array([1e40])}, p)[0]
    assert far == pytest.approx((law.derived(p)["Nc"] / 1e8) ** law.derived(p)["aN"], rel=1e-9)
    large = law.predict({"N": np.array([1e40]), "D": np.array([1e9])}, p)[0]
    assert large == pytest.approx((law.derived(p)["Dc"] / 1e9) ** 0.1, rel=1e-9)


@pytest.mark.acceptance
def test_over_training_is_chinchilla_with_one_exponent():
    """Both forms of Gadre et al. and the Chinchilla law give the same losses."""
    n, m = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e9, 4), np.geomspace(5, 640, 4)))
    alpha, a, b = 0.3, 200.0, 300.0
    size_form = LAWS["overtraining"].predict({"N": n, "M": m}, {"E": 1.7, "a": a, "b": b, "alpha": alpha})
    surface = {"E": 1.7, "A": a, "alpha": alpha, "B": b * 6 ** (-alpha / 2), "beta": alpha}
    np.testing.assert_allclose(size_form, CHINCHILLA.predict({"N": n, "D": m * n}, surface), rtol=1e-13)
    compute = {"E": 1.7, "a": a * 6 ** (alpha / 2), "b": b, "eta": alpha / 2}
    by_compute = LAWS["overtraining_compute"].predict({"C": 6 * n * m * n, "M": m}, compute)
    np.testing.assert_allclose(by_compute, size_form, rtol=1e-13)
    best = optimal_size(surface, 6e20)
    assert LAWS["overtraining_compute"].derived(compute)["M_opt"] == pytest.approx(1e20 / best**2, rel=1e-12)


@pytest.mark.acceptance
def test_repetition_gives_the_published_losses():
    """The two configurations that the authors compare, at their parameters (Muennighoff et al. 2023)."""
    p = {"A": np.exp(6.255414), "B": np.exp(7.3049974), "E": np.exp(0.6254804), "alpha": 0.3526596, "beta": 0.3526596}
    law = repetition_law(p)
    p |= {"RD": 15.387756, "RN": 5.309743}
    x = {"N": np.array([6.34e9, 8.67e9]), "D": np.array([242e9, 178e9]), "U": np.array([25e9, 25e9])}
    np.testing.assert_allclose(law.predict(x, p), [2.2256440889984477, 2.2269634075087867], rtol=1e-13)


def test_repetition_without_repeats_is_chinchilla_and_excess_is_fitted():
    truth = {"E": 1.87, "A": 521.0, "alpha": 0.353, "B": 1488.0, "beta": 0.353, "RD": 15.4}
    n, u = (a.ravel() for a in np.meshgrid(np.geomspace(1e8, 1e10, 3), np.geomspace(1e9, 1e11, 3)))
    once = LAWS["repetition"].predict({"N": n, "D": u, "U": u}, truth)
    np.testing.assert_allclose(once, CHINCHILLA.predict({"N": n, "D": u}, truth), rtol=1e-13)
    law = repetition_law(truth)
    n, u, r = (a.ravel() for a in np.meshgrid(np.geomspace(1e8, 1e11, 4), [1e9, 1e10], np.geomspace(1, 40, 4)))
    x = {"N": n, "D": u * r, "U": u}
    given_surface = {name: truth[name] for name in ("E", "A", "alpha", "B", "beta")}
    found = fit(law, Points(x, law.predict(x, truth | {"RN": 5.3})), fix=given_surface, num_bootstrap=0)
    assert found.parameters["RD"] == pytest.approx(15.4, rel=1e-6)
    assert found.parameters["RN"] == pytest.approx(5.3, rel=1e-6)


def test_more_unique_than_seen_tokens_are_refused():
    x = {"N": [1e7, 1e8, 1e9], "D": [1e9, 1e10, 1e11], "U": [1e9, 2e10, 1e10]}
    x = {name: values * 3 for name, values in x.items()}
    with pytest.raises(UserError, match=r"U must be <= D, got 2e\+10 unique of 1e\+10 tokens"):
        fit(LAWS["repetition"], Points(x, np.linspace(3, 2, 9)), num_bootstrap=0)


def test_quality_must_name_a_feature():
    with pytest.raises(UserError, match="features must name a column at least, got none"):
        effective_tokens_law([])


def test_accuracies_are_shares():
    law = LAWS["accuracy_probit"]
    with pytest.raises(UserError, match="accuracy_in must be < 1, got 80; drop these points, or give shares"):
        fit(law, Points({"accuracy_in": [50.0, 60.0, 70.0, 80.0]}, [0.4, 0.5, 0.6, 0.7]))
    with pytest.raises(UserError, match="accuracy_out must be in the range of law 'accuracy_probit'"):
        fit(law, Points({"accuracy_in": [0.5, 0.6, 0.7, 0.8]}, [0.4, 0.5, 0.6, 1.7]))
    assert linked_law(Variable("a"), name="own", link="logit").formula == "logit(accuracy) = a + b logit(a)"


def curve(broken, noise=1e-3, seed=0):
    x = np.geomspace(1e2, 1e7, 26)
    exact = 0.3 + 2.0 * (1 + (x / 2e3) ** 2) ** -0.2 if broken else 0.3 + 8.0 * x**-0.3
    return Points({"x": x}, exact * np.exp(noise * np.random.default_rng(seed).standard_normal(len(x))))


@pytest.mark.acceptance
def test_regions_are_found_before_anything_is_extrapolated():
    points = curve(broken=True)
    found = power_law_regions(points, objective=SQUARES)
    assert found.broken
    assert found.gain > 20
    assert found.start == pytest.approx(2e3 * 9**0.5, rel=0.3)
    assert found.region[0] == "small_data"
    assert found.region[-1] == "power_law"
    order = [("small_data", "power_law", "irreducible").index(region) for region in found.region]
    assert order == sorted(order)
    # The region extrapolates, the whole curve does not.
    far = np.array([1e9])
    truth = 0.3 + 2.0 * (far / 2e3) ** -0.4
    law = power_law(floor="E")
    inside = fit(law, points.take(found.usable), objective=SQUARES, num_bootstrap=0).parameters
    whole = fit(law, points, objective=SQUARES, num_bootstrap=0).parameters
    errors = [abs(law.predict({"x": far}, p)[0] / truth[0] - 1) for p in (inside, whole)]
    assert errors[0] < errors[1] / 3


def test_no_break_is_seen_where_there_is_none():
    found = power_law_regions(curve(broken=False), objective=SQUARES)
    assert not found.broken
    assert found.start == 0
    assert set(found.region) == {"power_law"}


def test_a_curve_that_has_sunk_into_its_noise_ends():
    x = np.geomspace(1e1, 1e8, 29)
    y = 2.0 + 10.0 * x**-0.6
    noise = np.random.default_rng(1).standard_normal(len(x))
    found = power_law_regions(Points({"x": x}, y * np.exp(3e-3 * noise)), objective=SQUARES)
    assert found.region[-1] == "irreducible"
    assert 1e3 < found.end < 1e6


def test_a_curve_of_the_plateau_alone_says_so():
    x = np.geomspace(1, 1e4, 15)
    found = power_law_regions(Points({"x": x}, 1 + 2.0 * (1 + x / 2e3) ** -0.3), objective=SQUARES)
    assert found.broken
    assert [warning.split(":")[0] for warning in found.warnings] == ["power_law_region", "small_data"]


MACHINE = {"c": 1e-14, "w": 1e-11, "u": 3e-12, "o": 0.02}
SURFACE = {"E": 1.7, "A": 400.0, "B": 410.0, "alpha": 0.34, "beta": 0.28}
SHAPE = (0.8, 2 / 3)


@pytest.mark.acceptance
@pytest.mark.parametrize("seconds", [1e3, 1e6])
def test_the_time_optimal_size_is_the_minimum(seconds):
    size = float(time_optimal_size(SURFACE, MACHINE, seconds, 5e5, SHAPE))

    def along(log_n):
        n = np.exp(log_n)
        return float(CHINCHILLA.predict({"N": n, "D": seconds / time_per_token(MACHINE, n, 5e5, SHAPE)}, SURFACE))

    found = scipy.optimize.minimize_scalar(along, bounds=(np.log(1e4), np.log(1e14)), method="bounded")
    assert np.log(size) == pytest.approx(found.x, abs=1e-4)
    assert along(np.log(size)) <= found.fun + 1e-12


def time_fits(num_bootstrap):
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(3e7, 3e9, 5), np.geomspace(1e9, 1e11, 5)))
    rng = np.random.default_rng(0)
    loss = CHINCHILLA.predict({"N": n, "D": d}, SURFACE) * np.exp(1e-3 * rng.standard_normal(len(n)))
    x = {"N": n, "D": d, "S": d / rng.choice([1e5, 5e5, 2e6], len(n)), "H": n ** (2 / 3) * rng.uniform(0.3, 3, len(n))}
    seconds = TRAINING_TIME.predict(x, MACHINE) * np.exp(0.01 * rng.standard_normal(len(n)))
    surface = fit(CHINCHILLA, Points({"N": n, "D": d}, loss), objective=SQUARES, num_bootstrap=num_bootstrap)
    return surface, fit(TRAINING_TIME, Points(x, seconds), objective=SQUARES, num_bootstrap=num_bootstrap)


def test_the_time_frontier_carries_both_uncertainties():
    loss_fit, time_fit = time_fits(60)
    options = {"batch_tokens": 5e5, "activations": SHAPE}
    found = time_frontier(loss_fit, time_fit, [1e5, 1e6], **options)
    truth = time_optimal_size(SURFACE, MACHINE, np.array([1e5, 1e6]), 5e5, SHAPE)
    np.testing.assert_allclose(found.size.value, truth, rtol=0.15)
    assert (found.size.low < found.size.value).all()
    assert (found.size.value < found.size.high).all()
    assert found.size.samples.shape == (60, 2)
    assert found.loss.value[1] < found.loss.value[0]
    bare = time_frontier(*time_fits(0), [1e5], **options)
    assert np.isnan(bare.size.low).all()
    with pytest.raises(UserError, match="seconds must be finite and > 0"):
        time_frontier(loss_fit, time_fit, 0.0, **options)
    with pytest.raises(UserError, match="batch_tokens and activations must be > 0"):
        time_frontier(loss_fit, time_fit, 1e5, batch_tokens=0, activations=SHAPE)
    with pytest.raises(UserError, match="must lie within 100 times the fitted range"):
        time_frontier(loss_fit, time_fit, 1e13, **options)
    beyond = time_frontier(loss_fit, time_fit, 1e8, **options, allow_extrapolation=True)
    assert any(warning.startswith("time_extrapolation: ") for warning in beyond.warnings)


def two_powers(a, b, x=None, noise=0.0, num_bootstrap=40, floor=0.0):
    x = np.geomspace(1e2, 1e6, 15) if x is None else x
    y = (floor + a * x**-b) * np.exp(noise * np.random.default_rng(int(100 * b)).standard_normal(len(x)))
    law = power_law(floor="E") if floor else power_law()
    return law, fit(law, Points({"x": x}, y), objective=SQUARES, num_bootstrap=num_bootstrap, confidence=0.99)


def test_the_meeting_of_two_power_laws_is_the_closed_form():
    """a1 x^-b1 = a2 x^-b2 at (a2 / a1)^(1 / (b2 - b1))."""
    found = crossover(two_powers(1.0, 0.1, noise=0.01), two_powers(6.0, 0.3, noise=0.01), "x", (1e2, 1e6))
    assert found.at.low[0] < 6 ** (1 / 0.2) < found.at.high[0]
    assert found.better_before == 1
    assert found.num_roots == {1: 1.0}
    assert not found.warnings
    assert str(found).startswith("the laws meet at x = ")


def test_laws_that_do_not_meet_and_laws_that_are_the_same():
    apart = crossover(two_powers(1.0, 0.2), two_powers(2.0, 0.2001), "x", (1e2, 1e6))
    assert not len(apart.at.value)
    assert apart.better_before == 1
    assert str(apart) == "the laws do not meet; law 1 is lower throughout"
    law = two_powers(1.0, 0.2)
    same = crossover(law, law, "x", (1e2, 1e6))
    assert same.better_before == 0
    assert any(warning.startswith("identical: ") for warning in same.warnings)


def test_two_meetings_are_both_found():
    """E + A x^-a meets a steeper law without constant twice, or not at all."""
    bent, straight = two_powers(3.0, 0.5, floor=0.5), two_powers(1.6, 0.1)
    found = crossover(bent, straight, "x", (1.0, 1e6))

    def difference(log_x):
        x = np.exp(log_x)
        return 0.5 + 3 * x**-0.5 - 1.6 * x**-0.1

    expected = [scipy.optimize.brentq(difference, np.log(low), np.log(high)) for low, high in ((1, 1e3), (1e3, 1e6))]
    np.testing.assert_allclose(np.log(found.at.value), expected, rtol=1e-6)
    assert found.better_before == 2


def test_an_uncertain_meeting_says_so():
    found = crossover(two_powers(1.0, 0.2, noise=0.05), two_powers(1.09, 0.21, noise=0.05), "x", (1e2, 1e6))
    assert any(warning.startswith("crossing_uncertain: ") for warning in found.warnings)


def test_a_crossover_refuses_unlike_things():
    one, two = two_powers(1.0, 0.1), two_powers(6.0, 0.3)
    with pytest.raises(UserError, match=r"between must be \(low, high\) with 0 < low < high"):
        crossover(one, two, "x", (10.0, 1.0))
    with pytest.raises(UserError, match="law 'power' must have the variable 'y' and all others held"):
        crossover(one, two, "y", (1e2, 1e3))
    with pytest.raises(UserError, match="x must lie within 100 times the fitted range"):
        crossover(one, two, "x", (1e2, 1e12))
    other = power_law(name="other", response=Variable("error"))
    third = (other, fit(other, Points({"x": [1.0, 2.0, 3.0, 4.0]}, [4.0, 3.0, 2.5, 2.0]), num_bootstrap=0))
    with pytest.raises(UserError, match="laws must predict the same, got loss and error"):
        crossover(one, third, "x", (1e2, 1e3))


MIDDLE = {"scale": lambda x, p: np.exp(np.log(x["x"]).mean())}


def scaled(**changes):
    parameters = (linear("A", "height"), nonlinear("x0", "break", 1e-3, 1e3, log=True, starts=3, **MIDDLE))
    return Law(
        name="scaled",
        formula="y = A / (1 + x / x0)",
        variables=(Variable("x"),),
        parameters=parameters,
        columns=lambda x, p: (1 / (1 + x["x"] / p["x0"]),),
        **changes,
    )


def test_a_parameter_with_a_scale_is_fixed_in_its_own_unit():
    x = np.geomspace(1e8, 1e12, 9)
    points = Points({"x": x}, 3 / (1 + x / 1e10))
    free = fit(scaled(), points, num_bootstrap=4)
    assert free.parameters["x0"] == pytest.approx(1e10, rel=1e-9)
    held = fit(scaled(), points, fix={"x0": 2e10}, num_bootstrap=4)
    assert held.parameters["x0"] == 2e10
    assert held.fixed == {"x0": 2e10}
    assert "x0" not in held.intervals
    with pytest.raises(UserError, match="x0 must be positive, got -1"):
        fit(scaled(), points, fix={"x0": -1.0})
    with pytest.raises(UserError, match="penalty must be on a non-linear parameter without a scale, got 'x0'"):
        fit(scaled(), points, penalty={"x0": (1e10, 1.0)})
    with pytest.raises(UserError, match="must not have slopes together with a parameter with a scale"):
        scaled(slopes=lambda x, p: ({},))


def test_propagation_keeps_what_samples_share():
    """A factor and its exponent trade off: their product term is known far better than each."""
    found = two_powers(4.0, 0.2, noise=0.02, num_bootstrap=200)[1]
    values = propagate(found, lambda p: {"factor": p["A"], "middle": p["A"] * 1e4 ** -p["alpha"]})
    spread = {name: float(v.high[0] / v.low[0] - 1) for name, v in values.items()}
    assert spread["middle"] < spread["factor"] / 2
    assert values["factor"].low[0] == pytest.approx(found.intervals["A"][0])
    bare = propagate(two_powers(4.0, 0.2, num_bootstrap=0)[1], lambda p: {"A": p["A"]})["A"]
    assert bare.value[0] == pytest.approx(4.0)
    assert np.isnan(bare.low[0])
