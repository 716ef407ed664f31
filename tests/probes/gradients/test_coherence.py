from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from landscape_ray.errors import UserError
from landscape_ray.probes.gradients.coherence import GradientCoherenceProbe, gradient_coherence
from landscape_ray.probes.losses import OutputLoss

OUTPUT = OutputLoss(lambda outputs, targets: outputs)
"""The loss of an example is its output: the gradient of a linear layer is the input."""


def coherence_of(rows):
    module = nn.Linear(rows.shape[1], 1, bias=False).double()
    return gradient_coherence(module, OUTPUT, [(rows, torch.zeros(len(rows), 1, dtype=torch.float64))])


def drawn(seed, num, signal=0.5, size=6):
    return signal + torch.randn(num, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(rows):
    units = F.normalize(rows)
    cosines = units @ units.mT
    num = len(rows)
    coherence = num * rows.mean(0).square().sum() / rows.square().sum(1).mean()
    return torch.stack([coherence, (cosines.sum() - cosines.trace()) / (num * (num - 1))])


@pytest.mark.acceptance
def test_identical_gradients_give_m_and_orthogonal_ones_one():
    identical = coherence_of(torch.tensor([[1.0, 2.0]]).double().repeat(9, 1))
    assert identical.m_coherence.value == pytest.approx(9)
    assert identical.mean_cosine.value == pytest.approx(1)
    orthogonal = coherence_of(torch.eye(8).double() * 3)
    assert orthogonal.m_coherence.value == pytest.approx(1)
    assert orthogonal.mean_cosine.value == pytest.approx(0, abs=1e-12)
    for found in (identical, orthogonal):  # whatever else is drawn of these, it is the same
        assert found.m_coherence.standard_error == pytest.approx(0, abs=1e-7)
        assert found.mean_cosine.standard_error == pytest.approx(0, abs=1e-7)


def test_gradients_that_cancel_give_nothing():
    found = coherence_of(torch.tensor([[2.0], [-2.0], [2.0], [-2.0]]).double())
    assert found.m_coherence.value == pytest.approx(0, abs=1e-12)
    assert found.mean_cosine.value == pytest.approx(-1 / 3)


def test_values_and_errors_equal_those_by_hand():
    rows = drawn(0, 11) * torch.arange(1.0, 12.0).double()[:, None]
    found = coherence_of(rows)
    value = by_hand(rows)
    left_out = torch.stack([by_hand(rows[[u for u in range(11) if u != i]]) for i in range(11)])
    left_out[:, 0] *= 11 / 10  # m stays that of the whole
    error = (10 / 11 * (left_out - left_out.mean(0)).square().sum(0)).sqrt()
    for estimate, wanted, wanted_error in zip((found.m_coherence, found.mean_cosine), value, error, strict=True):
        assert estimate.value == pytest.approx(float(wanted), rel=1e-9)
        assert estimate.standard_error == pytest.approx(float(wanted_error), rel=1e-9)
    assert found.num_examples == 11


@pytest.mark.acceptance
def test_standard_errors_cover_the_mean_at_their_rate():
    num, size = 100, 40
    values = torch.stack([by_hand(drawn(seed, size)) for seed in range(5000, 6500)]).mean(0)
    inside = torch.zeros(2)
    for seed in range(num):
        found = coherence_of(drawn(seed, size))
        for i, estimate in enumerate((found.m_coherence, found.mean_cosine)):
            inside[i] += abs(estimate.value - float(values[i])) <= estimate.standard_error
    # one standard error holds 68 %: three binomial standard deviations at either side
    assert ((inside / num - 0.683).abs() < 0.14).all(), inside / num


def test_zero_gradients():
    rows = drawn(0, 6)
    rows[2] = 0
    found = coherence_of(rows)
    assert found.m_coherence.value == pytest.approx(float(by_hand(rows)[0]))
    assert found.mean_cosine.value == pytest.approx(float(by_hand(rows)[1]))
    rows[1:] = 0
    alone = coherence_of(rows).m_coherence
    assert alone.value == pytest.approx(1)
    assert math.isfinite(alone.standard_error)
    rows[0] = 0
    assert math.isnan(coherence_of(rows).m_coherence.value)


def test_probe_and_function_agree():
    rows = drawn(1, 8)
    module = nn.Linear(6, 1, bias=False).double()
    probe = GradientCoherenceProbe([(rows, torch.zeros(8, 1).double())])
    found = probe.measure(module, OUTPUT)
    assert list(found) == ["gradient_coherence", "gradient_coherence/mean_cosine"]
    assert found["gradient_coherence"].value == coherence_of(rows).m_coherence.value
    assert found["gradient_coherence"].route == "factored"
    assert probe.price_gradients == pytest.approx(found["gradient_coherence"].price_gradients)
    nn.init.constant_(module.weight, math.nan)
    assert math.isnan(gradient_coherence(module, OUTPUT, probe.batches).m_coherence.value)


def test_two_examples_are_too_few():
    with pytest.raises(UserError, match="at least 3 examples, got 2"):
        coherence_of(drawn(0, 2))
