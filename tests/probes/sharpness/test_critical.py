from __future__ import annotations

import io
import math

import pytest
import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.probes import Host
from landscape_ray.probes.sharpness.critical import CriticalSharpnessProbe, critical_sharpness
from landscape_ray.probes.sharpness.top import sharpness


class Counted:
    """A loss of one weight, and how often it was asked for."""

    def __init__(self, function):
        self.function, self.num_calls = function, 0

    def __call__(self, module: nn.Module, batch: object) -> Tensor:
        self.num_calls += 1
        return self.function(module[0].squeeze())


def weight(value, dtype=torch.float64):
    return nn.ParameterList([nn.Parameter(torch.tensor([value], dtype=dtype))])


def descent(function, start, lr):
    """Return the weight after a step of gradient descent, the loss, and the update."""
    before = torch.tensor([start], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(before).sum(), before)
    return weight(start - lr * float(gradient)), Counted(function), -lr * gradient


@pytest.mark.acceptance
@pytest.mark.parametrize("curvature", [0.003, 1.0, 19.0, 21.0, 700.0])
def test_quadratic_is_its_curvature_whatever_the_step(curvature):
    module, loss, update = descent(lambda w: 0.5 * curvature * w**2, 2.0, lr=0.1)
    found = critical_sharpness(module, loss, [None], update, lr=0.1)
    assert found.converged
    assert abs(found.value - curvature) <= found.standard_error <= 0.06 * curvature
    assert loss.num_calls <= 10  # two of them check that the loss is deterministic
    assert found.price_gradients == pytest.approx(loss.num_calls / 3)


def test_gradient_descent_at_the_edge_has_the_multiple_one():
    probe = CriticalSharpnessProbe([None], tol=1e-3)
    module, loss, update = descent(lambda w: 0.5 * 20.0 * w**2, 2.0, lr=0.1)
    found = probe.measure(module, loss, Host(update=[update], lr=0.1))
    assert found["critical_sharpness/multiple"].value == pytest.approx(1.0, rel=1e-3)
    assert found["critical_sharpness"].value == pytest.approx(20.0, rel=1e-3)


@pytest.mark.acceptance
def test_full_batch_gradient_is_below_the_sharpness_and_equals_the_rayleigh_quotient(smooth_case):
    """The squared error of the last layer alone is a quadratic: eta_c = 2 g'g / g'Hg."""
    module, (inputs, _) = smooth_case.module, smooth_case.batch
    parameters = list(module.parameters())

    def quadratic(module, batch):
        return 0.5 * (module(batch) - 1.0).square().mean()

    last = module[-1]
    for p in parameters:
        p.requires_grad_(any(p is q for q in last.parameters()))
    top = sharpness(module, quadratic, [inputs], tol=1e-8, max_matvecs=50).value
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(quadratic(module, inputs), list(last.parameters()))])
    update = -0.3 * gradient
    with torch.no_grad():
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(last.parameters()) + update, last.parameters())
    found = critical_sharpness(module, quadratic, [inputs], update, lr=0.3, tol=1e-4)
    features = torch.cat([module[:-1](inputs), torch.ones(len(inputs), 1, dtype=inputs.dtype)], 1)
    slope = torch.cat([gradient[:12].view(3, 4), gradient[12:, None]], 1)
    expected = float((features @ slope.T).square().mean() / slope.square().sum())
    assert found.value == pytest.approx(expected, rel=1e-3)
    assert found.value <= top * (1 + 1e-3)


@pytest.mark.parametrize("tol", [0.3, 0.1, 0.01])
@pytest.mark.parametrize(
    "function",
    [
        lambda w: torch.cosh(3 * w),
        lambda w: w**4,
        lambda w: (w**2 - 0.25) ** 2,
        lambda w: torch.where(w > -0.5, 0.5 * w**2, torch.full_like(w, math.nan)),
        lambda w: w.abs(),
        lambda w: torch.nn.functional.softplus(-20 * w) + w,
    ],
    ids=["cosh", "quartic", "double well", "cliff", "kink", "wall"],
)
def test_bracket_holds_a_crossing(function, tol):
    start, update = 0.8, -0.01
    module = weight(start + update)
    probe = CriticalSharpnessProbe([None], tol=tol, max_forwards=60)
    loss = Counted(function)
    found = probe.measure(module, loss, Host(update=[torch.tensor([update])], lr=1.0))
    multiple = found["critical_sharpness/multiple"]
    low, high = multiple.value - 2 * multiple.standard_error, multiple.value + 2 * multiple.standard_error

    def rise(a):
        return float(function(torch.tensor(start + a * update, dtype=torch.float64))) - float(
            function(torch.tensor(start, dtype=torch.float64))
        )

    assert multiple.converged
    assert rise(low) <= 0
    assert not rise(high) <= 0
    assert found["critical_sharpness"].value == pytest.approx(2 / multiple.value)
    assert loss.num_calls <= 26


def test_uphill_and_downhill_throughout_are_unknown():
    for slope in (1.0, -1.0):
        found = critical_sharpness(weight(0.0), Counted(lambda w, s=slope: s * w), [None], torch.ones(1), lr=0.1)
        assert math.isnan(found.value)
        assert not found.converged


def test_rounding_is_in_the_error():
    """float32, offset 1: the loss changes by 1e-6 on the way, some ten roundings."""
    module = weight(2e-3 * 0.9, torch.float32)
    loss = Counted(lambda w: 1.0 + 0.5 * w**2)
    found = critical_sharpness(module, loss, [None], torch.tensor([-2e-4]), lr=0.1, tol=0.01)
    assert abs(found.value - 1.0) <= found.standard_error
    assert found.standard_error > 0.01
    assert not found.converged


def test_allowance_cuts_the_search_short():
    module, loss, update = descent(lambda w: 0.5 * w**2, 2.0, lr=0.1)
    probe = CriticalSharpnessProbe([None], tol=1e-6)
    found = probe.measure(module, loss, Host(update=[update], lr=0.1, allowance_gradients=2.7))["critical_sharpness"]
    assert loss.num_calls == 2 + 6
    assert not found.converged
    assert abs(found.value - 1.0) <= found.standard_error


def test_next_search_starts_where_the_last_ended():
    module, loss, update = descent(lambda w: 0.5 * 0.01 * w**2, 2.0, lr=0.1)
    probe = CriticalSharpnessProbe([None])
    host = Host(update=[update], lr=0.1)
    first = probe.measure(module, loss, host)["critical_sharpness"]
    file = io.BytesIO()
    torch.save(probe.state_dict(), file)
    file.seek(0)
    other = CriticalSharpnessProbe([None])
    other.load_state_dict(torch.load(file, weights_only=True))
    second, resumed = (p.measure(module, loss, host)["critical_sharpness"] for p in (probe, other))
    assert second.price_gradients <= 4 / 3
    assert second.price_gradients < first.price_gradients
    assert resumed.value == second.value


def test_probe_without_update_or_learning_rate():
    module, loss, update = descent(lambda w: 0.5 * w**2, 2.0, lr=0.1)
    probe = CriticalSharpnessProbe([None])
    for host in (Host(lr=0.1), Host(update=[update]), Host(update=[update], lr=0.0), Host(update=[0 * update], lr=0.1)):
        found = probe.measure(module, loss, host)
        assert list(found) == ["critical_sharpness"]
        assert math.isnan(found["critical_sharpness"].value)
    assert probe.needs == {"update"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"tol": 0.0}, "tol must be positive"), ({"max_forwards": 3}, "max_forwards must be at least 4")],
)
def test_refuses(arguments, message):
    with pytest.raises(UserError, match=message):
        critical_sharpness(weight(1.0), Counted(lambda w: w), [None], torch.ones(1), lr=0.1, **arguments)
