"""Approaches 1 and 2: exact where they should be, biased by as much as published, refused where nothing was seen."""

import numpy as np
import pytest

from landscape_ray.errors import UserError
from landscape_ray.laws import Points
from landscape_ray.laws.scaling.chinchilla import CHINCHILLA, optimal_size, optimal_tokens
from landscape_ray.laws.scaling.envelope import fit_envelope
from landscape_ray.laws.scaling.isoflop import fit_isoflops

ROUNDED = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
BUDGETS = np.geomspace(1e17, 1e21, 5)


def profiles(width, truth=ROUNDED, num_sizes=15, centre=1.0, noise=0.0, seed=0):
    c, offset = (a.ravel() for a in np.meshgrid(BUDGETS, np.linspace(-np.log(width), np.log(width), num_sizes)))
    n = optimal_size(truth, c) * np.exp(offset) * centre
    loss = CHINCHILLA.predict({"N": n, "D": c / (6 * n)}, truth)
    error = noise * np.random.default_rng(seed).standard_normal(len(n))
    return Points({"N": n, "C": c}, loss * np.exp(error))


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("width", "percent"), [(2, -0.326937804), (4, -1.301125044), (8, -2.902904738), (16, -5.100244552)]
)
def test_the_bias_is_the_published_one(width, percent):
    """Error of the tokens inferred for any budget, of evenly spaced grids of 15 sizes (Czech et al. 2026)."""
    found = fit_isoflops(profiles(width), num_bootstrap=0)
    tokens = 1e24 / (6 * found.predict(1e24).value[0])
    assert 100 * (tokens / optimal_tokens(ROUNDED, 1e24) - 1) == pytest.approx(percent, abs=1e-6)
    np.testing.assert_allclose(found.size_bias, found.size.value / optimal_size(ROUNDED, BUDGETS) - 1, rtol=1e-6)
    assert found.exponent_bias == pytest.approx(0, abs=1e-9)
    assert any(w.startswith("bias: ") for w in found.warnings) == (width >= 8)


def test_equal_exponents_and_a_centred_grid_have_no_bias():
    truth = ROUNDED | {"beta": 0.34}
    found = fit_isoflops(profiles(16, truth), num_bootstrap=0)
    np.testing.assert_allclose(found.size.value, optimal_size(truth, BUDGETS), rtol=1e-9)
    assert found.exponent.value[0] == pytest.approx(0.5, abs=1e-9)


def test_tokens_serve_as_well_as_compute():
    points = profiles(4, noise=0.001)
    n, c = (np.asarray(points.variables[name]) for name in ("N", "C"))
    by_tokens = fit_isoflops(Points({"N": n, "D": c / (6 * n)}, points.response), num_bootstrap=0)
    np.testing.assert_allclose(by_tokens.size.value, fit_isoflops(points, num_bootstrap=0).size.value, rtol=1e-9)


def test_intervals_hold_the_biased_truth():
    """What repeats of the experiment would give: the vertices of the noise-free profiles."""
    exact = fit_isoflops(profiles(4), num_bootstrap=0)
    inside = []
    for seed in range(24):
        found = fit_isoflops(profiles(4, noise=0.002, seed=seed), num_bootstrap=200)
        inside += ((found.size.low < exact.size.value) & (exact.size.value < found.size.high)).tolist()
        inside.append(bool(found.exponent.low[0] < exact.exponent.value[0] < found.exponent.high[0]))
    assert 0.84 <= np.mean(inside) <= 0.96


def test_a_vertex_that_was_not_seen_is_refused():
    points = profiles(3, centre=np.where(np.tile(BUDGETS, 15) > 1e20, 20.0, 1.0))
    found = fit_isoflops(points, num_bootstrap=0)
    ((budget, reason),) = found.refused.items()
    assert budget == pytest.approx(1e21)
    assert "lies outside the sizes" in reason
    assert any(w.startswith("refused: C = 1e+21: the vertex") for w in found.warnings)
    with pytest.raises(UserError, match="at least two budgets whose best size was seen, got 0"):
        fit_isoflops(profiles(3, centre=30.0))


def test_profiles_without_a_minimum_or_with_few_sizes_are_refused():
    bent = profiles(4)
    y = np.asarray(bent.response).copy()
    first = np.asarray(bent.variables["C"]) == BUDGETS[0]
    y[first] = 6 - y[first]
    found = fit_isoflops(Points(bent.variables, y), num_bootstrap=0)
    assert list(found.refused.values()) == ["the profile has no minimum"]
    few = bent.take(~first | (np.arange(len(y)) < 11))
    assert list(fit_isoflops(few, num_bootstrap=0).refused.values()) == ["3 sizes, fewer than 4"]


def test_bad_columns_are_refused():
    with pytest.raises(UserError, match="points must have N and C, or N and D, got N"):
        fit_isoflops(Points({"N": [1.0, 2.0]}, [1.0, 1.0]))
    with pytest.raises(UserError, match="C must be > 0, got 0"):
        fit_isoflops(Points({"N": [1.0, 2.0], "C": [0.0, 1.0]}, [1.0, 1.0]))


def curves(truth=ROUNDED, noise=0.0, num_sizes=12):
    """Return curves that follow the law at every step: those of runs without a schedule."""
    n = np.repeat(np.geomspace(3e7, 3e9, num_sizes), 60)
    d = n * np.tile(np.geomspace(0.5, 500, 60), num_sizes)
    error = noise * np.random.default_rng(0).standard_normal(len(n))
    loss = CHINCHILLA.predict({"N": n, "D": d}, truth) * np.exp(error)
    return Points({"N": n, "D": d}, loss, [f"{size:.3g}" for size in n])


def test_the_envelope_finds_the_exponent():
    found = fit_envelope(curves(), num_bootstrap=40)
    truth = ROUNDED["beta"] / (ROUNDED["alpha"] + ROUNDED["beta"])
    assert found.exponent.value[0] == pytest.approx(truth, abs=0.01)
    assert found.exponent.low[0] < truth < found.exponent.high[0]
    best = optimal_size(ROUNDED, found.flops)
    assert np.abs(np.log(found.size / best)).max() < 1.05 * np.log(3e9 / 3e7) / 11  # one step of the sizes
    np.testing.assert_allclose(6 * found.size * found.tokens, found.flops, rtol=1e-12)
    assert (np.diff(found.loss) < 0).all()
    assert len(found.winners) >= 8
    assert found.warnings[0].startswith("schedule: ")


def test_the_envelope_refuses_what_it_cannot_bracket():
    points = curves()
    n, d = (np.asarray(points.variables[name]) for name in ("N", "D"))
    with pytest.raises(UserError, match="N must have at least 4 different values, got 2"):
        fit_envelope(points.take(n <= np.unique(n)[1]))
    with pytest.raises(UserError, match="must have one size and two points at least, got 2 sizes"):
        fit_envelope(Points(points.variables, points.response, ["a"] * 61 + list(points.run_of[61:])))
    with pytest.raises(UserError, match="points must have N and D, got N"):
        fit_envelope(Points({"N": n}, points.response))
    with pytest.raises(UserError, match="loss must be > 0, got -1"):
        fit_envelope(Points(points.variables, np.r_[-1.0, np.asarray(points.response)[1:]], points.run_of))
    worse = np.asarray(points.response) * n**0.5
    with pytest.raises(UserError, match="at least two sizes that win over both smaller and larger ones, got"):
        fit_envelope(Points({"N": n, "D": d}, worse, points.run_of))
