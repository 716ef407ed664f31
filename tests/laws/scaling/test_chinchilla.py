"""The Chinchilla law: published numbers, the closed-form frontier, coverage of the intervals."""

import csv

import numpy as np
import pytest
import scipy.optimize

from landscape_ray.errors import UserError
from landscape_ray.laws import LAWS, Objective, Points, fit
from landscape_ray.laws.core.fit import solve
from landscape_ray.laws.scaling.chinchilla import (
    CHINCHILLA,
    compute_frontier,
    flops_for_loss,
    flops_for_size,
    optimal_loss,
    optimal_size,
    optimal_tokens,
    size_for_tokens,
)

HOFFMANN = {
    "A": np.exp(6.0073404),
    "B": np.exp(6.0179186),
    "E": np.exp(0.5267228),
    "alpha": 0.33917084,
    "beta": 0.2849083,
}
"""Unrounded parameters of approach 3 of Hoffmann et al. 2022."""


@pytest.fixture(scope="module")
def all_points(published_data):
    with open(published_data / "chinchilla_epoch" / "points.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    n, c, loss = (np.array([float(row[key]) for row in rows]) for key in ("Model Size", "Training FLOP", "loss"))
    return n, c / (6 * n), loss


@pytest.fixture(scope="module")
def points(all_points):
    """The 240 points of the published fit: without the five highest losses."""
    n, d, loss = all_points
    kept = loss < np.sort(loss)[-5]
    return Points({"N": n[kept], "D": d[kept]}, loss[kept])


@pytest.mark.data
@pytest.mark.acceptance
def test_the_huber_optimum_of_the_published_points(points):
    found = fit(CHINCHILLA, points, num_bootstrap=0)
    expected = {"A": 477.826, "B": 2143.417, "E": 1.8172181, "alpha": 0.3473105, "beta": 0.3671724}
    for name, value in expected.items():
        assert found.parameters[name] == pytest.approx(value, rel=1e-6), name
    assert found.objective["value"] == pytest.approx(0.00101827401780, rel=1e-10)
    assert found.status == "certified"
    assert found.certificate["agree_share"] >= 0.9
    assert found.certificate["condition_number"] < 100


@pytest.mark.data
@pytest.mark.acceptance
def test_least_absolute_deviations_give_the_digits_of_the_replication(points):
    found = fit(CHINCHILLA, points, objective=Objective("least_absolute"), num_bootstrap=0)
    for name, digits in {"A": "482.01", "B": "2085.43", "E": "1.8169", "alpha": "0.3478", "beta": "0.3659"}.items():
        assert f"{found.parameters[name]:.{len(digits.partition('.')[2])}f}" == digits, name
    for name, value in {"A": 482.0057, "B": 2085.434, "E": 1.816864, "alpha": 0.34781303, "beta": 0.36585412}.items():
        assert found.parameters[name] == pytest.approx(value, rel=2e-6), name


@pytest.mark.data
@pytest.mark.acceptance
def test_least_squares_differ_by_twice_the_standard_error(points):
    found = fit(CHINCHILLA, points, objective=Objective("least_squares"), num_bootstrap=0)
    for name, digits in {"A": "593.3", "B": "4875.6", "E": "1.86455", "alpha": "0.36025", "beta": "0.40588"}.items():
        assert found.parameters[name] == pytest.approx(float(digits), abs=1.1 * 10.0 ** -len(digits.partition(".")[2]))


PUBLISHED_ERRORS = {"A": 124.52232, "B": 1293.28410, "E": 0.02566, "alpha": 0.01540, "beta": 0.02060}
PUBLISHED_ENDS = {
    "A": (285.214, 743.626),
    "B": (1042.357, 5810.344),
    "E": (1.769, 1.871),
    "alpha": (0.317, 0.373),
    "beta": (0.331, 0.415),
}
"""Standard errors and 95 % intervals of the replication, Huber 1e-3."""


@pytest.fixture(scope="module")
def resampled(all_points, points):
    """(4000, 240) numbers of the points in the replication's own resamples: numpy's legacy generator, seed 42."""
    loss = all_points[2]
    index = np.flatnonzero(loss < np.sort(loss)[-5])
    legacy = np.random.RandomState(42)
    drawn = np.stack([legacy.choice(index, size=len(index), replace=True) for _ in range(4000)])
    return np.searchsorted(index, drawn)


@pytest.fixture(scope="module")
def certified(points, resampled):
    """Our optima of the resamples: objective, and parameters by name."""
    counts = np.stack([np.bincount(row, minlength=len(points)) for row in resampled]).astype(float)
    solution, _ = solve(CHINCHILLA, points)
    found = solution.refit(counts)
    return found.objective, solution.natural(found.parameters)


def published_procedure(points, rows):
    """Return objectives and parameters (A, B, E, alpha, beta) as the replication finds them, written anew.

    One BFGS run a resample, from the parameters of Hoffmann et al., exact gradients, scipy's tolerance.
    """
    log_n, log_d = (np.log(np.asarray(points.variables[name])) for name in ("N", "D"))
    log_loss, delta = np.log(np.asarray(points.response)), 1e-3

    def objective(p, n, d, observed):
        terms = np.exp(np.stack([p[0] - p[3] * n, p[1] - p[4] * d, np.full_like(n, p[2])]))
        total = terms.sum(axis=0)
        residual = observed - np.log(total)
        inner = np.clip(residual, -delta, delta)
        by_size, by_horizon, rest = -inner / total * terms
        slopes = [by_size.sum(), by_horizon.sum(), rest.sum(), -(by_size @ n), -(by_horizon @ d)]
        return float((inner * (residual - inner / 2)).sum()), np.array(slopes)

    start = [6.0073404, 6.0179186, 0.5267228, 0.33917084, 0.2849083]
    ends = [
        scipy.optimize.minimize(objective, start, args=(log_n[k], log_d[k], log_loss[k]), jac=True, method="BFGS")
        for k in rows
    ]
    found = np.array([end.x for end in ends])
    return np.array([end.fun for end in ends]), np.hstack([np.exp(found[:, :3]), found[:, 3:]])


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.acceptance
def test_the_published_bootstrap(certified):
    """Standard errors of our certified optima of the published resamples within 1 % of the published ones."""
    _, drawn = certified
    for name, value in PUBLISHED_ERRORS.items():
        assert drawn[name].std(ddof=1) == pytest.approx(value, rel=0.01), name
        ends = np.quantile(drawn[name], [0.025, 0.975])
        np.testing.assert_allclose(ends, PUBLISHED_ENDS[name], rtol=0.01, err_msg=name)
    share = drawn["beta"] / (drawn["alpha"] + drawn["beta"])
    assert share.mean() == pytest.approx(0.513, abs=0.005)  # the published one is at the optimum of all points
    assert share.std() == pytest.approx(0.020, rel=0.05)


@pytest.mark.data
@pytest.mark.acceptance
def test_the_published_procedure_on_its_first_resamples(points, resampled):
    """The first rows of the replication's table of resamples, to a digit less than printed."""
    _, found = published_procedure(points, resampled[:3])
    expected = [
        (349.556372, 2356.248315, 1.793330, 0.328633, 0.371855),
        (487.836322, 1509.948214, 1.803583, 0.348965, 0.349989),
        (728.410632, 2507.010543, 1.861662, 0.372424, 0.375040),
    ]
    np.testing.assert_allclose(found, expected, rtol=2e-6)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.data
@pytest.mark.acceptance
def test_the_published_procedure_beside_the_certified_optima(points, resampled, certified):
    """The replication's procedure gives its printed standard errors; where ours differ, theirs stopped short.

    BFGS ends at a gradient of 1e-5, which for an objective near 1e-3 is early: one resample in fifty ends more than
    1e-6 above the optimum, none more than 1e-3. B spreads by a few resamples with a long tail (the largest is ten times
    the median), but these both procedures find alike.
    """
    objective, drawn = certified
    reached, found = published_procedure(points, resampled)
    printed = np.array(list(PUBLISHED_ERRORS.values()))
    np.testing.assert_allclose(found.std(axis=0, ddof=1), printed, atol=0.5e-5, rtol=1e-4)
    above = reached / objective - 1
    assert above.min() > -1e-9
    assert 0.01 < (above > 1e-6).mean() < 0.05
    assert above.max() < 1e-3
    assert drawn["B"].max() > 5 * np.median(drawn["B"])
    assert found[:, 1].std(ddof=1) == pytest.approx(drawn["B"].std(ddof=1), rel=1e-3)


@pytest.mark.acceptance
def test_the_frontier_is_where_no_other_size_does_better():
    """N* of the closed form against a numeric minimum on the line C = 6 N D, at the published parameters."""
    for flops in (1e18, 5.76e23, 1e26):
        size = optimal_size(HOFFMANN, flops)

        def along(log_n, flops=flops):
            n = np.exp(log_n)
            return float(CHINCHILLA.predict({"N": n, "D": flops / (6 * n)}, HOFFMANN))

        found = scipy.optimize.minimize_scalar(along, bracket=(np.log(1e6), np.log(1e14)), options={"xtol": 1e-12})
        assert size == pytest.approx(np.exp(found.x), rel=1e-6)
        assert optimal_loss(HOFFMANN, flops) == pytest.approx(found.fun, rel=1e-13)
        assert 6 * size * optimal_tokens(HOFFMANN, flops) == pytest.approx(flops, rel=1e-12)
        assert flops_for_loss(HOFFMANN, optimal_loss(HOFFMANN, flops)) == pytest.approx(flops, rel=1e-8)
        assert flops_for_size(HOFFMANN, size) == pytest.approx(flops, rel=1e-12)
        assert size_for_tokens(HOFFMANN, optimal_tokens(HOFFMANN, flops)) == pytest.approx(size, rel=1e-12)
    assert HOFFMANN["beta"] / (HOFFMANN["alpha"] + HOFFMANN["beta"]) == pytest.approx(0.4565, abs=1e-4)


def synthetic(seed=0, noise=0.005, truth=HOFFMANN):
    n, d = (axis.ravel() for axis in np.meshgrid(np.geomspace(5e7, 5e9, 6), np.geomspace(1e9, 1e11, 6)))
    error = noise * np.random.default_rng(seed).standard_normal(len(n))
    return Points({"N": n, "D": d}, CHINCHILLA.predict({"N": n, "D": d}, truth) * np.exp(error))


def test_intervals_of_the_frontier_hold_the_truth_and_grow_with_distance():
    found = fit(CHINCHILLA, synthetic(), num_bootstrap=100, confidence=0.99)
    near, far = (compute_frontier(found, flops) for flops in (1e20, 1e22))
    assert not near.warnings
    assert near.size.low[0] < optimal_size(HOFFMANN, 1e20) < near.size.high[0]
    assert near.loss.low[0] < optimal_loss(HOFFMANN, 1e20) < near.loss.high[0]
    np.testing.assert_allclose(6 * near.size.samples * near.tokens.samples, 1e20, rtol=1e-12)
    assert far.size.high[0] / far.size.low[0] > near.size.high[0] / near.size.low[0]
    assert near.exponent.samples.shape == (100, 1)


def test_the_frontier_warns_and_refuses_outside_what_was_fitted():
    found = fit(CHINCHILLA, synthetic(), num_bootstrap=5)
    assert any(w.startswith("extrapolation: ") for w in compute_frontier(found, 1e24).warnings)
    with pytest.raises(UserError, match="must lie within 100 times the fitted range"):
        compute_frontier(found, 1e27)
    assert compute_frontier(found, 1e27, allow_extrapolation=True).size.value[0] > 1e11
    with pytest.raises(UserError, match="flops must be finite and > 0, got"):
        compute_frontier(found, [1e20, 0.0])
    with pytest.raises(UserError, match="fit must be of the law 'chinchilla', got 'power'"):
        compute_frontier(fit(LAWS["power"], Points({"x": [1, 2, 3, 4]}, [4, 3, 2.5, 2.2]), num_bootstrap=0), 1e20)


def test_a_fit_without_a_trade_off_has_no_frontier():
    points = synthetic(noise=0.0, truth=HOFFMANN | {"B": 0.0})
    with pytest.raises(UserError, match="fit must have A > 0 and B > 0 for a best size to exist"):
        compute_frontier(fit(CHINCHILLA, points, num_bootstrap=0), 1e20)


def test_counts_that_do_not_fit_each_other_are_named():
    points = synthetic()
    n, d = (np.asarray(points.variables[name]) for name in ("N", "D"))

    def named(c):
        return " ".join(Points({"N": n, "D": d, "C": c}, points.response).check(CHINCHILLA))

    assert named(6 * n * d * 1.01) == ""
    assert "compute_mismatch: C is 1.03 times 6 N D throughout" in named(6 * n * d * 1.03)
    assert "mixed_counts: C / (6 N D) varies from 1 to 1.5" in named(6 * n * d * np.where(n < 1e8, 1.5, 1.0))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.acceptance
def test_coverage_of_the_intervals():
    """The 95 % intervals of 200 data sets of 240 runs, heavy-tailed noise, hold the truth 92 to 98 % of the time."""
    rng = np.random.default_rng(5)
    n, d = np.exp(rng.uniform(np.log(5e7), np.log(1e10), 240)), np.exp(rng.uniform(np.log(1e9), np.log(2e11), 240))
    truth = {"A": 477.8, "B": 2143.4, "E": 1.8172, "alpha": 0.3473, "beta": 0.3672}
    exact = CHINCHILLA.predict({"N": n, "D": d}, truth)
    hits: dict[str, list[bool]] = {}
    for seed in range(200):
        noise = 0.006 * np.random.default_rng(1000 + seed).standard_t(3, size=len(n))
        found = fit(CHINCHILLA, Points({"N": n, "D": d}, exact * np.exp(noise)), confidence=0.95, seed=seed)
        for name, (low, high) in found.intervals.items():
            hits.setdefault(name, []).append(low <= truth[name] <= high)
        low, high = found.derived_intervals["a"]
        hits.setdefault("a", []).append(low <= truth["beta"] / (truth["alpha"] + truth["beta"]) <= high)
    coverage = {name: float(np.mean(values)) for name, values in hits.items()}
    print(coverage)
    assert all(0.92 <= share <= 0.98 for share in coverage.values()), coverage


def test_resamples_reach_the_optimum_of_absolute_deviations():
    """Weights of a resample are refitted as well as a search from all starts does."""
    points = synthetic(noise=0.01)
    solution, _ = solve(CHINCHILLA, points, objective=Objective("least_absolute"))
    weights = np.random.default_rng(0).multinomial(36, np.full(36, 1 / 36), size=3).astype(float)
    refitted = solution.refit(weights)
    for row, weight in enumerate(weights):
        weighted = Points(points.variables, points.response, weights=weight)
        fresh, _ = solve(CHINCHILLA, weighted, objective=Objective("least_absolute"))
        assert refitted.objective[row] <= fresh.found.objective[0] * (1 + 1e-3)
