from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from landscape_ray.errors import UserError
from landscape_ray.probes import Host
from landscape_ray.probes.fixed_loss import observing
from landscape_ray.probes.operators.operator import CurvatureOperator
from landscape_ray.probes.sharpness.smoothness import LinfSmoothnessProbe, largest_response, linf_smoothness, norm_11


class Matrix(CurvatureOperator):
    def __init__(self, matrix):
        super().__init__(len(matrix), matrix.dtype, matrix.device)
        self.matrix = matrix

    def _product(self, vector):
        return self.matrix @ vector


def symmetric(size, seed=0):
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return matrix + matrix.T


def one_direction():
    vector = torch.linspace(-1, 3, 30, dtype=torch.float64)
    return vector[:, None] * vector  # all rows share their error: the hardest case


@pytest.mark.acceptance
def test_sum_of_absolute_entries_of_the_dense_hessian(case, dense_hessian):
    truth = float(dense_hessian(case).abs().sum())
    found = linf_smoothness(case.module, case.loss, [case.batch], num_vectors=30)
    assert abs(found.value - truth) < 3.5 * found.standard_error
    assert found.standard_error < 0.4 * truth


@pytest.mark.acceptance
@pytest.mark.parametrize("matrix", [symmetric(30), one_direction(), torch.eye(30, dtype=torch.float64)])
@pytest.mark.parametrize("num_vectors", [3, 12, 25])
def test_unbiased_for_few_vectors_and_honest(matrix, num_vectors):
    operator, truth = Matrix(matrix), float(matrix.abs().sum())
    draws = [
        norm_11(operator, num_vectors, torch.Generator().manual_seed(seed))
        for seed in range(200 if num_vectors < 20 else 100)
    ]
    values, errors = torch.tensor(draws, dtype=torch.float64).T
    spread = float(values.std())
    assert abs(float(values.mean()) - truth) < 4 * spread / math.sqrt(len(draws))
    if num_vectors > 3:
        assert float(errors.square().mean().sqrt()) == pytest.approx(spread, rel=0.35)
        within = float(((values - truth).abs() < 2.26 * errors).double().mean())
        assert within > 0.8  # 95 % for normal errors with 9 degrees of freedom; these are skewed


def test_agrees_with_the_medians_of_the_source():
    """Twin: the median of |H v| for each row, over many Cauchy vectors, summed over rows."""
    matrix = symmetric(12, seed=1)
    generator = torch.Generator().manual_seed(2)
    cauchy = torch.empty(12, 10001, dtype=torch.float64).cauchy_(generator=generator)
    medians = float((matrix @ cauchy).abs().median(1).values.sum())
    value, error = norm_11(Matrix(matrix), 400, torch.Generator().manual_seed(3))
    assert medians == pytest.approx(float(matrix.abs().sum()), rel=0.03)
    assert abs(value - medians) < 3 * error


def test_rows_of_zeros_count_nothing():
    matrix = torch.zeros(8, 8, dtype=torch.float32)
    assert norm_11(Matrix(matrix), 5, torch.Generator().manual_seed(0))[0] < 1e-30
    matrix[3, 3] = 2.0
    value, error = norm_11(Matrix(matrix), 400, torch.Generator().manual_seed(0))
    assert abs(value - 2) < 3 * error < 1


@pytest.mark.parametrize("seed", range(5))
def test_lower_bound_against_all_signs(seed):
    matrix = symmetric(10, seed)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=10)), dtype=torch.float64)
    truth = float((signs @ matrix).abs().sum(1).max())
    found = [largest_response(Matrix(matrix), n, torch.Generator().manual_seed(seed)) for n in (1, 2, 4, 20)]
    assert found == sorted(found)
    assert 0.7 * truth < found[-1] <= truth * (1 + 1e-12)
    assert truth <= float(matrix.abs().sum())


def test_lower_bound_of_positive_entries_is_the_norm():
    matrix = symmetric(10).abs()
    assert largest_response(Matrix(matrix), 10, torch.Generator().manual_seed(0)) == pytest.approx(float(matrix.sum()))


def test_gradients_turn_by_no_more(smooth_case):
    """The definition: ||g(w + s) - g(w)||_1 <= C ||s||_inf for small steps, and nearly C for the best signs."""
    probe = LinfSmoothnessProbe([smooth_case.batch], num_vectors=40, num_ascents=10)
    found = probe.measure(smooth_case.module, smooth_case.loss)
    generator = torch.Generator().manual_seed(4)
    with observing(smooth_case.module, smooth_case.loss, [smooth_case.batch]) as function:
        _, before = function.gradient()
        for _ in range(30):
            signs = torch.randint(2, (function.size,), generator=generator).double() * 2 - 1
            _, after = function.gradient_at(1e-6 * signs)
            assert float((after - before).abs().sum()) / 1e-6 <= found["linf_smoothness/lower"].value * (1 + 1e-4)
        assert found["linf_smoothness/per_parameter"].value == found["linf_smoothness"].value / function.size
    assert found["linf_smoothness/lower"].value < found["linf_smoothness"].value


def test_probe_draws_anew_and_keeps_to_its_allowance(smooth_case):
    module, loss, batch = smooth_case
    probe = LinfSmoothnessProbe([batch], num_vectors=6, num_ascents=0)
    assert list(probe.measure(module, loss)) == ["linf_smoothness", "linf_smoothness/per_parameter"]
    second, third = (probe.measure(module, loss)[probe.name] for _ in range(2))
    assert second.value != third.value
    assert second.num_matvecs == 6
    assert second.price_gradients == pytest.approx(probe.price_gradients)
    twin = LinfSmoothnessProbe([batch], num_vectors=6, num_ascents=0)
    twin.load_state_dict(probe.state_dict())
    host = Host(allowance_gradients=1.2 + 4.5 * 2.3)
    short = probe.measure(module, loss, host)[probe.name]
    assert (short.num_matvecs, short.converged, second.converged) == (4, False, True)
    assert twin.measure(module, loss, host)[twin.name].value == short.value
    assert probe.measure(module, loss, Host(allowance_gradients=0.0))[probe.name].num_matvecs == 3


def test_allowance_cuts_vectors_and_ascents_in_proportion(smooth_case):
    module, loss, batch = smooth_case
    probe = LinfSmoothnessProbe([batch], num_vectors=20, num_ascents=5)
    for products, ascents in [(25, 5), (15, 3), (4, 0)]:
        host = Host(allowance_gradients=2 / 3 + 1.2 + 2.3 * (products + 0.1))
        found = probe.measure(module, loss, host)
        assert found[probe.name].num_matvecs == products - ascents
        assert {estimate.converged for estimate in found.values()} == {products == 25}
        assert (f"{probe.name}/lower" in found) == bool(ascents)


def test_declared_price_is_that_of_several_batches(smooth_case):
    module, loss, (inputs, targets) = smooth_case
    parts = [((inputs[:40], targets[:40]), 40), ((inputs[40:], targets[40:]), 24)]
    probe = LinfSmoothnessProbe(parts, num_vectors=4, num_ascents=0)
    assert probe.price_gradients == pytest.approx(4 * 3.5)
    found = probe.measure(module, loss)[probe.name]
    assert found.price_gradients == pytest.approx(4 * 3.5 + 2 / 3)
    probe.batches = parts[:1]  # what was measured counts: another process may hold several
    assert probe.price_gradients == pytest.approx(4 * 3.5)


def test_not_finite_is_unknown():
    module = nn.Linear(2, 1)
    loss = lambda m, x: m(x).sum() * math.inf  # noqa: E731
    found = LinfSmoothnessProbe([torch.ones(1, 2)], num_vectors=3).measure(module, loss)
    assert all(math.isnan(estimate.value) for estimate in found.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_vectors": 2}, "num_vectors must be at least 3, got 2"),
        ({"num_ascents": -1}, "num_ascents must be at least 0, got -1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(UserError, match=message):
        LinfSmoothnessProbe([None], **settings)
