"""Tracking is cheap, and stays honest: differences are checked by exact products at cold starts only."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from landscape_ray.probes.fixed_loss import FixedLoss
from landscape_ray.probes.operators import HessianOperator
from landscape_ray.probes.sharpness.top import SharpnessProbe, sharpness


def cross_entropy(module, batch):
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


class Hinge(nn.Module):
    """ReLU of another make: its kinks are not held."""

    def forward(self, x):
        return torch.where(x > 0, x, 0.0)


def network(activation, seed=0, num_examples=128):
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(nn.Linear(16, 48), activation(), nn.Linear(48, 48), activation(), nn.Linear(48, 5))
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1]))
    inputs = torch.randn(num_examples, 16, generator=generator)
    return module, (inputs, (inputs @ torch.randn(16, 5, generator=generator)).argmax(1))


def trained(module, batch, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(module, batch).backward()
        optimizer.step()


@pytest.mark.acceptance
@pytest.mark.parametrize(("activation", "seed"), [(nn.GELU, 0), (nn.GELU, 1), (nn.ReLU, 1), (nn.ReLU, 2)])
def test_tracking_by_differences_is_honest_and_costs_a_gradient_a_product(activation, seed):
    module, batch = network(activation, seed)
    probe = SharpnessProbe([batch], route="auto", cold_every=5, seed=seed)
    exact = SharpnessProbe([batch], cold_every=5, seed=seed)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    spent = {"auto": 0.0, "exact": 0.0}
    for index in range(9):
        found, peer = (p.measure(module, cross_entropy)["sharpness"] for p in (probe, exact))
        reference = sharpness(module, cross_entropy, [batch], tol=1e-4, max_matvecs=100).value
        assert (found.route, found.converged) == ("finite_difference", True)
        assert abs(found.value - reference) <= found.standard_error <= 0.03 * found.value
        if index % 5:
            # the gradient at the weights, and one for each product; the very first measurement checks the loss, too
            assert found.price_gradients == pytest.approx(1 + found.num_matvecs)
        spent["auto"] += found.price_gradients
        spent["exact"] += peer.price_gradients
        trained(module, batch, optimizer, 10)
    assert spent["auto"] < 0.75 * spent["exact"]


def test_error_bar_between_checks_holds_the_error_of_the_differences():
    module, batch = network(nn.GELU)
    probe = SharpnessProbe([batch], route="auto")
    probe.measure(module, cross_entropy)
    plain = probe.measure(module, cross_entropy)["sharpness"]
    probe.load_state_dict({**probe.state_dict(), "difference_error": 0.02})
    wider = probe.measure(module, cross_entropy)["sharpness"]
    assert wider.route == plain.route == "finite_difference"
    assert 0.02 * wider.value <= wider.standard_error <= 0.03 * wider.value
    v = plain.vector
    Hv = HessianOperator(FixedLoss(module, cross_entropy, [batch]))(v)
    assert float((Hv - plain.value * v).norm()) <= 1.5 * plain.standard_error


def test_differences_with_too_large_a_known_error_give_way_to_exact_products():
    module, batch = network(nn.GELU)
    probe = SharpnessProbe([batch], route="auto")
    probe.measure(module, cross_entropy)
    probe.load_state_dict({**probe.state_dict(), "difference_error": 0.05})
    estimate = probe.measure(module, cross_entropy)["sharpness"]
    assert (estimate.route, estimate.converged) == ("exact", True)
    assert probe.measure(module, cross_entropy)["sharpness"].route == "exact"


@pytest.mark.parametrize("num_examples", [128, 1024])
@pytest.mark.parametrize("seed", range(8))
def test_kinks_are_noticed_without_a_check_where_they_matter(seed, num_examples):
    # Trust earned on a smooth network is put to the test by one with kinks, of the same weights. With few examples the
    # steps of some cross no kink: what differences found there is right.
    smooth, batch = network(nn.GELU, seed, num_examples)
    probe = SharpnessProbe([batch], route="auto")
    assert probe.measure(smooth, cross_entropy)["sharpness"].route == "finite_difference"
    kinked, _ = network(Hinge, seed, num_examples)
    estimate = probe.measure(kinked, cross_entropy)["sharpness"]
    v = estimate.vector
    Hv = HessianOperator(FixedLoss(kinked, cross_entropy, [batch]))(v)
    assert estimate.converged
    assert float(v @ Hv) == pytest.approx(estimate.value, rel=0.003)
    if num_examples == 1024:
        assert estimate.route == "exact"


def test_a_warm_start_remembers_two_eigenvectors():
    module, batch = network(nn.GELU)
    probe = SharpnessProbe([batch], cold_every=100)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    vectors = []
    for _ in range(3):
        vectors.append(probe.measure(module, cross_entropy)["sharpness"].vector)
        trained(module, batch, optimizer, 10)
    state = probe.state_dict()
    assert torch.equal(state["vector"], vectors[-1])
    assert torch.equal(state["earlier_vector"], vectors[-2])
    start = probe._start()
    agree = math.copysign(0.5, float(vectors[-1] @ vectors[-2]))
    assert torch.equal(start, vectors[-1] + agree * vectors[-2])
    again = SharpnessProbe([batch], cold_every=100)
    again.load_state_dict(state)
    found, wanted = (p.measure(module, cross_entropy)["sharpness"] for p in (again, probe))
    assert (found.value, found.num_matvecs) == (wanted.value, wanted.num_matvecs)


def test_extrapolation_takes_a_loose_residual_closer_to_the_truth_and_stays_within_it():
    module, batch = network(nn.GELU)
    settings = {"route": "auto", "tol": 0.2, "seed": 0}
    plain, beyond = SharpnessProbe([batch], **settings), SharpnessProbe([batch], **settings, extrapolate=True)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    errors = {"plain": 0.0, "beyond": 0.0}
    for _ in range(8):
        reference = sharpness(module, cross_entropy, [batch], tol=1e-4, max_matvecs=100).value
        rough, better = (p.measure(module, cross_entropy)["sharpness"] for p in (plain, beyond))
        assert (rough.num_matvecs, rough.standard_error) == (better.num_matvecs, better.standard_error)
        assert rough.value <= better.value <= rough.value + rough.standard_error
        errors["plain"] += abs(rough.value - reference)
        errors["beyond"] += abs(better.value - reference)
        trained(module, batch, optimizer, 10)
    assert errors["beyond"] < 0.85 * errors["plain"]
