from __future__ import annotations

import io
import math
import statistics
import time

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from landscape_ray.errors import UserError
from landscape_ray.probes.fixed_loss import FixedLoss
from landscape_ray.probes.losses import OutputLoss
from landscape_ray.probes.operators.gauss_newton import GGNOperator
from landscape_ray.probes.probe import Host
from landscape_ray.probes.spectrum import ghost_norms
from landscape_ray.probes.spectrum.ggn_trace import GGNTraceProbe, ggn_trace
from landscape_ray.probes.spectrum.ghost_norms import Tape, verified
from landscape_ray.probes.spectrum.trace import trace

cross_entropy = OutputLoss(nn.CrossEntropyLoss(reduction="none"), "categorical")
half_squares = OutputLoss(lambda outputs, targets: 0.5 * (outputs - targets).square(), "gaussian")


class Scaled(nn.Module):
    """A linear layer of another make, with a multiplier."""

    def __init__(self, size, num):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(num, size)), nn.Parameter(torch.zeros(num))

    def forward(self, x):
        return F.linear(0.3 * x, self.weight, self.bias)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.GroupNorm(2, 4),
        nn.GELU(),
        nn.Conv2d(4, 6, 2, dilation=2, bias=False),
        nn.Flatten(),
        nn.LayerNorm(24),
        nn.Linear(24, 4),
    )


def build(name):
    """Return a module in float64, its inputs and the shape of its targets."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    modules = {
        "mlp": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Scaled(8, 7), nn.Tanh(), nn.Linear(7, 4)),
        "conv": convolutional,
        "tokens": lambda: nn.Sequential(nn.Linear(6, 5), nn.RMSNorm(5), nn.GELU(), nn.Linear(5, 4)),
        "tied": lambda: nn.Sequential(Tied(), nn.Linear(5, 4)),
        "embedding": lambda: nn.Sequential(nn.Embedding(7, 5), nn.Tanh(), nn.Linear(5, 4)),
    }
    shapes = {"mlp": (18, 6), "conv": (18, 1, 8, 8), "tokens": (18, 3, 6), "tied": (18, 5), "embedding": (18, 3)}
    shape = shapes[name]
    if name == "embedding":
        return modules[name](), torch.randint(7, shape, generator=generator), shape
    inputs = torch.randn(shape, generator=generator).double()
    return modules[name](), inputs, shape[:2] if name == "tokens" else shape[:1]


def problem(name, loss=cross_entropy):
    with torch.random.fork_rng():
        module, inputs, shape = build(name)
    generator = torch.Generator().manual_seed(2)
    if loss is cross_entropy:
        targets = torch.randint(4, shape, generator=generator)
    else:
        targets = torch.randn(*shape, 4, generator=generator).double()
    return module.double().eval(), (inputs, targets)


def dense_trace(module, loss, batches):
    return float(GGNOperator(FixedLoss(module, loss, batches)).dense().trace())


def parts(batch, first=13):
    inputs, targets = batch
    return [((inputs[:first], targets[:first]), first), ((inputs[first:], targets[first:]), len(inputs) - first)]


@pytest.mark.acceptance
@pytest.mark.parametrize("loss", [cross_entropy, half_squares])
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_exact_where_the_layers_are_known(name, loss, monkeypatch):
    monkeypatch.setattr("landscape_ray.probes.spectrum.ggn_trace.EXACT_AT_ONCE", math.inf)
    module, batch = problem(name, loss)
    norms = verified(FixedLoss(module, loss, [batch]), batch[0][:2]).price
    assert norms == 0.4 if name == "mlp" else norms > 0.4
    truth = dense_trace(module, loss, [batch])
    for batches in ([batch], parts(batch)):
        estimate = ggn_trace(module, loss, batches)
        assert estimate.value == pytest.approx(truth, rel=1e-10)
        assert (estimate.standard_error, estimate.converged, estimate.route) == (0.0, True, "exact")
        # a check that the loss is fixed, a forward, 4 columns, and 2 x 2 examples of the check of the norms
        assert estimate.price_gradients == pytest.approx(2 / 3 + 1 / 3 + 4 * norms + 4 / 18)


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("name", "route", "loss"),
    [
        ("tokens", "examples", half_squares),
        ("mlp", "examples", cross_entropy),
        ("tied", "chunks", half_squares),
        ("embedding", "chunks", cross_entropy),
    ],
)
def test_sampled_without_bias_and_with_honest_errors(name, route, loss, monkeypatch):
    monkeypatch.setattr("landscape_ray.probes.spectrum.ggn_trace.EXACT_AT_ONCE", 0.0)
    module, batch = problem(name, loss)
    truth, num = dense_trace(module, loss, [batch]), 60
    batches = parts(batch)
    estimates = [ggn_trace(module, loss, batches, tol=1e-6, max_gradients=3.2, seed=s) for s in range(num)]
    assert {e.route for e in estimates} == {route}
    errors = torch.tensor([e.value - truth for e in estimates])
    assert abs(float(errors.mean())) <= 4 * float(errors.std()) / math.sqrt(num)
    hits = sum(abs(e.value - truth) <= e.standard_error for e in estimates)
    assert hits >= stats.binom.ppf(1e-4, num, 0.683)


def test_error_of_a_single_sample_is_not_too_small():
    module, batch = problem("embedding")
    truth, num = dense_trace(module, cross_entropy, [batch]), 100
    estimates = [ggn_trace(module, cross_entropy, [batch], tol=1e-6, max_gradients=0.5, seed=s) for s in range(num)]
    assert {round(e.price_gradients, 6) for e in estimates} == {round(2 / 3 + 1.5 + 2 / 3 / 18, 6)}
    hits = sum(abs(e.value - truth) <= e.standard_error for e in estimates)
    assert hits >= stats.binom.ppf(1e-4, num, 0.683)


@pytest.mark.parametrize("name", ["embedding", "tokens"])
def test_stops_at_the_tolerance(name):
    module, batch = problem(name)
    truth, num = dense_trace(module, cross_entropy, [batch]), 40
    estimates = [ggn_trace(module, cross_entropy, [batch], tol=0.1, seed=s) for s in range(num)]
    for e in estimates:
        assert e.converged
        assert 0 < e.standard_error <= 0.1 * e.value
    assert sum(abs(e.value - truth) <= e.standard_error for e in estimates) >= stats.binom.ppf(1e-4, num, 0.62)
    short = ggn_trace(module, cross_entropy, [batch], tol=0.001, max_gradients=5.0)
    assert not short.converged
    assert short.price_gradients <= 5.0


def test_exact_once_sampling_is_dearer():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 20)).double()
    inputs = torch.randn(30, 6).double()
    batch = (inputs, torch.randint(20, (30,)))
    truth = dense_trace(module, cross_entropy, [batch])
    rough = ggn_trace(module, cross_entropy, [batch], tol=0.2)
    assert rough.route == "examples"
    fine = ggn_trace(module, cross_entropy, [batch], tol=1e-3)
    assert fine.route == "exact"
    assert fine.value == pytest.approx(truth, rel=1e-10)
    poor = ggn_trace(module, cross_entropy, [batch], tol=1e-3, max_gradients=4.0)
    assert (poor.route, poor.converged) == ("examples", False)
    assert poor.price_gradients <= 4.0


@pytest.mark.acceptance
def test_linear_regression_and_the_hessian_of_a_relu_network():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    module = nn.Linear(6, 1, bias=False).double()
    estimate = ggn_trace(module, half_squares, [(X, torch.zeros(50, 1).double())])
    assert estimate.value == pytest.approx(float(X.square().sum(1).mean()), rel=1e-12)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    batch = (X, torch.randint(4, (50,), generator=generator))
    hessian = trace(network, cross_entropy, [batch], tol=1e-9, max_matvecs=400)
    assert ggn_trace(network, cross_entropy, [batch]).value == pytest.approx(hessian.value, rel=1e-9)


def test_train_mode_takes_each_micro_batch_as_a_whole():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).double()
    batch = (torch.randn(16, 6).double(), torch.randint(4, (16,)))
    truth = dense_trace(module.train(), cross_entropy, [batch])
    # sixteen examples tell so little of their own spread that one estimate in twenty is four of its errors off
    estimates = [
        ggn_trace(module, cross_entropy, [batch], tol=0.05, max_gradients=400, eval_mode=False, seed=seed)
        for seed in range(10)
    ]
    assert {estimate.route for estimate in estimates} == {"chunks"}
    values = torch.tensor([estimate.value for estimate in estimates])
    assert abs(float(values.mean()) - truth) <= 4 * float(values.std()) / math.sqrt(10)
    assert float(values.std()) < 0.2 * truth
    alone = ggn_trace(module, cross_entropy, [batch], max_gradients=0.1, eval_mode=False)
    assert math.isinf(alone.standard_error)  # nothing to compare one sample with
    assert alone.converged is False


def test_frozen_parameters_are_left_out():
    module, batch = problem("conv")
    module[0].weight.requires_grad_(False)
    module[1].requires_grad_(False)
    estimate = ggn_trace(module, cross_entropy, [batch])
    assert estimate.route == "exact"
    assert estimate.value == pytest.approx(dense_trace(module, cross_entropy, [batch]), rel=1e-10)


@pytest.mark.parametrize("sequence", [2, 30])
def test_norms_of_sequences_by_either_way(sequence):
    # T (in + out) < in out or not
    generator = torch.Generator().manual_seed(0)
    a, d = torch.randn(3, sequence, 9, generator=generator), torch.randn(3, sequence, 8, generator=generator)
    expected = (d.mT @ a).square().sum((1, 2))
    assert ghost_norms._outer(a, d).tolist() == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": 1}, {"dilation": (2, 1), "padding": (0, 2)}])
@pytest.mark.parametrize("channels", [(2, 3), (16, 24)])  # the gradient is cheaper than products of pairs, or not
def test_norms_of_convolutions_in_float32_are_those_in_float64(settings, channels):
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(channels[0], channels[1], 3, **settings), nn.Tanh(), nn.Flatten())
    inputs = torch.randn(5, channels[0], 7, 8, generator=generator)
    norms = []
    for dtype in (torch.float32, torch.float64):
        function = FixedLoss(module.to(dtype), half_squares, [(inputs.to(dtype), torch.zeros(5, 1, dtype=dtype))])
        with function.surroundings():
            tape = Tape(function, inputs.to(dtype))
            cotangent = torch.randn(tape.outputs.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            norms.append(tape.squared_norms(cotangent).tolist())
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def price_of(module, shape):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inputs = torch.randn(shape)
        function = FixedLoss(module.eval(), half_squares, [(inputs, torch.zeros(shape[0], 1))])
        return verified(function, inputs[:2]).price


def test_norms_are_priced_by_the_shapes_of_the_layers():
    # one vector for each example: nothing but the backward pass
    assert price_of(nn.Linear(6, 10), (3, 6)) == 0.4
    # 7 vectors: pairs of them, 49 (6 + 10) products, are dearer than the gradient, 7 x 6 x 10, which is half of 3 times
    assert price_of(nn.Linear(6, 10), (3, 7, 6)) == pytest.approx(0.4 + 0.5)
    # 2 vectors: pairs are cheaper, 4 (6 + 10) beside 2 x 6 x 10 of the forward pass
    assert price_of(nn.Linear(6, 10), (3, 2, 6)) == pytest.approx(0.4 + 0.5 * 64 / 120)
    # a convolution to 4 patches of 18 numbers, whose pairs are cheaper, and which are copied together
    pairs = (1.5 * 16 * (16 + 18) + 25 * 4 * 18) / (4 * 16 * 18) / 3
    assert price_of(nn.Sequential(nn.Conv2d(2, 16, 3), nn.Flatten()), (3, 2, 4, 4)) == pytest.approx(0.4 + pairs)
    # what is frozen costs its part of a gradient, and no norms
    frozen = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 5))
    frozen[1].weight.requires_grad_(False)
    assert price_of(frozen, (3, 7, 6)) == pytest.approx(0.4 + 0.5 * 60 / 110)


def test_convolutions_whose_columns_are_dear_are_sampled():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(288, 12))
        inputs = torch.randn(64, 1, 8, 8)
    batch = inputs, torch.randint(12, (64,), generator=torch.Generator().manual_seed(0))
    found, exact = (ggn_trace(module, cross_entropy, [batch], tol=tol) for tol in (0.1, 1e-4))
    assert (found.route, exact.route) == ("examples", "exact")
    assert found.price_gradients < 0.5 * exact.price_gradients
    assert abs(found.value - exact.value) <= 3 * found.standard_error


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mlp", "tokens", "narrow", "wide"])
def test_prices_of_norms_are_what_they_take_by_the_clock(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, shape = {
            "mlp": lambda: (nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 256)), (256, 64)),
            "tokens": lambda: (nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)), (32, 64, 64)),
            "narrow": lambda: (residual(16), (128, 1, 16, 16)),
            "wide": lambda: (residual(48), (32, 1, 16, 16)),
        }[kind]()
        inputs = torch.randn(shape)
    with torch.no_grad():
        targets = torch.zeros_like(module(inputs))
    function = FixedLoss(module.eval(), half_squares, [(inputs, targets)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with function.surroundings():
            tape = Tape(function, inputs)
            gradient, norms = taken(function.gradient, lambda: tape.squared_norms(targets + 1))
    finally:
        torch.set_num_threads(threads)
    print(f"{kind}: {norms / gradient:.2f} gradients by the clock, {tape.price:.2f} by its price")
    assert 0.4 * tape.price <= norms / gradient <= 2.5 * tape.price


def residual(width):
    layers = [nn.Conv2d(1, width, 3, padding=1)]
    for _ in range(3):
        layers += [nn.GroupNorm(4, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def taken(*functions, repeats=9):
    """Median CPU seconds of each, in turns."""
    seconds = [[] for _ in functions]
    for _ in range(repeats):
        for function, times in zip(functions, seconds, strict=True):
            began = time.process_time()
            function()
            times.append(time.process_time() - began)
    return [statistics.median(times) for times in seconds]


class Masked(nn.Module):
    """Uses its weight for something else than a product with the input as it is."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.weight.square().sum()


def test_layers_that_are_not_what_they_seem_are_found_out():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, inputs = Masked(), torch.randn(8, 5)
        grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 3))
        images = torch.randn(4, 4, 4, 4)
    function = FixedLoss(module, cross_entropy, [(inputs, torch.zeros(8, dtype=torch.long))])
    with function.surroundings():
        assert Tape(function, inputs).covers_all
    assert verified(function, inputs[:2]) is None
    whole = FixedLoss(grouped, cross_entropy, [(images, torch.zeros(4, dtype=torch.long))])
    assert verified(whole, images[:2]) is None


def test_zero_network():
    module = nn.Linear(3, 4)
    nn.init.zeros_(module.weight)
    estimate = ggn_trace(module, half_squares, [(torch.zeros(6, 3), torch.zeros(6, 4))])
    assert estimate.value == pytest.approx(4.0)  # the biases alone
    silent = nn.Linear(3, 4, bias=False)
    estimate = ggn_trace(silent, half_squares, [(torch.zeros(6, 3), torch.zeros(6, 4))])
    assert (estimate.value, estimate.converged) == (0.0, True)


def test_probe():
    module, batch = problem("embedding")

    def probe():
        return GGNTraceProbe([batch], tol=0.1, seed=3)

    one, other = probe(), probe()
    found = [one.measure(module, cross_entropy)["ggn_trace"] for _ in range(3)]
    assert len({e.value for e in found}) == 3
    assert other.measure(module, cross_entropy)["ggn_trace"].value == found[0].value
    buffer = io.BytesIO()
    torch.save(other.state_dict(), buffer)
    buffer.seek(0)
    resumed = probe()
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert resumed.measure(module, cross_entropy)["ggn_trace"].value == found[1].value
    assert GGNTraceProbe.examples_apart
    scarce = probe().measure(module, cross_entropy, Host(allowance_gradients=2.5))["ggn_trace"]
    assert scarce.price_gradients <= 2.5
    assert scarce.standard_error > found[0].standard_error


def test_weights_that_are_not_finite():
    module, batch = problem("mlp")
    with torch.no_grad():
        module[0].weight[0, 0] = math.nan
    assert math.isnan(ggn_trace(module, cross_entropy, [batch]).value)
    assert math.isnan(GGNTraceProbe([batch]).measure(module, cross_entropy)["ggn_trace"].value)
    with torch.no_grad():
        module[0].weight.fill_(1e300)  # finite, and overflows
    assert math.isnan(ggn_trace(module, half_squares, [(batch[0] * 1e10, batch[0][:, :4])]).value)


def test_refused():
    module, batch = problem("mlp")
    with pytest.raises(UserError, match="tol must be positive and finite, got 0"):
        ggn_trace(module, cross_entropy, [batch], tol=0)
    with pytest.raises(UserError, match="max_gradients must be positive, got -1"):
        GGNTraceProbe([batch], max_gradients=-1)
    with pytest.raises(UserError, match=r"loss\.likelihood must be categorical or gaussian"):
        ggn_trace(module, OutputLoss(nn.CrossEntropyLoss(reduction="none")), [batch])
    with pytest.raises(UserError, match="loss must have per_target and likelihood"):
        ggn_trace(module, lambda m, b: m(b[0]).mean(), [batch])
    whole_squares = OutputLoss(lambda outputs, targets: (outputs - targets).square(), "gaussian")
    with pytest.raises(UserError, match=r"loss\.likelihood must be that of the loss, got 'gaussian'"):
        ggn_trace(module, whole_squares, [(batch[0], torch.zeros(18, 4).double())])
    with pytest.raises(UserError, match="batch must be a pair of tensors"):
        ggn_trace(module, cross_entropy, [((batch[0], batch[1], batch[1]), 18)])
