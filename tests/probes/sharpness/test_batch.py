from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from landscape_ray.errors import UserError
from landscape_ray.probes.fixed_loss import FixedLoss
from landscape_ray.probes.sharpness.batch import BatchSharpnessProbe, batch_sharpness


def split(batch, *sizes):
    """Return minibatches of a batch (inputs, targets), weighted by their sizes."""
    inputs, targets = (part.split(list(sizes)) for part in batch)
    return [((x, y), len(x)) for x, y in zip(inputs, targets, strict=True)]


def dense_parts(case, dense_hessian, batches):
    """Return share, g'Hg and g'g of each minibatch, with the Hessian written out."""
    rows = []
    for batch, weight in batches:
        hessian = dense_hessian(case._replace(batch=batch))
        _, gradient = FixedLoss(case.module, case.loss, [batch]).gradient()
        rows.append((weight, float(gradient @ hessian @ gradient), float(gradient @ gradient)))
    return torch.tensor(rows, dtype=torch.float64).unbind(1)


@pytest.mark.acceptance
@pytest.mark.parametrize("route", ["exact", "finite_difference"])
def test_equals_dense_hessians_of_minibatches(smooth_case, dense_hessian, route):
    batches = split(smooth_case.batch, 16, 16, 16, 12, 4)
    shares, curvatures, squares = dense_parts(smooth_case, dense_hessian, batches)
    found = batch_sharpness(smooth_case.module, smooth_case.loss, batches, route=route)
    other = batch_sharpness(smooth_case.module, smooth_case.loss, batches, route=route, of_ratios=True)
    rel = 1e-10 if route == "exact" else 1e-5
    assert found.value == pytest.approx(float(shares @ curvatures / (shares @ squares)), rel=rel)
    assert other.value == pytest.approx(float(shares @ (curvatures / squares) / shares.sum()), rel=rel)
    leave_one = torch.stack(
        [
            (shares @ curvatures - shares[i] * curvatures[i]) / (shares @ squares - shares[i] * squares[i])
            for i in range(5)
        ]
    )
    jackknife = float((4 / 5 * (leave_one - leave_one.mean()).square().sum()).sqrt())
    assert found.standard_error == pytest.approx(jackknife, rel=1e-4)
    assert found.converged
    assert found.route == route


def test_error_of_the_mean_of_ratios_is_the_usual_one(smooth_case, dense_hessian):
    batches = split(smooth_case.batch, 16, 16, 16, 16)
    _, curvatures, squares = dense_parts(smooth_case, dense_hessian, batches)
    found = batch_sharpness(smooth_case.module, smooth_case.loss, batches, of_ratios=True)
    assert found.standard_error == pytest.approx(float((curvatures / squares).std() / 2), rel=1e-9)


def test_networks_of_all_kinds(case, dense_hessian):
    half = len(case.batch[0]) // 2
    batches = split(case.batch, half, len(case.batch[0]) - half)
    shares, curvatures, squares = dense_parts(case, dense_hessian, batches)
    found = batch_sharpness(case.module, case.loss, batches)
    assert found.value == pytest.approx(float(shares @ curvatures / (shares @ squares)), rel=1e-9)


def test_linear_regression_in_closed_form():
    """0.5 (w'x)^2, one example each: E[|x|^2 (w'x)^2 |x|^2] / E[(w'x)^2 |x|^2], and E|x|^2 for the mean of ratios."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    module = nn.Linear(3, 1, bias=False).double()
    nn.init.ones_(module.weight)
    batches = [(row, 1) for row in rows]
    lengths, errors = rows.square().sum(1), rows.sum(1).square()
    arguments = module, lambda m, x: 0.5 * m(x).square().mean(), batches
    expected = float((lengths**2 * errors).sum() / (lengths * errors).sum())
    assert batch_sharpness(*arguments).value == pytest.approx(expected, rel=1e-12)
    assert batch_sharpness(*arguments, of_ratios=True).value == pytest.approx(float(lengths.mean()), rel=1e-12)


def test_jackknife_covers_the_truth():
    """60 sets of 20 minibatches: 2.09 errors hold the truth in 92 percent (3,000 sets), skewness takes 3 of the 95."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.rand(1200, 4, 3, generator=generator, dtype=torch.float64) + 0.3
    module = nn.Linear(3, 1, bias=False).double()
    nn.init.ones_(module.weight)
    gradients = torch.einsum("bi,bij->bj", rows.sum(2), rows) / 4
    curvatures = torch.einsum("bij,bj->bi", rows, gradients).square().mean(1)
    truth = float(curvatures.mean() / gradients.square().sum(1).mean())
    inside = 0
    for part in rows.split(20):
        found = batch_sharpness(module, lambda m, x: 0.5 * m(x).square().mean(), [(x, 4) for x in part])
        inside += abs(found.value - truth) <= 2.09 * found.standard_error
    assert inside >= 60 * 0.92 - 2.5 * math.sqrt(60 * 0.92 * 0.08)


def test_linear_model_has_no_curvature():
    module = nn.Linear(2, 1).double()
    found = batch_sharpness(module, lambda m, x: m(x).mean(), [(torch.ones(2).double() * k, 1) for k in (1, 2)])
    assert (found.value, found.standard_error) == (0.0, 0.0)


class Hinge(nn.Module):
    """ReLU of another make: its kinks are not held."""

    def forward(self, x):
        return torch.where(x > 0, x, 0.0)


@pytest.mark.parametrize("activation", [Hinge, nn.ReLU])
def test_kinks_are_held_or_show_in_the_check_of_finite_differences(activation):
    generator = torch.Generator().manual_seed(4)
    module = nn.Sequential(nn.Linear(4, 64), activation(), nn.Linear(64, 1))
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
        module[0].bias.zero_()
    inputs = 1e-4 * torch.randn(8, 4, generator=generator)  # pre-activations so small that any step crosses them
    batches = split((inputs, torch.zeros(8)), 4, 4)
    arguments = module, lambda m, b: 0.5 * (m(b[0]) - 300 * b[0].sum(1, keepdim=True) - 1).square().mean(), batches
    exact = batch_sharpness(*arguments)
    found = batch_sharpness(*arguments, route="finite_difference")
    assert found.converged == (activation is nn.ReLU)
    assert abs(found.value - exact.value) <= (3 * found.standard_error if activation is Hinge else 0.01 * exact.value)


@pytest.mark.parametrize("route", ["exact", "finite_difference"])
def test_price(smooth_case, route):
    batches = split(smooth_case.batch, 16, 16, 16, 16)
    probe = BatchSharpnessProbe(batches, route=route)
    found = probe.measure(smooth_case.module, smooth_case.loss)
    assert list(found) == ["batch_sharpness", "batch_sharpness/of_ratios"]
    expected = 3.5 if route == "exact" else 2 + 3.5 / 4
    assert probe.price_gradients == expected
    assert found["batch_sharpness"].price_gradients == pytest.approx(expected + 2 / 3)
    assert math.isfinite(found["batch_sharpness/of_ratios"].standard_error)


def test_flat_minibatches_are_unknown(smooth_case):
    module = nn.Linear(2, 1, bias=False)
    found = BatchSharpnessProbe([(torch.zeros(2), 1), (torch.zeros(2), 1)], route="finite_difference").measure(
        module, lambda m, x: m(x).square().mean()
    )
    assert all(math.isnan(estimate.value) for estimate in found.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"route": "parabola"}, "route must be one of exact, finite_difference"), ({"tol": -1.0}, "tol must be positive")],
)
def test_refuses_settings(arguments, message):
    with pytest.raises(UserError, match=message):
        BatchSharpnessProbe([None], **arguments)


def test_refuses_a_single_minibatch(smooth_case):
    with pytest.raises(UserError, match="batches must hold at least 2 minibatches"):
        batch_sharpness(smooth_case.module, smooth_case.loss, [(smooth_case.batch, 64)])
