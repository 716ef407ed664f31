from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn
from torch.nn.functional import cross_entropy

from landscape_ray.data.images import ImageConfig, open_images
from landscape_ray.errors import UserError
from landscape_ray.probes.losses import OutputLoss
from landscape_ray.probes.sharpness.logits import LogitSharpnessProbe, NormalisedLogits, logit_sharpness
from landscape_ray.training.loss import LossConfig, Objective

CLASSES = OutputLoss(nn.CrossEntropyLoss(reduction="none"), likelihood="categorical")
VALUES = OutputLoss(lambda outputs, targets: 0.5 * (outputs - targets).square(), likelihood="gaussian")


def tokens(num_sequences=6, seed=2):
    generator = torch.Generator().manual_seed(seed)
    table = nn.Embedding(5, 4).double()
    with torch.no_grad():
        table.weight.copy_(2 * torch.randn(5, 4, generator=generator))
    inputs = torch.randint(5, (num_sequences, 3), generator=generator)
    return table, (inputs, torch.randint(4, (num_sequences, 3), generator=generator))


@pytest.mark.acceptance
@pytest.mark.parametrize("radius", [1e-3, 0.2, 2.0])
def test_equals_the_best_of_all_corners(radius):
    module, (inputs, targets) = tokens()
    y, t = module(inputs)[:, -1].detach(), targets[:, -1]
    base = cross_entropy(y, t)
    worst = 0.0
    for row, target in zip(y, t, strict=True):  # the loss is convex in the logits, and a sum over examples
        corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=torch.float64)
        moved = row + corners * radius * (row.abs() + 1)
        worst += float(cross_entropy(moved, target.expand(16), reduction="none").max()) / len(y)
    found = logit_sharpness(module, CLASSES, [(inputs, targets)], radius=radius)
    assert found.value == pytest.approx(100 * (worst - float(base)) / (1 + float(base)), rel=1e-9)
    assert found.standard_error == 0.0
    assert found.price_gradients == pytest.approx(1 / 3 + 2 / 3)  # and the check of the first measurement


@pytest.mark.parametrize(("loss", "values"), [(CLASSES, False), (VALUES, True)])
def test_keskars_optimiser_finds_no_more(loss, values):
    generator = torch.Generator().manual_seed(8)
    module = nn.Linear(3, 4).double()
    inputs = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    targets = torch.randn(5, 4, generator=generator).double() if values else torch.randint(4, (5,), generator=generator)
    y = module(inputs).detach().numpy()

    def fall(z):
        logits = torch.tensor(y + z.reshape(y.shape), requires_grad=True)
        value = loss.per_target(logits, targets).mean()
        (gradient,) = torch.autograd.grad(value, logits)
        return -float(value.detach()), -gradient.numpy().ravel()

    box = (0.3 * (np.abs(y) + 1)).ravel()
    options = {"maxiter": 200, "ftol": 1e-15, "gtol": 1e-12}
    best = minimize(
        fall, 0 * box, jac=True, method="L-BFGS-B", bounds=list(zip(-box, box, strict=True)), options=options
    )
    base = -fall(0 * box)[0]
    found = logit_sharpness(module, loss, [(inputs, targets)], radius=0.3)
    assert found.value >= 100 * (-best.fun - base) / (1 + base) - 1e-9
    if not values:  # concave in no direction that matters: the descent ends in the same corner
        assert found.value == pytest.approx(100 * (-best.fun - base) / (1 + base), rel=1e-6)


@pytest.mark.parametrize("batch_size", [10, 12])
def test_classes_under_squared_error_are_one_hot(batch_size):
    """With the loss of a run, on digits: as many examples as classes would be compared with the wrong ones."""
    data = open_images(ImageConfig())
    inputs, targets = data.probe_batch(0, batch_size)
    objective = Objective(LossConfig(name="squared_error"), data.signature)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    found = logit_sharpness(module, objective, [(inputs, targets)], radius=0.1).value
    y = module(inputs).detach().double()
    one_hot = torch.zeros_like(y)
    for row, target in enumerate(targets.tolist()):
        one_hot[row, target] = 1.0
    away = 0.1 * torch.where(y >= one_hot, 1.0, -1.0).double() * (y.abs() + 1)
    base, worst = (0.5 * (z - one_hot).square().sum(1).mean() for z in (y, y + away))
    assert found == pytest.approx(100 * float((worst - base) / (1 + base)), rel=1e-9)
    assert float(base) == pytest.approx(float(objective(module, (inputs, targets)).detach()), rel=1e-5)


def test_values_without_a_last_axis_belong_to_the_rows():
    module, values = nn.Linear(3, 1).double(), torch.arange(4.0, dtype=torch.float64)
    loss = OutputLoss(lambda outputs, targets: 0.5 * (outputs.flatten() - targets).square(), likelihood="gaussian")
    inputs = torch.ones(4, 3, dtype=torch.float64)
    found, expected = (logit_sharpness(module, loss, [(inputs, t)]).value for t in (values, values[:, None]))
    assert found == expected


def test_closed_form_of_two_equal_logits():
    module = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(module.weight)
    batch = (torch.ones(4, 1), torch.tensor([0, 1, 1, 0]))
    found = logit_sharpness(module, CLASSES, [batch], radius=1e-3)
    truth = 100 * (math.log1p(math.exp(2e-3)) - math.log(2)) / (1 + math.log(2))
    assert found.value == pytest.approx(truth, rel=1e-12)


def test_only_the_last_position_counts():
    module, (inputs, targets) = tokens()
    whole = logit_sharpness(module, CLASSES, [(inputs, targets)]).value
    other = targets.clone()
    other[:, :-1] = 0
    changed = inputs.clone()
    changed[:, :-1] = 1
    assert logit_sharpness(module, CLASSES, [(changed, other)]).value == whole
    other[:, -1] = (other[:, -1] + 1) % 4
    assert logit_sharpness(module, CLASSES, [(inputs, other)]).value != whole


def test_micro_batches_make_up_the_whole():
    module, (inputs, targets) = tokens()
    parts = [((inputs[:4], targets[:4]), 4), ((inputs[4:], targets[4:]), 2)]
    whole = logit_sharpness(module, CLASSES, [(inputs, targets)]).value
    assert logit_sharpness(module, CLASSES, parts).value == pytest.approx(whole, rel=1e-12)


def test_probe_at_several_radii():
    module, batch = tokens()
    probe = LogitSharpnessProbe([batch])
    assert probe.price_gradients == pytest.approx(1 / 3)
    probe.measure(module, CLASSES)
    found = probe.measure(module, CLASSES)
    assert list(found) == ["logit_sharpness", "logit_sharpness/rho_0.0005"]
    assert found["logit_sharpness"].price_gradients == pytest.approx(1 / 3)
    assert found["logit_sharpness"].value == pytest.approx(2 * found["logit_sharpness/rho_0.0005"].value, rel=1e-2)


def test_normalised_logits_by_explicit_loop():
    generator = torch.Generator().manual_seed(1)
    outputs = 7 * torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(4, (3, 5), generator=generator)
    expected = []
    for row, target in zip(outputs.view(15, 4).tolist(), targets.flatten().tolist(), strict=True):
        mean = sum(row) / 4
        length = math.sqrt(sum((o - mean) ** 2 for o in row))
        unit = [(o - mean) / length for o in row]
        expected.append(math.log(sum(math.exp(u) for u in unit)) - unit[target])
    loss = NormalisedLogits(CLASSES)
    assert loss.per_target(outputs, targets).tolist() == pytest.approx(expected)
    assert float(loss(nn.Identity(), (outputs, targets))) == pytest.approx(sum(expected) / 15)
    equal = torch.zeros(1, 4, requires_grad=True)
    value = loss.per_target(equal, torch.tensor([2])).mean()
    assert float(value.detach()) == pytest.approx(math.log(4))


@pytest.mark.parametrize("radii", [[], [0.0], [math.nan], [0.1, 0.1]])
def test_radii_out_of_range(radii):
    with pytest.raises(UserError, match="radii must be one or more different numbers"):
        LogitSharpnessProbe([None], radii=radii)


def test_losses_and_targets_that_do_not_suit():
    module, (inputs, targets) = tokens()
    with pytest.raises(UserError, match="per_target and likelihood for the sharpness of logits"):
        logit_sharpness(module, lambda m, b: m(b[0]).mean(), [(inputs, targets)])
    with pytest.raises(UserError, match=r"must be a categorical or gaussian likelihood .* got neither"):
        logit_sharpness(module, OutputLoss(nn.CrossEntropyLoss(reduction="none")), [(inputs, targets)])
    targets[2, -1] = -100
    with pytest.raises(UserError, match=r"targets at the last position must be classes from 0 to 3, got \[.*-100"):
        logit_sharpness(module, CLASSES, [(inputs, targets)])
