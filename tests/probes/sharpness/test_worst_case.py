from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from landscape_ray.errors import UserError
from landscape_ray.probes import Host
from landscape_ray.probes.fixed_loss import observing
from landscape_ray.probes.losses import OutputLoss
from landscape_ray.probes.sharpness.ascent import Ascent
from landscape_ray.probes.sharpness.perturbation import ball_around
from landscape_ray.probes.sharpness.sam import SamSharpnessProbe, sam_sharpness
from landscape_ray.probes.sharpness.worst_case import WorstCaseSharpnessProbe, worst_case_sharpness

CROSS_ENTROPY = OutputLoss(nn.CrossEntropyLoss(reduction="none"), likelihood="categorical")


def quadratic(hessian, weights, gradient=None):
    """A module with these weights, and a loss whose Hessian and gradient at them are these."""
    module = nn.ParameterList([nn.Parameter(torch.tensor(weights, dtype=torch.float64).view(1, -1))])
    centre = module[0].detach().clone()
    slope = torch.zeros_like(centre) if gradient is None else gradient.view(1, -1)

    def loss(m, batch):
        d = m[0] - centre
        return (0.5 * d @ hessian @ d.T + slope @ d.T).squeeze()

    return module, loss


def random_hessian(size, seed, negative=0):
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    eigenvalues = torch.linspace(0.5, 5, size, dtype=torch.float64)
    eigenvalues[:negative] *= -1
    return basis @ torch.diag(eigenvalues) @ basis.T


def regression(seed=5):
    """Linear regression at its minimum: the Hessian is X'X/n."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30, 6, generator=generator, dtype=torch.float64) * torch.linspace(0.3, 2, 6, dtype=torch.float64)
    y = torch.randn(30, 1, generator=generator, dtype=torch.float64)
    module = nn.Linear(6, 1, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    return module, lambda m, b: 0.5 * (m(b[0]) - b[1]).square().mean(), (x, y), x.T @ x / 30


def trust_region(hessian, gradient, radius):
    """max g'd + d'Hd/2 on the ball, from the eigenvalues: d = (mu - H)^-1 g on the boundary, by bisection in mu."""
    eigenvalues, basis = torch.linalg.eigh(hessian)
    g = basis.T @ gradient
    low, high = float(eigenvalues[-1]) + 1e-12, float(eigenvalues[-1]) + float(g.norm()) / radius + 1
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if float((g / (mu - eigenvalues)).norm()) > radius else (low, mu)
    d = g / (low - eigenvalues)
    return float(g @ d + 0.5 * d @ (eigenvalues * d))


# SAM: one step


@pytest.mark.acceptance
@pytest.mark.parametrize(("scaling", "eta"), [("standard", 0.0), ("elementwise", 0.0), ("elementwise", 0.3)])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_one_step_by_hand(smooth_case, scaling, norm, eta):
    module, loss, batch = smooth_case
    w = parameters_to_vector(module.parameters()).detach().clone()
    before = loss(module, batch)
    g = parameters_to_vector(torch.autograd.grad(before, list(module.parameters())))
    unit = torch.ones_like(w) if scaling == "standard" else w.abs() + eta
    z = 0.1 * ((unit * g).sign() if norm == "linf" else unit * g / (unit * g).norm())
    d = unit * z
    if norm == "l2":  # the norm of the perturbation, as Foret and Kwon define it
        assert float((d / unit).norm()) == pytest.approx(0.1)
    vector_to_parameters(w + d, module.parameters())
    after = float(loss(module, batch).detach())
    vector_to_parameters(w, module.parameters())
    found = sam_sharpness(module, loss, [batch], radius=0.1, scaling=scaling, norm=norm, eta=eta)
    assert found.value == pytest.approx(after - float(before.detach()), rel=1e-9)
    assert (found.standard_error, found.price_gradients) == (0.0, pytest.approx(1 + 1 / 3 + 2 / 3))
    assert torch.equal(parameters_to_vector(module.parameters()), w)


def test_one_step_on_a_quadratic():
    hessian, g = random_hessian(5, 0), torch.linspace(-1, 2, 5, dtype=torch.float64)
    module, loss = quadratic(hessian, [1.0] * 5, g)
    found = sam_sharpness(module, loss, [None], radius=0.2)
    curvature = float(g @ hessian @ g) / float(g @ g)
    assert found.value == pytest.approx(0.2 * float(g.norm()) + 0.02 * curvature)


def test_one_step_at_a_critical_point_is_zero():
    module, loss = quadratic(torch.eye(3, dtype=torch.float64), [1.0, 2.0, 3.0])
    assert sam_sharpness(module, loss, [None]).value == 0.0


@pytest.mark.parametrize("m", [7, 20, 100])
def test_m_sharpness_by_explicit_loop(smooth_case, m):
    module, _, (inputs, targets) = smooth_case
    w = parameters_to_vector(module.parameters()).detach().clone()
    total = 0.0
    for first in range(0, len(inputs), m):
        part = (inputs[first : first + m], targets[first : first + m])
        vector_to_parameters(w, module.parameters())
        before = CROSS_ENTROPY(module, part)
        g = parameters_to_vector(torch.autograd.grad(before, list(module.parameters())))
        vector_to_parameters(w + 0.3 * g / g.norm(), module.parameters())
        total += float((CROSS_ENTROPY(module, part) - before).detach()) * len(part[0]) / len(inputs)
    vector_to_parameters(w, module.parameters())
    batches = [((inputs[:42], targets[:42]), 42), ((inputs[42:], targets[42:]), 22)] if m == 7 else [(inputs, targets)]
    if m == 7:  # 42 is a multiple of it: the same subsets
        assert sam_sharpness(module, CROSS_ENTROPY, batches, radius=0.3, subset_examples=0).value < total
    found = sam_sharpness(module, CROSS_ENTROPY, batches, radius=0.3, subset_examples=m)
    assert found.value == pytest.approx(total, rel=1e-9)
    assert found.price_gradients == pytest.approx(2.0)


def test_all_in_one_subset_is_plain_sam(smooth_case):
    module, _, batch = smooth_case
    plain = sam_sharpness(module, CROSS_ENTROPY, [batch]).value
    assert sam_sharpness(module, CROSS_ENTROPY, [batch], subset_examples=64).value == pytest.approx(plain, rel=1e-12)


# the worst case


@pytest.mark.acceptance
@pytest.mark.parametrize("scaling", ["standard", "elementwise", "filterwise"])
@pytest.mark.parametrize("radius", [1e-3, 0.1, 3.0])
def test_quadratic_limit_at_a_minimum(scaling, radius):
    module, loss, batch, hessian = regression()
    w = module.weight.detach().flatten()
    unit = {"standard": torch.ones_like(w), "elementwise": w.abs(), "filterwise": w.norm().expand(6)}[scaling]
    top = float(torch.linalg.eigvalsh(unit[:, None] * hessian * unit)[-1])
    found = worst_case_sharpness(module, loss, [batch], radius=radius, scaling=scaling, tol=1e-8, num_steps=200)
    assert found.value == pytest.approx(0.5 * radius**2 * top, rel=1e-6)
    assert found.converged
    assert 0 <= found.standard_error <= 1e-8 * found.value  # rises of 4e-8 are rounded to some 1e-9 of that


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("negative", [0, 2])
@pytest.mark.parametrize("radius", [0.01, 0.5, 5.0])
def test_away_from_a_minimum_it_solves_the_trust_region(seed, negative, radius):
    generator = torch.Generator().manual_seed(seed)
    hessian = random_hessian(6, seed, negative)
    gradient = torch.randn(6, generator=generator, dtype=torch.float64)
    module, loss = quadratic(hessian, [1.0] * 6, gradient)
    found = worst_case_sharpness(
        module, loss, [None], radius=radius, scaling="standard", tol=1e-9, num_steps=300, num_starts=3
    )
    assert found.value == pytest.approx(trust_region(hessian, gradient, radius), rel=1e-6)


def test_concave_maximum_inside_the_ball():
    hessian = -torch.diag(torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64))
    gradient = torch.tensor([0.5, 0.4, -0.2], dtype=torch.float64)
    module, loss = quadratic(hessian, [1.0] * 3, gradient)
    best = 0.5 * float(gradient @ torch.linalg.solve(-hessian, gradient))
    found = worst_case_sharpness(module, loss, [None], radius=2.0, scaling="standard", tol=1e-6, num_steps=200)
    assert found.value == pytest.approx(best, rel=1e-5)
    short = worst_case_sharpness(module, loss, [None], radius=2.0, scaling="standard", num_steps=3)
    assert not short.converged
    assert short.value <= best <= short.value + short.standard_error  # the promise bounds a concave loss


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spiked", [True, False])
def test_cube_against_all_its_corners(seed, spiked):
    generator = torch.Generator().manual_seed(seed)
    hessian, unit = random_hessian(8, seed), torch.rand(8, generator=generator, dtype=torch.float64) + 0.1
    gradient = 0.3 * torch.randn(8, generator=generator, dtype=torch.float64)
    if spiked:  # as in networks: one direction far above the others
        spike = torch.randn(8, generator=generator, dtype=torch.float64)
        hessian = 0.05 * hessian + 5 * spike[:, None] * spike
    module, loss = quadratic(hessian, unit.tolist(), gradient)
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8)), dtype=torch.float64) * unit * 0.7
    rises = corners @ gradient + 0.5 * ((corners @ hessian) * corners).sum(1)  # convex: the maximum is at a corner
    settings = {"radius": 0.7, "scaling": "elementwise", "norm": "linf", "tol": 1e-9}
    found = worst_case_sharpness(module, loss, [None], **settings, num_starts=10)
    assert found.converged
    assert float((rises - found.value).abs().min()) < 1e-9  # a corner
    if spiked:
        assert found.value == pytest.approx(float(rises.max()), rel=1e-9)
    else:  # a hard problem: about a hundred of the 256 corners are stationary
        assert 0.9 * float(rises.max()) < found.value < float(rises.max()) * (1 + 1e-9)
        assert found.value >= worst_case_sharpness(module, loss, [None], **settings).value


@pytest.mark.acceptance
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("radius", [0.3, 1.5])
def test_wavy_loss_against_a_grid(norm, radius):
    module = nn.ParameterList([nn.Parameter(torch.tensor([[0.4, -0.7]], dtype=torch.float64))])

    def loss(m, batch):
        a, b = m[0].squeeze(0)
        return torch.sin(2 * a + b) + 0.5 * torch.cos(3 * b - a) + 0.1 * a**2

    def rise(a, b):
        return np.sin(2 * a + b) + 0.5 * np.cos(3 * b - a) + 0.1 * a**2 - float(loss(module, None).detach())

    ticks = np.linspace(-radius, radius, 1001)
    z1, z2 = np.meshgrid(ticks, ticks)
    if norm == "l2":  # map the square onto the disc, boundary onto boundary
        length = np.maximum(np.abs(z1), np.abs(z2)) / np.maximum(np.hypot(z1, z2), 1e-300)
        z1, z2 = z1 * length, z2 * length
    truth = rise(0.4 + 0.4 * z1, -0.7 + 0.7 * z2).max()
    found = worst_case_sharpness(module, loss, [None], radius=radius, norm=norm, num_steps=60, num_starts=6, tol=1e-6)
    assert truth - 1e-5 <= found.value <= truth + 1e-4


def test_never_below_the_one_step_value_nor_below_a_smaller_ball(smooth_case):
    module, loss, batch = smooth_case
    for scaling, norm in itertools.product(["standard", "elementwise", "filterwise"], ["l2", "linf"]):
        radii = [0.3, 0.01, 0.1, 1.0] if norm == "l2" else [0.03, 0.001, 0.01, 0.1]
        settings = {"radii": radii, "scaling": scaling, "norm": norm}
        steps = SamSharpnessProbe([batch], **settings).measure(module, loss)
        worst = WorstCaseSharpnessProbe([batch], **settings, num_steps=4).measure(module, loss)
        names = ["", *(f"/rho_{radius:g}" for radius in radii[1:])]
        assert list(worst) == [f"worst_case_sharpness{name}" for name in names]
        for name in names:
            assert worst[f"worst_case_sharpness{name}"].value >= steps[f"sam_sharpness{name}"].value
        rising = [worst[f"worst_case_sharpness{names[radii.index(radius)]}"].value for radius in sorted(radii)]
        assert rising == sorted(rising)


def test_point_found_lies_in_the_ball_and_gives_the_value(smooth_case):
    module, loss, batch = smooth_case
    with observing(module, loss, [batch]) as function:
        ball = ball_around(function, scaling="elementwise", norm="l2")
        ascent = Ascent(function, ball)
        point, _ = ascent.search(0.5, 10, 2, 1e-3, torch.Generator().manual_seed(0))
        d = ball.scale * point.z
        assert float((d / function.weights).norm()) <= 0.5 * (1 + 1e-12)
        assert function.value_at(d) - function.value() == pytest.approx(point.rise, rel=1e-9)


def test_subsets_have_their_own_worst_case():
    module, loss, (x, y), _ = regression()
    each = OutputLoss(lambda outputs, targets: 0.5 * (outputs - targets).square(), likelihood="gaussian")
    settings = {"radius": 0.2, "scaling": "standard", "tol": 1e-8, "num_steps": 300}
    rows = zip(x.split(10), y.split(10), strict=True)
    parts = [worst_case_sharpness(module, loss, [part], **settings).value for part in rows]
    found = worst_case_sharpness(module, each, [(x, y)], **settings, subset_examples=10)
    assert found.value == pytest.approx(np.mean(parts), rel=1e-6)
    assert found.value > worst_case_sharpness(module, each, [(x, y)], **settings).value


def test_flat_and_lowered_surroundings():
    flat = worst_case_sharpness(*quadratic(torch.zeros(3, 3, dtype=torch.float64), [1.0] * 3), [None])
    assert (flat.value, flat.standard_error, flat.converged) == (0.0, 0.0, True)
    top = worst_case_sharpness(*quadratic(-torch.eye(3, dtype=torch.float64), [1.0] * 3), [None], num_starts=2)
    assert (top.value, top.converged) == (0.0, True)


def test_steps_into_infinity_are_taken_back():
    module = nn.ParameterList([nn.Parameter(torch.ones(1, 1, dtype=torch.float64))])
    loss = lambda m, b: -torch.log(2 - m[0]).sum()  # noqa: E731 - nan beyond w = 2, that is z = 1
    found = worst_case_sharpness(module, loss, [None], radius=5.0, num_steps=30)
    assert 0.5 < found.value < math.inf
    assert not found.converged


def test_allowance_cuts_the_steps(smooth_case):
    module, loss, batch = smooth_case
    probe = WorstCaseSharpnessProbe([batch], radii=[0.1, 0.2], tol=0.0)
    assert probe.price_gradients == 41
    probe.measure(module, loss)
    full = probe.measure(module, loss)[probe.name]
    assert full.price_gradients == pytest.approx(41)
    short = probe.measure(module, loss, Host(allowance_gradients=10))[probe.name]
    assert short.price_gradients == pytest.approx(9)
    assert not short.converged
    assert probe.measure(module, loss, Host(allowance_gradients=0))[probe.name].price_gradients == pytest.approx(3)
    steps = SamSharpnessProbe([batch], radii=[0.1, 0.2])
    steps.measure(module, loss)
    assert steps.measure(module, loss)[steps.name].price_gradients == pytest.approx(steps.price_gradients)


def test_in_float32_and_under_normalised_logits(smooth_case):
    module, loss, (inputs, targets) = smooth_case
    double = worst_case_sharpness(module, loss, [(inputs, targets)], radius=0.3).value
    module = module.float()
    batch = (inputs.float(), targets)
    assert worst_case_sharpness(module, loss, [batch], radius=0.3).value == pytest.approx(double, rel=1e-3)

    class Scaled(nn.Module):
        def __init__(self, inner, factor):
            super().__init__()
            self.inner, self.factor = inner, factor

        def forward(self, x):
            return self.factor * self.inner(x) + 3.0

    plain, normalised = (
        [
            worst_case_sharpness(
                Scaled(module, factor), CROSS_ENTROPY, [batch], radius=0.3, normalise_logits=normalise
            ).value
            for factor in (1.0, 5.0)
        ]
        for normalise in (False, True)
    )
    assert normalised[1] == pytest.approx(normalised[0], rel=1e-3)
    assert abs(plain[1] / plain[0] - 1) > 0.3


def test_not_finite_is_unknown(smooth_case):
    module, loss, batch = smooth_case
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] = math.nan
    endless = nn.Linear(2, 1)
    for measure in (sam_sharpness, worst_case_sharpness):
        for found in (
            measure(module, loss, [batch]),
            measure(endless, lambda m, x: m(x).sum() * math.inf, [torch.ones(1, 2)], scaling="standard"),
        ):
            assert math.isnan(found.value)
            assert not found.converged


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"num_starts": 0}, "num_starts must be at least 1, got 0"),
        ({"tol": -1.0}, "tol must be finite and at least 0, got -1.0"),
        ({"tol": math.nan}, "tol must be finite and at least 0, got nan"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(UserError, match=message):
        WorstCaseSharpnessProbe([None], **settings)
