from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.probes.fixed_loss import FixedLoss
from landscape_ray.probes.operators.hessian import HessianOperator
from landscape_ray.probes.operators.operator import CurvatureOperator
from landscape_ray.probes.operators.transforms import Preconditioned, Scaled
from landscape_ray.probes.spectrum.lanczos import lanczos


class Matrix(CurvatureOperator):
    def __init__(self, matrix: Tensor) -> None:
        super().__init__(len(matrix), matrix.dtype, matrix.device)
        self.matrix = matrix

    def _product(self, vector: Tensor) -> Tensor:
        return self.matrix @ vector


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(size: int) -> Tensor:
    A = normal(size, size)
    return A + A.T


def test_congruence_equals_its_definition():
    A, d = symmetric(7), normal(7, seed=1).abs()
    d[2] = 0.0
    operator = Matrix(A)
    scaled = Scaled(operator, d)
    torch.testing.assert_close(scaled.dense(), torch.diag(d) @ A @ torch.diag(d), rtol=1e-12, atol=1e-12)
    assert (scaled.num_matvecs, operator.num_matvecs) == (7, 7)


def test_preconditioned_operator_has_the_eigenvalues_of_the_unsymmetric_one():
    A, p = symmetric(7), normal(7, seed=1).exp()
    operator = Preconditioned(Matrix(A), p)
    dense = operator.dense()
    torch.testing.assert_close(dense, torch.diag(p**-0.5) @ A @ torch.diag(p**-0.5), rtol=1e-12, atol=1e-12)
    values, vectors = torch.linalg.eigh(dense)
    unsymmetric = torch.linalg.eigvals(torch.diag(1 / p) @ A)
    torch.testing.assert_close(values, unsymmetric.real.sort().values)
    direction = operator.diagonal * vectors[:, -1]
    torch.testing.assert_close(A @ direction / p, values[-1] * direction)


def test_diagonals_are_copied_and_take_the_type_of_the_operator():
    p = torch.full((3,), 4.0, dtype=torch.float64)
    operator = Preconditioned(Matrix(torch.eye(3)), p)
    p.fill_(1.0)
    assert operator.diagonal.dtype == torch.float32
    assert operator(torch.ones(3)).tolist() == [0.25] * 3
    small = Preconditioned(Matrix(torch.eye(1)), torch.tensor([1e-40]))  # beyond float32's full precision
    assert float(small.diagonal) == pytest.approx(1e20, rel=1e-4)


@pytest.mark.acceptance
@pytest.mark.parametrize("factors", [(1.0, 1.0), (2.0, 0.5), (10.0, 0.1), (2.0, 0.25, 2.0)])
def test_scalar_chain_has_its_closed_forms(factors):
    # 0.5 (prod w - 1)^2 at its minimum: H = u u' with u_i = 1/w_i, so adaptively the number of factors
    chain = nn.ParameterList([nn.Parameter(torch.tensor(w, dtype=torch.float64)) for w in factors])

    def loss(chain: nn.Module, target: float) -> Tensor:
        product = torch.ones((), dtype=torch.float64)
        for factor in chain.parameters():
            product = product * factor
        return 0.5 * (product - target).square()

    function = FixedLoss(chain, loss, [1.0])
    hessian = HessianOperator(function)
    assert float(torch.linalg.eigvalsh(hessian.dense())[-1]) == pytest.approx(sum(w**-2 for w in factors), rel=1e-12)
    adaptive = Scaled(hessian, function.weights.abs()).dense()
    assert float(torch.linalg.eigvalsh(adaptive)[-1]) == pytest.approx(len(factors), rel=1e-12)


@pytest.mark.acceptance
def test_adaptive_curvature_is_invariant_to_rescaling_the_layers():
    module = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 10)).double()
    nn.utils.vector_to_parameters(0.3 * normal(226, seed=5), module.parameters())
    X, y = normal(64, 16), torch.randint(10, (64,), generator=torch.Generator().manual_seed(0))

    def measure(scale: float) -> tuple[float, float, float, float, float]:
        scaled = copy.deepcopy(module)
        with torch.no_grad():
            for parameter in (scaled[0].weight, scaled[0].bias):
                parameter.mul_(scale)
            scaled[2].weight.div_(scale)
        function = FixedLoss(scaled, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), [(X, y)])
        hessian = HessianOperator(function)
        adaptive = Scaled(hessian, function.weights.abs())
        value, gradient = function.gradient()
        top, adaptive_top = (
            lanczos(operator, function.size, tol=1e-9, max_matvecs=120, dtype=torch.float64).value
            for operator in (hessian, adaptive)
        )
        return top, value, adaptive_top, float(adaptive.dense().trace()), float((function.weights * gradient).norm())

    first, *invariants = measure(1.0)
    for scale in (3.0, 10.0):
        other, *found = measure(scale)
        assert found == pytest.approx(invariants, rel=1e-10)
        assert abs(other / first - 1) > 0.1


def test_refused_diagonals():
    operator = Matrix(torch.eye(3))
    with pytest.raises(UserError, match=r"diagonal must have shape \(3,\), got \(3, 1\); flatten it"):
        Scaled(operator, torch.ones(3, 1))
    with pytest.raises(UserError, match=r"diagonal must be finite and at least 0 everywhere, got -1.0 at 1"):
        Scaled(operator, torch.tensor([0.0, -1.0, 1.0]))
    for bad in (0.0, -2.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=rf"preconditioner must be finite and positive everywhere, got {bad} at 2"):
            Preconditioned(operator, torch.tensor([1.0, 1.0, bad]))
    with pytest.raises(UserError, match=r"preconditioner must have shape \(3,\), got \(2,\)"):
        Preconditioned(operator, torch.ones(2))
