from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn

from landscape_ray.errors import UserError
from landscape_ray.probes import PROBES, Probe, SharpnessProbe
from landscape_ray.probes.fixed_loss import FixedLoss
from landscape_ray.probes.operators import FiniteDifferenceHessian, HessianOperator
from landscape_ray.probes.sharpness import sharpness


def chain(*weights):
    return nn.ParameterList([nn.Parameter(torch.tensor(w, dtype=torch.float64)) for w in weights])


def half_square(chain, target):
    return 0.5 * (math.prod(chain) - target) ** 2


def cross_entropy(module, batch):
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


class Hinge(nn.Module):
    """ReLU of another make: its kinks are not held."""

    def forward(self, x):
        return torch.where(x > 0, x, 0.0)


def wide(activation, seed=0, num_examples=128):
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(nn.Linear(16, 48), activation(), nn.Linear(48, 48), activation(), nn.Linear(48, 5))
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1]))
    inputs = torch.randn(num_examples, 16, generator=generator)
    targets = (inputs @ torch.randn(16, 5, generator=generator)).argmax(1)
    return module, (inputs, targets)


@pytest.mark.acceptance
def test_equals_top_eigenvalue_of_the_dense_hessian(case, dense_hessian):
    eigenvalues, eigenvectors = torch.linalg.eigh(dense_hessian(case))
    estimate = sharpness(case.module, case.loss, [case.batch], tol=1e-6, max_matvecs=200)
    assert estimate.value == pytest.approx(float(eigenvalues[-1]), rel=1e-8)
    assert abs(float(estimate.vector @ eigenvectors[:, -1])) == pytest.approx(1.0, abs=1e-6)
    assert estimate.converged
    assert 0 < estimate.standard_error <= 1e-6 * estimate.value


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.5), (10.0, 0.1), (2.0, 0.25, 2.0)])
@pytest.mark.parametrize("route", ["exact", "finite_difference", "auto"])
def test_scalar_chain_at_its_minimum(weights, route):
    estimate = sharpness(chain(*weights), half_square, [1.0], tol=1e-3, route=route)
    assert estimate.value == pytest.approx(sum(w**-2 for w in weights), rel=1e-5)


def test_largest_not_largest_in_magnitude():
    module = chain(0.1, 0.2)
    saddle = sharpness(module, lambda m, b: 0.5 * (2 * m[0] ** 2 - 50 * m[1] ** 2), [None], tol=1e-6)
    assert saddle.value == pytest.approx(2.0)
    concave = sharpness(module, lambda m, b: -0.5 * (3 * m[0] ** 2 + 50 * m[1] ** 2), [None], tol=1e-6)
    assert concave.value == pytest.approx(-3.0)


def test_linear_regression_and_unequal_batches():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(256, 8, generator=generator, dtype=torch.float64) * torch.linspace(1, 3, 8)
    module = nn.Linear(8, 1, bias=False).double()
    parts = [((X[:200],), 200), ((X[200:],), 56)]
    for batches in ([(X,)], parts):
        estimate = sharpness(module, lambda m, b: 0.5 * m(b[0]).square().mean(), batches, tol=1e-8)
        assert estimate.value == pytest.approx(float(torch.linalg.eigvalsh(X.T @ X / 256)[-1]), rel=1e-10)


def test_eval_mode_is_the_default():
    torch.manual_seed(0)
    noisy = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 5))
    silent = nn.Sequential(noisy[0], noisy[1], noisy[3])
    _, batch = wide(nn.Tanh)
    expected = sharpness(silent, cross_entropy, [batch], tol=1e-4).value
    assert sharpness(noisy, cross_entropy, [batch], tol=1e-4).value == pytest.approx(expected, rel=1e-6)
    with_masks = sharpness(noisy, cross_entropy, [batch], tol=1e-4, eval_mode=False)
    assert with_masks.converged  # the masks are one function's
    assert with_masks.value != pytest.approx(expected, rel=0.01)


@pytest.mark.acceptance
@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.ReLU, nn.LeakyReLU])
@pytest.mark.parametrize("route", ["finite_difference", "auto"])
def test_finite_differences_agree(activation, route):
    module, batch = wide(activation)
    reference = sharpness(module, cross_entropy, [batch], tol=1e-5, max_matvecs=100).value
    estimate = sharpness(module, cross_entropy, [batch], route=route)
    assert estimate.value == pytest.approx(reference, rel=0.01)
    assert abs(estimate.value - reference) <= estimate.standard_error <= 0.03 * estimate.value
    assert estimate.converged
    assert estimate.route == "finite_difference"
    # One gradient a product and one at the weights; the exact product of auto costs 1.2 + 2.3 instead of 1.
    # Two forwards look whether the loss is a function of the weights.
    surcharge = 2 / 3 + (2.5 if route == "auto" else 0.0)
    assert estimate.price_gradients == pytest.approx(1 + estimate.num_matvecs + surcharge)


def test_auto_gives_the_exact_rayleigh_quotient_and_residual():
    module, batch = wide(nn.GELU)
    estimate = sharpness(module, cross_entropy, [batch], route="auto")
    assert estimate.route == "finite_difference"
    v = estimate.vector
    Hv = HessianOperator(FixedLoss(module, cross_entropy, [batch]))(v)
    assert estimate.value == pytest.approx(float(v @ Hv), rel=1e-6)
    assert estimate.standard_error == pytest.approx(float((Hv - (v @ Hv) * v).norm()), rel=1e-4)


def test_differences_that_converge_to_the_wrong_vector_are_refused():
    # H = diag(10, 1) at zero; the third derivative tilts what a difference sees along the first axis.
    module = nn.ParameterList([nn.Parameter(torch.zeros(2))])

    def tilted(module, batch):
        x, y = module[0]
        return 5 * x**2 + 0.5 * y**2 + 150 * x**2 * y

    blind = sharpness(module, tilted, [None], route="finite_difference", tol=1e-3)
    assert not blind.converged
    assert blind.standard_error > 1e-3 * blind.value
    checked = sharpness(module, tilted, [None], route="auto", tol=1e-3)
    assert (checked.route, checked.converged) == ("exact", True)
    assert checked.value == pytest.approx(10.0, rel=1e-5)


def test_probe_keeps_to_differences_on_a_smooth_network():
    module, batch = wide(nn.GELU)
    probe = SharpnessProbe([batch], route="auto", cold_every=3)
    estimates = [probe.measure(module, cross_entropy)["sharpness"] for _ in range(4)]
    assert [e.route for e in estimates] == ["finite_difference"] * 4
    # Cold ones check by one exact product, the others by a central difference.
    surcharges = [e.price_gradients - (1 + e.num_matvecs) for e in estimates]
    # The first one looks whether the loss is a function of the weights, by two forwards.
    assert surcharges == pytest.approx([2.5 + 2 / 3, 0.0, 0.0, 2.5])


@pytest.mark.acceptance
@pytest.mark.parametrize("seed", range(6))
def test_finite_differences_are_refused_on_networks_with_unknown_kinks(seed):
    module, batch = wide(Hinge, seed, 1024)
    auto = sharpness(module, cross_entropy, [batch], route="auto")
    Hv = HessianOperator(FixedLoss(module.eval(), cross_entropy, [batch]))(auto.vector)
    assert auto.converged
    assert auto.route == "exact"
    assert float((Hv - auto.value * auto.vector).norm()) == pytest.approx(auto.standard_error, rel=1e-2)
    assert auto.standard_error <= 0.03 * auto.value
    blind = sharpness(module, cross_entropy, [batch], route="finite_difference")
    assert blind.route == "finite_difference"
    assert not blind.converged


def test_differences_that_failed_are_not_tried_again_before_the_next_cold_start():
    module, batch = wide(Hinge, 0, 1024)
    probe = SharpnessProbe([batch], route="auto", cold_every=3)
    estimates = [probe.measure(module, cross_entropy)["sharpness"] for _ in range(4)]
    assert [e.route for e in estimates] == ["exact"] * 4
    assert [e.num_matvecs for e in estimates[1:3]] == [1, 1]
    assert min(estimates[0].num_matvecs, estimates[3].num_matvecs) > 3


def test_differences_that_were_trusted_are_still_checked():
    module, batch = wide(Hinge, 0, 1024)
    probe = SharpnessProbe([batch], route="auto")
    probe.measure(module, cross_entropy)["sharpness"]
    probe.load_state_dict({**probe.state_dict(), "differences_failed": False})
    estimate = probe.measure(module, cross_entropy)["sharpness"]
    assert (estimate.route, estimate.converged) == ("exact", True)


@pytest.mark.parametrize("route", ["exact", "finite_difference", "auto"])
@pytest.mark.parametrize("broken", ["weights", "dead weights", "loss", "overflow"])
def test_not_finite_is_a_result(route, broken):
    module, batch = wide(nn.Tanh)
    loss = cross_entropy
    if broken == "weights":
        module[0].weight.data[0, 0] = float("nan")
    elif broken == "dead weights":
        module.register_parameter("aside", nn.Parameter(torch.tensor(float("inf"))))
    elif broken == "loss":
        loss = lambda module, batch: cross_entropy(module, batch) + float("inf")  # noqa: E731
    else:
        module[4].weight.data.fill_(3e38)
    estimate = sharpness(module, loss, [batch], route=route)
    assert math.isnan(estimate.value)
    assert math.isnan(estimate.standard_error)
    assert (estimate.converged, estimate.vector) == (False, None)


@pytest.mark.parametrize("route", ["exact", "finite_difference", "auto"])
def test_measures_inside_no_grad_and_inference_mode(route):
    module, batch = wide(nn.Tanh)
    expected = sharpness(module, cross_entropy, [batch], route=route)
    for surroundings in (torch.no_grad(), torch.inference_mode()):
        with surroundings:
            assert sharpness(module, cross_entropy, [batch], route=route).value == expected.value
    cross_entropy(module, batch).backward()


def test_refused_arguments():
    module, batch = wide(nn.Tanh)
    for tol in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="tol must be positive and finite"):
            sharpness(module, cross_entropy, [batch], tol=tol)
    with pytest.raises(UserError, match="route must be one of exact, finite_difference, auto, got 'power'"):
        sharpness(module, cross_entropy, [batch], route="power")
    with pytest.raises(UserError, match="max_matvecs must be at least 1, got 0"):
        sharpness(module, cross_entropy, [batch], max_matvecs=0)
    with pytest.raises(UserError, match=r"start must have shape .* belongs to another module"):
        sharpness(module, cross_entropy, [batch], start=torch.ones(3))
    with pytest.raises(UserError, match="cold_every must be at least 1, got 0"):
        SharpnessProbe([batch], cold_every=0)
    with pytest.raises(UserError, match="tol must be positive"):
        SharpnessProbe([batch], tol=0.0)
    with pytest.raises(UserError, match=r"probe 'sharpness' must hold num_measured, vector, .* got nothing"):
        SharpnessProbe([batch]).load_state_dict({})


def train(module, batch, steps):
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(module, batch).backward()
        optimizer.step()
        yield


def test_warm_start_saves_products_along_a_run():
    module, batch = wide(nn.Tanh)
    warm, cold = SharpnessProbe([batch], cold_every=100), SharpnessProbe([batch], cold_every=1)
    spent = {"warm": 0, "cold": 0}
    for step, _ in enumerate(train(module, batch, 100)):
        if step % 10 == 0:
            followed, fresh = (probe.measure(module, cross_entropy)["sharpness"] for probe in (warm, cold))
            # Neighbours lie within a few percent here, and 0.03 does not tell them apart, whatever the start.
            reference = sharpness(module, cross_entropy, [batch], tol=1e-4, max_matvecs=100)
            assert 0.9 * reference.value < followed.value < 1.0001 * reference.value
            spent["warm"] += followed.num_matvecs
            spent["cold"] += fresh.num_matvecs
    assert spent["warm"] < 0.8 * spent["cold"]


def test_cold_starts_find_an_eigenvalue_that_overtook():
    # The eigenvectors of a diagonal Hessian never turn, so a warm start stays with the one it has.
    module = nn.ParameterList([nn.Parameter(torch.zeros(20))])
    curvatures = torch.linspace(0.0, 1.0, 20)
    loss = lambda m, b: 0.5 * (curvatures * m[0].square()).sum()  # noqa: E731
    probe = SharpnessProbe([None], tol=1e-3, cold_every=3)
    assert probe.measure(module, loss)["sharpness"].value == pytest.approx(1.0, rel=1e-3)
    probe.load_state_dict({**probe.state_dict(), "vector": torch.eye(20)[19]})
    curvatures[0] = 2.0
    assert probe.measure(module, loss)["sharpness"].value == pytest.approx(1.0)
    assert probe.measure(module, loss)["sharpness"].value == pytest.approx(1.0)
    assert probe.measure(module, loss)["sharpness"].value == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("route", ["exact", "auto"])
def test_probe_continues_from_a_saved_state_bit_by_bit(route):
    module, batch = wide(nn.GELU)
    probe = PROBES["sharpness"](batches=[batch], route=route, seed=3)
    assert isinstance(probe, Probe)
    steps = train(module, batch, 40)
    for _ in range(3):
        for _ in range(10):
            next(steps)
        probe.measure(module, cross_entropy)["sharpness"]
    file = io.BytesIO()
    torch.save(probe.state_dict(), file)
    file.seek(0)
    resumed = PROBES["sharpness"](batches=[batch], route=route, seed=3)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.price_gradients == probe.price_gradients
    a, b = probe.measure(module, cross_entropy)["sharpness"], resumed.measure(module, cross_entropy)["sharpness"]
    assert (a.value, a.standard_error, a.num_matvecs) == (b.value, b.standard_error, b.num_matvecs)
    assert torch.equal(a.vector, b.vector)


def test_fresh_state_can_be_saved_without_running_code():
    _, batch = wide(nn.Tanh)
    file = io.BytesIO()
    torch.save(SharpnessProbe([batch]).state_dict(), file)
    file.seek(0)
    probe = SharpnessProbe([batch])
    probe.load_state_dict(torch.load(file, weights_only=True))
    assert probe.state_dict()["vector"] is None


def test_a_diverged_measurement_is_not_remembered():
    module, batch = wide(nn.Tanh)
    probe = SharpnessProbe([batch])
    good = probe.measure(module, cross_entropy)["sharpness"]
    weights = {name: t.clone() for name, t in module.state_dict().items()}
    module[0].weight.data.fill_(float("nan"))
    assert math.isnan(probe.measure(module, cross_entropy)["sharpness"].value)
    module.load_state_dict(weights)
    again = probe.measure(module, cross_entropy)["sharpness"]
    assert again.value == pytest.approx(good.value, rel=1e-2)
    assert again.num_matvecs == 1


def test_price_is_typical_first_and_then_measured():
    module, batch = wide(nn.Tanh)
    probe = SharpnessProbe([batch], route="finite_difference")
    assert probe.price_gradients == 12.0
    estimate = probe.measure(module, cross_entropy)["sharpness"]
    assert probe.price_gradients == pytest.approx(1.0 + estimate.num_matvecs)
    assert estimate.price_gradients == pytest.approx(probe.price_gradients + 2 / 3)  # the check, once
    assert estimate.cost_seconds > 0


def test_fused_attention_serves_both_routes(case):
    # Without the context the exact route would raise; finite differences keep the fused kernel.
    module, loss, batch = case
    v = torch.ones(sum(p.numel() for p in module.parameters()), dtype=torch.float64)
    exact = HessianOperator(FixedLoss(module, loss, [batch]))(v)
    torch.testing.assert_close(
        FiniteDifferenceHessian(FixedLoss(module, loss, [batch]))(v), exact, rtol=1e-4, atol=1e-4
    )


@pytest.mark.acceptance
@pytest.mark.slow
def test_gradient_descent_settles_at_the_edge_of_stability():
    """Full-batch gradient descent on half squared error holds the sharpness at 2 / lr (Cohen et al. 2021)."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    inputs = torch.tensor(digits.data[:200] / 16, dtype=torch.float32)
    one_hot = nn.functional.one_hot(torch.tensor(digits.target[:200]), 10).float()
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))

    def half_squared_error(module, batch):
        return 0.5 * (module(batch[0]) - batch[1]).square().sum(1).mean()

    probe = SharpnessProbe([(inputs, one_hot)], tol=0.01)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.4)
    values = []
    for step in range(4000):
        optimizer.zero_grad()
        half_squared_error(module, (inputs, one_hot)).backward()
        optimizer.step()
        if step >= 3000 and step % 50 == 0:
            values.append(probe.measure(module, half_squared_error)["sharpness"].value)
    assert sum(values) / len(values) == pytest.approx(2 / 0.4, rel=0.04)
