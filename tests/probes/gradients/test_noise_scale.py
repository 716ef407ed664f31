from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from landscape_ray.errors import UserError
from landscape_ray.probes.estimate import Estimate
from landscape_ray.probes.gradients.noise_scale import (
    GradientNoiseScaleProbe,
    NoiseScale,
    combine,
    gradient_noise_scale,
)
from landscape_ray.probes.gradients.pair_formula import pair_estimates
from landscape_ray.probes.gradients.units import jackknife_error
from landscape_ray.probes.losses import OutputLoss
from landscape_ray.probes.probe import Host

OUTPUT = OutputLoss(lambda outputs, targets: outputs)
"""The loss of an example is its output: the gradient of a linear layer is the input."""


def drawn(seed, num, signal, scales):
    """Return gradients N(G, diag(scales^2))."""
    generator = torch.Generator().manual_seed(seed)
    return signal + scales * torch.randn(num, len(signal), generator=generator, dtype=torch.float64)


def with_gradients(rows):
    """Return a module and a batch whose examples have these gradients."""
    return nn.Linear(rows.shape[1], 1, bias=False).double(), (rows, torch.zeros(len(rows), 1, dtype=torch.float64))


def split(batch, *sizes):
    return [(pair, len(pair[0])) for pair in zip(*(part.split(sizes) for part in batch), strict=True)]


def table_of(rows, sizes, hessian=None, chosen=None):
    sizes = torch.tensor(sizes, dtype=torch.float64)
    mean = (sizes[:, None] * rows).sum(0) / sizes.sum()
    curved = rows if hessian is None else rows @ hessian
    chosen = torch.arange(len(rows)) if chosen is None else chosen
    return pair_estimates(sizes, (rows * curved).sum(1), curved @ mean, chosen)


SIGNAL, SCALES = torch.tensor([1.0, -0.5, 0.0, 0.2]).double(), torch.tensor([1.0, 2.0, 0.5, 3.0]).double()
TRACE, SQUARE = float(SCALES.square().sum()), float(SIGNAL.square().sum())


@pytest.mark.acceptance
def test_examples_give_the_sample_covariance():
    rows = drawn(0, 12, SIGNAL * 3, SCALES)
    module, batch = with_gradients(rows)
    found = gradient_noise_scale(module, OUTPUT, [batch])
    trace = float(torch.cov(rows.mT).trace())
    signal = float(rows.mean(0).square().sum()) - trace / 12
    assert found.covariance_trace.value == pytest.approx(trace, rel=1e-10)
    assert found.gradient_norm_squared.value == pytest.approx(signal, rel=1e-9)
    assert found.noise_scale.value == pytest.approx(trace / signal, rel=1e-9)
    assert found.noise_scale.route == "factored"


def test_micro_batches_are_the_pair_formula():
    rows = drawn(0, 24, SIGNAL, SCALES)
    module, batch = with_gradients(rows)
    found = gradient_noise_scale(module, OUTPUT, split(batch, *[3] * 8), source="micro_batches")
    small, big = rows.view(8, 3, 4).mean(1).square().sum(1).mean(), rows.mean(0).square().sum()
    assert found.gradient_norm_squared.value == pytest.approx(float((24 * big - 3 * small) / (24 - 3)), rel=1e-10)
    assert found.covariance_trace.value == pytest.approx(float((small - big) / (1 / 3 - 1 / 24)), rel=1e-10)
    assert found.noise_scale.price_gradients == pytest.approx(1.0)
    assert gradient_noise_scale(module, OUTPUT, split(batch, *[3] * 8)).covariance_trace == found.covariance_trace


@pytest.mark.acceptance
@pytest.mark.parametrize("sizes", [(1,) * 10, (4, 4, 4), (1, 5, 2, 8)])
def test_both_parts_are_unbiased_also_for_unequal_units(sizes):
    scales = SCALES / torch.tensor(sizes, dtype=torch.float64).sqrt()[:, None]
    found = torch.stack([table_of(drawn(seed, len(sizes), SIGNAL, scales), sizes)[:, 0] for seed in range(1500)])
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - torch.tensor([SQUARE, TRACE])) / error).abs().max() < 3.5


def test_leaving_out_is_leaving_out():
    sizes, rows = (2, 3, 1, 4, 2), drawn(1, 5, SIGNAL, SCALES)
    table = table_of(rows, sizes)
    for unit in range(5):
        kept = [u for u in range(5) if u != unit]
        torch.testing.assert_close(table[:, 1 + unit], table_of(rows[kept], [sizes[u] for u in kept])[:, 0])


@pytest.mark.acceptance
def test_standard_errors_cover_the_truth_at_their_rate():
    num, signal = 400, SIGNAL * 3
    inside = torch.zeros(3)
    for seed in range(num):
        table = table_of(drawn(seed, 40, signal, SCALES), (1,) * 40)
        value, error = table[:, 0], jackknife_error(table[:, 1:])
        ratios = table[1] / table[0]
        inside[:2] += (value - torch.tensor([9 * SQUARE, TRACE])).abs() <= error
        inside[2] += abs(ratios[0] - TRACE / (9 * SQUARE)) <= jackknife_error(ratios[1:])
    # one standard error holds 68 %: three binomial standard deviations at either side
    assert ((inside / num - 0.683).abs() < 0.07).all(), inside / num


def test_error_of_the_ratio_is_that_of_the_jackknife_to_first_order():
    rows = drawn(3, 200, SIGNAL * 3, SCALES)
    module, batch = with_gradients(rows)
    found = gradient_noise_scale(module, OUTPUT, [batch])
    table = table_of(rows, (1,) * 200)
    ratios = table[1, 1:] / table[0, 1:]
    assert found.noise_scale.standard_error == pytest.approx(float(jackknife_error(ratios)), rel=0.02)


def classification(seed=0):
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module, (torch.randn(16, 3, generator=generator).double(), torch.randint(3, (16,), generator=generator))


@pytest.mark.acceptance
@pytest.mark.parametrize("source", ["examples", "micro_batches"])
def test_hessian_weighted_scale_equals_dense_matrices(source):
    module, batch = classification()
    loss = OutputLoss(nn.CrossEntropyLoss(reduction="none"), likelihood="categorical")
    parameters = list(module.parameters())

    def gradient(inputs, targets, create_graph=False):
        value = F.cross_entropy(module(inputs), targets)
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, parameters, create_graph=create_graph)])

    whole = gradient(*batch, create_graph=True)
    hessian = torch.stack(
        [torch.cat([r.reshape(-1) for r in torch.autograd.grad(e, parameters, retain_graph=True)]) for e in whole]
    )
    size = 1 if source == "examples" else 2
    rows = torch.stack([gradient(x, t) for x, t in zip(*(part.split(size) for part in batch), strict=True)])
    apart = rows - rows.mean(0)
    noise = size * float(torch.einsum("ui,ij,uj->", apart, hessian, apart)) / (len(rows) - 1)
    signal = float(rows.mean(0) @ hessian @ rows.mean(0)) - noise / 16
    found = gradient_noise_scale(
        module, loss, split(batch, *[2] * 8), source=source, num_products=len(rows)
    ).hessian_weighted
    assert signal > 0
    assert found.value == pytest.approx(noise / signal, rel=1e-8)
    assert found.num_matvecs == len(rows) + 1
    assert found.standard_error > 0


def test_products_of_a_few_units_are_unbiased_and_know_their_error():
    curvature = torch.diag(torch.tensor([4.0, 1.0, 2.0, 0.5]).double())
    wanted = torch.stack([SIGNAL @ curvature @ SIGNAL, curvature.diagonal() @ SCALES.square()])
    values, errors = [], []
    for seed in range(600):
        chosen = torch.randperm(20, generator=torch.Generator().manual_seed(seed))[:8]
        table = table_of(drawn(seed, 20, SIGNAL, SCALES), (1,) * 20, curvature, chosen)
        values.append(table[:, 0])
        errors.append(jackknife_error(table[:, 1:]))
    found, spread = torch.stack(values), torch.stack(values).std(0)
    assert ((found.mean(0) - wanted) / spread * math.sqrt(600)).abs().max() < 3.5
    mean_error = torch.stack(errors).square().mean(0).sqrt()
    assert ((mean_error / spread > 0.85) & (mean_error / spread < 1.3)).all(), mean_error / spread


def test_noise_without_a_gradient_is_unknown_and_not_negative():
    module, batch = with_gradients(torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]).double())
    found = gradient_noise_scale(module, OUTPUT, [batch])
    assert found.gradient_norm_squared.value == pytest.approx(-1 / 3)
    assert math.isnan(found.noise_scale.value)
    assert not found.noise_scale.converged
    assert all(math.isnan(x) for x in (*found.overheads(10), found.learning_rate_share(10)))


def test_weights_that_are_not_finite_give_nan():
    module, batch = with_gradients(drawn(0, 5, SIGNAL, SCALES))
    nn.init.constant_(module.weight, math.nan)
    found = gradient_noise_scale(module, OUTPUT, [batch], num_products=2)
    assert math.isnan(found.noise_scale.value)
    assert math.isnan(found.hessian_weighted.value)


def test_combining_averages_before_dividing():
    parts = [
        gradient_noise_scale(module, OUTPUT, [batch])
        for module, batch in (with_gradients(drawn(seed, 30, SIGNAL * 3, SCALES)) for seed in range(40))
    ]
    found = combine(parts)
    square = sum(p.gradient_norm_squared.value for p in parts) / 40
    trace = sum(p.covariance_trace.value for p in parts) / 40
    assert found.noise_scale.value == pytest.approx(trace / square)
    assert abs(found.noise_scale.value - TRACE / (9 * SQUARE)) < 3 * found.noise_scale.standard_error
    assert found.noise_scale.converged
    assert found.covariance_trace.standard_error == pytest.approx(
        math.sqrt(sum(p.covariance_trace.standard_error**2 for p in parts)) / 40
    )
    assert combine(parts[:1]).noise_scale.standard_error == pytest.approx(parts[0].noise_scale.standard_error)


def test_probe_names_price_and_state():
    module, batch = with_gradients(drawn(0, 12, SIGNAL * 3, SCALES))
    probe = GradientNoiseScaleProbe([batch], smoothing=0.5)
    found = probe.measure(module, OUTPUT)
    assert list(found) == [
        "gradient_noise_scale",
        "gradient_noise_scale/gradient_norm_squared",
        "gradient_noise_scale/covariance_trace",
    ]
    assert found["gradient_noise_scale"].price_gradients == pytest.approx(2.0 + 0.2 + 2 / 3)
    again = GradientNoiseScaleProbe([batch], smoothing=0.5)
    again.load_state_dict(probe.state_dict())
    assert again.measure(module, OUTPUT)["gradient_noise_scale"].value == found["gradient_noise_scale"].value
    other = GradientNoiseScaleProbe([with_gradients(drawn(0, 9, SIGNAL, SCALES))[1]], smoothing=0.5)
    other.load_state_dict(probe.state_dict())
    fresh = GradientNoiseScaleProbe(other.batches, smoothing=0.5)  # another batch size: the average is dropped
    for _ in range(2):
        dropped, alone = (one.measure(module, OUTPUT)["gradient_noise_scale"] for one in (other, fresh))
        assert (dropped.value, dropped.standard_error) == (alone.value, alone.standard_error)
    assert other.state_dict()["weight"] == fresh.state_dict()["weight"] == 1.5


def test_smoothing_is_a_weighted_mean_whose_error_knows_that_the_examples_are_the_same():
    rows = drawn(0, 20, SIGNAL * 3, SCALES)
    module, batch = with_gradients(rows)
    loss = OutputLoss(lambda outputs, targets: 0.5 * outputs**2)
    probe, alone = GradientNoiseScaleProbe([batch], smoothing=0.5), GradientNoiseScaleProbe([batch])
    traces = []
    for scale in (1.0, 2.0, 3.0):
        nn.init.constant_(module.weight, scale)
        smooth = probe.measure(module, loss)["gradient_noise_scale/covariance_trace"]
        traces.append(alone.measure(module, loss)["gradient_noise_scale/covariance_trace"])
    weights = torch.tensor([0.25, 0.5, 1.0]) / 1.75
    assert smooth.value == pytest.approx(sum(float(w) * t.value for w, t in zip(weights, traces, strict=True)))
    # every trace is a multiple of the first, so their errors add up as their values do
    assert smooth.standard_error / smooth.value == pytest.approx(traces[0].standard_error / traces[0].value)


def test_probe_measures_as_many_products_as_it_may():
    module, batch = classification()
    loss = OutputLoss(nn.CrossEntropyLoss(reduction="none"), likelihood="categorical")
    probe = GradientNoiseScaleProbe([batch], num_products=12)
    found = probe.measure(module, loss)["gradient_noise_scale/hessian_weighted"]
    assert found.num_matvecs == 13
    short = probe.measure(module, loss, Host(allowance_gradients=20.0))
    assert short["gradient_noise_scale/hessian_weighted"].num_matvecs == 6
    assert short["gradient_noise_scale"].price_gradients < 20


def test_critical_batch_size_is_the_better_known_scale():
    known, unknown = Estimate(value=100.0), Estimate(value=math.nan)
    scale = NoiseScale(
        noise_scale=known, gradient_norm_squared=known, covariance_trace=known, covariance=0.0, hessian_weighted=unknown
    )
    assert scale.critical_batch_size == 100
    assert scale.overheads(100) == (2, 2)
    assert scale.learning_rate_share(25) == pytest.approx(0.2)
    better = NoiseScale(
        noise_scale=known,
        gradient_norm_squared=known,
        covariance_trace=known,
        covariance=0.0,
        hessian_weighted=Estimate(value=50.0),
    )
    assert better.critical_batch_size == 50
    same = gradient_noise_scale(nn.Linear(1, 1).double(), OUTPUT, [(torch.ones(4, 1).double(), torch.zeros(4, 1))])
    assert same.noise_scale.value == pytest.approx(0, abs=1e-12)
    assert same.overheads(8)[0] == same.learning_rate_share(8) == pytest.approx(1)
    assert same.overheads(8)[1] > 1e9  # examples that say all the same are wasted
    with pytest.raises(UserError, match="batch_size must be positive, got 0"):
        scale.overheads(0)


def test_arguments_out_of_range():
    module, batch = with_gradients(drawn(0, 6, SIGNAL, SCALES))
    with pytest.raises(UserError, match="source must be one of auto, micro_batches, examples, got 'all'"):
        gradient_noise_scale(module, OUTPUT, [batch], source="all")
    with pytest.raises(UserError, match="num_products must be 0 or at least 2, got 1"):
        GradientNoiseScaleProbe([batch], num_products=1)
    with pytest.raises(UserError, match="smoothing must be at least 0 and below 1, got 1"):
        GradientNoiseScaleProbe([batch], smoothing=1)
    with pytest.raises(UserError, match="at least 3 micro_batches, got 2"):
        gradient_noise_scale(module, OUTPUT, split(batch, 3, 3), source="micro_batches")
    with pytest.raises(UserError, match="must have per_target and likelihood for gradients of examples"):
        gradient_noise_scale(module, lambda m, b: m(b[0]).mean(), [batch])
    with pytest.raises(UserError, match="at least one, got none"):
        combine([])
    nan = Estimate(value=math.nan)
    with pytest.raises(UserError, match="measurements must be finite"):
        combine([NoiseScale(noise_scale=nan, gradient_norm_squared=nan, covariance_trace=nan, covariance=0.0)])
