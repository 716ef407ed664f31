from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from landscape_ray.errors import UserError
from landscape_ray.probes.fixed_loss import FixedLoss
from landscape_ray.probes.losses import OutputLoss
from landscape_ray.probes.operators import HessianOperator
from landscape_ray.probes.spectrum.diagonal import curvature_diagonal, diagonal
from landscape_ray.probes.spectrum.eigenpairs import curvature_operator

CROSS_ENTROPY = OutputLoss(nn.CrossEntropyLoss(reduction="none"), "categorical")


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
    assert float((helped.values - matrix.diagonal()).norm()) < 0.02 * float((plain.values - matrix.diagonal()).norm())
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


@pytest.mark.acceptance
@pytest.mark.parametrize("curvature", ["hessian", "ggn", "empirical_fisher"])
@pytest.mark.parametrize("num_outliers", [0, 3])
def test_diagonal_of_a_module_is_that_of_the_dense_matrix(smooth_case, curvature, num_outliers):
    arguments = smooth_case.module, CROSS_ENTROPY, [smooth_case.batch]
    function = FixedLoss(*arguments)
    exact = curvature_operator(function, curvature).dense().diagonal()
    found = curvature_diagonal(
        *arguments, curvature=curvature, num_outliers=num_outliers, tol=1e-9, max_matvecs=600, seed=3
    )
    assert not found.converged
    errors = (found.values - exact).abs() / found.standard_errors
    assert float((errors < 2).double().mean()) > 0.9
    assert float((found.values - exact).norm()) < 0.15 * float(exact.norm())
    assert found.price_gradients > 600
    assert found.num_matvecs >= 600 + num_outliers


def test_outliers_make_the_diagonal_cheaper():
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(40, 1, bias=False).double()
    direction = torch.randn(40, generator=generator).double()
    x = (
        torch.randn(200, 1, generator=generator).double() * direction
        + 0.05 * torch.randn(200, 40, generator=generator).double()
    )

    def half_square(module, x):
        return 0.5 * module(x).square().mean()

    plain, better = (
        curvature_diagonal(module, half_square, [x], num_outliers=k, tol=0.05, max_matvecs=200) for k in (0, 1)
    )
    exact = (x.square().sum(0) / 200).double()
    assert not plain.converged
    assert better.converged
    assert better.num_matvecs < 50
    torch.testing.assert_close(better.values, exact, rtol=0.05, atol=0.05 * float(exact.max()))


def test_diagonals_of_what_is_not_finite(smooth_case):
    def explodes(module, batch):
        return smooth_case.loss(module, batch) * float("inf")

    assert bool(curvature_diagonal(smooth_case.module, explodes, [smooth_case.batch]).values.isnan().all())
    with torch.no_grad():
        next(smooth_case.module.parameters())[0] = float("nan")
    found = curvature_diagonal(smooth_case.module, smooth_case.loss, [smooth_case.batch], num_outliers=2)
    assert bool(found.values.isnan().all())
    assert not found.converged


def test_refused_outliers(smooth_case):
    with pytest.raises(UserError, match="num_outliers must be at least 0, got -1"):
        curvature_diagonal(smooth_case.module, smooth_case.loss, [smooth_case.batch], num_outliers=-1)
    with pytest.raises(UserError, match="tol must be positive"):
        curvature_diagonal(smooth_case.module, smooth_case.loss, [smooth_case.batch], tol=0.0)
