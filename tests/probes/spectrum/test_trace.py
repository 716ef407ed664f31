from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn

from landscape_ray.errors import UserError
from landscape_ray.probes.fixed_loss import FixedLoss
from landscape_ray.probes.losses import OutputLoss
from landscape_ray.probes.operators import HessianOperator
from landscape_ray.probes.probe import Host
from landscape_ray.probes.spectrum.eigenpairs import curvature_operator
from landscape_ray.probes.spectrum.trace import TraceProbe, trace

cross_entropy = OutputLoss(nn.CrossEntropyLoss(reduction="none"), "categorical")
# By so many products every matrix here is read off.
EXACTLY = {"tol": 1e-9, "max_matvecs": 400}


class Hinge(nn.Module):
    """ReLU of another make: its kinks are not held."""

    def forward(self, x):
        return torch.where(x > 0, x, 0.0)


def wide(activation, seed=0):
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(nn.Linear(16, 48), activation(), nn.Linear(48, 48), activation(), nn.Linear(48, 5))
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1]))
    inputs = torch.randn(128, 16, generator=generator)
    targets = (inputs @ torch.randn(16, 5, generator=generator)).argmax(1)
    return module, (inputs, targets)


@pytest.mark.acceptance
def test_equals_the_dense_hessian(case, dense_hessian):
    matrix = dense_hessian(case)
    exact = trace(case.module, case.loss, [case.batch], **EXACTLY)
    assert exact.value == pytest.approx(float(matrix.trace()), rel=1e-9)
    assert (exact.standard_error, exact.converged) == (0.0, True)
    sampled = [trace(case.module, case.loss, [case.batch], tol=0.3, max_matvecs=40, seed=s) for s in range(5)]
    for estimate in sampled:
        assert abs(estimate.value - float(matrix.trace())) <= 4 * estimate.standard_error
    assert len({estimate.value for estimate in sampled}) == 5


def test_linear_regression_on_unequal_batches():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(256, 12, generator=generator, dtype=torch.float64)
    module = nn.Linear(12, 1, bias=False).double()
    parts = [(X[:200], 200), (X[200:], 56)]
    for batches in ([X], parts):
        estimate = trace(module, lambda m, b: 0.5 * m(b).square().mean(), batches, **EXACTLY)
        assert estimate.value == pytest.approx(float(X.square().sum(1).mean()), rel=1e-12)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.5), (10.0, 0.1), (2.0, 0.25, 2.0)])
def test_scalar_chain_at_its_minimum(weights):
    chain = nn.ParameterList([nn.Parameter(torch.tensor(w, dtype=torch.float64)) for w in weights])
    estimate = trace(chain, lambda m, target: 0.5 * (math.prod(m) - target) ** 2, [1.0])
    assert estimate.value == pytest.approx(sum(w**-2 for w in weights), rel=1e-12)


@pytest.mark.acceptance
def test_hessian_and_gauss_newton_agree_without_curvature_in_the_network(build_mlp):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(20, 3, generator=generator).double()
    batch = (inputs, torch.randint(3, (20,), generator=generator))
    values = {
        (activation, curvature): trace(
            build_mlp(activation), cross_entropy, [batch], curvature=curvature, **EXACTLY
        ).value
        for activation in (nn.ReLU, nn.Tanh)
        for curvature in ("hessian", "ggn")
    }
    assert values[nn.ReLU, "hessian"] == pytest.approx(values[nn.ReLU, "ggn"], rel=1e-9)
    assert values[nn.Tanh, "hessian"] != pytest.approx(values[nn.Tanh, "ggn"], rel=0.01)


def test_price_of_exact_products():
    module, batch = wide(nn.Tanh)
    one = trace(module, cross_entropy, [batch], max_matvecs=10, tol=1e-3, method="hutchinson")
    assert one.num_matvecs == 10
    assert one.price_gradients == pytest.approx(2 / 3 + 1.2 + 2.3 * 10)
    two = trace(module, cross_entropy, [(batch, 1), (batch, 1)], max_matvecs=10, tol=1e-3, method="hutchinson")
    assert two.price_gradients == pytest.approx(2 / 3 + 3.5 * 10)
    assert two.value == pytest.approx(one.value, rel=1e-4)


@pytest.mark.acceptance
@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.ReLU])
def test_finite_differences(activation):
    module, batch = wide(activation)
    settings = {"tol": 1e-3, "max_matvecs": 10, "method": "hutchinson", "seed": 3}
    exact = trace(module, cross_entropy, [batch], **settings)
    for route, extra in (("finite_difference", 2), ("auto", 1.2 + 2.3)):
        estimate = trace(module, cross_entropy, [batch], route=route, **settings)
        assert estimate.route == "hutchinson, finite differences"
        assert estimate.value == pytest.approx(exact.value, rel=0.02)
        assert exact.standard_error * 0.95 < estimate.standard_error < exact.standard_error * 1.2
        # a gradient at the weights and one for each sample; that of the check is one of them
        assert estimate.price_gradients == pytest.approx(2 / 3 + 1 + 10 + extra)


def test_finite_differences_are_refused_across_unknown_kinks():
    module, batch = wide(Hinge)
    exact = trace(module, cross_entropy, [batch], max_matvecs=10, tol=1e-3)
    saved = trace(module, cross_entropy, [batch], max_matvecs=10, tol=1e-3, route="auto")
    assert saved.route == exact.route
    assert saved.value == pytest.approx(exact.value, rel=1e-4)
    forced = trace(module, cross_entropy, [batch], tol=10.0, route="finite_difference")
    assert not forced.converged
    assert trace(module, cross_entropy, [batch], tol=10.0).converged


def test_probe_reports_the_frobenius_norm():
    module, batch = wide(nn.Tanh)
    matrix = HessianOperator(FixedLoss(module.eval(), cross_entropy, [batch]))
    probe = TraceProbe([batch], tol=0.02, frobenius=True)
    found = probe.measure(module, cross_entropy)
    assert list(found) == ["trace", "trace/frobenius"]
    frobenius = found["trace/frobenius"]
    signs = torch.randint(2, (300, matrix.size), generator=torch.Generator().manual_seed(9)) * 2.0 - 1
    reference = math.sqrt(sum(float(matrix(v).square().sum()) for v in signs) / 300)
    assert abs(frobenius.value - reference) <= 4 * frobenius.standard_error + 0.02 * reference
    assert probe.price_gradients == found["trace"].price_gradients > 0
    assert frobenius.price_gradients == 0


def test_probe_keeps_to_its_allowance_and_says_so():
    module, batch = wide(nn.Tanh)
    errors = []
    for allowance in (0.0, 15.0, 60.0):
        probe = TraceProbe([batch], tol=0.005)
        found = probe.measure(module, cross_entropy, Host(allowance_gradients=allowance))["trace"]
        # the least: that the loss is deterministic, the graph, two products
        assert found.price_gradients <= max(allowance, 2 / 3 + 1.2 + 2 * 2.3) + 1e-9
        assert not found.converged
        errors.append(found.standard_error)
    assert errors[0] > errors[1] > errors[2] > 0


def test_probe_draws_anew_and_resumes():
    module, batch = wide(nn.GELU)

    def probe():
        return TraceProbe([batch], tol=0.2, route="auto", seed=5)

    one, other = probe(), probe()
    values = [one.measure(module, cross_entropy)["trace"].value for _ in range(3)]
    assert len(set(values)) == 3
    assert other.measure(module, cross_entropy)["trace"].value == values[0]
    buffer = io.BytesIO()
    torch.save(other.state_dict(), buffer)
    buffer.seek(0)
    resumed = probe()
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert [resumed.measure(module, cross_entropy)["trace"].value for _ in range(2)] == values[1:]


def test_probe_stays_with_exact_products_once_differences_failed():
    module, batch = wide(Hinge)
    probe = TraceProbe([batch], tol=1e-9, route="auto", max_matvecs=10)
    estimates = [probe.measure(module, cross_entropy)["trace"] for _ in range(11)]
    # the exact product of a check is the first sample, too: only the difference is lost, at every tenth measurement
    assert [estimate.num_matvecs for estimate in estimates] == [11, *[10] * 9, 11]
    assert not any("differences" in estimate.route for estimate in estimates)


def test_weights_that_are_not_finite():
    module, batch = wide(nn.Tanh)
    with torch.no_grad():
        module[0].weight[0, 0] = math.inf
    assert math.isnan(trace(module, cross_entropy, [batch]).value)
    found = TraceProbe([batch]).measure(module, cross_entropy)
    assert math.isnan(found["trace"].value)


def test_loss_that_is_not_finite():
    module, batch = wide(nn.Tanh)
    estimate = trace(module, lambda m, b: cross_entropy(m, b) * math.inf, [batch])
    assert math.isnan(estimate.value)
    assert not estimate.converged


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"curvature": "ntk"}, "curvature must be one of hessian, ggn, fisher, empirical_fisher, got 'ntk'"),
        ({"route": "forward"}, "route must be one of exact, finite_difference, auto, got 'forward'"),
        ({"curvature": "ggn", "route": "auto"}, "route must be exact for curvature ggn, got 'auto'"),
        ({"tol": -1.0}, "tol must be positive and finite, got -1.0"),
    ],
)
def test_refused(settings, message):
    module, batch = wide(nn.Tanh)
    with pytest.raises(UserError, match=message):
        trace(module, cross_entropy, [batch], **settings)
    with pytest.raises(UserError, match=message):
        TraceProbe([batch], **settings)


@pytest.mark.parametrize("curvature", ["ggn", "fisher", "empirical_fisher"])
def test_every_curvature_has_a_trace(curvature):
    generator = torch.Generator().manual_seed(1)
    module = nn.Linear(2, 3, bias=False).double()
    nn.init.ones_(module.weight)
    batch = torch.randn(9, 2, generator=generator).double(), torch.randint(3, (9,), generator=generator)
    dense = curvature_operator(FixedLoss(module, cross_entropy, [batch]), curvature, seed=4).dense()
    found = trace(module, cross_entropy, [batch], curvature=curvature, seed=4)
    assert found.value == pytest.approx(float(dense.trace()), rel=1e-9)  # of 6 rows, read off


def test_probe_takes_the_way_that_was_cheaper_and_tries_the_other():
    module, batch = wide(nn.GELU)
    probe = TraceProbe([batch], tol=0.1)
    expected, found = [], []
    for _ in range(5):
        expected.append(probe.price_gradients)
        estimates = probe.measure(module, cross_entropy)
        assert list(estimates) == ["trace"]
        found.append(estimates["trace"])
    ways = [estimate.route.split(",")[0] for estimate in found]
    assert ways[:2] == ["split", "split"]
    assert ways[2] != "split"
    assert all(estimate.converged for estimate in found)
    cheaper = "split" if found[1].price_gradients <= found[2].price_gradients else ways[2]
    assert ways[3:] == [cheaper, cheaper]
    last = found[1] if cheaper == "split" else found[2]
    assert expected[3] == last.price_gradients  # the budget is told the price of the way that comes next
    assert abs(found[1].value - found[2].value) <= 4 * math.hypot(found[1].standard_error, found[2].standard_error)


def test_probe_goes_the_dearer_way_at_every_tenth_measurement_only():
    probe = TraceProbe([], tol=0.05)
    probe._wanted, probe._spent = {"split": 5.0, "whole": 9.0}, {"split": 6.0, "whole": 10.0}
    ways = []
    for number in range(3, 24):
        probe._num_measured = number
        ways.append(probe.price_gradients)
    assert [3 + index for index, price in enumerate(ways) if price == 10.0] == [12, 22]
    probe._wanted = {"split": 9.0, "whole": 5.0}
    probe._num_measured = 4
    assert probe.price_gradients == 10.0


def test_probe_that_splits_resumes_to_the_bit():
    module, batch = wide(nn.GELU)

    def probe():
        return TraceProbe([batch], tol=0.1, route="auto", seed=5)

    one, other = probe(), probe()
    values = [one.measure(module, cross_entropy)["trace"].value for _ in range(5)]
    for _ in range(3):
        other.measure(module, cross_entropy)
    buffer = io.BytesIO()
    torch.save(other.state_dict(), buffer)
    buffer.seek(0)
    resumed = probe()
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert resumed.price_gradients == other.price_gradients
    assert [resumed.measure(module, cross_entropy)["trace"].value for _ in range(2)] == values[3:]


def test_probe_that_splits_keeps_to_its_allowance():
    module, batch = wide(nn.GELU)
    errors = []
    for allowance, way in ((8.0, "whole"), (16.0, "split"), (40.0, "split")):
        probe = TraceProbe([batch], tol=0.005)
        found = probe.measure(module, cross_entropy, Host(allowance_gradients=allowance))["trace"]
        assert (found.route == "split") == (way == "split")
        assert found.price_gradients <= allowance
        assert not found.converged
        errors.append(found.standard_error)
    assert errors[0] > errors[1] > errors[2] > 0
