from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from landscape_ray.errors import UserError
from landscape_ray.probes import Host
from landscape_ray.probes.losses import OutputLoss
from landscape_ray.probes.sharpness.average_case import AverageCaseSharpnessProbe, average_case_sharpness
from landscape_ray.probes.spectrum.sign_samples import student


def regression():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(40, 9, generator=generator, dtype=torch.float64)
    y = torch.randn(40, 1, generator=generator, dtype=torch.float64)
    module = nn.Linear(9, 1, bias=False).double()
    with torch.no_grad():  # away from the minimum: the gradient must not matter
        module.weight.copy_(torch.linspace(-1, 2, 9))
    return module, lambda m, b: 0.5 * (m(b[0]) - b[1]).square().mean(), (x, y), x.T @ x / 40


@pytest.mark.acceptance
@pytest.mark.parametrize("scaling", ["standard", "elementwise", "filterwise"])
@pytest.mark.parametrize(("norm", "variance"), [("l2", 1.0), ("linf", 1 / 3)])
@pytest.mark.parametrize("per_dimension", [False, True])
def test_quadratic_limit(scaling, norm, variance, per_dimension):
    module, loss, batch, hessian = regression()
    w = module.weight.detach().flatten()
    unit = {"standard": torch.ones_like(w), "elementwise": w.abs(), "filterwise": w.norm().expand(9)}[scaling]
    truth = 0.5 * 0.3**2 * variance * float((unit**2 * hessian.diagonal()).sum()) / (9 if per_dimension else 1)
    found = average_case_sharpness(
        module, loss, [batch], radius=0.3, scaling=scaling, norm=norm, per_dimension=per_dimension, num_pairs=300
    )
    assert abs(found.value - truth) < 3.5 * found.standard_error
    assert found.standard_error < 0.07 * truth


def test_standard_error_covers_the_truth():
    module, loss, batch, hessian = regression()
    truth = 0.5 * float(hessian.trace())
    draws = [
        average_case_sharpness(module, loss, [batch], radius=1.0, scaling="standard", num_pairs=10, seed=seed)
        for seed in range(100)
    ]
    within = sum(abs(found.value - truth) < 2.26 * found.standard_error for found in draws) / len(draws)
    assert 0.87 <= within <= 0.99  # Student's t with 9 degrees of freedom: 95 %


@pytest.mark.parametrize("num_pairs", [2, 3])
def test_one_standard_error_of_few_pairs_holds_the_truth_in_two_of_three(num_pairs):
    module = nn.Linear(60, 1, bias=False).double()  # sums of 60 squares: nearly normal
    truth = 0.5
    found = [
        average_case_sharpness(
            module,
            lambda m, x: 0.5 * m(x).square().sum(),
            [torch.eye(60, dtype=torch.float64)],
            scaling="standard",
            radius=1.0,
            per_dimension=True,
            num_pairs=num_pairs,
            seed=100 * seed,
        )
        for seed in range(400)
    ]
    within = sum(abs(estimate.value - truth) < estimate.standard_error for estimate in found) / len(found)
    assert within == pytest.approx(0.683, abs=0.07)  # three standard deviations of 400 draws; 0.5 and 0.58 unwidened


def test_pairs_by_explicit_loop(smooth_case):
    module, loss, batch = smooth_case
    w = parameters_to_vector(module.parameters()).detach().clone()
    base = float(loss(module, batch).detach())
    generator = torch.Generator().manual_seed(6)  # seed 5, second measurement
    rises = torch.zeros(3, 2, dtype=torch.float64)
    for row in rises:
        z = torch.randn(len(w), generator=generator, dtype=torch.float64)
        for index, radius in enumerate((0.1, 0.2)):
            row[index] = -base
            for sign in (1, -1):
                vector_to_parameters(w + sign * radius * w.abs() * z, module.parameters())
                row[index] += loss(module, batch).detach() / 2
    vector_to_parameters(w, module.parameters())
    probe = AverageCaseSharpnessProbe([batch], radii=[0.1, 0.2], num_pairs=3, seed=5)
    first = probe.measure(module, loss)
    second = probe.measure(module, loss)
    assert first["average_case_sharpness"].value != second["average_case_sharpness"].value
    for name, column in zip(["average_case_sharpness", "average_case_sharpness/rho_0.2"], rises.T, strict=True):
        assert second[name].value == pytest.approx(float(column.mean()), rel=1e-9)
        widened = student(2) * float(column.std()) / math.sqrt(3)
        assert second[name].standard_error == pytest.approx(widened, rel=1e-9)
    assert second["average_case_sharpness"].price_gradients == pytest.approx(probe.price_gradients)
    assert torch.equal(parameters_to_vector(module.parameters()), w)


def test_one_dimensional_parameters_left_out(smooth_case):
    module, loss, batch = smooth_case
    without = average_case_sharpness(module, loss, [batch], one_dimensional=False, per_dimension=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("bias" not in name)
    alone = average_case_sharpness(module, loss, [batch], per_dimension=True)
    both = math.hypot(without.standard_error, alone.standard_error)
    assert abs(without.value - alone.value) < 4 * both
    assert without.value > 0


def test_normalised_logits_need_logits(smooth_case):
    module, loss, batch = smooth_case
    squared = OutputLoss(lambda o, t: 0.5 * (o - t).square(), likelihood="gaussian")
    with pytest.raises(UserError, match="per_target and likelihood for normalised logits"):
        average_case_sharpness(module, loss, [batch], normalise_logits=True)
    with pytest.raises(UserError, match="categorical likelihood for normalised logits, got gaussian"):
        average_case_sharpness(module, squared, [batch], normalise_logits=True)


def test_allowance_cuts_the_pairs(smooth_case):
    module, loss, batch = smooth_case
    probe = AverageCaseSharpnessProbe([batch], num_pairs=30)
    assert probe.price_gradients == pytest.approx(61 / 3)
    probe.measure(module, loss)
    for allowance, pairs in [(5, 7), (0, 2), (math.inf, 30)]:
        found = probe.measure(module, loss, Host(allowance_gradients=allowance))[probe.name]
        assert found.price_gradients == pytest.approx((1 + 2 * pairs) / 3)
        assert found.converged == (pairs == 30)


def test_a_single_pair_has_no_error():
    with pytest.raises(UserError, match="num_pairs must be at least 2, got 1"):
        AverageCaseSharpnessProbe([None], num_pairs=1)
