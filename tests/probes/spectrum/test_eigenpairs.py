from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from landscape_ray.errors import UserError
from landscape_ray.probes.fixed_loss import FixedLoss
from landscape_ray.probes.losses import OutputLoss
from landscape_ray.probes.operators.gauss_newton import GGNOperator
from landscape_ray.probes.probe import Host
from landscape_ray.probes.spectrum.eigenpairs import (
    EigenvaluesProbe,
    condition_number,
    curvature_operator,
    eigenvalues,
)
from landscape_ray.probes.spectrum.lanczos import extremal_pairs

CROSS_ENTROPY = OutputLoss(nn.CrossEntropyLoss(reduction="none"), "categorical")


class Quadratic(nn.Module):
    """0.5 w'Aw: the Hessian is A."""

    def __init__(self, spectrum):
        super().__init__()
        self.spectrum = torch.as_tensor(spectrum)
        self.w = nn.Parameter(torch.linspace(0.1, 1.0, len(self.spectrum), dtype=self.spectrum.dtype))


def energy(module, batch):
    return 0.5 * (module.spectrum * module.w.square()).sum()


def values(estimates):
    return [estimate.value for estimate in estimates]


@pytest.mark.acceptance
def test_both_ends_of_dense_hessians(case, dense_hessian):
    exact = torch.linalg.eigvalsh(dense_hessian(case))
    found = eigenvalues(case.module, case.loss, [case.batch], k=5, num_smallest=3, tol=1e-7)
    assert values(found.largest) == pytest.approx(exact.flip(0)[:5].tolist(), rel=1e-5)
    assert values(found.smallest) == pytest.approx(exact[:3].tolist(), rel=1e-5)
    assert found.converged
    assert found.num_matvecs <= len(exact)
    H = dense_hessian(case)
    for estimate in (*found.largest, *found.smallest):
        off = float((H @ estimate.vector - estimate.value * estimate.vector).norm())
        assert off == pytest.approx(estimate.standard_error, abs=1e-9)


@pytest.mark.acceptance
def test_top_of_the_gauss_newton_and_fisher_matrices(case):
    function = FixedLoss(case.module, CROSS_ENTROPY, [case.batch])
    exact = torch.linalg.eigvalsh(GGNOperator(function).dense()).flip(0)
    found = eigenvalues(case.module, CROSS_ENTROPY, [case.batch], k=4, curvature="ggn", tol=1e-7)
    assert values(found.largest) == pytest.approx(exact[:4].tolist(), rel=1e-6)
    for curvature in ("fisher", "empirical_fisher"):
        dense = curvature_operator(function, curvature, seed=3).dense()
        found = eigenvalues(case.module, CROSS_ENTROPY, [case.batch], k=2, curvature=curvature, tol=1e-7, seed=3)
        assert values(found.largest) == pytest.approx(torch.linalg.eigvalsh(dense).flip(0)[:2].tolist(), rel=1e-6)


def test_largest_is_algebraic_and_smallest_may_be_larger_in_magnitude():
    module = Quadratic([-9.0, -1.0, 0.5, 2.0, 4.0])
    found = eigenvalues(module, energy, [0], k=2, num_smallest=1, tol=1e-6)
    assert values(found.largest) == pytest.approx([4.0, 2.0])
    assert values(found.smallest) == pytest.approx([-9.0])
    assert values(eigenvalues(module, energy, [0], k=0, num_smallest=2).smallest) == pytest.approx([-9.0, -1.0])


def test_parameters_choose_a_block(case, dense_hessian):
    first = next(iter(case.module.parameters()))
    block = dense_hessian(case)[: first.numel(), : first.numel()]
    found = eigenvalues(case.module, case.loss, [case.batch], k=2, tol=1e-7, parameters=[first])
    assert values(found.largest) == pytest.approx(torch.linalg.eigvalsh(block).flip(0)[:2].tolist(), rel=1e-6)


@pytest.mark.parametrize(
    ("spectrum", "expected"),
    [
        ([1.0, 2.0, 8.0], 8.0),
        ([-6.0, 0.5, 3.0], 12.0),  # indefinite: the smallest magnitude is inside
        ([0.0, 0.0, 0.25, -1.0], 4.0),  # zeros do not count
        ([3.0, 3.0, 3.0], 1.0),
    ],
)
def test_condition_number_of_an_exhausted_space(spectrum, expected):
    diagonal = torch.tensor(spectrum, dtype=torch.float64)
    pairs = extremal_pairs(lambda v: diagonal * v, len(diagonal), tol=0.0, dtype=torch.float64)
    found = condition_number(pairs, 2e-16, whole=True)
    assert (found.value, found.converged) == (pytest.approx(expected, rel=1e-6), True)
    assert not condition_number(pairs, 2e-16, whole=False).converged


def test_condition_number_grows_to_that_of_an_indefinite_matrix():
    A = torch.cat([torch.linspace(-4.0, -0.5, 40), torch.linspace(0.2, 8.0, 40)]).double()
    seen = []
    for steps in (3, 10, 30, 80):
        pairs = extremal_pairs(lambda v: A * v, 80, tol=0.0, max_matvecs=steps, dtype=torch.float64)
        seen.append(condition_number(pairs, 2e-16, whole=True))
    assert values(seen) == sorted(values(seen))
    assert seen[-1].value == pytest.approx(40.0, rel=1e-6)
    assert [estimate.converged for estimate in seen] == [False, False, False, True]
    zero = extremal_pairs(torch.zeros_like, 4)
    assert condition_number(zero, 1e-7, whole=True).value == math.inf


def test_bounded_basis_and_block(smooth_case, dense_hessian):
    exact = torch.linalg.eigvalsh(dense_hessian(smooth_case)).flip(0)[:3].tolist()
    for options in ({"max_basis": 8}, {"block": 2}, {"block": 2, "max_basis": 9}):
        found = eigenvalues(smooth_case.module, smooth_case.loss, [smooth_case.batch], k=3, tol=1e-6, **options)
        assert values(found.largest) == pytest.approx(exact, rel=1e-6)
    twins = Quadratic([5.0, 5.0, 1.0, *torch.linspace(-0.5, 0.5, 40).tolist()])
    assert values(eigenvalues(twins, energy, [0], k=2, block=2, tol=1e-5).largest) == pytest.approx([5.0, 5.0])


def test_continues_from_an_earlier_result(smooth_case):
    arguments = smooth_case.module, smooth_case.loss, [smooth_case.batch]
    cold = eigenvalues(*arguments, k=3, tol=1e-6)
    warm = eigenvalues(*arguments, k=3, tol=1e-6, start=cold.start)
    assert warm.num_matvecs < cold.num_matvecs / 2
    assert values(warm.largest) == pytest.approx(values(cold.largest), rel=1e-6)


def test_cost_is_counted(smooth_case):
    found = eigenvalues(smooth_case.module, smooth_case.loss, [smooth_case.batch], k=2)
    assert found.price_gradients == pytest.approx(2 / 3 + 1.2 + 2.3 * found.num_matvecs)
    assert found.cost_seconds > 0


def test_works_in_inference_mode_and_leaves_generators_alone(smooth_case):
    state = torch.get_rng_state()
    arguments = smooth_case.module, smooth_case.loss, [smooth_case.batch]
    expected = values(eigenvalues(*arguments, k=2).largest)
    with torch.inference_mode():
        assert values(eigenvalues(*arguments, k=2).largest) == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_not_finite_weights_give_nan():
    module = Quadratic([1.0, 2.0])
    with torch.no_grad():
        module.w[0] = float("nan")
    found = eigenvalues(module, energy, [0], num_smallest=1)
    assert all(math.isnan(value) for value in values((*found.largest, *found.smallest, found.condition_number)))
    assert (found.converged, found.start) == (False, None)

    def explodes(module, batch):
        return energy(module, batch) * float("inf")

    assert math.isnan(eigenvalues(Quadratic([1.0, 2.0]), explodes, [0]).largest[0].value)


def test_refused_arguments():
    module = Quadratic([1.0, 2.0])
    with pytest.raises(UserError, match="tol must be positive and finite, got 0"):
        eigenvalues(module, energy, [0], tol=0.0)
    with pytest.raises(UserError, match="curvature must be one of hessian, ggn, fisher, empirical_fisher, got 'ntk'"):
        eigenvalues(module, energy, [0], curvature="ntk")
    with pytest.raises(UserError, match=r"sum to 1 \.\.\. 2, got 3 and 0"):
        eigenvalues(module, energy, [0], k=3)
    with pytest.raises(UserError, match="loss must have per_target"):
        eigenvalues(module, energy, [0], curvature="ggn")
    for bad in ({"k": 0}, {"num_smallest": -1}, {"max_matvecs": 3}):
        with pytest.raises(UserError, match="k must be at least 1, num_smallest at least 0 and max_matvecs at least"):
            EigenvaluesProbe([0], **bad)
    with pytest.raises(UserError, match="cold_every must be at least 1, got 0"):
        EigenvaluesProbe([0], cold_every=0)


def test_probe_names_and_memory(smooth_case, dense_hessian):
    exact = torch.linalg.eigvalsh(dense_hessian(smooth_case)).tolist()
    probe = EigenvaluesProbe([smooth_case.batch], k=3, num_smallest=2, tol=1e-6)
    first = probe.measure(smooth_case.module, smooth_case.loss)
    assert list(first) == [
        "eigenvalues",
        "eigenvalues/2",
        "eigenvalues/3",
        "eigenvalues/smallest",
        "eigenvalues/smallest_2",
    ]
    assert values(first.values()) == pytest.approx([exact[-1], exact[-2], exact[-3], exact[0], exact[1]], rel=1e-6)
    check = 2 / 3  # that the loss is deterministic, once
    assert probe.price_gradients == pytest.approx(check + 1.2 + 2.3 * first["eigenvalues"].num_matvecs)

    restored = EigenvaluesProbe([smooth_case.batch], k=3, num_smallest=2, tol=1e-6)
    restored.load_state_dict(probe.state_dict())
    second = probe.measure(smooth_case.module, smooth_case.loss)
    assert second["eigenvalues"].num_matvecs < first["eigenvalues"].num_matvecs
    assert restored.measure(smooth_case.module, smooth_case.loss)["eigenvalues"].value == second["eigenvalues"].value
    always_cold = EigenvaluesProbe([smooth_case.batch], k=3, num_smallest=2, tol=1e-6, cold_every=1)
    counts = [always_cold.measure(smooth_case.module, smooth_case.loss)["eigenvalues"].num_matvecs for _ in range(2)]
    assert min(counts) > second["eigenvalues"].num_matvecs


def test_probe_keeps_to_its_allowance_and_to_the_size_of_the_module(smooth_case):
    probe = EigenvaluesProbe([smooth_case.batch], k=2, num_smallest=1, tol=1e-9)
    found = probe.measure(smooth_case.module, smooth_case.loss, Host(allowance_gradients=20.0))
    assert found["eigenvalues"].num_matvecs == 7  # (20 - 2/3 - 1.2) / 2.3
    assert not found["eigenvalues"].converged
    assert set(EigenvaluesProbe([0], k=3).measure(Quadratic([1.0, 2.0]), energy)) == {"eigenvalues", "eigenvalues/2"}
    module = Quadratic([1.0, 2.0])
    with torch.no_grad():
        module.w.fill_(float("inf"))
    assert math.isnan(probe.measure(module, energy)["eigenvalues"].value)
