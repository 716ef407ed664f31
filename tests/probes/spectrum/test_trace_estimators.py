from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from landscape_ray.errors import UserError
from landscape_ray.probes.spectrum import trace_estimators
from landscape_ray.probes.spectrum.sign_samples import SignSamples, random_signs, student
from landscape_ray.probes.spectrum.trace_estimators import stochastic_trace

SIZE = 200
METHODS = ["hutchinson", "hutch++", "xtrace", "auto"]
SPECTRA = {
    "bulk": torch.linspace(-0.5, 2, SIZE, dtype=torch.float64),
    "outliers": torch.cat([torch.linspace(20, 60, 10), torch.linspace(0, 0.2, SIZE - 10)]).double(),
    "power_law": 1 / torch.arange(1, SIZE + 1, dtype=torch.float64),
    "negative": -1 / torch.arange(1, SIZE + 1, dtype=torch.float64).sqrt(),
}
LOW_RANK = torch.cat([torch.linspace(50, 100, 5), torch.full((SIZE - 5,), 1e-3)]).double()


def with_spectrum(spectrum):
    generator = torch.Generator().manual_seed(3)
    axes, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64))
    return (axes * spectrum) @ axes.T


def run(matrix, **settings):
    calls = []

    def matvec(v):
        calls.append(v)
        return matrix @ v

    result = stochastic_trace(matvec, len(matrix), dtype=matrix.dtype, **settings)
    assert result.num_matvecs == len(calls)
    assert all(v.shape == (len(matrix),) for v in calls)
    return result


def least_hits(num, rate):
    """Return how many successes of `num` at `rate` are fewer than in one case of ten thousand."""
    return stats.binom.ppf(1e-4, num, rate)


@pytest.mark.acceptance
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SPECTRA)
def test_unbiased_and_covered_by_the_standard_error(name, method):
    matrix, num = with_spectrum(SPECTRA[name]), 100
    truth = float(matrix.trace())
    # A fixed number of products: stopping depends on the samples, and shifts what it stops at.
    results = [run(matrix, method=method, tol=1e-12, max_matvecs=12, seed=seed) for seed in range(num)]
    errors = torch.tensor([r.value - truth for r in results])
    assert abs(float(errors.mean())) <= 4 * float(errors.std()) / math.sqrt(num)
    claimed = torch.tensor([r.standard_error for r in results])
    assert int((errors.abs() <= claimed).sum()) >= least_hits(num, 0.683)
    assert int((errors.abs() <= 3 * claimed).sum()) >= least_hits(num, 0.99)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SPECTRA)
def test_stops_at_the_tolerance_honestly(name, method):
    matrix, num = with_spectrum(SPECTRA[name]), 40
    truth = float(matrix.trace())
    results = [run(matrix, method=method, tol=0.1, max_matvecs=SIZE, seed=seed) for seed in range(num)]
    for r in results:
        assert r.converged
        assert r.standard_error <= 0.1 * abs(r.value)
    # 0.62: what stopping early at a small spread costs
    assert sum(abs(r.value - truth) <= r.standard_error for r in results) >= least_hits(num, 0.62)
    assert sum(abs(r.value - truth) <= 0.3 * abs(truth) for r in results) >= least_hits(num, 0.99)


@pytest.mark.parametrize("method", METHODS)
def test_frobenius_norm_from_the_same_products(method):
    matrix, num = with_spectrum(SPECTRA["outliers"]), 100
    truth = float(matrix.square().sum())
    results = [run(matrix, method=method, tol=1e-12, max_matvecs=18, seed=seed) for seed in range(num)]
    values = torch.tensor([r.frobenius_squared for r in results])
    assert abs(float(values.mean()) - truth) <= 4 * float(values.std()) / math.sqrt(num)
    hits = sum(abs(r.frobenius_squared - truth) <= 2 * r.frobenius_squared_error for r in results)
    assert hits >= least_hits(num, 0.9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signs_are_even_and_without_order(dtype):
    generator = torch.Generator().manual_seed(0)
    signs = random_signs(6400, generator, dtype, torch.device("cpu"))
    assert signs.dtype == dtype
    assert signs.shape == (6400,)
    assert bool((signs.abs() == 1).all())
    rows = signs.view(100, 64)  # a word each
    assert float(rows.mean(0).abs().max()) < 0.5  # five deviations: no bit stands still
    others = rows.T @ rows / 100 - torch.eye(64, dtype=dtype)
    assert float(others.abs().max()) < 0.5  # nor goes with another
    assert abs(float(others.square().mean()) - 0.01 * 63 / 64) < 0.001
    again = random_signs(6400, generator, dtype, torch.device("cpu"))
    assert abs(float(signs @ again)) < 4 * 80
    few = random_signs(5, torch.Generator().manual_seed(0), dtype, torch.device("cpu"))
    assert torch.equal(few, signs[:5])


def test_variance_of_a_sample_is_known_better_than_its_spread():
    matrix = with_spectrum(SPECTRA["bulk"])
    truth = 2 * float(matrix.square().sum() - matrix.diagonal().square().sum())
    generator = torch.Generator().manual_seed(0)
    variances, spreads = [], []
    for _ in range(300):
        samples = SignSamples()
        for _ in range(3):
            signs = random_signs(SIZE, generator, torch.float64, torch.device("cpu"))
            samples.add(signs, matrix @ signs)
        variances.append(samples.variance)
        spreads.append(float(torch.tensor(samples.forms).var()))
    variance, spread = torch.tensor(variances), torch.tensor(spreads)
    assert abs(float(variance.mean()) - truth) <= 4 * float(variance.std()) / math.sqrt(300)
    assert 5 * float(variance.std()) < float(spread.std())


@pytest.mark.acceptance
@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_low_rank_parts_are_no_error(method):
    matrix = with_spectrum(LOW_RANK)
    truth = float(matrix.trace())

    def root_mean_square_error(method):
        results = [run(matrix, method=method, tol=1e-12, max_matvecs=36, seed=seed) for seed in range(10)]
        return math.sqrt(sum((r.value - truth) ** 2 for r in results) / len(results))

    assert 1000 * root_mean_square_error(method) < root_mean_square_error("hutchinson")


@pytest.mark.acceptance
def test_auto_is_near_the_cheapest():
    spent = {
        method: sum(
            run(with_spectrum(s), method=method, max_matvecs=400, seed=4).num_matvecs
            for s in (LOW_RANK, SPECTRA["bulk"])
        )
        for method in METHODS
    }
    assert spent["auto"] < 0.5 * spent["hutchinson"]
    assert spent["auto"] <= 1.2 * min(spent.values())
    assert run(with_spectrum(LOW_RANK)).route == "xtrace"
    assert run(with_spectrum(torch.linspace(0.5, 2, SIZE).double())).num_matvecs == 3


def test_auto_samples_the_rest_where_one_sample_for_each_kept_vector_is_not_enough():
    spectrum = torch.cat([torch.linspace(20, 60, 10), torch.linspace(0, 2, SIZE - 10)]).double()
    result = run(with_spectrum(spectrum), tol=0.005, max_matvecs=190)
    assert result.route == "hutch++"
    assert result.converged
    assert result.value == pytest.approx(float(spectrum.sum()), rel=0.02)


def test_auto_keeps_no_more_than_there_is_room_for(monkeypatch):
    matrix = with_spectrum(LOW_RANK)
    assert run(matrix, tol=1e-5).route == "xtrace"
    monkeypatch.setattr(trace_estimators, "SKETCH_BYTES", 7 * 6 * 8 * SIZE)
    assert run(matrix, tol=1e-5).route == "hutchinson"


def test_auto_reads_small_matrices_off():
    matrix = with_spectrum(torch.linspace(-3, 1, 8).double())
    result = run(matrix)
    assert (result.route, result.num_matvecs, result.standard_error) == ("columns", 8, 0.0)
    assert result.value == pytest.approx(-8.0)
    assert result.frobenius_squared == pytest.approx(float(matrix.square().sum()))
    medium = with_spectrum(torch.linspace(-1, 1.05, 60).double())
    assert run(medium, tol=1e-3, max_matvecs=100).route == "columns"


def test_negative_trace_is_not_taken_for_accuracy():
    # a peer compares the spread with tol * trace without its sign, and stops after two samples
    matrix = with_spectrum(-SPECTRA["outliers"])
    result = run(matrix, method="hutchinson", max_matvecs=400)
    assert result.num_matvecs > 30
    assert result.value == pytest.approx(float(matrix.trace()), rel=0.2)


@pytest.mark.parametrize("method", METHODS)
def test_zero_matrix(method):
    result = run(torch.zeros(30, 30), method=method)
    assert (result.value, result.standard_error, result.frobenius_squared) == (0.0, 0.0, 0.0)
    assert result.converged
    assert result.num_matvecs <= 8


def test_diagonal_matrix_has_no_variance_under_signs():
    matrix = torch.diag(torch.linspace(-5, 3, 50).double())
    for method in ("hutchinson", "auto"):
        result = run(matrix, method=method)
        assert result.value == pytest.approx(-50.0)
        assert result.standard_error == pytest.approx(0.0, abs=1e-12)
        assert result.num_matvecs == 3


@pytest.mark.parametrize("method", METHODS)
def test_traceless_matrix_never_converges(method):
    matrix = with_spectrum(torch.cat([torch.ones(50), -torch.ones(50)]).double())
    result = run(matrix, method=method, max_matvecs=20)
    assert not result.converged
    assert abs(result.value) <= 4 * result.standard_error


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("most", [8, 9, 16, 31])
def test_budget_is_kept(method, most):
    result = run(with_spectrum(SPECTRA["bulk"]), method=method, tol=1e-9, max_matvecs=most)
    assert most - 2 <= result.num_matvecs <= most
    assert 0 < result.standard_error < math.inf


@pytest.mark.parametrize("method", ["hutch++", "xtrace", "auto"])
def test_rank_one_in_float32(method):
    vector = torch.randn(300, generator=torch.Generator().manual_seed(0))
    result = run(torch.outer(vector, vector), method=method)
    assert result.value == pytest.approx(float(vector @ vector), rel=1e-4)
    assert result.converged


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first", [1, 2, 6, 8, 10])
def test_not_finite(method, first):
    matrix = with_spectrum(SPECTRA["outliers"])
    calls = iter(range(1, 100))
    result = stochastic_trace(
        lambda v: matrix @ v * (math.nan if next(calls) >= first else 1.0),
        SIZE,
        method=method,
        tol=1e-9,
        dtype=torch.float64,
    )
    assert math.isnan(result.value)
    assert not result.converged
    assert result.num_matvecs < first + 16


@pytest.mark.parametrize("method", METHODS)
def test_what_overflows_is_not_raised(method):
    result = run(with_spectrum(SPECTRA["outliers"]) * 1e200, method=method, max_matvecs=20)
    assert result.frobenius_squared == math.inf
    assert not result.converged


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 2, 9])
def test_few_rows(method, size):
    matrix = with_spectrum(torch.linspace(1, 2, size).double())
    # with seed 0, as with one in four, three samples of two signs are the same, and hutchinson believes them
    result = run(matrix, method=method, max_matvecs=40, seed=1)
    assert result.value == pytest.approx(float(matrix.trace()), abs=4 * result.standard_error + 1e-12)


def test_widening_is_the_quantile_of_student():
    for degrees, slack in ((1, 0.02), (2, 2e-3), (4, 2e-4), (30, 1e-6)):
        assert student(degrees) == pytest.approx(stats.t.ppf(stats.norm.cdf(1), degrees), rel=slack)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"tol": 0.0}, "tol must be positive and finite, got 0.0"),
        ({"method": "slq"}, "method must be one of hutchinson, hutch\\+\\+, xtrace, auto, got 'slq'"),
        ({"max_matvecs": 1}, "max_matvecs must be at least 2 for method auto, got 1"),
        ({"max_matvecs": 7, "method": "xtrace"}, "max_matvecs must be at least 8 for method xtrace, got 7"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(UserError, match=message):
        stochastic_trace(**{"matvec": lambda v: v, "size": 3, **settings})
