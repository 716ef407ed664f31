from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import landscape_ray.data
from landscape_ray.errors import UserError
from landscape_ray.probes.estimate import Estimate
from landscape_ray.probes.sharpness.stability import edge_state, sgd_curvature, stability_ratio, threshold
from landscape_ray.probes.sharpness.top import SharpnessProbe


def rotated(values):
    """Return a symmetric matrix with these eigenvalues and no zero entries."""
    generator = torch.Generator().manual_seed(len(values))
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    return basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T


def growth(hessian, build, shrink=0.0, num_steps=1500):
    """Return the size of the last iterates on a quadratic, relative to the first point."""
    weight = nn.Parameter(torch.ones(len(hessian), dtype=torch.float64))
    optimizer = build([weight])
    for step in range(num_steps):
        weight.grad = hessian @ weight.detach()
        if shrink:
            with torch.no_grad():
                weight.mul_(1 - shrink)
        optimizer.step()
        size = float(weight.detach().norm())
        if step >= 200 and not 1e-6 < size < 1e6:
            break
    return size


SGD = {
    "gradient descent": {"lr": 0.1},
    "heavy ball": {"lr": 0.1, "momentum": 0.9},
    "light ball": {"lr": 0.05, "momentum": 0.3},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "l2": {"lr": 0.1, "momentum": 0.9, "weight_decay": 3.0},
    "nesterov with l2": {"lr": 0.1, "momentum": 0.5, "nesterov": True, "weight_decay": 2.0},
}


@pytest.mark.acceptance
@pytest.mark.parametrize("settings", SGD.values(), ids=SGD)
def test_torch_sgd_diverges_just_above_and_converges_just_below(settings):
    edge = threshold("sgd", **settings, coupled=True)
    for factor, limit in ((0.96, (0, 0.1)), (1.04, (10, math.inf))):
        hessian = rotated([factor * edge, 0.3 * edge, 0.05 * edge])
        assert limit[0] <= growth(hessian, lambda w: torch.optim.SGD(w, **settings)) <= limit[1]


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_whose_weights_shrink(nesterov):
    lr, decay = 0.1, 2.0
    edge = threshold("sgd", lr, 0.8, nesterov=nesterov, weight_decay=decay)
    assert edge < 0.95 * threshold("sgd", lr, 0.8, nesterov=nesterov)
    for factor, limit in ((0.96, (0, 0.1)), (1.04, (10, math.inf))):
        hessian = rotated([factor * edge, 0.3 * edge])
        build = lambda w: torch.optim.SGD(w, lr=lr, momentum=0.8, nesterov=nesterov)  # noqa: E731
        assert limit[0] <= growth(hessian, build, shrink=lr * decay) <= limit[1]


ADAPTIVE = {
    "adam": (torch.optim.Adam, {"lr": 0.1, "momentum": 0.9}, {"betas": (0.9, 0.999)}),
    "adamw": (torch.optim.AdamW, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1.5}, {"betas": (0.9, 0.99)}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.1}, {}),
}


@pytest.mark.acceptance
@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_optimizers_with_their_preconditioner_held_fixed(name):
    kind, settings, more = ADAPTIVE[name]
    edge = threshold(name, **settings)
    if name == "adam":
        assert edge == pytest.approx(38 / 0.1)
    # weights so small that epsilon drowns the second moments: a preconditioner that stays, of two values
    roots = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64)
    for factor, limit in ((0.96, (0, 0.1)), (1.04, (10, math.inf))):
        hessian = roots[:, None] * rotated([factor * edge, 0.3 * edge, 0.02 * edge]) * roots
        weights = [nn.Parameter(torch.full((n,), 1e-60, dtype=torch.float64)) for n in (2, 1)]
        groups = [{"params": [w], "eps": eps} for w, eps in zip(weights, (1.0, 4.0), strict=True)]
        optimizer = kind(groups, lr=settings["lr"], weight_decay=settings.get("weight_decay", 0.0), **more)
        for _ in range(1000):
            gradient = hessian @ torch.cat([w.detach() for w in weights])
            weights[0].grad, weights[1].grad = gradient.split([2, 1])
            optimizer.step()
        size = 1e60 * float(torch.cat([w.detach() for w in weights]).norm())
        assert limit[0] <= size <= limit[1]


def test_schedule_free_with_an_average_that_rests():
    lr, beta, decay = 0.1, 0.9, 3.0
    edge = threshold("schedule_free_adamw", lr, beta, weight_decay=decay)
    for factor, stable in ((0.98, True), (1.02, False)):
        z, x = 1.0, 0.0
        for _ in range(1000):
            y = (1 - beta) * z + beta * x
            z -= lr * (factor * edge + decay) * y
        assert (abs(z) < 0.1) == stable


def test_no_closed_form():
    assert threshold("muon", 0.1, 0.95) is None
    assert threshold("lion", 0.1) is None
    assert threshold("adam", 0.1, 0.9, weight_decay=0.1, coupled=True) is None
    assert threshold("rmsprop", 0.1, 0.9) is None
    assert threshold("sgd", math.nan) is None
    assert threshold("sgd", 0.0) == math.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -0.1}, "lr must be at least 0"),
        ({"lr": 0.1, "momentum": 1.0}, "momentum must be at least 0 and below 1"),
        ({"lr": 0.1, "weight_decay": -1.0}, "weight_decay must be at least 0"),
    ],
)
def test_threshold_refuses(arguments, message):
    with pytest.raises(UserError, match=message):
        threshold("sgd", **arguments)


@pytest.mark.acceptance
@pytest.mark.parametrize(("lr", "published"), [(1.95, 0.0526), (2.05, 21.3)])
def test_sgd_on_the_unit_sphere(lr, published):
    """tr(H) = 1, and 2 is where it turns; gradient descent would go up to 20."""
    dimension, num_steps, num_runs = 10, 300, 2000
    factor = 1 - 2 * lr / dimension + lr**2 / dimension
    assert factor**num_steps == pytest.approx(published, rel=0.01)
    assert (lr * sgd_curvature(1.0, batch_size=1) > 2) == (factor > 1)
    generator = np.random.default_rng(0)
    weights = np.ones((num_runs, dimension)) / math.sqrt(dimension)
    for _ in range(num_steps):
        x = generator.normal(size=weights.shape)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        weights -= lr * (weights * x).sum(1, keepdims=True) * x
    squares = (weights**2).sum(1)
    assert abs(squares.mean() - factor**num_steps) < 4 * squares.std() / math.sqrt(num_runs)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_sgd_curvature_is_necessary_for_mean_square_stability(batch_size):
    """The covariance of the iterates, over all batches without replacement, written out."""
    num, size = 5, 3
    generator = np.random.default_rng(batch_size)
    rows = generator.normal(size=(num, size))
    hessian = rows.T @ rows / num
    trace, norm = np.trace(hessian), np.linalg.norm(hessian)
    curvature = sgd_curvature(trace, batch_size=batch_size, num_examples=num, frobenius_norm=norm)
    assert sgd_curvature(trace, batch_size=batch_size, num_examples=num) <= curvature  # without the norm: weaker

    def radius(lr):
        steps = []
        for chosen in itertools.combinations(range(num), batch_size):
            part = rows[list(chosen)]
            step = np.eye(size) - lr * part.T @ part / batch_size
            steps.append(np.kron(step, step))
        return np.abs(np.linalg.eigvals(np.mean(steps, axis=0))).max()

    assert radius(1.001 * 2 / curvature) > 1


def test_sgd_curvature_is_exact_for_inputs_of_one_length():
    generator = np.random.default_rng(1)
    rows = generator.normal(size=(6, 3)) * np.array([3.0, 1.0, 0.3])
    rows *= 2 / np.linalg.norm(rows, axis=1, keepdims=True)
    critical = 2 / sgd_curvature(4.0, batch_size=1, num_examples=6)
    for lr, stable in ((0.999 * critical, True), (1.001 * critical, False)):
        steps = [np.kron(s, s) for s in (np.eye(3) - lr * np.outer(x, x) for x in rows)]
        assert (np.abs(np.linalg.eigvals(np.mean(steps, axis=0))).max() < 1) == stable


def test_sgd_curvature_of_the_full_batch_and_refusals():
    assert sgd_curvature(3.0, batch_size=7, num_examples=7, frobenius_norm=2.0) == pytest.approx(4 / 3)
    assert sgd_curvature(3.0, batch_size=1, num_examples=1) == 0
    with pytest.raises(UserError, match="trace must be positive"):
        sgd_curvature(0.0, batch_size=1)
    with pytest.raises(UserError, match="batch_size must be at least 1 and at most num_examples, got 8 of 7"):
        sgd_curvature(1.0, batch_size=8, num_examples=7)


def test_stability_ratio():
    found = stability_ratio(Estimate(value=9.0, standard_error=0.5, converged=False, price_gradients=7.0), 20.0)
    assert (found.value, found.standard_error, found.converged, found.price_gradients) == (0.45, 0.025, False, 0.0)
    with pytest.raises(UserError, match="threshold must be positive"):
        stability_ratio(found, 0.0)


def test_edge_states():
    steps = range(0, 400, 10)
    rising = [0.1 + 0.02 * step for step in steps]
    state = edge_state(rising, 20.0, steps)
    assert (state.state, state.sharpening) == ("below", True)
    assert (state.slope, state.low, state.high) == pytest.approx((0.02, 0.02, 0.02))
    hovering = [min(value, 5.0) + 0.2 * (-1) ** i for i, value in enumerate(rising)]
    assert edge_state(hovering, 5.0, steps).state == "at the edge"
    assert edge_state(rising, 5.0, steps).state == "above"
    assert edge_state([1.0, 2.0, 2.0, 2.0], [1.0, 2.0, 2.0, 4.0], tail=0.5).ratio == 0.75
    falling = edge_state(rising[::-1], 20.0, steps)
    assert not falling.sharpening
    assert falling.high < 0
    single = edge_state([math.nan, 3.0, math.inf], 3.0)
    assert (single.state, single.ratio, single.low, single.high) == ("at the edge", 1.0, -math.inf, math.inf)
    assert math.isnan(single.slope)


def test_slope_equals_scipy_and_covers_the_truth():
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(100):
        times = np.cumsum(generator.uniform(0.5, 2.0, size=40))
        values = 3.0 + 0.05 * times + generator.standard_t(2, size=40)
        found = edge_state(values, 1.0, times)
        slope, _, low, high = stats.theilslopes(values, times, alpha=0.95)
        assert found.slope == pytest.approx(slope)
        assert found.low == pytest.approx(low, abs=0.01)
        assert found.high == pytest.approx(high, abs=0.01)
        covered += found.low <= 0.05 <= found.high
    assert covered >= 100 * 0.95 - 3 * math.sqrt(100 * 0.95 * 0.05)


def test_long_series_are_thinned():
    values = np.linspace(0.0, 1.0, 5000)
    assert edge_state(values, 1.0).slope == pytest.approx(1 / 4999)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], 2.0, None, 0.0), "tail must be above 0"),
        (([1.0], [2.0, 3.0]), "must be as long as values"),
        (([1.0], 2.0, [1, 2]), "must be as long as values"),
        (([1.0, 2.0], [2.0, 0.0]), "thresholds must be positive"),
        (([math.nan], 1.0), "values must hold a finite one"),
    ],
)
def test_edge_state_refuses(arguments, message):
    values, thresholds, *rest = arguments
    with pytest.raises(UserError, match=message):
        edge_state(values, thresholds, *rest[:1], **({"tail": rest[1]} if len(rest) > 1 else {}))


@pytest.mark.acceptance
def test_gradient_descent_settles_at_the_edge():
    """First 200 digits, MLP 64-32-32-10 with tanh, half squared error, full batch, step size 0.4: 5.07 against 5."""
    with np.load(Path(landscape_ray.data.__file__).with_name("digits.npz")) as digits:
        inputs = torch.tensor(digits["images"][:200].reshape(200, 64) / 16, dtype=torch.float32)
        targets = torch.eye(10)[torch.tensor(digits["labels"][:200].astype(np.int64))]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))

    def loss(module, batch):
        return 0.5 * (module(batch[0]) - batch[1]).square().sum(1).mean()

    probe = SharpnessProbe([((inputs, targets), 200)])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.4)
    values, losses = [], []
    for step in range(1500):
        optimizer.zero_grad()
        value = loss(module, (inputs, targets))
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
        if step % 50 == 49:
            values.append(probe.measure(module, loss)["sharpness"].value)
    state = edge_state(values, threshold("sgd", 0.4), tail=0.5)
    assert state.state == "at the edge"
    assert losses[-1] < 0.2 * losses[50]
    assert np.mean(np.diff(losses[750:]) > 0) > 0.1  # not monotone: that is what the edge looks like
