from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import landscape_ray.data
from landscape_ray.errors import UserError
from landscape_ray.probes import Host
from landscape_ray.probes.sharpness.preconditioned import PreconditionedSharpnessProbe, preconditioned_sharpness
from landscape_ray.probes.sharpness.stability import edge_state, threshold
from landscape_ray.probes.sharpness.top import sharpness


def scales(module, seed=1):
    """Return a positive diagonal over two and a half orders of magnitude, one tensor for each parameter."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(p.shape, generator=generator).to(p).mul(6).exp() for p in module.parameters() if p.requires_grad]


@pytest.mark.acceptance
@pytest.mark.parametrize("route", ["exact", "finite_difference", "auto"])
def test_equals_the_dense_eigenvalue(case, dense_hessian, route):
    preconditioner = scales(case.module)
    diagonal = torch.cat([t.flatten() for t in preconditioner])
    eigenvalues, vectors = torch.linalg.eig(dense_hessian(case) / diagonal[:, None])  # P^-1 H, not symmetric
    index = int(eigenvalues.real.argmax())
    found = preconditioned_sharpness(
        case.module, case.loss, [case.batch], preconditioner, tol=1e-4, max_matvecs=200, route=route
    )
    assert found.value == pytest.approx(float(eigenvalues[index].real), rel=1e-6 if route == "exact" else 1e-4)
    assert found.converged
    assert found.route == ("finite_difference" if route == "auto" else route)
    assert 0 < found.standard_error <= 1e-4 * found.value
    vector = vectors[:, index].real
    assert abs(float(vector @ found.vector) / float(vector.norm())) == pytest.approx(1.0, abs=1e-4)
    assert float(found.vector.norm()) == pytest.approx(1.0)


def test_a_constant_preconditioner_divides_the_sharpness(smooth_case):
    ones = [torch.full_like(p, 0.25) for p in smooth_case.module.parameters()]
    arguments = smooth_case.module, smooth_case.loss, [smooth_case.batch]
    plain = sharpness(*arguments, tol=1e-6, max_matvecs=100)
    found = preconditioned_sharpness(*arguments, ones, tol=1e-6, max_matvecs=100)
    assert found.value == pytest.approx(4 * plain.value, rel=1e-9)


def test_rescaled_weights_with_their_preconditioner_give_the_same(smooth_case):
    """With w = 3 u for one layer, H and P are multiplied by 9."""
    module, loss, batch = smooth_case
    preconditioner = scales(module)
    before = preconditioned_sharpness(module, loss, [batch], preconditioner, tol=1e-8, max_matvecs=200)
    with torch.no_grad():
        module[2].weight.div_(3.0)
    handle = module[2].register_forward_hook(lambda layer, inputs, output: 3 * (output - layer.bias) + layer.bias)
    preconditioner[2] = preconditioner[2] * 9.0
    after = preconditioned_sharpness(module, loss, [batch], preconditioner, tol=1e-8, max_matvecs=200)
    handle.remove()
    assert after.value == pytest.approx(before.value, rel=1e-7)


def test_warm_start_needs_fewer_products(smooth_case):
    arguments = smooth_case.module, smooth_case.loss, [smooth_case.batch], scales(smooth_case.module)
    cold = preconditioned_sharpness(*arguments)
    warm = preconditioned_sharpness(*arguments, start=cold.vector)
    assert warm.num_matvecs < cold.num_matvecs
    assert warm.value == pytest.approx(cold.value, rel=1e-3)


class Hinge(nn.Module):
    """ReLU of another make: its kinks are not held."""

    def forward(self, x):
        return torch.where(x > 0, x, 0.0)


def trainable(activation, seed=0, num_examples=128):
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(nn.Linear(16, 48), activation(), nn.Linear(48, 48), activation(), nn.Linear(48, 5))
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1]))
    inputs = torch.randn(num_examples, 16, generator=generator)
    batch = inputs, (inputs @ torch.randn(16, 5, generator=generator)).argmax(1)
    return module, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), batch


@pytest.mark.acceptance
@pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU, Hinge])
def test_differences_follow_adam_for_less_where_they_can(activation):
    module, loss, batch = trainable(activation, num_examples=1024 if activation is Hinge else 128)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, betas=(0.9, 0.99))
    auto, exact = (PreconditionedSharpnessProbe([batch], route=route, cold_every=5) for route in ("auto", "exact"))
    spent = {"auto": 0.0, "exact": 0.0}
    for step in range(1, 46):
        optimizer.zero_grad()
        loss(module, batch).backward()
        optimizer.step()
        if step % 5:
            continue
        second = [optimizer.state[p]["exp_avg_sq"] for p in module.parameters()]
        diagonal = [(v / (1 - 0.99**step)).sqrt() + 1e-8 for v in second]
        host = Host(step=step, momentum=0.9, optimizer="adam", preconditioner=lambda d=diagonal: d)
        found, wanted = (p.measure(module, loss, host)[p.name] for p in (auto, exact))
        assert found.converged
        assert abs(found.value - wanted.value) <= found.standard_error + wanted.standard_error
        assert found.route == ("exact" if activation is Hinge else "finite_difference")
        spent["auto"] += found.price_gradients
        spent["exact"] += wanted.price_gradients
    if activation is not Hinge:
        assert spent["auto"] < 0.75 * spent["exact"]


def test_probe_starts_warm_and_sometimes_cold(smooth_case):
    probe = PreconditionedSharpnessProbe([smooth_case.batch], cold_every=3)
    host = Host(preconditioner=lambda: scales(smooth_case.module))
    counts = [probe.measure(smooth_case.module, smooth_case.loss, host)[probe.name].num_matvecs for _ in range(5)]
    assert min(counts[0], counts[3]) > max(counts[1], counts[2], counts[4])
    assert probe.needs == {"preconditioner"}
    assert 0 < probe.price_gradients < 15


@pytest.mark.parametrize(("optimizer", "factor"), [("adamw", 0.271), ("adam", 0.271), ("rmsprop", 1.0), ("", 1.0)])
def test_correction_of_the_first_moment(smooth_case, optimizer, factor):
    """Three updates at beta1 = 0.9: P is 1 - 0.9^3 times as large as what the loop tells."""
    preconditioner = scales(smooth_case.module)
    probe = PreconditionedSharpnessProbe([smooth_case.batch], tol=1e-6, max_matvecs=100)
    host = Host(step=3, momentum=0.9, optimizer=optimizer, preconditioner=lambda: preconditioner)
    found = probe.measure(smooth_case.module, smooth_case.loss, host)[probe.name]
    plain = preconditioned_sharpness(
        smooth_case.module, smooth_case.loss, [smooth_case.batch], preconditioner, tol=1e-6, max_matvecs=100
    )
    assert found.value == pytest.approx(plain.value / factor, rel=1e-6)


def test_nothing_to_precondition_with(smooth_case):
    probe = PreconditionedSharpnessProbe([smooth_case.batch])
    broken = [torch.full_like(p, math.inf) for p in smooth_case.module.parameters()]
    for host in (Host(), Host(preconditioner=lambda: None), Host(preconditioner=lambda: broken)):
        found = probe.measure(smooth_case.module, smooth_case.loss, host)[probe.name]
        assert math.isnan(found.value)
        assert not found.converged


def test_allowance_cuts_the_iteration_short(smooth_case):
    probe = PreconditionedSharpnessProbe([smooth_case.batch], tol=1e-9)
    host = Host(preconditioner=lambda: scales(smooth_case.module), allowance_gradients=2 / 3 + 1.2 + 3.5 * 2.3)
    found = probe.measure(smooth_case.module, smooth_case.loss, host)[probe.name]
    assert found.num_matvecs == 3
    assert not found.converged


def test_probe_resumes(smooth_case):
    host = Host(preconditioner=lambda: scales(smooth_case.module))
    straight, first = (PreconditionedSharpnessProbe([smooth_case.batch]) for _ in range(2))
    for probe in (straight, first):
        probe.measure(smooth_case.module, smooth_case.loss, host)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = PreconditionedSharpnessProbe([smooth_case.batch])
    second.load_state_dict(torch.load(file, weights_only=True))
    values = [p.measure(smooth_case.module, smooth_case.loss, host)[p.name].value for p in (straight, second)]
    assert values[0] == values[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tol": 0.0}, "tol must be positive"),
        ({"max_matvecs": 0}, "max_matvecs must be at least 1"),
        ({"route": "fast"}, "route must be one of exact, finite_difference, auto, got 'fast'"),
        ({"cold_every": 0}, "cold_every must be at least 1"),
    ],
)
def test_refuses_settings(arguments, message):
    with pytest.raises(UserError, match=message):
        PreconditionedSharpnessProbe([None], **arguments)


def test_refuses_other_preconditioners(smooth_case):
    arguments = smooth_case.module, smooth_case.loss, [smooth_case.batch]
    with pytest.raises(UserError, match="preconditioner must have the shapes of the 6 trainable parameters"):
        preconditioned_sharpness(*arguments, scales(smooth_case.module)[:-1])
    with pytest.raises(UserError, match="preconditioner must be finite and positive"):
        preconditioned_sharpness(*arguments, [torch.zeros_like(p) for p in smooth_case.module.parameters()])
    with pytest.raises(UserError, match="start must have shape"):
        preconditioned_sharpness(*arguments, scales(smooth_case.module), start=torch.ones(3))


@pytest.mark.acceptance
def test_adam_settles_at_its_threshold():
    """First 200 digits, MLP 64-32-32-10 with tanh, half squared error, full batch, lr 0.003: 38 / lr = 12 667."""
    with np.load(Path(landscape_ray.data.__file__).with_name("digits.npz")) as digits:
        inputs = torch.tensor(digits["images"][:200].reshape(200, 64) / 16, dtype=torch.float32)
        targets = torch.eye(10)[torch.tensor(digits["labels"][:200].astype(np.int64))]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    parameters = list(module.parameters())
    optimizer = torch.optim.Adam(parameters, lr=3e-3, betas=(0.9, 0.999), eps=1e-7)

    def loss(module, batch):
        return 0.5 * (module(batch[0]) - batch[1]).square().sum(1).mean()

    def roots():
        state = [optimizer.state[p] for p in parameters]
        return [(own["exp_avg_sq"] / (1 - 0.999 ** float(own["step"]))).sqrt() + 1e-7 for own in state]

    probe = PreconditionedSharpnessProbe([((inputs, targets), 200)])
    values = []
    for step in range(1, 1501):
        optimizer.zero_grad()
        loss(module, (inputs, targets)).backward()
        optimizer.step()
        if step % 50 == 0:
            host = Host(step=step, momentum=0.9, optimizer="adam", preconditioner=roots)
            values.append(probe.measure(module, loss, host)["preconditioned_sharpness"].value)
    edge = threshold("adam", 3e-3, 0.9)
    assert edge == pytest.approx(12667, rel=1e-4)
    assert edge_state(values, edge, tail=0.5).state == "at the edge"
    assert edge_state(values[:4], edge).state == "below"
