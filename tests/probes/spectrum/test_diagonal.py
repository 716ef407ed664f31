from __future__ import annotations

import math

import pytest
import torch

from landscape_ray.errors import UserError
from landscape_ray.probes.fixed_loss import FixedLoss
from landscape_ray.probes.operators import HessianOperator
from landscape_ray.probes.spectrum.diagonal import diagonal


def symmetric(size=40):
    generator = torch.Generator().manual_seed(5)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return matrix + matrix.T + torch.diag(torch.linspace(0, 40, size).double())


def test_unbiased_with_honest_errors_element_by_element():
    matrix = symmetric()
    results = [
        diagonal(lambda v: matrix @ v, 40, tol=1e-9, max_matvecs=10, seed=seed, dtype=torch.float64)
        for seed in range(200)
    ]
    values = torch.stack([r.values for r in results])
    errors = values - matrix.diagonal()
    assert bool((errors.mean(0).abs() <= 4.5 * values.std(0) / math.sqrt(200)).all())
    within = (errors.abs() <= torch.stack([r.standard_errors for r in results])).double().mean(0)
    assert 0.66 <= float(within.mean()) <= 0.71  # elements of one result depend on each other, results don't
    assert float(within.min()) > 0.55


def test_stops_at_the_tolerance():
    matrix = symmetric()
    result = diagonal(lambda v: matrix @ v, 40, tol=0.1, max_matvecs=400, dtype=torch.float64)
    length = float(matrix.diagonal().norm())
    assert result.converged
    assert float(result.standard_errors.norm()) <= 0.1 * float(result.values.norm())
    assert float((result.values - matrix.diagonal()).norm()) <= 0.13 * length
    cut_short = diagonal(lambda v: matrix @ v, 40, tol=0.1, max_matvecs=4, dtype=torch.float64)
    assert (cut_short.num_matvecs, cut_short.converged) == (4, False)


@pytest.mark.acceptance
def test_known_outliers_are_no_error():
    generator = torch.Generator().manual_seed(5)
    axes, _ = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64))
    spectrum = torch.cat([torch.tensor([100.0, 80.0, -60.0]), 0.1 * torch.ones(57)]).double()
    matrix = (axes * spectrum) @ axes.T
    settings = {"size": 60, "tol": 0.01, "max_matvecs": 100, "dtype": torch.float64}
    plain = diagonal(lambda v: matrix @ v, **settings)
    helped = diagonal(lambda v: matrix @ v, low_rank=(spectrum[:3], axes.T[:3]), **settings)
    assert (plain.num_matvecs, plain.converged) == (100, False)
    assert (helped.num_matvecs, helped.converged) == (3, True)
    assert float((helped.values - matrix.diagonal()).norm()) < 0.01 * float((plain.values - matrix.diagonal()).norm())
    # a part that is not one of the matrix leaves the result unbiased, and its error true
    off = diagonal(lambda v: matrix @ v, low_rank=(2 * spectrum[:3], axes.T[:3]), **settings)
    assert float((off.values - matrix.diagonal()).norm()) <= 2 * float(off.standard_errors.norm())


def test_hessian_of_a_network(smooth_case, dense_hessian):
    operator = HessianOperator(FixedLoss(smooth_case.module, smooth_case.loss, [smooth_case.batch]))
    result = diagonal(operator, operator.size, tol=0.2, max_matvecs=300, dtype=torch.float64)
    exact = dense_hessian(smooth_case).diagonal()
    assert result.num_matvecs == operator.num_matvecs
    assert float((result.values - exact).norm()) <= 0.3 * float(exact.norm())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"tol": math.nan}, "tol must be positive and finite, got nan"),
        ({"max_matvecs": 1}, "max_matvecs must be at least 2, got 1"),
        ({"low_rank": (torch.ones(2), torch.ones(2, 4))}, r"low_rank must be values \(k,\) and vectors \(k, 3\)"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(UserError, match=message):
        diagonal(**{"matvec": lambda v: v, "size": 3, **settings})
