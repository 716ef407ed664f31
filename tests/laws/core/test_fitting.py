"""The shared fitter against slow twins and theorems, on a law other than annealing too."""

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from landscape_ray.errors import UserError
from landscape_ray.laws.core.fitting import huber, polish, search
from landscape_ray.laws.core.separable import SeparableLaw, solve_linear


def two_power_law(n, d):
    """L = E + A n^-alpha + B d^-beta, the Chinchilla form."""
    log_x = np.log(np.stack([n / np.exp(np.log(n).mean()), d / np.exp(np.log(d).mean())]))

    def columns(exponents):
        powers = np.exp(-exponents[:, :, None] * log_x)
        out = np.concatenate([np.ones_like(powers[:, :1]), powers], axis=1).swapaxes(1, 2)
        slopes = np.zeros((*out.shape, 2))
        slopes[:, :, 1, 0] = -log_x[0] * powers[:, 0]
        slopes[:, :, 2, 1] = -log_x[1] * powers[:, 1]
        return out, slopes

    starts = np.array([(a, b) for a in np.geomspace(0.05, 2, 4) for b in np.geomspace(0.05, 2, 4)])
    return SeparableLaw(columns=columns, num_linear=3, lower=np.full(2, 0.01), upper=np.full(2, 5.0), starts=starts)


@pytest.fixture(scope="module")
def grid():
    n, d = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 1e9, 6), np.geomspace(1e8, 1e11, 7)))
    return two_power_law(n, d)


def predict(law, parameters):
    columns, _ = law.columns(parameters[None, law.num_linear :])
    return columns[0] @ parameters[: law.num_linear]


TRUE = np.array([1.8, 0.5, 0.7, 0.34, 0.37])


@given(st.integers(0, 10_000), st.integers(1, 4))
def test_linear_solve_equals_nnls(seed, num_columns):
    rng = np.random.default_rng(seed)
    columns, y, weights = rng.standard_normal((12, num_columns)), rng.uniform(1, 3, 12), rng.uniform(0, 2, 12)
    expected, _ = scipy.optimize.nnls(columns * np.sqrt(weights)[:, None] / y[:, None], np.sqrt(weights))
    np.testing.assert_allclose(solve_linear(columns[None], y[None], weights[None])[0], expected, atol=1e-8)


def test_linear_solve_leaves_out_an_empty_column():
    columns = np.stack([np.ones(5), np.zeros(5)], axis=1)[None]
    np.testing.assert_allclose(solve_linear(columns, np.full((1, 5), 2.0), np.ones((1, 5))), [[2.0, 0.0]])


@given(st.floats(-10, 10), st.floats(1e-6, 5))
def test_huber_by_its_cases(residual, delta):
    expected = residual**2 / 2 if abs(residual) <= delta else delta * (abs(residual) - delta / 2)
    assert huber(np.array([residual]), delta)[0] == pytest.approx(expected, rel=1e-12)
    assert huber(np.array([residual]), np.inf)[0] == pytest.approx(residual**2 / 2)


@pytest.mark.acceptance
def test_noise_free_recovery_of_a_law_with_two_exponents(grid):
    found = search(grid, predict(grid, TRUE), 1e-3)
    np.testing.assert_allclose(found.parameters[0], TRUE, rtol=1e-8)
    assert (found.objective < 1e-20).mean() >= 0.5


@pytest.mark.parametrize("delta", [1e-3, 1e-2, np.inf])
def test_no_twin_finds_a_lower_objective(grid, delta):
    y = predict(grid, TRUE) * np.exp(0.01 * np.random.default_rng(1).standard_t(3, 42))
    found = search(grid, y, delta)

    def objective(parameters):
        prediction = predict(grid, parameters)
        return huber(np.log(y) - np.log(np.maximum(prediction, 1e-6)), delta).sum() * 1e3

    twins = [
        scipy.optimize.minimize(
            objective, [y.min(), 1.0, 1.0, *start], method="L-BFGS-B", bounds=[(0, None)] * 3 + [(0.01, 5)] * 2
        )
        for start in grid.starts[::3]
    ]
    best = min(twins, key=lambda twin: twin.fun)
    assert found.objective[0] * 1e3 <= best.fun * (1 + 1e-9)
    assert objective(found.parameters[0]) == pytest.approx(found.objective[0] * 1e3, rel=1e-12)
    assert np.abs(found.gradient[0]).max() < 1e-9 * found.objective[0]


def test_gradient_equals_finite_differences(grid):
    y = predict(grid, TRUE) * np.exp(0.01 * np.random.default_rng(2).standard_normal(42))
    at = np.array([1.7, 0.6, 0.6, 0.3, 0.4])
    ones = np.ones((1, 42))
    gradient = polish(grid, y[None], ones, 1e-2, at[None], max_iterations=0).gradient[0]
    for i in range(len(at)):
        up, down = at.copy(), at.copy()
        up[i], down[i] = at[i] * np.exp(1e-6), at[i] * np.exp(-1e-6)
        values = [polish(grid, y[None], ones, 1e-2, q[None], max_iterations=0).objective[0] for q in (up, down)]
        assert gradient[i] == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-10)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_the_polish_never_rises(seed):
    rng = np.random.default_rng(seed)
    n, d = rng.uniform(1, 100, 25), rng.uniform(1, 1000, 25)
    law, y = two_power_law(n, d), rng.uniform(1, 5, (1, 25))
    start = np.array([[1.0, 1.0, 1.0, *rng.uniform(0.01, 5, 2)]])
    values = [polish(law, y, np.ones_like(y), 1e-2, start, max_iterations=k).objective[0] for k in range(12)]
    assert (np.diff(values) <= 1e-12 * values[0]).all()


def test_weights_are_repetitions(grid):
    y = predict(grid, TRUE) * np.exp(0.01 * np.random.default_rng(3).standard_normal(42))
    counts = np.random.default_rng(4).integers(1, 4, 42)
    weighted = polish(grid, y[None], counts[None].astype(float), 1e-3, TRUE[None])

    def repeated_columns(exponents):
        columns, slopes = grid.columns(exponents)
        return columns.repeat(counts, axis=1), slopes.repeat(counts, axis=1)

    law = SeparableLaw(columns=repeated_columns, num_linear=3, lower=grid.lower, upper=grid.upper, starts=grid.starts)
    y_repeated = y.repeat(counts)[None]
    repeated = polish(law, y_repeated, np.ones_like(y_repeated), 1e-3, TRUE[None])
    np.testing.assert_allclose(weighted.parameters, repeated.parameters, rtol=1e-7)


def test_a_batch_equals_its_rows(grid, monkeypatch):
    y = predict(grid, TRUE) * np.exp(0.01 * np.random.default_rng(5).standard_normal((7, 42)))
    start = np.broadcast_to(TRUE, (7, 5))
    together = polish(grid, y, np.ones_like(y), 1e-3, start)
    monkeypatch.setattr("landscape_ray.laws.core.fitting._CHUNK_ELEMENTS", 1)
    one_by_one = polish(grid, y, np.ones_like(y), 1e-3, start)
    np.testing.assert_allclose(together.parameters, one_by_one.parameters, rtol=1e-9)


def test_bounds_hold_and_are_reported(grid):
    y = np.full(42, 2.5)
    found = search(grid, y, 1e-3)
    assert (found.parameters[0] >= np.concatenate([np.zeros(3), grid.lower])).all()
    assert found.at_bound[0].any()
    np.testing.assert_allclose(predict(grid, found.parameters[0]), y, rtol=1e-9)


def test_a_law_that_is_never_positive_is_refused():
    def columns(exponents):
        out = -np.ones((len(exponents), 4, 1))
        return out, np.zeros((*out.shape, 1))

    law = SeparableLaw(columns=columns, num_linear=1, lower=np.zeros(1), upper=np.ones(1), starts=np.full((2, 1), 0.5))
    with pytest.raises(UserError, match="loss_nats must be described by some positive law"):
        search(law, np.ones(4), 1e-3)


def test_a_curved_valley_is_followed_to_its_end():
    """Points so close together that level, factor and exponent trade off: all starts still end in one optimum."""
    rng = np.random.default_rng(7)
    x = np.linspace(3.0, 3.6, 60)
    y = (0.3 + 2.0 * x**-0.05) * np.exp(2e-4 * rng.standard_normal(60))
    log_x = np.log(x) - np.log(x).mean()

    def columns(exponents):
        power = np.exp(-exponents * log_x)
        out = np.stack([np.ones_like(power), power], axis=2)
        slopes = np.zeros((*out.shape, 1))
        slopes[:, :, 1, 0] = -log_x * power
        return out, slopes

    law = SeparableLaw(
        columns=columns,
        num_linear=2,
        lower=np.array([0.01]),
        upper=np.array([5.0]),
        starts=np.geomspace(0.02, 3, 12)[:, None],
    )
    found = search(law, y, 1e-3)
    assert (found.objective <= found.objective[0] * (1 + 1e-6)).all()
    assert np.abs(found.gradient[0]).max() < 1e-4 * found.objective[0]
