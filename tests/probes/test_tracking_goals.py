"""What tracking the sharpness every 50 updates must be: right to a percent, cheap, and far cheaper than PyHessian."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from torch import nn

from landscape_ray.data import TextConfig, open_text
from landscape_ray.data.images import ImageConfig, open_images
from landscape_ray.models import GPTConfig, build_model
from landscape_ray.models.resnet import ResNetConfig
from landscape_ray.probes import OutputLoss, SharpnessProbe
from landscape_ray.probes.fixed_loss import observing
from landscape_ray.probes.operators import HessianOperator
from landscape_ray.probes.spectrum.lanczos import extremal_pairs

LOSS = OutputLoss(nn.CrossEntropyLoss(reduction="none"), likelihood="categorical")
EVERY, NUM = 50, 8


class Run:
    """A small GPT or residual net in training; `batch_size` examples an update."""

    def __init__(self, kind, width=8):
        generator = torch.Generator().manual_seed(0)
        if kind == "gpt":
            self.data, self.batch_size = open_text(TextConfig(context_length=32)), 16
            self.module = build_model(GPTConfig(depth=2, width=32), self.data.signature, generator)
            self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=2e-3, betas=(0.9, 0.95))
        else:
            self.data, self.batch_size = open_images(ImageConfig(label_noise=0.1)), 256
            config = ResNetConfig(depth=8, width=width, norm="group", num_groups=4)
            self.module = build_model(config, self.data.signature, generator)
            self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.05, momentum=0.9)
        self.step = 0

    def train(self, num_steps):
        for _ in range(num_steps):
            self.optimizer.zero_grad()
            LOSS(self.module, self.data.batch(0, self.step, self.batch_size)).backward()
            self.optimizer.step()
            self.step += 1

    def largest(self, batch):
        """The largest eigenvalue by Lanczos in float64, to a residual that leaves no error."""
        with observing(self.module, LOSS, [batch], double=True) as function:
            found = extremal_pairs(
                HessianOperator(function), function.size, tol=3e-3, max_matvecs=150, dtype=torch.float64
            )
        assert found.converged
        return float(found.values[0])


def power_iteration(module, batch, seed, tol):
    """Value and price of the power iteration of PyHessian: until two values in a row differ by less than tol."""
    with observing(module, LOSS, [batch]) as function:
        hessian = HessianOperator(function)
        v = torch.randn(function.size, generator=torch.Generator().manual_seed(seed))
        last = None
        for _ in range(100):
            v = v / v.norm()
            product = hessian(v)
            value = float(v @ product)
            if last is not None and abs(value - last) < tol * (abs(last) + 1e-6):
                break
            last, v = value, product
        return value, function.spent_gradients


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.parametrize("kind", ["gpt", "cnn"])
def test_tracking_is_right_to_a_percent_and_costs_a_third_of_power_iteration(kind):
    run = Run(kind)
    batch = run.data.probe_batch(0, run.batch_size)
    probe = SharpnessProbe([batch], route="auto", tol=0.05)
    spent, errors = {"ours": 0.0, "power": 0.0}, {"ours": [], "power": []}
    run.train(2 * EVERY)
    for index in range(NUM):
        run.train(EVERY)
        wanted = run.largest(batch)
        found = probe.measure(run.module, LOSS)["sharpness"]
        value, price = power_iteration(run.module, batch, index, 3e-3)
        errors["ours"].append(abs(found.value / wanted - 1))
        errors["power"].append(abs(value / wanted - 1))
        assert abs(found.value - wanted) <= found.standard_error
        if index:  # the first one, cold for both
            spent["ours"] += found.price_gradients
            spent["power"] += price
    print(f"{kind}: {spent['power'] / spent['ours']:.2f} times cheaper, largest errors {sorted(errors['ours'])[-2:]}")
    # nine in ten, as in the benchmark; on this residual net differences alone are off by up to a percent
    assert sorted(errors["ours"])[-2] <= 1e-2
    assert max(errors["ours"]) <= 2e-2
    # as power iteration is hardly better than what was asked for, it is not asked for too much
    assert max(errors["power"]) >= 2e-3
    assert spent["power"] >= 3 * spent["ours"]


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.parametrize(("kind", "part"), [("gpt", 8), ("cnn", 8)])
def test_tracking_on_a_part_of_a_batch_takes_a_twentieth_of_the_training_time(kind, part):
    run = Run(kind, width=16)  # narrower convolutions take as long for a quarter of a batch as for half of it
    batch = run.data.probe_batch(0, run.batch_size // part)
    probe = SharpnessProbe([batch], route="auto", tol=0.25, extrapolate=True)
    run.train(EVERY)
    errors, prices, updates, probing = [], [], [], []
    for _ in range(NUM):
        for _ in range(5):
            began = time.process_time()
            run.train(EVERY // 5)
            updates.append((time.process_time() - began) / (EVERY // 5))
        began = time.process_time()
        found = probe.measure(run.module, LOSS)["sharpness"]
        probing.append(time.process_time() - began)
        prices.append(found.price_gradients)
        errors.append(abs(found.value / run.largest(batch) - 1))
    price = statistics.mean(prices) / part / EVERY
    # medians, which others on the machine disturb less; the first is a cold one, as is one of `cold_every`
    first, *warm = probing
    one = (first + (probe.cold_every - 1) * statistics.median(warm)) / probe.cold_every
    clock = one / (EVERY * statistics.median(updates))
    print(
        f"{kind}, 1/{part}: error {statistics.median(errors):.2%}, by price {price:.2%}, by the clock {clock:.2%}: "
        f"{1e3 * statistics.median(warm):.0f} ms warm, an update {1e3 * statistics.median(updates):.1f} ms"
    )
    assert statistics.median(errors) <= 0.05
    assert price <= 0.05  # in gradients on a training batch
    assert clock <= 0.05
