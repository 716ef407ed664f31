"""Differences of the gradients of networks with kinks are those of the piece that the weights are on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from landscape_ray.probes.fixed_loss import FixedLoss
from landscape_ray.probes.operators import FiniteDifferenceHessian, HessianOperator, kinks
from landscape_ray.probes.operators.kinks import HeldLoss, Kinks


def cross_entropy(module, batch):
    return functional.cross_entropy(module(batch[0]), batch[1])


class Call(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def convolutional(activation, seed=0, dtype=torch.float32):
    """Return a network whose units are all close to their kinks, and a batch."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        activation(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 2),
        activation(),
        nn.Flatten(),
        nn.Linear(32, 3),
    )
    with torch.no_grad():
        for p in module.parameters():
            fan_in = max(p[0].numel(), 4)
            p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(fan_in))
    images = torch.randn(64, 1, 8, 8, generator=generator)
    return module.to(dtype), (images.to(dtype), torch.randint(3, (64,), generator=generator))


def difference(module, batch, *, eps=None, seed=0):
    """Return how far a product by differences is from the exact one, relative."""
    function = FixedLoss(module, cross_entropy, [batch])
    v = torch.randn(function.size, generator=torch.Generator().manual_seed(seed), dtype=function.dtype)
    exact = HessianOperator(function)(v)
    return float((FiniteDifferenceHessian(function, eps=eps)(v) - exact).norm() / exact.norm())


def hinge(x):
    """ReLU of another make."""
    return torch.where(x > 0, x, 0.0)


PIECEWISE = {
    "nn.ReLU": nn.ReLU,
    "in place": lambda: nn.ReLU(inplace=True),
    "relu_": lambda: Call(lambda x: torch.relu_(x * 1.0)),
    "method": lambda: Call(lambda x: x.relu()),
    "nn.LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "leaky in place": lambda: nn.LeakyReLU(0.2, inplace=True),
    "nn.ReLU6": nn.ReLU6,
    "nn.Hardtanh": lambda: nn.Hardtanh(-0.5, 0.5),
    "abs": lambda: Call(torch.abs),
    "clamp": lambda: Call(lambda x: x.clamp(min=-0.1)),
}


@pytest.mark.acceptance
@pytest.mark.parametrize("activation", PIECEWISE.values(), ids=PIECEWISE)
def test_products_of_networks_with_kinks_are_those_of_second_derivatives(activation):
    module, batch = convolutional(activation)
    step = 0.02  # over which hundreds of units change their side
    assert difference(module, batch, eps=step) < 0.02
    assert difference(module.double(), (batch[0].double(), batch[1])) < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_kinks_of_another_make_are_seen(seed):
    module, batch = convolutional(lambda: Call(hinge), seed)
    same, _ = convolutional(nn.ReLU, seed)
    assert difference(module, batch, eps=0.02) > 5 * difference(same, batch, eps=0.02)


def test_the_function_at_the_weights_is_the_same_to_the_bit():
    module, batch = convolutional(nn.ReLU)
    function = FixedLoss(module, cross_entropy, [batch])
    held = HeldLoss(function)
    value, gradient = held.gradient()
    expected, wanted = function.gradient()
    assert value == expected == held.value()
    assert torch.equal(gradient, wanted)
    still, same = held.gradient_at(torch.zeros(function.size))
    assert still == pytest.approx(value, rel=1e-6)
    torch.testing.assert_close(same, wanted)
    assert held.value_at(torch.zeros(function.size)) == pytest.approx(value, rel=1e-6)


def test_a_piece_is_a_polynomial():
    # Two linear layers and squares: along a line, of degree four on each piece. Held, its fifth difference is zero.
    generator = torch.Generator().manual_seed(3)
    module = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1)).double()
    batch = torch.randn(20, 4, generator=generator).double()
    function = FixedLoss(module, lambda m, x: m(x).square().mean(), [batch])
    direction = torch.randn(function.size, generator=generator).double()
    held = HeldLoss(function)
    held.value()
    for values_at, kept in ((held.value_at, True), (function.value_at, False)):
        values = [values_at(t * direction) for t in range(6)]
        fifth = sum((-1) ** k * math.comb(5, k) * value for k, value in enumerate(values))
        assert (abs(fifth) < 1e-9 * max(values)) == kept


def test_several_micro_batches_have_their_own_pieces():
    module, (images, targets) = convolutional(nn.ReLU)
    function = FixedLoss(module, cross_entropy, [((images[:40], targets[:40]), 40), ((images[40:], targets[40:]), 24)])
    v = torch.randn(function.size, generator=torch.Generator().manual_seed(1))
    exact = HessianOperator(function)(v)
    assert float((FiniteDifferenceHessian(function, eps=0.02)(v) - exact).norm() / exact.norm()) < 0.02


def test_kinks_in_the_loss_count_too():
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    inputs, signs = torch.randn(200, 4, generator=generator), torch.randint(2, (200, 1), generator=generator) * 2.0 - 1
    function = FixedLoss(module, lambda m, _: functional.relu(1 - signs * m(inputs)).mean(), [None])
    v = torch.randn(function.size, generator=generator)
    exact = HessianOperator(function)(v)
    assert float((FiniteDifferenceHessian(function)(v) - exact).norm() / exact.norm()) < 0.02


def test_smooth_networks_are_left_alone():
    module, batch = convolutional(nn.Tanh)
    module[2] = nn.AvgPool2d(2)
    noted = Kinks()
    with noted.taken_down(module):
        module(batch[0])
    assert not noted.there
    with noted.held():  # nothing watches the calls
        assert torch.overrides._get_current_function_mode_stack() == []


def test_what_has_no_room_is_left_as_it_is(monkeypatch):
    module, batch = convolutional(nn.ReLU)
    monkeypatch.setattr(kinks, "MOST_BYTES", 1000)
    noted = Kinks()
    with noted.taken_down(module):
        module(batch[0])
    assert not noted.there
    assert difference(module, batch, eps=0.02) > 0.02


def test_calls_in_another_order_are_not_held():
    first, second = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    noted = Kinks()
    with noted.taken_down(nn.Identity()):
        torch.relu(first)
        functional.max_pool1d(second, 3)
    with noted.held():
        assert torch.equal(torch.relu(second), second.clamp(min=0))  # another shape
        assert torch.equal(torch.relu(second), second.clamp(min=0))  # another function
        assert torch.equal(torch.relu(first), first.clamp(min=0))  # one call more
        assert torch.equal(torch.clamp(first, min=torch.zeros(3)), first.clamp(min=0))  # bounds that are tensors


class Checkpointed(nn.Module):
    """Keeps no activations of its hidden layer."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(64, 8), nn.Linear(8, 3)

    def forward(self, x):
        def inner(x):
            return functional.relu(self.hidden(x))

        return self.head(checkpoint(inner, x.flatten(1), use_reentrant=False))


def test_parts_that_checkpointing_computes_anew_are_not_held():
    module, batch = Checkpointed(), convolutional(nn.ReLU)[1]
    function = FixedLoss(module, cross_entropy, [batch])
    held = HeldLoss(function)
    held.gradient()
    assert not held.kinks.there
    displacement = 0.1 * torch.randn(function.size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(held.gradient_at(displacement)[1], function.gradient_at(displacement)[1])


def test_compiled_modules_are_not_held():
    module, batch = convolutional(nn.ReLU)
    noted = Kinks()
    itself, _ = convolutional(nn.ReLU)
    itself.compile(backend="eager")
    outside = torch.compile(module, backend="eager")
    for compiled in (outside, nn.Sequential(outside), itself):
        with noted.taken_down(compiled):
            module(batch[0])
        assert not noted.there
